// What both directions of the engine need around a Varied cell (step.h): the factors of zoneout and
// recurrent dropout, and the moments of a normalised row.
// Included inside the instruction set's namespace.

template <class C>
class VariedFactors {
  using V = Vector<C>;

 public:
  // For `parts` parts that each have up to `rows` rows in hand.
  VariedFactors(const Shape& p, int64_t parts, int64_t rows)
      : p(p),
        seeded(p.variation.seed),
        seed(seeded ? static_cast<uint64_t>(*p.variation.seed) : 0),
        expected{static_cast<C>(p.variation.zoneout_h), static_cast<C>(p.variation.zoneout_c)},
        parts(parts),
        rows(rows),
        width(chosen_block * chosen_blocks(p.P > p.H ? p.P : p.H)),
        keep_width(round_up(p.P, V::size)) {}

  void take_memory(Arena& arena) {
    if (p.variation.recurrent_dropout > 0) keeps = arena.take<C>(p.L * p.B * keep_width);
    if (seeded && p.variation.zoneout_h > 0) zones[0] = arena.take<uint8_t>(parts * rows * width);
    if (seeded && p.variation.zoneout_c > 0) zones[1] = arena.take<uint8_t>(parts * rows * width);
  }

  // ---- recurrent dropout: once for every row

  void draw_keep(int64_t lane, int64_t b) const {
    if (!keeps) return;
    C* const to = keeps + (lane * p.B + b) * keep_width;
    dropout_factors<C>(seed, Stream::recurrent_dropout, dropout_row(p, lane, b), p.P,
                       p.variation.recurrent_dropout,
                       [&](int64_t unit, int64_t, V factor) { factor.store(to + unit); });
  }
  bool has_keep() const { return keeps; }
  HOST_DEVICE V keep(int64_t lane, int64_t b, int64_t unit) const {
    return keeps ? V::load(keeps + (lane * p.B + b) * keep_width + unit) : V(1);
  }

  // ---- zoneout: for every step, the units that a part has in hand of its `row`-th row

  void draw_zone_h(int64_t part, int64_t lane, int64_t b, int64_t t, int64_t row,
                   const Share& units) const {
    draw(0, part, row, Stream::zoneout_h, zone_row(p, lane, b, t), p.P, p.variation.zoneout_h,
         units);
  }
  void draw_zone_c(int64_t part, int64_t lane, int64_t b, int64_t t, int64_t row,
                   const Share& units) const {
    draw(1, part, row, Stream::zoneout_c, zone_row(p, lane, b, t), p.H, p.variation.zoneout_c,
         units);
  }

  // What the step of some units takes of them: those of c around the cell, those of h where h comes out.
  // With a projection these are other units, of another number.
  HOST_DEVICE Factors<V> factors(int64_t part, int64_t lane, int64_t b, int64_t row, int64_t unit,
                                 bool of_h, bool of_c) const {
    return {of_h ? zone(0, part, row, unit) : V(0), of_c ? zone(1, part, row, unit) : V(0),
            of_h ? keep(lane, b, unit) : V(1)};
  }

 private:
  void draw(int which, int64_t part, int64_t row, Stream stream, int64_t random_row, int64_t n,
            double probability, const Share& units) const {
    if (!zones[which]) return;
    const int64_t blocks = chosen_blocks(n);
    const int64_t end = chosen_blocks(units.end < n ? units.end : n);
    for (int64_t block = units.begin / chosen_block; block < end; ++block)
      choose_block(seed, stream, random_row * blocks + block, chosen_limit(probability),
                   zones[which] + (part * rows + row) * width + block * chosen_block);
  }
  HOST_DEVICE V zone(int which, int64_t part, int64_t row, int64_t unit) const {
    return zones[which] ? chosen_vector<V>(zones[which] + (part * rows + row) * width + unit)
                        : V(expected[which]);
  }

  const Shape& p;
  const bool seeded;
  const uint64_t seed;
  const C expected[2];  // of zoneout's factors
  const int64_t parts, rows, width, keep_width;
  C* keeps = nullptr;      // [lane][batch row][keep_width]
  uint8_t* zones[2] = {};  // [part][row][width], of h and of c
};

