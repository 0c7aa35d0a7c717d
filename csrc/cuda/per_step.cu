// The general CUDA engine: any cell, shape and storage type, on any GPU.
//
// Per timestep one matrix product (the library's) and one kernel around the cell (step.h), which takes
// both gate products and does everything else: ragged time, resets, reserve, outputs. With a
// projection, a product and a kernel more, as with a late gate (cells/cell.h), whose first product is of
// the early gates alone.
//
//   forward    hidden_gates (L, B, G*H) = h (L, B, P) W_hh^T       then forward_kernel
//   backward   d_h (L, B, P) = d_gates (L, B, G*H) W_hh            then backward_kernel
//
// and with a late gate, E = G - 1 early ones, the rows of W_hh being W_early, then W_late:
//
//   forward    hidden_gates (L, B, E*H) = h (L, B, H) W_early^T    then forward_early_kernel
//              late (L, B, H) = read (L, B, H) W_late^T            then forward_kernel
//   backward   d_h (L, B, H) = d_gates (L, B, E*H) W_early         then backward_kernel
//              d_read (L, B, H) = d_late (L, B, H) W_late          then backward_early_kernel
//
// Under layer_norm the kernel around the cell has a block for a row instead: a normalisation needs the sums
// over all of a row's units, and a row's units are in one place then, so that a timestep still has one
// launch and only sums are exchanged. What passes from one phase to the next lies in scratch, where each
// thread reads back its own.
//
// A thread owns one hidden unit of one row of one lane: x runs over units, so that every load and
// store of a warp is contiguous; y over rows, striding; z over lanes. State stays in global memory: h
// and d_gates in the storage type, as the products' operands; c and the gradients carried from step to
// step in the compute type. All of it is on one stream, without a word to the host.
#include "per_step.h"

#include "../cells/cells.h"
#include "../dtype.h"
#include "../step.h"
#include "device.cuh"
#include "varied.cuh"

namespace fused_rnn::cuda {
namespace {

// Engine state, per lane and row. Absent ones are null.
template <class S>
struct ForwardState {
  S* h;              // (L, B, P)
  Compute<S>* c;     // (L, B, H)
  S* unprojected;    // (L, B, H)
  S* hidden_gates;   // (L, B, G*H): this step's product
  S* projected;      // (L, B, P): this step's second product
  Compute<S>* keep;  // (L, B, P): the factors of recurrent dropout
  // (L, B, 2, H), under layer_norm: c~, and the last value that its half of the cell saves.
  Compute<S>* passing;
  // With a late gate hidden_gates is (L, B, E*H), followed by `late`:
  Compute<S>* early;  // (L, B, E*H): the early gates
  S* read;            // (L, B, H): what the late gate's product reads
  S* late;            // (L, B, H): that product
};

template <class S>
struct BackwardState {
  S* d_gates;        // (L, B, G*H)
  S* product;        // (L, B, P): d_gates W_hh
  Compute<S>* d_h;   // (L, B, P): passed on to h directly
  Compute<S>* d_c;   // (L, B, H)
  S* d_output;       // (L, B, P): whole gradient of the projected h
  S* d_unprojected;  // (L, B, H): d_output W_hr
  // With a late gate d_gates is (L, B, E*H), followed by d_late:
  S* d_late;  // (L, B, H)
  S* d_read;  // (L, B, H): d_late W_late
  // (L, B, 3 if there is c + 2*G, H), under layer_norm: gradients of the last gate, of c~ by itself and of
  // the normalised c, then of the normalised input (or joint) gates and hidden gates.
  Compute<S>* passing;
};

template <class Cell>
constexpr int early_gates = Cell::gates - Cell::late_gate;

DEVICE int64_t unit_index() { return int64_t(block_index().x) * block_size() + thread_index(); }
DEVICE int64_t row_index() { return block_index().y; }
DEVICE int64_t row_stride() { return grid_size().y; }
DEVICE int64_t lane_index() { return block_index().z; }

template <class S>
DEVICE const S* of_lane(const void* weights, int64_t n, int64_t lane) {
  return weights ? static_cast<const S*>(weights) + lane * n : nullptr;
}

template <class S>
DEVICE NormWeights<const void*> of_lane(const NormWeights<const void*>& norm, int64_t n,
                                        int64_t lane) {
  return {of_lane<S>(norm.weight, n, lane), of_lane<S>(norm.bias, n, lane)};
}

// What a lane's units have of weights beside the products'.
template <class Cell, class S, class Params>
DEVICE LaneWeights<const void*> weights_of(const Params& p, int64_t lane) {
  LaneWeights<const void*> w{};
  w.weight_ch = weight_ch_of<Cell, S>(p, lane);
  w.ln_input = of_lane<S>(p.norms.input, Cell::gates * p.H, lane);
  w.ln_hidden = of_lane<S>(p.norms.hidden, Cell::gates * p.H, lane);
  w.ln_c = of_lane<S>(p.norms.c, p.H, lane);
  return w;
}

template <class T>
HOST_DEVICE T* at(T* state, int64_t B, int64_t n, int64_t lane, int64_t b) {
  return state ? state + (lane * B + b) * n : nullptr;
}

template <class Cell, class S>
KERNEL void load_initial_kernel(RecurrenceForwardParams p, ForwardState<S> state) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (unit < p.P) {
      V h = initial_state<S, V>(p, p.hx, p.h_n, p.P, lane, b, unit, 1);
      if constexpr (is_varied<Cell>)
        if (state.keep) {
          const V keep = draw_keep<V>(p, lane, b, unit);
          at(state.keep, p.B, p.P, lane, b)[unit] = keep;
          h = h * keep;
        }
      Memory<V>::store(h, at(state.h, p.B, p.P, lane, b) + unit, 1);
    }
    if constexpr (Cell::has_c)
      if (unit < p.H)
        at(state.c, p.B, p.H, lane, b)[unit] =
            initial_state<S, V>(p, p.cx, p.c_n, p.H, lane, b, unit, 1);
  }
}

