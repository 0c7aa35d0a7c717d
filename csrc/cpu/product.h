// The product of the engine: a few rows of values times a packed panel of columns.
//
// A panel holds W vectors of columns for every k: panel[k][w][lane]. One call computes
//
//   tile[r][w] = bias[w] + sum_k a[r][k] * panel[k][w]        r < R, w < W
//
// with all R*W accumulators in registers; per k that is W loads, R broadcasts and R*W multiply-adds.
// The sum runs over k in order, and over partial sums of a fixed length, whatever R is: so a result does
// not depend on how rows were tiled, and rounding does not pile up over a long k.
// Included inside the instruction set's namespace, after simd.h.

// ---- operands
//
// What is multiplied comes in words, one of them broadcast at a time: single values of the compute
// type, or, where the machine multiplies bfloat16, pairs of those, two successive k in one word. A
// vector of words is kept in a vector of the compute type whatever its bits mean. In a panel a vector lies
// as it is; load and store are for vectors of words that lie one after another.

template <class T>
struct Plain {
  using V = Vector<T>;
  using Value = T;
  using Word = T;
  static constexpr int depth = 1;  // values of k in a word
  static constexpr Word one = 1;

  static HOST_DEVICE V broadcast(Word x) { return V(x); }
  static HOST_DEVICE V multiply_add(V a, V b, V sum) { return sum + a * b; }
  static HOST_DEVICE V load(const Value* from) { return V::load(from); }
  static HOST_DEVICE void store(V x, Value* to) { x.store(to); }
  // A vector of words from values that follow one another.
  template <class S>
  static HOST_DEVICE V words(const S* from, int64_t count) {
    return Memory<V>::load(from, count);
  }
  // A word from each of `count` columns, whose values of k lie in `rows`; a null row is of zeros.
  template <class S>
  static HOST_DEVICE V across(const S* const (&rows)[1], int64_t count) {
    return rows[0] ? Memory<V>::load(rows[0], count) : V(0);
  }
};

#ifdef FUSED_RNN_BFLOAT16
// Sums are float; to the instruction, subnormal numbers are zeros.
struct Pairs {
  using V = Vector<float>;
  using Value = BFloat16;
  using Word = uint32_t;
  static constexpr int depth = 2;
  static constexpr Word one = 0x3f803f80u;

  static HOST_DEVICE V broadcast(Word x) {
    return V(static_cast<V::Native>(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x)))));
  }
  static HOST_DEVICE V multiply_add(V a, V b, V sum) {
    return V(static_cast<V::Native>(_mm512_dpbf16_ps(sum.v, (__m512bh)(a.v), (__m512bh)(b.v))));
  }
  static HOST_DEVICE V load(const Value* from) {
    V result;
    memcpy(&result.v, from, sizeof(result.v));
    return result;
  }
  static HOST_DEVICE void store(V x, Value* to) { memcpy(to, &x.v, sizeof(x.v)); }
  static HOST_DEVICE V words(const BFloat16* from, int64_t count) {
    V result(0);
    if (count >= 2 * V::size)
      memcpy(&result.v, from, sizeof(result.v));
    else
      memcpy(&result.v, from, count * sizeof(BFloat16));
    return result;
  }
  static HOST_DEVICE V across(const BFloat16* const (&rows)[2], int64_t count) {
    using Word = typename Bits<V::size>::Word;
    const Word words = half(rows[0], count) | half(rows[1], count) << 16;
    V result;
    memcpy(&result.v, &words, sizeof(words));
    return result;
  }

 private:
  static HOST_DEVICE Bits<V::size>::Word half(const BFloat16* row, int64_t count) {
    Bits<V::size>::Short bits{};
    if (row && count >= V::size)
      memcpy(&bits, row, sizeof(bits));
    else if (row)
      memcpy(&bits, row, count * sizeof(BFloat16));
    return __builtin_convertvector(bits, Bits<V::size>::Word);
  }
};
#endif

// A dual's two numbers are broadcast each to a vector of their own. Where the columns' tangents are zero,
// which is so for weights unless somebody asks for their direction, a third of the work falls away.
template <class T>
struct Plain<Dual<T>> {
  using V = Vector<Dual<T>>;
  using Part = Vector<T>;
  using Value = Dual<T>;
  using Word = Dual<T>;
  static constexpr int depth = 1;
  static constexpr Word one{1, 0};

