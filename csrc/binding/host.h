// What engines ask of torch: scratch memory, threads, streams.
#pragma once

#include <atomic>
#include <utility>

#include <torch/csrc/stable/accelerator.h>

#include "../cpu/engine.h"
#include "tensors.h"

#if defined(FUSED_RNN_CUDA) || defined(FUSED_RNN_CUDA_ON_CPU)
#define FUSED_RNN_PER_STEP
#endif

namespace fused_rnn::binding {

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

#ifdef FUSED_RNN_PER_STEP
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

#endif
}  // namespace fused_rnn::binding
