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
//
// Around a Varied cell (Variation in params.h) there is more to a step:
//
//   h the next product reads = h_t, where recurrent dropout keeps a unit, over the share that is kept
//   input and hidden gates   = the products normalised over all gates of all units, or their sum
//   c~, h~                   = the cell's; c normalised before or inside the output's tanh
//   c_t, h_t                 = c~, h~, or where zoneout says so, the state as it was
//
// The functions below then take Factors, which the engine works out; normalisations are the engine's,
// for they need all units of a row, and it calls a cell with c in halves.
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

// By what a Varied cell's step multiplies some units of a row.
template <class V>
struct Factors {
  V zone_h, zone_c;  // how much stays of the state before
  V keep;            // h, before the recurrent product
  HOST_DEVICE Factors() {}
  HOST_DEVICE Factors(V zone_h, V zone_c, V keep) : zone_h(zone_h), zone_c(zone_c), keep(keep) {}
};

// Where the values of a Varied cell lie in the reserve: those that the cell itself saves come first.
struct SavedValues {
  int64_t h;              // h~, for cells whose backward reads it
  int64_t input, hidden;  // G each: gates (input or joint, and hidden) normalised, before
                          //   weight and bias
  int64_t c;              // likewise c
  int64_t count;

  HOST_DEVICE SavedValues(LayerNorm norm, int64_t gates, int64_t saved, bool reads_h, bool has_c)
      : h(saved),
        input(h + reads_h),
        hidden(input + (norm == LayerNorm::none ? 0 : gates)),
        c(hidden + (norm == LayerNorm::separate ? gates : 0)),
        count(c + (norm != LayerNorm::none && has_c)) {}
};

template <class Cell>
HOST_DEVICE SavedValues saved_values(const Shape& p) {
  return {p.variation.layer_norm, Cell::gates, Cell::saved, Cell::reads_h, Cell::has_c};
}

// The weights that a unit has for itself, one after the other where their gradients are summed: the
// cell's, then weight and bias of input (or joint) gates, of hidden gates, and of c.
struct UnitWeightPlaces {
  int64_t ln_input, ln_hidden, ln_c, count;

  HOST_DEVICE UnitWeightPlaces(LayerNorm norm, int64_t gates, int64_t unit_weights, bool has_c)
      : ln_input(unit_weights),
        ln_hidden(ln_input + (norm == LayerNorm::none ? 0 : 2 * gates)),
        ln_c(ln_hidden + (norm == LayerNorm::separate ? 2 * gates : 0)),
        count(ln_c + (norm != LayerNorm::none && has_c ? 2 : 0)) {}
};

template <class Cell>
HOST_DEVICE UnitWeightPlaces unit_weight_places(const Shape& p) {
  return {is_varied<Cell> ? p.variation.layer_norm : LayerNorm::none, Cell::gates,
          Cell::unit_weights, Cell::has_c};
}

template <class V, class S>
HOST_DEVICE V load_or_zero(const S* from, int64_t n) {
  return from ? Memory<V>::load(from, n) : V(0);
}

// Mean of a row that is normalised, and 1 over its standard deviation.
template <class C>
struct Moments {
  C mean, scale;

  template <class V>
  HOST_DEVICE V normalise(V x) const {
    return (x - V(mean)) * V(scale);
  }
};

// What the gradient of a normalised row is to what was normalised: from the means, over the row, of
// d_normal and of d_normal * normal.
template <class C>
struct NormGradient {
  C scale, mean, slope;

  template <class V>
  HOST_DEVICE V at(V d_normal, V normal) const {
    return (d_normal - V(mean) - normal * V(slope)) * V(scale);
  }
};

// Weight and bias of a normalisation at units `at` and on.
template <class S, class V>
HOST_DEVICE V affine(V normal, const NormWeights<const void*>& norm, int64_t at, int64_t n) {
  return normal * Memory<V>::load(static_cast<const S*>(norm.weight) + at, n) +
         Memory<V>::load(static_cast<const S*>(norm.bias) + at, n);
}

