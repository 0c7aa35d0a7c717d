// What launching a kernel may say. No CUDA here.
#pragma once

#include <stdexcept>

namespace fused_rnn::cuda {

// The GPU has not the room that a launch needs all at once. Other engines need less.
struct LaunchRefused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace fused_rnn::cuda
