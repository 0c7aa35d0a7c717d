// The recurrent product: a few rows of a state times a packed panel of weights.
//
// A panel holds W vectors of output columns for every k: panel[k][w][lane]. One call computes
//
//   tile[r][w] = bias[w] + sum_k a[r][k] * panel[k][w]        r < R, w < W
//
// with all R*W accumulators in registers; per k that is W loads, R broadcasts and R*W multiply-adds.
// The sum runs over k in order whatever R is, so a result does not depend on how rows were tiled.
// Included inside the instruction set's namespace, after simd.h.

constexpr int vector_registers = FUSED_RNN_VECTOR_BYTES == 64 ? 32 : 16;

constexpr int max_rows(int W) {
  const int rows = (vector_registers - W - 1) / W;
  return rows > 12 ? 12 : rows;
}

template <class T, int W, int R>
void product(const T* a, int64_t a_stride, int64_t k, const T* panel, const T* bias, T* tile) {
  using V = Vector<T>;
  V sum[R][W];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) sum[r][w] = bias ? V::load(bias + w * V::size) : V(0);
  for (int64_t i = 0; i < k; ++i) {
    V weights[W];
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) weights[w] = V::load(panel + w * V::size);
    panel += W * V::size;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V x(a[r * a_stride + i]);
#pragma GCC unroll 16
      for (int w = 0; w < W; ++w) sum[r][w] = sum[r][w] + weights[w] * x;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) sum[r][w].store(tile + (r * W + w) * V::size);
}

template <class T>
using ProductFn = void (*)(const T*, int64_t, int64_t, const T*, const T*, T*);

template <class T, int W, int... R>
ProductFn<T> select_product(int rows, std::integer_sequence<int, R...>) {
  static constexpr ProductFn<T> table[] = {product<T, W, R + 1>...};
  return table[rows - 1];
}

// Calls each(first_row, rows, tile) for every tile of up to max_rows(W) rows, near-equal in height.
template <class T, int W, class Each>
HOST_DEVICE void for_each_tile(const T* a, int64_t a_stride, int64_t rows, int64_t k,
                               const T* panel, const T* bias, const Each& each) {
  constexpr int R = max_rows(W);
  alignas(64) T tile[R * W * Vector<T>::size];
  const int64_t tiles = (rows + R - 1) / R;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = rows * i / tiles;
    const int height = static_cast<int>(rows * (i + 1) / tiles - first);
    select_product<T, W>(height, std::make_integer_sequence<int, R>())(
        a + first * a_stride, a_stride, k, panel, bias, tile);
    each(first, height, tile);
  }
}

// Weights as they lie in memory, per lane: element (gate, unit, k) at gate*gate_stride +
// unit*unit_stride + k*k_stride. Without weights there are no panels.
template <class S>
struct PanelSource {
  const S* weights;
  const S* bias;  // (lanes, gates, units), or null
  int64_t units, k;
  int64_t gate_stride, unit_stride, k_stride;
};

// The weights of all lanes, packed into panels of Gates * PerGate vectors and widened to T.
template <class T, class S, int Gates, int PerGate>
class Panels {
 public:
  static constexpr int W = Gates * PerGate;
  static constexpr int units_each = PerGate * Vector<T>::size;
  const int64_t count, k;

  explicit Panels(const PanelSource<S>& source)
      : count(source.weights ? (source.units + units_each - 1) / units_each : 0),
        k(source.k),
        source(source) {}

  template <class Arena>
  void take_memory(Arena& arena, int64_t lanes) {
    const int64_t columns = lanes * count * W * Vector<T>::size;
    weights = arena.template take<T>(columns * k);
    bias = source.bias ? arena.template take<T>(columns) : nullptr;
  }

  T* panel(int64_t lane, int64_t i) const {
    return weights + (lane * count + i) * k * W * Vector<T>::size;
  }
  T* panel_bias(int64_t lane, int64_t i) const {
    return bias ? bias + (lane * count + i) * W * Vector<T>::size : nullptr;
  }

  void pack(int64_t lane, int64_t i) const {
    const int64_t first = i * units_each;
    const int64_t here = source.units - first < units_each ? source.units - first : units_each;
    const S* from = source.weights + lane * Gates * source.units * k + first * source.unit_stride;
    // In blocks of k, so that a cache line of either side is used up while it is at hand.
    constexpr int64_t block = 64 / sizeof(T);
    for (int64_t begin = 0; begin < k; begin += block) {
      const int64_t end = begin + block < k ? begin + block : k;
      T* to = panel(lane, i);
      for (int g = 0; g < Gates; ++g, to += units_each)
        for (int64_t u = 0; u < units_each; ++u) {
          const S* row = from + g * source.gate_stride + u * source.unit_stride;
          for (int64_t j = begin; j < end; ++j)
            to[j * W * Vector<T>::size + u] =
                u < here ? static_cast<T>(widen(row[j * source.k_stride])) : T(0);
        }
    }
    if (!bias) return;
    for (int g = 0; g < Gates; ++g)
      for (int64_t u = 0; u < units_each; ++u)
        panel_bias(lane, i)[g * units_each + u] =
            u < here
                ? static_cast<T>(widen(source.bias[(lane * Gates + g) * source.units + first + u]))
                : T(0);
  }

 private:
  const PanelSource<S> source;
  T* weights = nullptr;  // [lane][panel][k][gate][unit of panel]
  T* bias = nullptr;     // [lane][panel][gate][unit of panel]
};
