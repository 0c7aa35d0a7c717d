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
// A thread owns one hidden unit of one row of one lane: x runs over units, so that every load and
// store of a warp is contiguous; y over rows, striding; z over lanes. State stays in global memory: h
// and d_gates in the storage type, as the products' operands; c and the gradients carried from step to
// step in the compute type. All of it is on one stream, without a word to the host.
#include "per_step.h"

#include "../cells/cells.h"
#include "../dtype.h"
#include "../step.h"
#include "device.cuh"

namespace fused_rnn::cuda {
namespace {

// Engine state, per lane and row. Absent ones are null.
template <class S>
struct ForwardState {
  S* h;             // (L, B, P)
  Compute<S>* c;    // (L, B, H)
  S* unprojected;   // (L, B, H)
  S* hidden_gates;  // (L, B, G*H): this step's product
  S* projected;     // (L, B, P): this step's second product
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
};

template <class Cell>
constexpr int early_gates = Cell::gates - Cell::late_gate;

DEVICE int64_t unit_index() { return int64_t(block_index().x) * block_size() + thread_index(); }
DEVICE int64_t row_index() { return block_index().y; }
DEVICE int64_t row_stride() { return grid_size().y; }
DEVICE int64_t lane_index() { return block_index().z; }

// The lane's own weights of the cell, if it has such.
template <class Cell, class S, class Params>
DEVICE const S* weight_ch_of(const Params& p, int64_t lane) {
  if constexpr (Cell::unit_weights > 0)
    return static_cast<const S*>(p.weight_ch) + lane * Cell::unit_weights * p.H;
  else
    return nullptr;
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
    if (unit < p.P)
      Memory<V>::store(initial_state<S, V>(p, p.hx, p.h_n, p.P, lane, b, unit, 1),
                       at(state.h, p.B, p.P, lane, b) + unit, 1);
    if constexpr (Cell::has_c)
      if (unit < p.H)
        at(state.c, p.B, p.H, lane, b)[unit] =
            initial_state<S, V>(p, p.cx, p.c_n, p.H, lane, b, unit, 1);
  }
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
    const S* inputs = p.input_gates.at<S>(t, b, lane) + unit;
    const S* products = at(state.hidden_gates, p.B, E * p.H, lane, b) + unit;
    for (int g = 0; g < E; ++g) {
      input_gates[g] = Memory<V>::load(inputs + g * p.H, 1);
      hidden_gates[g] = Memory<V>::load(products + g * p.H, 1);
      if (bias)
        hidden_gates[g] =
            hidden_gates[g] + Memory<V>::load(bias + (lane * Cell::gates + g) * p.H + unit, 1);
    }
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
    const S* inputs = p.input_gates.at<S>(t, b, lane) + unit;
    constexpr int first = Cell::late_gate ? Cell::gates - 1 : 0;
    const S* product = (Cell::late_gate ? at(state.late, p.B, p.H, lane, b)
                                        : at(state.hidden_gates, p.B, Cell::gates * p.H, lane, b)) +
                       unit;
    for (int g = first; g < Cell::gates; ++g) {
      input_gates[g] = Memory<V>::load(inputs + g * p.H, 1);
      hidden_gates[g] = Memory<V>::load(product + (g - first) * p.H, 1);
      if (bias)
        hidden_gates[g] =
            hidden_gates[g] + Memory<V>::load(bias + (lane * Cell::gates + g) * p.H + unit, 1);
    }
    S* h = p.projected ? at(state.unprojected, p.B, p.H, lane, b) : at(state.h, p.B, p.P, lane, b);
    forward_units<Cell, S>(
        p, row, unit, 1, input_gates, hidden_gates, weight_ch_of<Cell, S>(p, lane), h + unit,
        Cell::has_c ? at(state.c, p.B, p.H, lane, b) + unit : nullptr, h + unit, {},
        Cell::late_gate ? at(state.early, p.B, early_gates<Cell> * p.H, lane, b) + unit : nullptr,
        p.H);
  }
}

template <class S>
KERNEL void project_kernel(RecurrenceForwardParams p, ForwardState<S> state, int64_t step) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  const int64_t t = time_of_step(p, lane, step);
  if (unit >= p.P) return;
  for (int64_t b = row_index(); b < p.B; b += row_stride())
    if (t < row_length(p, b))
      emit_hidden<false, S>(p, row_step(p, lane, b, t), unit, 1,
                            Memory<V>::load(at(state.projected, p.B, p.P, lane, b) + unit, 1),
                            at(state.h, p.B, p.P, lane, b) + unit);
}

template <class Cell, class S>
KERNEL void load_final_kernel(RecurrenceBackwardParams p, BackwardState<S> state) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (unit < p.P)
      at(state.d_h, p.B, p.P, lane, b)[unit] = load_or_zero<V>(
          p.grad_h_n ? state_at<S>(p.grad_h_n, p.B, p.P, lane, b) + unit : nullptr, 1);
    if constexpr (Cell::has_c)
      if (unit < p.H)
        at(state.d_c, p.B, p.H, lane, b)[unit] = load_or_zero<V>(
            p.grad_c_n ? state_at<S>(p.grad_c_n, p.B, p.H, lane, b) + unit : nullptr, 1);
  }
}

