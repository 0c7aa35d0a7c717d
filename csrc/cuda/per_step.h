// The per_step engine's face to the binding. No torch here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "../params.h"

namespace fused_rnn::cuda {

// out[l] (m, n) = a[l] (m, k) times b[l] (k, n), or b[l]^T of (n, k); contiguous, storage type.
struct Product {
  DType dtype;
  const void *a, *b;
  void* out;
  int64_t lanes, m, n, k;
  bool transpose_b;
  int64_t b_stride = 0;  // from b[l] to b[l+1] in elements, unless they follow one another
};

// What the engine asks of its host. Everything happens in order on `stream`.
struct Host {
  void* stream;
  std::function<void*(size_t bytes)> allocate;  // scratch, alive until the op returns
  std::function<std::function<void()>(const Product&)> prepare;  // a product to run many times
};

// A cell of cells.h, and whether options change the step around it.
struct CellId {
  int index;
  bool varied;
};

void run_per_step(CellId cell, const RecurrenceForwardParams& p, const Host& host);
void run_per_step(CellId cell, const RecurrenceBackwardParams& p, const Host& host);

}  // namespace fused_rnn::cuda
