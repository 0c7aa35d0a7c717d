// What the arithmetic units can do: multiply-adds on registers and nothing else. The benchmark holds the
// engine's speed against it. Included inside the instruction set's namespace.

// Runs for `rounds` and returns how many floating-point operations that were.
inline double multiply_adds(int64_t rounds) {
  using V = Vector<float>;
  constexpr int chains = vector_registers - 4;
  V sums[chains];
#pragma GCC unroll 32
  for (int i = 0; i < chains; ++i) sums[i] = V(static_cast<float>(i));  // or all chains are one
  const V factor(0.9f), term(0.1f);
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 32
    for (auto& sum : sums) sum = sum * factor + term;
  float bits[V::size];
  V total(0);
  for (const auto& sum : sums) total = total + sum;
  total.store(bits);
  volatile float used = bits[0];  // or the compiler leaves all of it out
  (void)used;
  return 2.0 * chains * V::size * static_cast<double>(rounds);
}
