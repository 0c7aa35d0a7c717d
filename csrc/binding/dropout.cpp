// dropout(input, p, seed): input times 0 with probability p, else times 1 / (1 - p): of rows (the last
// dimension) as philox.h draws them, in the stream of weight dropout. reference.dropout_factors has it in
// Python.
#include "call.h"
#include "host.h"
#ifdef FUSED_RNN_PER_STEP
#include "../cuda/dropout.h"
#endif
#ifdef FUSED_RNN_CUDA_ON_CPU
#include "cuda_on_cpu/arguments.h"
#endif

namespace fused_rnn::binding {
namespace {

void run(const DropoutParams& p, const Tensor& like) {
#ifdef FUSED_RNN_CUDA_ON_CPU
  const cuda_on_cpu::DropoutArguments watched(p);
  cuda::run_dropout(p, nullptr);
  watched.check_results();
#else
#ifdef FUSED_RNN_CUDA
  if (!like.is_cpu()) return on_cuda(like, [&](void* stream) { cuda::run_dropout(p, stream); });
#endif
  on_cpu(like,
         [&](const cpu::Host& host) { cpu::active_instruction_set().dropout(p.dtype)(p, host); });
#endif
}

Tensor dropout(const Tensor& input_in, double probability, const Tensor& seed) {
  DropoutParams p{};
  const Tensor input = as_contiguous(input_in);
  p.dtype = storage_type("input", input);
  FUSED_RNN_EXPECT(input.dim() >= 1, "Expected input of at least one dimension, got ",
                   shape_string(input));
  FUSED_RNN_EXPECT(probability >= 0 && probability < 1, "Expected p in [0, 1), got ", probability);
  Tensor output = torch::stable::empty_like(input);
  p.n = input.size(input.dim() - 1);
  p.rows = p.n > 0 ? input.numel() / p.n : 0;
  p.p = probability;
  p.seed = seed_pointer(seed, input);
  p.input = input.const_data_ptr();
  p.output = output.data_ptr();
  if (p.rows * p.n > 0) run(p, input);
  return output;
}

}  // namespace
}  // namespace fused_rnn::binding

FUSED_RNN_LIBRARY(FUSED_RNN_NAMESPACE, library) {
  library.def("dropout(Tensor input, float p, Tensor seed) -> Tensor");
}

FUSED_RNN_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, CPU, library) {
  library.impl("dropout", TORCH_BOX(&fused_rnn::binding::dropout));
}
#ifdef FUSED_RNN_CUDA
FUSED_RNN_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, CUDA, library) {
  library.impl("dropout", TORCH_BOX(&fused_rnn::binding::dropout));
}
#endif
