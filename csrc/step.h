// One timestep of one row, around the cell: what an engine does with V (one unit, or a vector of
// them) once the recurrent product is in registers. Shared by every engine, so that ragged time,
// resets, the reserve and the projection mean the same everywhere.
//
// Engines carry, per lane and row, in buffers of their own:
//   h (P)        the state the next product reads, already zeroed if the next step resets
//   c (H)        likewise, compute type
//   d_gates (G*H), d_h (P), d_c (H) on the way back: gradients that reach the step before; zero where
//                a reset cut the row.
// and within a step of a cell with a late gate
//   read (H)     what that gate's product reads
//   early (E*H)  the E = G - 1 gates before it, compute type
#pragma once

#include "cells/cell.h"
#include "dtype.h"
#include "params.h"

namespace fused_rnn {

// Where a row stands in time. `first` and `last` are in the order of processing: a reverse lane
// begins at the row's last timestep.
struct RowStep {
  int64_t t, b, lane;
  bool first, last;
  bool reset;        // the state was zeroed before this step
  bool next_resets;  // the state this step leaves will be zeroed
};

HOST_DEVICE bool is_reverse(const Shape& p, int64_t lane) {
  return p.directions == 2 && (lane & 1);
}

HOST_DEVICE int64_t row_length(const Shape& p, int64_t b) { return p.lengths ? p.lengths[b] : p.T; }

// The timestep that a lane processes at `step` (0..T-1, forward order). Rows whose length is at most
// that timestep sit it out.
HOST_DEVICE int64_t time_of_step(const Shape& p, int64_t lane, int64_t step) {
  return is_reverse(p, lane) ? p.T - 1 - step : step;
}

HOST_DEVICE int64_t previous_time(const Shape& p, int64_t lane, int64_t t) {
  return is_reverse(p, lane) ? t + 1 : t - 1;
}

HOST_DEVICE RowStep row_step(const Shape& p, int64_t lane, int64_t b, int64_t t) {
  const bool reverse = is_reverse(p, lane);
  const int64_t end = row_length(p, b) - 1;
  RowStep row;
  row.t = t;
  row.b = b;
  row.lane = lane;
  row.first = t == (reverse ? end : 0);
  row.last = t == (reverse ? 0 : end);
  row.reset = p.resets && p.resets[t * p.B + b];
  row.next_resets = p.resets && !row.last && p.resets[(reverse ? t - 1 : t + 1) * p.B + b];
  return row;
}

// Whether the initial state of a row is zeroed before its first step. A row without steps keeps it.
HOST_DEVICE bool first_step_resets(const Shape& p, int64_t lane, int64_t b) {
  const int64_t length = row_length(p, b);
  return p.resets && length > 0 && p.resets[(is_reverse(p, lane) ? length - 1 : 0) * p.B + b];
}

template <class V, class S>
HOST_DEVICE V load_or_zero(const S* from, int64_t n) {
  return from ? Memory<V>::load(from, n) : V(0);
}

// Loads initial state (hx or cx) of `n` units as the first step will see it, and, for a row without
// steps, passes it on as the final state.
template <class S, class V>
HOST_DEVICE V initial_state(const Shape& p, const void* initial, void* final_state, int64_t width,
                            int64_t lane, int64_t b, int64_t unit, int64_t n) {
  const V value =
      load_or_zero<V>(initial ? state_at<S>(initial, p.B, width, lane, b) + unit : nullptr, n);
  if (row_length(p, b) == 0)
    Memory<V>::store(value, state_at<S>(final_state, p.B, width, lane, b) + unit, n);
  return first_step_resets(p, lane, b) ? V(0) : value;
}

// What the cell itself has of weights for `n` units from `unit`; w (U, H).
template <class Cell, class V>
struct UnitWeights {
  V values[Cell::unit_weights > 0 ? Cell::unit_weights : 1];