// A unit's gates from `first` to `end` as the products left them, and `bias`, the lanes' b_hh or null.
// `product` is the unit's, of gate `first`.
template <class Cell, class S, class V>
DEVICE void load_gates(const RecurrenceForwardParams& p, const RowStep& row, int64_t unit,
                       int first, int end, const S* product, const S* bias, V* input_gates,
                       V* hidden_gates) {
  const S* inputs = p.input_gates.at<S>(row.t, row.b, row.lane) + unit;
  for (int g = first; g < end; ++g) {
    input_gates[g] = Memory<V>::load(inputs + g * p.H, 1);
    hidden_gates[g] = Memory<V>::load(product + (g - first) * p.H, 1);
    if (bias)
      hidden_gates[g] =
          hidden_gates[g] + Memory<V>::load(bias + (row.lane * Cell::gates + g) * p.H + unit, 1);
  }
}

// Where a cell leaves its h.
template <class S>
DEVICE S* new_h(const Shape& p, const ForwardState<S>& state, int64_t lane, int64_t b) {
  return p.projected ? at(state.unprojected, p.B, p.H, lane, b) : at(state.h, p.B, p.P, lane, b);
}

// The early gates of a cell with a late one.
template <class Cell, class S>
KERNEL void forward_early_kernel(RecurrenceForwardParams p, ForwardState<S> state, int64_t step) {
  using V = Compute<S>;
  constexpr int E = early_gates<Cell>;
  const int64_t unit = unit_index(), lane = lane_index();
  const int64_t t = time_of_step(p, lane, step);
  const S* bias = static_cast<const S*>(p.bias_hh);
  if (unit >= p.H) return;
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (t >= row_length(p, b)) continue;
    V input_gates[E], hidden_gates[E];
    load_gates<Cell>(p, row_step(p, lane, b, t), unit, 0, E,
                     at(state.hidden_gates, p.B, E * p.H, lane, b) + unit, bias, input_gates,
                     hidden_gates);
    forward_early_units<Cell, S>(1, input_gates, hidden_gates,
                                 at(state.h, p.B, p.P, lane, b) + unit,
                                 at(state.early, p.B, E * p.H, lane, b) + unit, p.H,
                                 at(state.read, p.B, p.H, lane, b) + unit);
  }
}

template <class Cell, class S>
KERNEL void forward_kernel(RecurrenceForwardParams p, ForwardState<S> state, int64_t step) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  const int64_t t = time_of_step(p, lane, step);
  if (unit >= p.H) return;
  const S* bias = static_cast<const S*>(p.bias_hh);
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (t >= row_length(p, b)) continue;
    const RowStep row = row_step(p, lane, b, t);
    V input_gates[Cell::gates], hidden_gates[Cell::gates];
    constexpr int first = Cell::late_gate ? Cell::gates - 1 : 0;
    const S* product = Cell::late_gate ? at(state.late, p.B, p.H, lane, b)
                                       : at(state.hidden_gates, p.B, Cell::gates * p.H, lane, b);
    load_gates<Cell>(p, row, unit, first, Cell::gates, product + unit, bias, input_gates,
                     hidden_gates);
    Factors<V> factors;
    if constexpr (is_varied<Cell>)
      factors = factors_of(p, row, unit, !p.projected, true, state.keep);
    S* h = new_h(p, state, lane, b) + unit;
    forward_units<Cell, S>(
        p, row, unit, 1, input_gates, hidden_gates, weight_ch_of<Cell, S>(p, lane), h,
        Cell::has_c ? at(state.c, p.B, p.H, lane, b) + unit : nullptr, h, factors,
        Cell::late_gate ? at(state.early, p.B, early_gates<Cell> * p.H, lane, b) + unit : nullptr,
        p.H);
  }
}

