// The register of cells: to add one, include its header and give it a line. Every engine and every op
// is made from this list. fused_rnn.load_cell compiles the same sources with a list of its own.
#pragma once

#ifdef FUSED_RNN_USER_CELLS
#include "user_cells.h"
#else
#include "gru.h"
#include "lstm.h"
#include "rnn.h"

// X(name in op names and Python, cell type)
#define FUSED_RNN_FOR_EACH_CELL(X)              \
  X(rnn_tanh, RnnTanh)                          \
  X(rnn_relu, RnnRelu)                          \
  X(lstm, Lstm)                                 \
  X(lstm_peephole, LstmPeephole)                \
  X(lstm_coupled, LstmCoupled)                  \
  X(lstm_coupled_peephole, LstmCoupledPeephole) \
  X(gru, Gru)                                   \
  X(gru_reset_before, GruResetBefore)
#endif

namespace fused_rnn {
#define FUSED_RNN_CHECK(name, cell) static_assert(constants_fit<cell>());
FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_CHECK)
#undef FUSED_RNN_CHECK
}  // namespace fused_rnn