// A gate of a product normalised, with weight and bias of that and what is added then; at `at` of those.
template <class S, class V, class C>
HOST_DEVICE V normalised_gate(const Moments<C>& of, V product, const NormWeights<const void*>& norm,
                              const void* added, int64_t at, int64_t n, V& normal) {
  normal = of.normalise(product);
  return affine<S>(normal, norm, at, n) +
         load_or_zero<V>(added ? static_cast<const S*>(added) + at : nullptr, n);
}

// How many normalisations a step has, and which of them is that of c; input (or joint) gates are the
// first, hidden gates the next.
HOST_DEVICE int64_t norm_of_c(LayerNorm norm) { return norm == LayerNorm::separate ? 2 : 1; }
HOST_DEVICE int64_t norm_count(LayerNorm norm, bool has_c) {
  return norm == LayerNorm::none ? 0 : norm_of_c(norm) + has_c;
}

// 1 / standard deviation for each of them.
template <class Cell, class C, class Pointer>
HOST_DEVICE C* statistics_at(const Shape& p, Pointer* statistics, const RowStep& row) {
  return static_cast<C*>(statistics) +
         ((row.t * p.L + row.lane) * p.B + row.b) * norm_count(p.variation.layer_norm, Cell::has_c);
}

// Rows of random numbers (philox.h): of zoneout at a step, and of recurrent dropout.
HOST_DEVICE int64_t zone_row(const Shape& p, int64_t lane, int64_t b, int64_t t) {
  return (t * p.B + b) * p.L + lane;
}
HOST_DEVICE int64_t dropout_row(const Shape& p, int64_t lane, int64_t b) { return lane * p.B + b; }

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

// A lane's weights of the cell's own, of those of all lanes; null if it has none.
template <class Cell, class S, class Params>
HOST_DEVICE const S* weight_ch_of(const Params& p, int64_t lane) {
  if constexpr (Cell::unit_weights > 0)
    return static_cast<const S*>(p.weight_ch) + lane * Cell::unit_weights * p.H;
  else
    return nullptr;
}

// A state before the step: zero after a reset, the initial one at the first step.
template <class S, class V, class Earlier>
HOST_DEVICE V previous_state(const Shape& p, const RowStep& row, const void* initial, int64_t width,
                             int64_t unit, int64_t n, const Earlier& earlier) {
  if (row.reset) return V(0);
  if (!row.first) return Memory<V>::load(earlier(previous_time(p, row.lane, row.t)), n);
  return load_or_zero<V>(
      initial ? state_at<S>(initial, p.B, width, row.lane, row.b) + unit : nullptr, n);
}

// The h before a step, as the caller saw it.
template <class S, class V, class Params>
HOST_DEVICE V previous_hidden(const Params& p, const RowStep& row, int64_t unit, int64_t n) {
  return previous_state<S, V>(p, row, p.hx, p.P, unit, n, [&](int64_t t) {
    return p.output.template at<S>(t, row.b, row.lane) + unit;
  });
}

// What zoneout makes of a state.
template <class V>
HOST_DEVICE V zoned(V share, V before, V after) {
  return share * before + (V(1) - share) * after;
}

