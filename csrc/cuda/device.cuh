// Everything a kernel here asks of the machine it runs on: indices, barriers, shuffles, shared
// memory, atomics, asynchronous copies, matrix products, launches. Kernels hold no intrinsic and no
// PTX of their own, so that without nvcc the same sources build as C++ and run on the CPU, where
// the host twins of these words (tests/cuda_on_cpu/device.h) also look for races.
//
// What needs a cluster or a transaction barrier exists from sm_90 on. Kernels that use it compile
// for sm_80 too, as one binary serves all, but trap there: launching them is the caller's mistake.
#pragma once

namespace fused_rnn::cuda {

constexpr unsigned warp_size = 32;

}  // namespace fused_rnn::cuda

#if !defined(__CUDACC__)
#include "cuda_on_cpu/device.h"
#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../dtype.h"
#include "launch.h"

#define KERNEL __global__
// Of blocks of so many threads, which may take all registers.
#define KERNEL_OF(threads) __global__ __launch_bounds__(threads, 1)
#define DEVICE __device__ __forceinline__

// PTX for sm_90 and later, a trap before.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FUSED_RNN_SM90(...) __trap()
#else
#define FUSED_RNN_SM90(...) asm volatile(__VA_ARGS__)
#endif

namespace fused_rnn::cuda {

// Indices. Blocks are one-dimensional; clusters lie along x.

struct Dim {
  unsigned x, y, z;
};

DEVICE Dim block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
DEVICE Dim grid_size() { return {gridDim.x, gridDim.y, gridDim.z}; }
DEVICE unsigned thread_index() { return threadIdx.x; }
// The same, read again: what is computed from it lives in no register before that.
DEVICE unsigned thread_index_again() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
DEVICE unsigned block_size() { return blockDim.x; }
DEVICE unsigned warp_lane() { return threadIdx.x % 32; }
DEVICE unsigned warp_index() { return threadIdx.x / 32; }

DEVICE unsigned cluster_rank() {
  unsigned rank = 0;
  FUSED_RNN_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

DEVICE unsigned cluster_size() {
  unsigned size = 1;
  FUSED_RNN_SM90("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Barriers. Each also makes what any of its threads wrote before it visible to all of them after
// it.

DEVICE void sync_threads() { __syncthreads(); }

DEVICE void sync_warp() { __syncwarp(); }

// `threads` of the block, a multiple of 32, meet at barrier 1..15. Barrier 0 is sync_threads.
DEVICE void sync_some(unsigned barrier, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Every thread of every block of the cluster arrives, then waits.
DEVICE void cluster_arrive() {
  FUSED_RNN_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory");
}

DEVICE void cluster_wait() {
  FUSED_RNN_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// In cooperative launches only.
DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

// Among the 32 threads of a warp, all of which take part. They order no memory.

template <class T>
DEVICE T shuffle(T value, unsigned lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  return __shfl_sync(~0u, value, lane);
}

template <class T>
DEVICE T shuffle_xor(T value, unsigned mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  return __shfl_xor_sync(~0u, value, mask);
}

// The last `distance` lanes keep their own.
template <class T>
DEVICE T shuffle_down(T value, unsigned distance) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  return __shfl_down_sync(~0u, value, distance);
}

DEVICE unsigned ballot(bool predicate) { return __ballot_sync(~0u, predicate); }
DEVICE bool any(bool predicate) { return __any_sync(~0u, predicate); }
DEVICE bool all(bool predicate) { return __all_sync(~0u, predicate); }

// Shared memory.

// The block's dynamic shared memory, aligned to 1024 bytes.
template <class T>
DEVICE T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char fused_rnn_dynamic_shared[];
  return reinterpret_cast<T*>(fused_rnn_dynamic_shared);
}

#define STATIC_SHARED(type, name, count) __shared__ type name[count]

namespace detail {

DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// The address, in the cluster's window of shared memory, of the same place in another block.
DEVICE unsigned cluster_address(const void* mine, unsigned rank) {
  unsigned address = 0;
  FUSED_RNN_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)),
                 "r"(rank));
  return address;
}

}  // namespace detail

// The same place in the shared memory of another block of the cluster, which has two or more.
template <class T>
DEVICE T* remote_shared(T* mine, unsigned rank) {
  uint64_t address = 0;
  FUSED_RNN_SM90("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(address);
}

// Atomics on int, unsigned and uint64_t, in shared or global memory. The scope says among whom.

enum class Scope { block, cluster, device };

#define FUSED_RNN_ASM(...) asm volatile(__VA_ARGS__)

// Expands `access(run, scope, type, constraint)` to the one for `scope` and the size of T.
#define FUSED_RNN_ATOMIC(access)                                                         \
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are of 4 or 8 bytes");        \
  if constexpr (sizeof(T) == 4) {                                                        \
    if constexpr (scope == Scope::block) access(FUSED_RNN_ASM, "cta", "32", "r");        \
    if constexpr (scope == Scope::cluster) access(FUSED_RNN_SM90, "cluster", "32", "r"); \
    if constexpr (scope == Scope::device) access(FUSED_RNN_ASM, "gpu", "32", "r");       \
  } else {                                                                               \
    if constexpr (scope == Scope::block) access(FUSED_RNN_ASM, "cta", "64", "l");        \
    if constexpr (scope == Scope::cluster) access(FUSED_RNN_SM90, "cluster", "64", "l"); \
    if constexpr (scope == Scope::device) access(FUSED_RNN_ASM, "gpu", "64", "l");       \
  }

template <Scope scope, class T>
DEVICE T load_relaxed(const T* from) {
  T value = 0;
#define FUSED_RNN_ACCESS(run, in, type, c) \
  run("ld.relaxed." in ".b" type " %0, [%1];" : "=" c(value) : "l"(from) : "memory")
  FUSED_RNN_ATOMIC(FUSED_RNN_ACCESS)
#undef FUSED_RNN_ACCESS
  return value;
}

template <Scope scope, class T>
DEVICE T load_acquire(const T* from) {
  T value = 0;
#define FUSED_RNN_ACCESS(run, in, type, c) \
  run("ld.acquire." in ".b" type " %0, [%1];" : "=" c(value) : "l"(from) : "memory")
  FUSED_RNN_ATOMIC(FUSED_RNN_ACCESS)
#undef FUSED_RNN_ACCESS
  return value;
}

template <Scope scope, class T>
DEVICE void store_relaxed(T* to, std::common_type_t<T> value) {
#define FUSED_RNN_ACCESS(run, in, type, c) \
  run("st.relaxed." in ".b" type " [%0], %1;" ::"l"(to), c(value) : "memory")
  FUSED_RNN_ATOMIC(FUSED_RNN_ACCESS)
#undef FUSED_RNN_ACCESS
}

template <Scope scope, class T>
DEVICE void store_release(T* to, std::common_type_t<T> value) {
#define FUSED_RNN_ACCESS(run, in, type, c) \
  run("st.release." in ".b" type " [%0], %1;" ::"l"(to), c(value) : "memory")
  FUSED_RNN_ATOMIC(FUSED_RNN_ACCESS)
#undef FUSED_RNN_ACCESS
}

// Both return the value before.
template <Scope scope, class T>
DEVICE T atomic_add(T* to, std::common_type_t<T> value) {
  T before = 0;
#define FUSED_RNN_ACCESS(run, in, type, c)                                         \
  run("atom.relaxed." in ".add.u" type " %0, [%1], %2;" : "=" c(before) : "l"(to), \
      c(value) : "memory")
  FUSED_RNN_ATOMIC(FUSED_RNN_ACCESS)
#undef FUSED_RNN_ACCESS
  return before;
}

template <Scope scope, class T>
DEVICE T atomic_add_release(T* to, std::common_type_t<T> value) {
  T before = 0;
#define FUSED_RNN_ACCESS(run, in, type, c)                                         \
  run("atom.release." in ".add.u" type " %0, [%1], %2;" : "=" c(before) : "l"(to), \
      c(value) : "memory")
  FUSED_RNN_ATOMIC(FUSED_RNN_ACCESS)
#undef FUSED_RNN_ACCESS
  return before;
}

#undef FUSED_RNN_ATOMIC

// Acquire and release: with relaxed accesses around it, what acquiring and releasing ones do.
template <Scope scope>
DEVICE void fence() {
  if constexpr (scope == Scope::block) asm volatile("fence.acq_rel.cta;" ::: "memory");
  if constexpr (scope == Scope::cluster) FUSED_RNN_SM90("fence.acq_rel.cluster;" :: : "memory");
  if constexpr (scope == Scope::device) asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// Spins until ready(value of the flag), whose writer then has released what it wrote before.
template <Scope scope, class T, class Ready>
DEVICE T wait_until(const T* flag, Ready ready) {
  T value = load_acquire<scope>(flag);
  while (!ready(value)) value = load_acquire<scope>(flag);
  return value;
}

struct alignas(16) Words4 {
  uint32_t w[4];
};

// 16 aligned bytes of global memory at once, in the device's scope. PTX models a vector access as
// separate ones in no order; an access of type b128 is a single one, never torn, so that a tag in
// one word vouches for the other three. It orders nothing else.
DEVICE Words4 load_relaxed_16(const Words4* from) {
  uint64_t halves[2];
  asm volatile(
      "{ .reg .b128 whole;\n"
      "  ld.relaxed.gpu.global.b128 whole, [%2];\n"
      "  mov.b128 {%0, %1}, whole; }"
      : "=l"(halves[0]), "=l"(halves[1])
      : "l"(__cvta_generic_to_global(from))
      : "memory");
  Words4 value;
  memcpy(&value, halves, 16);
  return value;
}

DEVICE void store_relaxed_16(Words4* to, Words4 value) {
  uint64_t halves[2];
  memcpy(halves, &value, 16);
  asm volatile(
      "{ .reg .b128 whole;\n"
      "  mov.b128 whole, {%1, %2};\n"
      "  st.relaxed.gpu.global.b128 [%0], whole; }" ::"l"(__cvta_generic_to_global(to)),
      "l"(halves[0]), "l"(halves[1])
      : "memory");
}

// Ends the kernel of a thread that has polled in vain for `patience`, so that a hang is an error. The
// clock is read once in 64 polls, which no hand-over takes that is on its way.
class Watchdog {
 public:
  // In clock_unit cycles (launch.h); 0 waits for ever.
  DEVICE Watchdog(unsigned patience, unsigned turn) : patience_(patience), turn_(turn) {}

  // After a poll in vain.
  DEVICE void look() {
    if (++polls_ % 64 != 0 || patience_ == 0) return;
    uint64_t cycles;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles));
    const unsigned now = static_cast<unsigned>(cycles / clock_unit);
    if (begin_ == 0) begin_ = now;
    if (now - begin_ > patience_)
      // As a failed assertion says it: with the block and the thread, and without a stack.
      __assert_fail("waited too long", "fused_rnn: hand-over", turn_, "Watchdog");
  }

 private:
  unsigned patience_, turn_;
  unsigned polls_ = 0, begin_ = 0;
};

// Transaction barriers, in shared memory, from sm_90 on. A phase ends when `count` arrivals and all
// the bytes expected have come; the first has parity 0. Who waits for a parity must be at most one
// phase behind.

struct Barrier {
  uint64_t state;
};

DEVICE void barrier_init(Barrier* barrier, unsigned count) {
  FUSED_RNN_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)),
                 "r"(count) : "memory");
}

