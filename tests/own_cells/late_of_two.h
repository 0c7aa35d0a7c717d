// Two gates of which the second waits for the first, and a weight of a unit:
//
//   r = sigmoid(input_gates[0] + hidden_gates[0])
//   n = tanh   (input_gates[1] + hidden_gates[1])      whose product reads r h_{t-1}
//   h_t = h_{t-1} / 2 + w n
//
// Reserve: r, n.
#pragma once

#include "cells/cell.h"

namespace fused_rnn::user {

struct LateOfTwo {
  static constexpr int gates = 2;
  static constexpr int saved = 2;
  static constexpr int unit_weights = 1;
  static constexpr bool has_c = false;
  static constexpr bool split_gates = false;
  static constexpr bool reads_prev_h = true;
  static constexpr bool reads_h = false;
  static constexpr bool late_gate = true;

  template <class V>
  static HOST_DEVICE void forward_early(const V* input_gates, const V* hidden_gates, V* saved) {
    saved[0] = sigmoid(input_gates[0] + hidden_gates[0]);
  }

  template <class V>
  static HOST_DEVICE V read(const V* saved, const State<V>& prev) {
    return saved[0] * prev.h;
  }

  template <class V>
  static HOST_DEVICE void forward(const V* input_gates, const V* hidden_gates, const V* weights,
                                  const State<V>& prev, State<V>& next, V* saved) {
    const V n = tanh(input_gates[1] + hidden_gates[1]);
    next.h = prev.h * V(0.5) + weights[0] * n;
    saved[1] = n;
  }

  template <class V>
  static HOST_DEVICE void backward(const V* saved, const V* weights, const State<V>&,
                                   const State<V>&, const State<V>& d_next, V* d_input_gates,
                                   V* d_hidden_gates, V* d_weights, State<V>& d_prev) {
    const V n = saved[1];
    d_input_gates[1] = d_next.h * weights[0] * (V(1) - n * n);
    d_hidden_gates[1] = d_input_gates[1];
    d_weights[0] = d_next.h * n;
    d_prev.h = d_next.h * V(0.5);
  }

  template <class V>
  static HOST_DEVICE V backward_early(const V* saved, const State<V>& prev, V d_read,
                                      State<V>& d_prev) {
    const V r = saved[0];
    d_prev.h = d_prev.h + d_read * r;
    return d_read * prev.h * r * (V(1) - r);
  }
};

}  // namespace fused_rnn::user
