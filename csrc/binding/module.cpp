// What _C shows of the extension that is no op.
#include <optional>
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../step.h"
#include "cells.h"
#include "host.h"
#include "plan.h"

namespace {

namespace binding = fused_rnn::binding;
namespace py = pybind11;

py::dict traits_of(const fused_rnn::Library& library) {
  py::dict cells;
  for (int i = 0; i < library.count; ++i) {
    const fused_rnn::CellTraits& cell = library.cells[i];
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
}

py::list weight_table(const std::string& cell, bool has_biases, bool projected, int layer_norm) {
  py::list rows;
  for (const auto& row : binding::WeightTable(binding::cell_named(cell), has_biases, projected,
                                              static_cast<fused_rnn::LayerNorm>(layer_norm)))
    rows.append(py::make_tuple(row.name, row.factor, std::string(1, row.rows),
                               std::string(1, row.columns)));
  return rows;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["torch_target"] = "2.10";
#ifdef FUSED_RNN_CUDA
  info["cuda"] = FUSED_RNN_CUDA;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

py::dict instruction_sets() {
  py::dict supported;
  size_t count;
  const auto* sets = fused_rnn::cpu::instruction_sets(&count);
  for (size_t i = 0; i < count; ++i) supported[sets[i].name] = sets[i].supported();
  return supported;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def(
      "cells", [] { return traits_of(fused_rnn::library()); },
      "Facts about each built-in cell: csrc/library.h says which.");
  module.def(
      "add_library",
      [](uintptr_t function) {
        const auto& library = *reinterpret_cast<const fused_rnn::Library* (*)()>(function)();
        binding::add_library(library);
        return traits_of(library);
      },
      "Takes in the cells of a library, by the address of its fused_rnn_library; returns as "
      "cells.");
  module.def(
      "weight_table", weight_table,
      "The weights of a recurrence in their order: name, factor, rows and columns, for a shape "
      "of (factor * rows, columns). Rows and columns are letters of csrc/params.h; columns of "
      "'1' are none.");
  module.def(
      "saved_values",
      [](const std::string& name, int layer_norm) {
        const auto& cell = binding::cell_named(name);
        return fused_rnn::SavedValues(static_cast<fused_rnn::LayerNorm>(layer_norm), cell.gates,
                                      cell.saved, cell.reads_h, cell.has_c)
            .count;
      },
      "Values per unit and step in the reserve of a cell's varied step.");
  module.attr("reserve_block") = fused_rnn::Reserve::block;
  module.def("build_info", build_info, "How this binary was built.");
  module.def("instruction_sets", instruction_sets,
             "The CPU engine's compiled instruction sets, best first, and which this machine "
             "supports.");
  module.def(
      "active_instruction_set",
      [] { return std::string(fused_rnn::cpu::active_instruction_set().name); },
      "The instruction set in use; FUSED_RNN_CPU_ISA forces one.");
  module.def("keep_scratch", binding::Scratch::keep,
             "Sets how many bytes of scratch memory the CPU engine may keep between calls (64 MiB "
             "unless told), frees what it keeps, and returns the number before.");
  module.def(
      "multiply_adds",
      [](int64_t rounds) { return fused_rnn::cpu::active_instruction_set().multiply_adds(rounds); },
      py::call_guard<py::gil_scoped_release>(),
      "Multiplies and adds float32 registers for some rounds; returns the operations done.");
  binding::define_plans(module);
}
