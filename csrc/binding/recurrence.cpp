// recurrence_forward and recurrence_backward: what happens between the large products of a layer, on CUDA
// (fused_rnn/composed.py makes a layer of it).
//
// As the ops of layers (call.h), except that primals are those of all recurrences together: input_gates
// (T, B, L, G*H), which backward does not take, then hx (L, B, P) and cx (L, B, H), then each weight of the
// table stacked (L, ...), but for weight_ih, and for bias_ih unless layer_norm is separate: those are in
// input_gates. The flags of forward are whether to save, and whether products of float32 may round to
// TF32; backward has the latter alone.
//
// What is saved lies in the order of time: reserve (T, B, L, S*H), cells (T, B, L, H) or, under zoneout of
// c, (T, B, L, 2*H), unprojected (T, B, L, H), statistics (T, L, B, N). Backward returns d_input_gates,
// d_hidden_gates if they differ, d_hx, d_cx for cells with a cell state, d_output (T, B, L, P) if there is
// a projection, d_unit_weights (L, B, K, H) by row of the batch if a unit has K weights for itself
// (UnitWeightPlaces in step.h), and under recurrent dropout keep (L, B, P), by what h was multiplied.
#include <array>
#include <functional>

#include "../cuda/plan.h"
#include "call.h"
#include "host.h"
#include "plan.h"
#ifdef FUSED_RNN_CUDA_ON_CPU
#include "cuda_on_cpu/arguments.h"
#endif

namespace fused_rnn::binding {
namespace {

#ifdef FUSED_RNN_PER_STEP
// Of matrices (k, n) of duals those of reals that from the right multiply rows of values and tangents,
// as they lie in memory: (2*k, 2*n), for every w + w' e the block [[w, w'], [0, w]]. `duals` is their
// real view (L, k, n, 2).
Tensor real_blocks(const Tensor& duals) {
  const int64_t lanes = duals.size(0), k = duals.size(1), n = duals.size(2);
  const Tensor blocks = torch::stable::new_zeros(duals, {lanes, k, 2, n, 2});
  Tensor of_values = torch::stable::select(blocks, 2, 0);
  torch::stable::copy_(of_values, duals);
  Tensor of_tangents = torch::stable::select(torch::stable::select(blocks, 2, 1), 3, 1);
  torch::stable::copy_(of_tangents, torch::stable::select(duals, 3, 0));
  return torch::stable::view(blocks, {lanes, 2 * k, 2 * n});
}

// A matrix product on prepared operands: the per_step engine runs the same one at every timestep. One
// of duals is a real one.
std::function<void()> prepare_product(const cuda::Product& p, const Tensor& like) {
  const bool dual = p.dtype == DType::dual32 || p.dtype == DType::dual64;
  const ScalarType type = p.dtype == DType::dual32   ? ScalarType::Float
                          : p.dtype == DType::dual64 ? ScalarType::Double
                                                     : like.scalar_type();
  const auto tensor = [&](const void* data, Sizes sizes, Sizes strides) {
    return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, like.device(), type);
  };
  const auto matrix = [&](const void* data, int64_t rows, int64_t columns) {
    return tensor(data, {p.lanes, rows, columns}, {rows * columns, columns, 1});
  };
  const int64_t numbers = dual ? 2 : 1;
  const int64_t b_stride = (p.b_stride ? p.b_stride : p.k * p.n) * numbers;
  const int64_t b_row = (p.transpose_b ? 1 : p.n) * numbers;
  const int64_t b_column = (p.transpose_b ? p.k : 1) * numbers;
  const Tensor b =
      dual ? real_blocks(tensor(p.b, {p.lanes, p.k, p.n, 2}, {b_stride, b_row, b_column, 1}))
           : tensor(p.b, {p.lanes, p.k, p.n}, {b_stride, b_row, b_column});
  const bool one = p.lanes == 1;
  const auto operand = [&](const Tensor& of_lanes) {
    return one ? torch::stable::select(of_lanes, 0, 0) : of_lanes;
  };
  return [op = one ? "aten::mm" : "aten::bmm", a = operand(matrix(p.a, p.m, p.k * numbers)),
          b = operand(b), out = operand(matrix(p.out, p.m, p.n * numbers))] {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(a),
                                      torch::stable::detail::from(b),
                                      torch::stable::detail::from(out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);
  };
}

constexpr bool is_backward(const RecurrenceForwardParams&) { return false; }
constexpr bool is_backward(const RecurrenceBackwardParams&) { return true; }

void run_engine(const CellTraits& cell, cuda::CellId id, const RecurrenceForwardParams& p,
                const cuda::Layout& layout, const cuda::Host& host) {
  cell.engines->cuda_forward(id, p, layout, host);
}
void run_engine(const CellTraits& cell, cuda::CellId id, const RecurrenceBackwardParams& p,
                const cuda::Layout& layout, const cuda::Host& host) {
  cell.engines->cuda_backward(id, p, layout, host);
}

UnitWeightPlaces unit_gradients(const Call& call) {
  return {call.layer_norm(), call.cell.gates, call.cell.unit_weights, call.cell.has_c};
}

template <class Params>
void run(const Call& call, bool tf32, const Params& p, const Tensor& like) {
  if (p.L * p.B == 0) return;
  std::vector<Tensor> scratch;
  cuda::Host host{
      nullptr,
      [&](size_t bytes) {
        scratch.push_back(torch::stable::empty({static_cast<int64_t>(bytes)}, ScalarType::Byte,
                                               torch::headeronly::Layout::Strided, like.device()));
        return scratch.back().data_ptr();
      },
      [&](const cuda::Product& product) { return prepare_product(product, like); }};
  const cuda::CellId id{call.cell.index, call.varied};
  on_cuda(like, [&](void* stream) {
    host.stream = stream;
    const cuda::Task task = cuda_task(call.cell, call.varied, tf32, is_backward(p), p);
    const cuda::Layout layout = cuda::choose(task, cuda::chip_at_hand(), forced_cuda_engine());
#ifdef FUSED_RNN_CUDA_ON_CPU
    const SavedCounts counts(call);
    const cuda_on_cpu::Arguments watched(
        p,
        {call.cell.gates, call.cell.unit_weights, unit_gradients(call).count, counts.reserve,
         counts.cells, call.cell.has_c},
        host);
    run_engine(call.cell, id, p, layout, watched.host);
    watched.check_results();
#else
    run_engine(call.cell, id, p, layout, host);
#endif
  });
}

// What both ops take: checked, laid out as the engine reads it, and kept alive.
struct RecurrenceArguments {
  TensorList primals;
  Ragged ragged;
  LaneWeights<const void*> weights{};  // stacked

