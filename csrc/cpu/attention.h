// Additive attention on the CPU: score_ij = sum_a w_a tanh(q_ia + k_ja), softmax over j, context.
//
// One exponential per row element instead of one tanh per pair. With an anchor c_a, the least of a
// channel's queries in the batch row,
//
//   u = exp(2(q - c)) - 1,  P = sigmoid(2(k + c)),  T = tanh(k + c),
//   tanh(q + k) = (u P + T) / (u P + 1)
//
// Small q and k have a small u and T, so that nothing cancels; u is never negative, so that a product
// with a large P never takes away from 1. Four channels share a division: n1/d1 + ... + n4/d4 over
// d1 d2 d3 d4, where n and d of the last two are scaled so that no spread of the queries up to `range`
// makes that product overflow. Four channels whose queries spread farther, or whose weights are huge,
// take tanh of each pair.
//
//   tile = up to 32 queries x all keys. P and T lie in panels of one vector of keys: kt[panel][a][2][lane].
//   Groups of queries run over a panel with their score sums in registers. Scores of the tile stay in
//   scratch (32 x K), are normalised there, and the context is the product with the packed values
//   (product.h). Nothing of size Q x K leaves unless asked for.
//
// Backward recomputes the scores and, per tile and panel, d tanh. Work is (batch row, split): a split
// owns its queries' gradients and a partial sum of those of keys, values and weight. How many splits
// depends on the shape alone, so results do not depend on threads.
//
// Fewer than four queries (decoding) share too little for that. There a thread walks the keys and
// values as they lie in memory, a vector of channels at a time, with tanh of each pair.
//
// Nothing that a query may not attend to reaches a result, not even a NaN: keys, values and queries
// that nobody meets are taken for zeros, and so is every value that is not finite, where a mask or
// causality may keep it from some queries; those who may attend to it get it added by itself.
//
// Included inside the instruction set's namespace.

template <class T>
struct ScoreConstants;
template <>
struct ScoreConstants<float> {
  static constexpr float clamp = 87.0f;  // of exponents
  static constexpr float range = 16.0f;  // of the queries of a channel
};
template <>
struct ScoreConstants<double> {
  static constexpr double clamp = 700.0;
  static constexpr double range = 100.0;
};

constexpr int64_t max_tile_queries = 32;
constexpr double largest_weight = 1 << 20;  // that leaves room in a product of four divisors
constexpr int64_t channels_together = 32;   // whose scores are summed before they join the rest

inline bool by_rows(const AttentionShape& p) { return p.Q < 4; }

// Whether a query may be kept from a key that others attend to.
inline bool by_pairs(const AttentionShape& p) { return p.mask || p.causal; }

// Whether query i of batch row b may attend to key j.
inline bool is_allowed(const AttentionShape& p, int64_t b, int64_t i, int64_t j) {
  if (p.lengths && j >= p.lengths[b]) return false;
  if (p.causal && j > i) return false;
  return !p.mask || p.mask[(p.mask_per_query ? b * p.Q + i : b) * p.K + j];
}

inline int64_t keys_of(const AttentionShape& p, int64_t b) {
  return p.lengths ? p.lengths[b] : p.K;
}

// Whether query i of batch row b may attend to any key.
inline bool attends(const AttentionShape& p, int64_t b, int64_t i) {
  for (int64_t j = 0; j < keys_of(p, b); ++j)
    if (is_allowed(p, b, i, j)) return true;
  return false;
}

// In four chains, which rounds less than one lane after the other.
template <class T, int N>
HOST_DEVICE T horizontal_sum(Vec<T, N> x) {
  constexpr int chains = N < 4 ? N : 4;
  T lanes[N];
  x.store(lanes);
  for (int i = chains; i < N; i += chains)
#pragma GCC unroll 4
    for (int n = 0; n < chains; ++n) lanes[n] += lanes[i + n];
  if constexpr (chains == 2) return lanes[0] + lanes[1];
  return (lanes[0] + lanes[1]) + (lanes[chains - 2] + lanes[chains - 1]);
}

// A sum of two numbers and what rounding took from it; 0 where that is no number.
template <class V>
struct ExactSum {
  V sum, error;
  HOST_DEVICE ExactSum(V a, V b) : sum(a + b) {
    const V of_b = sum - a;
    const V lost = (a - (sum - of_b)) + (b - of_b);
    error = where(lost <= lost, lost, V(0));
  }
};

// exp(2x) and what tanh x is made of, each to full relative accuracy; x may come with a rounding error.
template <class V>
struct Tangent {
  V exponential, minus_one;  // exp(2x), exp(2x) - 1

  HOST_DEVICE explicit Tangent(V x, V error = V(0)) {
    using T = typename V::Scalar;
    constexpr T limit = ScoreConstants<T>::clamp;
    const Exponential<T, V::size> e(clamp(x + x, -limit, limit));
    const V power = power_of_two<T, V::size>(e.k);
    exponential = power * (V(1) + e.expm1);
    const V more = (error + error) * exponential;
    minus_one = power * e.expm1 + (power - V(1)) + more;
    exponential = exponential + more;
  }
};

// What the exponentials of every batch row are relative to.
template <class C>
struct Anchors {
  int64_t channels;
  C* at;         // [B][channels]: c_a
  bool* direct;  // [B][channels/4]: whether those four take tanh of each pair

  void take_memory(Arena& arena, int64_t B) {
    at = arena.take<C>(B * channels);
    direct = arena.take<bool>(B * channels / 4);
  }
  Anchors of(int64_t b) const { return {channels, at + b * channels, direct + b * channels / 4}; }
};

// What one thread works with.
template <class S>
class AttentionTile {
 public:
  using C = Compute<S>;
  using V = Vector<C>;
  using K = ScoreConstants<C>;
  static constexpr int group = vector_registers == 32 ? 8 : 4;  // queries per pass over a panel