// The same under layer_norm, by a block.
template <class Cell, class S>
KERNEL void forward_row_kernel(RecurrenceForwardParams p, ForwardState<S> state, int64_t step) {
  using V = Compute<S>;
  const int64_t lane = lane_index(), b = block_index().x;
  const int64_t t = time_of_step(p, lane, step);
  if (t >= row_length(p, b)) return;
  const RowStep row = row_step(p, lane, b, t);
  const bool joint = p.variation.layer_norm == LayerNorm::joint;
  LaneWeights<const void*> w = weights_of<Cell, S>(p, lane);
  w.bias_ih = of_lane<S>(p.bias_ih, Cell::gates * p.H, lane);
  w.bias_hh = of_lane<S>(p.bias_hh, Cell::gates * p.H, lane);
  const S* bias = joint ? static_cast<const S*>(p.bias_hh) : nullptr;
  const S* products = at(state.hidden_gates, p.B, Cell::gates * p.H, lane, b);
  const auto load = [&](int64_t unit, V* input_gates, V* hidden_gates) {
    load_gates<Cell>(p, row, unit, 0, Cell::gates, products + unit, bias, input_gates,
                     hidden_gates);
    for (int g = 0; joint && g < Cell::gates; ++g)
      input_gates[g] = input_gates[g] + hidden_gates[g];
  };
  Moments<V> of_gates[2];
  row_moments(
      p.H, Cell::gates * p.H, p.variation.layer_norm_eps,
      [&](int64_t unit, const auto& visit) {
        V input_gates[Cell::gates], hidden_gates[Cell::gates];
        load(unit, input_gates, hidden_gates);
        for (int g = 0; g < Cell::gates; ++g) {
          visit(0, input_gates[g]);
          visit(1, hidden_gates[g]);
        }
      },
      of_gates);
  const auto factors = [&](int64_t unit) {
    return factors_of(p, row, unit, !p.projected, true, state.keep);
  };
  V* const c_state = Cell::has_c ? at(state.c, p.B, p.H, lane, b) : nullptr;
  V* const passing = at(state.passing, p.B, 2 * p.H, lane, b);
  S* const h = new_h(p, state, lane, b);
  own_units(p.H, [&](int64_t unit) {
    V input_gates[Cell::gates], hidden_gates[Cell::gates];
    load(unit, input_gates, hidden_gates);
    normalise_gates<Cell, S>(p, row, unit, 1, w, of_gates[0], of_gates[1], input_gates,
                             hidden_gates);
    if constexpr (Cell::has_c)
      forward_c_units<Cell, S>(p, row, unit, 1, input_gates, hidden_gates, w.weight_ch,
                               c_state + unit, passing[unit], passing[p.H + unit]);
    else
      forward_units<Cell, S>(p, row, unit, 1, input_gates, hidden_gates, w.weight_ch, h + unit,
                             c_state, h + unit, factors(unit));
  });
  V* const statistics =
      p.statistics && thread_index() == 0 ? statistics_at<Cell, V>(p, p.statistics, row) : nullptr;
  if (statistics) {
    statistics[0] = of_gates[0].scale;
    if (!joint) statistics[1] = of_gates[1].scale;
  }
  if constexpr (Cell::has_c) {
    Moments<V> of_c[1];
    row_moments(
        p.H, p.H, p.variation.layer_norm_eps,
        [&](int64_t unit, const auto& visit) { visit(0, passing[unit]); }, of_c);
    own_units(p.H, [&](int64_t unit) {
      forward_h_units<Cell, S>(p, row, unit, 1, of_c[0], passing[unit], passing[p.H + unit], w,
                               c_state + unit, h + unit, factors(unit));
    });
    if (statistics) statistics[norm_of_c(p.variation.layer_norm)] = of_c[0].scale;
  }
}