  // `before` is how many primals precede the states; T, B and dtype are those of `like` (T, B, L, n).
  template <class Params>
  RecurrenceArguments(const Call& call, const TensorList& primals_in, size_t before,
                      const Tensor& like, Ragged ragged_in, const OptionalTensor& seed, Params& p)
      : primals(primals_in), ragged(std::move(ragged_in)) {
    FUSED_RNN_EXPECT(!ragged.batch_sizes,
                     "Expected batch_sizes to be None: only the CPU takes packed sequences");
    p.T = like.size(0);
    p.B = like.size(1);
    fill(call, seed, like, p);
    FUSED_RNN_EXPECT(like.size(2) == p.L, "Expected recurrences of ", like.size(2),
                     ", as the tensors have, got ", p.L);
    ragged.fill(like, p);
    take_weights(call, before + call.states, like, p);
    const auto take_state = [&](const char* name, size_t place, int64_t n, const char* letters) {
      check_kind(name, primals[place], Kind(like));
      check_shape(name, primals[place], {p.L, p.B, n}, letters);
      primals[place] = as_contiguous(primals[place]);
      return primals[place].const_data_ptr();
    };
    if (call.states) p.hx = take_state("hx", before, p.P, "(L, B, P)");
    if (call.states > 1) p.cx = take_state("cx", before + 1, p.H, "(L, B, H)");
    p.weight_hh = weights.weight_hh;
    p.weight_hr = weights.weight_hr;
    p.weight_ch = weights.weight_ch;
    p.norms = {weights.ln_input, weights.ln_hidden, weights.ln_c};
  }

