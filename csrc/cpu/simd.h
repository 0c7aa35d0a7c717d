// Vec<T, N>: N lanes of float or double on the compiler's vector extensions, with the functions that
// cells need. Included once per instruction set, inside that set's namespace and target pragma (see
// engine_*.cpp), so the same text becomes SSE2/NEON, AVX2 or AVX-512.
//
// No include guard on purpose. Needs FUSED_RNN_VECTOR_BYTES, and FUSED_RNN_F16C where the set has the
// half-precision conversions.

// The compiler's vector types; its attribute wants a named element type, not a template's.
template <class T, int N>
struct NativeOf;
template <int N>
struct NativeOf<float, N> {
  using Integer = int32_t;
  typedef float Native __attribute__((vector_size(4 * N)));
  typedef int32_t Mask __attribute__((vector_size(4 * N)));
};
template <int N>
struct NativeOf<double, N> {
  using Integer = int64_t;
  typedef double Native __attribute__((vector_size(8 * N)));
  typedef int64_t Mask __attribute__((vector_size(8 * N)));
};

template <int N>
struct Bits {
  typedef uint16_t Short __attribute__((vector_size(2 * N)));
  typedef uint32_t Word __attribute__((vector_size(4 * N)));
};

template <class T, int N>
struct Vec {
  using Scalar = T;
  using Part = Vec;
  using Integer = typename NativeOf<T, N>::Integer;
  using Native = typename NativeOf<T, N>::Native;
  using Mask = typename NativeOf<T, N>::Mask;
  static constexpr int size = N;

  Native v;

  HOST_DEVICE Vec() {}
  HOST_DEVICE explicit Vec(Native native) : v(native) {}
  template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
  HOST_DEVICE explicit Vec(Number x) : v(static_cast<T>(x) - Native{}) {}

  friend HOST_DEVICE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend HOST_DEVICE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend HOST_DEVICE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend HOST_DEVICE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend HOST_DEVICE Vec operator-(Vec a) { return Vec(-a.v); }
  friend HOST_DEVICE Mask operator<(Vec a, Vec b) { return a.v < b.v; }
  friend HOST_DEVICE Mask operator>(Vec a, Vec b) { return a.v > b.v; }
  friend HOST_DEVICE Mask operator<=(Vec a, Vec b) { return a.v <= b.v; }
  friend HOST_DEVICE Mask operator>=(Vec a, Vec b) { return a.v >= b.v; }
  friend HOST_DEVICE Mask operator==(Vec a, Vec b) { return a.v == b.v; }
  friend HOST_DEVICE Mask operator!=(Vec a, Vec b) { return a.v != b.v; }
  friend HOST_DEVICE Vec where(Mask condition, Vec a, Vec b) { return Vec(condition ? a.v : b.v); }

  // The larger and the smaller of two; b where either is NaN.
  friend HOST_DEVICE Vec larger(Vec a, Vec b) {
#if FUSED_RNN_VECTOR_BYTES == 64  // where compilers go through mask registers
    if constexpr (sizeof(T) == 4) return Vec(Native(_mm512_max_ps(a.v, b.v)));
    if constexpr (sizeof(T) == 8) return Vec(Native(_mm512_max_pd(a.v, b.v)));
#endif
    return where(b < a, a, b);
  }
  friend HOST_DEVICE Vec smaller(Vec a, Vec b) {
#if FUSED_RNN_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) return Vec(Native(_mm512_min_ps(a.v, b.v)));
    if constexpr (sizeof(T) == 8) return Vec(Native(_mm512_min_pd(a.v, b.v)));
#endif
    return where(a < b, a, b);
  }

  static HOST_DEVICE Vec load(const T* from) {
    Vec x;
    memcpy(&x.v, from, sizeof(Native));
    return x;
  }
  HOST_DEVICE void store(T* to) const { memcpy(to, &v, sizeof(Native)); }
};

