// The only file that talks to torch, through its stable ABI: schemas, checks, allocation, streams and
// the choice of engine. What is not a tensor op goes through pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include "cells/cells.h"
#include "cpu/engine.h"
#include "cuda/plan.h"
#include "params.h"
#include "step.h"
#if defined(FUSED_RNN_CUDA) || defined(FUSED_RNN_CUDA_ON_CPU)
#define FUSED_RNN_PER_STEP
#include "cuda/dropout.h"
#include "cuda/launch.h"
#include "cuda/per_step.h"
#include "cuda/persistent.h"
#endif
#ifdef FUSED_RNN_CUDA_ON_CPU
#include "cuda_on_cpu/arguments.h"
#endif

// tests/test_cuda_on_cpu.py builds this file a second time, with the CUDA kernels compiled for the CPU
// (FUSED_RNN_CUDA_ON_CPU) and another name for the ops.
#ifndef FUSED_RNN_NAMESPACE
#define FUSED_RNN_NAMESPACE fused_rnn
#endif

namespace fused_rnn::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

enum class CellIndex : int {
#define FUSED_RNN_INDEX(name, cell) name,
  FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_INDEX)
};

// The facts about a cell that code outside templates needs.
struct CellTraits {
  CellIndex index;
  const char* name;
  int64_t gates, saved, unit_weights;
  bool has_c, split_gates, reads_h, late_gate;
};

constexpr CellTraits cell_traits[] = {
#define FUSED_RNN_TRAITS(name, cell)                                                               \
  {CellIndex::name,   #name,         cell::gates,    cell::saved, cell::unit_weights, cell::has_c, \
   cell::split_gates, cell::reads_h, cell::late_gate},
    FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_TRAITS)};

const CellTraits& traits(CellIndex index) { return cell_traits[static_cast<int>(index)]; }

const CellTraits& traits(const std::string& name) {
  for (const CellTraits& cell : cell_traits)
    if (name == cell.name) return cell;
  throw std::invalid_argument("no cell of that name: " + name);
}

// ---- checks ----------------------------------------------------------------------------------------

std::string shape_string(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i)
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

bool has_shape(const Tensor& tensor, Sizes expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i)
    same = tensor.size(static_cast<int64_t>(i)) == expected[i];
  return same;
}

void check_shape(const char* name, const Tensor& tensor, Sizes expected, const char* letters) {
  if (has_shape(tensor, expected)) return;
  std::string text;
  for (const int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(false, "Expected ", name, " of shape ", letters, " = (", text, "), got ",
                  shape_string(tensor));
}

const char* dtype_name(ScalarType type) { return torch::headeronly::toString(type); }

// What a tensor holds and where, in torch's numbers: stable::Tensor takes longer to translate them than
// a small layer's checks may.
struct Kind {
  int32_t dtype, device_type, device_index;
  explicit Kind(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  }
};

int32_t dtype_number(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

void check_kind(const char* name, const Tensor& tensor, const Kind& expected) {
  const Kind kind(tensor);
  const auto dtype_of = [](const Kind& of) {
    return dtype_name(torch::stable::detail::to<ScalarType>(torch::stable::detail::from(of.dtype)));
  };
  STD_TORCH_CHECK(kind.dtype == expected.dtype, "Expected ", name, " of dtype ", dtype_of(expected),
                  ", got ", dtype_of(kind));
  STD_TORCH_CHECK(
      kind.device_type == expected.device_type && kind.device_index == expected.device_index,
      "Expected ", name, " on the same device as the other arguments");
}

void check_like(const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype) {
  Kind expected(like);
  expected.dtype = dtype_number(dtype);
  check_kind(name, tensor, expected);
}

DType storage_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "Expected ", name, " of dtype Float, Double, BFloat16 or Half, got ",
                      dtype_name(tensor.scalar_type()));
  }
}

// The same where complex numbers stand for duals (dual.h).
DType storage_or_dual_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::ComplexFloat:
      return DType::dual32;
    case ScalarType::ComplexDouble:
      return DType::dual64;
    default:
      return storage_type(name, tensor);
  }
}

ScalarType compute_type(ScalarType storage) {
  switch (storage) {
    case ScalarType::Double:
    case ScalarType::ComplexFloat:
    case ScalarType::ComplexDouble:
      return storage;
    default:
      return ScalarType::Float;
  }
}

// ---- tensors -----------------------------------------------------------------------------------------

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

OptionalTensor as_contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
}

const void* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// A (T, B, L, n) tensor; here and below the caller has seen to a contiguous last dimension.
Sequence sequence(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Sequence sequence(const OptionalTensor& tensor) { return tensor ? sequence(*tensor) : Sequence{}; }

// A (T, B, L, S*H) tensor.
Reserve natural_reserve(const Tensor& tensor, int64_t H) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1),
          tensor.stride(2),  Reserve::block,   H};
}

// A (T, L, H/16, B, S, 16) tensor.
Reserve blocked_reserve(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(3),
          tensor.stride(1),  tensor.stride(2), tensor.stride(4)};
}

int64_t reserve_blocks(int64_t H) { return (H + Reserve::block - 1) / Reserve::block; }

Tensor with_contiguous_units(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor
                                                            : torch::stable::contiguous(tensor);
}

OptionalTensor with_contiguous_units(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(with_contiguous_units(*tensor)) : std::nullopt;
}

// Allocates results beside `like`; `zeroed` where ragged rows leave steps unwritten.
class Results {
 public:
  Results(const Tensor& like, bool zeroed) : like_(like), kind_(like), zeroed_(zeroed) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout_));
  }

  Tensor operator()(Sizes shape, ScalarType dtype) const {
    return zeroed_ ? torch::stable::new_zeros(like_, shape, dtype)
                   : empty(shape, dtype_number(dtype));
  }
  Tensor operator()(Sizes shape) const {
    return zeroed_ ? torch::stable::new_zeros(like_, shape) : empty(shape, kind_.dtype);
  }
  Tensor none() const { return (*this)({0}); }

 private:
  // stable::new_empty looks its op up by name; this takes half as long.
  Tensor empty(Sizes shape, int32_t dtype) const {
    int32_t layout = layout_, device_type = kind_.device_type;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
        like_.get(), shape.data(), static_cast<int64_t>(shape.size()), &dtype, &layout,
        &device_type, kind_.device_index, nullptr, &handle));
    return Tensor(handle);
  }

  const Tensor& like_;
  const Kind kind_;
  const bool zeroed_;
  int32_t layout_;
};

// How much forward saves for backward: values per unit and step, and statistics per step.
struct SavedCounts {
  int64_t reserve, cells, statistics;

  SavedCounts(const CellTraits& cell, bool varied, const Shape& p)
      : reserve(cell.saved), cells(1), statistics(norm_count(p.variation.layer_norm, cell.has_c)) {
    if (!varied) return;
    reserve =
        SavedValues(p.variation.layer_norm, cell.gates, cell.saved, cell.reads_h, cell.has_c).count;
    cells = 1 + (p.variation.zoneout_c > 0);
  }
};

UnitWeightPlaces unit_gradients(const CellTraits& cell, const Shape& p) {
  return {p.variation.layer_norm, cell.gates, cell.unit_weights, cell.has_c};
}

// ---- engines -----------------------------------------------------------------------------------------

// Scratch comes from torch's allocator, which fills it with NaN when torch is asked to do that. One
// block is kept from call to call, if it is not larger than most_: the system takes back what is freed,
// and to hand it out again page by page takes up to a tenth of a large layer's time.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : make_(like, false) {}
  ~Scratch() {
    if (memory_ && size(*memory_) > most_.load())
      delete memory_;
    else if (memory_)
      delete kept_.exchange(memory_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static void* allocate(void* self, size_t bytes) {
    auto& scratch = *static_cast<Scratch*>(self);
    const int64_t wanted = static_cast<int64_t>(bytes) + 64;
    scratch.memory_ = kept_.exchange(nullptr);
    if (scratch.memory_ && size(*scratch.memory_) < wanted)
      delete std::exchange(scratch.memory_, nullptr);
    if (!scratch.memory_) scratch.memory_ = new Tensor(scratch.make_({wanted}, ScalarType::Byte));
    const auto address = reinterpret_cast<uintptr_t>(scratch.memory_->data_ptr());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

  // Sets how many bytes may be kept, and returns how many that were.
  static int64_t keep(int64_t bytes) {
    const int64_t before = most_.exchange(bytes);
    delete kept_.exchange(nullptr);
    return before;
  }

 private:
  static int64_t size(const Tensor& tensor) { return tensor.numel(); }

  static inline std::atomic<int64_t> most_{int64_t(64) << 20};
  static inline std::atomic<Tensor*> kept_{nullptr};
  const Results make_;
  Tensor* memory_ = nullptr;
};

// Threads lent to one call. Calls at the same time, from several threads of the caller, share what
// torch may use instead of each taking it all; results do not depend on how many there are.
class Threads {
 public:
  Threads() {
    const int all = static_cast<int>(torch::stable::get_num_threads());
    int lent = lent_.load();
    do count_ = all - lent > 1 ? all - lent : 1;
    while (!lent_.compare_exchange_weak(lent, lent + count_));
  }
  ~Threads() { lent_ -= count_; }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  int count() const { return count_; }

 private:
  static inline std::atomic<int> lent_{0};
  int count_;
};

template <class Run>
void on_cpu(const Tensor& like, const Run& run) {
  Scratch scratch(like);
  const Threads threads;
  const cpu::Host host{threads.count(),
                       [](int64_t count, void (*task)(int64_t, int64_t, void*), void* context) {
                         TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, task, context));
                       },
                       Scratch::allocate, &scratch};
  run(host);
}

// What of a recurrence only per_step has, or null. This and the rest of the choice of a CUDA engine is in
// every build, for explain.
const char* needs_per_step(const CellTraits& cell, bool varied, const Shape& p) {
  if (varied) return "layer norm, zoneout or recurrent dropout";
  if (cell.late_gate) return "a gate that waits for another";
  return p.projected ? "a projection" : nullptr;
}

