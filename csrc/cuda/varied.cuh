// What kernels need around a Varied cell (step.h): random factors, and sums over a row.
#pragma once

#include "../philox.h"
#include "../step.h"
#include "device.cuh"

namespace fused_rnn::cuda {

template <class C>
DEVICE C zone_share(const Shape& p, fused_rnn::Stream stream, const RowStep& row, int64_t n,
                    int64_t unit, double probability) {
  if (!p.variation.seed || probability == 0) return static_cast<C>(probability);
  return static_cast<C>(is_chosen(static_cast<uint64_t>(*p.variation.seed), stream,
                                  zone_row(p, row.lane, row.b, row.t), n, unit, probability));
}

// What the step of a unit takes of them: those of c around the cell, of h where h comes out. `keep` is
// (L, B, P), or null.
template <class C>
DEVICE Factors<C> factors_of(const Shape& p, const RowStep& row, int64_t unit, bool of_h, bool of_c,
                             const C* keep) {
  const Variation& v = p.variation;
  return {of_h ? zone_share<C>(p, fused_rnn::Stream::zoneout_h, row, p.P, unit, v.zoneout_h) : C(0),
          of_c ? zone_share<C>(p, fused_rnn::Stream::zoneout_c, row, p.H, unit, v.zoneout_c) : C(0),
          of_h && keep ? keep[(row.lane * p.B + row.b) * p.P + unit] : C(1)};
}

// The factor of recurrent dropout, the same in all steps.
template <class C>
DEVICE C draw_keep(const Shape& p, int64_t lane, int64_t b, int64_t unit) {
  const double probability = p.variation.recurrent_dropout;
  const bool dropped =
      is_chosen(static_cast<uint64_t>(*p.variation.seed), fused_rnn::Stream::recurrent_dropout,
                dropout_row(p, lane, b), p.P, unit, probability);
  return dropped ? C(0) : static_cast<C>(1 / (1 - probability));
}

// Warps of a row's block: so many leave each thread 168 registers, which tests/test_kernel_resources.py
// looks at, and duals all that there are.
template <class C>
constexpr unsigned max_warps = 12;
template <class T>
constexpr unsigned max_warps<Dual<T>> = 8;

template <class T>
DEVICE Dual<T> shuffle_xor(Dual<T> x, unsigned mask) {
  return {shuffle_xor(x.value, mask), shuffle_xor(x.tangent, mask)};
}

// Adds up what the threads of a block, whole warps, have: the same bits for all of them.
template <int count, class C>
DEVICE void block_sums(C (&values)[count]) {
  STATIC_SHARED(C, of_warps, count * max_warps<C>);
  for (int i = 0; i < count; ++i)
    for (unsigned distance = warp_size / 2; distance > 0; distance /= 2)
      values[i] = values[i] + shuffle_xor(values[i], distance);
  sync_threads();  // the sums before these have been read
  if (warp_lane() == 0)
    for (int i = 0; i < count; ++i) of_warps[i * max_warps<C> + warp_index()] = values[i];
  sync_threads();  // all warps have written theirs
  for (int i = 0; i < count; ++i) {
    values[i] = C(0);
    for (unsigned warp = 0; warp < block_size() / warp_size; ++warp)
      values[i] = values[i] + of_warps[i * max_warps<C> + warp];
  }
}

// Calls f(unit) for those of H units that are the thread's.
template <class F>
DEVICE void own_units(int64_t H, const F& f) {
  for (int64_t unit = thread_index(); unit < H; unit += block_size()) f(unit);
}

DEVICE float reciprocal_root(float x) { return 1 / ::sqrtf(x); }
DEVICE double reciprocal_root(double x) { return 1 / ::sqrt(x); }
template <class T>
DEVICE Dual<T> reciprocal_root(Dual<T> x) {
  const T y = reciprocal_root(x.value);
  return {y, -(y * y * y) * x.tangent / T(2)};
}

// Moments of `rows` rows of `count` numbers: each(unit, visit) calls visit(row, number) for a unit's.
template <int rows, class C, class Each>
DEVICE void row_moments(int64_t H, int64_t count, double eps, const Each& each,
                        Moments<C> (&of)[rows]) {
  C sums[rows] = {}, squares[rows] = {};
  own_units(H, [&](int64_t unit) { each(unit, [&](int row, C x) { sums[row] = sums[row] + x; }); });
  block_sums(sums);
  for (int row = 0; row < rows; ++row) of[row].mean = sums[row] / static_cast<C>(count);
  own_units(H, [&](int64_t unit) {
    each(unit, [&](int row, C x) {
      const C d = x - of[row].mean;
      squares[row] = squares[row] + d * d;
    });
  });
  block_sums(squares);
  for (int row = 0; row < rows; ++row)
    of[row].scale = reciprocal_root(squares[row] / static_cast<C>(count) + static_cast<C>(eps));
}

}  // namespace fused_rnn::cuda
