// Storage types of tensors and the type each is computed in.
//
// float and double compute in themselves; the two half types are storage only: every load widens
// to float and every store rounds to nearest, ties to even. Duals of both (dual.h) are types like them.
#pragma once

#include <cstdint>
#include <cstring>

#include "dual.h"
#include "macros.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace fused_rnn {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

namespace detail {

template <class To, class From>
HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace detail

HOST_DEVICE float widen(float x) { return x; }
HOST_DEVICE double widen(double x) { return x; }
template <class T>
HOST_DEVICE Dual<T> widen(Dual<T> x) {
  return x;
}
HOST_DEVICE float widen(BFloat16 x) {
  return detail::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

HOST_DEVICE float widen(Half x) {
#if defined(__CUDACC__)
  return __half2float(detail::bit_cast<__half>(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // infinity and NaN keep their payload
    return detail::bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
  // Multiplying by 2^112 moves the exponent bias from 15 to 127, subnormals included.
  const float scaled = detail::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return detail::bit_cast<float>(sign | detail::bit_cast<uint32_t>(scaled));
#endif
}

template <class S>
struct Narrow;

template <>
struct Narrow<float> {
  static HOST_DEVICE float from(float x) { return x; }
};

template <>
struct Narrow<double> {
  static HOST_DEVICE double from(double x) { return x; }
};

template <class T>
struct Narrow<Dual<T>> {
  static HOST_DEVICE Dual<T> from(Dual<T> x) { return x; }
};

template <>
struct Narrow<BFloat16> {
  static HOST_DEVICE BFloat16 from(float x) {
    const uint32_t bits = detail::bit_cast<uint32_t>(x);
    if (x != x) return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};

template <>
struct Narrow<Half> {
  static HOST_DEVICE Half from(float x) {
#if defined(__CUDACC__)
    return detail::bit_cast<Half>(__float2half_rn(x));
#else
    const uint32_t bits = detail::bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)  // NaN
      return Half{static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
    if (magnitude >= 0x477ff000u)  // 65520 and above round to infinity
      return Half{static_cast<uint16_t>(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {  // below 2^-14: let the float adder round the subnormal
      const float shifted = detail::bit_cast<float>(magnitude) + 0.5f;
      return Half{
          static_cast<uint16_t>(sign | (detail::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
    }
    const uint32_t rebiased = magnitude - 0x38000000u;
    return Half{
        static_cast<uint16_t>(sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13))};
#endif
  }
};

// The type that values stored as S are computed and accumulated in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
struct ComputeOf<Dual<T>> {
  using type = Dual<T>;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// How one value of type V (a scalar here, a SIMD vector in cpu/simd.h) reads and writes memory of
// storage type S. `count` says how many of a vector's lanes exist; a scalar always has its one.
template <class V>
struct Memory {
  template <class S>
  static HOST_DEVICE V load(const S* from, int64_t) {
    return static_cast<V>(widen(*from));
  }
  template <class S>
  static HOST_DEVICE void store(V value, S* to, int64_t) {
    *to = Narrow<S>::from(value);
  }
};

}  // namespace fused_rnn