// ---- transposition
//
// Of N vectors of N lanes, in log2(N) stages: stage s exchanges the lanes and the vectors whose numbers
// differ in bit s.

template <class T, int N, int S, int... I>
HOST_DEVICE void exchange(Vec<T, N>& low, Vec<T, N>& high, std::integer_sequence<int, I...>) {
  const auto a = low.v, b = high.v;
#if defined(__clang__)
  low.v = __builtin_shufflevector(a, b, (I & S ? N + I - S : I)...);
  high.v = __builtin_shufflevector(a, b, (I & S ? N + I : I + S)...);
#else
  using Mask = typename Vec<T, N>::Mask;
  low.v = __builtin_shuffle(a, b, Mask{(I & S ? N + I - S : I)...});
  high.v = __builtin_shuffle(a, b, Mask{(I & S ? N + I : I + S)...});
#endif
}

template <class T, int N, int S = N / 2>
HOST_DEVICE void transpose(Vec<T, N> (&rows)[N]) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & S)) exchange<T, N, S>(rows[i], rows[i + S], std::make_integer_sequence<int, N>());
    transpose<T, N, S / 2>(rows);
  }
}

// ---- exp, sigmoid, tanh, log and sqrt ------------------------------------------------------------
//
// All of them from e^x = 2^k (1 + expm1(r)) with k = round(x / ln 2), r = x - k ln 2 in two pieces, and
// a Taylor polynomial for expm1 that is carried past the last bit for |r| <= ln(2)/2.
//
//   sigmoid(x) = 1 / (1 + e^-x)
//   tanh(x)    = m / (m + 2), m = e^2x - 1 = 2^k expm1(r) + (2^k - 1), which does not cancel
//
// And log(2^k (1 + f)) = k ln 2 + 2 artanh(s), s = f / (2 + f), where 1 + f is within a factor of sqrt(2)
// of 1; 2 artanh(s) = f - s (f - s^2 (2/3 + 2/5 s^2 + ...)), so that f itself is not rounded again.

template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float lowest = -103.0f, highest = 88.8f;
  static constexpr float expm1[] = {1 / 5040.0f, 1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f};
  static constexpr float artanh[] = {2 / 9.0f, 2 / 7.0f, 2 / 5.0f, 2 / 3.0f};
  static constexpr int32_t root_of_half = 0x3f3504f3;  // its bits
  static constexpr float least_normal = 0x1p-126f;
  static constexpr float one_over_e = 87.3f;  // e^-x is normal up to here; 2^128 is infinity
  static constexpr float tanh_is_one = 9.1f;
  static constexpr int mantissa_bits = 23, bias = 127;
};

template <>
struct Constants<double> {
  static constexpr double ln2_high = 6.93147180369123816490e-1,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -745.0, highest = 709.9;
  static constexpr double expm1[] = {1 / 87178291200.0,
                                     1 / 6227020800.0,
                                     1 / 479001600.0,
                                     1 / 39916800.0,
                                     1 / 3628800.0,
                                     1 / 362880.0,
                                     1 / 40320.0,
                                     1 / 5040.0,
                                     1 / 720.0,
                                     1 / 120.0,
                                     1 / 24.0,
                                     1 / 6.0,
                                     0.5};
  static constexpr double artanh[] = {2 / 19.0, 2 / 17.0, 2 / 15.0, 2 / 13.0, 2 / 11.0,
                                      2 / 9.0,  2 / 7.0,  2 / 5.0,  2 / 3.0};
  static constexpr int64_t root_of_half = 0x3fe6a09e667f3bcd;
  static constexpr double least_normal = 0x1p-1022;
  static constexpr double one_over_e = 708.3;
  static constexpr double tanh_is_one = 19.1;
  static constexpr int mantissa_bits = 52, bias = 1023;
};

