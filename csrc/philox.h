// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random numbers
// that are a function of a seed and a position, so that a mask is recomputed instead of stored and does
// not depend on who computes it. Same numbers as Triton's tl.rand(seed, position).
#pragma once

#include <cstdint>

#include "macros.h"

namespace fused_rnn {

// Uniform in [0, 1).
HOST_DEVICE float philox_uniform(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const int32_t bits = static_cast<int32_t>(c0);
  return static_cast<float>(bits < 0 ? -(bits + 1) : bits) * 4.6566127342e-10f;
}

}  // namespace fused_rnn
