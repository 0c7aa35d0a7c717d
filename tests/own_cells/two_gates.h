// A gated unit of two gates (after Zhou et al. 2016), where f multiplies the hidden part alone:
//
//   f = sigmoid(input_gates[0] + hidden_gates[0])
//   n = tanh   (input_gates[1] + f hidden_gates[1])
//   h_t = h_{t-1} + f (n - h_{t-1})
//
// Reserve: f, n, hidden_gates[1].
#pragma once

#include "cells/cell.h"

namespace fused_rnn::user {

struct TwoGates {
  static constexpr int gates = 2;
  static constexpr int saved = 3;
  static constexpr int unit_weights = 0;
  static constexpr bool has_c = false;
  static constexpr bool split_gates = true;
  static constexpr bool reads_prev_h = true;
  static constexpr bool reads_h = false;
  static constexpr bool late_gate = false;

  template <class V>
  static HOST_DEVICE void forward(const V* input_gates, const V* hidden_gates, const V*,
                                  const State<V>& prev, State<V>& next, V* saved) {
    const V f = sigmoid(input_gates[0] + hidden_gates[0]);
    const V n = tanh(input_gates[1] + f * hidden_gates[1]);
    next.h = prev.h + f * (n - prev.h);
    saved[0] = f;
    saved[1] = n;
    saved[2] = hidden_gates[1];
  }

  template <class V>
  static HOST_DEVICE void backward(const V* saved, const V*, const State<V>& prev, const State<V>&,
                                   const State<V>& d_next, V* d_input_gates, V* d_hidden_gates, V*,
                                   State<V>& d_prev) {
    const V f = saved[0], n = saved[1], hidden_n = saved[2];
    const V d_n = d_next.h * f * (V(1) - n * n);
    d_input_gates[0] = (d_next.h * (n - prev.h) + d_n * hidden_n) * f * (V(1) - f);
    d_input_gates[1] = d_n;
    d_hidden_gates[0] = d_input_gates[0];
    d_hidden_gates[1] = d_n * f;
    d_prev.h = d_next.h * (V(1) - f);
  }
};

}  // namespace fused_rnn::user