  static HOST_DEVICE V broadcast(const Word& x) { return V(x); }
  static HOST_DEVICE V multiply_add(const V& a, const V& b, const V& sum) {
    return {sum.value + a.value * b.value, sum.tangent + a.value * b.tangent + a.tangent * b.value};
  }
  static HOST_DEVICE V multiply_value_add(const V& a, const V& b, const V& sum) {
    return {sum.value + a.value * b.value, sum.tangent + a.value * b.tangent};
  }
  static bool has_tangents(const Value* packed, int64_t count) {
    bool any = false;
    for (int64_t i = 0; i < count; i += V::size) {
      V x;
      memcpy(static_cast<void*>(&x), packed + i, sizeof(x));
      for (int lane = 0; lane < V::size; ++lane) any |= x.tangent.v[lane] != 0;
    }
    return any;
  }
  static HOST_DEVICE V load(const Value* from) { return V::load(from); }
  static HOST_DEVICE void store(V x, Value* to) { x.store(to); }
  static HOST_DEVICE V words(const Value* from, int64_t count) {
    return Memory<V>::load(from, count);
  }
  static HOST_DEVICE V across(const Value* const (&rows)[1], int64_t count) {
    return rows[0] ? Memory<V>::load(rows[0], count) : V(0);
  }
};

template <class E>
constexpr bool is_dual = false;
template <class T>
constexpr bool is_dual<Plain<Dual<T>>> = true;

template <class S>
struct OperandOf {
  using type = Plain<Compute<S>>;
};
#ifdef FUSED_RNN_BFLOAT16
template <>
struct OperandOf<BFloat16> {
  using type = Pairs;
};
#endif
template <class S>
using Operand = typename OperandOf<S>::type;

// Values that a row of n takes up in memory: whole vectors of words, but not whole pages. The same word of
// rows that lie pages apart has only 8 places in many a first-level cache, and a tile has up to 12 rows.
template <class E>
constexpr int64_t row_width(int64_t n) {
  constexpr int64_t each = E::V::size * E::depth;
  constexpr int64_t page = 4096 / static_cast<int64_t>(sizeof(typename E::Value));
  const int64_t width = (n + each - 1) / each * each;
  return width > 0 && width % page == 0 ? width + each : width;
}

// Words that hold k values.
template <class E>
constexpr int64_t word_count(int64_t k) {
  return (k + E::depth - 1) / E::depth;
}

// ---- the micro-kernel ----------------------------------------------------------------------------

constexpr int vector_registers = FUSED_RNN_VECTOR_BYTES == 64 ? 32 : 16;

// Rows of a tile. A vector of duals fills two registers.
template <class V>
constexpr int max_rows(int W) {
  constexpr int each = static_cast<int>(sizeof(V)) / FUSED_RNN_VECTOR_BYTES;
  const int rows = (vector_registers / each - W - 1) / W;
  return rows > 12 ? 12 : rows > 1 ? rows : 1;
}

// How the words of `a` lie: those of one row together, rows any distance apart; or, as in a panel, a
// vector of rows together for every k.
enum class Layout { rows, columns };

// Rows to be multiplied: `count` of them, `stride` words apart.
template <class E>
struct Rows {
  const typename E::Value* values;
  int64_t stride, count;
};

// Where the panels of a product lie that are taken together, and what they give.
template <class E>
struct PanelPlace {
  using C = typename E::V::Scalar;
  const typename E::Value* panel;
  int64_t panel_stride;  // from a panel to the next
  const C* bias;         // or null for zeros; panels of bias follow one another
  C* tile;
  int64_t tile_stride;  // from a panel's tile to the next
  int64_t row_stride;   // from a row of a tile to the next
};

constexpr int64_t words_in_a_row = 256;

