// What engine_portable.cpp has of duals, compiled beside it.
#define FUSED_RNN_DUALS
#include "engine_portable.cpp"