// After barrier_init, before the cluster_sync behind which others may use the barrier.
DEVICE void barrier_init_fence() {
  FUSED_RNN_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}

// Releases to the block.
DEVICE void barrier_arrive(Barrier* barrier) {
  FUSED_RNN_SM90("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(
      detail::shared_address(barrier)) : "memory");
}

// At the same barrier of another block; releases to the cluster.
DEVICE void barrier_arrive_remote(Barrier* mine, unsigned rank) {
  FUSED_RNN_SM90("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
      detail::cluster_address(mine, rank)) : "memory");
}

// Arrives, and adds to the bytes that this phase waits for.
DEVICE void barrier_expect(Barrier* barrier, unsigned bytes) {
  FUSED_RNN_SM90("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                     detail::shared_address(barrier)),
                 "r"(bytes) : "memory");
}

// Until the phase of this parity has ended; acquires from the cluster. `patience` and `turn` are for the
// watchdog.
DEVICE void barrier_wait(Barrier* barrier, unsigned parity, unsigned patience = 0,
                         unsigned turn = 0) {
  Watchdog dog(patience, turn);
  for (unsigned ended = 0;; dog.look()) {
    FUSED_RNN_SM90(
        "{ .reg .pred ended;\n"
        "  mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, ended; }" : "=r"(ended) : "r"(detail::shared_address(barrier)),
        "r"(parity) : "memory");
    if (ended) return;
  }
}