  const AttentionShape& p;
  const int64_t channels;              // A, rounded up to fours
  const int64_t panels;                // of keys
  const int64_t score_width;           // keys, rounded up to vectors
  const int64_t row_width;             // A, rounded up to vectors
  int64_t b = 0, first = 0, rows = 0;  // the tile: queries first..first+rows of batch row b
  Anchors<C> anchors;

  C* weight;   // [row_width], zeros beyond A
  C* queries;  // [channels/4][max_tile_queries][4]: u, or q itself where direct;
               // by rows [query][row_width]: q + bias
  C* scales;   // [channels/4][max_tile_queries]: of the last two channels
  C* scores;   // [max_tile_queries][score_width]

  explicit AttentionTile(const AttentionShape& p)
      : p(p),
        channels(round_up(p.A, 4)),
        panels((p.K + V::size - 1) / V::size),
        score_width(panels * V::size),
        row_width(round_up(p.A, V::size > 4 ? V::size : 4)) {}

  void take_memory(Arena& arena) {
    weight = arena.take<C>(row_width);
    queries = arena.take<C>(row_width * max_tile_queries);
    if (!by_rows(p)) scales = arena.take<C>(channels / 4 * max_tile_queries);
    scores = arena.take<C>(max_tile_queries * score_width);
  }

  void load_weight() {
    const S* from = static_cast<const S*>(p.weight);
    for (int64_t a = 0; a < row_width; ++a) weight[a] = a < p.A ? C(widen(from[a])) : C(0);
  }

  int64_t place_of(int64_t a, int64_t i) const {
    return (a / 4 * max_tile_queries + i) * 4 + a % 4;
  }

  // Takes up the queries first..first+rows of batch row b, whose anchors are given unless by rows.
  void begin(int64_t batch, int64_t first_query, int64_t count, const Anchors<C>& given) {
    b = batch;
    first = first_query;
    rows = count;
    anchors = given;
    const S* from = static_cast<const S*>(p.query) + (b * p.Q + first) * p.A;
    if (by_rows(p)) return load_query_rows(from);
    const int64_t filled = round_up(rows, group);
    for (int64_t i = 0; i < filled; ++i) {
      const bool there = i < rows && attends(p, b, first + i);
      for (int64_t a = 0; a < channels; ++a) {
        const C otherwise = anchors.direct[a / 4] ? C(0) : anchors.at[a];
        queries[place_of(a, i)] = there && a < p.A ? C(widen(from[i * p.A + a])) : otherwise;
      }
    }
    for (int64_t a = 0; a < channels; a += 4)
      if (!anchors.direct[a / 4]) load_exponentials(a, filled);
  }

  // From queries to u and scales, for four channels.
  void load_exponentials(int64_t a, int64_t filled) {
    C* q = queries + a * max_tile_queries;
    constexpr int width = V::size < 4 ? 4 : V::size;
    C c[width];
    for (int i = 0; i < width; ++i) c[i] = -anchors.at[a + i % 4];
    for (int64_t i = 0; i < filled * 4; i += V::size) {
      const ExactSum<V> x(V::load(q + i), V::load(c + i % 4));
      Tangent<V>(x.sum, x.error).minus_one.store(q + i);
    }
    for (int64_t i = 0; i < filled; ++i) {
      const C* u = q + i * 4;
      scales[a / 4 * max_tile_queries + i] = 1 / ((1 + u[2]) * (1 + u[3]));
    }
  }

