// A thread makes the elements of one column, of every so many rows.
#include "dropout.h"

#include "../dtype.h"
#include "../philox.h"
#include "device.cuh"

namespace fused_rnn::cuda {
namespace {

template <class S>
KERNEL void dropout_kernel(DropoutParams p, Compute<S> scale) {
  using V = Compute<S>;
  const int64_t i = int64_t(block_index().x) * block_size() + thread_index();
  if (i >= p.n) return;
  const auto seed = static_cast<uint64_t>(*p.seed);
  for (int64_t row = block_index().y; row < p.rows; row += grid_size().y) {
    const bool dropped = is_chosen(seed, fused_rnn::Stream::weight_dropout, row, p.n, i, p.p);
    const V x = Memory<V>::load(static_cast<const S*>(p.input) + row * p.n + i, 1);
    Memory<V>::store(x * (dropped ? V(0) : scale), static_cast<S*>(p.output) + row * p.n + i, 1);
  }
}

template <class S>
void dropout(const DropoutParams& p, Stream stream) {
  constexpr unsigned threads = 128;
  constexpr int64_t max_rows = 65535;
  const Grid grid{{static_cast<unsigned>((p.n + threads - 1) / threads),
                   static_cast<unsigned>(p.rows < max_rows ? p.rows : max_rows), 1},
                  threads};
  launch(dropout_kernel<S>, grid, stream, p, static_cast<Compute<S>>(1 / (1 - p.p)));
}

}  // namespace

void run_dropout(const DropoutParams& p, void* stream) {
  // In the order of DType.
  constexpr void (*table[])(const DropoutParams&, Stream) = {dropout<float>, dropout<double>,
                                                             dropout<BFloat16>, dropout<Half>};
  table[static_cast<int>(p.dtype)](p, static_cast<Stream>(stream));
}

}  // namespace fused_rnn::cuda
