// Vectors of Philox (philox.h): what is chosen, a block of 64 at a time.
// Included inside the instruction set's namespace, after simd.h.

constexpr int philox_lanes = FUSED_RNN_VECTOR_BYTES / 4;

using PhiloxVector = Bits<philox_lanes>::Word;
typedef uint64_t WideVector __attribute__((vector_size(FUSED_RNN_VECTOR_BYTES)));

// 64-bit products of the even lanes with m.
HOST_DEVICE PhiloxVector multiply_even(PhiloxVector x, uint32_t m) {
#if FUSED_RNN_VECTOR_BYTES == 64
  return (PhiloxVector)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m));
#elif FUSED_RNN_VECTOR_BYTES == 32
  return (PhiloxVector)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
#else
  return (PhiloxVector)(((WideVector)x & 0xFFFFFFFFu) * uint64_t(m));
#endif
}

// In turn the lanes 2i + Odd of a and of b.
template <int Odd, int... I>
HOST_DEVICE PhiloxVector pick(PhiloxVector a, PhiloxVector b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I / 2 * 2 + Odd + (I & 1) * philox_lanes)...);
#else
  return __builtin_shuffle(a, b, PhiloxVector{(I / 2 * 2 + Odd + (I & 1) * philox_lanes)...});
#endif
}

template <int... I>
HOST_DEVICE PhiloxVector lane_numbers(std::integer_sequence<int, I...>) {
  return PhiloxVector{I...};
}

HOST_DEVICE void multiply_wide(PhiloxVector x, uint32_t m, PhiloxVector& high, PhiloxVector& low) {
  constexpr auto lanes = std::make_integer_sequence<int, philox_lanes>();
  const PhiloxVector even = multiply_even(x, m);
  const PhiloxVector odd = multiply_even(pick<1>(x, x, lanes), m);
  high = pick<1>(even, odd, lanes);
  low = pick<0>(even, odd, lanes);
}

// Whether each number of a block is chosen, 0 or 1.
HOST_DEVICE void choose_block(uint64_t seed, Stream stream, int64_t block, uint32_t limit,
                              uint8_t* chosen) {
  typedef uint8_t Bytes __attribute__((vector_size(philox_lanes)));
  for (int first = 0; first < 16; first += philox_lanes) {
    const uint64_t position = static_cast<uint64_t>(block) * 16 + first;
    PhiloxVector c0 = lane_numbers(std::make_integer_sequence<int, philox_lanes>()) +
                      static_cast<uint32_t>(position);
    PhiloxVector c1 = PhiloxVector{} + static_cast<uint32_t>(position >> 32);
    PhiloxVector c2 = PhiloxVector{} + static_cast<uint32_t>(stream), c3{};
    PhiloxKeys keys(seed);
    for (int round = 0; round < 10; ++round) {
      PhiloxVector a_high, a_low, b_high, b_low;
      multiply_wide(c0, philox_a, a_high, a_low);
      multiply_wide(c2, philox_b, b_high, b_low);
      c0 = b_high ^ c1 ^ keys.k0;
      c2 = a_high ^ c3 ^ keys.k1;
      c1 = b_low;
      c3 = a_low;
      keys.next();
    }
    const PhiloxVector words[] = {c0, c1, c2, c3};
    for (int j = 0; j < 4; ++j) {
      const Bytes is = __builtin_convertvector((words[j] < limit) & 1, Bytes);
      memcpy(chosen + 16 * j + first, &is, sizeof(is));
    }
  }
}

// 0 or 1 for the lanes of a vector.
template <class V>
HOST_DEVICE V chosen_vector(const uint8_t* chosen) {
  typedef uint8_t Bytes __attribute__((vector_size(V::size)));
  Bytes is;
  memcpy(&is, chosen, sizeof(is));
  using Part = typename V::Part;
  return V(Part(__builtin_convertvector(is, typename Part::Native)));
}

// The factors of a dropout for a row of n, 0 where chosen, else 1 / (1 - p): each(first number, numbers
// that are left, vector).
template <class C, class Each>
HOST_DEVICE void dropout_factors(uint64_t seed, Stream stream, int64_t row, int64_t n, double p,
                                 const Each& each) {
  using V = Vector<C>;
  const V scale(static_cast<C>(1 / (1 - p)));
  for (int64_t block = 0; block < chosen_blocks(n); ++block) {
    alignas(64) uint8_t chosen[chosen_block];
    choose_block(seed, stream, row * chosen_blocks(n) + block, chosen_limit(p), chosen);
    for (int64_t i = 0; i < chosen_block && block * chosen_block + i < n; i += V::size) {
      const int64_t at = block * chosen_block + i;
      each(at, n - at, (V(1) - chosen_vector<V>(chosen + i)) * scale);
    }
  }
}
