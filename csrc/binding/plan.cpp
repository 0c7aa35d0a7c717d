#include "plan.h"

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include <pybind11/stl.h>

#include "cells.h"
#include "host.h"

namespace fused_rnn::binding {
namespace py = pybind11;

namespace {

// What a recurrence needs that only per_step has, or null.
const char* needs_per_step(const CellTraits& cell, bool varied, const Shape& p) {
  if (varied) return "layer norm, zoneout or recurrent dropout";
  if (cell.late_gate) return "a gate that waits for another";
  return p.projected ? "a projection" : nullptr;
}

}  // namespace

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

namespace {

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
    for (int i = 0; i < cuda::cluster_size_count; ++i)
      clusters[py::int_(cuda::cluster_sizes[i])] = chip.clusters[i];
    facts["clusters"] = clusters;
    facts["gigahertz"] = chip.gigahertz;
    chips[name] = facts;
  }
  return chips;
}

// fused_rnn.stack.Recurrence: cell, dtype, T, B, L, H, projected, varied.
using Recurrence =
    std::tuple<std::string, std::string, int64_t, int64_t, int64_t, int64_t, bool, bool>;

cuda::Task task_of(const Recurrence& of, bool tf32, bool backward) {
  Shape p{};
  std::string cell, dtype;
  bool varied;
  std::tie(cell, dtype, p.T, p.B, p.L, p.H, p.projected, varied) = of;
  p.dtype = dtype_named(dtype);
  return cuda_task(cell_named(cell), varied, tf32, backward, p);
}

py::list cuda_plan(const Recurrence& of, bool tf32, bool backward,
                   const std::optional<std::string>& chip) {
  const cuda::Task task = task_of(of, tf32, backward);
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

py::dict cuda_wavefront(const Recurrence& of, int layers, bool tf32, bool training, bool captured,
                        const std::optional<std::string>& chip) {
  const cuda::Wavefront found = cuda::wavefront(task_of(of, tf32, false), layers, training,
                                                captured, chip_named(chip), forced_cuda_engine());
  py::dict plan;
  plan["parts"] = found.parts;
  plan["microseconds"] = found.microseconds;
  plan["microseconds_in_one_part"] = found.in_one_part;
  return plan;
}

}  // namespace

void define_plans(py::module_& module) {
  module.def("cuda_chips", cuda_chips,
             "The GPUs that cuda_plan knows by name. Clusters: how many of each size fit.");
  module.def("cuda_plan", cuda_plan, py::arg("of"), py::kw_only(), py::arg("tf32"),
             py::arg("backward"), py::arg("chip"),
             "The engines that a recurrence could take on a chip, or on the GPU at hand if that is "
             "None: the one that is taken first. Bytes are those of a thread block.");
  module.def(
      "cuda_wavefront", cuda_wavefront, py::arg("of"), py::kw_only(), py::arg("layers"),
      py::arg("tf32"), py::arg("training"), py::arg("captured"), py::arg("chip"),
      "In how many parts of time a stack of equal layers runs, and what is predicted of it.");
}

}  // namespace fused_rnn::binding
