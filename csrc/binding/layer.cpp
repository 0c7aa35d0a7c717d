// layer_forward and layer_backward: one layer, all directions, on the CPU.
//
// primals[0] is input (T, B, I), which all recurrences read, or (T, B, L, I); states are hx (L, B, P) and
// cx (L, B, H). Forward returns output (T, B, L*P), h_n, c_n, cells (T, B, L, H); the flag of its own is
// whether to save. Those of backward are whether gradients of input, of states and of weights are needed,
// and it returns these.
//
// With batch_sizes (T) sequences are those of torch's PackedSequence: of every (T, B, ...) above only the
// rows that exist, (N, ...). B is the first of batch_sizes. Steps that do not exist are zero in output,
// cells and d_input, and anything in what is saved.
#include "call.h"
#include "host.h"

namespace fused_rnn::binding {
namespace {

// How sequences lie in memory: (T, B, ...), or with batch_sizes packed, (N, ...). Whatever is wrong
// with batch_sizes is found here: the engine writes where they say.
class Time {
 public:
  int64_t T, B;
  std::vector<int64_t> lengths;  // (B) if packed, else empty

  Time(const Tensor& input, const OptionalTensor& batch_sizes) {
    if (!batch_sizes) {
      FUSED_RNN_EXPECT(input.dim() == 3 || input.dim() == 4,
                       "Expected input of shape (T, B, I) or (T, B, L, I), got ",
                       shape_string(input));
      T = input.size(0);
      B = input.size(1);
      return;
    }
    FUSED_RNN_EXPECT(input.dim() == 2,
                     "Expected input of shape (N, I), since there are batch_sizes, got ",
                     shape_string(input));
    check_like("batch_sizes", *batch_sizes, input, ScalarType::Long);
    FUSED_RNN_EXPECT(batch_sizes->dim() == 1 && batch_sizes->size(0) > 0,
                     "Expected batch_sizes of shape (T) with T of at least 1, got ",
                     shape_string(*batch_sizes));
    const Tensor contiguous = as_contiguous(*batch_sizes);
    take(static_cast<const int64_t*>(contiguous.const_data_ptr()), contiguous.size(0),
         input.size(0));
  }

  bool packed() const { return !lengths.empty(); }

  // (T, B, n...) or (N, n...).
  class Dimensions {
   public:
    Dimensions(const Time& time, std::initializer_list<int64_t> tail) {
      if (time.packed()) {
        sizes_[count_++] = time.rows_;
      } else {
        sizes_[count_++] = time.T;
        sizes_[count_++] = time.B;
      }
      for (const int64_t size : tail) sizes_[count_++] = size;
    }
    operator Sizes() const { return {sizes_, count_}; }

   private:
    int64_t sizes_[4];
    size_t count_ = 0;
  };
  Dimensions shape(std::initializer_list<int64_t> tail) const { return {*this, tail}; }

  void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> tail,
             const char* letters) const {
    if (has_shape(tensor, shape(tail))) return;
    check_shape(name, tensor, shape(tail),
                ((packed() ? "(N, " : "(T, B, ") + std::string(letters) + ")").c_str());
  }

  // Of a tensor (..., L*n): the recurrences side by side, or one for all of them with n = 0.
  Sequence flat_sequence(const Tensor& tensor, int64_t n) const {
    if (packed()) return {tensor.data_ptr(), 0, tensor.stride(0), n, rows_before_.data()};
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), n};
  }

  // Of a tensor (..., L, n).
  Sequence sequence(const Tensor& tensor) const {
    return packed() ? flat_sequence(tensor, tensor.stride(1)) : binding::sequence(tensor);
  }

 private:
  void take(const int64_t* sizes, int64_t count, int64_t rows) {
    int64_t before = 0;
    rows_before_.resize(count);
    for (int64_t t = 0; t < count; ++t) {
      FUSED_RNN_EXPECT(sizes[t] >= 1, "Expected batch_sizes of at least 1, got batch_sizes[", t,
                       "] = ", sizes[t]);
      FUSED_RNN_EXPECT(t == 0 || sizes[t] <= sizes[t - 1],
                       "Expected batch_sizes that never increase, got batch_sizes[", t,
                       "] = ", sizes[t], " after ", sizes[t - 1]);
      // Not against the sum, which large numbers overflow.
      FUSED_RNN_EXPECT(sizes[t] <= rows - before, "Expected batch_sizes that add up to the ", rows,
                       " rows of input, got more");
      rows_before_[t] = before;
      before += sizes[t];
    }
    FUSED_RNN_EXPECT(before == rows, "Expected batch_sizes that add up to the ", rows,
                     " rows of input, got ", before);
    rows_ = rows;
    T = count;
    B = sizes[0];
    lengths.resize(B);
    for (int64_t t = count, b = 0; t > 0; --t)
      for (; b < sizes[t - 1]; ++b) lengths[b] = t;
  }

  int64_t rows_ = 0;                  // N
  std::vector<int64_t> rows_before_;  // (T)
};