  template <class S>
  HOST_DEVICE UnitWeights(const S* w, int64_t H, int64_t unit, int64_t n) {
    for (int k = 0; k < Cell::unit_weights; ++k) values[k] = Memory<V>::load(w + k * H + unit, n);
  }
};

// Stores a new h: to the output, to the engine's state and, on the row's last step, to h_n.
template <class S, class V, class HiddenState>
HOST_DEVICE void emit_hidden(const ForwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                             V h, HiddenState* h_state) {
  S* output = p.output.at<S>(row.t, row.b, row.lane) + unit;
  Memory<V>::store(h, output, n);
  // The recurrence continues from the h that the caller sees.
  V rounded = h;
  if constexpr (sizeof(S) < sizeof(Compute<S>)) rounded = Memory<V>::load(output, n);
  Memory<V>::store(row.next_resets ? V(0) : rounded, h_state, n);
  if (row.last) Memory<V>::store(h, state_at<S>(p.h_n, p.B, p.P, row.lane, row.b) + unit, n);
}

// The early gates of a cell with a late one, at the `n` units that prev_h, early and read point at; of
// early the gates are early_stride apart.
template <class Cell, class S, class V, class HiddenState>
HOST_DEVICE void forward_early_units(int64_t n, const V* input_gates, const V* hidden_gates,
                                     const HiddenState* prev_h, Compute<S>* early,
                                     int64_t early_stride, HiddenState* read) {
  const State<V> prev{Memory<V>::load(prev_h, n), V(0)};
  V saved[Cell::saved];
  Cell::forward_early(input_gates, hidden_gates, saved);
  Memory<V>::store(Cell::read(saved, prev), read, n);
  for (int g = 0; g < Cell::gates - 1; ++g) Memory<V>::store(saved[g], early + g * early_stride, n);
}

// The cell at `n` units from `unit`. prev_h, c_state and h_state point at those units of the engine's
// state; with a projection h_state is the buffer of unprojected values that the second product reads.
// weight_ch is the lane's. With a late gate, early is what forward_early_units left.
template <class Cell, class S, class V, class HiddenState>
HOST_DEVICE void forward_units(const ForwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                               const V* input_gates, const V* hidden_gates, const void* weight_ch,
                               const HiddenState* prev_h, Compute<S>* c_state, HiddenState* h_state,
                               const Compute<S>* early = nullptr, int64_t early_stride = 0) {
  State<V> prev{V(0), V(0)}, next{V(0), V(0)};
  if constexpr (Cell::reads_prev_h) prev.h = Memory<V>::load(prev_h, n);
  if constexpr (Cell::has_c) prev.c = Memory<V>::load(c_state, n);
  V saved[Cell::saved > 0 ? Cell::saved : 1];
  if constexpr (Cell::late_gate)
    for (int g = 0; g < Cell::gates - 1; ++g)
      saved[g] = Memory<V>::load(early + g * early_stride, n);
  const UnitWeights<Cell, V> weights(static_cast<const S*>(weight_ch), p.H, unit, n);
  Cell::forward(input_gates, hidden_gates, weights.values, prev, next, saved);

  if constexpr (Cell::saved > 0) {
    if (p.reserve.data)
      for (int i = 0; i < Cell::saved; ++i)
        Memory<V>::store(saved[i], p.reserve.at<S>(row.t, row.b, row.lane, unit, i), n);
  }
  if constexpr (Cell::has_c) {
    Memory<V>::store(row.next_resets ? V(0) : next.c, c_state, n);
    if (p.saved_cells.data)
      Memory<V>::store(next.c, p.saved_cells.at<Compute<S>>(row.t, row.b, row.lane, unit, 0), n);
    if (p.cells.data)
      Memory<V>::store(next.c, p.cells.at<Compute<S>>(row.t, row.b, row.lane) + unit, n);
    if (row.last) Memory<V>::store(next.c, state_at<S>(p.c_n, p.B, p.H, row.lane, row.b) + unit, n);
    if (p.projected) {
      Memory<V>::store(next.h, h_state, n);
      if (p.unprojected.data)
        Memory<V>::store(next.h, p.unprojected.at<S>(row.t, row.b, row.lane) + unit, n);
      return;
    }
  }
  emit_hidden<S>(p, row, unit, n, next.h, h_state);
}

// The whole gradient of h_t at `n` units: what came through the next step's product, what it passed
// on directly (d_h_state, which is used up), and grad_output.
template <class S, class V, class DState>
HOST_DEVICE V collect_d_hidden(const BackwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                               V product, DState* d_h_state) {
  V d_h = product + Memory<V>::load(d_h_state, n);
  if (p.grad_output.data)
    d_h = d_h + Memory<V>::load(p.grad_output.at<S>(row.t, row.b, row.lane) + unit, n);
  Memory<V>::store(V(0), d_h_state, n);
  return d_h;
}

// A state before the step: zero after a reset, the initial one at the first step.
template <class S, class V, class Earlier>
HOST_DEVICE V previous_state(const BackwardParams& p, const RowStep& row, const void* initial,
                             int64_t width, int64_t unit, int64_t n, const Earlier& earlier) {
  if (row.reset) return V(0);
  if (!row.first) return Memory<V>::load(earlier(previous_time(p, row.lane, row.t)), n);
  return load_or_zero<V>(
      initial ? state_at<S>(initial, p.B, width, row.lane, row.b) + unit : nullptr, n);
}

// The h before the step.
template <class S, class V>
HOST_DEVICE V previous_hidden(const BackwardParams& p, const RowStep& row, int64_t unit,
                              int64_t n) {
  return previous_state<S, V>(p, row, p.hx, p.P, unit, n,
                              [&](int64_t t) { return p.output.at<S>(t, row.b, row.lane) + unit; });
}

// The cell's backward at `n` units from `unit`. d_h is the whole gradient of the cell's h. What flows
// back through hidden_gates is the caller's to pass on, unless row.reset. d_weight_ch receives this
// row's and step's part of the gradient of the lane's weight_ch.
template <class Cell, class S, class V>
HOST_DEVICE void backward_units(const BackwardParams& p, const RowStep& row, int64_t unit,
                                int64_t n, V d_h, const void* weight_ch, Compute<S>* d_h_state,
                                Compute<S>* d_c_state, V* d_input_gates, V* d_hidden_gates,
                                V* d_weight_ch) {
  State<V> prev{V(0), V(0)}, next{V(0), V(0)}, d_next{d_h, V(0)}, d_prev{V(0), V(0)};
  if constexpr (Cell::reads_h)
    next.h = Memory<V>::load(p.output.at<S>(row.t, row.b, row.lane) + unit, n);
  if constexpr (Cell::reads_prev_h) prev.h = previous_hidden<S, V>(p, row, unit, n);
  if constexpr (Cell::has_c) {
    using C = Compute<S>;
    next.c = Memory<V>::load(p.saved_cells.at<C>(row.t, row.b, row.lane, unit, 0), n);
    prev.c = previous_state<S, V>(p, row, p.cx, p.H, unit, n, [&](int64_t t) {
      return p.saved_cells.at<C>(t, row.b, row.lane, unit, 0);
    });
    d_next.c = Memory<V>::load(d_c_state, n);
    if (p.grad_cells.data)
      d_next.c = d_next.c + Memory<V>::load(p.grad_cells.at<C>(row.t, row.b, row.lane) + unit, n);
  }
  V saved[Cell::saved > 0 ? Cell::saved : 1];
  if constexpr (Cell::saved > 0)
    for (int i = 0; i < Cell::saved; ++i)
      saved[i] = Memory<V>::load(p.reserve.at<S>(row.t, row.b, row.lane, unit, i), n);
  const UnitWeights<Cell, V> weights(static_cast<const S*>(weight_ch), p.H, unit, n);
  Cell::backward(saved, weights.values, prev, next, d_next, d_input_gates, d_hidden_gates,
                 d_weight_ch, d_prev);
  if (!p.projected) Memory<V>::store(row.reset ? V(0) : d_prev.h, d_h_state, n);
  if constexpr (Cell::has_c) Memory<V>::store(row.reset ? V(0) : d_prev.c, d_c_state, n);
}

// What the late gate's product read at `n` units from `unit`.
template <class Cell, class S, class V>
HOST_DEVICE V read_units(const BackwardParams& p, const RowStep& row, int64_t unit, int64_t n) {
  const State<V> prev{previous_hidden<S, V>(p, row, unit, n), V(0)};
  V saved[Cell::gates - 1];
  for (int i = 0; i < Cell::gates - 1; ++i)
    saved[i] = Memory<V>::load(p.reserve.at<S>(row.t, row.b, row.lane, unit, i), n);
  return Cell::read(saved, prev);
}

// The rest of it for a cell with a late gate, once the product of that gate's gradient has given d_read:
// returns the gradient of the first gate, and adds to d_h_state what flows through read. If row.reset,
// d_read has to be zero.
template <class Cell, class S, class V>
HOST_DEVICE V backward_early_units(const BackwardParams& p, const RowStep& row, int64_t unit,
                                   int64_t n, V d_read, Compute<S>* d_h_state) {
  const State<V> prev{previous_hidden<S, V>(p, row, unit, n), V(0)};
  State<V> d_prev{Memory<V>::load(d_h_state, n), V(0)};
  V saved[Cell::saved];
  for (int i = 0; i < Cell::saved; ++i)
    saved[i] = Memory<V>::load(p.reserve.at<S>(row.t, row.b, row.lane, unit, i), n);
  const V d_gate = Cell::backward_early(saved, prev, d_read, d_prev);
  Memory<V>::store(d_prev.h, d_h_state, n);
  return d_gate;
}

}  // namespace fused_rnn
