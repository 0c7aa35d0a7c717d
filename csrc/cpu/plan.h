// What a call's work looks like before any arithmetic: how it is divided among threads, in which order
// rows run, and how time is cut into chunks. Compiled once, for any machine (see instantiate.h).
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
  int64_t members = 1;    // threads per block
  bool parallel = false;  // whether more than one thread is worth waking

  // `per_row` are the multiply-adds of a row's timestep, as many as a lane has weights; `panels` is how
  // many panels of units there are to share out.
  Division(const Shape& shape, int64_t per_row, int64_t panels, size_t weight_bytes, int threads);
};

// Rows of each block, by falling length.
class RowOrder {
 public:
  RowOrder(const Shape& shape, int64_t blocks);
  ~RowOrder();

  int64_t begin(int64_t block) const { return begin_[block]; }
  int64_t end(int64_t block) const { return begin_[block + 1]; }
  int64_t row(int64_t i) const { return rows_[i]; }
  // Where row i of `block` stands among all rows by falling length.
  int64_t rank(int64_t block, int64_t i) const {
    const auto blocks = static_cast<int64_t>(begin_.size()) - 1;
    return lengths_ ? (i - begin(block)) * blocks + block : i;
  }

  // Of an array with `width` values for each row of each lane, where a row's begin, and how many there are.
  // Blocks lie apart: what one core fetches ahead of its rows, several rows on, is not what another writes
  // in every step.
  int64_t place(int64_t lane, int64_t i, int64_t width) const {
    return (lane * B_ + i) * width + (lane * (begin_.size() - 1) + block_[i]) * apart;
  }
  int64_t places(int64_t lanes, int64_t width) const {
    return lanes * (B_ * width + (begin_.size() - 1) * apart);
  }

  // The end of the rows of `block` that take part in timestep t.
  int64_t active_end(int64_t block, int64_t t) const {
    return lengths_ ? begin(block) + before(block, t + 1) - before(block, t) : end(block);
  }
  // How many rows of `block` take part in the timesteps before t, all told.
  int64_t before(int64_t block, int64_t t) const {
    return lengths_ ? before_[block * (T_ + 1) + t] : (end(block) - begin(block)) * t;
  }

 private:
  static constexpr int64_t apart = 4416;  // values: whole cache lines of any type, not whole pages
  const int64_t* lengths_;
  const int64_t T_, B_;
  std::vector<int64_t> rows_, block_, begin_, before_;
};

// Time in chunks: chunk c is the timesteps that the c-th `steps` steps of a lane process. The rows that
// take part in a chunk are numbered by time, and by order within a timestep.
class Chunks {
 public:
  int64_t steps;     // of a chunk; the last may have fewer
  int64_t count;     // of chunks
  int64_t capacity;  // rows of a block in a chunk, at most

  // About `rows` rows of a block in a chunk.
  Chunks(const Shape& shape, const RowOrder& order, int64_t rows);

  struct Times {
    int64_t begin, end;
  };
  Times times(bool reverse, int64_t chunk) const {
    const int64_t first = chunk * steps, last = first + steps < T_ ? first + steps : T_;
    return reverse ? Times{T_ - last, T_ - first} : Times{first, last};
  }
  int64_t rows(int64_t block, Times times) const {
    return order_.before(block, times.end) - order_.before(block, times.begin);
  }
  int64_t row(int64_t block, Times times, int64_t t, int64_t i) const {
    return order_.before(block, t) - order_.before(block, times.begin) + i - order_.begin(block);
  }

 private:
  const RowOrder& order_;
  const int64_t T_;
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