// ---- normalisation, a row of the batch at a time
//
// Not inlined, and without a word of cells, so that all of them share one copy.

// Values of all units of a row, gate by gate, the units in blocks of 2^log.
template <class T>
struct GateRow {
  T* data;
  int64_t log, block_stride, gate_stride;
  HOST_DEVICE T* at(int64_t unit, int g) const {
    return data + (unit >> log) * block_stride + (unit & ((int64_t(1) << log) - 1)) +
           g * gate_stride;
  }
  explicit operator bool() const { return data; }
};

constexpr int64_t log_of(int64_t n) { return n > 1 ? 1 + log_of(n / 2) : 0; }

// Of values that lie in one piece, gates `stride` apart.
template <class T>
HOST_DEVICE GateRow<T> whole_row(T* data, int64_t stride) {
  return {data, 62, 0, stride};
}

// Of what is saved, from value `first`.
template <class S, class Params>
HOST_DEVICE GateRow<S> reserve_row(const Params& p, const RowStep& row, int64_t first) {
  return {p.reserve ? p.reserve.template at<S>(row.t, row.b, row.lane, 0, first) : nullptr,
          log_of(Reserve::block), p.reserve.stride_block, p.reserve.stride_value};
}

template <class V>
HOST_DEVICE typename V::Scalar sum_of_lanes(V x) {
  typename V::Scalar lanes[V::size], sum(0);
  x.store(lanes);
  for (const auto lane : lanes) sum = sum + lane;
  return sum;
}

// x, but zero from lane n on.
template <class C>
HOST_DEVICE Vector<C> first_lanes(Vector<C> x, int64_t n) {
  using V = Vector<C>;
  if (n >= V::size) return x;
  alignas(64) C lanes[V::size];
  x.store(lanes);
  return Memory<V>::load(lanes, n);
}

