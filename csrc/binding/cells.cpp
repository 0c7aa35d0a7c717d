#include "cells.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

namespace fused_rnn::binding {
namespace {

// Grows at its head, so that a call may read while another thread loads a cell.
struct Node {
  const Library* library;
  const Node* next;
};
const Node built_in{&library(), nullptr};
std::atomic<const Node*> libraries{&built_in};

}  // namespace

const CellTraits& cell_named(const char* name) {
  for (const Node* node = libraries.load(); node; node = node->next)
    for (int i = 0; i < node->library->count; ++i)
      if (std::strcmp(name, node->library->cells[i].name) == 0) return node->library->cells[i];
  throw std::invalid_argument(std::string("no cell of that name: ") + name);
}

void add_library(const Library& library) {
  const Node* node = new Node{&library, libraries.load()};
  libraries.store(node);  // load_cell holds a lock
}

void WeightTable::add(Weight which, const char* name, int64_t factor, char rows, char columns,
                      const char* letters) {
  rows_[count_++] = {which, name, factor, rows, columns, letters};
}

WeightTable::WeightTable(const CellTraits& cell, bool has_biases, bool projected, LayerNorm norm) {
  const int64_t G = cell.gates;
  add(Weight::weight_ih, "weight_ih", G, 'H', 'I', "(G*H, I)");
  add(Weight::weight_hh, "weight_hh", G, 'H', 'P', "(G*H, P)");
  if (has_biases) {
    add(Weight::bias_ih, "bias_ih", G, 'H', '1', "(G*H)");
    add(Weight::bias_hh, "bias_hh", G, 'H', '1', "(G*H)");
  }
  if (projected) add(Weight::weight_hr, "weight_hr", 1, 'P', 'H', "(P, H)");
  if (cell.unit_weights > 0)
    add(Weight::weight_ch, "weight_ch", cell.unit_weights, 'H', '1', "(U*H)");
  if (norm == LayerNorm::none) return;
  const bool joint = norm == LayerNorm::joint;
  add(Weight::ln_input_weight, joint ? "ln_g_weight" : "ln_ih_weight", G, 'H', '1', "(G*H)");
  add(Weight::ln_input_bias, joint ? "ln_g_bias" : "ln_ih_bias", G, 'H', '1', "(G*H)");
  if (!joint) {
    add(Weight::ln_hidden_weight, "ln_hh_weight", G, 'H', '1', "(G*H)");
    add(Weight::ln_hidden_bias, "ln_hh_bias", G, 'H', '1', "(G*H)");
  }
  if (cell.has_c) {
    add(Weight::ln_c_weight, "ln_c_weight", 1, 'H', '1', "(H)");
    add(Weight::ln_c_bias, "ln_c_bias", 1, 'H', '1', "(H)");
  }
}

}  // namespace fused_rnn::binding