template <bool varied, class S>
KERNEL void project_kernel(RecurrenceForwardParams p, ForwardState<S> state, int64_t step) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  const int64_t t = time_of_step(p, lane, step);
  if (unit >= p.P) return;
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (t >= row_length(p, b)) continue;
    const RowStep row = row_step(p, lane, b, t);
    Factors<V> factors;
    if constexpr (varied) factors = factors_of(p, row, unit, true, false, state.keep);
    emit_hidden<varied, S>(p, row, unit, 1,
                           Memory<V>::load(at(state.projected, p.B, p.P, lane, b) + unit, 1),
                           at(state.h, p.B, p.P, lane, b) + unit, factors);
  }
}

template <class V>
DEVICE V* keep_at(const RecurrenceBackwardParams& p, int64_t lane, int64_t b, int64_t unit) {
  return static_cast<V*>(p.keep) + (lane * p.B + b) * p.P + unit;
}

template <class Cell, class S>
KERNEL void load_final_kernel(RecurrenceBackwardParams p, BackwardState<S> state) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (unit < p.P) {
      at(state.d_h, p.B, p.P, lane, b)[unit] = load_or_zero<V>(
          p.grad_h_n ? state_at<S>(p.grad_h_n, p.B, p.P, lane, b) + unit : nullptr, 1);
      if constexpr (is_varied<Cell>)
        if (p.keep) *keep_at<V>(p, lane, b, unit) = draw_keep<V>(p, lane, b, unit);
    }
    if constexpr (Cell::has_c)
      if (unit < p.H)
        at(state.d_c, p.B, p.H, lane, b)[unit] = load_or_zero<V>(
            p.grad_c_n ? state_at<S>(p.grad_c_n, p.B, p.H, lane, b) + unit : nullptr, 1);
  }
}

// Sums up the gradients of weights that a unit has for itself: add(k, value) for weight k.
template <class Cell, class S>
DEVICE auto unit_adder(const RecurrenceBackwardParams& p, const RowStep& row, int64_t unit) {
  using V = Compute<S>;
  const int64_t count = unit_weight_places<Cell>(p).count;
  V* const sums = static_cast<V*>(p.d_unit_weights) + (row.lane * p.B + row.b) * count * p.H + unit;
  return [sums, H = p.H](int64_t k, V value) { sums[k * H] = sums[k * H] + value; };
}

// Leaves a unit's gradients where the next product and those over all steps find them.
template <class Cell, class S, class V>
DEVICE void store_gates(const RecurrenceBackwardParams& p, const BackwardState<S>& state,
                        const RowStep& row, int64_t unit, const V* d_input_gates,
                        const V* d_hidden_gates) {
  const bool split = is_varied<Cell> ? p.d_hidden_gates.data != nullptr : Cell::split_gates;
  S* d_inputs = p.d_input_gates.at<S>(row.t, row.b, row.lane) + unit;
  S* d_gates = at(state.d_gates, p.B, early_gates<Cell> * p.H, row.lane, row.b) + unit;
  for (int g = Cell::late_gate ? 1 : 0; g < Cell::gates; ++g) {
    Memory<V>::store(d_input_gates[g], d_inputs + g * p.H, 1);
    if (split)
      Memory<V>::store(d_hidden_gates[g],
                       p.d_hidden_gates.at<S>(row.t, row.b, row.lane) + g * p.H + unit, 1);
    const bool late = Cell::late_gate && g == Cell::gates - 1;
    S* d_gate = late ? at(state.d_late, p.B, p.H, row.lane, row.b) + unit : d_gates + g * p.H;
    Memory<V>::store(row.reset ? V(0) : d_hidden_gates[g], d_gate, 1);
  }
}

template <class Cell, class S>
DEVICE void backward_unit(const RecurrenceBackwardParams& p, const BackwardState<S>& state,
                          const RowStep& row, int64_t unit, Compute<S> d_h,
                          const Factors<Compute<S>>& factors) {
  using V = Compute<S>;
  V d_input_gates[Cell::gates], d_hidden_gates[Cell::gates];
  V d_weight_ch[Cell::unit_weights > 0 ? Cell::unit_weights : 1];
  backward_units<Cell, S>(p, row, unit, 1, load_results<Cell, S, V>(p, row, unit, 1), d_h,
                          weight_ch_of<Cell, S>(p, row.lane),
                          at(state.d_h, p.B, p.P, row.lane, row.b) + unit,
                          Cell::has_c ? at(state.d_c, p.B, p.H, row.lane, row.b) + unit : nullptr,
                          d_input_gates, d_hidden_gates, d_weight_ch, factors);
  if constexpr (Cell::unit_weights > 0)
    for (int k = 0; k < Cell::unit_weights; ++k)
      unit_adder<Cell, S>(p, row, unit)(k, d_weight_ch[k]);
  store_gates<Cell>(p, state, row, unit, d_input_gates, d_hidden_gates);
}