// Sums of N values over all units and up to four gates, from `first_gate`: value(unit, gate, units there
// are, values). In four sums, so that no addition waits for the one before; values of a unit lie beside one
// another in what is saved.
template <class C, int N, int Gates, class Value>
HOST_DEVICE void sum_units_of(int64_t H, int first_gate, C (&result)[N], const Value& value) {
  using V = Vector<C>;
  constexpr int units = 4 / Gates;  // vectors of them at a time
  V sums[4][N];
  for (auto& of_four : sums)
    for (auto& sum : of_four) sum = V(0);
  for (int64_t first = 0; first < H; first += units * V::size)
#pragma GCC unroll 4
    for (int j = 0; j < units * Gates; ++j) {
      const int64_t unit = first + j / Gates * V::size;
      if (unit >= H) break;
      V values[N];
      value(unit, first_gate + j % Gates, H - unit, values);
      for (int k = 0; k < N; ++k) sums[j][k] = sums[j][k] + first_lanes<C>(values[k], H - unit);
    }
  for (int k = 0; k < N; ++k)
    result[k] = sum_of_lanes((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
}

// The same over any number of gates: four of them at a time, then those that are left.
template <class C, int N, class Value>
HOST_DEVICE void sum_units(int64_t H, int gates, C (&result)[N], const Value& value) {
  for (auto& sum : result) sum = C(0);
  for (int first = 0; first < gates; first += 4) {
    C sums[N];
    switch (gates - first) {
      case 1:
        sum_units_of<C, N, 1>(H, first, sums, value);
        break;
      case 2:
        sum_units_of<C, N, 2>(H, first, sums, value);
        break;
      case 3:
        sum_units_of<C, N, 3>(H, first, sums, value);
        break;
      default:
        sum_units_of<C, N, 4>(H, first, sums, value);
    }
    for (int k = 0; k < N; ++k) result[k] = result[k] + sums[k];
  }
}

// Of x, or of x + y if there is y.
template <class C>
__attribute__((noinline)) Moments<C> moments(int64_t H, int gates, double eps,
                                             const GateRow<const C>& x, const GateRow<const C>& y) {
  using V = Vector<C>;
  const C count = static_cast<C>(gates * H);
  const auto of_rows = [&](const auto& value) -> Moments<C> {
    C sum[1], squares[1];
    sum_units<C>(H, gates, sum,
                 [&](int64_t unit, int g, int64_t, V* values) { values[0] = value(unit, g); });
    const C mean = sum[0] / count;
    sum_units<C>(H, gates, squares, [&](int64_t unit, int g, int64_t, V* values) {
      const V d = value(unit, g) - V(mean);
      values[0] = d * d;
    });
    const C variance = squares[0] / count;
    return {mean, inverse_deviation(variance, eps)};
  };
  if (y)
    return of_rows(
        [&](int64_t unit, int g) { return V::load(x.at(unit, g)) + V::load(y.at(unit, g)); });
  return of_rows([&](int64_t unit, int g) { return V::load(x.at(unit, g)); });
}

// Units of x, or of x + y, normalised, with weight and bias and what is added after that; and saved, if
// they are to be.
template <class S, class C>
__attribute__((noinline)) void normalise_row(const Moments<C>& of, int64_t H, int gates,
                                             const Share& units, const GateRow<const C>& x,
                                             const GateRow<const C>& y,
                                             const NormWeights<const void*>& norm,
                                             const void* added, const GateRow<S>& saved,
                                             const GateRow<C>& to) {
  using V = Vector<C>;
  for (int64_t unit = units.begin; unit < units.end && unit < H; unit += V::size)
    for (int g = 0; g < gates; ++g) {
      const int64_t n = H - unit, at = g * H + unit;
      V value = V::load(x.at(unit, g));
      if (y) value = value + V::load(y.at(unit, g));
      V normal;
      normalised_gate<S>(of, value, norm, added, at, n, normal).store(to.at(unit, g));
      if (saved) Memory<V>::store(normal, saved.at(unit, g), n);
    }
}

// From the gradient d of what `weight`, unless it is null, and bias made of the row.
template <class S, class C>
__attribute__((noinline)) NormGradient<C> norm_gradient(int64_t H, int gates, C scale,
                                                        const GateRow<const S>& normal,
                                                        const GateRow<const C>& d,
                                                        const void* weight) {
  using V = Vector<C>;
  const C count = static_cast<C>(gates * H);
  C sums[2];
  sum_units<C>(H, gates, sums, [&](int64_t unit, int g, int64_t n, V* values) {
    values[0] = first_lanes<C>(V::load(d.at(unit, g)), n);
    if (weight)
      values[0] = values[0] * Memory<V>::load(static_cast<const S*>(weight) + g * H + unit, n);
    values[1] = values[0] * Memory<V>::load(normal.at(unit, g), n);
  });
  return {scale, sums[0] / count, sums[1] / count};
}

// The gradient of what was normalised, to `to` and, if it is there, `too`; what it adds to those of weight
// and bias, where these are summed.
template <class S, class C, class Value>
__attribute__((noinline)) void norm_backward_row(const NormGradient<C>& of, int64_t H, int gates,
                                                 const Share& units, const GateRow<const S>& normal,
                                                 const GateRow<const C>& d, const void* weight,
                                                 C* d_weight, C* d_bias, int64_t stride, Value* to,
                                                 Value* too) {
  using V = Vector<C>;
  const auto add = [](C* sum, V value) { (V::load(sum) + value).store(sum); };
  for (int64_t unit = units.begin; unit < units.end && unit < H; unit += V::size)
    for (int g = 0; g < gates; ++g) {
      const int64_t n = H - unit, at = g * H + unit;
      const V x = Memory<V>::load(normal.at(unit, g), n), dy = V::load(d.at(unit, g));
      if (d_weight) add(d_weight + g * stride + unit, dy * x);
      if (d_bias) add(d_bias + g * stride + unit, dy);
      const V dx = of.at(dy * Memory<V>::load(static_cast<const S*>(weight) + at, n), x);
      if (to) Memory<V>::store(dx, to + at, n);
      if (too) Memory<V>::store(dx, too + at, n);
    }
}
