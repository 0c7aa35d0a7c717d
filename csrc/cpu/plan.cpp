#include "plan.h"

#include <algorithm>
#include <numeric>

namespace fused_rnn::cpu {

Division::Division(const Shape& p, int gates, int64_t panels, size_t weight_bytes, int threads) {
  const int64_t per_row = gates * p.H * p.P;  // multiply-adds of one row's timestep
  const int64_t threads_per_lane = threads / std::max<int64_t>(p.L, 1);
  parallel = threads > 1 && p.T * p.B * p.L * per_row >= 200000;  // waking one costs a few us
  if (!parallel || threads_per_lane < 2) return;
  // Separate rows need no meeting, but every thread then streams all the weights: worth it while they
  // fit its own cache and each block still fills its tiles.
  const bool weights_fit = weight_bytes <= (size_t(1) << 19);
  if (weights_fit && p.B >= 8 * threads_per_lane) {
    blocks = threads_per_lane;
  } else if (p.B * per_row >= 32768 * threads_per_lane) {  // a meeting costs about 0.2 us
    members = std::min(threads_per_lane, panels);
  } else {
    blocks = std::min(threads_per_lane, p.B);
  }
}

RowOrder::RowOrder(const Shape& p, int64_t blocks)
    : lengths_(p.lengths), rows_(p.B), begin_(blocks + 1) {
  std::vector<int64_t> sorted(p.B);
  std::iota(sorted.begin(), sorted.end(), 0);
  if (lengths_)
    std::stable_sort(sorted.begin(), sorted.end(),
                     [&](int64_t a, int64_t b) { return lengths_[a] > lengths_[b]; });
  int64_t at = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    begin_[block] = at;
    for (int64_t i = block; i < p.B; i += blocks) rows_[at++] = sorted[i];
  }
  begin_[blocks] = at;
}

RowOrder::~RowOrder() = default;

int64_t RowOrder::active_end(int64_t block, int64_t t) const {
  if (!lengths_) return end(block);
  return std::partition_point(rows_.begin() + begin(block), rows_.begin() + end(block),
                              [&](int64_t b) { return lengths_[b] > t; }) -
         rows_.begin();
}

Parts::Parts(int64_t count) : data(new Part[count]) {}
Parts::~Parts() { delete[] data; }

}  // namespace fused_rnn::cpu
