// What a binary has of cells: the facts about each, and the engines compiled around them. The extension
// has the built-in cells; each library that fused_rnn.load_cell compiles hands its own over. No torch here.
#pragma once

#include <cstdint>

#include "cpu/engine.h"
#include "cuda/persistent.h"

namespace fused_rnn {

struct Engines {
  cpu::ForwardFn (*cpu_forward)(cpu::CellId cell, DType dtype);
  cpu::BackwardFn (*cpu_backward)(cpu::CellId cell, DType dtype);
  // Null in a build without CUDA.
  void (*cuda_forward)(cuda::CellId cell, const RecurrenceForwardParams& p,
                       const cuda::Layout& layout, const cuda::Host& host);
  void (*cuda_backward)(cuda::CellId cell, const RecurrenceBackwardParams& p,
                        const cuda::Layout& layout, const cuda::Host& host);
};

// The facts about a cell that code outside templates needs.
struct CellTraits {
  const char* name;
  int64_t gates;         // rows of weight_ih and weight_hh per hidden unit
  int64_t saved;         // values per unit and step in the reserve
  int64_t unit_weights;  // weights per unit that the cell itself reads
  bool has_c;            // whether there is a cell state beside h
  bool split_gates;      // whether the gradients of input and hidden gates differ
  bool reads_prev_h;     // whether the cell reads the h before it
  bool reads_h;          // whether backward reads the h that the cell gave
  bool late_gate;        // whether the last gate's product reads h times the first gate
  int index;             // in its library
  const Engines* engines;
};

struct Library {
  const CellTraits* cells;
  int count;
};

// The cells of this binary.
const Library& library();

}  // namespace fused_rnn