cuda::Task cuda_task(const CellTraits& cell, bool varied, bool tf32, bool backward,
                     const Shape& p) {
  return {static_cast<int>(cell.gates),
          static_cast<int>(cell.unit_weights),
          p.dtype,
          p.T,
          p.B,
          p.L,
          p.H,
          tf32,
          backward,
          needs_per_step(cell, varied, p)};
}

const char* forced_cuda_engine() { return std::getenv("FUSED_RNN_CUDA_ENGINE"); }

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

// Calls run(stream) where tensors like this one live.
template <class Run>
void on_cuda(const Tensor& like, const Run& run) {
  void* stream = nullptr;
#ifdef FUSED_RNN_CUDA
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
#endif
  run(stream);
}

constexpr bool is_backward(const RecurrenceForwardParams&) { return false; }
constexpr bool is_backward(const RecurrenceBackwardParams&) { return true; }

template <class Params>
void run_engine(cuda::CellId cell, const Params& p, const cuda::Layout& layout,
                const cuda::Host& host) {
  try {
    if (layout.engine == cuda::Engine::persistent_cluster)
      return cuda::run_persistent_cluster(cell, p, layout, host);
    if (layout.engine == cuda::Engine::persistent_grid)
      return cuda::run_persistent_grid(cell, p, layout, host);
  } catch (const cuda::LaunchRefused&) {
    // Others hold a part of the GPU (MPS, a partition); nothing has run.
  }
  cuda::run_per_step(cell, p, host);
}

template <class Params>
void run_recurrence(const CellTraits& cell, bool varied, bool tf32, const Params& p,
                    const Tensor& like) {
  std::vector<Tensor> scratch;
  cuda::Host host{
      nullptr,
      [&](size_t bytes) {
        scratch.push_back(torch::stable::empty({static_cast<int64_t>(bytes)}, ScalarType::Byte,
                                               torch::headeronly::Layout::Strided, like.device()));
        return scratch.back().data_ptr();
      },
      [&](const cuda::Product& product) { return prepare_product(product, like); }};
  const cuda::CellId id{static_cast<int>(cell.index), varied};
  on_cuda(like, [&](void* stream) {
    host.stream = stream;
    const cuda::Task task = cuda_task(cell, varied, tf32, is_backward(p), p);
    const cuda::Layout layout = cuda::choose(task, cuda::chip_at_hand(), forced_cuda_engine());
#ifdef FUSED_RNN_CUDA_ON_CPU
    const SavedCounts counts(cell, varied, p);
    const cuda_on_cpu::Arguments watched(
        p,
        {cell.gates, cell.unit_weights, unit_gradients(cell, p).count, counts.reserve, counts.cells,
         cell.has_c},
        host);
    run_engine(id, p, layout, watched.host);
    watched.check_results();
#else
    run_engine(id, p, layout, host);
#endif
  });
}
#endif

cpu::CellId cpu_cell(const CellTraits& cell, bool varied) {
  return {static_cast<int>(cell.index), varied};
}

void run(cpu::CellId cell, const LayerForwardParams& p, const Tensor& like) {
  const auto engine = cpu::active_instruction_set().forward(cell, p.dtype);
  on_cpu(like, [&](const cpu::Host& host) { engine(p, host); });
}

void run(cpu::CellId cell, const LayerBackwardParams& p, const Tensor& like) {
  const auto engine = cpu::active_instruction_set().backward(cell, p.dtype);
  on_cpu(like, [&](const cpu::Host& host) { engine(p, host); });
}

// ---- what the ops of layers and of recurrences share -------------------------------------------------

// Lengths within 0..limit; on the CPU that is checked.
void check_lengths(const Tensor& lengths, const Tensor& like, int64_t limit, int64_t B,
                   const char* what) {
  check_like("lengths", lengths, like, ScalarType::Long);
  check_shape("lengths", lengths, {B}, "(B)");
  if (!like.is_cpu()) return;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = static_cast<const int64_t*>(lengths.const_data_ptr())[b];
    STD_TORCH_CHECK(length >= 0 && length <= limit, "Expected lengths within 0..", limit, " (",
                    what, "), got lengths[", b, "] = ", length);
  }
}

// The last arguments of the varied ops.
struct VariedArguments {
  int64_t layer_norm;
  double zoneout_h, zoneout_c, recurrent_dropout, layer_norm_eps;
  OptionalTensor seed;

  void fill(const CellTraits& cell, const Tensor& like, Shape& p) const {
    STD_TORCH_CHECK(layer_norm >= 0 && layer_norm <= 2, "Expected layer_norm of 0, 1 or 2, got ",
                    layer_norm);
    check_probability("zoneout_h", zoneout_h);
    check_probability("zoneout_c", zoneout_c);
    check_probability("recurrent_dropout", recurrent_dropout);
    STD_TORCH_CHECK(layer_norm_eps >= 0, "Expected layer_norm_eps of at least 0, got ",
                    layer_norm_eps);
    STD_TORCH_CHECK(layer_norm == 0 || !cell.late_gate, "Expected layer_norm of 0, since ",
                    cell.name, " does not have all gates at one time, got ", layer_norm);
    STD_TORCH_CHECK(cell.has_c || zoneout_c == 0, "Expected zoneout_c of 0, since ", cell.name,
                    " has no cell state, got ", zoneout_c);
    STD_TORCH_CHECK(seed || recurrent_dropout == 0,
                    "Expected recurrent_dropout of 0, since there is no seed, got ",
                    recurrent_dropout);
    p.variation = {static_cast<LayerNorm>(layer_norm),
                   zoneout_h,
                   zoneout_c,
                   recurrent_dropout,
                   layer_norm_eps,
                   seed ? seed_pointer(*seed, like) : nullptr};
  }

  static const int64_t* seed_pointer(const Tensor& seed, const Tensor& like) {
    check_like("seed", seed, like, ScalarType::Long);
    check_shape("seed", seed, {}, "()");
    return static_cast<const int64_t*>(seed.const_data_ptr());
  }

 private:
  static void check_probability(const char* name, double p) {
    STD_TORCH_CHECK(p >= 0 && p < 1, "Expected ", name, " in [0, 1), got ", p);
  }
};

// Ragged time, as both ops take it. Lengths must lie within 0..T; on the CPU that is checked.
struct Ragged {
  OptionalTensor lengths, resets;

  Ragged(const OptionalTensor& lengths_in, const OptionalTensor& resets_in, const Tensor& like,
         int64_t T, int64_t B)
      : lengths(as_contiguous(lengths_in)), resets(as_contiguous(resets_in)) {
    if (lengths) check_lengths(*lengths, like, T, B, "the timesteps of input");
    if (resets) {
      check_like("resets", *resets, like, ScalarType::Bool);
      check_shape("resets", *resets, {T, B}, "(T, B)");
    }
  }

  void fill(Shape& p) const {
    p.lengths = static_cast<const int64_t*>(pointer(lengths));
    p.resets = static_cast<const bool*>(pointer(resets));
  }
};

void check_state(const char* name, const OptionalTensor& state, const Tensor& like, int64_t L,
                 int64_t B, int64_t n, const char* letters) {
  if (!state) return;
  check_kind(name, *state, Kind(like));
  check_shape(name, *state, {L, B, n}, letters);
}

// Arguments that only cells with a cell state have.
void check_no_c(const CellTraits& cell, const char* name, const OptionalTensor& argument) {
  STD_TORCH_CHECK(cell.has_c || !argument, "Expected ", name, " to be None, since ", cell.name,
                  " has no cell state");
}

void check_directions(int64_t directions, int64_t lanes) {
  STD_TORCH_CHECK(directions == 1 || (directions == 2 && lanes % 2 == 0),
                  "Expected directions 1, or 2 with an even number of lanes, got ", directions,
                  " with ", lanes, " lanes");
}

// ---- a whole layer, on the CPU -----------------------------------------------------------------------

// How sequences lie in memory: (T, B, ...), or with batch_sizes packed, (N, ...). Whatever is wrong
// with batch_sizes is found here: the engine writes where they say.
class Time {
 public:
  int64_t T, B;
  std::vector<int64_t> lengths;  // (B) if packed, else empty