  void load_query_rows(const S* from) {
    const S* bias = static_cast<const S*>(p.bias);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t a = 0; a < p.A; a += V::size) {
        V q = Memory<V>::load(from + i * p.A + a, p.A - a);
        if (bias) q = q + Memory<V>::load(bias + a, p.A - a);
        q.store(queries + i * row_width + a);
      }
  }

  // The pair of query i and a key at channels a..; `key` points at the key's channels.
  HOST_DEVICE Tangent<V> pair(int64_t i, const S* key, int64_t a) const {
    return Tangent<V>(V::load(queries + i * row_width + a) + Memory<V>::load(key + a, p.A - a));
  }

  void score_rows(int64_t end) {
    const S* key = static_cast<const S*>(p.key) + b * p.K * p.A;
    for (int64_t j = 0; j < end; ++j, key += p.A)
      for (int64_t i = 0; i < rows; ++i) {
        V sum(0);
        for (int64_t a = 0; a < p.A; a += V::size) {
          const Tangent<V> t = pair(i, key, a);
          sum = sum + V::load(weight + a) * t.minus_one / (V(1) + t.exponential);
        }
        scores[i * score_width + j] = horizontal_sum(sum);
      }
  }

  // Scores of all queries of the tile against one panel of keys, into `scores`.
  void score_panel(int64_t panel, const C* kt) {
    for (int64_t i = 0; i < rows; i += group)
      for (int64_t begin = 0; begin < channels; begin += channels_together) {
        const int64_t end =
            channels - begin < channels_together ? channels : begin + channels_together;
        V sum[group];
#pragma GCC unroll 16
        for (int r = 0; r < group; ++r) sum[r] = V(0);
        for (int64_t a = begin; a < end; a += 4)
          if (anchors.direct[a / 4])
            add_pairs(a, i, kt + a * 2 * V::size, sum);
          else
            add_products(a, i, kt + a * 2 * V::size, sum);
        for (int r = 0; r < group; ++r) {
          C* to = scores + (i + r) * score_width + panel * V::size;
          (begin == 0 ? sum[r] : V::load(to) + sum[r]).store(to);
        }
      }
  }

  HOST_DEVICE void add_products(int64_t a, int64_t i, const C* k, V (&sum)[group]) const {
    const C* u = queries + place_of(a, i);
    const C* scale = scales + a / 4 * max_tile_queries + i;
    V P[4], T[4], w[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      P[n] = V::load(k + 2 * n * V::size);
      T[n] = V::load(k + (2 * n + 1) * V::size);
      w[n] = V(weight[a + n]);
    }
    const V one(1);
#pragma GCC unroll 16
    for (int r = 0; r < group; ++r) {
      V d[4], n[4];
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        d[m] = V(u[4 * r + m]) * P[m] + one;
        n[m] = w[m] * (V(u[4 * r + m]) * P[m] + T[m]);
      }
      const V d12 = d[0] * d[1], d34 = d[2] * d[3] * V(scale[r]);
      const V n12 = n[0] * d[1] + n[1] * d[0], n34 = (n[2] * d[3] + n[3] * d[2]) * V(scale[r]);
      sum[r] = sum[r] + (n12 * d34 + n34 * d12) / (d12 * d34);
    }
  }

  HOST_DEVICE void add_pairs(int64_t a, int64_t i, const C* k, V (&sum)[group]) const {
    const C* q = queries + place_of(a, i);
    for (int r = 0; r < group; ++r, q += 4) {
      V part[4];
      for (int n = 0; n < 4; ++n)
        part[n] = V(weight[a + n]) * tanh(V(q[n]) + V::load(k + 2 * n * V::size));
      sum[r] = sum[r] + ((part[0] + part[1]) + (part[2] + part[3]));
    }
  }

  // How many keys from the first may be attended to by any query of the tile.
  int64_t reachable() const {
    int64_t end = keys_of(p, b);
    if (p.causal && first + rows < end) end = first + rows;
    return end;
  }

  // Scores of the whole tile, -inf where not allowed. kt holds this batch row's panels.
  void score(const C* kt) {
    const int64_t end = reachable();
    if (by_rows(p)) score_rows(end);
    for (int64_t panel = 0; !by_rows(p) && panel * V::size < end; ++panel)
      score_panel(panel, kt + panel * channels * 2 * V::size);
    for (int64_t i = 0; i < rows; ++i) {
      C* row = scores + i * score_width;
      if (by_pairs(p))
        for (int64_t j = 0; j < end; ++j) row[j] = allowed(i, j) ? row[j] : -C(INFINITY);
      for (int64_t j = end; j < score_width; ++j) row[j] = -C(INFINITY);
    }
  }

  // The factor of dropout on weight (i, j) of the tile.
  C keep(int64_t i, int64_t j) const {
    const uint64_t position = (uint64_t(b) * p.Q + first + i) * p.K + j;
    return philox_uniform(p.seed, position) > p.dropout_p ? C(1 / (1 - p.dropout_p)) : C(0);
  }

  C maximum(const C* row) const {
    // NaN, once there, stays.
    V top(-C(INFINITY));
    for (int64_t j = 0; j < score_width; j += V::size) {
      const V score = V::load(row + j);
      top = where(top <= top, where(score <= top, top, score), top);
    }
    C result = top.v[0];
    for (int i = 1; i < V::size && result == result; ++i)
      result = top.v[i] <= result ? result : top.v[i];
    return result;
  }

  void store_row(const C* row, S* to) const {
    for (int64_t j = 0; j < p.K; j += V::size) Memory<V>::store(V::load(row + j), to + j, p.K - j);
  }

  void add_row(const S* from, C* row) const {
    for (int64_t j = 0; j < p.K; j += V::size)
      (V::load(row + j) + Memory<V>::load(from + j, p.K - j)).store(row + j);
  }

  // Whether query i of the tile may attend to key j.
  bool allowed(int64_t i, int64_t j) const { return is_allowed(p, b, first + i, j); }

  // Adds the gradient of the scores of query i where a key was allowed.
  void add_allowed_row(int64_t i, const S* from, C* row) const {
    from += (b * p.Q + first + i) * p.K;
    for (int64_t j = 0; j < p.K; ++j)
      if (allowed(i, j)) row[j] += C(widen(from[j]));
  }

  // exp(score - shift) for a row in place; returns the sum.
  C exponentiate(C* row, C shift) const {
    V sum(0);
    for (int64_t j = 0; j < score_width; j += V::size) {
      const V score = V::load(row + j);
      // exp clamps, so that -inf must be made zero by hand.
      const V e = where(score <= V(-C(INFINITY)), V(0), exp(score - V(shift)));
      e.store(row + j);
      sum = sum + e;
    }
    return horizontal_sum(sum);
  }

  // Multiplies the weights of a row by a factor. Zeros, and the -inf of a row without weights, become
  // zeros whatever the factor.
  void scale(C* row, C factor) const {
    for (int64_t j = 0; j < score_width; j += V::size) {
      const V e = V::load(row + j);
      where(e <= V(0), V(0), e * V(factor)).store(row + j);
    }
  }
};

// The anchors of every batch row, from the queries that attend to anything.
template <class S>
void find_anchors(const AttentionTile<S>& tile, const Host& host, const Anchors<Compute<S>>& all) {
  using C = Compute<S>;
  using V = Vector<C>;
  const AttentionShape& p = tile.p;
  parallel(host, p.B, true, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Anchors<C> anchors = all.of(b);
      for (int64_t a = 0; a < all.channels; a += V::size) {
        constexpr C infinity = INFINITY;
        V low(infinity), high(-infinity), odd(0);
        const S* query = static_cast<const S*>(p.query) + b * p.Q * p.A + a;
        for (int64_t i = 0; i < p.Q; ++i, query += p.A) {
          if (!attends(p, b, i)) continue;
          const V q = Memory<V>::load(query, p.A - a);
          low = smaller(low, q);
          high = larger(high, q);
          odd = odd + q * V(0);  // NaN from the first that is not finite on
        }
        for (int64_t n = a; n < a + V::size && n < all.channels; ++n) {
          const C spread = high.v[n - a] - low.v[n - a] + odd.v[n - a];
          const C w = tile.weight[n];
          const bool fits =
              spread <= ScoreConstants<C>::range && w <= largest_weight && w >= -largest_weight;
          anchors.at[n] = low.v[n - a] <= high.v[n - a] ? low.v[n - a] : C(0);
          anchors.direct[n / 4] = (n % 4 && anchors.direct[n / 4]) || (n < p.A && !fits);
        }
      }
    }
  });
}

