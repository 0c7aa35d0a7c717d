// Gated recurrent unit (Cho et al. 2014) as torch.nn and cuDNN define it, the reset gate applied after
// the recurrent product; gates in torch's order r, z, n:
//
//   r = sigmoid(input_gates[0] + hidden_gates[0])
//   z = sigmoid(input_gates[1] + hidden_gates[1])
//   n = tanh   (input_gates[2] + r hidden_gates[2])
//   h_t = (1 - z) n + z h_{t-1}
//
// Reserve: r, z, n after their activations, and hidden_gates[2].
//
// GruResetBefore is the paper's own form (eq. 5 to 8), the reset gate applied before the recurrent
// product. So gate n is late, and reads r h_{t-1}:
//
//   n = tanh   (input_gates[2] + hidden_gates[2])
//
// Reserve: r, z, n after their activations.
#pragma once

#include "cell.h"

namespace fused_rnn {

struct Gru {
  static constexpr int gates = 3;
  static constexpr int saved = 4;
  static constexpr int unit_weights = 0;
  static constexpr bool has_c = false;
  static constexpr bool split_gates = true;
  static constexpr bool reads_prev_h = true;
  static constexpr bool reads_h = false;
  static constexpr bool late_gate = false;

  template <class V>
  static HOST_DEVICE void forward(const V* input_gates, const V* hidden_gates, const V*,
                                  const State<V>& prev, State<V>& next, V* saved) {
    const V r = sigmoid(input_gates[0] + hidden_gates[0]);
    const V z = sigmoid(input_gates[1] + hidden_gates[1]);
    const V n = tanh(input_gates[2] + r * hidden_gates[2]);
    next.h = n + z * (prev.h - n);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = hidden_gates[2];
  }

  template <class V>
  static HOST_DEVICE void backward(const V* saved, const V*, const State<V>& prev, const State<V>&,
                                   const State<V>& d_next, V* d_input_gates, V* d_hidden_gates, V*,
                                   State<V>& d_prev) {
    const V r = saved[0], z = saved[1], n = saved[2], hidden_n = saved[3];
    const V d_n = d_next.h * (V(1) - z) * (V(1) - n * n);
    d_input_gates[0] = d_n * hidden_n * r * (V(1) - r);
    d_input_gates[1] = d_next.h * (prev.h - n) * z * (V(1) - z);
    d_input_gates[2] = d_n;
    d_hidden_gates[0] = d_input_gates[0];
    d_hidden_gates[1] = d_input_gates[1];
    d_hidden_gates[2] = d_n * r;
    d_prev.h = d_next.h * z;
  }
};

struct GruResetBefore {
  static constexpr int gates = 3;
  static constexpr int saved = 3;
  static constexpr int unit_weights = 0;
  static constexpr bool has_c = false;
  static constexpr bool split_gates = false;
  static constexpr bool reads_prev_h = true;
  static constexpr bool reads_h = false;
  static constexpr bool late_gate = true;

  template <class V>
  static HOST_DEVICE void forward_early(const V* input_gates, const V* hidden_gates, V* saved) {
    for (int k = 0; k < 2; ++k) saved[k] = sigmoid(input_gates[k] + hidden_gates[k]);
  }

  template <class V>
  static HOST_DEVICE V read(const V* saved, const State<V>& prev) {
    return saved[0] * prev.h;
  }

  template <class V>
  static HOST_DEVICE void forward(const V* input_gates, const V* hidden_gates, const V*,
                                  const State<V>& prev, State<V>& next, V* saved) {
    const V z = saved[1];
    const V n = tanh(input_gates[2] + hidden_gates[2]);
    next.h = n + z * (prev.h - n);
    saved[2] = n;
  }

  template <class V>
  static HOST_DEVICE void backward(const V* saved, const V*, const State<V>& prev, const State<V>&,
                                   const State<V>& d_next, V* d_input_gates, V* d_hidden_gates, V*,
                                   State<V>& d_prev) {
    const V z = saved[1], n = saved[2];
    d_input_gates[1] = d_next.h * (prev.h - n) * z * (V(1) - z);
    d_input_gates[2] = d_next.h * (V(1) - z) * (V(1) - n * n);
    for (int k = 1; k < gates; ++k) d_hidden_gates[k] = d_input_gates[k];
    d_prev.h = d_next.h * z;
  }

  template <class V>
  static HOST_DEVICE V backward_early(const V* saved, const State<V>& prev, V d_read,
                                      State<V>& d_prev) {
    const V r = saved[0];
    d_prev.h = d_prev.h + d_read * r;
    return d_read * prev.h * r * (V(1) - r);
  }
};

}  // namespace fused_rnn
