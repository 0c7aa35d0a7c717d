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

  HOST_DEVICE Factors<V> factors(int64_t part, int64_t lane, int64_t b, int64_t row,
                                 int64_t unit) const {
    return {zone(0, part, row, unit, p.variation.zoneout_h),
            zone(1, part, row, unit, p.variation.zoneout_c), keep(lane, b, unit)};
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
  HOST_DEVICE V zone(int which, int64_t part, int64_t row, int64_t unit, double probability) const {
    return zones[which] ? chosen_vector<V>(zones[which] + (part * rows + row) * width + unit)
                        : V(static_cast<C>(probability));
  }

  const Shape& p;
  const bool seeded;
  const uint64_t seed;
  const int64_t parts, rows, width, keep_width;
  C* keeps = nullptr;      // [lane][batch row][keep_width]
  uint8_t* zones[2] = {};  // [part][row][width], of h and of c
};

template <class V>
HOST_DEVICE typename V::Scalar sum_of_lanes(V x) {
  typename V::Scalar lanes[V::size], sum = 0;
  x.store(lanes);
  for (const auto lane : lanes) sum += lane;
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

// Of value(unit, gate), over all units and gates.
template <class C, int Gates, class Value>
HOST_DEVICE Moments<C> moments(int64_t H, const Value& value) {
  using V = Vector<C>;
  const C count = static_cast<C>(Gates * H);
  V sum(0), squares(0);
  for (int64_t unit = 0; unit < H; unit += V::size)
    for (int g = 0; g < Gates; ++g) sum = sum + first_lanes<C>(value(unit, g), H - unit);
  const C mean = sum_of_lanes(sum) / count;
  for (int64_t unit = 0; unit < H; unit += V::size)
    for (int g = 0; g < Gates; ++g) {
      const V d = first_lanes<C>(value(unit, g) - V(mean), H - unit);
      squares = squares + d * d;
    }
  const C variance = sum_of_lanes(squares) / count;
  return {mean, static_cast<C>(1 / __builtin_sqrt(variance + Moments<C>::epsilon))};
}

template <class C, int Gates, class Normal, class DNormal>
HOST_DEVICE NormGradient<C> norm_gradient(int64_t H, C scale, const Normal& normal,
                                          const DNormal& d_normal) {
  using V = Vector<C>;
  const C count = static_cast<C>(Gates * H);
  V sum(0), products(0);
  for (int64_t unit = 0; unit < H; unit += V::size)
    for (int g = 0; g < Gates; ++g) {
      const V d = first_lanes<C>(d_normal(unit, g), H - unit);
      sum = sum + d;
      products = products + d * normal(unit, g);
    }
  return {scale, sum_of_lanes(sum) / count, sum_of_lanes(products) / count};
}
