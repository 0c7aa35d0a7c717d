// Dual numbers, value + tangent * e with e^2 = 0: arithmetic on them differentiates along a direction.
//
// An engine whose storage type is Dual<T> is that engine's derivative: forward on duals gives J v, and
// backward on duals gives, besides the gradient, its derivative along v, which is what differentiating a
// gradient asks for. So neither cells nor engines say anything of second derivatives.
//
// In memory a dual is its value, then its tangent: as torch's complex numbers, whose dtypes carry it.
#pragma once

#include "cells/math.h"
#include "macros.h"

namespace fused_rnn {

// 1 / sqrt(variance + eps), of a normalisation.
HOST_DEVICE float inverse_deviation(float variance, double eps) {
  return static_cast<float>(1 / ::sqrt(variance + eps));
}
HOST_DEVICE double inverse_deviation(double variance, double eps) {
  return 1 / ::sqrt(variance + eps);
}

// What a dual D of T, a scalar or a vector, has in common with numbers.
template <class D, class T>
struct DualNumber {
  T value, tangent;

  DualNumber() = default;
  constexpr HOST_DEVICE DualNumber(T value, T tangent) : value(value), tangent(tangent) {}

  friend HOST_DEVICE D operator+(D a, D b) { return {a.value + b.value, a.tangent + b.tangent}; }
  friend HOST_DEVICE D operator-(D a, D b) { return {a.value - b.value, a.tangent - b.tangent}; }
  friend HOST_DEVICE D operator-(D a) { return {-a.value, -a.tangent}; }
  friend HOST_DEVICE D operator*(D a, D b) {
    return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
  }
  friend HOST_DEVICE D operator/(D a, D b) {
    const T quotient = a.value / b.value;
    return {quotient, (a.tangent - quotient * b.tangent) / b.value};
  }
  friend HOST_DEVICE auto operator<(D a, D b) { return a.value < b.value; }
  friend HOST_DEVICE auto operator>(D a, D b) { return a.value > b.value; }
  friend HOST_DEVICE auto operator<=(D a, D b) { return a.value <= b.value; }
  friend HOST_DEVICE auto operator>=(D a, D b) { return a.value >= b.value; }
  friend HOST_DEVICE auto operator==(D a, D b) { return a.value == b.value; }
  friend HOST_DEVICE auto operator!=(D a, D b) { return a.value != b.value; }
  template <class Condition>
  friend HOST_DEVICE D where(Condition condition, D a, D b) {
    return {where(condition, a.value, b.value), where(condition, a.tangent, b.tangent)};
  }

  friend HOST_DEVICE D exp(D x) {
    const T y = exp(x.value);
    return {y, y * x.tangent};
  }
  friend HOST_DEVICE D tanh(D x) {
    const T y = tanh(x.value);
    return {y, (T(1) - y * y) * x.tangent};
  }
  friend HOST_DEVICE D sigmoid(D x) {
    const T y = sigmoid(x.value);
    return {y, y * (T(1) - y) * x.tangent};
  }
  friend HOST_DEVICE D softplus(D x) { return {softplus(x.value), sigmoid(x.value) * x.tangent}; }
  friend HOST_DEVICE D log(D x) { return {log(x.value), x.tangent / x.value}; }
  friend HOST_DEVICE D sqrt(D x) {
    const T y = sqrt(x.value);
    return {y, x.tangent / (y + y)};
  }
  friend HOST_DEVICE D inverse_deviation(D variance, double eps) {
    const T y = inverse_deviation(variance.value, eps);
    return {y, -(y * y * y) * variance.tangent / T(2)};
  }
};

template <class T>
struct Dual : DualNumber<Dual<T>, T> {
  Dual() = default;
  constexpr HOST_DEVICE Dual(T value, T tangent) : DualNumber<Dual<T>, T>(value, tangent) {}
  // From any number.
  template <class Number>
  explicit constexpr HOST_DEVICE Dual(Number value) : Dual(static_cast<T>(value), T(0)) {}
};

}  // namespace fused_rnn