// The whole gradient of what a unit gave.
template <bool varied, class S, class V>
DEVICE V d_hidden_of(const RecurrenceBackwardParams& p, const BackwardState<S>& state,
                     const RowStep& row, int64_t unit, const Factors<V>& factors) {
  return collect_d_hidden<varied, S>(
      p, row, unit, 1, Memory<V>::load(at(state.product, p.B, p.P, row.lane, row.b) + unit, 1),
      at(state.d_h, p.B, p.P, row.lane, row.b) + unit, factors);
}

// The whole gradient of h_t and, without a projection, the cell's backward.
template <class Cell, class S>
KERNEL void backward_kernel(RecurrenceBackwardParams p, BackwardState<S> state, int64_t step) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  const int64_t t = time_of_step(p, lane, p.T - 1 - step);
  if (unit >= p.P) return;
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (t >= row_length(p, b)) continue;
    const RowStep row = row_step(p, lane, b, t);
    Factors<V> factors;
    if constexpr (is_varied<Cell>)
      factors = factors_of(p, row, unit, true, !p.projected, static_cast<const V*>(p.keep));
    const V d_h = d_hidden_of<is_varied<Cell>>(p, state, row, unit, factors);
    if (p.projected) {
      Memory<V>::store(d_h, at(state.d_output, p.B, p.P, lane, b) + unit, 1);
      Memory<V>::store(d_h, p.d_output.at<S>(t, b, lane) + unit, 1);
    } else {
      backward_unit<Cell>(p, state, row, unit, d_h, factors);
    }
  }
}

// The gate that waited for d_read.
template <class Cell, class S>
KERNEL void backward_early_kernel(RecurrenceBackwardParams p, BackwardState<S> state,
                                  int64_t step) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  const int64_t t = time_of_step(p, lane, p.T - 1 - step);
  if (unit >= p.H) return;
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (t >= row_length(p, b)) continue;
    const V d_gate = backward_early_units<Cell, S>(
        p, row_step(p, lane, b, t), unit, 1,
        Memory<V>::load(at(state.d_read, p.B, p.H, lane, b) + unit, 1),
        at(state.d_h, p.B, p.P, lane, b) + unit,
        is_varied<Cell> && p.keep ? *keep_at<V>(p, lane, b, unit) : V(1));
    Memory<V>::store(d_gate, p.d_input_gates.at<S>(t, b, lane) + unit, 1);
    Memory<V>::store(d_gate, at(state.d_gates, p.B, early_gates<Cell> * p.H, lane, b) + unit, 1);
  }
}

template <class Cell, class S>
KERNEL void backward_projected_kernel(RecurrenceBackwardParams p, BackwardState<S> state,
                                      int64_t step) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  const int64_t t = time_of_step(p, lane, p.T - 1 - step);
  if (unit >= p.H) return;
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (t >= row_length(p, b)) continue;
    const RowStep row = row_step(p, lane, b, t);
    Factors<V> factors;
    if constexpr (is_varied<Cell>) factors = factors_of<V>(p, row, unit, false, true, nullptr);
    backward_unit<Cell>(p, state, row, unit,
                        Memory<V>::load(at(state.d_unprojected, p.B, p.H, lane, b) + unit, 1),
                        factors);
  }
}

