// Long short-term memory with a forget gate (Hochreiter & Schmidhuber 1997; Gers et al. 2000), gates
// in torch's order i, f, g, o:
//
//   i = sigmoid(input_gates[0] + hidden_gates[0])      c_t = f c_{t-1} + i g
//   f = sigmoid(input_gates[1] + hidden_gates[1])      h_t = o tanh(c_t)
//   g = tanh   (input_gates[2] + hidden_gates[2])
//   o = sigmoid(input_gates[3] + hidden_gates[3])
//
// Reserve: i, f, g, o after their activations. c_t is kept by the engine; tanh(c_t) is recomputed.
#pragma once

#include "cell.h"

namespace fused_rnn {

struct Lstm {
  static constexpr int gates = 4;
  static constexpr int saved = 4;
  static constexpr bool has_c = true;
  static constexpr bool split_gates = false;
  static constexpr bool reads_prev_h = false;
  static constexpr bool reads_h = false;

  template <class V>
  static HOST_DEVICE void forward(const V* input_gates, const V* hidden_gates, const State<V>& prev,
                                  State<V>& next, V* saved) {
    const V i = sigmoid(input_gates[0] + hidden_gates[0]);
    const V f = sigmoid(input_gates[1] + hidden_gates[1]);
    const V g = tanh(input_gates[2] + hidden_gates[2]);
    const V o = sigmoid(input_gates[3] + hidden_gates[3]);
    next.c = f * prev.c + i * g;
    next.h = o * tanh(next.c);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  template <class V>
  static HOST_DEVICE void backward(const V* saved, const State<V>& prev, const State<V>& next,
                                   const State<V>& d_next, V* d_input_gates, V* d_hidden_gates,
                                   State<V>& d_prev) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(next.c);
    const V d_c = d_next.c + d_next.h * o * (V(1) - tanh_c * tanh_c);
    d_input_gates[0] = d_c * g * i * (V(1) - i);
    d_input_gates[1] = d_c * prev.c * f * (V(1) - f);
    d_input_gates[2] = d_c * i * (V(1) - g * g);
    d_input_gates[3] = d_next.h * tanh_c * o * (V(1) - o);
    for (int gate = 0; gate < gates; ++gate) d_hidden_gates[gate] = d_input_gates[gate];
    d_prev.h = V(0);
    d_prev.c = d_c * f;
  }
};

}  // namespace fused_rnn
