// The functions that cells are written in, for scalars on host and device. The SIMD vectors of cpu/simd.h
// and the duals of dual.h bring their own overloads of all but the templates, found by argument-dependent
// lookup. Comparisons of any value type give what `where` takes.
#pragma once

#include <cmath>

#include "../macros.h"

namespace fused_rnn {

HOST_DEVICE float exp(float x) { return ::expf(x); }
HOST_DEVICE double exp(double x) { return ::exp(x); }
HOST_DEVICE float tanh(float x) { return ::tanhf(x); }
HOST_DEVICE double tanh(double x) { return ::tanh(x); }
HOST_DEVICE float log(float x) { return ::logf(x); }
HOST_DEVICE double log(double x) { return ::log(x); }
HOST_DEVICE float sqrt(float x) { return ::sqrtf(x); }
HOST_DEVICE double sqrt(double x) { return ::sqrt(x); }
HOST_DEVICE float where(bool condition, float a, float b) { return condition ? a : b; }
HOST_DEVICE double where(bool condition, double a, double b) { return condition ? a : b; }

template <class V>
HOST_DEVICE V sigmoid(V x) {
  return V(1) / (V(1) + exp(-x));
}

// The larger and the smaller of two, NaN if either is. Of two that are equal b counts: so max(x, V(0)) has
// the derivative 0 at 0, as a rectifier has.
template <class V>
HOST_DEVICE V max(V a, V b) {
  return where((a > b) | (a != a), a, b);
}
template <class V>
HOST_DEVICE V min(V a, V b) {
  return where((a < b) | (a != a), a, b);
}

// The derivative at 0 is 0.
template <class V>
HOST_DEVICE V abs(V x) {
  return where(x == V(0), V(0), where(x < V(0), -x, x));
}

// log(1 + e^x). What 1 + e rounds off is added again: it is all that is left of a small e.
template <class V>
HOST_DEVICE V softplus(V x) {
  const V e = exp(-abs(x)), sum = V(1) + e;
  return max(x, V(0)) + (log(sum) + (e - (sum - V(1))) / sum);
}

}  // namespace fused_rnn