  Time(const Tensor& input, const OptionalTensor& batch_sizes) {
    if (!batch_sizes) {
      STD_TORCH_CHECK(input.dim() == 3 || input.dim() == 4,
                      "Expected input of shape (T, B, I) or (T, B, L, I), got ",
                      shape_string(input));
      T = input.size(0);
      B = input.size(1);
      return;
    }
    STD_TORCH_CHECK(input.dim() == 2,
                    "Expected input of shape (N, I), since there are batch_sizes, got ",
                    shape_string(input));
    check_like("batch_sizes", *batch_sizes, input, ScalarType::Long);
    STD_TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->size(0) > 0,
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

  // Of a tensor (..., L*n): the lanes side by side, or one for all of them with n = 0.
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
      STD_TORCH_CHECK(sizes[t] >= 1, "Expected batch_sizes of at least 1, got batch_sizes[", t,
                      "] = ", sizes[t]);
      STD_TORCH_CHECK(t == 0 || sizes[t] <= sizes[t - 1],
                      "Expected batch_sizes that never increase, got batch_sizes[", t,
                      "] = ", sizes[t], " after ", sizes[t - 1]);
      // Not against the sum, which large numbers overflow.
      STD_TORCH_CHECK(sizes[t] <= rows - before, "Expected batch_sizes that add up to the ", rows,
                      " rows of input, got more");
      rows_before_[t] = before;
      before += sizes[t];
    }
    STD_TORCH_CHECK(before == rows, "Expected batch_sizes that add up to the ", rows,
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
  Tensor input;
  const Kind kind;  // of input
  TensorList states, weights;
  Time time;
  Ragged ragged;
  std::vector<LaneWeights<const void*>> lanes;

  template <class Params>
  LayerArguments(const CellTraits& cell, const Tensor& input_in, TensorList states_in,
                 TensorList weights_in, bool has_biases, const OptionalTensor& lengths,
                 const OptionalTensor& batch_sizes, const OptionalTensor& resets,
                 int64_t lane_count, int64_t directions, const VariedArguments* varied, Params& p)
      : input(input_in),
        kind(input),
        states(std::move(states_in)),
        weights(std::move(weights_in)),
        time(input, batch_sizes),
        ragged(lengths, resets, input, time.T, time.B) {
    STD_TORCH_CHECK(!lengths || !batch_sizes,
                    "Expected lengths to be None, since batch_sizes say the same");
    p.dtype = storage_or_dual_type("input", input);
    STD_TORCH_CHECK(lane_count >= 1, "Expected lanes of at least 1, got ", lane_count);
    check_directions(directions, lane_count);
    p.T = time.T;
    p.B = time.B;
    p.I = input.size(input.dim() - 1);
    p.L = lane_count;
    STD_TORCH_CHECK(!per_lane() || input.size(2) == p.L,
                    "Expected input of shape (T, B, I) or (T, B, L, I) with L = ", p.L, ", got ",
                    shape_string(input));
    p.directions = static_cast<int>(directions);
    if (varied) varied->fill(cell, input, p);
    take_weights(cell, has_biases, p);
    take_states(cell, p);
    input = with_contiguous_units(input);
    ragged.fill(p);
    if (time.packed()) p.lengths = time.lengths.data();
    p.input = input_sequence(input);
    p.weights = lanes.data();
  }

  // Whether every lane has an input of its own, or all of them the same.
  bool per_lane() const { return input.dim() == 4; }
  Sequence input_sequence(const Tensor& tensor) const {
    return per_lane() ? time.sequence(tensor) : time.flat_sequence(tensor, 0);
  }

  // Whether sequences have steps that the engine leaves unwritten.
  bool has_padding() const { return ragged.lengths.has_value(); }

 private:
  template <class Params>
  void take_weights(const CellTraits& cell, bool has_biases, Params& p) {
    const int64_t count = static_cast<int64_t>(weights.size()), each = count / p.L;
    const LayerNorm norm = p.variation.layer_norm;
    const bool has_unit_weights = cell.unit_weights > 0, has_ln = norm != LayerNorm::none;
    const int64_t norms = has_ln ? 1 + (norm == LayerNorm::separate) + cell.has_c : 0;
    const int64_t own = has_unit_weights + 2 * norms;
    const int64_t unprojected = (has_biases ? 4 : 2) + own;
    p.projected = each == unprojected + 1;
    STD_TORCH_CHECK(count == each * p.L && (each == unprojected || p.projected),
                    "Expected weights of ", unprojected, " tensors (or ", unprojected + 1,
                    " with a projection) for each of ", p.L, " lanes, got ", count);
    STD_TORCH_CHECK(cell.has_c || !p.projected,
                    "Expected weights without weight_hr: only lstm has "
                    "a projection, not ",
                    cell.name);
    const Tensor& weight_hh = weights[1];
    STD_TORCH_CHECK(weight_hh.dim() == 2 && weight_hh.size(0) % cell.gates == 0,
                    "Expected weight_hh of shape (", cell.gates, "*H, P), got ",
                    shape_string(weight_hh));
    p.H = weight_hh.size(0) / cell.gates;
    p.P = p.H;
    if (p.projected) {
      const Tensor& weight_hr = weights[each - 1 - own];
      STD_TORCH_CHECK(weight_hr.dim() == 2, "Expected weight_hr of shape (P, H), got ",
                      shape_string(weight_hr));
      p.P = weight_hr.size(0);
    }
    lanes.resize(p.L);
    for (int64_t lane = 0; lane < p.L; ++lane) {
      Tensor* given = weights.data() + lane * each;
      auto& to = lanes[lane];
      to.weight_ih = take("weight_ih", *given++, {cell.gates * p.H, p.I}, "(G*H, I)");
      to.weight_hh = take("weight_hh", *given++, {cell.gates * p.H, p.P}, "(G*H, P)");
      if (has_biases) {
        to.bias_ih = take("bias_ih", *given++, {cell.gates * p.H}, "(G*H)");
        to.bias_hh = take("bias_hh", *given++, {cell.gates * p.H}, "(G*H)");
      }
      if (p.projected) to.weight_hr = take("weight_hr", *given++, {p.P, p.H}, "(P, H)");
      if (has_unit_weights)
        to.weight_ch = take("weight_ch", *given++, {cell.unit_weights * p.H}, "(U*H)");
      const auto take_norm = [&](const char* weight, const char* bias, int64_t gates,
                                 const char* letters) -> NormWeights<const void*> {
        const void* taken = take(weight, *given++, {gates * p.H}, letters);
        return {taken, take(bias, *given++, {gates * p.H}, letters)};
      };
      if (norm == LayerNorm::separate) {
        to.ln_input = take_norm("ln_ih_weight", "ln_ih_bias", cell.gates, "(G*H)");
        to.ln_hidden = take_norm("ln_hh_weight", "ln_hh_bias", cell.gates, "(G*H)");
      } else if (has_ln) {
        to.ln_input = take_norm("ln_g_weight", "ln_g_bias", cell.gates, "(G*H)");
      }
      if (has_ln && cell.has_c) to.ln_c = take_norm("ln_c_weight", "ln_c_bias", 1, "(H)");
    }
  }

  template <class Params>
  void take_states(const CellTraits& cell, Params& p) {
    if (states.empty()) return;
    const size_t count = cell.has_c ? 2 : 1;
    STD_TORCH_CHECK(states.size() == count, "Expected states of no tensor or ", count, " for ",
                    cell.name, ", got ", states.size());
    p.hx = take("hx", states[0], {p.L, p.B, p.P}, "(L, B, P)");
    if (cell.has_c) p.cx = take("cx", states[1], {p.L, p.B, p.H}, "(L, B, H)");
  }

  const void* take(const char* name, Tensor& tensor, Sizes shape, const char* letters) const {
    check_kind(name, tensor, kind);
    check_shape(name, tensor, shape, letters);
    tensor = as_contiguous(tensor);
    return tensor.const_data_ptr();
  }
};

TensorList forward(const CellTraits& cell, const Tensor& input, const TensorList& states,
                   const TensorList& weights, bool has_biases, const OptionalTensor& lengths,
                   const OptionalTensor& batch_sizes, const OptionalTensor& resets, int64_t lanes,
                   int64_t directions, bool save, bool want_cells,
                   const VariedArguments* varied = nullptr) {
  STD_TORCH_CHECK(cell.has_c || !want_cells, "Expected want_cells to be false, since ", cell.name,
                  " has no cell state");
  LayerForwardParams p{};
  const LayerArguments arguments(cell, input, states, weights, has_biases, lengths, batch_sizes,
                                 resets, lanes, directions, varied, p);
  const Time& time = arguments.time;
  const ScalarType dtype = input.scalar_type(), c_type = compute_type(dtype);
  const Results make{arguments.input, false};
  const Results make_sequence{arguments.input, arguments.has_padding()};
  TensorList results;
  results.reserve(8);
  const auto add = [&](Tensor tensor) -> const Tensor& {
    return results.emplace_back(std::move(tensor));
  };
  p.output = time.flat_sequence(add(make_sequence(time.shape({p.L * p.P}))), p.P);
  p.h_n = add(make({p.L, p.B, p.P})).data_ptr();
  if (cell.has_c) p.c_n = add(make({p.L, p.B, p.H})).data_ptr();
  if (want_cells) p.cells = time.sequence(add(make_sequence(time.shape({p.L, p.H}), c_type)));
  if (save) {
    const auto reserve = [&](int64_t values, ScalarType type) {
      return blocked_reserve(
          add(make({p.T, p.L, reserve_blocks(p.H), p.B, values, Reserve::block}, type)));
    };
    const SavedCounts counts(cell, varied, p);
    if (counts.reserve > 0) p.reserve = reserve(counts.reserve, dtype);
    if (cell.has_c) p.saved_cells = reserve(counts.cells, c_type);
    if (p.projected) p.unprojected = time.sequence(add(make(time.shape({p.L, p.H}))));
    if (counts.statistics)
      p.statistics = add(make({p.T, p.L, p.B, counts.statistics}, c_type)).data_ptr();
  }
  if (p.B > 0) run(cpu_cell(cell, varied), p, arguments.input);
  return results;
}

TensorList backward(const CellTraits& cell, OptionalTensor grad_output, OptionalTensor grad_h_n,
                    OptionalTensor grad_c_n, OptionalTensor grad_cells, const Tensor& input,
                    const TensorList& states, const TensorList& weights, bool has_biases,
                    const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
                    const OptionalTensor& resets, int64_t lanes, int64_t directions, Tensor output,
                    TensorList saved, bool need_input, bool need_states, bool need_weights,
                    const VariedArguments* varied = nullptr) {
  LayerBackwardParams p{};
  const LayerArguments arguments(cell, input, states, weights, has_biases, lengths, batch_sizes,
                                 resets, lanes, directions, varied, p);
  const Time& time = arguments.time;
  const Tensor& like = arguments.input;
  const ScalarType dtype = like.scalar_type(), c_type = compute_type(dtype);
  const auto check_sequence = [&](const char* name, const Tensor& tensor, ScalarType type,
                                  std::initializer_list<int64_t> tail, const char* letters) {
    check_like(name, tensor, like, type);
    time.check(name, tensor, tail, letters);
  };
  check_no_c(cell, "grad_c_n", grad_c_n);
  check_no_c(cell, "grad_cells", grad_cells);
  check_state("grad_h_n", grad_h_n, like, p.L, p.B, p.P, "(L, B, P)");
  check_state("grad_c_n", grad_c_n, like, p.L, p.B, p.H, "(L, B, H)");
  if (grad_output) check_sequence("grad_output", *grad_output, dtype, {p.L * p.P}, "L*P");
  if (grad_cells) check_sequence("grad_cells", *grad_cells, c_type, {p.L, p.H}, "L, H");
  check_sequence("output", output, dtype, {p.L * p.P}, "L*P");

  const SavedCounts counts(cell, varied, p);
  const size_t saved_count =
      (counts.reserve > 0) + cell.has_c + p.projected + (counts.statistics > 0);
  STD_TORCH_CHECK(saved.size() == saved_count, "Expected saved of ", saved_count, " tensors, got ",
                  saved.size());
  for (Tensor& tensor : saved) tensor = with_contiguous_units(tensor);
  auto next_saved = saved.begin();
  const auto take_reserve = [&](const char* name, int64_t values, ScalarType type) {
    check_like(name, *next_saved, like, type);
    check_shape(name, *next_saved, {p.T, p.L, reserve_blocks(p.H), p.B, values, Reserve::block},
                "(T, L, H/16, B, S, 16)");
    return blocked_reserve(*next_saved++);
  };
  if (counts.reserve > 0) p.reserve = take_reserve("reserve", counts.reserve, dtype);
  if (cell.has_c) p.saved_cells = take_reserve("saved_cells", counts.cells, c_type);
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

  grad_output = with_contiguous_units(grad_output);
  grad_cells = with_contiguous_units(grad_cells);
  grad_h_n = as_contiguous(grad_h_n);
  grad_c_n = as_contiguous(grad_c_n);
  output = with_contiguous_units(output);
  if (grad_output) p.grad_output = time.flat_sequence(*grad_output, p.P);
  if (grad_cells) p.grad_cells = time.sequence(*grad_cells);
  p.grad_h_n = pointer(grad_h_n);
  p.grad_c_n = pointer(grad_c_n);
  p.output = time.flat_sequence(output, p.P);

  const Results make{like, false};
  const Results make_sequence{like, arguments.has_padding()};
  const Results make_weight{like, p.T * p.B == 0};  // nothing to sum
  TensorList results;
  results.reserve(3 + arguments.weights.size());
  const auto add = [&](Tensor tensor) {
    return results.emplace_back(std::move(tensor)).data_ptr();
  };
  if (need_input) {
    if (arguments.per_lane())
      add(make_sequence(time.shape({p.L, p.I})));
    else
      add(make_sequence(time.shape({p.I})));
    p.d_input = arguments.input_sequence(results.back());
  }
  if (need_states) {
    p.d_hx = add(make({p.L, p.B, p.P}));
    if (cell.has_c) p.d_cx = add(make({p.L, p.B, p.H}));
  }
  std::vector<LaneWeights<void*>> d_weights;
  if (need_weights) {
    d_weights.resize(p.L);
    const int64_t rows = cell.gates * p.H;
    for (auto& lane : d_weights) {
      lane.weight_ih = add(make_weight({rows, p.I}));
      lane.weight_hh = add(make_weight({rows, p.P}));
      if (has_biases) {
        lane.bias_ih = add(make_weight({rows}));
        lane.bias_hh = add(make_weight({rows}));
      }
      if (p.projected) lane.weight_hr = add(make_weight({p.P, p.H}));
      if (cell.unit_weights > 0) lane.weight_ch = add(make_weight({cell.unit_weights * p.H}));
      const auto add_norm = [&](int64_t n) -> NormWeights<void*> {
        void* weight = add(make_weight({n}));
        return {weight, add(make_weight({n}))};
      };
      const LayerNorm norm = p.variation.layer_norm;
      if (norm != LayerNorm::none) lane.ln_input = add_norm(rows);
      if (norm == LayerNorm::separate) lane.ln_hidden = add_norm(rows);
      if (norm != LayerNorm::none && cell.has_c) lane.ln_c = add_norm(p.H);
    }
    p.d_weights = d_weights.data();
  }
  if (p.B > 0) run(cpu_cell(cell, varied), p, like);
  return results;
}

#ifdef FUSED_RNN_PER_STEP
// ---- the recurrence alone, on per_step ---------------------------------------------------------------

void check_recurrent_weights(const CellTraits& cell, const Tensor& like, const Tensor& weight_hh,
                             const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
                             const OptionalTensor& weight_ch, const Shape& p) {
  check_kind("weight_hh", weight_hh, Kind(like));
  check_shape("weight_hh", weight_hh, {p.L, cell.gates * p.H, p.P}, "(L, G*H, P)");
  if (bias_hh) {
    check_kind("bias_hh", *bias_hh, Kind(like));
    check_shape("bias_hh", *bias_hh, {p.L, cell.gates * p.H}, "(L, G*H)");
  }
  if (weight_hr) {
    STD_TORCH_CHECK(cell.has_c, "weight_hr: only lstm has a projection, not ", cell.name);
    check_kind("weight_hr", *weight_hr, Kind(like));
    check_shape("weight_hr", *weight_hr, {p.L, p.P, p.H}, "(L, P, H)");
  } else {
    STD_TORCH_CHECK(p.P == p.H, "Expected weight_hh of shape (L, G*H, H) = (", p.L, ", ",
                    cell.gates * p.H, ", ", p.H, "), got ", shape_string(weight_hh));
  }
  STD_TORCH_CHECK(weight_ch.has_value() == (cell.unit_weights > 0), "Expected weight_ch to be ",
                  cell.unit_weights > 0 ? "a tensor" : "None", " for ", cell.name);
  if (weight_ch) {
    check_kind("weight_ch", *weight_ch, Kind(like));
    check_shape("weight_ch", *weight_ch, {p.L, cell.unit_weights * p.H}, "(L, U*H)");
  }
}

using RecurrenceForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using RecurrenceBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a varied recurrence has more than a plain one.
struct RecurrentVariation {
  VariedArguments arguments;
  TensorList norms;           // weight and bias of each, lanes stacked
  OptionalTensor bias_ih;     // taken by forward
  OptionalTensor statistics;  // made by forward, taken by backward
  OptionalTensor keep;        // made by backward