// What both ops take: checked, laid out as the engine reads it, and kept alive.
struct LayerArguments {
  TensorList primals;
  Tensor input;
  const Kind kind;  // of input
  Ragged ragged;
  Time time;
  std::vector<LaneWeights<const void*>> weights;

  template <class Params>
  LayerArguments(const Call& call, const TensorList& primals_in, Ragged ragged_in,
                 const OptionalTensor& seed, Params& p)
      : primals(primals_in),
        input(first(primals)),
        kind(input),
        ragged(std::move(ragged_in)),
        time(input, ragged.batch_sizes) {
    p.dtype = storage_or_dual_type("input", input);
    p.T = time.T;
    p.B = time.B;
    p.I = input.size(input.dim() - 1);
    fill(call, seed, input, p);
    FUSED_RNN_EXPECT(!per_recurrence() || input.size(2) == p.L,
                     "Expected input of shape (T, B, I) or (T, B, L, I) with L = ", p.L, ", got ",
                     shape_string(input));
    ragged.fill(input, p);
    take_weights(call, p);
    if (call.states) p.hx = take("hx", primals[1], {p.L, p.B, p.P}, "(L, B, P)");
    if (call.states > 1) p.cx = take("cx", primals[2], {p.L, p.B, p.H}, "(L, B, H)");
    input = with_contiguous_units(input);
    if (time.packed()) p.lengths = time.lengths.data();
    p.input = input_sequence(input);
    p.weights = weights.data();
  }

  // Whether every recurrence has an input of its own, or all of them the same.
  bool per_recurrence() const { return input.dim() == 4; }
  Sequence input_sequence(const Tensor& tensor) const {
    return per_recurrence() ? time.sequence(tensor) : time.flat_sequence(tensor, 0);
  }

  // Whether sequences have steps that the engine leaves unwritten.
  bool has_padding() const { return ragged.lengths.has_value(); }

 private:
  static const Tensor& first(const TensorList& primals) {
    FUSED_RNN_EXPECT(!primals.empty(), "Expected primals that begin with input, got none");
    return primals[0];
  }

  template <class Params>
  void take_weights(const Call& call, Params& p) {
    const WeightTable table = call.weights();
    const size_t before = 1 + call.states;
    FUSED_RNN_EXPECT(primals.size() == before + table.size() * p.L, "Expected primals of ",
                     before + table.size() * p.L, " tensors, ", table.size(),
                     " weights for each of ", p.L, " recurrences, got ", primals.size());
    const Tensor& weight_hh = primals[before + 1];
    FUSED_RNN_EXPECT(weight_hh.dim() == 2 && weight_hh.size(0) % call.cell.gates == 0,
                     "Expected weight_hh of shape (", call.cell.gates, "*H, P), got ",
                     shape_string(weight_hh));
    p.H = weight_hh.size(0) / call.cell.gates;
    p.P = call.projected ? weight_hh.size(1) : p.H;
    weights.resize(p.L);
    Tensor* given = primals.data() + before;
    for (size_t n = 0; n < weights.size(); ++n)
      for (const WeightRow& row : table) {
        const int64_t rows = row.factor * (row.rows == 'P' ? p.P : p.H);
        const bool is_matrix = row.columns != '1';
        const int64_t columns = row.columns == 'I' ? p.I : row.columns == 'P' ? p.P : p.H;
        const int64_t shape[] = {rows, columns};
        const Sizes expected{shape, is_matrix ? 2u : 1u};
        if (Kind(*given) != kind || !has_shape(*given, expected))
          take(name_of(row, call.directions == 2 && n % 2 == 1).c_str(), *given, expected,
               row.letters);
        *given = as_contiguous(*given);
        place(weights[n], row.which) = (given++)->const_data_ptr();
      }
  }