// Stores a new h: to the output, to the engine's state and, on the row's last step, to h_n.
template <bool varied, class S, class V, class HiddenState>
HOST_DEVICE void emit_hidden(const ForwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                             V h, HiddenState* h_state, const Factors<V>& factors = {}) {
  if constexpr (varied)
    if (p.variation.zoneout_h > 0)
      h = zoned(factors.zone_h, previous_hidden<S, V>(p, row, unit, n), h);
  S* output = p.output.at<S>(row.t, row.b, row.lane) + unit;
  Memory<V>::store(h, output, n);
  // The recurrence continues from the h that the caller sees.
  V rounded = h;
  if constexpr (sizeof(S) < sizeof(Compute<S>)) rounded = Memory<V>::load(output, n);
  if constexpr (varied) rounded = rounded * factors.keep;
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

// What the cell gave at `n` units, next, on its way to where it is kept.
template <class Cell, class S, class V, class HiddenState>
HOST_DEVICE void emit_states(const ForwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                             const State<V>& prev, State<V> next, Compute<S>* c_state,
                             HiddenState* h_state, const Factors<V>& factors = {}) {
  if constexpr (is_varied<Cell> && Cell::reads_h)
    if (p.reserve.data)
      Memory<V>::store(next.h,
                       p.reserve.at<S>(row.t, row.b, row.lane, unit, saved_values<Cell>(p).h), n);
  if constexpr (Cell::has_c) {
    if constexpr (is_varied<Cell>)
      if (p.variation.zoneout_c > 0) {
        if (p.saved_cells.data)
          Memory<V>::store(next.c, p.saved_cells.at<Compute<S>>(row.t, row.b, row.lane, unit, 1),
                           n);
        next.c = zoned(factors.zone_c, prev.c, next.c);
      }
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
  emit_hidden<is_varied<Cell>, S>(p, row, unit, n, next.h, h_state, factors);
}

// `count` values of some units, in the reserve from `first`.
template <class S, class V>
HOST_DEVICE void save_values(const ForwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                             const V* values, int64_t first, int64_t count) {
  if (!p.reserve.data) return;
  for (int64_t i = 0; i < count; ++i)
    Memory<V>::store(values[i], p.reserve.at<S>(row.t, row.b, row.lane, unit, first + i), n);
}

template <class S, class V>
HOST_DEVICE V saved_value(const BackwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                          int64_t i) {
  return Memory<V>::load(p.reserve.at<S>(row.t, row.b, row.lane, unit, i), n);
}

// The cell at `n` units from `unit`. prev_h, c_state and h_state point at those units of the engine's
// state; with a projection h_state is the buffer of unprojected values that the second product reads.
// weight_ch is the lane's. With a late gate, early is what forward_early_units left.
template <class Cell, class S, class V, class HiddenState>
HOST_DEVICE void forward_units(const ForwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                               const V* input_gates, const V* hidden_gates, const void* weight_ch,
                               const HiddenState* prev_h, Compute<S>* c_state, HiddenState* h_state,
                               const Factors<V>& factors = {}, const Compute<S>* early = nullptr,
                               int64_t early_stride = 0) {
  State<V> prev{V(0), V(0)}, next{V(0), V(0)};
  if constexpr (Cell::reads_prev_h) {
    if constexpr (is_varied<Cell>)
      prev.h = previous_hidden<S, V>(p, row, unit, n);  // the engine's has been dropped from
    else
      prev.h = Memory<V>::load(prev_h, n);
  }
  if constexpr (Cell::has_c) prev.c = Memory<V>::load(c_state, n);
  V saved[Cell::saved > 0 ? Cell::saved : 1];
  if constexpr (Cell::late_gate)
    for (int g = 0; g < Cell::gates - 1; ++g)
      saved[g] = Memory<V>::load(early + g * early_stride, n);
  const UnitWeights<Cell, V> weights(static_cast<const S*>(weight_ch), p.H, unit, n);
  Cell::forward(input_gates, hidden_gates, weights.values, prev, next, saved);
  save_values<S>(p, row, unit, n, saved, 0, Cell::saved);
  emit_states<Cell, S>(p, row, unit, n, prev, next, c_state, h_state, factors);
}

// Under layer_norm: from the gates as the products left them to those that the cell sees. Joint ones
// are summed up in input_gates, and then stand for the hidden gates.
template <class Cell, class S, class V>
HOST_DEVICE void normalise_gates(const ForwardParams& p, const RowStep& row, int64_t unit,
                                 int64_t n, const LaneWeights<const void*>& w,
                                 const Moments<Compute<S>>& input,
                                 const Moments<Compute<S>>& hidden, V* input_gates,
                                 V* hidden_gates) {
  const bool joint = p.variation.layer_norm == LayerNorm::joint;
  const SavedValues places = saved_values<Cell>(p);
  V normal[2][Cell::gates];
  for (int g = 0; g < Cell::gates; ++g) {
    const int64_t at = g * p.H + unit;
    const V first = normalised_gate<S>(input, input_gates[g], w.ln_input,
                                       joint ? nullptr : w.bias_ih, at, n, normal[0][g]);
    input_gates[g] = joint ? V(0) : first;
    hidden_gates[g] = joint ? first
                            : normalised_gate<S>(hidden, hidden_gates[g], w.ln_hidden, w.bias_hh,
                                                 at, n, normal[1][g]);
  }
  save_values<S>(p, row, unit, n, normal[0], places.input, Cell::gates);
  if (!joint) save_values<S>(p, row, unit, n, normal[1], places.hidden, Cell::gates);
}

// The half of it before c is normalised: c~, and the last value saved, which the other half goes on from.
template <class Cell, class S, class V>
HOST_DEVICE void forward_c_units(const ForwardParams& p, const RowStep& row, int64_t unit,
                                 int64_t n, const V* input_gates, const V* hidden_gates,
                                 const void* weight_ch, const Compute<S>* c_state, V& c,
                                 V& last_saved) {
  State<V> prev{V(0), Memory<V>::load(c_state, n)};
  if constexpr (Cell::reads_prev_h) prev.h = previous_hidden<S, V>(p, row, unit, n);
  V saved[Cell::saved];
  const UnitWeights<Cell, V> weights(static_cast<const S*>(weight_ch), p.H, unit, n);
  Cell::forward_c(input_gates, hidden_gates, weights.values, prev, c, saved);
  save_values<S>(p, row, unit, n, saved, 0, Cell::saved - 1);
  last_saved = saved[Cell::saved - 1];
}

// The half after, from c~.
template <class Cell, class S, class V, class HiddenState>
HOST_DEVICE void forward_h_units(const ForwardParams& p, const RowStep& row, int64_t unit,
                                 int64_t n, const Moments<Compute<S>>& of_c, V c, V last_saved,
                                 const LaneWeights<const void*>& w, Compute<S>* c_state,
                                 HiddenState* h_state, const Factors<V>& factors) {
  const V normal = of_c.normalise(c), inside = affine<S>(normal, w.ln_c, unit, n);
  const State<V> prev{V(0), Memory<V>::load(c_state, n)};
  State<V> next{V(0), p.variation.layer_norm == LayerNorm::joint ? inside : c};
  constexpr int last = Cell::saved - 1;
  V saved[Cell::saved];
  saved[last] = last_saved;
  const UnitWeights<Cell, V> weights(static_cast<const S*>(w.weight_ch), p.H, unit, n);
  next.h = Cell::forward_h(weights.values, next.c, inside, saved);
  save_values<S>(p, row, unit, n, saved + last, last, 1);
  save_values<S>(p, row, unit, n, &normal, saved_values<Cell>(p).c, 1);
  emit_states<Cell, S>(p, row, unit, n, prev, next, c_state, h_state, factors);
}

// The whole gradient of h_t at `n` units: what came through the next step's product, what it passed
// on directly (d_h_state, which is used up), and grad_output (null for zeros), which points at these
// units. Around a Varied cell that of h~, and d_h_state holds what zoneout passes by the cell.
template <bool varied, class V, class Grad, class DState>
HOST_DEVICE V collect_d_hidden(const RowStep& row, int64_t n, V product, const Grad* grad_output,
                               DState* d_h_state, const Factors<V>& factors = {}) {
  if constexpr (varied) product = product * factors.keep;
  V d_h = product + Memory<V>::load(d_h_state, n);
  if (grad_output) d_h = d_h + Memory<V>::load(grad_output, n);
  if constexpr (varied) {
    Memory<V>::store(row.reset ? V(0) : factors.zone_h * d_h, d_h_state, n);
    return (V(1) - factors.zone_h) * d_h;
  }
  Memory<V>::store(V(0), d_h_state, n);
  return d_h;
}

// The same with grad_output where the caller of the op has it.
template <bool varied, class S, class V, class DState>
HOST_DEVICE V collect_d_hidden(const BackwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                               V product, DState* d_h_state, const Factors<V>& factors = {}) {
  const S* grad = p.grad_output.data ? p.grad_output.at<S>(row.t, row.b, row.lane) + unit : nullptr;
  return collect_d_hidden<varied>(row, n, product, grad, d_h_state, factors);
}

// The c before a step, and the one that the cell gave.
template <class Cell, class S, class V>
HOST_DEVICE void load_cells(const BackwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                            V& before, V& after) {
  using C = Compute<S>;
  const bool zoned = is_varied<Cell> && p.variation.zoneout_c > 0;
  after = Memory<V>::load(p.saved_cells.at<C>(row.t, row.b, row.lane, unit, zoned), n);
  before = previous_state<S, V>(p, row, p.cx, p.H, unit, n, [&](int64_t t) {
    return p.saved_cells.at<C>(t, row.b, row.lane, unit, 0);
  });
}

// The whole gradient of c_t, as far as it does not come from h_t.
template <class S, class V>
HOST_DEVICE V collect_d_cell(const BackwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                             const Compute<S>* d_c_state) {
  V d_c = Memory<V>::load(d_c_state, n);
  if (p.grad_cells.data)
    d_c = d_c + Memory<V>::load(p.grad_cells.at<Compute<S>>(row.t, row.b, row.lane) + unit, n);
  return d_c;
}

// What a cell's backward reads of what forward left, at `n` units from `unit`. Engines that wait for the
// next step's product read it while they wait.
template <class Cell, class V>
struct ForwardResults {
  State<V> prev, next;
  V saved[Cell::saved > 0 ? Cell::saved : 1];

  HOST_DEVICE ForwardResults() : prev{V(0), V(0)}, next{V(0), V(0)} {}
};

template <class Cell, class S, class V>
HOST_DEVICE ForwardResults<Cell, V> load_results(const BackwardParams& p, const RowStep& row,
                                                 int64_t unit, int64_t n) {
  ForwardResults<Cell, V> results;
  if constexpr (Cell::reads_h) {
    if constexpr (is_varied<Cell>)
      results.next.h = saved_value<S, V>(p, row, unit, n, saved_values<Cell>(p).h);
    else
      results.next.h = Memory<V>::load(p.output.at<S>(row.t, row.b, row.lane) + unit, n);
  }
  if constexpr (Cell::reads_prev_h) results.prev.h = previous_hidden<S, V>(p, row, unit, n);
  if constexpr (Cell::has_c) load_cells<Cell, S>(p, row, unit, n, results.prev.c, results.next.c);
  for (int i = 0; i < Cell::saved; ++i) results.saved[i] = saved_value<S, V>(p, row, unit, n, i);
  return results;
}

// The cell's backward at `n` units from `unit`. d_h is the whole gradient of the cell's h. What flows
// back through hidden_gates is the caller's to pass on, unless row.reset. d_weight_ch receives this
// row's and step's part of the gradient of the lane's weight_ch.
template <class Cell, class S, class V>
HOST_DEVICE void backward_units(const BackwardParams& p, const RowStep& row, int64_t unit,
                                int64_t n, const ForwardResults<Cell, V>& of, V d_h,
                                const void* weight_ch, Compute<S>* d_h_state, Compute<S>* d_c_state,
                                V* d_input_gates, V* d_hidden_gates, V* d_weight_ch,
                                const Factors<V>& factors = {}) {
  State<V> d_next{d_h, V(0)}, d_prev{V(0), V(0)};
  V d_c_passed_by(0);
  if constexpr (Cell::has_c) {
    d_next.c = collect_d_cell<S, V>(p, row, unit, n, d_c_state);
    if constexpr (is_varied<Cell>) {
      d_c_passed_by = factors.zone_c * d_next.c;
      d_next.c = (V(1) - factors.zone_c) * d_next.c;
    }
  }
  const UnitWeights<Cell, V> weights(static_cast<const S*>(weight_ch), p.H, unit, n);
  Cell::backward(of.saved, weights.values, of.prev, of.next, d_next, d_input_gates, d_hidden_gates,
                 d_weight_ch, d_prev);
  if constexpr (is_varied<Cell>) {
    d_prev.c = d_prev.c + d_c_passed_by;
    if (!p.projected) d_prev.h = d_prev.h + Memory<V>::load(d_h_state, n);
  }
  if (!p.projected) Memory<V>::store(row.reset ? V(0) : d_prev.h, d_h_state, n);
  if constexpr (Cell::has_c) Memory<V>::store(row.reset ? V(0) : d_prev.c, d_c_state, n);
}

// Through weight and bias of a normalisation of `count` rows of units, saved from `place` on: from the
// gradients of what they made, d_values, to those of what was normalised. add(k, value) receives this
// row's and step's part of the gradient of the unit's own weight k, theirs from `first`.
template <class S, class V, class Add>
HOST_DEVICE void backward_affine(const BackwardParams& p, const RowStep& row, int64_t unit,
                                 int64_t n, int count, int64_t place, int64_t first,
                                 const NormWeights<const void*>& norm, const V* d_values,
                                 V* d_normal, const Add& add) {
  for (int i = 0; i < count; ++i) {
    const V normal = saved_value<S, V>(p, row, unit, n, place + i);
    add(first + i, d_values[i] * normal);
    add(first + count + i, d_values[i]);
    d_normal[i] =
        d_values[i] * Memory<V>::load(static_cast<const S*>(norm.weight) + i * p.H + unit, n);
  }
}

// Likewise from the gates that a cell saw. Of joint ones only d_normal_input is there.
template <class Cell, class S, class V, class Add>
HOST_DEVICE void backward_gates(const BackwardParams& p, const RowStep& row, int64_t unit,
                                int64_t n, const LaneWeights<const void*>& w,
                                const V* d_input_gates, const V* d_hidden_gates, V* d_normal_input,
                                V* d_normal_hidden, const Add& add) {
  const SavedValues places = saved_values<Cell>(p);
  const UnitWeightPlaces own = unit_weight_places<Cell>(p);
  const auto through = [&](int64_t place, int64_t first, const NormWeights<const void*>& norm,
                           const V* d_gates, V* d_normal) {
    backward_affine<S>(p, row, unit, n, Cell::gates, place, first, norm, d_gates, d_normal, add);
  };
  if (p.variation.layer_norm == LayerNorm::joint)
    return through(places.input, own.ln_input, w.ln_input, d_hidden_gates, d_normal_input);
  through(places.input, own.ln_input, w.ln_input, d_input_gates, d_normal_input);
  through(places.hidden, own.ln_hidden, w.ln_hidden, d_hidden_gates, d_normal_hidden);
}

// Gradients of the weights that a unit has for itself, of which either half below has some.
template <class Cell, class V>
struct UnitWeightGradients {
  V values[Cell::unit_weights > 0 ? Cell::unit_weights : 1];

  HOST_DEVICE UnitWeightGradients() {
    for (auto& value : values) value = V(0);
  }
  template <class Add>
  HOST_DEVICE void pass_to(const Add& add) const {
    for (int k = 0; k < Cell::unit_weights; ++k) add(k, values[k]);
  }
};

// The half of it down to the normalisation of c: the gradients of the last gate, of c~ as far as it does
// not come from there, and of the normalised c. `add` as in backward_affine.
template <class Cell, class S, class V, class Add>
HOST_DEVICE void backward_h_units(const BackwardParams& p, const RowStep& row, int64_t unit,
                                  int64_t n, V d_h, const LaneWeights<const void*>& w,
                                  Compute<S>* d_c_state, V& d_last_gate, V& d_c, V& d_normal,
                                  const Factors<V>& factors, const Add& add) {
  const int64_t place = saved_values<Cell>(p).c;
  const V inside = affine<S>(saved_value<S, V>(p, row, unit, n, place), w.ln_c, unit, n);
  V before, c;
  load_cells<Cell, S>(p, row, unit, n, before, c);
  d_c = collect_d_cell<S, V>(p, row, unit, n, d_c_state);
  Memory<V>::store(row.reset ? V(0) : factors.zone_c * d_c, d_c_state, n);
  d_c = (V(1) - factors.zone_c) * d_c;
  V saved[Cell::saved];
  for (int i = 0; i < Cell::saved; ++i) saved[i] = saved_value<S, V>(p, row, unit, n, i);
  const UnitWeights<Cell, V> weights(static_cast<const S*>(w.weight_ch), p.H, unit, n);
  UnitWeightGradients<Cell, V> d_weight_ch;
  V d_inside =
      Cell::backward_h(saved, weights.values, c, inside, d_h, d_c, d_last_gate, d_weight_ch.values);
  if (p.variation.layer_norm == LayerNorm::joint) {
    d_inside = d_inside + d_c;
    d_c = V(0);
  }
  d_weight_ch.pass_to(add);
  backward_affine<S>(p, row, unit, n, 1, place, unit_weight_places<Cell>(p).ln_c, w.ln_c, &d_inside,
                     &d_normal, add);
}

// The half above it. d_c is the whole gradient of c~, that of the last gate is there already.
template <class Cell, class S, class V, class Add>
HOST_DEVICE void backward_c_units(const BackwardParams& p, const RowStep& row, int64_t unit,
                                  int64_t n, V d_c, const LaneWeights<const void*>& w,
                                  Compute<S>* d_h_state, Compute<S>* d_c_state, V* d_gates,
                                  const Add& add) {
  State<V> prev{V(0), V(0)}, d_prev{V(0), V(0)};
  V after;
  load_cells<Cell, S>(p, row, unit, n, prev.c, after);
  if constexpr (Cell::reads_prev_h) prev.h = previous_hidden<S, V>(p, row, unit, n);
  V saved[Cell::saved];
  for (int i = 0; i < Cell::saved; ++i) saved[i] = saved_value<S, V>(p, row, unit, n, i);
  const UnitWeights<Cell, V> weights(static_cast<const S*>(w.weight_ch), p.H, unit, n);
  UnitWeightGradients<Cell, V> d_weight_ch;
  Cell::backward_c(saved, weights.values, prev, d_c, d_gates, d_weight_ch.values, d_prev);
  d_weight_ch.pass_to(add);
  if constexpr (Cell::reads_prev_h)
    if (!row.reset) Memory<V>::store(Memory<V>::load(d_h_state, n) + d_prev.h, d_h_state, n);
  d_prev.c = d_prev.c + Memory<V>::load(d_c_state, n);
  Memory<V>::store(row.reset ? V(0) : d_prev.c, d_c_state, n);
}

// What the late gate's product read at `n` units from `unit`. keep is that of Factors.
template <class Cell, class S, class V>
HOST_DEVICE V read_units(const BackwardParams& p, const RowStep& row, int64_t unit, int64_t n,
                         V keep) {
  State<V> prev{previous_hidden<S, V>(p, row, unit, n), V(0)};
  if constexpr (is_varied<Cell>) prev.h = prev.h * keep;
  V saved[Cell::gates - 1];
  for (int i = 0; i < Cell::gates - 1; ++i) saved[i] = saved_value<S, V>(p, row, unit, n, i);
  return Cell::read(saved, prev);
}

// The rest of it for a cell with a late gate, once the product of that gate's gradient has given d_read:
// returns the gradient of the first gate, and adds to d_h_state what flows through read. If row.reset,
// d_read has to be zero.
template <class Cell, class S, class V>
HOST_DEVICE V backward_early_units(const BackwardParams& p, const RowStep& row, int64_t unit,
                                   int64_t n, V d_read, Compute<S>* d_h_state, V keep) {
  State<V> prev{previous_hidden<S, V>(p, row, unit, n), V(0)}, d_prev{V(0), V(0)};
  const V passed_by = Memory<V>::load(d_h_state, n);
  if constexpr (is_varied<Cell>)
    prev.h = prev.h * keep;
  else
    d_prev.h = passed_by;
  V saved[Cell::saved];
  for (int i = 0; i < Cell::saved; ++i) saved[i] = saved_value<S, V>(p, row, unit, n, i);
  const V d_gate = Cell::backward_early(saved, prev, d_read, d_prev);
  if constexpr (is_varied<Cell>) d_prev.h = passed_by + d_prev.h * keep;
  Memory<V>::store(d_prev.h, d_h_state, n);
  return d_gate;
}

}  // namespace fused_rnn
