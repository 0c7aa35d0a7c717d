// The GPU that plans are made for where tests/cuda_on_cpu runs the kernels: a small one, so that shapes
// which fibres can run take all its ways. Tests may choose another.
#include "../../csrc/cuda/plan.h"

namespace fused_rnn::cuda {
namespace {

Chip chip{90, 8, 227 * 1024, {4, 2, 0, 0}, true, 1.7};

}  // namespace

Chip chip_at_hand() { return chip; }

}  // namespace fused_rnn::cuda

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_chip(int multiprocessors,
                                                                        int shared_bytes,
                                                                        const int* clusters) {
  auto& chip = fused_rnn::cuda::chip;
  chip.multiprocessors = multiprocessors;
  chip.shared_bytes = shared_bytes;
  for (int i = 0; i < fused_rnn::cuda::cluster_size_count; ++i) chip.clusters[i] = clusters[i];
}

// The patience that a plan for the chip gives a thread, in clock_unit cycles.
extern "C" __attribute__((visibility("default"))) unsigned cuda_on_cpu_patience() {
  using namespace fused_rnn;
  const cuda::Task task{4, 0, DType::float32, 3, 2, 1, 20, false, false, nullptr};
  return cuda::choose(task, cuda::chip, nullptr).patience;
}
