// What a call's work looks like before any arithmetic: how it is divided among threads and in which
// order rows run. Compiled once, for any machine (see instantiate.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../params.h"
#include "team.h"

namespace fused_rnn::cpu {

// How the work of one call is divided.
struct Division {
  int64_t blocks = 1;     // row blocks per lane
  int64_t members = 1;    // threads per team
  bool parallel = false;  // whether more than one thread is worth waking

  // `panels` is how many panels of units there are to share out, `weight_bytes` their size per lane.
  Division(const Shape& shape, int gates, int64_t panels, size_t weight_bytes, int threads);
};

// Rows of each block, by falling length.
class RowOrder {
 public:
  RowOrder(const Shape& shape, int64_t blocks);
  ~RowOrder();

  int64_t begin(int64_t block) const { return begin_[block]; }
  int64_t end(int64_t block) const { return begin_[block + 1]; }
  int64_t row(int64_t i) const { return rows_[i]; }

  // The end of the rows of `block` that take part in timestep t.
  int64_t active_end(int64_t block, int64_t t) const;

 private:
  const int64_t* lengths_;
  std::vector<int64_t> rows_, begin_;
};

// The parts of all teams (team.h).
struct Parts {
  explicit Parts(int64_t count);
  ~Parts();
  Parts(const Parts&) = delete;
  Parts& operator=(const Parts&) = delete;
  Part* const data;
};

}  // namespace fused_rnn::cpu