  // From here on parameters have their shape.
  void fill(const CellTraits& cell, const Tensor& like, RecurrenceForwardParams& p) {
    fill_both(cell, like, p);
    if (!bias_ih) return;
    STD_TORCH_CHECK(p.variation.layer_norm == LayerNorm::separate,
                    "Expected bias_ih to be None, since it is in input_gates");
    check_kind("bias_ih", *bias_ih, Kind(like));
    check_shape("bias_ih", *bias_ih, {p.L, cell.gates * p.H}, "(L, G*H)");
    bias_ih = as_contiguous(bias_ih);
    p.bias_ih = pointer(bias_ih);
  }

  void fill(const CellTraits& cell, const Tensor& like, RecurrenceBackwardParams& p) {
    fill_both(cell, like, p);
    const bool has_ln = p.variation.layer_norm != LayerNorm::none;
    STD_TORCH_CHECK(statistics.has_value() == has_ln, "Expected statistics to be ",
                    has_ln ? "a tensor" : "None", " for this layer_norm");
    if (!has_ln) return;
    check_like("statistics", *statistics, like, compute_type(like.scalar_type()));
    const int64_t count = norm_count(p.variation.layer_norm, cell.has_c);
    check_shape("statistics", *statistics, {p.T, p.L, p.B, count}, "(T, L, B, N)");
    statistics = as_contiguous(statistics);
    p.statistics = pointer(statistics);
  }

