#include "plan.h"

#include <algorithm>
#include <numeric>

namespace fused_rnn::cpu {

Division::Division(const Shape& p, int64_t per_row, int64_t panels, size_t weight_bytes,
                   int threads) {
  const int64_t threads_per_lane = threads / std::max<int64_t>(p.L, 1);
  parallel = threads > 1 && p.T * p.B * p.L * per_row >= 200000;  // waking one costs a few us
  if (!parallel || threads_per_lane < 2) return;
  // Separate rows need no meeting, which costs 0.2 us between cores that share a cache and 1 us or more
  // between those that don't, and the latter then wait for each other's h as well. But every thread
  // streams all the weights: worth it while they fit the cache that cores share and each block fills more
  // than a tile, or fit twice a core's own and it fills some of one, or fit the cache before that.
  const size_t bytes = per_row * weight_bytes;
  const int64_t rows = p.B / threads_per_lane;
  if ((bytes <= (size_t(1) << 23) && rows >= 16) || (bytes <= (size_t(1) << 21) && rows >= 4) ||
      (bytes <= (size_t(1) << 17) && rows >= 1)) {
    blocks = threads_per_lane;
  } else if (p.B * per_row >= (rows > 0 ? 65536 : 49152) * threads_per_lane) {
    // Units are shared where a step is worth its meetings, sooner if threads have no row of their own.
    members = std::min(threads_per_lane, panels);
  } else {
    blocks = std::min(threads_per_lane, p.B);
  }
}

RowOrder::RowOrder(const Shape& p, int64_t blocks)
    : lengths_(p.lengths), T_(p.T), B_(p.B), rows_(p.B), block_(p.B + 1), begin_(blocks + 1) {
  std::vector<int64_t> sorted(p.B);
  std::iota(sorted.begin(), sorted.end(), 0);
  if (lengths_)
    std::stable_sort(sorted.begin(), sorted.end(),
                     [&](int64_t a, int64_t b) { return lengths_[a] > lengths_[b]; });
  int64_t at = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    begin_[block] = at;
    // Of unequal lengths each block has some. Otherwise neighbours stay together: what a core fetches
    // ahead of its rows is not what another one writes.
    const int64_t rows = (p.B - block + blocks - 1) / blocks, first = lengths_ ? block : at;
    for (int64_t i = 0; i < rows; ++i, ++at) {
      rows_[at] = sorted[first + i * (lengths_ ? blocks : 1)];
      block_[at] = block;
    }
  }
  begin_[blocks] = at;
  if (!lengths_) return;
  before_.assign(blocks * (T_ + 1), 0);
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t* before = before_.data() + block * (T_ + 1);
    int64_t active = end(block) - begin(block);
    for (int64_t t = 0; t < T_; ++t) {
      while (active > 0 && lengths_[rows_[begin(block) + active - 1]] <= t) --active;
      before[t + 1] = before[t] + active;
    }
  }
}

RowOrder::~RowOrder() = default;

Chunks::Chunks(const Shape& p, const RowOrder& order, int64_t rows) : order_(order), T_(p.T) {
  const int64_t most = std::max<int64_t>(order.end(0) - order.begin(0), 1);  // the largest block
  const int64_t wanted = std::clamp<int64_t>((rows + most - 1) / most, 1, std::max<int64_t>(T_, 1));
  count = (T_ + wanted - 1) / wanted;
  steps = count ? (T_ + count - 1) / count : 1;
  count = (T_ + steps - 1) / steps;
  capacity = steps * most;
}

Parts::Parts(int64_t count) : data(new Part[count]) {}
Parts::~Parts() { delete[] data; }

}  // namespace fused_rnn::cpu
