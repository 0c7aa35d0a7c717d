// The functions that cells are written in, for scalars on host and device. The SIMD vectors of
// cpu/simd.h bring their own overloads of exp and tanh, found by argument-dependent lookup.
#pragma once

#include <cmath>

#include "../macros.h"

namespace fused_rnn {

HOST_DEVICE float exp(float x) { return ::expf(x); }
HOST_DEVICE double exp(double x) { return ::exp(x); }
HOST_DEVICE float tanh(float x) { return ::tanhf(x); }
HOST_DEVICE double tanh(double x) { return ::tanh(x); }
HOST_DEVICE float where(bool condition, float a, float b) { return condition ? a : b; }
HOST_DEVICE double where(bool condition, double a, double b) { return condition ? a : b; }

template <class V>
HOST_DEVICE V sigmoid(V x) {
  return V(1) / (V(1) + exp(-x));
}

}  // namespace fused_rnn