// The cell's backward under layer_norm, by a block; without a projection the whole gradient of h_t too.
template <class Cell, class S>
KERNEL void backward_row_kernel(RecurrenceBackwardParams p, BackwardState<S> state, int64_t step) {
  using V = Compute<S>;
  constexpr int G = Cell::gates;
  const int64_t lane = lane_index(), b = block_index().x;
  const int64_t t = time_of_step(p, lane, p.T - 1 - step);
  if (t >= row_length(p, b)) return;
  const RowStep row = row_step(p, lane, b, t);
  const LaneWeights<const void*> w = weights_of<Cell, S>(p, lane);
  const SavedValues places = saved_values<Cell>(p);
  const bool separate = p.variation.layer_norm == LayerNorm::separate;
  const V* statistics = statistics_at<Cell, const V>(p, p.statistics, row);
  constexpr int of_c = Cell::has_c ? 3 : 0;
  V* const passing = at(state.passing, p.B, (of_c + 2 * G) * p.H, lane, b);
  const auto passed = [&](int i, int64_t unit) -> V& { return passing[i * p.H + unit]; };
  const auto normal = [&](int64_t place, int64_t unit) {
    return saved_value<S, V>(p, row, unit, 1, place);
  };
  V sums_of_gates[4] =
      {};  // of d_normal and of d_normal * normal, of input gates and of hidden ones
  const auto pass_gates = [&](int64_t unit, const V* d_input_gates, const V* d_hidden_gates) {
    V d_normal[2][G];
    backward_gates<Cell, S>(p, row, unit, 1, w, d_input_gates, d_hidden_gates, d_normal[0],
                            d_normal[1], unit_adder<Cell, S>(p, row, unit));
    for (int g = 0; g < G; ++g) {
      passed(of_c + g, unit) = d_normal[0][g];
      sums_of_gates[0] = sums_of_gates[0] + d_normal[0][g];
      sums_of_gates[1] = sums_of_gates[1] + d_normal[0][g] * normal(places.input + g, unit);
      if (!separate) continue;
      passed(of_c + G + g, unit) = d_normal[1][g];
      sums_of_gates[2] = sums_of_gates[2] + d_normal[1][g];
      sums_of_gates[3] = sums_of_gates[3] + d_normal[1][g] * normal(places.hidden + g, unit);
    }
  };
  const auto through = [](V scale, const V* sums, int64_t count) {
    return NormGradient<V>{scale, sums[0] / static_cast<V>(count), sums[1] / static_cast<V>(count)};
  };
  V sums_of_c[2] = {};
  own_units(p.H, [&](int64_t unit) {
    const auto factors =
        factors_of(p, row, unit, !p.projected, true, static_cast<const V*>(p.keep));
    const V d_h = p.projected
                      ? Memory<V>::load(at(state.d_unprojected, p.B, p.H, lane, b) + unit, 1)
                      : d_hidden_of<true>(p, state, row, unit, factors);
    if constexpr (Cell::has_c) {
      V d_last_gate, d_c, d_normal;
      backward_h_units<Cell, S>(p, row, unit, 1, d_h, w, at(state.d_c, p.B, p.H, lane, b) + unit,
                                d_last_gate, d_c, d_normal, factors,
                                unit_adder<Cell, S>(p, row, unit));
      passed(0, unit) = d_last_gate;
      passed(1, unit) = d_c;
      passed(2, unit) = d_normal;
      sums_of_c[0] = sums_of_c[0] + d_normal;
      sums_of_c[1] = sums_of_c[1] + d_normal * normal(places.c, unit);
    } else {
      V d_input_gates[G], d_hidden_gates[G];
      UnitWeightGradients<Cell, V> d_weight_ch;
      backward_units<Cell, S, V>(p, row, unit, 1, load_results<Cell, S, V>(p, row, unit, 1), d_h,
                                 w.weight_ch, at(state.d_h, p.B, p.P, lane, b) + unit, nullptr,
                                 d_input_gates, d_hidden_gates, d_weight_ch.values, factors);
      d_weight_ch.pass_to(unit_adder<Cell, S>(p, row, unit));
      pass_gates(unit, d_input_gates, d_hidden_gates);
    }
  });
  if constexpr (Cell::has_c) {
    block_sums(sums_of_c);
    const NormGradient<V> through_c =
        through(statistics[norm_of_c(p.variation.layer_norm)], sums_of_c, p.H);
    own_units(p.H, [&](int64_t unit) {
      V d_gates[G];
      d_gates[G - 1] = passed(0, unit);
      const V d_c = passed(1, unit) + through_c.at(passed(2, unit), normal(places.c, unit));
      backward_c_units<Cell, S>(p, row, unit, 1, d_c, w, at(state.d_h, p.B, p.P, lane, b) + unit,
                                at(state.d_c, p.B, p.H, lane, b) + unit, d_gates,
                                unit_adder<Cell, S>(p, row, unit));
      pass_gates(unit, d_gates, d_gates);
    });
  }
  block_sums(sums_of_gates);
  const NormGradient<V> input = through(statistics[0], sums_of_gates, G * p.H);
  const NormGradient<V> hidden = through(statistics[separate], sums_of_gates + 2, G * p.H);
  own_units(p.H, [&](int64_t unit) {
    V d_input_gates[G], d_hidden_gates[G];
    for (int g = 0; g < G; ++g) {
      d_input_gates[g] = input.at(passed(of_c + g, unit), normal(places.input + g, unit));
      d_hidden_gates[g] =
          separate ? hidden.at(passed(of_c + G + g, unit), normal(places.hidden + g, unit))
                   : d_input_gates[g];
    }
    store_gates<Cell>(p, state, row, unit, d_input_gates, d_hidden_gates);
  });
}