  // As the parameter is called of a layer that is the only one: of others Python has checked it.
  static std::string name_of(const WeightRow& row, bool reverse) {
    return std::string(row.name) + (reverse ? "_l0_reverse" : "_l0");
  }

  const void* take(const char* name, Tensor& tensor, Sizes shape, const char* letters) const {
    check_kind(name, tensor, kind);
    check_shape(name, tensor, shape, letters);
    tensor = as_contiguous(tensor);
    return tensor.const_data_ptr();
  }
};

template <class Engine, class Params>
void run(Engine engine, const Params& p, const Tensor& like) {
  if (p.B > 0) on_cpu(like, [&](const cpu::Host& host) { engine(p, host); });
}

TensorList layer_forward(const CellArgument& cell, const TensorList& primals,
                         const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
                         const OptionalTensor& resets, const OptionalTensor& seed,
                         const Settings& settings, const Options& options) {
  const Call call(cell, settings, 1, options);
  const bool save = settings[Call::count] != 0;
  LayerForwardParams p{};
  const LayerArguments arguments(call, primals, {lengths, batch_sizes, resets}, seed, p);
  const Time& time = arguments.time;
  const ScalarType dtype = arguments.input.scalar_type(), c_type = compute_type(dtype);
  const Results make{arguments.input, false};
  const Results make_sequence{arguments.input, arguments.has_padding()};
  TensorList results;
  results.reserve(8);
  const auto add = [&](Tensor tensor) -> const Tensor& {
    return results.emplace_back(std::move(tensor));
  };
  p.output = time.flat_sequence(add(make_sequence(time.shape({p.L * p.P}))), p.P);
  p.h_n = add(make({p.L, p.B, p.P})).data_ptr();
  if (call.cell.has_c) p.c_n = add(make({p.L, p.B, p.H})).data_ptr();
  if (call.want_cells) p.cells = time.sequence(add(make_sequence(time.shape({p.L, p.H}), c_type)));
  if (save) {
    const auto reserve = [&](int64_t values, ScalarType type) {
      return blocked_reserve(
          add(make({p.T, p.L, reserve_blocks(p.H), p.B, values, Reserve::block}, type)));
    };
    const SavedCounts counts(call);
    if (counts.reserve > 0) p.reserve = reserve(counts.reserve, dtype);
    if (call.cell.has_c) p.saved_cells = reserve(counts.cells, c_type);
    if (p.projected) p.unprojected = time.sequence(add(make(time.shape({p.L, p.H}))));
    if (counts.statistics)
      p.statistics = add(make({p.T, p.L, p.B, counts.statistics}, c_type)).data_ptr();
  }
  run(call.cell.engines->cpu_forward({call.cell.index, call.varied}, p.dtype), p, arguments.input);
  return results;
}

