// The body of an instruction set's translation unit. The including file defines
//   FUSED_RNN_ISA            its namespace and name
//   FUSED_RNN_VECTOR_BYTES   16, 32 or 64
//   FUSED_RNN_F16C           if it has the half-precision conversions
//   FUSED_RNN_BFLOAT16       if it multiplies pairs of bfloat16, and
//   FUSED_RNN_ELSE           then the set that has all the rest
//   FUSED_RNN_DUALS          for layers of duals alone, which take as long to compile as all other types
//   FUSED_RNN_BY_DTYPE       in tests, if not all storage types are wanted
// and has set the compiler's target. Standard headers come first, in prelude.h, and what instantiates
// their templates lives in plan.cpp: the linker keeps one copy of an inline function, and it must not
// be one that other machines cannot run.

#include "../cells/cells.h"
#include "../dtype.h"
#include "../philox.h"
#include "../step.h"
#include "engine.h"
#include "plan.h"
#include "team.h"

namespace fused_rnn {

#ifdef FUSED_RNN_ELSE
namespace FUSED_RNN_ELSE {
cpu::ForwardFn forward_function(cpu::CellId cell, DType dtype);
cpu::BackwardFn backward_function(cpu::CellId cell, DType dtype);
cpu::AttentionForwardFn attention_forward_function(DType dtype);
cpu::AttentionBackwardFn attention_backward_function(DType dtype);
cpu::DropoutFn dropout_function(DType dtype);
}  // namespace FUSED_RNN_ELSE
#endif

namespace FUSED_RNN_ISA {
cpu::ForwardFn dual_forward_function(cpu::CellId cell, DType dtype);
cpu::BackwardFn dual_backward_function(cpu::CellId cell, DType dtype);

using cpu::AttentionBackwardFn;
using cpu::AttentionForwardFn;
using cpu::BackwardFn;
using cpu::CellId;
using cpu::Chunks;
using cpu::Division;
using cpu::DropoutFn;
using cpu::ForwardFn;
using cpu::Host;
using cpu::Parts;
using cpu::RowOrder;
using cpu::run_phases;

#include "scratch.h"
#include "simd.h"
#include "random.h"
#include "varied.h"
#include "product.h"
#include "forward.h"
#include "backward.h"
#if !defined(FUSED_RNN_DUALS) && !defined(FUSED_RNN_CELLS_ONLY)
#include "attention.h"
#include "peak.h"
#endif

template <class Cell, class S>
void forward(const LayerForwardParams& p, const Host& host) {
  Forward<Cell, S>(p, host).run();
}
template <class Cell, class S>
void backward(const LayerBackwardParams& p, const Host& host) {
  Backward<Cell, S>(p, host).run();
}

// The functions of a storage type, by cell.
template <class S>
ForwardFn forward_of(CellId cell) {
#define FUSED_RNN_FORWARD(name, cell) {forward<cell, S>, forward<Varied<cell>, S>},
  static constexpr ForwardFn table[][2] = {FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_FORWARD)};
  return table[cell.index][cell.varied];
}
template <class S>
BackwardFn backward_of(CellId cell) {
#define FUSED_RNN_BACKWARD(name, cell) {backward<cell, S>, backward<Varied<cell>, S>},
  static constexpr BackwardFn table[][2] = {FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_BACKWARD)};
  return table[cell.index][cell.varied];
}