// Asynchronous copies.

// A thread waits for its own copies, in groups; what others copied takes a barrier after that.
template <unsigned bytes>
DEVICE void copy_async(void* shared, const void* global) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  if constexpr (bytes == 16)  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(detail::shared_address(shared)),
                 "l"(__cvta_generic_to_global(global))
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(detail::shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "n"(bytes)
                 : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `pending` of the groups that this thread committed are under way.
template <unsigned pending>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Bulk copies: one thread asks for all of it. Addresses and `bytes` are multiples of 16. When they
// are done `bytes` count towards the barrier's phase, and whoever waited for it sees the data.
DEVICE void bulk_to_shared(void* shared, const void* global, unsigned bytes, Barrier* barrier) {
  FUSED_RNN_SM90(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(detail::shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes),
      "r"(detail::shared_address(barrier)) : "memory");
}

// To block `rank` of the cluster, on whose barrier it completes. `mine_to` and `mine` are this
// block's addresses of the same places.
DEVICE void bulk_to_remote(void* mine_to, const void* shared, unsigned bytes, Barrier* mine,
                           unsigned rank) {
  FUSED_RNN_SM90(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(detail::cluster_address(mine_to, rank)),
      "r"(detail::shared_address(shared)), "r"(bytes),
      "r"(detail::cluster_address(mine, rank)) : "memory");
}

// One value of 4, 8 or 16 bytes, likewise. In a cluster of one block this is undefined (PTX ISA, st.async).
template <class T>
DEVICE void store_async(T* mine, std::common_type_t<T> value, Barrier* mine_barrier,
                        unsigned rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const unsigned to = detail::cluster_address(mine, rank);
  const unsigned barrier = detail::cluster_address(mine_barrier, rank);
  if constexpr (sizeof(T) == 4) {
    FUSED_RNN_SM90(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
        "r"(fused_rnn::detail::bit_cast<uint32_t>(value)), "r"(barrier) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    FUSED_RNN_SM90(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to),
        "l"(fused_rnn::detail::bit_cast<uint64_t>(value)), "r"(barrier) : "memory");
  } else {
    const Words4 words = fused_rnn::detail::bit_cast<Words4>(value);
    FUSED_RNN_SM90(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(to),
        "r"(words.w[0]), "r"(words.w[1]), "r"(words.w[2]), "r"(words.w[3]),
        "r"(barrier) : "memory");
  }
}

// What this thread wrote to the block's shared memory becomes visible to bulk copies that anybody
// starts once a barrier has told them.
DEVICE void fence_async() { FUSED_RNN_SM90("fence.proxy.async.shared::cta;" :: : "memory"); }

// Matrix products of a whole warp, d += a b; fragments as the PTX manual lays them out.

template <class S>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define FUSED_RNN_MMA(type)                                                           \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<S, BFloat16>) {
    FUSED_RNN_MMA("bf16");
  } else {
    static_assert(std::is_same_v<S, Half>);
    FUSED_RNN_MMA("f16");
  }