// N panels at once; more than one only where R*W accumulators are too few to keep the units busy. With
// values_only the columns are duals without tangents.
template <class E, int W, int R, int N, Layout layout, bool values_only = false>
void product(const typename E::Word* a, int64_t a_stride, int64_t words,
             const PanelPlace<E>& place) {
  using V = typename E::V;
  constexpr int vector_values = V::size * E::depth;
  const int64_t r_step = layout == Layout::rows ? a_stride : 1;
  const int64_t k_step = layout == Layout::rows ? 1 : V::size;
  const typename E::Value* panel[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) panel[n] = place.panel + n * place.panel_stride;
  for (int64_t begin = 0; begin == 0 || begin < words; begin += words_in_a_row) {
    const int64_t end = words - begin < words_in_a_row ? words : begin + words_in_a_row;
    V sum[N][R][W];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int w = 0; w < W; ++w)
          sum[n][r][w] =
              begin == 0 && place.bias ? V::load(place.bias + (n * W + w) * V::size) : V(0);
    for (int64_t i = begin; i < end; ++i) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        V columns[W];
#pragma GCC unroll 16
        for (int w = 0; w < W; ++w)
          memcpy(static_cast<void*>(&columns[w]), panel[n] + w * vector_values, sizeof(V));
        panel[n] += W * vector_values;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const V x = E::broadcast(a[r * r_step + i * k_step]);
#pragma GCC unroll 16
          for (int w = 0; w < W; ++w) {
            if constexpr (values_only)
              sum[n][r][w] = E::multiply_value_add(columns[w], x, sum[n][r][w]);
            else
              sum[n][r][w] = E::multiply_add(columns[w], x, sum[n][r][w]);
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int w = 0; w < W; ++w) {
          typename V::Scalar* to =
              place.tile + n * place.tile_stride + r * place.row_stride + w * V::size;
          (begin == 0 ? sum[n][r][w] : V::load(to) + sum[n][r][w]).store(to);
        }
  }
}

template <class E>
using ProductFn = void (*)(const typename E::Word*, int64_t, int64_t, const PanelPlace<E>&);

template <class E, int W, bool values_only, int... R>
ProductFn<E> select_product(int rows, std::integer_sequence<int, R...>) {
  static constexpr ProductFn<E> table[] = {product<E, W, R + 1, 1, Layout::rows, values_only>...};
  return table[rows - 1];
}

// A multiply-add takes four cycles and two begin in each.
constexpr int panels_of_one_row(int W) { return (8 + W - 1) / W; }

// ---- packing -------------------------------------------------------------------------------------

// One vector of columns for all k, from rows that hold the columns of one k each: row(k) points at the
// first of `count` columns there are. Vectors of successive words are `stride` values apart.
template <class E, bool panel = true, class Row>
HOST_DEVICE void pack_rows(int64_t k, int64_t count, typename E::Value* to, int64_t stride,
                           const Row& row) {
  using S = std::remove_cv_t<std::remove_pointer_t<decltype(row(k))>>;
  for (int64_t i = 0; i < k; i += E::depth, to += stride) {
    const S* rows[E::depth];
    for (int d = 0; d < E::depth; ++d) rows[d] = i + d < k ? row(i + d) : nullptr;
    const auto words = E::across(rows, count);
    if constexpr (panel)
      memcpy(static_cast<void*>(to), &words, sizeof(words));
    else
      E::store(words, to);
  }
}

// The same from columns that hold their values of k together, column_stride apart: blocks of as many
// columns as words are turned round in registers.
template <class E, class S>
void pack_columns(const S* from, int64_t column_stride, int64_t k, int64_t count,
                  typename E::Value* to, int64_t stride) {
  using V = typename E::V;
  constexpr int N = V::size;
  const int64_t words = word_count<E>(k);
  for (int64_t i = 0; i < words; i += N) {
    V block[N];
#pragma GCC unroll 16
    for (int c = 0; c < N; ++c)
      block[c] =
          c < count ? E::words(from + c * column_stride + i * E::depth, k - i * E::depth) : V(0);
    transpose(block);
    const int here = words - i < N ? static_cast<int>(words - i) : N;
#pragma GCC unroll 16
    for (int w = 0; w < N; ++w)
      if (w < here) memcpy(static_cast<void*>(to + (i + w) * stride), &block[w], sizeof(V));
  }
}

// How weights lie in memory: element (gate, unit, k) at gate*gate_stride + unit*unit_stride +
// k*k_stride, where one of the latter two strides is 1.
struct PanelSource {
  int64_t units, k;
  int64_t gate_stride, unit_stride, k_stride;
};

// Weights of all lanes, packed into panels of Gates * PerGate vectors.
template <class E, int Gates, int PerGate>
class Panels {
  using V = typename E::V;
  using C = typename V::Scalar;
  using Value = typename E::Value;
  static constexpr int vector_values = V::size * E::depth;

 public:
  static constexpr int W = Gates * PerGate;
  static constexpr int units_each = PerGate * V::size;
  const int64_t count, k;

  // Those that are not `wanted` have no panels.
  Panels(const PanelSource& source, bool wanted = true)
      : count(wanted ? (source.units + units_each - 1) / units_each : 0),
        k(source.k),
        source(source),
        panel_size(word_count<E>(k) * W * vector_values) {}

