// The engine for any machine: 16-byte vectors (SSE2 on x86-64, NEON on arm64).
#include "prelude.h"

#define FUSED_RNN_ISA portable
#define FUSED_RNN_VECTOR_BYTES 16
#include "instantiate.h"