// By pairs of coefficients, which need not wait for each other; square is x^2.
template <class V, class T, size_t N>
HOST_DEVICE V polynomial(const T (&coefficients)[N], V x, V square) {
  V sum = N % 2 ? V(coefficients[0]) : x * V(coefficients[0]) + V(coefficients[1]);
#pragma GCC unroll 16
  for (size_t i = 2 - N % 2; i < N; i += 2)
    sum = sum * square + (x * V(coefficients[i]) + V(coefficients[i + 1]));
  return sum;
}

// 2^k for integral k within the normal exponents.
template <class T, int N>
HOST_DEVICE Vec<T, N> power_of_two(typename Vec<T, N>::Mask k) {
  using K = Constants<T>;
  using Integer = typename Vec<T, N>::Integer;
  const typename Vec<T, N>::Mask bits = (k + Integer(K::bias)) << Integer(K::mantissa_bits);
  Vec<T, N> result;
  memcpy(&result.v, &bits, sizeof(bits));
  return result;
}

// e^x in its pieces.
template <class T, int N>
struct Exponential {
  using V = Vec<T, N>;
  typename V::Mask k;
  V expm1;  // of what 2^k leaves

  // x within the range of normal powers.
  HOST_DEVICE explicit Exponential(V x) {
    using K = Constants<T>;
    const V whole = (x * V(T(1.4426950408889634074)) + V(K::round)) - V(K::round);
    const V r = (x - whole * V(K::ln2_high)) - whole * V(K::ln2_low);
    k = __builtin_convertvector(whole.v, typename V::Mask);
    const V square = r * r;
    expm1 = polynomial(K::expm1, r, square) * square + r;
  }
};

// x, but no less than `low` and no more than `high`; NaN passes through.
template <class T, int N>
HOST_DEVICE Vec<T, N> clamp(Vec<T, N> x, T low, T high) {
  using V = Vec<T, N>;
  return smaller(V(high), larger(V(low), x));
}

template <class T, int N>
HOST_DEVICE Vec<T, N> exp(Vec<T, N> x) {
  using V = Vec<T, N>;
  const Exponential<T, N> e(clamp(x, Constants<T>::lowest, Constants<T>::highest));
  // In two factors, because 2^k alone may be subnormal or infinite where the product is not.
  const typename V::Mask half = e.k >> typename V::Integer(1);
  return (V(1) + e.expm1) * power_of_two<T, N>(half) * power_of_two<T, N>(e.k - half);
}

template <class T, int N>
HOST_DEVICE Vec<T, N> sigmoid(Vec<T, N> x) {
  using V = Vec<T, N>;
  const Exponential<T, N> e(clamp(-x, -Constants<T>::one_over_e, Constants<T>::highest));
  const V power = power_of_two<T, N>(e.k);
  return V(1) / (V(1) + power * (V(1) + e.expm1));
}

template <class T, int N>
HOST_DEVICE Vec<T, N> tanh(Vec<T, N> x) {
  using V = Vec<T, N>;
  constexpr T limit = Constants<T>::tanh_is_one;
  const V within = clamp(x, -limit, limit);
  const Exponential<T, N> e(within + within);
  const V power = power_of_two<T, N>(e.k);
  const V m = power * e.expm1 + (power - V(1));
  return m / (m + V(2));
}

template <class T, int N>
HOST_DEVICE Vec<T, N> log(Vec<T, N> x) {
  using V = Vec<T, N>;
  using K = Constants<T>;
  using Integer = typename V::Integer;
  const V infinity(__builtin_inf()), nan(__builtin_nan(""));
  const auto subnormal = x < V(K::least_normal);
  const V normal = where(subnormal, x * V(static_cast<T>(Integer(1) << K::mantissa_bits)), x);
  typename V::Mask bits;
  memcpy(&bits, &normal.v, sizeof(bits));
  const typename V::Mask k = (bits - Integer(K::root_of_half)) >> Integer(K::mantissa_bits);
  bits -= k << Integer(K::mantissa_bits);
  V m;
  memcpy(&m.v, &bits, sizeof(bits));
  const V whole = V(__builtin_convertvector(k, typename V::Native)) -
                  where(subnormal, V(K::mantissa_bits), V(0));
  const V f = m - V(1), s = f / (V(2) + f), square = s * s;
  const V rest = polynomial(K::artanh, square, square * square) * square;
  const V y = whole * V(K::ln2_high) - ((s * (f - rest) - whole * V(K::ln2_low)) - f);
  return where(x > V(0), where(x < infinity, y, infinity), where(x == V(0), -infinity, nan));
}

