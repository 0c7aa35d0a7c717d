// What the ops of layers and of recurrences share: the call, as far as it is no tensor, and the tensors
// that go with every step.
//
// Both kinds of op have the same arguments (letters as in params.h):
//
//   cell      the name of one
//   primals   what has a gradient: input, the initial states if there are any (h and, for cells with a
//             cell state, c), and for each recurrence its weights in the order of the table (cells.h)
//   rest      lengths (B), batch_sizes (T), resets (T, B), and the seed of what is drawn, without which
//             nothing is, and zoneout is its expectation; each of them optional. Four arguments of
//             forward, where torch.jit traces no list of such, and a list of backward
//   settings  has_biases, projected, how many states, recurrences, directions, want_cells; then flags
//             of the op's own
//   options   absent for a plain step, else layer_norm (a LayerNorm), zoneout_h, zoneout_c,
//             recurrent_dropout, layer_norm_eps
//
// Forward returns output, h_n, c_n for cells with a cell state, the cells if wanted, and then, if asked to
// save, what backward takes after output as its `results`: the reserve unless it is empty, the cells of a
// cell with a cell state, unprojected if there is a projection, statistics under layer normalisation.
// Backward takes as `grads` those of output, h_n, c_n and cells, each of them optional.
//
// Complex input, and with it everything else, is dual numbers, value + tangent * i where i^2 = 0: the
// results' real parts are those of the real parts, their imaginary parts the derivative of that in the
// direction of the imaginary parts.
#pragma once

#include "../step.h"
#include "cells.h"
#include "tensors.h"

// tests/native.py builds the ops of recurrences a second time, with the CUDA kernels compiled for the CPU
// (FUSED_RNN_CUDA_ON_CPU) and another name for the ops.
#ifndef FUSED_RNN_NAMESPACE
#define FUSED_RNN_NAMESPACE fused_rnn
#endif

// Through macros, so that the name is expanded before torch pastes it.
#define FUSED_RNN_LIBRARY(name, library) STABLE_TORCH_LIBRARY_FRAGMENT(name, library)
#define FUSED_RNN_LIBRARY_IMPL(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)

namespace fused_rnn::binding {

// The argument `cell` of an op.
struct CellArgument {
  const CellTraits* traits;
};

using Settings = std::vector<int64_t>;
using Options = std::optional<std::vector<double>>;

struct Call {
  static constexpr size_t count = 6;  // of settings before the op's own

  const CellTraits& cell;
  bool has_biases, projected;
  int64_t states, recurrences;
  int directions;
  bool want_cells, varied;
  Variation variation{};  // its seed is filled in where tensors are

  // Expects `own` settings after those that ops share.
  Call(CellArgument cell_in, const Settings& settings, size_t own, const Options& options);

  LayerNorm layer_norm() const { return variation.layer_norm; }
  WeightTable weights() const { return {cell, has_biases, projected, layer_norm()}; }
};

// How much forward saves for backward: values per unit and step, and statistics per step.
struct SavedCounts {
  int64_t reserve, cells, statistics;

  explicit SavedCounts(const Call& call)
      : reserve(call.cell.saved),
        cells(1),
        statistics(norm_count(call.layer_norm(), call.cell.has_c)) {
    if (!call.varied) return;
    reserve = SavedValues(call.layer_norm(), call.cell.gates, call.cell.saved, call.cell.reads_h,
                          call.cell.has_c)
                  .count;
    cells = 1 + (call.variation.zoneout_c > 0);
  }
};

// Lengths within 0..limit; on the CPU that is checked.
void check_lengths(const Tensor& lengths, const Tensor& like, int64_t limit, int64_t B,
                   const char* what);

const int64_t* seed_pointer(const Tensor& seed, const Tensor& like);

void check_state(const char* name, const OptionalTensor& state, const Tensor& like, int64_t L,
                 int64_t B, int64_t n, const char* letters);

// Arguments that only cells with a cell state have.
void check_no_c(const CellTraits& cell, const char* name, const OptionalTensor& argument);

// The gradients that backward takes, in the order of forward's results.
struct Gradients {
  OptionalTensor output, h_n, c_n, cells;
  explicit Gradients(const OptionalTensorList& given);
};

// What a step has beside the primals, alive as long as this is.
struct Ragged {
  OptionalTensor lengths, batch_sizes, resets;

  Ragged(const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
         const OptionalTensor& resets);
  // Checks them and fills what `p` has of them.
  void fill(const Tensor& like, Shape& p);
};

// The list `rest` of backward.
struct Rest {
  Ragged ragged;
  OptionalTensor seed;
  explicit Rest(const OptionalTensorList& given);
};

// Fills what a call says of its shape, and of the variation.
void fill(const Call& call, const OptionalTensor& seed, const Tensor& like, Shape& p);

}  // namespace fused_rnn::binding

// The op's string becomes a cell without a std::string of its own, which torch's conversion leaves behind.
namespace torch::stable::detail {
template <>
struct ToImpl<fused_rnn::binding::CellArgument> {
  static fused_rnn::binding::CellArgument call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    const char* name = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &name));
    const std::string copy(name);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return {&fused_rnn::binding::cell_named(copy)};
  }
};
}  // namespace torch::stable::detail
