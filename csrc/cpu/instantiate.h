// The body of an instruction set's translation unit. The including file defines
//   FUSED_RNN_ISA            its namespace and name
//   FUSED_RNN_VECTOR_BYTES   16, 32 or 64
//   FUSED_RNN_F16C           if it has the half-precision conversions
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

namespace FUSED_RNN_ISA {
#include "simd.h"
#include "product.h"

using cpu::AttentionBackwardFn;
using cpu::AttentionForwardFn;
using cpu::BackwardFn;
using cpu::CellId;
using cpu::Division;
using cpu::ForwardFn;
using cpu::Host;
using cpu::Parts;
using cpu::RowOrder;
using cpu::run_phases;

#include "recurrence.h"
#include "attention.h"

template <class Cell, class S>
void forward(const ForwardParams& p, const Host& host) {
  Forward<Cell, S>(p, host).run();
}
template <class Cell, class S>
void backward(const BackwardParams& p, const Host& host) {
  Backward<Cell, S>(p, host).run();
}

// Tables in the order of cells.h and of DType.
#define FUSED_RNN_ROW(function, cell) \
  {function<cell, float>, function<cell, double>, function<cell, BFloat16>, function<cell, Half>}

ForwardFn forward_function(CellId cell, DType dtype) {
#define FUSED_RNN_FORWARD(name, cell) FUSED_RNN_ROW(forward, cell),
  static constexpr ForwardFn table[][4] = {FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_FORWARD)};
  return table[static_cast<int>(cell)][static_cast<int>(dtype)];
}

BackwardFn backward_function(CellId cell, DType dtype) {
#define FUSED_RNN_BACKWARD(name, cell) FUSED_RNN_ROW(backward, cell),
  static constexpr BackwardFn table[][4] = {FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_BACKWARD)};
  return table[static_cast<int>(cell)][static_cast<int>(dtype)];
}

template <class S>
void attention_forward(const AttentionForwardParams& p, const Host& host) {
  AttentionForward<S>(p, host).run();
}
template <class S>
void attention_backward(const AttentionBackwardParams& p, const Host& host) {
  AttentionBackward<S>(p, host).run();
}

#define FUSED_RNN_BY_DTYPE(function) \
  {function<float>, function<double>, function<BFloat16>, function<Half>}

AttentionForwardFn attention_forward_function(DType dtype) {
  static constexpr AttentionForwardFn table[] = FUSED_RNN_BY_DTYPE(attention_forward);
  return table[static_cast<int>(dtype)];
}

AttentionBackwardFn attention_backward_function(DType dtype) {
  static constexpr AttentionBackwardFn table[] = FUSED_RNN_BY_DTYPE(attention_backward);
  return table[static_cast<int>(dtype)];
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn
