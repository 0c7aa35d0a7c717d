// Additive attention on the CPU: score_ij = sum_a w_a tanh(q_ia + k_ja), softmax over j, context.
//
// One exponential per row element instead of one tanh per pair. With an anchor c_a in the middle of a
// tile's queries,
//
//   E_q = exp(2(q - c)),  E_k = exp(2(k + c)),  d = 1 + E_q E_k,  tanh(q + k) = 1 - 2/d
//
// and four channels share a division: w1/d1 + ... + w4/d4 over d1 d2 d3 d4. d is capped where tanh has
// long been 1, so that nothing overflows; a tile whose queries spread too far around c in some channel
// for E_q to stay in range takes tanh itself.
//
//   tile = up to 32 queries x all keys. Keys lie transposed in panels of one vector: kt[panel][a][lane].
//   For every panel E_k is computed once, then groups of queries run over it with their score sums in
//   registers. Scores of the tile stay in scratch (32 x K), are normalised there, and the context is the
//   product with the packed values (product.h). Nothing of size Q x K leaves unless asked for.
//
// Backward recomputes the scores from logsumexp and, per tile and panel, d tanh = 4 E r^2, r = 1/d.
// Work is (batch row, split): a split owns its queries' gradients and a partial sum of those of keys,
// values and weight. How many splits depends on the shape alone, so results do not depend on threads.
//
// Fewer than four queries (decoding) share too little for that. There a thread walks the keys and
// values as they lie in memory, a vector of channels at a time, with tanh = 1 - 2/(1 + exp(2(q + k))).
//
// Included inside the instruction set's namespace.

template <class T>
struct ScoreConstants;
template <>
struct ScoreConstants<float> {
  static constexpr float cap = 1073741824.0f;  // 2^30: four of them still multiply
  static constexpr float clamp = 87.0f;        // of the exponent
  static constexpr float range = 30.0f;        // of |q - c|
};
template <>
struct ScoreConstants<double> {
  static constexpr double cap = 1152921504606846976.0;  // 2^60
  static constexpr double clamp = 700.0;
  static constexpr double range = 30.0;
};

constexpr int64_t max_tile_queries = 32;

inline bool by_rows(const AttentionShape& p) { return p.Q < 4; }

template <class T, int N>
HOST_DEVICE Vec<T, N> minimum(Vec<T, N> a, Vec<T, N> b) {
  return where(b < a, b, a);  // a if either is NaN in b
}

template <class T, int N>
HOST_DEVICE T horizontal_sum(Vec<T, N> x) {
  T sum = 0;
  for (int i = 0; i < N; ++i) sum += x.v[i];
  return sum;
}

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
  bool direct = false;                 // whether some channel's queries spread too far

  C* weight;   // [row_width], zeros beyond A
  C* anchor;   // [channels]
  C* queries;  // [channels/4][max_tile_queries][4]: E_q, or q itself if `direct`;
               // by rows [query][row_width]: q + bias
  C* ek;       // [channels][lane]: E_k of the panel at hand, or k itself
  C* scores;   // [max_tile_queries][score_width]

  explicit AttentionTile(const AttentionShape& p)
      : p(p),
        channels(round_up(p.A, 4)),
        panels((p.K + V::size - 1) / V::size),
        score_width(panels * V::size),
        row_width(round_up(p.A, V::size > 4 ? V::size : 4)) {}

  void take_memory(Arena& arena) {
    weight = arena.take<C>(row_width);
    anchor = arena.take<C>(channels);
    queries = arena.take<C>(row_width * max_tile_queries);
    ek = arena.take<C>(row_width * V::size);
    scores = arena.take<C>(max_tile_queries * score_width);
  }

  void load_weight() {
    const S* from = static_cast<const S*>(p.weight);
    for (int64_t a = 0; a < row_width; ++a) weight[a] = a < p.A ? C(widen(from[a])) : C(0);
  }

  C* query_at(int64_t a, int64_t i) const {
    return queries + (a / 4 * max_tile_queries + i) * 4 + a % 4;
  }

  // Takes up the queries first..first+rows of batch row b.
  void begin(int64_t batch, int64_t first_query, int64_t count) {
    b = batch;
    first = first_query;
    rows = count;
    direct = false;
    const S* from = static_cast<const S*>(p.query) + (b * p.Q + first) * p.A;
    if (by_rows(p)) return load_query_rows(from);
    for (int64_t a = 0; a < p.A; ++a) {
      C low = C(widen(from[a])), high = low;
      for (int64_t i = 1; i < rows; ++i) {
        const C q = C(widen(from[i * p.A + a]));
        low = q < low ? q : low;
        high = q > high ? q : high;
      }
      anchor[a] = low + (high - low) / 2;
      direct = direct || !(high - low <= 2 * K::range);  // NaN goes the plain way
    }
    const int64_t filled = round_up(rows, group);
    for (int64_t i = 0; i < filled; ++i)
      for (int64_t a = 0; a < channels; ++a) {
        const bool exists = i < rows && a < p.A;
        const C q = exists ? C(widen(from[i * p.A + a])) : C(0);
        *query_at(a, i) = direct || !exists ? q : 2 * (q - anchor[a]);
      }
    if (direct) return;
    for (int64_t a = 0; a < channels; a += 4)
      for (int64_t i = 0; i < filled * 4; i += V::size) {
        C* at = queries + a * max_tile_queries + i;
        exp(V::load(at)).store(at);
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

  // exp(2(q + k)) at channels a.. of query i, capped; `key` points at the key's channels.
  HOST_DEVICE V pair_exponential(int64_t i, const S* key, int64_t a) const {
    const V x = V::load(queries + i * row_width + a) + Memory<V>::load(key + a, p.A - a);
    return minimum(exp(x + x), V(K::cap));
  }

  void score_rows(int64_t end, C weight_sum) {
    const S* key = static_cast<const S*>(p.key) + b * p.K * p.A;
    for (int64_t j = 0; j < end; ++j, key += p.A)
      for (int64_t i = 0; i < rows; ++i) {
        V sum(0);
        for (int64_t a = 0; a < p.A; a += V::size)
          sum = sum + V::load(weight + a) / (V(1) + pair_exponential(i, key, a));
        scores[i * score_width + j] = weight_sum - 2 * horizontal_sum(sum);
      }
  }

  // E_k of a panel of transposed keys (bias included).
  void load_panel(const C* kt) {
    for (int64_t a = 0; a < channels; ++a) {
      V k = V::load(kt + a * V::size);
      if (!direct) {
        k = (k + V(a < p.A ? anchor[a] : C(0))) * V(2);
        k = where(k < V(-K::clamp), V(-K::clamp), k);
        k = exp(where(V(K::clamp) < k, V(K::clamp), k));
      }
      k.store(ek + a * V::size);
    }
  }

  // Scores of all queries of the tile against one panel of keys, into `scores`.
  void score_panel(int64_t panel, C weight_sum) {
    for (int64_t i = 0; i < rows; i += group) {
      V sum[group];
#pragma GCC unroll 16
      for (int r = 0; r < group; ++r) sum[r] = V(0);
      for (int64_t a = 0; a < channels; a += 4) {
        const C* q = query_at(a, i);
        const C* e = ek + a * V::size;
        const V e1 = V::load(e), e2 = V::load(e + V::size), e3 = V::load(e + 2 * V::size),
                e4 = V::load(e + 3 * V::size);
        const V w1(weight[a]), w2(weight[a + 1]), w3(weight[a + 2]), w4(weight[a + 3]);
        if (direct) {
          for (int r = 0; r < group; ++r, q += 4)
            sum[r] = sum[r] + w1 * tanh(V(q[0]) + e1) + w2 * tanh(V(q[1]) + e2) +
                     w3 * tanh(V(q[2]) + e3) + w4 * tanh(V(q[3]) + e4);
          continue;
        }
        const V one(1), cap(K::cap);
#pragma GCC unroll 16
        for (int r = 0; r < group; ++r) {
          const V d1 = minimum(V(q[4 * r]) * e1 + one, cap);
          const V d2 = minimum(V(q[4 * r + 1]) * e2 + one, cap);
          const V d3 = minimum(V(q[4 * r + 2]) * e3 + one, cap);
          const V d4 = minimum(V(q[4 * r + 3]) * e4 + one, cap);
          const V d12 = d1 * d2, d34 = d3 * d4;
          const V n12 = w1 * d2 + w2 * d1, n34 = w3 * d4 + w4 * d3;
          sum[r] = sum[r] + (n12 * d34 + n34 * d12) / (d12 * d34);
        }
      }
      for (int r = 0; r < group && i + r < rows; ++r) {
        const V score = direct ? sum[r] : V(weight_sum) - V(2) * sum[r];
        score.store(scores + (i + r) * score_width + panel * V::size);
      }
    }
  }

  // How many keys from the first may be attended to by any query of the tile.
  int64_t reachable() const {
    int64_t end = p.lengths ? p.lengths[b] : p.K;
    if (p.causal && first + rows < end) end = first + rows;
    return end;
  }

  // Scores of the whole tile, -inf where not allowed. kt holds this batch row's panels.
  void score(const C* kt) {
    C weight_sum = 0;
    for (int64_t a = 0; a < p.A; ++a) weight_sum += weight[a];
    const int64_t end = reachable();
    if (by_rows(p)) score_rows(end, weight_sum);
    for (int64_t panel = 0; !by_rows(p) && panel * V::size < end; ++panel) {
      load_panel(kt + panel * channels * V::size);
      score_panel(panel, weight_sum);
    }
    for (int64_t i = 0; i < rows; ++i) {
      C* row = scores + i * score_width;
      if (p.mask || p.causal)
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
  bool allowed(int64_t i, int64_t j) const {
    if (p.lengths && j >= p.lengths[b]) return false;
    if (p.causal && j > first + i) return false;
    return !p.mask || p.mask[(p.mask_per_query ? b * p.Q + first + i : b) * p.K + j];
  }

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
};

// Keys of all batch rows, bias added, transposed into kt[b][panel][a][lane]; zeros beyond lengths,
// where anything may stand.
template <class S>
void transpose_keys(const AttentionTile<S>& tile, const Host& host, Compute<S>* kt) {
  using C = Compute<S>;
  constexpr int lanes = Vector<C>::size;
  const AttentionShape& p = tile.p;
  const S* bias = static_cast<const S*>(p.bias);
  parallel(host, p.B * tile.panels, true, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tile.panels, first = task % tile.panels * lanes;
      C* to = kt + task * tile.channels * lanes;
      const int64_t keys = p.lengths ? p.lengths[b] : p.K;
      for (int lane = 0; lane < lanes; ++lane) {
        const bool exists = first + lane < keys;
        const S* from =
            static_cast<const S*>(p.key) + (b * p.K + (exists ? first + lane : 0)) * p.A;
        for (int64_t a = 0; a < tile.channels; ++a)
          to[a * lanes + lane] =
              exists && a < p.A ? C(widen(from[a])) + (bias ? C(widen(bias[a])) : C(0)) : C(0);
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

template <class S, class Params, class PanelsOfValues>
void pack_values(const Params& p, const Host& host, const PanelsOfValues& panels) {
  const bool worthwhile = p.B * p.K * p.D >= 1 << 16;  // less is packed before a thread has woken
  parallel(host, p.B * panels.count, worthwhile, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / panels.count;
      panels.pack(b, task % panels.count, static_cast<const S*>(p.value) + b * p.K * p.D);
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
        values({p.D, p.K, 0, 1, p.D}, !by_rows(p)),
        tile(slots, AttentionTile<S>(p)) {
    take_all(host, *this);
  }

  void take_memory(Arena& arena) {
    if (!by_rows(p)) kt = arena.take<C>(p.B * tile[0].panels * tile[0].channels * V::size);
    values.take_memory(arena, p.B);
    sums = arena.take<C>(slots * round_up(p.D, V::size));
    for (auto& t : tile) t.take_memory(arena);
  }

  void run() {
    if (!by_rows(p)) transpose_keys(tile[0], host, kt);
    pack_values<S>(p, host, values);
    for (auto& t : tile) t.load_weight();
    for_each_task(host, p.B * tiles, slots, [&](int64_t task, int64_t slot) {
      const int64_t first = task % tiles * max_tile_queries;
      const int64_t left = p.Q - first;
      tile[slot].begin(task / tiles, first, left < max_tile_queries ? left : max_tile_queries);
      attend(tile[slot], sums + slot * round_up(p.D, V::size));
    });
  }

 private:
  void attend(AttentionTile<S>& t, C* sum_of_values) {
    t.score(kt + t.b * t.panels * t.channels * V::size);
    const int64_t row0 = t.b * p.Q + t.first;
    for (int64_t i = 0; i < t.rows; ++i) {
      C* row = t.scores + i * t.score_width;
      if (p.scores) t.store_row(row, static_cast<S*>(p.scores) + (row0 + i) * p.K);
      const C top = t.maximum(row);
      const bool any = top > -C(INFINITY) || top != top;
      const C sum = any ? t.exponentiate(row, top) : C(1);
      static_cast<C*>(p.logsumexp)[row0 + i] = any ? top + std::log(sum) : -C(INFINITY);
      const V scale(any ? 1 / sum : C(0));
      for (int64_t j = 0; j < t.score_width; j += V::size)
        (any ? V::load(row + j) * scale : V(0)).store(row + j);
      if (p.weights) t.store_row(row, static_cast<S*>(p.weights) + (row0 + i) * p.K);
      if (p.dropout_p > 0)
        for (int64_t j = 0; j < p.K; ++j) row[j] = row[j] * t.keep(i, j);
    }
    S* context = static_cast<S*>(p.context) + row0 * p.D;
    if (by_rows(p))
      for (int64_t i = 0; i < t.rows; ++i)
        sum_values(t, t.scores + i * t.score_width, sum_of_values, context + i * p.D);
    values.multiply_units(t.b, Share(values.count, 0, 1), false, {t.scores, t.score_width, t.rows},
                          t.reachable(), [&](int64_t r, int64_t d, int64_t n, V product) {
                            Memory<V>::store(product, context + r * p.D + d, n);
                          });
  }

  // context = sum_j weights[j] value_j, the values read once and in order.
  void sum_values(const AttentionTile<S>& t, const C* weights, C* sum, S* context) {
    const S* value = static_cast<const S*>(p.value) + t.b * p.K * p.D;
    memset(sum, 0, round_up(p.D, V::size) * sizeof(C));
    for (int64_t j = 0; j < t.reachable(); ++j, value += p.D)
      for (int64_t d = 0; d < p.D; d += V::size)
        (V::load(sum + d) + V(weights[j]) * Memory<V>::load(value + d, p.D - d)).store(sum + d);
    for (int64_t d = 0; d < p.D; d += V::size)
      Memory<V>::store(V::load(sum + d), context + d, p.D - d);
  }

  const AttentionForwardParams& p;
  const Host& host;
  const int64_t tiles, slots;
  Values values;
  std::vector<AttentionTile<S>> tile;  // one per slot
  C* kt = nullptr;                     // transposed keys; null by rows
  C* sums = nullptr;                   // [slot][D, rounded up]
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
    C* eks;           // [keys_together][channels][lane]

    explicit Slot(const AttentionShape& p) : tile(p) {}
    void take_memory(Arena& arena) {
      tile.take_memory(arena);
      d_scores = arena.take<C>(max_tile_queries * tile.score_width);
      kept = arena.take<C>(max_tile_queries * tile.score_width);
      grad_context = arena.take<C>(max_tile_queries * tile.p.D);
      d_queries = arena.take<C>(max_tile_queries * tile.row_width);
      d_query_sums = arena.take<C>(max_tile_queries * V::size);
      eks = arena.take<C>(keys_together * tile.channels * V::size);
    }
  };

 public:
  AttentionBackward(const AttentionBackwardParams& p, const Host& host)
      : p(p),
        host(host),
        splits(backward_splits(p)),
        slots(slots_for(host, p.B * splits)),
        transposed({p.K, p.D, 0, p.D, 1}, !by_rows(p)),
        slot(slots, Slot(p)),
        panels(slot[0].tile.panels),
        channels(slot[0].tile.channels),
        d_width(round_up(p.D, V::size)) {
    take_all(host, *this);
  }

  void take_memory(Arena& arena) {
    if (!by_rows(p)) {
      kt = arena.take<C>(p.B * panels * channels * V::size);
      transposed.take_memory(arena, p.B);
      d_kt = arena.take<C>(p.B * splits * panels * channels * V::size);
      d_values = arena.take<C>(p.B * splits * p.K * d_width);
    }
    d_weights = arena.take<C>(p.B * splits * channels * V::size);
    d_biases = arena.take<C>(p.B * splits * channels);
    for (auto& s : slot) s.take_memory(arena);
  }

  void run() {
    if (!by_rows(p)) transpose_keys(slot[0].tile, host, kt);
    pack_values<S>(p, host, transposed);
    for (auto& s : slot) s.tile.load_weight();
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
      s.tile.begin(b, first, left < max_tile_queries ? left : max_tile_queries);
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
    t.score(kt + t.b * panels * channels * V::size);
    for (int64_t i = 0; i < t.rows; ++i) {
      C* row = t.scores + i * t.score_width;
      C* kept = s.kept + i * t.score_width;
      const C shift = static_cast<const C*>(p.logsumexp)[t.b * p.Q + t.first + i];
      if (shift == -C(INFINITY))
        memset(row, 0, t.score_width * sizeof(C));
      else
        t.exponentiate(row, shift);
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
      V dot(0);
      for (int64_t j = 0; j < width; j += V::size)
        dot = dot + V::load(weights + j) * V::load(d_row + j);
      const V mean(horizontal_sum(dot));
      for (int64_t j = 0; j < width; j += V::size)
        (V::load(weights + j) * (V::load(d_row + j) - mean)).store(d_row + j);
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
    const C* keys = kt + t.b * panels * channels * V::size;
    memset(s.d_queries, 0, t.rows * t.row_width * sizeof(C));
    for (int64_t begin = 0; begin < used; begin += keys_together) {
      const int64_t count = used - begin < keys_together ? used - begin : keys_together;
      for (int64_t n = 0; n < count; ++n) {
        t.load_panel(keys + (begin + n) * channels * V::size);
        memcpy(s.eks + n * channels * V::size, t.ek, channels * V::size * sizeof(C));
      }
      for (int64_t a = 0; a < p.A; ++a) {
        memset(s.d_query_sums, 0, t.rows * V::size * sizeof(C));
        C* d_weight_at = d_weights_of(task) + a * V::size;
        V d_weight = V::load(d_weight_at);
        for (int64_t n = 0; n < count; ++n) {
          const V e = V::load(s.eks + (n * channels + a) * V::size);
          C* d_key = d_kt_of(task) + ((begin + n) * channels + a) * V::size;
          const C* d_scores = s.d_scores + (begin + n) * V::size;
          const V d = t.direct ? direct_channel(s, a, e, d_scores, d_weight)
                               : product_channel(s, a, e, d_scores, d_weight);
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
        for (int64_t d = 0; d < p.D; d += V::size)
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
    C* d_weight = t.ek;  // [row_width], free by rows
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
          const V exponential = t.pair_exponential(i, key, a);
          const V r = V(1) / (V(1) + exponential);
          const V d_score(s.d_scores[i * t.score_width + j]);
          const V scaled = d_score * r;
          (V::load(d_weight + a) + (d_score - (scaled + scaled))).store(d_weight + a);
          const V d = V(4) * (exponential * r) * scaled;
          sum = sum + d;
          C* d_query = s.d_queries + i * t.row_width + a;
          (V::load(d_query) + d).store(d_query);
        }
        Memory<V>::store(sum * V::load(t.weight + a), d_key + a, p.A - a);
      }
    }
    for (int64_t a = 0; a < p.A; ++a) d_weights_of(task)[a * V::size] = d_weight[a];
  }

  // One channel against one panel: adds dS (1 - t^2) to the sums of the queries, dS t to d_weight, and
  // returns the sum over queries of dS (1 - t^2) for the keys.
  V product_channel(Slot& s, int64_t a, V e, const C* d_scores, V& d_weight) {
    const AttentionTile<S>& t = s.tile;
    const V one(1), cap(ScoreConstants<C>::cap);
    V d_key(0);
    for (int64_t i = 0; i < t.rows; ++i) {
      const V exponential = minimum(V(*t.query_at(a, i)) * e, cap);
      const V r = one / (one + exponential);
      const V d_score = V::load(d_scores + i * t.score_width);
      const V scaled = d_score * r;
      // tanh = 1 - 2r and its derivative 4 E r^2, which is small to full relative accuracy.
      d_weight = d_weight + (d_score - (scaled + scaled));
      const V d = V(4) * (exponential * r) * scaled;
      d_key = d_key + d;
      (V::load(s.d_query_sums + i * V::size) + d).store(s.d_query_sums + i * V::size);
    }
    return d_key;
  }

  V direct_channel(Slot& s, int64_t a, V k, const C* d_scores, V& d_weight) {
    const AttentionTile<S>& t = s.tile;
    V d_key(0);
    for (int64_t i = 0; i < t.rows; ++i) {
      const V tangent = tanh(V(*t.query_at(a, i)) + k);
      const V d_score = V::load(d_scores + i * t.score_width);
      d_weight = d_weight + d_score * tangent;
      const V d = d_score * (V(1) - tangent * tangent);
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
  Transposed transposed;
  std::vector<Slot> slot;
  const int64_t panels, channels, d_width;
  C* kt = nullptr;
  C* d_kt = nullptr;       // [b][split][panel][a][lane], without the factor w_a
  C* d_values = nullptr;   // [b][split][K][d_width]
  C* d_weights = nullptr;  // [b][split][a][lane]
  C* d_biases = nullptr;   // [b][split][a]
};
