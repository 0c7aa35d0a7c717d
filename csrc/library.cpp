// The cells of cells.h, as those see them who know no templates.
#include "library.h"

#include "cells/cells.h"
#include "cuda/launch.h"

namespace fused_rnn {
namespace {

#if defined(FUSED_RNN_CUDA) || defined(FUSED_RNN_CUDA_ON_CPU)
template <class Params>
void run_on_cuda(cuda::CellId cell, const Params& p, const cuda::Layout& layout,
                 const cuda::Host& host) {
  try {
    if (layout.engine == cuda::Engine::persistent_cluster)
      return cuda::run_persistent_cluster(cell, p, layout, host);
    if (layout.engine == cuda::Engine::persistent_grid)
      return cuda::run_persistent_grid(cell, p, layout, host);
  } catch (const cuda::LaunchRefused&) {
    // Others hold a part of the GPU (MPS, a partition); nothing has run.
  }
  cuda::run_per_step(cell, p, host);
}
constexpr auto cuda_forward = run_on_cuda<RecurrenceForwardParams>;
constexpr auto cuda_backward = run_on_cuda<RecurrenceBackwardParams>;
#else
constexpr decltype(Engines::cuda_forward) cuda_forward = nullptr;
constexpr decltype(Engines::cuda_backward) cuda_backward = nullptr;
#endif

const Engines engines{[](cpu::CellId cell, DType dtype) {
                        return cpu::active_instruction_set().forward(cell, dtype);
                      },
                      [](cpu::CellId cell, DType dtype) {
                        return cpu::active_instruction_set().backward(cell, dtype);
                      },
                      cuda_forward, cuda_backward};

enum Index : int {
#define FUSED_RNN_INDEX(name, cell) name,
  FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_INDEX)
};

const CellTraits cells[] = {
#define FUSED_RNN_TRAITS(name, cell) \
  {#name,                            \
   cell::gates,                      \
   cell::saved,                      \
   cell::unit_weights,               \
   cell::has_c,                      \
   cell::split_gates,                \
   cell::reads_prev_h,               \
   cell::reads_h,                    \
   cell::late_gate,                  \
   Index::name,                      \
   &engines},
    FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_TRAITS)};

}  // namespace

const Library& library() {
  static const Library found{cells, static_cast<int>(sizeof(cells) / sizeof(cells[0]))};
  return found;
}

}  // namespace fused_rnn

#ifdef FUSED_RNN_USER_CELLS
extern "C" __attribute__((visibility("default"))) const fused_rnn::Library* fused_rnn_library() {
  return &fused_rnn::library();
}
#endif