  template <class Arena>
  void take_memory(Arena& arena, int64_t lanes, bool with_bias = false) {
    weights = arena.template take<Value>(lanes * count * panel_size);
    bias = with_bias ? arena.template take<C>(lanes * count * W * V::size) : nullptr;
    if constexpr (is_dual<E>) tangents = arena.template take<bool>(lanes * count);
  }

  template <class S>
  void pack(int64_t lane, int64_t i, const S* from, const S* bias_from = nullptr) const {
    for (int w = 0; w < W; ++w) {
      const int64_t gate = w / PerGate, first = i * units_each + w % PerGate * V::size;
      const int64_t here = source.units > first ? source.units - first : 0;
      const S* start = from + gate * source.gate_stride + first * source.unit_stride;
      Value* to = panel(lane, i) + w * vector_values;
      if (source.unit_stride == 1)
        pack_rows<E>(k, here, to, W * vector_values,
                     [&](int64_t j) { return here > 0 ? start + j * source.k_stride : nullptr; });
      else
        pack_columns<E>(start, source.unit_stride, k, here, to, W * vector_values);
      if (bias)
        (here > 0 ? Memory<V>::load(bias_from + gate * source.units + first, here) : V(0))
            .store(panel_bias(lane, i) + w * V::size);
    }
    if constexpr (is_dual<E>)
      tangents[lane * count + i] = E::has_tangents(panel(lane, i), panel_size);
  }

  // Likewise all panels of one part's share.
  template <class S>
  void pack_share(int64_t lane, int64_t part, int64_t parts, const S* from,
                  const S* bias_from = nullptr) const {
    const Share share(count, part, parts);
    for (int64_t i = share.begin; i < share.end; ++i) pack(lane, i, from, bias_from);
  }

  // One row of the product with panel i from weights as they lie in memory, k_stride 1: for so few rows
  // that packing costs more than it saves.
  template <class S>
  void multiply_unpacked(int64_t i, const S* from, const S* bias_from, const Value* a,
                         C* tile) const {
    for (int w = 0; w < W; ++w) {
      const int64_t gate = w / PerGate, first = i * units_each + w % PerGate * V::size;
      const int64_t here = source.units - first;
      if (here <= 0) break;
      const S* start = from + gate * source.gate_stride + first * source.unit_stride;
      V sums[V::size];
#pragma GCC unroll 16
      for (auto& sum : sums) sum = V(0);
      for (int64_t j = 0; j < k; j += V::size * E::depth) {
        const V x = E::load(a + j);
#pragma GCC unroll 16
        for (int u = 0; u < V::size; ++u)
          sums[u] = E::multiply_add(
              E::words(start + (u < here ? u : 0) * source.unit_stride + j, k - j), x, sums[u]);
      }
      transpose(sums);
      V total = bias_from ? Memory<V>::load(bias_from + gate * source.units + first, here) : V(0);
#pragma GCC unroll 16
      for (const auto& sum : sums) total = total + sum;
      total.store(tile + w * V::size);
    }
  }

  // The same from weights whose unit_stride is 1, for vectors of a single gate: each as below.
  template <class S, class Each>
  HOST_DEVICE void multiply_units_unpacked(const Share& share, const S* from, const Rows<E>& rows,
                                           const Each& each) const {
    static_assert(Gates == 1, "vectors of several gates belong together");
    constexpr int N = 8;
    const int64_t end =
        share.end * units_each < source.units ? share.end * units_each : source.units;
    for (int64_t r = 0; r < rows.count; ++r) {
      const auto* words = reinterpret_cast<const typename E::Word*>(rows.values) + r * rows.stride;
      const auto take = [&](auto vectors, int64_t unit) {
        V sums[vectors];
        multiply_columns<vectors>(from + unit, end - unit, words, sums);
        for (int n = 0; n < vectors; ++n)
          each(r, unit + n * V::size, end - unit - n * V::size, sums[n]);
        return unit + vectors * V::size;
      };
      int64_t unit = share.begin * units_each;
      while (unit + N * V::size <= end) unit = take(std::integral_constant<int, N>(), unit);
      while (unit < end) unit = take(std::integral_constant<int, 1>(), unit);
    }
  }