template <class Cell, class S>
KERNEL void finish_kernel(RecurrenceBackwardParams p, BackwardState<S> state) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (unit < p.P) {
      V product = Memory<V>::load(at(state.product, p.B, p.P, lane, b) + unit, 1);
      if constexpr (is_varied<Cell>)
        if (p.keep) product = product * *keep_at<V>(p, lane, b, unit);
      Memory<V>::store(product + at(state.d_h, p.B, p.P, lane, b)[unit],
                       state_at<S>(p.d_hx, p.B, p.P, lane, b) + unit, 1);
    }
    if constexpr (Cell::has_c)
      if (unit < p.H)
        Memory<V>::store(at(state.d_c, p.B, p.H, lane, b)[unit],
                         state_at<S>(p.d_cx, p.B, p.H, lane, b) + unit, 1);
  }
}

constexpr unsigned threads_per_block = 128;
constexpr int64_t max_grid_rows = 65535;

Grid grid_over(const Shape& p, int64_t units) {
  const int64_t blocks = (units + threads_per_block - 1) / threads_per_block;
  return {{static_cast<unsigned>(blocks),
           static_cast<unsigned>(p.B < max_grid_rows ? p.B : max_grid_rows),
           static_cast<unsigned>(p.L)},
          threads_per_block};
}

template <class S>
Grid grid_of_rows(const Shape& p) {
  constexpr int64_t most = max_warps<Compute<S>> * warp_size;
  const int64_t threads = (p.H + warp_size - 1) / warp_size * warp_size;
  return {{static_cast<unsigned>(p.B), 1, static_cast<unsigned>(p.L)},
          static_cast<unsigned>(threads < most ? threads : most)};
}

template <class T>
T* take(const Host& host, int64_t count) {
  return static_cast<T*>(host.allocate(count * sizeof(T)));
}

// The late gate's rows of W_hh, of the first lane.
template <class Cell, class S, class Params>
const S* late_weight(const Params& p) {
  return static_cast<const S*>(p.weight_hh) + early_gates<Cell> * p.H * p.P;
}

template <class Cell, class S>
void forward(const RecurrenceForwardParams& p, const Host& host) {
  const auto stream = static_cast<Stream>(host.stream);
  const int64_t rows = p.L * p.B, gate_rows = Cell::gates * p.H;
  const int64_t early_rows = early_gates<Cell> * p.H;
  ForwardState<S> state{};
  state.h = take<S>(host, rows * p.P);
  state.hidden_gates = take<S>(host, rows * gate_rows);
  if (Cell::has_c) state.c = take<Compute<S>>(host, rows * p.H);
  const bool normalised = is_varied<Cell> && p.variation.layer_norm != LayerNorm::none;
  if (normalised && Cell::has_c) state.passing = take<Compute<S>>(host, rows * 2 * p.H);
  if (p.variation.recurrent_dropout > 0) state.keep = take<Compute<S>>(host, rows * p.P);
  const auto hidden_product = host.prepare({p.dtype, state.h, p.weight_hh, state.hidden_gates, p.L,
                                            p.B, early_rows, p.P, true, gate_rows * p.P});
  std::function<void()> projection, late_product;
  if constexpr (Cell::late_gate) {
    state.early = take<Compute<S>>(host, rows * early_rows);
    state.read = take<S>(host, rows * p.H);
    state.late = state.hidden_gates + rows * early_rows;
    set_zero(state.read, rows * p.H * sizeof(S), stream);
    late_product = host.prepare({p.dtype, state.read, late_weight<Cell, S>(p), state.late, p.L, p.B,
                                 p.H, p.P, true, gate_rows * p.P});
  }
  if (p.projected) {
    state.unprojected = take<S>(host, rows * p.H);
    state.projected = take<S>(host, rows * p.P);
    // Rows that have not begun are multiplied too.
    set_zero(state.unprojected, rows * p.H * sizeof(S), stream);
    projection = host.prepare(
        {p.dtype, state.unprojected, p.weight_hr, state.projected, p.L, p.B, p.P, p.H, true});
  }
  launch(load_initial_kernel<Cell, S>, grid_over(p, p.P > p.H ? p.P : p.H), stream, p, state);
  for (int64_t step = 0; step < p.T; ++step) {
    hidden_product();
    if constexpr (Cell::late_gate) {
      launch(forward_early_kernel<Cell, S>, grid_over(p, p.H), stream, p, state, step);
      late_product();
    }
    if constexpr (is_varied<Cell> && !Cell::late_gate)
      if (normalised)
        launch(forward_row_kernel<Cell, S>, grid_of_rows<S>(p), stream, p, state, step);
    if (!normalised) launch(forward_kernel<Cell, S>, grid_over(p, p.H), stream, p, state, step);
    if (p.projected) {
      projection();
      launch(project_kernel<is_varied<Cell>, S>, grid_over(p, p.P), stream, p, state, step);
    }
  }
}

