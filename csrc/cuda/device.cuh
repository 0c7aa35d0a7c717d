// Everything a kernel here asks of the machine it runs on: indices, launches, streams, errors. Kernels
// hold no intrinsic of their own, so that without a CUDA compiler the same sources build as C++ and
// run on the CPU, one thread after another (tests/test_cuda_on_cpu.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define KERNEL __global__
#else
#define KERNEL inline
#endif

namespace fused_rnn::cuda {

// A grid of blocks_x * rows * lanes blocks of `threads` threads; x runs over hidden units.
struct Grid {
  unsigned blocks_x, rows, lanes, threads;
};

#if defined(__CUDACC__)

using Stream = cudaStream_t;

HOST_DEVICE int64_t unit_index() {
#if defined(__CUDA_ARCH__)
  return int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
#else
  return 0;
#endif
}
HOST_DEVICE int64_t row_index() {
#if defined(__CUDA_ARCH__)
  return blockIdx.y;
#else
  return 0;
#endif
}
HOST_DEVICE int64_t row_stride() {
#if defined(__CUDA_ARCH__)
  return gridDim.y;
#else
  return 1;
#endif
}
HOST_DEVICE int64_t lane_index() {
#if defined(__CUDA_ARCH__)
  return blockIdx.z;
#else
  return 0;
#endif
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fused_rnn: ") + what + ": " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream stream,
            const Arguments&... arguments) {
  kernel<<<dim3(grid.blocks_x, grid.rows, grid.lanes), grid.threads, 0, stream>>>(arguments...);
  check(cudaGetLastError(), "kernel launch");
}

inline void set_zero(void* data, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(data, 0, bytes, stream), "cudaMemsetAsync");
}

#else  // the host twin

using Stream = void*;

struct Position {
  int64_t unit, row, rows, lane;
};
inline thread_local Position position;

inline int64_t unit_index() { return position.unit; }
inline int64_t row_index() { return position.row; }
inline int64_t row_stride() { return position.rows; }
inline int64_t lane_index() { return position.lane; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream,
            const Arguments&... arguments) {
  for (unsigned lane = 0; lane < grid.lanes; ++lane)
    for (unsigned row = 0; row < grid.rows; ++row)
      for (int64_t unit = 0; unit < int64_t(grid.blocks_x) * grid.threads; ++unit) {
        position = {unit, row, grid.rows, lane};
        kernel(arguments...);
      }
}

inline void set_zero(void* data, size_t bytes, Stream) { memset(data, 0, bytes); }

#endif

}  // namespace fused_rnn::cuda
