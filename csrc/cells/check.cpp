// Holds all cells of cells.h against their contract: load_cell a user's own, test_cells.py ours.
#include "cells.h"
#include "check.h"

int main() {
  int faults = 0;
#define FUSED_RNN_RUN(name, cell) faults += fused_rnn::check::Check<fused_rnn::cell>::run(#name);
  FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_RUN)
  return faults > 0;
}