// P and T of the keys of all batch rows, bias added, kt[b][panel][a][2][lane]; where a channel is
// direct, the key itself in place of P. Keys that nobody meets are zeros, and so, on the way back, is
// NaN: who may attend to it is told so by the log-sum-exp.
template <class S>
void load_keys(const AttentionTile<S>& tile, const Host& host, const Anchors<Compute<S>>& all,
               bool without_nan, Compute<S>* kt) {
  using C = Compute<S>;
  using V = Vector<C>;
  constexpr int lanes = V::size;
  const AttentionShape& p = tile.p;
  const S* bias = static_cast<const S*>(p.bias);
  parallel(host, p.B * tile.panels, true, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tile.panels, first = task % tile.panels * lanes;
      const Anchors<C> anchors = all.of(b);
      C* to = kt + task * tile.channels * 2 * lanes;
      const int64_t left = keys_of(p, b) - first;
      const S* from = static_cast<const S*>(p.key) + (b * p.K + first) * p.A;
      for (int64_t a = 0; a < tile.channels; a += lanes) {
        V key[lanes];
        for (int lane = 0; lane < lanes; ++lane) {
          key[lane] = lane < left ? Memory<V>::load(from + lane * p.A + a, p.A - a) : V(0);
          if (without_nan) key[lane] = where(key[lane] <= key[lane], key[lane], V(0));
        }
        transpose(key);
        for (int n = 0; n < lanes && a + n < tile.channels; ++n, to += 2 * lanes) {
          const ExactSum<V> k(key[n], V(bias && a + n < p.A ? C(widen(bias[a + n])) : C(0)));
          if (anchors.direct[(a + n) / 4]) {
            k.sum.store(to);
            continue;
          }
          const ExactSum<V> x(k.sum, V(anchors.at[a + n]));
          const Tangent<V> t(x.sum, k.error + x.error);
          const V d = V(1) + t.exponential;
          (t.exponential / d).store(to);
          (t.minus_one / d).store(to + lanes);
        }
      }
    }
  });
}

// Runs f(task, slot) for every task; of one slot, and so of its scratch, one thread at a time.
template <class F>
void for_each_task(const Host& host, int64_t tasks, int64_t slots, const F& f) {
  parallel(host, slots, true, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t task = slot; task < tasks; task += slots) f(task, slot);
  });
}

inline int64_t slots_for(const Host& host, int64_t tasks) {
  return tasks < host.threads ? tasks : host.threads;
}

// The values as products take them: where a query may be kept from a value that others attend to, one
// that is not finite is left out, and added to whom it belongs.
template <class S>
class FiniteValues {
  using C = Compute<S>;
  using V = Vector<C>;

 public:
  explicit FiniteValues(const AttentionShape& p) : p(p) {}

  void take_memory(Arena& arena) {
    if (!by_pairs(p) || by_rows(p)) return;
    odd = arena.take<bool>(p.B);
    finite = arena.take<S>(p.B * p.K * p.D);
  }

  void find(const Host& host) {
    if (!odd) return;
    parallel(host, p.B, true, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t count = keys_of(p, b) * p.D;
        const S* from = given(b);
        V sum(0);
        for (int64_t n = 0; n < count; n += V::size)
          sum = sum + Memory<V>::load(from + n, count - n) * V(0);
        odd[b] = !(horizontal_sum(sum) == 0);
        S* to = finite + b * p.K * p.D;
        for (int64_t n = 0; odd[b] && n < count; ++n)
          to[n] = is_finite(from[n]) ? from[n] : Narrow<S>::from(C(0));
      }
    });
  }

  const S* of(int64_t b) const { return odd && odd[b] ? finite + b * p.K * p.D : given(b); }

  // Calls add(i, j, d, value) for what was left out before key `end`, and every query of the tile that
  // may attend to it.
  template <class F>
  void for_each_left_out(const AttentionTile<S>& t, int64_t end, const F& add) const {
    if (!odd || !odd[t.b]) return;
    const S* value = given(t.b);
    for (int64_t j = 0; j < end; ++j)
      for (int64_t d = 0; d < p.D; ++d, ++value)
        for (int64_t i = 0; i < t.rows && !is_finite(*value); ++i)
          if (t.allowed(i, j)) add(i, j, d, C(widen(*value)));
  }

 private:
  static bool is_finite(S x) { return C(widen(x)) * 0 == 0; }
  const S* given(int64_t b) const { return static_cast<const S*>(p.value) + b * p.K * p.D; }

  const AttentionShape& p;
  bool* odd = nullptr;  // [B]: whether something was left out
  S* finite = nullptr;  // [B][K][D], where it was
};

template <class S, class PanelsOfValues>
void pack_values(const AttentionShape& p, const Host& host, const FiniteValues<S>& values,
                 const PanelsOfValues& panels) {
  const bool worthwhile = p.B * p.K * p.D >= 1 << 16;  // less is packed before a thread has woken
  parallel(host, p.B * panels.count, worthwhile, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / panels.count;
      panels.pack(b, task % panels.count, values.of(b));
    }
  });
}

