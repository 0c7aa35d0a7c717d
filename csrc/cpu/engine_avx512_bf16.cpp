// The engine for x86-64 with AVX-512 F, BW, DQ and VL that multiplies pairs of bfloat16 (BF16).
#include "prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#define FUSED_RNN_ISA avx512_bf16
#define FUSED_RNN_ELSE avx512
#define FUSED_RNN_BFLOAT16
#define FUSED_RNN_VECTOR_BYTES 64
#define FUSED_RNN_F16C
#include "instantiate.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
