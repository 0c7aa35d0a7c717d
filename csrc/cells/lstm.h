// Long short-term memory with a forget gate (Hochreiter & Schmidhuber 1997; Gers et al. 2000), gates
// in torch's order i, f, g, o:
//
//   i = sigmoid(input_gates[0] + hidden_gates[0] + w_i c_{t-1})      c_t = f c_{t-1} + i g
//   f = sigmoid(input_gates[1] + hidden_gates[1] + w_f c_{t-1})      h_t = o tanh(c_t)
//   g = tanh   (input_gates[2] + hidden_gates[2])
//   o = sigmoid(input_gates[3] + hidden_gates[3] + w_o c_t)
//
// The weights w, one per unit, are there with peepholes only (Gers & Schmidhuber 2000). If the gates
// are coupled there is no i of its own (Greff et al. 2017, CIFG): i = 1 - f, gates f, g, o, weights
// w_f, w_o.
//
// Reserve: the gates after their activations. c_t is kept by the engine; tanh(c_t) is recomputed.
#pragma once

#include "cell.h"

namespace fused_rnn {

template <bool coupled, bool peephole>
struct LstmCell {
  static constexpr int gates = coupled ? 3 : 4;
  static constexpr int saved = gates;
  static constexpr int unit_weights = peephole ? gates - 1 : 0;
  static constexpr bool has_c = true;
  static constexpr bool split_gates = false;
  static constexpr bool reads_prev_h = false;
  static constexpr bool reads_h = false;
  static constexpr bool late_gate = false;

  template <class V>
  static HOST_DEVICE void forward(const V* input_gates, const V* hidden_gates, const V* weights,
                                  const State<V>& prev, State<V>& next, V* saved) {
    V gate[gates];
    for (int k = 0; k < gates; ++k) gate[k] = input_gates[k] + hidden_gates[k];
    if constexpr (peephole)
      for (int k = 0; k <= F; ++k) gate[k] = gate[k] + weights[k] * prev.c;
    const V f = sigmoid(gate[F]);
    const V g = tanh(gate[G]);
    V i;
    if constexpr (coupled)
      i = V(1) - f;
    else
      i = sigmoid(gate[I]);
    next.c = f * prev.c + i * g;
    if constexpr (peephole) gate[O] = gate[O] + weights[G] * next.c;
    const V o = sigmoid(gate[O]);
    next.h = o * tanh(next.c);
    if constexpr (!coupled) saved[I] = i;
    saved[F] = f;
    saved[G] = g;
    saved[O] = o;
  }

  template <class V>
  static HOST_DEVICE void backward(const V* saved, const V* weights, const State<V>& prev,
                                   const State<V>& next, const State<V>& d_next, V* d_input_gates,
                                   V* d_hidden_gates, V* d_weights, State<V>& d_prev) {
    const V f = saved[F], g = saved[G], o = saved[O];
    const V tanh_c = tanh(next.c);
    V d_c = d_next.c + d_next.h * o * (V(1) - tanh_c * tanh_c);
    d_input_gates[O] = d_next.h * tanh_c * o * (V(1) - o);
    if constexpr (peephole) d_c = d_c + d_input_gates[O] * weights[G];
    if constexpr (coupled) {
      d_input_gates[F] = d_c * (prev.c - g) * f * (V(1) - f);
      d_input_gates[G] = d_c * (V(1) - f) * (V(1) - g * g);
    } else {
      const V i = saved[I];
      d_input_gates[I] = d_c * g * i * (V(1) - i);
      d_input_gates[F] = d_c * prev.c * f * (V(1) - f);
      d_input_gates[G] = d_c * i * (V(1) - g * g);
    }
    for (int k = 0; k < gates; ++k) d_hidden_gates[k] = d_input_gates[k];
    d_prev.h = V(0);
    d_prev.c = d_c * f;
    if constexpr (peephole) {
      for (int k = 0; k <= F; ++k) d_prev.c = d_prev.c + d_input_gates[k] * weights[k];
      for (int k = 0; k <= F; ++k) d_weights[k] = d_input_gates[k] * prev.c;
      d_weights[G] = d_input_gates[O] * next.c;
    }
  }

 private:
  // Places of the gates. Weights stand where their gates do, but g has none: that of o is at G.
  static constexpr int I = 0, F = coupled ? 0 : 1, G = F + 1, O = F + 2;
};

using Lstm = LstmCell<false, false>;
using LstmPeephole = LstmCell<false, true>;
using LstmCoupled = LstmCell<true, false>;
using LstmCoupledPeephole = LstmCell<true, true>;

}  // namespace fused_rnn
