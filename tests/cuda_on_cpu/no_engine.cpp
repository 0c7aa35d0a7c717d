// In place of the CPU engine, which the binding mentions and CUDA's ops have no use for.
#include <stdexcept>

#include "../../csrc/cpu/engine.h"

namespace fused_rnn::cpu {

const InstructionSet* instruction_sets(size_t* count) {
  *count = 0;
  return nullptr;
}

const InstructionSet& active_instruction_set() {
  throw std::runtime_error("the CPU engine is not part of this library");
}

}  // namespace fused_rnn::cpu
