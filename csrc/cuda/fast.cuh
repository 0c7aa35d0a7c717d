// The arithmetic of cells for half types: floats whose division, exp and tanh are the machine's approximate
// ones, 2^-22 to 2^-20 off, where storing rounds by 2^-9 or 2^-12. A step waits for its cells, and the exact
// ones take several times as long.
#pragma once

#include <type_traits>

#include "../dtype.h"
#include "device.cuh"

namespace fused_rnn::cuda {

struct Fast {
  float x;

  DEVICE Fast() {}
  DEVICE Fast(float x) : x(x) {}
  DEVICE operator float() const { return x; }

  friend DEVICE Fast operator+(Fast a, Fast b) { return a.x + b.x; }
  friend DEVICE Fast operator-(Fast a, Fast b) { return a.x - b.x; }
  friend DEVICE Fast operator-(Fast a) { return -a.x; }
  friend DEVICE Fast operator*(Fast a, Fast b) { return a.x * b.x; }
  friend DEVICE Fast operator/(Fast a, Fast b) { return a.x * fast_reciprocal(b.x); }
  friend DEVICE bool operator<=(Fast a, Fast b) { return a.x <= b.x; }
  friend DEVICE Fast where(bool condition, Fast a, Fast b) { return condition ? a : b; }
  friend DEVICE Fast exp(Fast a) { return fast_exp(a.x); }
  // Beyond the range of exp: 1 - 2 / infinity, and 1 - 2 / 1.
  friend DEVICE Fast tanh(Fast a) { return fmaf(-2, fast_reciprocal(1 + fast_exp(2 * a.x)), 1); }
};

// What cells are computed in.
template <class S>
using Arithmetic = std::conditional_t<std::is_same_v<S, float>, float, Fast>;

}  // namespace fused_rnn::cuda