template <class T, int N>
HOST_DEVICE Vec<T, N> sqrt(Vec<T, N> x) {
  using V = Vec<T, N>;
  using Native = typename V::Native;
#if FUSED_RNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return V(Native(_mm512_sqrt_ps(x.v)));
  if constexpr (sizeof(T) == 8) return V(Native(_mm512_sqrt_pd(x.v)));
#elif FUSED_RNN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return V(Native(_mm256_sqrt_ps(x.v)));
  if constexpr (sizeof(T) == 8) return V(Native(_mm256_sqrt_pd(x.v)));
#else
  Native roots;
  for (int i = 0; i < N; ++i) roots[i] = ::sqrt(x.v[i]);
  return V(roots);
#endif
}

// ---- conversions between storage and compute types -------------------------------------------------

template <int N>
HOST_DEVICE Vec<float, N> widen_vector(const BFloat16* from) {
  using Word = typename Bits<N>::Word;
  typename Bits<N>::Short bits;
  memcpy(&bits, from, sizeof(bits));
  const Word words = __builtin_convertvector(bits, Word) << 16;
  Vec<float, N> result;
  memcpy(&result.v, &words, sizeof(words));
  return result;
}

template <int N>
HOST_DEVICE void narrow_vector(Vec<float, N> x, BFloat16* to) {
  using Short = typename Bits<N>::Short;
  using Word = typename Bits<N>::Word;
  Word words;
  memcpy(&words, &x.v, sizeof(words));
  const Word rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  const Word quiet = (words >> 16) | 0x40u;
  const auto is_nan = x.v != x.v;
  const Short bits = __builtin_convertvector(is_nan ? quiet : rounded, Short);
  memcpy(to, &bits, sizeof(bits));
}

template <int N>
HOST_DEVICE Vec<float, N> widen_vector(const Half* from) {
  Vec<float, N> result;
#if defined(FUSED_RNN_F16C) && FUSED_RNN_VECTOR_BYTES == 64
  result.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(FUSED_RNN_F16C)
  result.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  for (int i = 0; i < N; ++i) result.v[i] = widen(from[i]);
#endif
  return result;
}

template <int N>
HOST_DEVICE void narrow_vector(Vec<float, N> x, Half* to) {
#if defined(FUSED_RNN_F16C) && FUSED_RNN_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x.v, 0));
#elif defined(FUSED_RNN_F16C)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x.v, 0));
#else
  for (int i = 0; i < N; ++i) to[i] = Narrow<Half>::from(x.v[i]);
#endif
}

template <int N>
HOST_DEVICE Vec<float, N> widen_vector(const float* from) {
  return Vec<float, N>::load(from);
}
template <int N>
HOST_DEVICE Vec<double, N> widen_vector(const double* from) {
  return Vec<double, N>::load(from);
}
template <class T, int N>
HOST_DEVICE void narrow_vector(Vec<T, N> x, T* to) {
  x.store(to);
}

// ---- duals

// Numbers I of the lanes of a and b together.
template <class T, int N, int... I>
HOST_DEVICE Vec<T, N> pick(Vec<T, N> a, Vec<T, N> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return Vec<T, N>(__builtin_shufflevector(a.v, b.v, I...));
#else
  return Vec<T, N>(__builtin_shuffle(a.v, b.v, typename Vec<T, N>::Mask{I...}));
#endif
}

