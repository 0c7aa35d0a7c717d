// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random numbers
// that are a function of a seed and a position, so that a mask is recomputed instead of stored and does
// not depend on who computes it. Same numbers as Triton's tl.rand(seed, position).
#pragma once

#include <cstdint>

#include "macros.h"

namespace fused_rnn {

// What is drawn has a stream of its own; that of attention's dropout is 0.
enum class Stream : uint32_t { attention, zoneout_h, zoneout_c, recurrent_dropout, weight_dropout };

struct PhiloxKeys {
  uint32_t k0, k1;
  HOST_DEVICE explicit PhiloxKeys(uint64_t seed)
      : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(seed >> 32)) {}
  HOST_DEVICE void next() {
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
};
constexpr uint32_t philox_a = 0xD2511F53u, philox_b = 0xCD9E8D57u;

struct PhiloxWords {
  uint32_t word[4];
};

HOST_DEVICE PhiloxWords philox(uint64_t seed, uint64_t position, Stream stream) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = 0;
  PhiloxKeys keys(seed);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(philox_a) * c0, b = uint64_t(philox_b) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ keys.k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ keys.k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    keys.next();
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in [0, 1).
HOST_DEVICE float philox_uniform(uint64_t seed, uint64_t position) {
  const int32_t bits = static_cast<int32_t>(philox(seed, position, Stream::attention).word[0]);
  return static_cast<float>(bits < 0 ? -(bits + 1) : bits) * 4.6566127342e-10f;
}

// ---- what is chosen with a probability
//
// Rows of n numbers are made of blocks of 64: number 16 j + i of a block is word j of the block's i-th
// position. So a vector of units needs no shuffling, and no word is wasted.

constexpr int64_t chosen_block = 64;

HOST_DEVICE int64_t chosen_blocks(int64_t n) { return (n + chosen_block - 1) / chosen_block; }

// Words below it are chosen.
HOST_DEVICE uint32_t chosen_limit(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

HOST_DEVICE bool is_chosen(uint64_t seed, Stream stream, int64_t row, int64_t n, int64_t i,
                           double p) {
  const int64_t position = (row * chosen_blocks(n) + i / chosen_block) * 16 + i % 16;
  const PhiloxWords of = philox(seed, static_cast<uint64_t>(position), stream);
  // No array is indexed by a variable: a GPU would keep it in memory.
  const uint32_t first = i & 16 ? of.word[1] : of.word[0];
  const uint32_t second = i & 16 ? of.word[3] : of.word[2];
  return (i & 32 ? second : first) < chosen_limit(p);
}

}  // namespace fused_rnn