template <class S>
class AttentionForward {
  using C = Compute<S>;
  using V = Vector<C>;
  using Values = Panels<Plain<C>, 1, 2>;

 public:
  AttentionForward(const AttentionForwardParams& p, const Host& host)
      : p(p),
        host(host),
        tiles((p.Q + max_tile_queries - 1) / max_tile_queries),
        slots(slots_for(host, p.B * tiles)),
        finite(p),
        values({p.D, p.K, 0, 1, p.D}, !by_rows(p)),
        tile(slots, AttentionTile<S>(p)) {
    take_all(host, *this);
  }

  void take_memory(Arena& arena) {
    if (!by_rows(p)) {
      anchors.channels = tile[0].channels;
      anchors.take_memory(arena, p.B);
      kt = arena.take<C>(p.B * tile[0].panels * tile[0].channels * 2 * V::size);
    }
    finite.take_memory(arena);
    values.take_memory(arena, p.B);
    sums = arena.take<C>(slots * round_up(p.D, V::size));
    for (auto& t : tile) t.take_memory(arena);
  }

  void run() {
    for (auto& t : tile) t.load_weight();
    if (!by_rows(p)) {
      find_anchors(tile[0], host, anchors);
      load_keys(tile[0], host, anchors, false, kt);
    }
    finite.find(host);
    pack_values(p, host, finite, values);
    for_each_task(host, p.B * tiles, slots, [&](int64_t task, int64_t slot) {
      const int64_t b = task / tiles, first = task % tiles * max_tile_queries;
      const int64_t left = p.Q - first;
      tile[slot].begin(b, first, left < max_tile_queries ? left : max_tile_queries,
                       by_rows(p) ? anchors : anchors.of(b));
      attend(tile[slot], sums + slot * round_up(p.D, V::size));
    });
  }

 private:
  void attend(AttentionTile<S>& t, C* sum_of_values) {
    t.score(kt + t.b * t.panels * t.channels * 2 * V::size);
    const int64_t row0 = t.b * p.Q + t.first;
    for (int64_t i = 0; i < t.rows; ++i) {
      C* row = t.scores + i * t.score_width;
      if (p.scores) t.store_row(row, static_cast<S*>(p.scores) + (row0 + i) * p.K);
      const C top = t.maximum(row);
      const bool any = top > -C(INFINITY) || top != top;
      const C sum = any ? t.exponentiate(row, top) : C(1);
      static_cast<C*>(p.logsumexp)[row0 + i] = any ? top + std::log(sum) : -C(INFINITY);
      t.scale(row, 1 / sum);
      if (p.weights) t.store_row(row, static_cast<S*>(p.weights) + (row0 + i) * p.K);
      if (p.dropout_p > 0)
        for (int64_t j = 0; j < p.K; ++j) row[j] = row[j] * t.keep(i, j);
    }
    S* context = static_cast<S*>(p.context) + row0 * p.D;
    if (by_rows(p))
      for (int64_t i = 0; i < t.rows; ++i) sum_values(t, i, sum_of_values, context + i * p.D);
    values.multiply_units(t.b, Share(values.count, 0, 1), false, {t.scores, t.score_width, t.rows},
                          t.reachable(), [&](int64_t r, int64_t d, int64_t n, V product) {
                            Memory<V>::store(product, context + r * p.D + d, n);
                          });
    finite.for_each_left_out(t, t.reachable(), [&](int64_t i, int64_t j, int64_t d, C value) {
      S& to = context[i * p.D + d];
      to = Narrow<S>::from(C(widen(to)) + t.scores[i * t.score_width + j] * value);
    });
  }

  // The context of query i = sum_j weights[j] value_j, the values read once and in order.
  void sum_values(const AttentionTile<S>& t, int64_t i, C* sum, S* context) {
    const S* value = static_cast<const S*>(p.value) + t.b * p.K * p.D;
    const C* weights = t.scores + i * t.score_width;
    memset(sum, 0, round_up(p.D, V::size) * sizeof(C));
    for (int64_t j = 0; j < t.reachable(); ++j, value += p.D)
      for (int64_t d = 0; d < p.D && t.allowed(i, j); d += V::size)
        (V::load(sum + d) + V(weights[j]) * Memory<V>::load(value + d, p.D - d)).store(sum + d);
    for (int64_t d = 0; d < p.D; d += V::size)
      Memory<V>::store(V::load(sum + d), context + d, p.D - d);
  }

  const AttentionForwardParams& p;
  const Host& host;
  const int64_t tiles, slots;
  FiniteValues<S> finite;
  Values values;
  std::vector<AttentionTile<S>> tile;  // one per slot
  Anchors<C> anchors = {};
  C* kt = nullptr;    // keys, as load_keys leaves them; null by rows
  C* sums = nullptr;  // [slot][D, rounded up]
};

// How many parts the queries of a batch row are split into on the way back.
inline int64_t backward_splits(const AttentionShape& p) {
  const int64_t tiles = (p.Q + max_tile_queries - 1) / max_tile_queries;
  const int64_t wanted = p.B >= 8 ? 1 : 8 / (p.B > 0 ? p.B : 1);
  return tiles < wanted ? (tiles > 0 ? tiles : 1) : wanted;
}

template <class S>
class AttentionBackward {
  using C = Compute<S>;
  using V = Vector<C>;
  using Transposed = Panels<Plain<C>, 1, 2>;   // of the values: columns are keys, k runs over D
  static constexpr int64_t keys_together = 8;  // panels between two horizontal sums

  struct Slot {
    AttentionTile<S> tile;
    C* d_scores;      // [max_tile_queries][score_width]: dP, then dS
    C* kept;          // [max_tile_queries][score_width]: weights after dropout
    C* grad_context;  // [max_tile_queries][D]
    C* d_queries;     // [max_tile_queries][row_width]
    C* d_query_sums;  // [max_tile_queries][lane]
    C* d_weight;      // [row_width], by rows

