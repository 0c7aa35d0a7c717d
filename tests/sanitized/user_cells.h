// The cells of engine.cpp, for csrc/cells/cells.h: one of every shape that the engine tells apart.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"

#define FUSED_RNN_FOR_EACH_CELL(X) \
  X(lstm_peephole, LstmPeephole)   \
  X(gru, Gru)                      \
  X(gru_reset_before, GruResetBefore)