  // The product of the first of_k values of rows and the panels of a share, these from either end:
  // each(panel, first_row, height, tile) for every tile of up to max_rows(W) rows, near-equal in height.
  // A panel's tiles follow one another in `out`, panels out_stride apart; without that they pass away.
  template <class Each>
  HOST_DEVICE void multiply(int64_t lane, const Share& share, bool backwards, const Rows<E>& rows,
                            int64_t of_k, C* out, int64_t out_stride, const Each& each) const {
    constexpr int R = max_rows<V>(W), N = panels_of_one_row(W);
    constexpr int row_size = W * V::size;
    alignas(64) C buffer[(R > N ? R : N) * row_size];
    const auto* words = reinterpret_cast<const typename E::Word*>(rows.values);
    const int64_t tiles = (rows.count + R - 1) / R;
    const int64_t panels = share.end - share.begin;
    for (int64_t done = 0, taken; done < panels; done += taken) {
      taken = rows.count == 1 && panels - done >= N ? N : 1;
      const int64_t i = backwards ? share.end - done - taken : share.begin + done;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = rows.count * t / tiles;
        const int height = static_cast<int>(rows.count * (t + 1) / tiles - first);
        const PanelPlace<E> place{panel(lane, i),
                                  panel_size,
                                  bias ? panel_bias(lane, i) : nullptr,
                                  out ? out + i * out_stride + first * row_size : buffer,
                                  out ? out_stride : row_size,
                                  row_size};
        const ProductFn<E> run = has_tangents(lane, i, taken)
                                     ? choose_product<false>(height, taken)
                                     : choose_product<is_dual<E>>(height, taken);
        run(words + first * rows.stride, rows.stride, word_count<E>(of_k), place);
        for (int64_t n = 0; n < taken; ++n)
          each(i + n, first, height, place.tile + n * place.tile_stride);
      }
    }
  }

  // The same, where each(row, unit, units there are, result) takes the vectors of a single gate.
  template <class Each>
  HOST_DEVICE void multiply_units(int64_t lane, const Share& share, bool backwards,
                                  const Rows<E>& rows, int64_t of_k, const Each& each) const {
    static_assert(Gates == 1, "vectors of several gates belong together");
    multiply(lane, share, backwards, rows, of_k, nullptr, 0,
             [&](int64_t i, int64_t first, int height, const C* tile) {
               for (int r = 0; r < height; ++r, tile += W * V::size)
                 for (int v = 0; v < W; ++v) {
                   const int64_t unit = i * units_each + v * V::size;
                   if (unit >= source.units) break;
                   each(first + r, unit, source.units - unit, V::load(tile + v * V::size));
                 }
             });
  }

 private:
  template <bool values_only>
  static ProductFn<E> choose_product(int rows, int64_t panels) {
    constexpr int R = max_rows<V>(W), N = panels_of_one_row(W);
    if (panels == N) return product<E, W, 1, N, Layout::rows, values_only>;
    return select_product<E, W, values_only>(rows, std::make_integer_sequence<int, R>());
  }

  // Whether one of these panels is of duals with tangents.
  bool has_tangents(int64_t lane, int64_t first, int64_t panels) const {
    if constexpr (is_dual<E>)
      for (int64_t i = first; i < first + panels; ++i)
        if (tangents[lane * count + i]) return true;
    return false;
  }

  Value* panel(int64_t lane, int64_t i) const { return weights + (lane * count + i) * panel_size; }
  C* panel_bias(int64_t lane, int64_t i) const { return bias + (lane * count + i) * W * V::size; }

  // One row times N vectors of columns, of which `here` columns there are.
  template <int N, class S>
  HOST_DEVICE void multiply_columns(const S* from, int64_t here, const typename E::Word* row,
                                    V (&sums)[N]) const {
    for (auto& sum : sums) sum = V(0);
    const int64_t words = word_count<E>(k);
    for (int64_t begin = 0; begin < words; begin += words_in_a_row) {
      V partial[N];
#pragma GCC unroll 16
      for (auto& sum : partial) sum = V(0);
      for (int64_t i = begin; i < words && i < begin + words_in_a_row; ++i) {
        const V x = E::broadcast(row[i]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          const S* of_k[E::depth];
          for (int d = 0; d < E::depth; ++d) {
            const int64_t j = i * E::depth + d;
            of_k[d] = d == 0 || j < k ? from + j * source.k_stride + n * V::size : nullptr;
          }
          partial[n] = E::multiply_add(E::across(of_k, N > 1 ? V::size : here), x, partial[n]);
        }
      }
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[n] = sums[n] + partial[n];
    }
  }

  const PanelSource source;
  const int64_t panel_size;
  Value* weights = nullptr;  // [lane][panel][word of k][gate][unit of panel]
  C* bias = nullptr;         // [lane][panel][gate][unit of panel]
  bool* tangents = nullptr;  // [lane][panel], of duals: whether there are any
};
