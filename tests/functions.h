// Every function that cells are written in, by name, for any value type: as a cell writes them, from
// within fused_rnn::user (test_cells.py).
#pragma once

#include <cstring>

#include "cells/math.h"

namespace fused_rnn::user {

// X(name, an expression of V a and V b)
#define FUSED_RNN_FOR_EACH_FUNCTION(X) \
  X("exp", exp(a))                     \
  X("tanh", tanh(a))                   \
  X("sigmoid", sigmoid(a))             \
  X("log", log(a))                     \
  X("sqrt", sqrt(a))                   \
  X("softplus", softplus(a))           \
  X("abs", abs(a))                     \
  X("max", max(a, b))                  \
  X("min", min(a, b))                  \
  X("<", where(a < b, a, b))           \
  X(">", where(a > b, a, b))           \
  X("<=", where(a <= b, a, b))         \
  X(">=", where(a >= b, a, b))         \
  X("==", where(a == b, -a, b))        \
  X("!=", where(a != b, -a, b))        \
  X("+", a + b)                        \
  X("-", a - b)                        \
  X("*", a* b)                         \
  X("/", a / b)                        \
  X("1/2", a* V(0.5) + V(0.25f) + V(1))

template <class V>
V evaluate(const char* name, V a, V b) {
#define FUSED_RNN_EVALUATE(of, value) \
  if (std::strcmp(name, of) == 0) return value;
  FUSED_RNN_FOR_EACH_FUNCTION(FUSED_RNN_EVALUATE)
  return V(0);
}

}  // namespace fused_rnn::user
