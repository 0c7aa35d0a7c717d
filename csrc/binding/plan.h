// Which CUDA engine a recurrence takes. In every build: explain asks about machines that are elsewhere.
#pragma once

#include <cstdlib>

#include <pybind11/pybind11.h>

#include "../cuda/plan.h"
#include "../library.h"

namespace fused_rnn::binding {

cuda::Task cuda_task(const CellTraits& cell, bool varied, bool tf32, bool backward, const Shape& p);

inline const char* forced_cuda_engine() { return std::getenv("FUSED_RNN_CUDA_ENGINE"); }

// What `_C` shows of plans.
void define_plans(pybind11::module_& module);

}  // namespace fused_rnn::binding
