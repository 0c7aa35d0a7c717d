// Simple (Elman) RNN, with tanh or rectifier (Elman 1990):
//
//   h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
//
// Reserve: nothing. Both derivatives follow from h_t itself.
#pragma once

#include "cell.h"

namespace fused_rnn {

struct TanhActivation {
  template <class V>
  static HOST_DEVICE V value(V x) {
    return tanh(x);
  }
  template <class V>
  static HOST_DEVICE V derivative(V y) {
    return V(1) - y * y;
  }
};

struct ReluActivation {
  template <class V>
  static HOST_DEVICE V value(V x) {
    return where(x <= V(0), V(0), x);  // this way round, NaN stays NaN
  }
  template <class V>
  static HOST_DEVICE V derivative(V y) {
    return where(y <= V(0), V(0), V(1));
  }
};

template <class Activation>
struct Rnn {
  static constexpr int gates = 1;
  static constexpr int saved = 0;
  static constexpr int unit_weights = 0;
  static constexpr bool has_c = false;
  static constexpr bool split_gates = false;
  static constexpr bool reads_prev_h = false;
  static constexpr bool reads_h = true;
  static constexpr bool late_gate = false;

  template <class V>
  static HOST_DEVICE void forward(const V* input_gates, const V* hidden_gates, const V*,
                                  const State<V>&, State<V>& next, V*) {
    next.h = Activation::value(input_gates[0] + hidden_gates[0]);
  }

  template <class V>
  static HOST_DEVICE void backward(const V*, const V*, const State<V>&, const State<V>& next,
                                   const State<V>& d_next, V* d_input_gates, V* d_hidden_gates, V*,
                                   State<V>& d_prev) {
    const V d_gate = d_next.h * Activation::derivative(next.h);
    d_input_gates[0] = d_gate;
    d_hidden_gates[0] = d_gate;
    d_prev.h = V(0);
  }
};

using RnnTanh = Rnn<TanhActivation>;
using RnnRelu = Rnn<ReluActivation>;

}  // namespace fused_rnn