template <class Sequence, int first>
struct Apart;
template <int first, int... I>
struct Apart<std::integer_sequence<int, I...>, first> {
  using Every2nd = std::integer_sequence<int, first + 2 * I...>;
  // Of two vectors by turns, from lane `first` of each.
  using ByTurns = std::integer_sequence<int, first + I / 2 + I % 2 * int(sizeof...(I))...>;
};

// Values apart from tangents; in memory they lie by turns.
template <class T, int N>
struct Vec<Dual<T>, N> : DualNumber<Vec<Dual<T>, N>, Vec<T, N>> {
  using Scalar = Dual<T>;
  using Part = Vec<T, N>;
  using Base = DualNumber<Vec<Dual<T>, N>, Part>;
  static constexpr int size = N;

  HOST_DEVICE Vec() {}
  HOST_DEVICE Vec(Part value, Part tangent) : Base(value, tangent) {}
  HOST_DEVICE explicit Vec(Part value) : Base(value, Part(0)) {}
  HOST_DEVICE explicit Vec(Dual<T> x) : Base(Part(x.value), Part(x.tangent)) {}
  template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
  HOST_DEVICE explicit Vec(Number x) : Base(Part(x), Part(0)) {}

  static HOST_DEVICE Vec load(const Dual<T>* from) {
    using Lanes = std::make_integer_sequence<int, N>;
    const T* numbers = &from->value;
    const Part low = Part::load(numbers), high = Part::load(numbers + N);
    return {pick(low, high, typename Apart<Lanes, 0>::Every2nd()),
            pick(low, high, typename Apart<Lanes, 1>::Every2nd())};
  }
  HOST_DEVICE void store(Dual<T>* to) const {
    using Lanes = std::make_integer_sequence<int, N>;
    T* numbers = &to->value;
    pick(this->value, this->tangent, typename Apart<Lanes, 0>::ByTurns()).store(numbers);
    pick(this->value, this->tangent, typename Apart<Lanes, N / 2>::ByTurns()).store(numbers + N);
  }
};

template <class T, int N>
HOST_DEVICE void transpose(Vec<Dual<T>, N> (&rows)[N]) {
  Vec<T, N> values[N], tangents[N];
  for (int i = 0; i < N; ++i) {
    values[i] = rows[i].value;
    tangents[i] = rows[i].tangent;
  }
  transpose(values);
  transpose(tangents);
  for (int i = 0; i < N; ++i) rows[i] = {values[i], tangents[i]};
}

template <int N, class T>
HOST_DEVICE Vec<Dual<T>, N> widen_vector(const Dual<T>* from) {
  return Vec<Dual<T>, N>::load(from);
}

template <class T>
struct Lanes {
  static constexpr int count = FUSED_RNN_VECTOR_BYTES / static_cast<int>(sizeof(T));
};
template <class T>
struct Lanes<Dual<T>> : Lanes<T> {};
template <class T>
using Vector = Vec<T, Lanes<T>::count>;

}  // namespace FUSED_RNN_ISA

template <class T, int N>
struct Memory<FUSED_RNN_ISA::Vec<T, N>> {
  using V = FUSED_RNN_ISA::Vec<T, N>;

  // Zeros beyond count, which may be negative.
  template <class S>
  static HOST_DEVICE V load(const S* from, int64_t count) {
    if (count >= N) return FUSED_RNN_ISA::widen_vector<N>(from);
    S padded[N] = {};
    if (count > 0) memcpy(padded, from, count * sizeof(S));
    return FUSED_RNN_ISA::widen_vector<N>(padded);
  }

  template <class S>
  static HOST_DEVICE void store(V value, S* to, int64_t count) {
    if (count >= N) return FUSED_RNN_ISA::narrow_vector(value, to);
    S padded[N];
    FUSED_RNN_ISA::narrow_vector(value, padded);
    memcpy(to, padded, count * sizeof(S));
  }
};

namespace FUSED_RNN_ISA {
