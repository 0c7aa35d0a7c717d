// The cells that ops know by name, and the table of a recurrence's weights: which there are, how large
// and in which order. Whoever handles weights walks it, Python too.
#pragma once

#include <string>

#include "../library.h"
#include "../params.h"

namespace fused_rnn::binding {

// Throws std::invalid_argument where there is none of that name.
const CellTraits& cell_named(const char* name);
inline const CellTraits& cell_named(const std::string& name) { return cell_named(name.c_str()); }

// Takes in the cells of a library, which stays loaded.
void add_library(const Library& library);

enum class Weight {
  weight_ih,
  weight_hh,
  bias_ih,
  bias_hh,
  weight_hr,
  weight_ch,
  ln_input_weight,
  ln_input_bias,
  ln_hidden_weight,
  ln_hidden_bias,
  ln_c_weight,
  ln_c_bias,
};

// A weight of shape (factor * rows, columns), where letters are those of params.h and columns of '1'
// are none.
struct WeightRow {
  Weight which;
  const char* name;
  int64_t factor;
  char rows, columns;
  const char* letters;  // the shape in words
};

class WeightTable {
 public:
  WeightTable(const CellTraits& cell, bool has_biases, bool projected, LayerNorm norm);
  const WeightRow* begin() const { return rows_; }
  const WeightRow* end() const { return rows_ + count_; }
  int64_t size() const { return count_; }

 private:
  void add(Weight which, const char* name, int64_t factor, char rows, char columns,
           const char* letters);

  WeightRow rows_[12];
  int64_t count_ = 0;
};

// Where a recurrence has it.
template <class Pointer>
Pointer& place(LaneWeights<Pointer>& of, Weight which) {
  switch (which) {
    case Weight::weight_ih:
      return of.weight_ih;
    case Weight::weight_hh:
      return of.weight_hh;
    case Weight::bias_ih:
      return of.bias_ih;
    case Weight::bias_hh:
      return of.bias_hh;
    case Weight::weight_hr:
      return of.weight_hr;
    case Weight::weight_ch:
      return of.weight_ch;
    case Weight::ln_input_weight:
      return of.ln_input.weight;
    case Weight::ln_input_bias:
      return of.ln_input.bias;
    case Weight::ln_hidden_weight:
      return of.ln_hidden.weight;
    case Weight::ln_hidden_bias:
      return of.ln_hidden.bias;
    case Weight::ln_c_weight:
      return of.ln_c.weight;
    case Weight::ln_c_bias:
      break;
  }
  return of.ln_c.bias;
}

}  // namespace fused_rnn::binding
