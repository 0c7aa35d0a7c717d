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
//     static constexpr bool reads_prev_h;    // whether forward or backward reads prev.h, and
//     static constexpr bool reads_h;         //   backward next.h; prev.c and next.c may always be read
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
// A cell with c has its two halves as well (lstm.h), because layer normalisation needs the new c of all
// units before any h:
//
//     template <class V> static void forward_c(const V* input_gates, const V* hidden_gates,
//                                              const V* weights, const State<V>& prev, V& c,
//                                              V* saved);
//     template <class V> static V forward_h(const V* weights, V c, V inside, V* saved);
//     template <class V> static V backward_h(const V* saved, const V* weights, V c, V inside, V d_h,
//                                            V& d_c, V& d_last_gate, V* d_weights);
//     template <class V> static void backward_c(const V* saved, const V* weights,
//                                               const State<V>& prev, V d_c, V* d_gates,
//                                               V* d_weights, State<V>& d_prev);
//
// forward_h returns h, from the c that is kept and from `inside`, the c that stands inside the output's
// tanh: the same, or normalised. Of `saved` it finds the last value alone, which it may replace; the
// others are forward_c's. backward_h returns the gradient of inside, adds to d_c what flows to c
// otherwise, and makes the gradient of the last gate, an LSTM's o; backward_c, from the whole gradient of
// c, makes those of the others. d_weights is zeros before either, and both are added up. Such a cell
// neither splits its gates nor has a late one.
//
// check.h runs a cell on values that know what they were made of, and says in words where it reads or sets
// what it has no right to.
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

// Refuses constants that no engine can follow.
template <class Cell>
constexpr bool constants_fit() {
  static_assert(Cell::gates >= 1, "gates: a cell has at least one gate");
  static_assert(Cell::saved >= 0 && Cell::unit_weights >= 0,
                "saved, unit_weights: expected numbers of values, found a negative one");
  static_assert(
      !Cell::late_gate || Cell::gates >= 2,
      "late_gate: the last gate reads what the first makes of h, so there are at least two");
  static_assert(
      !Cell::late_gate || Cell::saved >= Cell::gates - 1,
      "late_gate: forward_early leaves all gates but the last in saved, which is too small");
  static_assert(!Cell::late_gate || !Cell::split_gates,
                "late_gate: a cell with a late gate does not split its gates (split_gates)");
  static_assert(!Cell::late_gate || !Cell::has_c,
                "late_gate: a cell with a late gate has no c (has_c)");
  static_assert(
      !Cell::has_c || Cell::saved >= 1,
      "has_c: forward_c leaves something for forward_h in the last of saved, which is empty");
  static_assert(!Cell::has_c || !Cell::split_gates,
                "has_c: a cell with c does not split its gates (split_gates)");
  return true;
}

}  // namespace fused_rnn
