// What engine_avx512.cpp has of duals, compiled beside it.
#define FUSED_RNN_DUALS
#include "engine_avx512.cpp"