TensorList layer_backward(const CellArgument& cell, const OptionalTensorList& grads_in,
                          const TensorList& primals, const TensorList& results_in,
                          const OptionalTensorList& rest_in, const Settings& settings,
                          const Options& options) {
  const Call call(cell, settings, 3, options);
  const Rest rest(rest_in);
  const bool need_input = settings[Call::count] != 0, need_states = settings[Call::count + 1] != 0;
  const bool need_weights = settings[Call::count + 2] != 0;
  FUSED_RNN_EXPECT(call.states || !need_states,
                   "Expected need_states of 0, since there are no states");
  LayerBackwardParams p{};
  const LayerArguments arguments(call, primals, rest.ragged, rest.seed, p);
  const Time& time = arguments.time;
  const Tensor& like = arguments.input;
  const ScalarType dtype = like.scalar_type(), c_type = compute_type(dtype);
  const auto check_sequence = [&](const char* name, const Tensor& tensor, ScalarType type,
                                  std::initializer_list<int64_t> tail, const char* letters) {
    check_like(name, tensor, like, type);
    time.check(name, tensor, tail, letters);
  };
  Gradients grads(grads_in);
  check_no_c(call.cell, "grad_c_n", grads.c_n);
  check_no_c(call.cell, "grad_cells", grads.cells);
  check_state("grad_h_n", grads.h_n, like, p.L, p.B, p.P, "(L, B, P)");
  check_state("grad_c_n", grads.c_n, like, p.L, p.B, p.H, "(L, B, H)");
  if (grads.output) check_sequence("grad_output", *grads.output, dtype, {p.L * p.P}, "L*P");
  if (grads.cells) check_sequence("grad_cells", *grads.cells, c_type, {p.L, p.H}, "L, H");

  const SavedCounts counts(call);
  TensorList saved = results_in;
  const size_t saved_count =
      1 + (counts.reserve > 0) + call.cell.has_c + p.projected + (counts.statistics > 0);
  FUSED_RNN_EXPECT(saved.size() == saved_count, "Expected results of ", saved_count,
                   " tensors, output and those saved by forward, got ", saved.size());
  for (Tensor& tensor : saved) tensor = with_contiguous_units(tensor);
  auto next_saved = saved.begin();
  check_sequence("output", *next_saved, dtype, {p.L * p.P}, "L*P");
  p.output = time.flat_sequence(*next_saved++, p.P);
  const auto take_reserve = [&](const char* name, int64_t values, ScalarType type) {
    check_like(name, *next_saved, like, type);
    check_shape(name, *next_saved, {p.T, p.L, reserve_blocks(p.H), p.B, values, Reserve::block},
                "(T, L, H/16, B, S, 16)");
    return blocked_reserve(*next_saved++);
  };
  if (counts.reserve > 0) p.reserve = take_reserve("reserve", counts.reserve, dtype);
  if (call.cell.has_c) p.saved_cells = take_reserve("saved_cells", counts.cells, c_type);
  if (p.projected) {
    check_sequence("unprojected", *next_saved, dtype, {p.L, p.H}, "L, H");
    p.unprojected = time.sequence(*next_saved++);
  }
  if (counts.statistics) {
    check_like("statistics", *next_saved, like, c_type);
    check_shape("statistics", *next_saved, {p.T, p.L, p.B, counts.statistics}, "(T, L, B, N)");
    *next_saved = as_contiguous(*next_saved);
    p.statistics = next_saved->const_data_ptr();
  }

  grads.output = with_contiguous_units(grads.output);
  grads.cells = with_contiguous_units(grads.cells);
  grads.h_n = as_contiguous(grads.h_n);
  grads.c_n = as_contiguous(grads.c_n);
  if (grads.output) p.grad_output = time.flat_sequence(*grads.output, p.P);
  if (grads.cells) p.grad_cells = time.sequence(*grads.cells);
  p.grad_h_n = pointer(grads.h_n);
  p.grad_c_n = pointer(grads.c_n);

  const Results make{like, false};
  const Results make_sequence{like, arguments.has_padding()};
  const Results make_weight{like, p.T * p.B == 0};  // nothing to sum
  TensorList results;
  results.reserve(primals.size());
  const auto add = [&](Tensor tensor) {
    return results.emplace_back(std::move(tensor)).data_ptr();
  };
  if (need_input) {
    if (arguments.per_recurrence())
      add(make_sequence(time.shape({p.L, p.I})));
    else
      add(make_sequence(time.shape({p.I})));
    p.d_input = arguments.input_sequence(results.back());
  }
  if (need_states) {
    p.d_hx = add(make({p.L, p.B, p.P}));
    if (call.cell.has_c) p.d_cx = add(make({p.L, p.B, p.H}));
  }
  std::vector<LaneWeights<void*>> d_weights;
  if (need_weights) {
    d_weights.resize(p.L);
    auto weight = arguments.primals.begin() + 1 + call.states;
    for (auto& of : d_weights)
      for (const WeightRow& row : call.weights())
        place(of, row.which) = add(make_weight((weight++)->sizes()));
    p.d_weights = d_weights.data();
  }
  run(call.cell.engines->cpu_backward({call.cell.index, call.varied}, p.dtype), p, like);
  return results;
}

}  // namespace
}  // namespace fused_rnn::binding

FUSED_RNN_LIBRARY(FUSED_RNN_NAMESPACE, library) {
  library.def(
      "layer_forward(str cell, Tensor[] primals, Tensor? lengths, Tensor? batch_sizes, "
      "Tensor? resets, Tensor? seed, int[] settings, float[]? options) -> Tensor[]");
  library.def(
      "layer_backward(str cell, Tensor?[] grads, Tensor[] primals, Tensor[] results, "
      "Tensor?[] rest, int[] settings, float[]? options) -> Tensor[]");
}

FUSED_RNN_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, CPU, library) {
  library.impl("layer_forward", TORCH_BOX(&fused_rnn::binding::layer_forward));
  library.impl("layer_backward", TORCH_BOX(&fused_rnn::binding::layer_backward));
}
