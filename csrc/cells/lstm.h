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
// Reserve: the gates after their activations, o last. c_t is kept by the engine; tanh(c_t) is recomputed.
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
    forward_c(input_gates, hidden_gates, weights, prev, next.c, saved);
    next.h = forward_h(weights, next.c, next.c, saved);
  }

  template <class V>
  static HOST_DEVICE void backward(const V* saved, const V* weights, const State<V>& prev,
                                   const State<V>& next, const State<V>& d_next, V* d_input_gates,
                                   V* d_hidden_gates, V* d_weights, State<V>& d_prev) {
    V d_c = d_next.c;
    const V d_inside =
        backward_h(saved, weights, next.c, next.c, d_next.h, d_c, d_input_gates[O], d_weights);
    backward_c(saved, weights, prev, d_c + d_inside, d_input_gates, d_weights, d_prev);
    for (int k = 0; k < gates; ++k) d_hidden_gates[k] = d_input_gates[k];
  }

  // ---- the halves of both: before and after c, which a normalisation may come between

  // Saves all gates, o before its activation.
  template <class V>
  static HOST_DEVICE void forward_c(const V* input_gates, const V* hidden_gates, const V* weights,
                                    const State<V>& prev, V& c, V* saved) {
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
    c = f * prev.c + i * g;
    if constexpr (!coupled) saved[I] = i;
    saved[F] = f;
    saved[G] = g;
    saved[O] = gate[O];
  }

  // h from the c that is kept and what stands inside the tanh.
  template <class V>
  static HOST_DEVICE V forward_h(const V* weights, V c, V inside, V* saved) {
    if constexpr (peephole) saved[O] = saved[O] + weights[G] * c;
    saved[O] = sigmoid(saved[O]);
    return saved[O] * tanh(inside);
  }

  // The gradient of what stands inside the tanh; adds to d_c what o sees of c.
  template <class V>
  static HOST_DEVICE V backward_h(const V* saved, const V* weights, V c, V inside, V d_h, V& d_c,
                                  V& d_gate_o, V* d_weights) {
    const V o = saved[O];
    const V tanh_c = tanh(inside);
    d_gate_o = d_h * tanh_c * o * (V(1) - o);
    if constexpr (peephole) {
      d_c = d_c + d_gate_o * weights[G];
      d_weights[G] = d_gate_o * c;
    }
    return d_h * o * (V(1) - tanh_c * tanh_c);
  }

  // From the whole gradient of c, those of all gates but o.
  template <class V>
  static HOST_DEVICE void backward_c(const V* saved, const V* weights, const State<V>& prev, V d_c,
                                     V* d_gates, V* d_weights, State<V>& d_prev) {
    const V f = saved[F], g = saved[G];
    if constexpr (coupled) {
      d_gates[F] = d_c * (prev.c - g) * f * (V(1) - f);
      d_gates[G] = d_c * (V(1) - f) * (V(1) - g * g);
    } else {
      const V i = saved[I];
      d_gates[I] = d_c * g * i * (V(1) - i);
      d_gates[F] = d_c * prev.c * f * (V(1) - f);
      d_gates[G] = d_c * i * (V(1) - g * g);
    }
    d_prev.h = V(0);
    d_prev.c = d_c * f;
    if constexpr (peephole) {
      for (int k = 0; k <= F; ++k) d_prev.c = d_prev.c + d_gates[k] * weights[k];
      for (int k = 0; k <= F; ++k) d_weights[k] = d_gates[k] * prev.c;
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