template <class Cell, class S>
void backward(const RecurrenceBackwardParams& p, const Host& host) {
  const auto stream = static_cast<Stream>(host.stream);
  const int64_t rows = p.L * p.B, gate_rows = Cell::gates * p.H;
  const int64_t early_rows = early_gates<Cell> * p.H;
  BackwardState<S> state{};
  state.d_gates = take<S>(host, rows * gate_rows);
  state.product = take<S>(host, rows * p.P);
  state.d_h = take<Compute<S>>(host, rows * p.P);
  if (Cell::has_c) state.d_c = take<Compute<S>>(host, rows * p.H);
  const bool normalised = is_varied<Cell> && p.variation.layer_norm != LayerNorm::none;
  if (normalised)
    state.passing = take<Compute<S>>(host, rows * ((Cell::has_c ? 3 : 0) * p.H + 2 * gate_rows));
  const auto hidden_product = host.prepare({p.dtype, state.d_gates, p.weight_hh, state.product, p.L,
                                            p.B, p.P, early_rows, false, gate_rows * p.P});
  std::function<void()> projection, late_product;
  if constexpr (Cell::late_gate) {
    state.d_late = state.d_gates + rows * early_rows;
    state.d_read = take<S>(host, rows * p.H);
    late_product = host.prepare({p.dtype, state.d_late, late_weight<Cell, S>(p), state.d_read, p.L,
                                 p.B, p.P, p.H, false, gate_rows * p.P});
  }
  if (p.projected) {
    state.d_output = take<S>(host, rows * p.P);
    state.d_unprojected = take<S>(host, rows * p.H);
    set_zero(state.d_output, rows * p.P * sizeof(S), stream);
    projection = host.prepare(
        {p.dtype, state.d_output, p.weight_hr, state.d_unprojected, p.L, p.B, p.H, p.P, false});
  }
  set_zero(state.d_gates, rows * gate_rows * sizeof(S), stream);
  launch(load_final_kernel<Cell, S>, grid_over(p, p.P > p.H ? p.P : p.H), stream, p, state);
  for (int64_t step = 0; step < p.T; ++step) {
    hidden_product();
    if (p.projected || !normalised)
      launch(backward_kernel<Cell, S>, grid_over(p, p.P), stream, p, state, step);
    if constexpr (Cell::late_gate) {
      late_product();
      launch(backward_early_kernel<Cell, S>, grid_over(p, p.H), stream, p, state, step);
    }
    if (p.projected) projection();
    if constexpr (is_varied<Cell> && !Cell::late_gate)
      if (normalised)
        launch(backward_row_kernel<Cell, S>, grid_of_rows<S>(p), stream, p, state, step);
    if (p.projected && !normalised)
      launch(backward_projected_kernel<Cell, S>, grid_over(p, p.H), stream, p, state, step);
  }
  hidden_product();
  launch(finish_kernel<Cell, S>, grid_over(p, p.P > p.H ? p.P : p.H), stream, p, state);
}

template <class Params>
using Engine = void (*)(const Params&, const Host&);

// Tables in the order of cells.h and of DType.
#define FUSED_RNN_ROW(function, cell)                                            \
  {function<cell, float>, function<cell, double>,      function<cell, BFloat16>, \
   function<cell, Half>,  function<cell, Dual<float>>, function<cell, Dual<double>>},
#define FUSED_RNN_ROWS(function, cell) \
  {FUSED_RNN_ROW(function, cell) FUSED_RNN_ROW(function, Varied<cell>)},
#define FUSED_RNN_FORWARD(name, cell) FUSED_RNN_ROWS(forward, cell)
#define FUSED_RNN_BACKWARD(name, cell) FUSED_RNN_ROWS(backward, cell)

constexpr Engine<RecurrenceForwardParams> forward_table[][2][6] = {
    FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_FORWARD)};
constexpr Engine<RecurrenceBackwardParams> backward_table[][2][6] = {
    FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_BACKWARD)};

}  // namespace

void run_per_step(CellId cell, const RecurrenceForwardParams& p, const Host& host) {
  forward_table[cell.index][cell.varied][static_cast<int>(p.dtype)](p, host);
}

void run_per_step(CellId cell, const RecurrenceBackwardParams& p, const Host& host) {
  backward_table[cell.index][cell.varied][static_cast<int>(p.dtype)](p, host);
}

}  // namespace fused_rnn::cuda