 private:
  template <class Params>
  void fill_both(const CellTraits& cell, const Tensor& like, Params& p) {
    arguments.fill(cell, like, p);
    const LayerNorm norm = p.variation.layer_norm;
    const bool has_ln = norm != LayerNorm::none;
    const size_t count = has_ln ? 2 * (1 + (norm == LayerNorm::separate) + cell.has_c) : 0;
    STD_TORCH_CHECK(norms.size() == count, "Expected norms of ", count, " tensors, got ",
                    norms.size());
    Tensor* given = norms.data();
    const auto take = [&](int64_t n, const char* letters) {
      check_kind("norms", *given, Kind(like));
      check_shape("norms", *given, {p.L, n}, letters);
      *given = as_contiguous(*given);
      return (given++)->const_data_ptr();
    };
    const auto take_norm = [&](int64_t n, const char* letters) -> NormWeights<const void*> {
      const void* weight = take(n, letters);
      return {weight, take(n, letters)};
    };
    if (has_ln) p.norms.input = take_norm(cell.gates * p.H, "(L, G*H)");
    if (norm == LayerNorm::separate) p.norms.hidden = take_norm(cell.gates * p.H, "(L, G*H)");
    if (has_ln && cell.has_c) p.norms.c = take_norm(p.H, "(L, H)");
  }
};

RecurrenceForward recurrence_forward(const CellTraits& cell, Tensor input_gates, OptionalTensor hx,
                                     OptionalTensor cx, Tensor weight_hh, OptionalTensor bias_hh,
                                     OptionalTensor weight_hr, OptionalTensor weight_ch,
                                     OptionalTensor lengths, OptionalTensor resets,
                                     int64_t directions, bool save_reserve, bool save_cells,
                                     bool tf32, RecurrentVariation* varied = nullptr) {
  RecurrenceForwardParams p{};
  p.dtype = storage_or_dual_type("input_gates", input_gates);
  STD_TORCH_CHECK(input_gates.dim() == 4 && input_gates.size(3) % cell.gates == 0,
                  "Expected input_gates of shape (T, B, L, ", cell.gates, "*H), got ",
                  shape_string(input_gates));
  check_directions(directions, input_gates.size(2));
  STD_TORCH_CHECK(weight_hh.dim() == 3, "Expected weight_hh of shape (L, G*H, P), got ",
                  shape_string(weight_hh));
  p.T = input_gates.size(0);
  p.B = input_gates.size(1);
  p.L = input_gates.size(2);
  p.H = input_gates.size(3) / cell.gates;
  p.P = weight_hh.size(2);
  p.directions = static_cast<int>(directions);
  p.projected = weight_hr.has_value();
  check_recurrent_weights(cell, input_gates, weight_hh, bias_hh, weight_hr, weight_ch, p);
  if (varied) varied->fill(cell, input_gates, p);
  check_state("hx", hx, input_gates, p.L, p.B, p.P, "(L, B, P)");
  check_no_c(cell, "cx", cx);
  check_state("cx", cx, input_gates, p.L, p.B, p.H, "(L, B, H)");
  const Ragged ragged(lengths, resets, input_gates, p.T, p.B);

  input_gates = with_contiguous_units(input_gates);
  hx = as_contiguous(hx);
  cx = as_contiguous(cx);
  weight_hh = as_contiguous(weight_hh);
  bias_hh = as_contiguous(bias_hh);
  weight_hr = as_contiguous(weight_hr);
  weight_ch = as_contiguous(weight_ch);
  ragged.fill(p);
  p.input_gates = sequence(input_gates);
  p.hx = pointer(hx);
  p.cx = pointer(cx);
  p.weight_hh = weight_hh.const_data_ptr();
  p.bias_hh = pointer(bias_hh);
  p.weight_hr = pointer(weight_hr);
  p.weight_ch = pointer(weight_ch);

  const Results make{input_gates, p.lengths != nullptr};
  const Results make_state{input_gates, false};
  const ScalarType c_type = compute_type(input_gates.scalar_type());
  const SavedCounts counts(cell, varied, p);
  const bool with_cells = cell.has_c && (save_reserve || save_cells);
  const bool with_reserve = save_reserve && counts.reserve > 0;
  const bool with_unprojected = save_reserve && p.projected;
  Tensor output = make({p.T, p.B, p.L, p.P});
  Tensor h_n = make_state({p.L, p.B, p.P});
  Tensor c_n = cell.has_c ? make_state({p.L, p.B, p.H}) : make.none();
  Tensor reserve = with_reserve ? make({p.T, p.B, p.L, counts.reserve * p.H}) : make.none();
  Tensor cells = with_cells ? make({p.T, p.B, p.L, (save_reserve ? counts.cells : 1) * p.H}, c_type)
                            : make.none();
  Tensor unprojected = with_unprojected ? make({p.T, p.B, p.L, p.H}) : make.none();
  p.output = sequence(output);
  p.h_n = h_n.data_ptr();
  p.c_n = cell.has_c ? c_n.data_ptr() : nullptr;
  if (with_reserve) p.reserve = natural_reserve(reserve, p.H);
  if (with_cells && save_reserve) p.saved_cells = natural_reserve(cells, p.H);
  if (with_cells && !save_reserve) p.cells = sequence(cells);
  if (with_unprojected) p.unprojected = sequence(unprojected);

  if (varied) {
    const bool with_statistics = save_reserve && counts.statistics;
    varied->statistics =
        with_statistics ? make({p.T, p.L, p.B, counts.statistics}, c_type) : make.none();
    if (with_statistics) p.statistics = varied->statistics->data_ptr();
  }

  if (p.L * p.B > 0) run_recurrence(cell, varied, tf32, p, input_gates);
  return {output, h_n, c_n, reserve, cells, unprojected};
}

RecurrenceBackward recurrence_backward(const CellTraits& cell, OptionalTensor grad_output,
                                       OptionalTensor grad_h_n, OptionalTensor grad_c_n,
                                       OptionalTensor grad_cells, Tensor output, Tensor reserve,
                                       Tensor cells, OptionalTensor hx, OptionalTensor cx,
                                       Tensor weight_hh, OptionalTensor weight_hr,
                                       OptionalTensor weight_ch, OptionalTensor lengths,
                                       OptionalTensor resets, int64_t directions, bool tf32,
                                       RecurrentVariation* varied = nullptr) {
  RecurrenceBackwardParams p{};
  p.dtype = storage_or_dual_type("output", output);
  STD_TORCH_CHECK(output.dim() == 4, "Expected output of shape (T, B, L, P), got ",
                  shape_string(output));
  STD_TORCH_CHECK(weight_hh.dim() == 3 && weight_hh.size(1) % cell.gates == 0,
                  "Expected weight_hh of shape (L, ", cell.gates, "*H, P), got ",
                  shape_string(weight_hh));
  check_directions(directions, output.size(2));
  p.T = output.size(0);
  p.B = output.size(1);
  p.L = output.size(2);
  p.P = output.size(3);
  p.H = weight_hh.size(1) / cell.gates;
  p.directions = static_cast<int>(directions);
  p.projected = weight_hr.has_value();
  check_recurrent_weights(cell, output, weight_hh, std::nullopt, weight_hr, weight_ch, p);
  if (varied) varied->fill(cell, output, p);
  const SavedCounts counts(cell, varied, p);
  check_state("hx", hx, output, p.L, p.B, p.P, "(L, B, P)");
  check_no_c(cell, "cx", cx);
  check_no_c(cell, "grad_c_n", grad_c_n);
  check_no_c(cell, "grad_cells", grad_cells);
  check_state("cx", cx, output, p.L, p.B, p.H, "(L, B, H)");
  check_state("grad_h_n", grad_h_n, output, p.L, p.B, p.P, "(L, B, P)");
  check_state("grad_c_n", grad_c_n, output, p.L, p.B, p.H, "(L, B, H)");
  if (grad_output) {
    check_like("grad_output", *grad_output, output, output.scalar_type());
    check_shape("grad_output", *grad_output, {p.T, p.B, p.L, p.P}, "(T, B, L, P)");
  }
  const ScalarType c_type = compute_type(output.scalar_type());
  if (grad_cells) {
    check_like("grad_cells", *grad_cells, output, c_type);
    check_shape("grad_cells", *grad_cells, {p.T, p.B, p.L, p.H}, "(T, B, L, H)");
  }
  if (counts.reserve > 0) {
    check_like("reserve", reserve, output, output.scalar_type());
    check_shape("reserve", reserve, {p.T, p.B, p.L, counts.reserve * p.H}, "(T, B, L, S*H)");
  }
  if (cell.has_c) {
    check_like("cells", cells, output, c_type);
    check_shape("cells", cells, {p.T, p.B, p.L, counts.cells * p.H},
                counts.cells > 1 ? "(T, B, L, 2*H)" : "(T, B, L, H)");
  }
  const Ragged ragged(lengths, resets, output, p.T, p.B);

  grad_output = with_contiguous_units(grad_output);
  grad_cells = with_contiguous_units(grad_cells);
  grad_h_n = as_contiguous(grad_h_n);
  grad_c_n = as_contiguous(grad_c_n);
  output = with_contiguous_units(output);
  hx = as_contiguous(hx);
  cx = as_contiguous(cx);
  weight_hh = as_contiguous(weight_hh);
  weight_hr = as_contiguous(weight_hr);
  weight_ch = as_contiguous(weight_ch);
  ragged.fill(p);
  p.grad_output = sequence(grad_output);
  p.grad_cells = sequence(grad_cells);
  p.grad_h_n = pointer(grad_h_n);
  p.grad_c_n = pointer(grad_c_n);
  p.output = sequence(output);
  if (counts.reserve > 0)
    p.reserve = natural_reserve(reserve = with_contiguous_units(reserve), p.H);
  if (cell.has_c) p.saved_cells = natural_reserve(cells = with_contiguous_units(cells), p.H);
  p.hx = pointer(hx);
  p.cx = pointer(cx);
  p.weight_hh = weight_hh.const_data_ptr();
  p.weight_hr = pointer(weight_hr);
  p.weight_ch = pointer(weight_ch);

  const Results make{output, p.lengths != nullptr};
  const Results make_state{output, false};
  Tensor d_input_gates = make({p.T, p.B, p.L, cell.gates * p.H});
  const LayerNorm norm = p.variation.layer_norm;
  const bool split_gates =
      norm == LayerNorm::separate || (norm == LayerNorm::none && cell.split_gates);
  Tensor d_hidden_gates = split_gates ? make({p.T, p.B, p.L, cell.gates * p.H}) : make.none();
  Tensor d_output = p.projected ? make({p.T, p.B, p.L, p.P}) : make.none();
  const Results make_sums{output, true};
  const int64_t unit_weights = unit_gradients(cell, p).count;
  Tensor d_unit_weights =
      unit_weights > 0 ? make_sums({p.L, p.B, unit_weights, p.H}, c_type) : make.none();
  Tensor d_hx = make_state({p.L, p.B, p.P});
  Tensor d_cx = cell.has_c ? make_state({p.L, p.B, p.H}) : make.none();
  p.d_input_gates = sequence(d_input_gates);
  if (split_gates) p.d_hidden_gates = sequence(d_hidden_gates);
  if (p.projected) p.d_output = sequence(d_output);
  if (unit_weights > 0) p.d_unit_weights = d_unit_weights.data_ptr();
  p.d_hx = d_hx.data_ptr();
  p.d_cx = cell.has_c ? d_cx.data_ptr() : nullptr;

  if (varied) {
    const bool drops = p.variation.recurrent_dropout > 0;
    varied->keep = drops ? make_state({p.L, p.B, p.P}, c_type) : make.none();
    if (drops) p.keep = varied->keep->data_ptr();
  }

  if (p.L * p.B > 0) run_recurrence(cell, varied, tf32, p, output);
  return {d_input_gates, d_hidden_gates, d_hx, d_cx, d_output, d_unit_weights};
}

#endif

// ---- dropout of weights

void run(const DropoutParams& p, const Tensor& like) {
#ifdef FUSED_RNN_CUDA_ON_CPU
  const cuda_on_cpu::DropoutArguments watched(p);
  cuda::run_dropout(p, nullptr);
  watched.check_results();
#else
#ifdef FUSED_RNN_CUDA
  if (!like.is_cpu()) return on_cuda(like, [&](void* stream) { cuda::run_dropout(p, stream); });
#endif
  on_cpu(like,
         [&](const cpu::Host& host) { cpu::active_instruction_set().dropout(p.dtype)(p, host); });
#endif
}

Tensor dropout(const Tensor& input_in, double probability, const Tensor& seed) {
  DropoutParams p{};
  const Tensor input = as_contiguous(input_in);
  p.dtype = storage_type("input", input);
  STD_TORCH_CHECK(input.dim() >= 1, "Expected input of at least one dimension, got ",
                  shape_string(input));
  STD_TORCH_CHECK(probability >= 0 && probability < 1, "Expected p in [0, 1), got ", probability);
  Tensor output = torch::stable::empty_like(input);
  p.n = input.size(input.dim() - 1);
  p.rows = p.n > 0 ? input.numel() / p.n : 0;
  p.p = probability;
  p.seed = VariedArguments::seed_pointer(seed, input);
  p.input = input.const_data_ptr();
  p.output = output.data_ptr();
  if (p.rows * p.n > 0) run(p, input);
  return output;
}

// ---- additive attention --------------------------------------------------------------------------

// The arguments that forward and backward share, checked and made contiguous; keeps them alive.
struct AttentionInputs {
  Tensor query, key, value, weight;
  OptionalTensor bias, lengths, mask;