    explicit Slot(const AttentionShape& p) : tile(p) {}
    void take_memory(Arena& arena) {
      tile.take_memory(arena);
      d_scores = arena.take<C>(max_tile_queries * tile.score_width);
      kept = arena.take<C>(max_tile_queries * tile.score_width);
      grad_context = arena.take<C>(max_tile_queries * tile.p.D);
      d_queries = arena.take<C>(max_tile_queries * tile.row_width);
      d_query_sums = arena.take<C>(max_tile_queries * V::size);
      d_weight = arena.take<C>(tile.row_width);
    }
  };

 public:
  AttentionBackward(const AttentionBackwardParams& p, const Host& host)
      : p(p),
        host(host),
        splits(backward_splits(p)),
        slots(slots_for(host, p.B * splits)),
        finite(p),
        transposed({p.K, p.D, 0, p.D, 1}, !by_rows(p)),
        slot(slots, Slot(p)),
        panels(slot[0].tile.panels),
        channels(slot[0].tile.channels),
        d_width(round_up(p.D, V::size)) {
    take_all(host, *this);
  }

  void take_memory(Arena& arena) {
    if (!by_rows(p)) {
      anchors.channels = channels;
      anchors.take_memory(arena, p.B);
      kt = arena.take<C>(p.B * panels * channels * 2 * V::size);
      transposed.take_memory(arena, p.B);
      d_kt = arena.take<C>(p.B * splits * panels * channels * V::size);
      d_values = arena.take<C>(p.B * splits * p.K * d_width);
    }
    finite.take_memory(arena);
    d_weights = arena.take<C>(p.B * splits * channels * V::size);
    d_biases = arena.take<C>(p.B * splits * channels);
    for (auto& s : slot) s.take_memory(arena);
  }

