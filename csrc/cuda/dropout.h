// Dropout of weights (DropoutParams), its face to the binding. No torch here.
#pragma once

#include "../params.h"

namespace fused_rnn::cuda {

void run_dropout(const DropoutParams& p, void* stream);

}  // namespace fused_rnn::cuda
