// The CPU engine's face to the binding. No torch here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace fused_rnn::cpu {

// What the engine asks of its host.
struct Host {
  int threads;  // at most this many run at once
  // Calls task(begin, end, context) over 0..count, in parallel where it can.
  void (*parallel_for)(int64_t count, void (*task)(int64_t, int64_t, void*), void* context);
  // Scratch memory, 64-byte aligned, alive until the op returns.
  void* (*allocate)(void* allocator, size_t bytes);
  void* allocator;
};

using ForwardFn = void (*)(const LayerForwardParams&, const Host&);
using BackwardFn = void (*)(const LayerBackwardParams&, const Host&);
using AttentionForwardFn = void (*)(const AttentionForwardParams&, const Host&);
using AttentionBackwardFn = void (*)(const AttentionBackwardParams&, const Host&);
using DropoutFn = void (*)(const DropoutParams&, const Host&);

// A cell of cells.h, and whether options change the step around it.
struct CellId {
  int index;
  bool varied;
};

// One compiled copy of the engine.
struct InstructionSet {
  const char* name;
  bool (*supported)();
  ForwardFn (*forward)(CellId cell, DType dtype);
  BackwardFn (*backward)(CellId cell, DType dtype);
  AttentionForwardFn (*attention_forward)(DType dtype);
  AttentionBackwardFn (*attention_backward)(DType dtype);
  DropoutFn (*dropout)(DType dtype);
  double (*multiply_adds)(int64_t rounds);  // float32 operations done on this thread (peak.h)
};

// All copies in this binary, best first; the last runs anywhere.
const InstructionSet* instruction_sets(size_t* count);

// The copy in use: the best this machine supports, or the one named by FUSED_RNN_CPU_ISA.
const InstructionSet& active_instruction_set();

}  // namespace fused_rnn::cpu