  void run() {
    for (auto& s : slot) s.tile.load_weight();
    if (!by_rows(p)) {
      find_anchors(slot[0].tile, host, anchors);
      load_keys(slot[0].tile, host, anchors, true, kt);
    }
    finite.find(host);
    pack_values(p, host, finite, transposed);
    for_each_task(host, p.B * splits, slots,
                  [&](int64_t task, int64_t at) { run_split(task, slot[at]); });
    if (!by_rows(p))
      parallel(host, p.B, true, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) finish_keys_and_values(b);
      });
    finish_weight();
  }

 private:
  C* d_kt_of(int64_t task) const { return d_kt + task * panels * channels * V::size; }
  C* d_values_of(int64_t task) const { return d_values + task * p.K * d_width; }
  C* d_weights_of(int64_t task) const { return d_weights + task * channels * V::size; }
  C* d_biases_of(int64_t task) const { return d_biases + task * channels; }

  void run_split(int64_t task, Slot& s) {
    if (!by_rows(p)) {
      memset(d_kt_of(task), 0, panels * channels * V::size * sizeof(C));
      memset(d_values_of(task), 0, p.K * d_width * sizeof(C));
    }
    memset(d_weights_of(task), 0, channels * V::size * sizeof(C));
    memset(d_biases_of(task), 0, channels * sizeof(C));
    const int64_t b = task / splits, split = task % splits;
    const int64_t tiles = (p.Q + max_tile_queries - 1) / max_tile_queries;
    for (int64_t i = tiles * split / splits; i < tiles * (split + 1) / splits; ++i) {
      const int64_t first = i * max_tile_queries, left = p.Q - first;
      s.tile.begin(b, first, left < max_tile_queries ? left : max_tile_queries,
                   by_rows(p) ? anchors : anchors.of(b));
      recompute_weights(s);
      differentiate_softmax(s, task);
      if (by_rows(p))
        differentiate_rows(s, task);
      else
        differentiate_scores(s, task);
      finish_queries(s, task);
    }
  }

  // tile.scores becomes the weights, s.kept the weights after dropout.
  void recompute_weights(Slot& s) {
    AttentionTile<S>& t = s.tile;
    t.score(kt + t.b * panels * channels * 2 * V::size);
    for (int64_t i = 0; i < t.rows; ++i) {
      C* row = t.scores + i * t.score_width;
      C* kept = s.kept + i * t.score_width;
      const C shift = static_cast<const C*>(p.logsumexp)[t.b * p.Q + t.first + i];
      // The log-sum-exp of large scores was rounded to as many digits as they have.
      t.scale(row, shift == -C(INFINITY) ? C(0) : 1 / t.exponentiate(row, shift));
      memcpy(kept, row, t.score_width * sizeof(C));
      if (p.dropout_p > 0)
        for (int64_t j = 0; j < p.K; ++j) kept[j] = row[j] * t.keep(i, j);
    }
  }

  // From grad_context and grad_weights to d_scores, and the tile's part of d_value.
  void differentiate_softmax(Slot& s, int64_t task) {
    AttentionTile<S>& t = s.tile;
    const int64_t row0 = t.b * p.Q + t.first, width = t.score_width;
    const int64_t end = t.reachable();
    memset(s.d_scores, 0, t.rows * width * sizeof(C));
    if (p.grad_context) {
      const S* from = static_cast<const S*>(p.grad_context) + row0 * p.D;
      for (int64_t i = 0; i < t.rows * p.D; ++i) s.grad_context[i] = C(widen(from[i]));
      if (by_rows(p)) dot_values(s, end);
      const int64_t needed = (end + Transposed::units_each - 1) / Transposed::units_each;
      transposed.multiply_units(t.b, Share(by_rows(p) ? 0 : needed, 0, 1), false,
                                {s.grad_context, p.D, t.rows}, p.D,
                                [&](int64_t r, int64_t j, int64_t, V product) {
                                  product.store(s.d_scores + r * width + j);
                                });
      finite.for_each_left_out(t, end, [&](int64_t i, int64_t j, int64_t d, C value) {
        s.d_scores[i * width + j] += s.grad_context[i * p.D + d] * value;
      });
      if (!by_rows(p)) add_d_values(s, d_values_of(task), end);
    }
    for (int64_t i = 0; i < t.rows; ++i) {
      C* d_row = s.d_scores + i * width;
      const C* weights = t.scores + i * width;
      memset(d_row + end, 0, (width - end) * sizeof(C));  // values there may be anything
      if (p.dropout_p > 0)
        for (int64_t j = 0; j < end; ++j) d_row[j] = d_row[j] * t.keep(i, j);
      if (p.grad_weights)
        t.add_row(static_cast<const S*>(p.grad_weights) + (row0 + i) * p.K, d_row);
      V dot(0), total(0);
      for (int64_t j = 0; j < width; j += V::size) {
        dot = dot + V::load(weights + j) * V::load(d_row + j);
        total = total + V::load(weights + j);
      }
      // The weights sum up to 1 but for rounding; that little, times a large mean, would not cancel.
      const C sum = horizontal_sum(total);
      const V mean(sum == 0 ? C(0) : horizontal_sum(dot) / sum);
      for (int64_t j = 0; j < width; j += V::size) {
        const V weight = V::load(weights + j);
        where(weight <= V(0), V(0), weight * (V::load(d_row + j) - mean)).store(d_row + j);
      }
      if (p.grad_scores) t.add_allowed_row(i, static_cast<const S*>(p.grad_scores), d_row);
    }
  }

  // d_value_j += sum_i kept_ij grad_context_i, for the keys before `end`.
  void add_d_values(Slot& s, C* d_value, int64_t end) {
    AttentionTile<S>& t = s.tile;
    for (int64_t j = 0; j < end; ++j) {
      C* to = d_value + j * d_width;
      for (int64_t d = 0; d < p.D; d += V::size) {
        V sum = V::load(to + d);
        for (int64_t i = 0; i < t.rows; ++i)
          sum = sum + V(s.kept[i * t.score_width + j]) *
                          Memory<V>::load(s.grad_context + i * p.D + d, p.D - d);
        sum.store(to + d);
      }
    }
  }

  // From d_scores to d_query, and the tile's part of d_key, d_weight and d_bias.
  void differentiate_scores(Slot& s, int64_t task) {
    AttentionTile<S>& t = s.tile;
    const int64_t used = (t.reachable() + V::size - 1) / V::size;
    const C* keys = kt + t.b * panels * channels * 2 * V::size;
    memset(s.d_queries, 0, t.rows * t.row_width * sizeof(C));
    for (int64_t begin = 0; begin < used; begin += keys_together) {
      const int64_t end = used - begin < keys_together ? used : begin + keys_together;
      for (int64_t a = 0; a < p.A; ++a) {
        const bool direct = t.anchors.direct[a / 4];
        memset(s.d_query_sums, 0, t.rows * V::size * sizeof(C));
        C* d_weight_at = d_weights_of(task) + a * V::size;
        V d_weight = V::load(d_weight_at);
        for (int64_t n = begin; n < end; ++n) {
          const C* key = keys + (n * channels + a) * 2 * V::size;
          C* d_key = d_kt_of(task) + (n * channels + a) * V::size;
          const C* d_scores = s.d_scores + n * V::size;
          const V d = direct ? differentiate_channel<true>(s, a, key, d_scores, d_weight)
                             : differentiate_channel<false>(s, a, key, d_scores, d_weight);
          (V::load(d_key) + d).store(d_key);
        }
        d_weight.store(d_weight_at);
        for (int64_t i = 0; i < t.rows; ++i)
          s.d_queries[i * t.row_width + a] += horizontal_sum(V::load(s.d_query_sums + i * V::size));
      }
    }
  }

  // d_query of the tile, and its sum for the bias.
  void finish_queries(Slot& s, int64_t task) {
    const AttentionTile<S>& t = s.tile;
    S* d_query = static_cast<S*>(p.d_query) + (t.b * p.Q + t.first) * p.A;
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t a = 0; a < p.A; ++a) {
        const C d = s.d_queries[i * t.row_width + a] * t.weight[a];
        d_query[i * p.A + a] = Narrow<S>::from(d);
        d_biases_of(task)[a] += d;
      }
  }

  // d_scores_ij = grad_context_i . value_j
  void dot_values(Slot& s, int64_t end) {
    const AttentionTile<S>& t = s.tile;
    const S* value = static_cast<const S*>(p.value) + t.b * p.K * p.D;
    for (int64_t j = 0; j < end; ++j, value += p.D)
      for (int64_t i = 0; i < t.rows; ++i) {
        V sum(0);
        for (int64_t d = 0; d < p.D && t.allowed(i, j); d += V::size)
          sum = sum + Memory<V>::load(s.grad_context + i * p.D + d, p.D - d) *
                          Memory<V>::load(value + d, p.D - d);
        s.d_scores[i * t.score_width + j] = horizontal_sum(sum);
      }
  }

  // By rows: everything that d_scores and the kept weights lead to, key by key. The one tile of a
  // batch row is all there is to add up, so the gradients of keys and values are final.
  void differentiate_rows(Slot& s, int64_t task) {
    AttentionTile<S>& t = s.tile;
    const S* key = static_cast<const S*>(p.key) + t.b * p.K * p.A;
    S* d_key = static_cast<S*>(p.d_key) + t.b * p.K * p.A;
    S* d_value = static_cast<S*>(p.d_value) + t.b * p.K * p.D;
    C* d_weight = s.d_weight;
    memset(d_weight, 0, t.row_width * sizeof(C));
    memset(s.d_queries, 0, t.rows * t.row_width * sizeof(C));
    const int64_t end = t.reachable();
    for (int64_t j = 0; j < p.K; ++j, key += p.A, d_key += p.A, d_value += p.D) {
      for (int64_t d = 0; d < p.D; d += V::size) {
        V sum(0);
        for (int64_t i = 0; i < t.rows && j < end && p.grad_context; ++i)
          sum = sum + V(s.kept[i * t.score_width + j]) *
                          Memory<V>::load(s.grad_context + i * p.D + d, p.D - d);
        Memory<V>::store(sum, d_value + d, p.D - d);
      }
      for (int64_t a = 0; a < p.A; a += V::size) {
        V sum(0);
        for (int64_t i = 0; i < t.rows && j < end; ++i) {
          const C d_score = s.d_scores[i * t.score_width + j];
          if (d_score == 0) continue;  // of a pair that is not allowed anything may come
          const Tangent<V> pair = t.pair(i, key, a);
          const V r = V(1) / (V(1) + pair.exponential), tangent = pair.minus_one * r;
          (V::load(d_weight + a) + V(d_score) * tangent).store(d_weight + a);
          const V d = V(d_score) * slope(tangent, V(4) * (pair.exponential * r) * r);
          sum = sum + d;
          C* d_query = s.d_queries + i * t.row_width + a;
          (V::load(d_query) + d).store(d_query);
        }
        Memory<V>::store(sum * V::load(t.weight + a), d_key + a, p.A - a);
      }
    }
    for (int64_t a = 0; a < p.A; ++a) d_weights_of(task)[a * V::size] = d_weight[a];
  }

  // 1 - t^2. The gradient of a row of equal scores is what is left when its dS cancel, and for small t
  // that form disturbs their sum least; near +-1 its digits are lost, and `product` is the same with
  // all of them.
  static HOST_DEVICE V slope(V t, V product) {
    const V difference = V(1) - t * t;
    return where(difference < V(C(0.5)), product, difference);
  }

  // One channel against one panel of keys: adds dS (1 - t^2) to the sums of the queries, dS t to
  // d_weight, and returns the sum over queries of dS (1 - t^2).
  template <bool direct>
  V differentiate_channel(Slot& s, int64_t a, const C* key, const C* d_scores, V& d_weight) {
    const AttentionTile<S>& t = s.tile;
    const V P = V::load(key), T = direct ? V(0) : V::load(key + V::size), one(1);
    const V of_key = (P + P) * (one - T);  // 4P(1 - P)
    V d_key(0);
    for (int64_t i = 0; i < t.rows; ++i) {
      const V u(t.queries[t.place_of(a, i)]);
      const V d_score = V::load(d_scores + i * t.score_width);
      V tangent, by_product;
      if constexpr (direct) {  // a pair that is not allowed may be of infinities
        const V x = where((d_score <= V(0)) & (V(0) <= d_score), V(0), u + P);
        const Tangent<V> pair(x);
        const V r = one / (one + pair.exponential);
        tangent = pair.minus_one * r;
        by_product = V(4) * (pair.exponential * r) * r;
      } else {
        const V r = one / (u * P + one);
        tangent = (u * P + T) * r;
        by_product = (u * r + r) * (of_key * r);
      }
      d_weight = d_weight + d_score * tangent;
      const V d = d_score * slope(tangent, by_product);
      d_key = d_key + d;
      (V::load(s.d_query_sums + i * V::size) + d).store(s.d_query_sums + i * V::size);
    }
    return d_key;
  }

  void finish_keys_and_values(int64_t b) {
    const C* weight = slot[0].tile.weight;
    S* d_key = static_cast<S*>(p.d_key) + b * p.K * p.A;
    S* d_value = static_cast<S*>(p.d_value) + b * p.K * p.D;
    for (int64_t j = 0; j < p.K; ++j) {
      for (int64_t a = 0; a < p.A; ++a) {
        C sum = 0;
        for (int64_t split = 0; split < splits; ++split)
          sum += d_kt_of(b * splits + split)[(j / V::size * channels + a) * V::size + j % V::size];
        d_key[j * p.A + a] = Narrow<S>::from(sum * weight[a]);
      }
      for (int64_t d = 0; d < p.D; ++d) {
        C sum = 0;
        for (int64_t split = 0; split < splits; ++split)
          sum += d_values_of(b * splits + split)[j * d_width + d];
        d_value[j * p.D + d] = Narrow<S>::from(sum);
      }
    }
  }

  void finish_weight() {
    for (int64_t a = 0; a < p.A; ++a) {
      C d_weight = 0, d_bias = 0;
      for (int64_t task = 0; task < p.B * splits; ++task) {
        d_weight += horizontal_sum(V::load(d_weights_of(task) + a * V::size));
        d_bias += d_biases_of(task)[a];
      }
      static_cast<S*>(p.d_weight)[a] = Narrow<S>::from(d_weight);
      if (p.d_bias) static_cast<S*>(p.d_bias)[a] = Narrow<S>::from(d_bias);
    }
  }

  const AttentionBackwardParams& p;
  const Host& host;
  const int64_t splits, slots;
  FiniteValues<S> finite;
  Transposed transposed;
  std::vector<Slot> slot;
  const int64_t panels, channels, d_width;
  Anchors<C> anchors = {};
  C* kt = nullptr;         // keys, as load_keys leaves them; null by rows
  C* d_kt = nullptr;       // [b][split][panel][a][lane], without the factor w_a
  C* d_values = nullptr;   // [b][split][K][d_width]
  C* d_weights = nullptr;  // [b][split][a][lane]
  C* d_biases = nullptr;   // [b][split][a]
};