 private:
  template <class Params>
  void take_weights(const Call& call, size_t begin, const Tensor& like, Params& p) {
    const WeightTable table = call.weights();
    const bool separate = call.layer_norm() == LayerNorm::separate;
    const size_t inside = 1 + (call.has_biases && !separate);  // input_gates
    FUSED_RNN_EXPECT(primals.size() == begin + table.size() - inside, "Expected primals of ",
                     begin + table.size() - inside, " tensors, got ", primals.size());
    const Tensor& weight_hh = primals[begin];
    FUSED_RNN_EXPECT(weight_hh.dim() == 3 && weight_hh.size(1) % call.cell.gates == 0,
                     "Expected weight_hh of shape (L, ", call.cell.gates, "*H, P), got ",
                     shape_string(weight_hh));
    p.H = weight_hh.size(1) / call.cell.gates;
    p.P = call.projected ? weight_hh.size(2) : p.H;
    Tensor* given = primals.data() + begin;
    for (const WeightRow& row : table) {
      if (row.which == Weight::weight_ih || (row.which == Weight::bias_ih && !separate)) continue;
      const int64_t rows = row.factor * (row.rows == 'P' ? p.P : p.H);
      const int64_t shape[] = {p.L, rows, row.columns == 'P' ? p.P : p.H};
      check_kind(row.name, *given, Kind(like));
      const Sizes expected{shape, row.columns == '1' ? 2u : 3u};
      if (!has_shape(*given, expected))
        check_shape(row.name, *given, expected, ("(L, " + std::string(row.letters + 1)).c_str());
      *given = as_contiguous(*given);
      place(weights, row.which) = (given++)->const_data_ptr();
    }
  }
};

TensorList recurrence_forward(const CellArgument& cell, const TensorList& primals,
                              const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
                              const OptionalTensor& resets, const OptionalTensor& seed,
                              const Settings& settings, const Options& options) {
  const Call call(cell, settings, 2, options);
  const bool save = settings[Call::count] != 0, tf32 = settings[Call::count + 1] != 0;
  RecurrenceForwardParams p{};
  FUSED_RNN_EXPECT(!primals.empty() && primals[0].dim() == 4,
                   "Expected primals that begin with input_gates of shape (T, B, L, G*H)");
  p.dtype = storage_or_dual_type("input_gates", primals[0]);
  const RecurrenceArguments arguments(call, primals, 1, primals[0], {lengths, batch_sizes, resets},
                                      seed, p);
  check_shape("input_gates", primals[0], {p.T, p.B, p.L, call.cell.gates * p.H}, "(T, B, L, G*H)");
  const Tensor input_gates = with_contiguous_units(primals[0]);
  p.input_gates = sequence(input_gates);
  p.bias_ih = arguments.weights.bias_ih;
  p.bias_hh = arguments.weights.bias_hh;

  const Results make{input_gates, p.lengths != nullptr};
  const Results make_state{input_gates, false};
  const ScalarType c_type = compute_type(input_gates.scalar_type());
  const SavedCounts counts(call);
  TensorList results;
  results.reserve(8);
  const auto add = [&](Tensor tensor) -> const Tensor& {
    return results.emplace_back(std::move(tensor));
  };
  p.output = sequence(add(make({p.T, p.B, p.L, p.P})));
  p.h_n = add(make_state({p.L, p.B, p.P})).data_ptr();
  if (call.cell.has_c) p.c_n = add(make_state({p.L, p.B, p.H})).data_ptr();
  if (call.want_cells) p.cells = sequence(add(make({p.T, p.B, p.L, p.H}, c_type)));
  if (save) {
    if (counts.reserve > 0)
      p.reserve = natural_reserve(add(make({p.T, p.B, p.L, counts.reserve * p.H})), p.H);
    if (call.cell.has_c)
      p.saved_cells = natural_reserve(add(make({p.T, p.B, p.L, counts.cells * p.H}, c_type)), p.H);
    if (p.projected) p.unprojected = sequence(add(make({p.T, p.B, p.L, p.H})));
    if (counts.statistics)
      p.statistics = add(make({p.T, p.L, p.B, counts.statistics}, c_type)).data_ptr();
  }
  run(call, tf32, p, input_gates);
  return results;
}

TensorList recurrence_backward(const CellArgument& cell, const OptionalTensorList& grads_in,
                               const TensorList& primals, const TensorList& results_in,
                               const OptionalTensorList& rest_in, const Settings& settings,
                               const Options& options) {
  const Call call(cell, settings, 1, options);
  const Rest rest(rest_in);
  const bool tf32 = settings[Call::count] != 0;
  RecurrenceBackwardParams p{};
  FUSED_RNN_EXPECT(!results_in.empty() && results_in[0].dim() == 4,
                   "Expected results that begin with output of shape (T, B, L, P)");
  const Tensor output = with_contiguous_units(results_in[0]);
  p.dtype = storage_or_dual_type("output", output);
  const RecurrenceArguments arguments(call, primals, 0, output, rest.ragged, rest.seed, p);
  check_shape("output", output, {p.T, p.B, p.L, p.P}, "(T, B, L, P)");
  const ScalarType dtype = output.scalar_type(), c_type = compute_type(dtype);

  Gradients grads(grads_in);
  check_no_c(call.cell, "grad_c_n", grads.c_n);
  check_no_c(call.cell, "grad_cells", grads.cells);
  check_state("grad_h_n", grads.h_n, output, p.L, p.B, p.P, "(L, B, P)");
  check_state("grad_c_n", grads.c_n, output, p.L, p.B, p.H, "(L, B, H)");
  const auto check = [&](const char* name, const Tensor& tensor, ScalarType type, Sizes shape,
                         const char* letters) {
    check_like(name, tensor, output, type);
    check_shape(name, tensor, shape, letters);
  };
  if (grads.output)
    check("grad_output", *grads.output, dtype, {p.T, p.B, p.L, p.P}, "(T, B, L, P)");
  if (grads.cells) check("grad_cells", *grads.cells, c_type, {p.T, p.B, p.L, p.H}, "(T, B, L, H)");
  grads.output = with_contiguous_units(grads.output);
  grads.cells = with_contiguous_units(grads.cells);
  grads.h_n = as_contiguous(grads.h_n);
  grads.c_n = as_contiguous(grads.c_n);
  p.output = sequence(output);
  p.grad_output = sequence(grads.output);
  p.grad_cells = sequence(grads.cells);
  p.grad_h_n = pointer(grads.h_n);
  p.grad_c_n = pointer(grads.c_n);

  const SavedCounts counts(call);
  TensorList saved(results_in.begin() + 1, results_in.end());
  const size_t saved_count =
      (counts.reserve > 0) + call.cell.has_c + p.projected + (counts.statistics > 0);
  FUSED_RNN_EXPECT(saved.size() == saved_count, "Expected results of ", 1 + saved_count,
                   " tensors, output and those saved by forward, got ", results_in.size());
  for (Tensor& tensor : saved) tensor = with_contiguous_units(tensor);
  auto next_saved = saved.begin();
  if (counts.reserve > 0) {
    check("reserve", *next_saved, dtype, {p.T, p.B, p.L, counts.reserve * p.H}, "(T, B, L, S*H)");
    p.reserve = natural_reserve(*next_saved++, p.H);
  }
  if (call.cell.has_c) {
    check("saved_cells", *next_saved, c_type, {p.T, p.B, p.L, counts.cells * p.H},
          counts.cells > 1 ? "(T, B, L, 2*H)" : "(T, B, L, H)");
    p.saved_cells = natural_reserve(*next_saved++, p.H);
  }
  // The layer's backward reads it; the recurrence does not.
  if (p.projected) check("unprojected", *next_saved++, dtype, {p.T, p.B, p.L, p.H}, "(T, B, L, H)");
  if (counts.statistics) {
    check("statistics", *next_saved, c_type, {p.T, p.L, p.B, counts.statistics}, "(T, L, B, N)");
    *next_saved = as_contiguous(*next_saved);
    p.statistics = next_saved->const_data_ptr();
  }

  const Results make{output, p.lengths != nullptr};
  const Results make_state{output, false};
  const Results make_sums{output, true};
  const LayerNorm norm = call.layer_norm();
  TensorList results;
  results.reserve(8);
  const auto add = [&](Tensor tensor) -> const Tensor& {
    return results.emplace_back(std::move(tensor));
  };
  p.d_input_gates = sequence(add(make({p.T, p.B, p.L, call.cell.gates * p.H})));
  if (norm == LayerNorm::separate || (norm == LayerNorm::none && call.cell.split_gates))
    p.d_hidden_gates = sequence(add(make({p.T, p.B, p.L, call.cell.gates * p.H})));
  p.d_hx = add(make_state({p.L, p.B, p.P})).data_ptr();
  if (call.cell.has_c) p.d_cx = add(make_state({p.L, p.B, p.H})).data_ptr();
  if (p.projected) p.d_output = sequence(add(make({p.T, p.B, p.L, p.P})));
  const int64_t unit_weights = unit_gradients(call).count;
  if (unit_weights > 0)
    p.d_unit_weights = add(make_sums({p.L, p.B, unit_weights, p.H}, c_type)).data_ptr();
  if (p.variation.recurrent_dropout > 0)
    p.keep = add(make_state({p.L, p.B, p.P}, c_type)).data_ptr();
  run(call, tf32, p, output);
  return results;
}
#endif

}  // namespace
}  // namespace fused_rnn::binding

FUSED_RNN_LIBRARY(FUSED_RNN_NAMESPACE, library) {
  library.def(
      "recurrence_forward(str cell, Tensor[] primals, Tensor? lengths, Tensor? batch_sizes, "
      "Tensor? resets, Tensor? seed, int[] settings, float[]? options) -> Tensor[]");
  library.def(
      "recurrence_backward(str cell, Tensor?[] grads, Tensor[] primals, Tensor[] results, "
      "Tensor?[] rest, int[] settings, float[]? options) -> Tensor[]");
}

#ifdef FUSED_RNN_PER_STEP
#ifdef FUSED_RNN_CUDA_ON_CPU
FUSED_RNN_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, CPU, library) {
#else
FUSED_RNN_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, CUDA, library) {
#endif
  library.impl("recurrence_forward", TORCH_BOX(&fused_rnn::binding::recurrence_forward));
  library.impl("recurrence_backward", TORCH_BOX(&fused_rnn::binding::recurrence_backward));
}
#endif
