// The host twin of csrc/cuda/device.cuh: the same words, made of what runner.h does. Where a word
// synchronises, it also tells the runner which line of the kernel it stands on.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/dtype.h"
#include "runner.h"

#define KERNEL inline
#define KERNEL_OF(threads) inline
#define DEVICE inline

#define FUSED_RNN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fused_rnn::cuda {

namespace runner = ::fused_rnn::cuda_on_cpu;

using Stream = void*;

struct Dim {
  unsigned x, y, z;
};

enum class Scope { block, cluster, device };

struct alignas(16) Words4 {
  uint32_t w[4];
};

struct Barrier {
  uint64_t state;
};

namespace detail {

constexpr runner::Reach reach(Scope scope) {
  return scope == Scope::block     ? runner::Reach::block
         : scope == Scope::cluster ? runner::Reach::cluster
                                   : runner::Reach::device;
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "values of 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace detail

// ---- indices

inline Dim block_index() {
  const auto at = runner::block_index();
  return {at.x, at.y, at.z};
}
inline Dim grid_size() {
  const auto size = runner::grid_size();
  return {size.x, size.y, size.z};
}
inline unsigned thread_index() { return runner::thread_index(); }
inline unsigned thread_index_again() { return runner::thread_index(); }
inline unsigned block_size() { return runner::block_size(); }
inline unsigned warp_lane() { return thread_index() % 32; }
inline unsigned warp_index() { return thread_index() / 32; }
inline unsigned cluster_rank() { return runner::cluster_rank(); }
inline unsigned cluster_size() { return runner::cluster_size(); }

// ---- barriers

inline void sync_threads(FUSED_RNN_SITE) { runner::sync_threads({file, line}); }
inline void sync_warp(FUSED_RNN_SITE) { runner::sync_warp({file, line}); }
inline void sync_some(unsigned barrier, unsigned threads, FUSED_RNN_SITE) {
  runner::sync_some(barrier, threads, {file, line});
}
inline void cluster_arrive(FUSED_RNN_SITE) { runner::cluster_arrive({file, line}); }
inline void cluster_wait(FUSED_RNN_SITE) { runner::cluster_wait({file, line}); }
inline void cluster_sync(FUSED_RNN_SITE) {
  runner::cluster_arrive({file, line});
  runner::cluster_wait({file, line});
}
inline void grid_sync(FUSED_RNN_SITE) { runner::grid_sync({file, line}); }

// ---- warps

template <class T>
T shuffle(T value, unsigned lane, FUSED_RNN_SITE) {
  return detail::from_bits<T>(
      runner::shuffle(runner::Shuffle::indexed, detail::to_bits(value), lane, {file, line}));
}
template <class T>
T shuffle_xor(T value, unsigned mask, FUSED_RNN_SITE) {
  return detail::from_bits<T>(
      runner::shuffle(runner::Shuffle::exclusive_or, detail::to_bits(value), mask, {file, line}));
}
template <class T>
T shuffle_down(T value, unsigned n, FUSED_RNN_SITE) {
  return detail::from_bits<T>(
      runner::shuffle(runner::Shuffle::down, detail::to_bits(value), n, {file, line}));
}
inline unsigned ballot(bool value, FUSED_RNN_SITE) { return runner::ballot(value, {file, line}); }
inline bool any(bool value, FUSED_RNN_SITE) { return runner::ballot(value, {file, line}) != 0; }
inline bool all(bool value, FUSED_RNN_SITE) { return runner::ballot(value, {file, line}) == ~0u; }

// ---- shared memory

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(runner::dynamic_shared());
}

#define STATIC_SHARED(type, name, count)                                         \
  static const char fused_rnn_key_##name = 0;                                    \
  type* const name = static_cast<type*>(::fused_rnn::cuda_on_cpu::static_shared( \
      &fused_rnn_key_##name, sizeof(type) * (count), alignof(type), #name))

template <class T>
T* remote_shared(T* mine, unsigned rank, FUSED_RNN_SITE) {
  return static_cast<T*>(runner::remote_shared(mine, rank, {file, line}));
}

// ---- atomics

template <Scope scope, class T>
T load_relaxed(const T* from, FUSED_RNN_SITE) {
  T value;
  runner::load(&value, from, sizeof(T), detail::reach(scope), false, {file, line});
  return value;
}
template <Scope scope, class T>
T load_acquire(const T* from, FUSED_RNN_SITE) {
  T value;
  runner::load(&value, from, sizeof(T), detail::reach(scope), true, {file, line});
  return value;
}
template <Scope scope, class T>
void store_relaxed(T* to, std::common_type_t<T> value, FUSED_RNN_SITE) {
  runner::store(to, &value, sizeof(T), detail::reach(scope), false, {file, line});
}
template <Scope scope, class T>
void store_release(T* to, std::common_type_t<T> value, FUSED_RNN_SITE) {
  runner::store(to, &value, sizeof(T), detail::reach(scope), true, {file, line});
}
template <Scope scope, class T>
T atomic_add(T* to, std::common_type_t<T> value, FUSED_RNN_SITE) {
  return static_cast<T>(runner::add(to, static_cast<uint64_t>(value), sizeof(T),
                                    detail::reach(scope), false, {file, line}));
}
template <Scope scope, class T>
T atomic_add_release(T* to, std::common_type_t<T> value, FUSED_RNN_SITE) {
  return static_cast<T>(runner::add(to, static_cast<uint64_t>(value), sizeof(T),
                                    detail::reach(scope), true, {file, line}));
}
template <Scope scope>
void fence(FUSED_RNN_SITE) {
  runner::fence(detail::reach(scope), {file, line});
}
template <Scope scope, class T, class Ready>
T wait_until(const T* flag, Ready ready, FUSED_RNN_SITE) {
  for (;;) {
    const T value = load_acquire<scope>(flag, file, line);
    if (ready(value)) return value;
    runner::wait_for_write(flag, {file, line});
  }
}
inline Words4 load_relaxed_16(const Words4* from, FUSED_RNN_SITE) {
  Words4 value;
  runner::load(&value, from, 16, runner::Reach::device, false, {file, line});
  return value;
}
inline void store_relaxed_16(Words4* to, Words4 value, FUSED_RNN_SITE) {
  runner::store(to, &value, 16, runner::Reach::device, false, {file, line});
}

// The runner finds deadlocks by itself.
struct Watchdog {
  Watchdog(unsigned, unsigned) {}
  void look() {}
};

// ---- transaction barriers

inline void barrier_init(Barrier* barrier, unsigned count, FUSED_RNN_SITE) {
  runner::barrier_init(barrier, count, {file, line});
}
inline void barrier_init_fence() { runner::fence_async(); }
inline void barrier_arrive(Barrier* barrier, FUSED_RNN_SITE) {
  runner::barrier_arrive(barrier, 0, {file, line});
}
inline void barrier_arrive_remote(Barrier* mine, unsigned rank, FUSED_RNN_SITE) {
  runner::barrier_arrive(runner::remote_shared(mine, rank, {file, line}), 0, {file, line});
}
inline void barrier_expect(Barrier* barrier, unsigned bytes, FUSED_RNN_SITE) {
  runner::barrier_arrive(barrier, bytes, {file, line});
}
inline void barrier_wait(Barrier* barrier, unsigned parity, unsigned = 0, unsigned = 0,
                         FUSED_RNN_SITE) {
  runner::barrier_wait(barrier, parity, {file, line});
}

// ---- asynchronous copies

template <unsigned bytes>
void copy_async(void* shared, const void* global, FUSED_RNN_SITE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  runner::copy_async(shared, global, bytes, {file, line});
}
inline void copy_async_commit() { runner::copy_async_commit(); }
template <unsigned pending>
void copy_async_wait(FUSED_RNN_SITE) {
  runner::copy_async_wait(pending, {file, line});
}
inline void bulk_to_shared(void* shared, const void* global, unsigned bytes, Barrier* barrier,
                           FUSED_RNN_SITE) {
  runner::bulk_copy(shared, global, bytes, barrier, {file, line});
}
inline void bulk_to_remote(void* mine_to, const void* shared_from, unsigned bytes, Barrier* mine,
                           unsigned rank, FUSED_RNN_SITE) {
  const runner::Site site{file, line};
  runner::bulk_copy(runner::remote_shared(mine_to, rank, site), shared_from, bytes,
                    runner::remote_shared(mine, rank, site), site);
}
template <class T>
void store_async(T* mine, std::common_type_t<T> value, Barrier* barrier, unsigned rank,
                 FUSED_RNN_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  runner::store_async(mine, &value, sizeof(T), barrier, rank, {file, line});
}
inline void fence_async() { runner::fence_async(); }

// ---- matrix products

template <class S>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FUSED_RNN_SITE) {
  static_assert(std::is_same_v<S, BFloat16> || std::is_same_v<S, Half>, "a half type");
  runner::mma(
      std::is_same_v<S, BFloat16> ? runner::MatrixType::bfloat16 : runner::MatrixType::float16, d,
      a, b, {file, line});
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             FUSED_RNN_SITE) {
  runner::mma(runner::MatrixType::tf32, d, a, b, {file, line});
}
// To nearest, ties away from zero, ten bits of fraction.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = static_cast<uint32_t>(detail::to_bits(x));
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* shared_row, FUSED_RNN_SITE) {
  runner::load_matrix(r, shared_row, false, {file, line});
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row, FUSED_RNN_SITE) {
  runner::load_matrix(r, shared_row, true, {file, line});
}

// ---- arithmetic

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_exp(float x) { return std::exp(x); }
inline float fast_tanh(float x) { return std::tanh(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

// ---- launches

struct Grid {
  Dim blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream,
            const Arguments&... arguments) {
  if ((grid.cooperative || grid.cluster > 1) && runner::refuses_to_gather())
    throw LaunchRefused("refused for a test");
  using Packed = std::tuple<void (*)(Parameters...), std::tuple<Parameters...>>;
  Packed packed{kernel, std::tuple<Parameters...>(arguments...)};
  const runner::GridSize size{{grid.blocks.x, grid.blocks.y, grid.blocks.z},
                              grid.threads,
                              grid.shared_bytes,
                              grid.cluster,
                              grid.cooperative};
  runner::launch(
      size,
      [](void* context) {
        auto& [call, parameters] = *static_cast<Packed*>(context);
        std::apply(call, parameters);
      },
      &packed, reinterpret_cast<const void*>(kernel), &packed, sizeof(packed));
}

inline void set_zero(void* data, size_t bytes, Stream) {
  memset(data, 0, bytes);
  runner::host_wrote(data, bytes);
}

}  // namespace fused_rnn::cuda
