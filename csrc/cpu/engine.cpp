// Which copies of the engine this binary has, and which one this machine runs.
#include "engine.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

// A sum of 1 for portable, 2 avx2, 4 avx512 and 8 avx512_bf16, which needs avx512.
#ifndef FUSED_RNN_SETS
#ifdef __x86_64__
#define FUSED_RNN_SETS 15
#else
#define FUSED_RNN_SETS 1
#endif
#endif

namespace fused_rnn {

#define FUSED_RNN_DECLARE(isa)                                   \
  namespace isa {                                                \
  cpu::ForwardFn forward_function(cpu::CellId cell, DType d);    \
  cpu::BackwardFn backward_function(cpu::CellId cell, DType d);  \
  cpu::AttentionForwardFn attention_forward_function(DType d);   \
  cpu::AttentionBackwardFn attention_backward_function(DType d); \
  cpu::DropoutFn dropout_function(DType d);                      \
  double multiply_add_function(int64_t rounds);                  \
  }
#ifdef FUSED_RNN_CELLS_ONLY
// What has no cell is the extension's.
#define FUSED_RNN_FUNCTIONS(isa) \
  isa::forward_function, isa::backward_function, nullptr, nullptr, nullptr, nullptr
#else
#define FUSED_RNN_FUNCTIONS(isa)                                                  \
  isa::forward_function, isa::backward_function, isa::attention_forward_function, \
      isa::attention_backward_function, isa::dropout_function, isa::multiply_add_function
#endif
FUSED_RNN_DECLARE(portable)
FUSED_RNN_DECLARE(avx2)
FUSED_RNN_DECLARE(avx512)
FUSED_RNN_DECLARE(avx512_bf16)

namespace cpu {
namespace {

#if FUSED_RNN_SETS & 12
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const InstructionSet sets[] = {
#if FUSED_RNN_SETS & 8
    {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); },
     FUSED_RNN_FUNCTIONS(avx512_bf16)},
#endif
#if FUSED_RNN_SETS & 4
    {"avx512", has_avx512, FUSED_RNN_FUNCTIONS(avx512)},
#endif
#if FUSED_RNN_SETS & 2
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     },
     FUSED_RNN_FUNCTIONS(avx2)},
#endif
#if FUSED_RNN_SETS & 1
    {"portable", [] { return true; }, FUSED_RNN_FUNCTIONS(portable)},
#endif
};

const InstructionSet& choose() {
  const char* wanted = std::getenv("FUSED_RNN_CPU_ISA");
  for (const InstructionSet& set : sets) {
    if (wanted && *wanted && std::strcmp(wanted, set.name) != 0) continue;
    if (set.supported()) return set;
    if (wanted && *wanted)
      throw std::runtime_error(std::string("FUSED_RNN_CPU_ISA=") + wanted +
                               ": this machine does not support it");
  }
  throw std::runtime_error(
      std::string("FUSED_RNN_CPU_ISA=") + wanted +
      ": no such instruction set; expected avx512_bf16, avx512, avx2 or portable");
}

}  // namespace

const InstructionSet* instruction_sets(size_t* count) {
  *count = sizeof(sets) / sizeof(sets[0]);
  return sets;
}

const InstructionSet& active_instruction_set() {
  static const InstructionSet& set = choose();
  return set;
}

}  // namespace cpu
}  // namespace fused_rnn