#undef FUSED_RNN_MMA
}

DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to nearest, ties away from zero.
DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Four 8x8 matrices of 16-bit elements: lane 8 i + j holds the address of row j of matrix i, 16
// aligned bytes of shared memory, and receives elements 2 (lane % 4) and the next of row lane / 4.
DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

// Receives of the transposed matrices, whose columns the addressed rows are.
DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

// Approximate arithmetic, one instruction or two.

DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float fast_exp(float x) { return fast_exp2(x * 1.4426950408889634f); }

DEVICE float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The host's side.

using Stream = cudaStream_t;

struct Grid {
  Dim blocks;
  unsigned threads;
  size_t shared_bytes = 0;  // dynamic, per block
  unsigned cluster = 1;     // blocks, along x
  bool cooperative = false;
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of somebody else reports it again
  throw std::runtime_error(std::string("fused_rnn: ") + what + ": " + cudaGetErrorString(error));
}

namespace detail {

// Lets a kernel have all the dynamic shared memory there is. Not just what this launch needs:
// another thread may be between here and its launch of the same kernel.
inline void allow_all_shared_memory(const void* kernel) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - static_cast<int>(attributes.sharedSizeBytes)),
        "shared memory of a kernel");
}

}  // namespace detail

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream stream,
            const Arguments&... arguments) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks.x, grid.blocks.y, grid.blocks.z);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (grid.shared_bytes > 0) detail::allow_all_shared_memory(function);
  if (grid.cluster > 1) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = grid.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (grid.cluster > 8)  // more than every chip promises
    check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster size of a kernel");
  if (grid.cooperative) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize ||
      error == cudaErrorLaunchOutOfResources) {
    cudaGetLastError();
    throw LaunchRefused(cudaGetErrorString(error));
  }
  check(error, "kernel launch");
}

inline void set_zero(void* data, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(data, 0, bytes, stream), "cudaMemsetAsync");
}

}  // namespace fused_rnn::cuda

#endif
