// What hosts and kernels know of each other's failures. No CUDA here.
#pragma once

#include <stdexcept>

namespace fused_rnn::cuda {

// Of a multiprocessor's clock: about half a millisecond, in which a watchdog's patience is told.
constexpr unsigned clock_unit = 1u << 20;

// The GPU has not the room that a launch needs all at once. Other engines need less.
struct LaunchRefused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace fused_rnn::cuda