  AttentionInputs(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in,
                  const Tensor& weight_in, const OptionalTensor& bias_in,
                  const OptionalTensor& lengths_in, const OptionalTensor& mask_in, bool causal,
                  double dropout_p, int64_t seed, AttentionShape& p)
      : query(as_contiguous(query_in)),
        key(as_contiguous(key_in)),
        value(as_contiguous(value_in)),
        weight(as_contiguous(weight_in)),
        bias(as_contiguous(bias_in)),
        lengths(as_contiguous(lengths_in)),
        mask(as_contiguous(mask_in)) {
    p.dtype = storage_type("query", query);
    const ScalarType dtype = query.scalar_type();
    for (const auto& [name, tensor] :
         {std::pair("query", query), std::pair("key", key), std::pair("value", value)})
      STD_TORCH_CHECK(tensor.dim() == 3, "Expected ", name, " of three dimensions, got ",
                      shape_string(tensor));
    p.B = query.size(0);
    p.Q = query.size(1);
    p.A = query.size(2);
    p.K = key.size(1);
    p.D = value.size(2);
    check_like("key", key, query, dtype);
    check_shape("key", key, {p.B, p.K, p.A}, "(B, Tk, A)");
    check_like("value", value, query, dtype);
    check_shape("value", value, {p.B, p.K, p.D}, "(B, Tk, D)");
    check_like("weight", weight, query, dtype);
    check_shape("weight", weight, {p.A}, "(A)");
    if (bias) {
      check_like("bias", *bias, query, dtype);
      check_shape("bias", *bias, {p.A}, "(A)");
    }
    if (lengths) check_lengths(*lengths, query, p.K, p.B, "the keys");
    if (mask) {
      check_like("mask", *mask, query, ScalarType::Bool);
      const int64_t rows = mask->dim() == 3 && mask->size(1) == 1 ? 1 : p.Q;
      check_shape("mask", *mask, {p.B, rows, p.K}, "(B, Tq or 1, Tk)");
      p.mask_per_query = rows != 1 || p.Q == 1;
    }
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "Expected dropout_p in [0, 1), got ",
                    dropout_p);
    p.lengths = static_cast<const int64_t*>(pointer(lengths));
    p.mask = static_cast<const bool*>(pointer(mask));
    p.causal = causal;
    p.dropout_p = dropout_p;
    p.seed = static_cast<uint64_t>(seed);
    p.query = query.const_data_ptr();
    p.key = key.const_data_ptr();
    p.value = value.const_data_ptr();
    p.weight = weight.const_data_ptr();
    p.bias = pointer(bias);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_forward(
    Tensor query, Tensor key, Tensor value, Tensor weight, OptionalTensor bias,
    OptionalTensor lengths, OptionalTensor mask, bool causal, double dropout_p, int64_t seed,
    bool want_weights, bool want_scores) {
  AttentionForwardParams p{};
  const AttentionInputs inputs(query, key, value, weight, bias, lengths, mask, causal, dropout_p,
                               seed, p);
  const ScalarType c_type = compute_type(query.scalar_type());
  const bool empty = p.B * p.Q * p.K == 0;  // then there is nothing to attend to
  const Results make{inputs.query, empty};
  Tensor context = make({p.B, p.Q, p.D});
  Tensor logsumexp = make({p.B, p.Q}, c_type);
  Tensor weights = want_weights ? make({p.B, p.Q, p.K}) : make.none();
  Tensor scores = want_scores ? make({p.B, p.Q, p.K}) : make.none();
  p.context = context.data_ptr();
  p.logsumexp = logsumexp.data_ptr();
  p.weights = want_weights ? weights.data_ptr() : nullptr;
  p.scores = want_scores ? scores.data_ptr() : nullptr;
  if (empty)
    torch::stable::fill_(logsumexp, -INFINITY);
  else
    on_cpu(inputs.query, [&](const cpu::Host& host) {
      cpu::active_instruction_set().attention_forward(p.dtype)(p, host);
    });
  return {context, logsumexp, weights, scores};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    OptionalTensor grad_context, OptionalTensor grad_weights, OptionalTensor grad_scores,
    Tensor query, Tensor key, Tensor value, Tensor weight, OptionalTensor bias,
    OptionalTensor lengths, OptionalTensor mask, bool causal, double dropout_p, int64_t seed,
    Tensor context, Tensor logsumexp) {
  AttentionBackwardParams p{};
  const AttentionInputs inputs(query, key, value, weight, bias, lengths, mask, causal, dropout_p,
                               seed, p);
  const ScalarType dtype = query.scalar_type();
  const auto check_gradient = [&](const char* name, const OptionalTensor& gradient, int64_t n,
                                  const char* letters) {
    if (!gradient) return;
    check_like(name, *gradient, query, dtype);
    check_shape(name, *gradient, {p.B, p.Q, n}, letters);
  };
  check_gradient("grad_context", grad_context, p.D, "(B, Tq, D)");
  check_gradient("grad_weights", grad_weights, p.K, "(B, Tq, Tk)");
  check_gradient("grad_scores", grad_scores, p.K, "(B, Tq, Tk)");
  check_like("logsumexp", logsumexp, query, compute_type(dtype));
  check_shape("logsumexp", logsumexp, {p.B, p.Q}, "(B, Tq)");
  grad_context = as_contiguous(grad_context);
  grad_weights = as_contiguous(grad_weights);
  grad_scores = as_contiguous(grad_scores);
  logsumexp = as_contiguous(logsumexp);
  const bool empty = p.B * p.Q * p.K == 0;
  const Results make{inputs.query, empty};
  Tensor d_query = make({p.B, p.Q, p.A});
  Tensor d_key = make({p.B, p.K, p.A});
  Tensor d_value = make({p.B, p.K, p.D});
  Tensor d_weight = make({p.A});
  Tensor d_bias = bias ? make({p.A}) : make.none();
  p.grad_context = pointer(grad_context);
  p.grad_weights = pointer(grad_weights);
  p.grad_scores = pointer(grad_scores);
  p.logsumexp = logsumexp.const_data_ptr();
  p.d_query = d_query.data_ptr();
  p.d_key = d_key.data_ptr();
  p.d_value = d_value.data_ptr();
  p.d_weight = d_weight.data_ptr();
  p.d_bias = bias ? d_bias.data_ptr() : nullptr;
  if (!empty)
    on_cpu(inputs.query, [&](const cpu::Host& host) {
      cpu::active_instruction_set().attention_backward(p.dtype)(p, host);
    });
  return {d_query, d_key, d_value, d_weight, d_bias};
}

// Plain functions for each cell: TORCH_BOX does not instantiate templates.
#define FUSED_RNN_LAYER(name, cell)                                                                \
  TensorList name##_forward(const Tensor& input, const TensorList& states,                         \
                            const TensorList& weights, bool has_biases,                            \
                            const OptionalTensor& lengths, const OptionalTensor& batch_sizes,      \
                            const OptionalTensor& resets, int64_t lanes, int64_t directions,       \
                            bool save, bool want_cells) {                                          \
    return forward(traits(CellIndex::name), input, states, weights, has_biases, lengths,           \
                   batch_sizes, resets, lanes, directions, save, want_cells);                      \
  }                                                                                                \
  TensorList name##_backward(                                                                      \
      const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,                           \
      const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells, const Tensor& input,       \
      const TensorList& states, const TensorList& weights, bool has_biases,                        \
      const OptionalTensor& lengths, const OptionalTensor& batch_sizes,                            \
      const OptionalTensor& resets, int64_t lanes, int64_t directions, const Tensor& output,       \
      const TensorList& saved, bool need_input, bool need_states, bool need_weights) {             \
    return backward(traits(CellIndex::name), grad_output, grad_h_n, grad_c_n, grad_cells, input,   \
                    states, weights, has_biases, lengths, batch_sizes, resets, lanes, directions,  \
                    output, saved, need_input, need_states, need_weights);                         \
  }                                                                                                \
  TensorList name##_varied_forward(                                                                \
      const Tensor& input, const TensorList& states, const TensorList& weights, bool has_biases,   \
      const OptionalTensor& lengths, const OptionalTensor& batch_sizes,                            \
      const OptionalTensor& resets, int64_t lanes, int64_t directions, bool save, bool want_cells, \
      int64_t layer_norm, double zoneout_h, double zoneout_c, double recurrent_dropout,            \
      double layer_norm_eps, const OptionalTensor& seed) {                                         \
    const VariedArguments varied{layer_norm,        zoneout_h,      zoneout_c,                     \
                                 recurrent_dropout, layer_norm_eps, seed};                         \
    return forward(traits(CellIndex::name), input, states, weights, has_biases, lengths,           \
                   batch_sizes, resets, lanes, directions, save, want_cells, &varied);             \
  }                                                                                                \
  TensorList name##_varied_backward(                                                               \
      const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,                           \
      const OptionalTensor& grad_c_n, const OptionalTensor& grad_cells, const Tensor& input,       \
      const TensorList& states, const TensorList& weights, bool has_biases,                        \
      const OptionalTensor& lengths, const OptionalTensor& batch_sizes,                            \
      const OptionalTensor& resets, int64_t lanes, int64_t directions, const Tensor& output,       \
      const TensorList& saved, bool need_input, bool need_states, bool need_weights,               \
      int64_t layer_norm, double zoneout_h, double zoneout_c, double recurrent_dropout,            \
      double layer_norm_eps, const OptionalTensor& seed) {                                         \
    const VariedArguments varied{layer_norm,        zoneout_h,      zoneout_c,                     \
                                 recurrent_dropout, layer_norm_eps, seed};                         \
    return backward(traits(CellIndex::name), grad_output, grad_h_n, grad_c_n, grad_cells, input,   \
                    states, weights, has_biases, lengths, batch_sizes, resets, lanes, directions,  \
                    output, saved, need_input, need_states, need_weights, &varied);                \
  }
FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_LAYER)

