// The engine for x86-64 with AVX2, FMA and F16C.
#include "prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FUSED_RNN_ISA avx2
#define FUSED_RNN_VECTOR_BYTES 32
#define FUSED_RNN_F16C
#include "instantiate.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
