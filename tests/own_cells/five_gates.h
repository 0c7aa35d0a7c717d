// An LSTM with a fifth gate m, by which h_{t-1} goes into c, with a softsign in tanh's stead and with two
// weights of a unit, the first of which acts before c and after it; gates i, f, g, m, o:
//
//   i = sigmoid(a[0] + w_0 c_{t-1})         c_t = f c_{t-1} + i g + m h_{t-1}
//   f = sigmoid(a[1])                       h_t = o tanh(c_t)
//   g = a[2] / (1 + |a[2]|)
//   m = sigmoid(a[3] - 1/2)                 a = input_gates + hidden_gates
//   o = sigmoid(a[4] + w_0 c_t + w_1)
//
// Reserve: the gates, o last.
#pragma once

#include "cells/cell.h"

namespace fused_rnn::user {

struct FiveGates {
  static constexpr int gates = 5;
  static constexpr int saved = 5;
  static constexpr int unit_weights = 2;
  static constexpr bool has_c = true;
  static constexpr bool split_gates = false;
  static constexpr bool reads_prev_h = true;
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
    V d_c = d_next.c, of_c[2];
    const V d_inside =
        backward_h(saved, weights, next.c, next.c, d_next.h, d_c, d_input_gates[4], d_weights);
    backward_c(saved, weights, prev, d_c + d_inside, d_input_gates, of_c, d_prev);
    d_weights[0] = d_weights[0] + of_c[0];
    for (int k = 0; k < gates; ++k) d_hidden_gates[k] = d_input_gates[k];
  }

  template <class V>
  static HOST_DEVICE void forward_c(const V* input_gates, const V* hidden_gates, const V* weights,
                                    const State<V>& prev, V& c, V* saved) {
    V gate[gates];
    for (int k = 0; k < gates; ++k) gate[k] = input_gates[k] + hidden_gates[k];
    saved[0] = sigmoid(gate[0] + weights[0] * prev.c);
    saved[1] = sigmoid(gate[1]);
    saved[2] = gate[2] / (V(1) + abs(gate[2]));
    saved[3] = sigmoid(gate[3] - V(0.5));
    saved[4] = gate[4];
    c = saved[1] * prev.c + saved[0] * saved[2] + saved[3] * prev.h;
  }

  template <class V>
  static HOST_DEVICE V forward_h(const V* weights, V c, V inside, V* saved) {
    saved[4] = sigmoid(saved[4] + weights[0] * c + weights[1]);
    return saved[4] * tanh(inside);
  }

  template <class V>
  static HOST_DEVICE V backward_h(const V* saved, const V* weights, V c, V inside, V d_h, V& d_c,
                                  V& d_last_gate, V* d_weights) {
    const V o = saved[4], tanh_c = tanh(inside);
    d_last_gate = d_h * tanh_c * o * (V(1) - o);
    d_c = d_c + d_last_gate * weights[0];
    d_weights[0] = d_last_gate * c;
    d_weights[1] = d_last_gate;
    return d_h * o * (V(1) - tanh_c * tanh_c);
  }

  template <class V>
  static HOST_DEVICE void backward_c(const V* saved, const V* weights, const State<V>& prev, V d_c,
                                     V* d_gates, V* d_weights, State<V>& d_prev) {
    const V i = saved[0], f = saved[1], g = saved[2], m = saved[3], slope = V(1) - abs(g);
    d_gates[0] = d_c * g * i * (V(1) - i);
    d_gates[1] = d_c * prev.c * f * (V(1) - f);
    d_gates[2] = d_c * i * slope * slope;
    d_gates[3] = d_c * prev.h * m * (V(1) - m);
    d_weights[0] = d_gates[0] * prev.c;
    d_prev.c = d_c * f + d_gates[0] * weights[0];
    d_prev.h = d_c * m;
  }
};

}  // namespace fused_rnn::user
