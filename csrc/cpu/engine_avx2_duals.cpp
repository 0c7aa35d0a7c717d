// What engine_avx2.cpp has of duals, compiled beside it.
#define FUSED_RNN_DUALS
#include "engine_avx2.cpp"
