// Runs CUDA kernels on the CPU: a grid with one fibre per CUDA thread, under a seeded random schedule
// that may switch at every synchronising operation.
//
// Kernels are compiled as C++ with -fsanitize=thread, which makes the compiler call a function before
// every load and store. Those functions are ours (memory.cpp), not the sanitizer's: they know which
// memory a kernel may touch, which bytes have been written, and, by vector clocks, what orders one
// access after another in CUDA's memory model. So a run reports, with the source lines,
//   races                  between threads, blocks, and asynchronous copies,
//   accesses out of bounds of every tensor and shared buffer, gaps of strided tensors included,
//   reads                  of memory that nothing has written,
//   deadlocks              with who waits where,
//   divergent barriers     and warp operations that not all threads reach,
//   clusters of one        that use what only larger ones have.
// What a schedule happened to do does not matter to the first three: an access that nothing orders is a
// race whichever came first.
//
// The first failure ends the launch, which throws std::runtime_error. device.h makes the words of
// csrc/cuda/device.cuh from what is declared here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "buffer.h"

namespace fused_rnn::cuda_on_cpu {

// A place in a kernel's source.
struct Site {
  const char* file;
  int line;
};

struct Position {
  unsigned x, y, z;
};

// How far an atomic operation, or a fence, reaches.
enum class Reach : int { none, block, cluster, device };

struct GridSize {
  Position blocks;
  unsigned threads;
  size_t shared_bytes;
  unsigned cluster;
  bool cooperative;
};

// ---- host side

// Calls body(context) as every thread of the grid. `kernel` names it in reports; the bytes at
// `arguments` may be read by all.
void launch(const GridSize& grid, void (*body)(void*), void* context, const void* kernel,
            const void* arguments, size_t argument_bytes);

// Whether launches whose blocks have to run at once are to be refused: cuda_on_cpu_refuse_to_gather.
bool refuses_to_gather();

// Adds memory that kernels may touch until forget().
void declare(const Buffer& buffer);
void forget();
// From now on kernels may touch these and nothing else.
void declare(const Buffer* buffers, size_t count);
void host_wrote(const void* data, size_t bytes);
// Throws if a kernel should have written these bytes and did not.
void host_reads(const void* data, size_t bytes, const char* who);

// ---- for the running thread: where it is

Position block_index();
Position grid_size();
unsigned thread_index();
unsigned block_size();
unsigned cluster_rank();
unsigned cluster_size();

// ---- barriers

void sync_threads(Site site);
void sync_warp(Site site);
void sync_some(unsigned barrier, unsigned threads, Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);
void grid_sync(Site site);

// ---- what a warp does together; `value` and `operands` are each lane's own

enum class Shuffle { indexed, exclusive_or, down };
uint64_t shuffle(Shuffle kind, uint64_t value, unsigned argument, Site site);
unsigned ballot(bool value, Site site);
enum class MatrixType { bfloat16, float16, tf32 };
void mma(MatrixType type, float* d, const uint32_t* a, const uint32_t* b, Site site);
void load_matrix(uint32_t* registers, const void* row, bool transposed, Site site);

// ---- shared memory

void* dynamic_shared();
// `key` tells the arrays of a kernel apart.
void* static_shared(const void* key, size_t bytes, size_t alignment, const char* name);
// In a cluster of two blocks or more.
void* remote_shared(const void* mine, unsigned rank, Site site);

// ---- atomics of 4, 8 or 16 bytes

void load(void* to, const void* from, size_t bytes, Reach reach, bool acquire, Site site);
void store(void* to, const void* from, size_t bytes, Reach reach, bool release, Site site);
uint64_t add(void* to, uint64_t value, size_t bytes, Reach reach, bool release, Site site);
void fence(Reach reach, Site site);
// Lets others run until something has been written to `flag`.
void wait_for_write(const void* flag, Site site);

// ---- transaction barriers

void barrier_init(void* barrier, unsigned count, Site site);
void barrier_arrive(void* barrier, unsigned expected_bytes, Site site);
void barrier_wait(void* barrier, unsigned parity, Site site);

// ---- asynchronous copies, done at a later point of the schedule

void copy_async(void* shared, const void* global, size_t bytes, Site site);
void copy_async_commit();
void copy_async_wait(unsigned pending, Site site);
// Completes on `barrier`, if there is one.
void bulk_copy(void* to, const void* from, size_t bytes, void* barrier, Site site);
// In a cluster of two blocks or more, to the places of `mine` and `barrier` in block `rank` of it.
void store_async(void* mine, const void* value, size_t bytes, void* barrier, unsigned rank,
                 Site site);
void fence_async();

}  // namespace fused_rnn::cuda_on_cpu

// The schedule that launches follow from now on. Two runs under one seed are the same.
extern "C" void cuda_on_cpu_seed(uint64_t seed);
extern "C" void cuda_on_cpu_refuse_to_gather(int refuse);
// A number that sums up which thread ran when since the seed was set.
extern "C" uint64_t cuda_on_cpu_schedule();