template <class Cell, class S>
DEVICE void backward_unit(const RecurrenceBackwardParams& p, const BackwardState<S>& state,
                          const RowStep& row, int64_t unit, Compute<S> d_h) {
  using V = Compute<S>;
  V d_input_gates[Cell::gates], d_hidden_gates[Cell::gates];
  V d_weight_ch[Cell::unit_weights > 0 ? Cell::unit_weights : 1];
  backward_units<Cell, S>(p, row, unit, 1, d_h, weight_ch_of<Cell, S>(p, row.lane),
                          at(state.d_h, p.B, p.P, row.lane, row.b) + unit,
                          Cell::has_c ? at(state.d_c, p.B, p.H, row.lane, row.b) + unit : nullptr,
                          d_input_gates, d_hidden_gates, d_weight_ch);
  if constexpr (Cell::unit_weights > 0)
    for (int k = 0; k < Cell::unit_weights; ++k)
      p.d_weight_ch.at<V>(row.t, row.b, row.lane)[k * p.H + unit] = d_weight_ch[k];
  S* d_inputs = p.d_input_gates.at<S>(row.t, row.b, row.lane) + unit;
  S* d_gates = at(state.d_gates, p.B, early_gates<Cell> * p.H, row.lane, row.b) + unit;
  for (int g = Cell::late_gate ? 1 : 0; g < Cell::gates; ++g) {
    Memory<V>::store(d_input_gates[g], d_inputs + g * p.H, 1);
    if constexpr (Cell::split_gates)
      Memory<V>::store(d_hidden_gates[g],
                       p.d_hidden_gates.at<S>(row.t, row.b, row.lane) + g * p.H + unit, 1);
    const bool late = Cell::late_gate && g == Cell::gates - 1;
    S* d_gate = late ? at(state.d_late, p.B, p.H, row.lane, row.b) + unit : d_gates + g * p.H;
    Memory<V>::store(row.reset ? V(0) : d_hidden_gates[g], d_gate, 1);
  }
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
    const V d_h = collect_d_hidden<false, S>(
        p, row, unit, 1, Memory<V>::load(at(state.product, p.B, p.P, lane, b) + unit, 1),
        at(state.d_h, p.B, p.P, lane, b) + unit);
    if (p.projected) {
      Memory<V>::store(d_h, at(state.d_output, p.B, p.P, lane, b) + unit, 1);
      Memory<V>::store(d_h, p.d_output.at<S>(t, b, lane) + unit, 1);
    } else {
      backward_unit<Cell>(p, state, row, unit, d_h);
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
        at(state.d_h, p.B, p.P, lane, b) + unit, V(1));
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
  for (int64_t b = row_index(); b < p.B; b += row_stride())
    if (t < row_length(p, b))
      backward_unit<Cell>(p, state, row_step(p, lane, b, t), unit,
                          Memory<V>::load(at(state.d_unprojected, p.B, p.H, lane, b) + unit, 1));
}

template <class Cell, class S>
KERNEL void finish_kernel(RecurrenceBackwardParams p, BackwardState<S> state) {
  using V = Compute<S>;
  const int64_t unit = unit_index(), lane = lane_index();
  for (int64_t b = row_index(); b < p.B; b += row_stride()) {
    if (unit < p.P)
      Memory<V>::store(Memory<V>::load(at(state.product, p.B, p.P, lane, b) + unit, 1) +
                           at(state.d_h, p.B, p.P, lane, b)[unit],
                       state_at<S>(p.d_hx, p.B, p.P, lane, b) + unit, 1);
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
    launch(forward_kernel<Cell, S>, grid_over(p, p.H), stream, p, state, step);
    if (p.projected) {
      projection();
      launch(project_kernel<S>, grid_over(p, p.P), stream, p, state, step);
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
    launch(backward_kernel<Cell, S>, grid_over(p, p.P), stream, p, state, step);
    if constexpr (Cell::late_gate) {
      late_product();
      launch(backward_early_kernel<Cell, S>, grid_over(p, p.H), stream, p, state, step);
    }
    if (p.projected) {
      projection();
      launch(backward_projected_kernel<Cell, S>, grid_over(p, p.H), stream, p, state, step);
    }
  }
  hidden_product();
  launch(finish_kernel<Cell, S>, grid_over(p, p.P > p.H ? p.P : p.H), stream, p, state);
}

template <class Params>
using Engine = void (*)(const Params&, const Host&);

// Tables in the order of cells.h and of DType.
#define FUSED_RNN_ROW(function, cell) \
  {function<cell, float>, function<cell, double>, function<cell, BFloat16>, function<cell, Half>},
#define FUSED_RNN_FORWARD(name, cell) FUSED_RNN_ROW(forward, cell)
#define FUSED_RNN_BACKWARD(name, cell) FUSED_RNN_ROW(backward, cell)

constexpr Engine<RecurrenceForwardParams> forward_table[][4] = {
    FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_FORWARD)};
constexpr Engine<RecurrenceBackwardParams> backward_table[][4] = {
    FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_BACKWARD)};

}  // namespace

void run_per_step(CellId cell, const RecurrenceForwardParams& p, const Host& host) {
  forward_table[static_cast<int>(cell)][static_cast<int>(p.dtype)](p, host);
}

void run_per_step(CellId cell, const RecurrenceBackwardParams& p, const Host& host) {
  backward_table[static_cast<int>(cell)][static_cast<int>(p.dtype)](p, host);
}

}  // namespace fused_rnn::cuda
