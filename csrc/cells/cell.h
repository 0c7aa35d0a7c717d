// What a cell is.
//
// A cell is the pointwise mathematics of one timestep of one hidden unit, forward and backward. It
// knows nothing of tensors, threads or time; engines know nothing of gates. V is the value type: a
// scalar in CUDA, a SIMD vector on the CPU, double in tests.
//
//   struct MyCell {
//     static constexpr int gates;            // rows of weight_ih and weight_hh per unit
//     static constexpr int saved;            // values per unit that forward keeps in the reserve
//     static constexpr int unit_weights;     // weights per unit that the cell itself reads
//     static constexpr bool has_c;           // whether there is a cell state beside h
//     static constexpr bool split_gates;     // whether d_hidden_gates differs from d_input_gates
//     static constexpr bool reads_prev_h;    // which states backward reads besides `saved`
//     static constexpr bool reads_h;         //   (it may always read prev.c and next.c if has_c)
//     static constexpr bool late_gate;       // whether the last gate waits for the others (below)
//     template <class V> static void forward(const V* input_gates, const V* hidden_gates,
//                                            const V* weights, const State<V>& prev,
//                                            State<V>& next, V* saved);
//     template <class V> static void backward(const V* saved, const V* weights,
//                                             const State<V>& prev, const State<V>& next,
//                                             const State<V>& d_next, V* d_input_gates,
//                                             V* d_hidden_gates, V* d_weights, State<V>& d_prev);
//   };
//
// input_gates is W_ih x_t + b_ih and hidden_gates is W_hh h_{t-1} + b_hh, gate by gate. d_next is the
// whole gradient that reaches this step's states. d_prev receives what flows back to the previous
// states directly; what flows through hidden_gates is the engine's product with W_hh. d_weights is this
// step's part of the gradient of the unit's own weights.
//
// With a late gate, hidden_gates of the last gate is W_hh read + b_hh, where `read` is h_{t-1} times the
// first of the gates before it, the early ones:
//
//     template <class V> static void forward_early(const V* input_gates, const V* hidden_gates,
//                                                  V* saved);
//     template <class V> static V read(const V* saved, const State<V>& prev);
//     template <class V> static V backward_early(const V* saved, const State<V>& prev, V d_read,
//                                                State<V>& d_prev);
//
// forward_early leaves the early gates in `saved`, first; forward finds them there, and has input_gates
// and hidden_gates of the last gate alone. On the way back only the first gate waits for the gradient
// of read: backward leaves that gate out, backward_early returns its gradient and adds to d_prev what
// flows through read. So the first gate acts through read alone, and such a cell does not split its gates.
//
// A cell with c is made of two halves, forward_c and forward_h, backward_h and backward_c (lstm.h), because
// layer normalisation needs the new c of all units before any h.
#pragma once

#include "../macros.h"
#include "math.h"

namespace fused_rnn {

template <class V>
struct State {
  V h;
  V c;  // unused by cells without has_c
};

// The same cell in a layer whose options change the step around it (Variation in params.h). A type of
// its own, so that the plain cell's step is compiled without a trace of them.
template <class Cell>
struct Varied : Cell {};
template <class Cell>
constexpr bool is_varied = false;
template <class Cell>
constexpr bool is_varied<Varied<Cell>> = true;

}  // namespace fused_rnn