#if defined(FUSED_RNN_DUALS)
ForwardFn dual_forward_function(CellId cell, DType dtype) {
  return dtype == DType::dual32 ? forward_of<Dual<float> >(cell) : forward_of<Dual<double> >(cell);
}
BackwardFn dual_backward_function(CellId cell, DType dtype) {
  return dtype == DType::dual32 ? backward_of<Dual<float> >(cell)
                                : backward_of<Dual<double> >(cell);
}
#elif defined(FUSED_RNN_ELSE)
// A set that has something of its own for layers of bfloat16 only leaves the rest to another.
ForwardFn forward_function(CellId cell, DType dtype) {
  return dtype == DType::bfloat16 ? forward_of<BFloat16>(cell)
                                  : FUSED_RNN_ELSE::forward_function(cell, dtype);
}
BackwardFn backward_function(CellId cell, DType dtype) {
  return dtype == DType::bfloat16 ? backward_of<BFloat16>(cell)
                                  : FUSED_RNN_ELSE::backward_function(cell, dtype);
}
#else
// In the order of DType. Layers take duals as well, from a translation unit of their own.
#ifndef FUSED_RNN_BY_DTYPE
#define FUSED_RNN_BY_DTYPE(function) \
  {function<float>, function<double>, function<BFloat16>, function<Half>}
#endif

bool carries_duals(DType dtype) { return dtype == DType::dual32 || dtype == DType::dual64; }

ForwardFn forward_function(CellId cell, DType dtype) {
  static constexpr ForwardFn (*table[])(CellId) = FUSED_RNN_BY_DTYPE(forward_of);
  return carries_duals(dtype) ? dual_forward_function(cell, dtype)
                              : table[static_cast<int>(dtype)](cell);
}
BackwardFn backward_function(CellId cell, DType dtype) {
  static constexpr BackwardFn (*table[])(CellId) = FUSED_RNN_BY_DTYPE(backward_of);
  return carries_duals(dtype) ? dual_backward_function(cell, dtype)
                              : table[static_cast<int>(dtype)](cell);
}
#endif

// ---- what has no cell, and is the extension's alone

#if !defined(FUSED_RNN_DUALS) && !defined(FUSED_RNN_CELLS_ONLY)
double multiply_add_function(int64_t rounds) { return multiply_adds(rounds); }

#ifdef FUSED_RNN_ELSE
AttentionForwardFn attention_forward_function(DType dtype) {
  return FUSED_RNN_ELSE::attention_forward_function(dtype);
}
AttentionBackwardFn attention_backward_function(DType dtype) {
  return FUSED_RNN_ELSE::attention_backward_function(dtype);
}
DropoutFn dropout_function(DType dtype) { return FUSED_RNN_ELSE::dropout_function(dtype); }
#else
template <class S>
void dropout(const DropoutParams& p, const Host& host) {
  const auto seed = static_cast<uint64_t>(*p.seed);
  parallel(host, p.rows, p.rows * p.n > 65536, [&](int64_t begin, int64_t end) {
    using V = Vector<Compute<S> >;
    for (int64_t row = begin; row < end; ++row) {
      const S* from = static_cast<const S*>(p.input) + row * p.n;
      S* to = static_cast<S*>(p.output) + row * p.n;
      dropout_factors<Compute<S> >(
          seed, Stream::weight_dropout, row, p.n, p.p, [&](int64_t i, int64_t left, V factor) {
            Memory<V>::store(Memory<V>::load(from + i, left) * factor, to + i, left);
          });
    }
  });
}
template <class S>
void attention_forward(const AttentionForwardParams& p, const Host& host) {
  AttentionForward<S>(p, host).run();
}
template <class S>
void attention_backward(const AttentionBackwardParams& p, const Host& host) {
  AttentionBackward<S>(p, host).run();
}

AttentionForwardFn attention_forward_function(DType dtype) {
  static constexpr AttentionForwardFn table[] = FUSED_RNN_BY_DTYPE(attention_forward);
  return table[static_cast<int>(dtype)];
}
AttentionBackwardFn attention_backward_function(DType dtype) {
  static constexpr AttentionBackwardFn table[] = FUSED_RNN_BY_DTYPE(attention_backward);
  return table[static_cast<int>(dtype)];
}
DropoutFn dropout_function(DType dtype) {
  static constexpr DropoutFn table[] = FUSED_RNN_BY_DTYPE(dropout);
  return table[static_cast<int>(dtype)];
}
#endif
#endif

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