#ifdef FUSED_RNN_PER_STEP
#define FUSED_RNN_RECURRENCE(name, cell)                                                          \
  RecurrenceForward name##_recurrence_forward(                                                    \
      Tensor input_gates, OptionalTensor hx, OptionalTensor cx, Tensor weight_hh,                 \
      OptionalTensor bias_hh, OptionalTensor weight_hr, OptionalTensor weight_ch,                 \
      OptionalTensor lengths, OptionalTensor resets, int64_t directions, bool save_reserve,       \
      bool save_cells, bool tf32) {                                                               \
    return recurrence_forward(traits(CellIndex::name), input_gates, hx, cx, weight_hh, bias_hh,   \
                              weight_hr, weight_ch, lengths, resets, directions, save_reserve,    \
                              save_cells, tf32);                                                  \
  }                                                                                               \
  RecurrenceBackward name##_recurrence_backward(                                                  \
      OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n,               \
      OptionalTensor grad_cells, Tensor output, Tensor reserve, Tensor cells, OptionalTensor hx,  \
      OptionalTensor cx, Tensor weight_hh, OptionalTensor weight_hr, OptionalTensor weight_ch,    \
      OptionalTensor lengths, OptionalTensor resets, int64_t directions, bool tf32) {             \
    return recurrence_backward(traits(CellIndex::name), grad_output, grad_h_n, grad_c_n,          \
                               grad_cells, output, reserve, cells, hx, cx, weight_hh, weight_hr,  \
                               weight_ch, lengths, resets, directions, tf32);                     \
  }                                                                                               \
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>                              \
  name##_varied_recurrence_forward(                                                               \
      Tensor input_gates, OptionalTensor hx, OptionalTensor cx, Tensor weight_hh,                 \
      OptionalTensor bias_hh, OptionalTensor weight_hr, OptionalTensor weight_ch,                 \
      OptionalTensor lengths, OptionalTensor resets, int64_t directions, bool save_reserve,       \
      bool save_cells, TensorList norms, OptionalTensor bias_ih, int64_t layer_norm,              \
      double zoneout_h, double zoneout_c, double recurrent_dropout, double layer_norm_eps,        \
      OptionalTensor seed) {                                                                      \
    RecurrentVariation varied{                                                                    \
        {layer_norm, zoneout_h, zoneout_c, recurrent_dropout, layer_norm_eps, seed},              \
        norms,                                                                                    \
        bias_ih,                                                                                  \
        {},                                                                                       \
        {}};                                                                                      \
    auto results = recurrence_forward(traits(CellIndex::name), input_gates, hx, cx, weight_hh,    \
                                      bias_hh, weight_hr, weight_ch, lengths, resets, directions, \
                                      save_reserve, save_cells, false, &varied);                  \
    return std::tuple_cat(results, std::tuple(*varied.statistics));                               \
  }                                                                                               \
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>                              \
  name##_varied_recurrence_backward(                                                              \
      OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n,               \
      OptionalTensor grad_cells, Tensor output, Tensor reserve, Tensor cells, OptionalTensor hx,  \
      OptionalTensor cx, Tensor weight_hh, OptionalTensor weight_hr, OptionalTensor weight_ch,    \
      OptionalTensor lengths, OptionalTensor resets, int64_t directions, TensorList norms,        \
      OptionalTensor statistics, int64_t layer_norm, double zoneout_h, double zoneout_c,          \
      double recurrent_dropout, double layer_norm_eps, OptionalTensor seed) {                     \
    RecurrentVariation varied{                                                                    \
        {layer_norm, zoneout_h, zoneout_c, recurrent_dropout, layer_norm_eps, seed},              \
        norms,                                                                                    \
        {},                                                                                       \
        statistics,                                                                               \
        {}};                                                                                      \
    auto results =                                                                                \
        recurrence_backward(traits(CellIndex::name), grad_output, grad_h_n, grad_c_n, grad_cells, \
                            output, reserve, cells, hx, cx, weight_hh, weight_hr, weight_ch,      \
                            lengths, resets, directions, false, &varied);                         \
    return std::tuple_cat(results, std::tuple(*varied.keep));                                     \
  }
FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_RECURRENCE)
#endif

// Letters as in params.h.
//
// One layer, all directions: `states` is empty or hx (L, B, P) and, for lstm, cx (L, B, H); `weights`
// has for every lane weight_ih, weight_hh, bias_ih and bias_hh if has_biases, weight_hr if there is a
// projection, and weight_ch if the cell has weights of its own. Input is (T, B, I), which all lanes read, or
// (T, B, L, I). Forward returns output (T, B, L*P), h_n, c_n for lstm, the cells (T, B, L, H) if
// wanted, and if `save` what backward takes as `saved`: the reserve unless the cell has none, for lstm
// the cells again, unprojected if there is a projection. Backward returns d_input, the gradients of
// states and those of weights, each if needed.
//
// With batch_sizes (T), on the CPU, sequences are those of torch's PackedSequence: of every (T, B, ...)
// above only the rows that exist, (N, ...). B is the first of batch_sizes. Steps that do not exist are
// zero in output, cells and d_input, and anything in what is saved.
//
// Complex input, and with it everything else, is dual numbers, value + tangent * i where i^2 = 0: the
// results' real parts are those of the real parts, their imaginary parts the derivative of that in the
// direction of the imaginary parts.
//
// The varied ops, {cell}_varied_forward and _backward, are layers with options that change the step
// around the cell. After the weights above they take weight and bias of each normalisation, ih, hh and c
// or g and c, and save statistics (T, L, B, N) of N normalisations for backward; layer_norm is of LayerNorm. Without a seed ()
// nothing is drawn, and zoneout is its expectation.
#define FUSED_RNN_VARIED_SCHEMA                                                         \
  ", int layer_norm, float zoneout_h, float zoneout_c, float recurrent_dropout, float " \
  "layer_norm_eps, Tensor? seed)"
#define FUSED_RNN_FORWARD_SCHEMA                                                                \
  "forward(Tensor input, Tensor[] states, Tensor[] weights, bool has_biases, Tensor? lengths, " \
  "Tensor? batch_sizes, Tensor? resets, int lanes, int directions, bool save, bool want_cells"
#define FUSED_RNN_BACKWARD_SCHEMA                                                          \
  "backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, " \
  "Tensor input, Tensor[] states, Tensor[] weights, bool has_biases, Tensor? lengths, "    \
  "Tensor? batch_sizes, Tensor? resets, int lanes, int directions, Tensor output, "        \
  "Tensor[] saved, bool need_input, bool need_states, bool need_weights"
constexpr const char* layer_schemas[] = {
    "_" FUSED_RNN_FORWARD_SCHEMA ") -> Tensor[]",
    "_" FUSED_RNN_BACKWARD_SCHEMA ") -> Tensor[]",
    "_varied_" FUSED_RNN_FORWARD_SCHEMA FUSED_RNN_VARIED_SCHEMA " -> Tensor[]",
    "_varied_" FUSED_RNN_BACKWARD_SCHEMA FUSED_RNN_VARIED_SCHEMA " -> Tensor[]",
};

// What CUDA has in C++: fused_rnn/composed.py makes a layer of it. Absent results have shape (0,).
//
// The varied ones, {cell}_varied_recurrence_forward and _backward, take weight and bias of each
// normalisation, (L, G*H) or (L, H), and if layer_norm is "separate" bias_ih, which then is not in
// input_gates. Backward returns keep (L, B, P), by what recurrent dropout has multiplied h.
// d_unit_weights is (L, B, K, H), by row of the batch: K as in UnitWeightPlaces (step.h).
#define FUSED_RNN_RECURRENCE_FORWARD_SCHEMA                                                  \
  "recurrence_forward(Tensor input_gates, Tensor? hx, Tensor? cx, Tensor weight_hh, "        \
  "Tensor? bias_hh, Tensor? weight_hr, Tensor? weight_ch, Tensor? lengths, Tensor? resets, " \
  "int directions, bool save_reserve, bool save_cells"
#define FUSED_RNN_RECURRENCE_FORWARD_RESULTS \
  " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve, Tensor cells, Tensor unprojected"
#define FUSED_RNN_RECURRENCE_BACKWARD_SCHEMA                                                  \
  "recurrence_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "             \
  "Tensor? grad_cells, Tensor output, Tensor reserve, Tensor cells, Tensor? hx, Tensor? cx, " \
  "Tensor weight_hh, Tensor? weight_hr, Tensor? weight_ch, Tensor? lengths, Tensor? resets, " \
  "int directions"
#define FUSED_RNN_RECURRENCE_BACKWARD_RESULTS                                    \
  " -> (Tensor d_input_gates, Tensor d_hidden_gates, Tensor d_hx, Tensor d_cx, " \
  "Tensor d_output, Tensor d_unit_weights"
constexpr const char* recurrence_schemas[] = {
    "_" FUSED_RNN_RECURRENCE_FORWARD_SCHEMA
    ", bool tf32=False)" FUSED_RNN_RECURRENCE_FORWARD_RESULTS ")",
    "_" FUSED_RNN_RECURRENCE_BACKWARD_SCHEMA
    ", bool tf32=False)" FUSED_RNN_RECURRENCE_BACKWARD_RESULTS ")",
    "_varied_" FUSED_RNN_RECURRENCE_FORWARD_SCHEMA
    ", Tensor[] norms, Tensor? bias_ih" FUSED_RNN_VARIED_SCHEMA FUSED_RNN_RECURRENCE_FORWARD_RESULTS
    ", Tensor statistics)",
    "_varied_" FUSED_RNN_RECURRENCE_BACKWARD_SCHEMA
    ", Tensor[] norms, Tensor? "
    "statistics" FUSED_RNN_VARIED_SCHEMA FUSED_RNN_RECURRENCE_BACKWARD_RESULTS ", Tensor keep)",
};

// input * 0 with probability p, else / (1 - p): of rows (the last dimension) as philox.h draws them, in
// the stream of weight dropout.
constexpr const char* dropout_schema = "dropout(Tensor input, float p, Tensor seed) -> Tensor";

// Absent results have shape (0,). On CUDA the two are Triton kernels (kernels/attention_scores.py).
constexpr const char* attention_forward_schema =
    "additive_attention_forward(Tensor query, Tensor key, Tensor value, Tensor weight, "
    "Tensor? bias, Tensor? lengths, Tensor? mask, bool causal, float dropout_p, int seed, "
    "bool want_weights, bool want_scores) -> (Tensor context, Tensor logsumexp, Tensor weights, "
    "Tensor scores)";
constexpr const char* attention_backward_schema =
    "additive_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor? grad_scores, "
    "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor? lengths, "
    "Tensor? mask, bool causal, float dropout_p, int seed, Tensor context, Tensor logsumexp) -> "
    "(Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_weight, Tensor d_bias)";

