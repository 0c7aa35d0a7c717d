// Threads that work through a sequence of phases together.
//
// A team splits the units of a lane into `members` parts. Phase p of any part may start once phase
// p-1 of every part is done. One thread is meant for each part and keeps returning to it, so that the
// part's weights stay in that core's cache; but a thread pool may give fewer threads than asked, or run
// our chunks one after another, or the system takes a thread off its core. So a part whose thread has
// not turned up, or does not come back, is done by whoever is here:
// parts are claimed by compare-and-swap, waiting is for completed parts rather than for threads, and
// any number of threads from one upwards makes progress.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_rnn::cpu {

struct Part {
  // On a cache line of its own: only the part's thread writes it, as a rule, while others watch `done`.
  alignas(64) std::atomic<int64_t> claimed{0};  // phases begun
  alignas(64) std::atomic<int64_t> done{0};     // phases completed
  std::atomic<bool> attended{false};
};

class Spin {
 public:
  // Whether a thread that has only this to do would have come: it may be waiting for a core.
  bool long_gone() const { return count_ > 256; }

  void pause() {
    if (++count_ > 4096) {  // more threads than cores: let the one we wait for run
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

 private:
  int count_ = 0;
};

// Runs work(phase, part) for every phase in 0..phases and every part in 0..members.
template <class Work>
void run_phases(Part* parts, int members, int me, int64_t phases, const Work& work) {
  if (members == 1) {
    for (int64_t phase = 0; phase < phases; ++phase) work(phase, 0);
    return;
  }
  parts[me].attended.store(true, std::memory_order_release);
  const auto attempt = [&](int part, int64_t phase) {
    int64_t expected = phase;
    if (!parts[part].claimed.compare_exchange_strong(expected, phase + 1,
                                                     std::memory_order_acq_rel))
      return;
    work(phase, part);
    parts[part].done.store(phase + 1, std::memory_order_release);
  };
  for (int64_t phase = 0; phase < phases; ++phase) {
    attempt(me, phase);
    for (int part = 0; part < members; ++part) {
      Spin spin;
      while (parts[part].done.load(std::memory_order_acquire) <= phase) {
        const bool absent =
            !parts[part].attended.load(std::memory_order_acquire) || spin.long_gone();
        if (absent && parts[part].claimed.load(std::memory_order_relaxed) == phase)
          attempt(part, phase);
        else
          spin.pause();
      }
    }
  }
}

}  // namespace fused_rnn::cpu
