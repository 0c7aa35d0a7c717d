// Dreamer's GRU (Hafner et al. 2021, arXiv 2010.02193, and its successors): the reset gate multiplies the
// whole candidate, the update gate starts out closed; gates in the order r, n, u:
//
//   r = sigmoid(input_gates[0] + hidden_gates[0])
//   s =         input_gates[1] + hidden_gates[1]
//   u = sigmoid(input_gates[2] + hidden_gates[2] - 1)
//   h_t = u tanh(r s) + (1 - u) h_{t-1}
//
// Dreamer normalises the gates together: layer_norm="joint". Reserve: r, s, u.
#pragma once

#include "cells/cell.h"

namespace fused_rnn::user {

struct DreamerGru {
  static constexpr int gates = 3;
  static constexpr int saved = 3;
  static constexpr int unit_weights = 0;
  static constexpr bool has_c = false;
  static constexpr bool split_gates = false;
  static constexpr bool reads_prev_h = true;
  static constexpr bool reads_h = false;
  static constexpr bool late_gate = false;

  template <class V>
  static HOST_DEVICE void forward(const V* input_gates, const V* hidden_gates, const V*,
                                  const State<V>& prev, State<V>& next, V* saved) {
    const V r = sigmoid(input_gates[0] + hidden_gates[0]);
    const V s = input_gates[1] + hidden_gates[1];
    const V u = sigmoid(input_gates[2] + hidden_gates[2] - V(1));
    next.h = prev.h + u * (tanh(r * s) - prev.h);
    saved[0] = r;
    saved[1] = s;
    saved[2] = u;
  }

  template <class V>
  static HOST_DEVICE void backward(const V* saved, const V*, const State<V>& prev, const State<V>&,
                                   const State<V>& d_next, V* d_input_gates, V* d_hidden_gates, V*,
                                   State<V>& d_prev) {
    const V r = saved[0], s = saved[1], u = saved[2], n = tanh(r * s);
    const V d_product = d_next.h * u * (V(1) - n * n);
    d_input_gates[0] = d_product * s * r * (V(1) - r);
    d_input_gates[1] = d_product * r;
    d_input_gates[2] = d_next.h * (n - prev.h) * u * (V(1) - u);
    for (int k = 0; k < gates; ++k) d_hidden_gates[k] = d_input_gates[k];
    d_prev.h = d_next.h * (V(1) - u);
  }
};

}  // namespace fused_rnn::user