template <class Library>
void implement_layers(Library& library) {
#define FUSED_RNN_IMPLEMENT_LAYER(name, cell)                               \
  library.impl(#name "_forward", TORCH_BOX(&name##_forward));               \
  library.impl(#name "_backward", TORCH_BOX(&name##_backward));             \
  library.impl(#name "_varied_forward", TORCH_BOX(&name##_varied_forward)); \
  library.impl(#name "_varied_backward", TORCH_BOX(&name##_varied_backward));
  FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_IMPLEMENT_LAYER)
}

#ifdef FUSED_RNN_PER_STEP
template <class Library>
void implement_recurrences(Library& library) {
#define FUSED_RNN_IMPLEMENT_RECURRENCE(name, cell)                                                \
  library.impl(#name "_recurrence_forward", TORCH_BOX(&name##_recurrence_forward));               \
  library.impl(#name "_recurrence_backward", TORCH_BOX(&name##_recurrence_backward));             \
  library.impl(#name "_varied_recurrence_forward", TORCH_BOX(&name##_varied_recurrence_forward)); \
  library.impl(#name "_varied_recurrence_backward", TORCH_BOX(&name##_varied_recurrence_backward));
  FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_IMPLEMENT_RECURRENCE)
}
#endif

// ---- what explain shows --------------------------------------------------------------------------------

namespace py = pybind11;

DType dtype_named(const std::string& name) {
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};  // as DType
  for (int i = 0; i < 4; ++i)
    if (name == names[i]) return static_cast<DType>(i);
  throw std::invalid_argument("no dtype of that name: " + name);
}

// The GPU at hand if there is no name.
cuda::Chip chip_named(const std::optional<std::string>& name) {
  if (!name) {
#ifdef FUSED_RNN_PER_STEP
    return cuda::chip_at_hand();
#else
    throw std::runtime_error("Expected the name of a chip: this build has no CUDA");
#endif
  }
  for (const auto& known : cuda::named_chips())
    if (*name == known.name) return known.chip;
  throw std::invalid_argument("no chip of that name: " + *name);
}

py::dict cuda_chips() {
  py::dict chips;
  for (const auto& [name, chip] : cuda::named_chips()) {
    py::dict facts;
    facts["capability"] = chip.capability;
    facts["multiprocessors"] = chip.multiprocessors;
    facts["shared_bytes"] = chip.shared_bytes;
    py::dict clusters;
    for (int i = 0; i < 5; ++i) clusters[py::int_(cuda::cluster_sizes[i])] = chip.clusters[i];
    facts["clusters"] = clusters;
    facts["gigahertz"] = chip.gigahertz;
    chips[name] = facts;
  }
  return chips;
}

cuda::Task cuda_task_named(const std::string& cell, const std::string& dtype, int64_t T, int64_t B,
                           int64_t L, int64_t H, bool projected, bool varied, bool tf32,
                           bool backward) {
  Shape p{};
  p.dtype = dtype_named(dtype);
  p.T = T;
  p.B = B;
  p.L = L;
  p.H = H;
  p.projected = projected;
  return cuda_task(traits(cell), varied, tf32, backward, p);
}

py::list cuda_plan(const std::string& cell, const std::string& dtype, int64_t T, int64_t B,
                   int64_t L, int64_t H, bool projected, bool varied, bool tf32, bool backward,
                   const std::optional<std::string>& chip) {
  const cuda::Task task =
      cuda_task_named(cell, dtype, T, B, L, H, projected, varied, tf32, backward);
  py::list plan;
  for (const auto& each : cuda::candidates(task, chip_named(chip), forced_cuda_engine())) {
    py::dict candidate;
    candidate["engine"] = cuda::engine_names[static_cast<int>(each.layout.engine)];
    candidate["possible"] = each.possible;
    candidate["microseconds_per_step"] = each.microseconds_per_step > 0
                                             ? py::object(py::float_(each.microseconds_per_step))
                                             : py::none();
    candidate["reason"] = each.why;
    candidate["shared_bytes"] = each.shared_bytes;
    plan.append(candidate);
  }
  return plan;
}

py::dict cuda_wavefront(const std::string& cell, const std::string& dtype, int64_t T, int64_t B,
                        int64_t L, int64_t H, int layers, bool projected, bool tf32, bool training,
                        bool captured, const std::optional<std::string>& chip) {
  const cuda::Task task = cuda_task_named(cell, dtype, T, B, L, H, projected, false, tf32, false);
  const cuda::Wavefront found =
      cuda::wavefront(task, layers, training, captured, chip_named(chip), forced_cuda_engine());
  py::dict plan;
  plan["parts"] = found.parts;
  plan["microseconds"] = found.microseconds;
  plan["microseconds_in_one_part"] = found.in_one_part;
  return plan;
}

}  // namespace fused_rnn::binding

// Through a macro, so that the name is expanded before torch pastes it.
#ifdef FUSED_RNN_USER_CELLS
#define FUSED_RNN_LIBRARY(name, library) STABLE_TORCH_LIBRARY_FRAGMENT(name, library)
#else
#define FUSED_RNN_LIBRARY(name, library) STABLE_TORCH_LIBRARY(name, library)
#endif
#define FUSED_RNN_LIBRARY_IMPL(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)

FUSED_RNN_LIBRARY(FUSED_RNN_NAMESPACE, library) {
  namespace binding = fused_rnn::binding;
  for (const auto& cell : binding::cell_traits) {
    for (const char* schema : binding::layer_schemas)
      library.def((std::string(cell.name) + schema).c_str());
    for (const char* schema : binding::recurrence_schemas)
      library.def((std::string(cell.name) + schema).c_str());
  }
#ifndef FUSED_RNN_USER_CELLS
  library.def(binding::dropout_schema);
  library.def(binding::attention_forward_schema);
  library.def(binding::attention_backward_schema);
#endif
}

FUSED_RNN_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, CPU, library) {
#ifdef FUSED_RNN_CUDA_ON_CPU
  fused_rnn::binding::implement_recurrences(library);
#else
  fused_rnn::binding::implement_layers(library);
#endif
#ifndef FUSED_RNN_USER_CELLS
  library.impl("dropout", TORCH_BOX(&fused_rnn::binding::dropout));
  library.impl("additive_attention_forward",
               TORCH_BOX(&fused_rnn::binding::additive_attention_forward));
  library.impl("additive_attention_backward",
               TORCH_BOX(&fused_rnn::binding::additive_attention_backward));
#endif
}
#ifdef FUSED_RNN_CUDA
FUSED_RNN_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, CUDA, library) {
  fused_rnn::binding::implement_recurrences(library);
#ifndef FUSED_RNN_USER_CELLS
  library.impl("dropout", TORCH_BOX(&fused_rnn::binding::dropout));
#endif
}
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  module.def(
      "cells",
      [] {
        py::dict cells;
        for (const auto& cell : fused_rnn::binding::cell_traits) {
          py::dict traits;
          traits["gates"] = cell.gates;
          traits["saved"] = cell.saved;
          traits["unit_weights"] = cell.unit_weights;
          traits["has_c"] = cell.has_c;
          traits["split_gates"] = cell.split_gates;
          traits["reads_h"] = cell.reads_h;
          traits["late_gate"] = cell.late_gate;
          cells[cell.name] = traits;
        }
        return cells;
      },
      "Facts about each cell: gates and saved values per unit, whether it has a cell state.");
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["torch_target"] = "2.10";
#ifdef FUSED_RNN_CUDA
        info["cuda"] = FUSED_RNN_CUDA;
#else
        info["cuda"] = py::none();
#endif
        return info;
      },
      "How this binary was built.");
  module.def(
      "instruction_sets",
      [] {
        py::dict supported;
        size_t count;
        const auto* sets = fused_rnn::cpu::instruction_sets(&count);
        for (size_t i = 0; i < count; ++i) supported[sets[i].name] = sets[i].supported();
        return supported;
      },
      "The CPU engine's compiled instruction sets, best first, and which this machine supports.");
  module.def(
      "saved_values",
      [](const std::string& name, int layer_norm) {
        const auto& cell = fused_rnn::binding::traits(name);
        return fused_rnn::SavedValues(static_cast<fused_rnn::LayerNorm>(layer_norm), cell.gates,
                                      cell.saved, cell.reads_h, cell.has_c)
            .count;
      },
      "Values per unit and step in the reserve of a cell's varied op.");
  module.attr("reserve_block") = fused_rnn::Reserve::block;
  module.def("keep_scratch", fused_rnn::binding::Scratch::keep,
             "Sets how many bytes of scratch memory the CPU engine may keep between calls (64 MiB "
             "unless told), frees what it keeps, and returns the number before.");
  module.def(
      "multiply_adds",
      [](int64_t rounds) { return fused_rnn::cpu::active_instruction_set().multiply_adds(rounds); },
      py::call_guard<py::gil_scoped_release>(),
      "Multiplies and adds float32 registers for some rounds; returns the operations done.");
  module.def(
      "active_instruction_set",
      [] { return std::string(fused_rnn::cpu::active_instruction_set().name); },
      "The instruction set in use; FUSED_RNN_CPU_ISA forces one.");
  module.def("cuda_chips", fused_rnn::binding::cuda_chips,
             "The GPUs that cuda_plan knows by name. Clusters: how many of each size fit.");
  module.def("cuda_plan", fused_rnn::binding::cuda_plan, py::arg("cell"), py::arg("dtype"),
             py::arg("T"), py::arg("B"), py::arg("L"), py::arg("H"), py::kw_only(),
             py::arg("projected"), py::arg("varied"), py::arg("tf32"), py::arg("backward"),
             py::arg("chip"),
             "The engines that a recurrence could take on a chip, or on the GPU at hand if that is "
             "None: the one that is taken first. Bytes are those of a thread block.");
  module.def(
      "cuda_wavefront", fused_rnn::binding::cuda_wavefront, py::arg("cell"), py::arg("dtype"),
      py::arg("T"), py::arg("B"), py::arg("L"), py::arg("H"), py::kw_only(), py::arg("layers"),
      py::arg("projected"), py::arg("tf32"), py::arg("training"), py::arg("captured"),
      py::arg("chip"),
      "In how many parts of time a stack of equal layers runs, and what is predicted of it.");
}
