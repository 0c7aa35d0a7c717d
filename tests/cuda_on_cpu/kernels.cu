// Miniatures of what the persistent engines are made of. Between them they use every word of
// csrc/cuda/device.cuh, as CUDA and, through its host twins, on the CPU: a shared library either
// way, with one function per kernel, which takes buffers and sizes and returns null or what went
// wrong.
//
// A line that synchronises stands alone and ends in a comment that says what it orders. Tests
// delete such lines one by one and expect a failure. What is only good form has its comment above
// it.
#include <cmath>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <string>

#include "buffer.h"
#include "cuda/device.cuh"
#include "params.h"
#include "philox.h"

namespace fused_rnn::cuda {
namespace {

constexpr Scope block = Scope::block, cluster = Scope::cluster, device = Scope::device;

DEVICE int64_t warps_per_block() { return block_size() / 32; }

// The sum over the warp, in every lane.
DEVICE float sum_of_warp(float value) {
  for (unsigned mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// block_sum: blocks sum the rows of x (rows, n), one after another.
//
//   x[row]: 0 1 2 .. 127 0 1 2 ..  -> a sum per thread, in registers
//                                  -> per warp, in shared memory
//                                  -> of the row, by the first warp
KERNEL void block_sum_kernel(const float* x, float* sums, int64_t rows, int64_t n) {
  STATIC_SHARED(float, of_warps, 32);
  for (int64_t row = block_index().x; row < rows; row += grid_size().x) {
    float sum = 0;
    for (int64_t i = thread_index(); i < n; i += block_size()) sum += x[row * n + i];
    for (unsigned distance = 16; distance > 0; distance /= 2) sum += shuffle_down(sum, distance);
    if (warp_lane() == 0) of_warps[warp_index()] = sum;
    sync_threads();  // every warp's sum is there before the first warp adds them
    if (warp_index() == 0) {
      sum = sum_of_warp(warp_lane() < warps_per_block() ? of_warps[warp_lane()] : 0);
      if (warp_lane() == 0) sums[row] = sum;
    }
    sync_threads();  // the first warp has read the sums before the next row's replace them
  }
}

// total: every block sums its share of x (n); the one that ends last adds up the shares, in
// order.
KERNEL void total_kernel(const float* x, float* shares, unsigned* ended, float* total, int64_t n) {
  STATIC_SHARED(unsigned, ended_before, 1);
  const int64_t share = (n + grid_size().x - 1) / grid_size().x;
  const int64_t begin = block_index().x * share;
  const int64_t end = begin + share < n ? begin + share : n;
  if (warp_index() == 0) {
    float sum = 0;
    for (int64_t i = begin + warp_lane(); i < end; i += 32) sum += x[i];
    sum = sum_of_warp(sum);
    if (warp_lane() == 0) {
      shares[block_index().x] = sum;
      ended_before[0] = atomic_add_release<device>(ended, 1);
      fence<device>();  // whoever counts last sees the shares of those who counted before
    }
  }
  sync_threads();  // the count, and the shares it vouches for, reach the rest of the block
  if (ended_before[0] != grid_size().x - 1 || thread_index() != block_size() - 1) return;
  float sum = 0;
  for (unsigned i = 0; i < grid_size().x; ++i) sum += shares[i];
  *total = sum;
}

// transpose: x (m, n) to y (n, m). A block turns one tile in shared memory, so that both sides
// move along their rows; a column of padding keeps the turned reads in different banks.
//
//   x [32 x 32] -> shared [32 x 33] -> y [32 x 32];  x and y of the grid count tiles of x
template <class T>
KERNEL void transpose_kernel(const T* x, T* y, int64_t m, int64_t n) {
  constexpr int64_t side = 32, pitch = side + 1;
  STATIC_SHARED(T, tile, side * pitch);
  const int64_t top = block_index().y * side, left = block_index().x * side;
  for (int64_t i = warp_index(); i < side; i += warps_per_block()) {
    const int64_t row = top + i, column = left + warp_lane();
    if (row < m && column < n)  // inside x
      tile[i * pitch + warp_lane()] = x[row * n + column];
  }
  sync_threads();  // the tile is whole before it is read the other way
  for (int64_t i = warp_index(); i < side; i += warps_per_block()) {
    const int64_t row = left + i, column = top + warp_lane();
    if (row < n && column < m)  // inside y
      y[row * m + column] = tile[warp_lane() * pitch + i];
  }
}

// hand_over: a chain of blocks, each adding up what all before it wrote.
//
//   v (blocks, n):  v[i][k] = start[k] + sum_{j < i} v[j][k] = start[k] 2^i
//
// Block i waits for block i - 1 alone, which waited for block i - 2: it passes on what it has seen.
enum class Publish { release, fence };

template <Publish publish>
KERNEL void hand_over_kernel(const float* start, float* v, unsigned* flags, int64_t n) {
  const unsigned i = block_index().x;
  if (i > 0 && thread_index() == 0) {
    const auto is_set = [](unsigned flag) { return flag != 0; };
    wait_until<device>(&flags[i - 1], is_set);  // the blocks before have written v
  }
  sync_threads();  // nobody reads v before the first thread has waited
  for (int64_t k = thread_index(); k < n; k += block_size()) {
    float sum = start[k];
    for (unsigned j = 0; j < i; ++j) sum += v[j * n + k];
    v[i * n + k] = sum;
  }
  sync_threads();  // all of v[i] is written before the first thread says so
  if (thread_index() == 0) {
    if constexpr (publish == Publish::release) {
      store_release<device>(&flags[i], 1u);  // after v[i] and whatever the block has seen
    } else {
      fence<device>();  // v[i], and whatever the block has seen, come before the flag
      store_relaxed<device>(&flags[i], 1u);
    }
  }
}

// 16 bytes that carry their own flag: three values and a tag. Reading them is the wait.
DEVICE Words4 tagged(float a, float b, float c, unsigned tag) {
  return {{fused_rnn::detail::bit_cast<uint32_t>(a), fused_rnn::detail::bit_cast<uint32_t>(b),
           fused_rnn::detail::bit_cast<uint32_t>(c), tag}};
}

DEVICE Words4 wait_for_tag(const Words4* from, unsigned tag) {
  Words4 words = load_relaxed_16(from);
  while (words.w[3] != tag) words = load_relaxed_16(from);
  return words;
}

DEVICE float value_of(const Words4& words, int i) {
  return fused_rnn::detail::bit_cast<float>(words.w[i]);
}

// The same chain without a flag or a barrier: v (blocks, ceil(n / 3)) of three values and a tag.
KERNEL void hand_over_tagged_kernel(const float* start, Words4* v, unsigned tag, int64_t n) {
  const unsigned i = block_index().x;
  const int64_t groups = (n + 2) / 3;
  for (int64_t group = thread_index(); group < groups; group += block_size()) {
    float sum[3];
    for (int e = 0; e < 3; ++e) sum[e] = group * 3 + e < n ? start[group * 3 + e] : 0;
    for (unsigned j = 0; j < i; ++j) {
      const Words4 words = wait_for_tag(&v[j * groups + group], tag);
      for (int e = 0; e < 3; ++e) sum[e] += value_of(words, e);
    }
    store_relaxed_16(&v[i * groups + group], tagged(sum[0], sum[1], sum[2], tag));
  }
}

// The recurrence of grid_steps and cluster_steps, with weight (H, H) and y_0 (H) given:
//
//   y_{t+1}[i] = f(sum_k weight[i][k] y_t[k]),  f(a) = a / (1 + |a|)
//
// A warp computes a unit, its lanes striding over k. That is the same arithmetic in the same order
// whatever the launch looks like, so all variants agree bitwise. The result is in every lane.
DEVICE float next_of_unit(const float* weight, const float* y, int64_t unit, int64_t H) {
  float sum = 0;
  for (int64_t k = warp_lane(); k < H; k += 32) sum = fmaf(weight[unit * H + k], y[k], sum);
  sum = sum_of_warp(sum);
  return sum / (1 + fabsf(sum));
}

// grid_steps: y_t is in global memory, in two buffers that alternate; every block has a slice
// of the units.
//
//   y (2, H)   step t reads y[t % 2], all of it, and writes its slice of y[(t + 1) % 2]
//
// One meeting per step is enough: what step t overwrites was last read in step t - 1.
KERNEL void grid_steps_kernel(const float* weight, const float* initial, float* y, float* result,
                              int64_t H, int64_t T) {
  const int64_t slice = (H + grid_size().x - 1) / grid_size().x;
  const int64_t begin = block_index().x * slice;
  const int64_t end = begin + slice < H ? begin + slice : H;
  for (int64_t i = begin + thread_index(); i < end; i += block_size()) y[i] = initial[i];
  grid_sync();  // y_0 is whole before the first step
  for (int64_t t = 0; t < T; ++t) {
    const float* now = y + t % 2 * H;
    float* next = y + (t + 1) % 2 * H;
    for (int64_t unit = begin + warp_index(); unit < end; unit += warps_per_block()) {
      const float value = next_of_unit(weight, now, unit, H);
      if (warp_lane() == 0) next[unit] = value;
    }
    grid_sync();  // y_{t+1} is whole, and nobody reads y_t any more
  }
  for (int64_t i = begin + thread_index(); i < end; i += block_size()) result[i] = y[T % 2 * H + i];
}

// grid_steps_tagged: the same without a meeting. Three units and the step they belong to
// travel as 16 bytes, whose readers need no other sign.
//
//   y (2, ceil(H / 3))   tags are 0 before; y_t (t > 0) is in y[t % 2], tagged t
//   shared (2, H)        all of y_t, gathered in gathered[t % 2]
//
// Two buffers are enough. A block writes y_{t+1} over y_{t-1} once it has all of y_t. Whoever sent
// a part of y_t had by then gathered all of y_{t-1}: the sync_threads of that step came in between.
// For gathered: a thread gathers y_{t+1} over y_{t-1} after the sync_threads of step t, which a
// warp reaches only after its products with y_{t-1}.
KERNEL void grid_steps_tagged_kernel(const float* weight, const float* initial, Words4* y,
                                     float* result, int64_t H, int64_t T) {
  float* gathered = dynamic_shared<float>();
  const int64_t groups = (H + 2) / 3, slice = (groups + grid_size().x - 1) / grid_size().x;
  const int64_t begin = block_index().x * slice;
  const int64_t end = begin + slice < groups ? begin + slice : groups;
  for (int64_t t = 0; t <= T; ++t) {
    float* now = gathered + t % 2 * H;
    const auto tag = static_cast<unsigned>(t);
    for (int64_t group = thread_index(); group < groups; group += block_size()) {
      Words4 words{};
      if (t > 0) words = wait_for_tag(&y[t % 2 * groups + group], tag);
      for (int e = 0; e < 3; ++e)
        if (group * 3 + e < H)
          now[group * 3 + e] = t > 0 ? value_of(words, e) : initial[group * 3 + e];
    }
    sync_threads();  // y_t is gathered, and the block has done with y_{t-1}
    if (t == T) break;
    for (int64_t group = begin + warp_index(); group < end; group += warps_per_block()) {
      float values[3] = {0, 0, 0};
      for (int e = 0; e < 3; ++e)
        if (group * 3 + e < H) values[e] = next_of_unit(weight, now, group * 3 + e, H);
      if (warp_lane() == 0)
        store_relaxed_16(&y[(t + 1) % 2 * groups + group],
                         tagged(values[0], values[1], values[2], tag + 1));
    }
  }
  for (int64_t i = begin * 3 + thread_index(); i < end * 3 && i < H; i += block_size())
    result[i] = gathered[T % 2 * H + i];
}

// cluster_steps: y_t is in the shared memory of every block of one cluster, in two buffers
// that alternate. A block computes a slice of y_{t+1} and hands it to all; arrival is the
// synchronisation.
//
//   y (2, blocks * slice)   y_t in y[t % 2]; slices are multiples of 4 units, filled up with zeros
//   filled (2)              phase (t - 1) / 2 of filled[t % 2] ends when all of y_t (t > 0) is here
//
// Two buffers are enough. A block writes y_{t+1} over y_{t-1}, anywhere, once it has all of y_t.
// The slice of y_t that block R sent vouches that R has done with y_{t-1}: of each warp of R all
// lanes had read it (sync_warp, or sync_threads) before the warp sent its units, and slices count
// only when whole. So filled[(t + 1) % 2] has also ended its phase before, and nobody can be two
// phases behind: every warp has units, and y_{t+1} is not whole without them. Bytes may come before
// they are expected; the phase does not end before barrier_expect has arrived.
enum class Exchange { store, bulk, remote };

template <Exchange exchange>
KERNEL void cluster_steps_kernel(const float* weight, const float* initial, float* result,
                                 int64_t H, int64_t T) {
  STATIC_SHARED(Barrier, filled, 2);
  float* y = dynamic_shared<float>();
  const unsigned blocks = cluster_size(), rank = cluster_rank();
  const int64_t slice = (H + blocks * 4 - 1) / (blocks * 4) * 4, padded = slice * blocks;
  const auto slice_bytes = static_cast<unsigned>(slice * sizeof(float));
  const unsigned senders = exchange == Exchange::store ? blocks : blocks - 1;
  const unsigned arrivals = exchange == Exchange::remote ? blocks * (block_size() / 32) : 1;
  for (int64_t i = thread_index(); i < padded; i += block_size()) y[i] = i < H ? initial[i] : 0;
  // Copies that write y_2 over y_0 go another way to memory than the stores before.
  if constexpr (exchange == Exchange::bulk) fence_async();
  if (thread_index() == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(&filled[i], arrivals);
    // Copies and other blocks are to know the barriers. The fences of each step would do.
    barrier_init_fence();
  }
  cluster_sync();  // all blocks run, have barriers, and have y_0
  for (int64_t t = 0; t < T; ++t) {
    const float* now = y + t % 2 * padded;
    float* next = y + (t + 1) % 2 * padded;
    Barrier* next_filled = &filled[(t + 1) % 2];
    if (t > 0) {
      barrier_wait(&filled[t % 2], (t - 1) / 2 % 2);  // all of y_t is here
    }
    if (exchange != Exchange::remote && thread_index() == 0) {
      barrier_expect(next_filled, senders * slice_bytes);  // the phase ends with the last of these
    }
    for (int64_t i = warp_index(); i < slice; i += warps_per_block()) {
      const int64_t unit = rank * slice + i;
      const float value = unit < H ? next_of_unit(weight, now, unit, H) : 0;
      if constexpr (exchange == Exchange::store) {
        sync_warp();  // all lanes have read y_t before any sends what says so
        if (warp_lane() < blocks) store_async(&next[unit], value, next_filled, warp_lane());
      }
      if constexpr (exchange == Exchange::bulk) {
        if (warp_lane() == 0) next[unit] = value;
      }
      if constexpr (exchange == Exchange::remote) {
        if (warp_lane() < blocks) *remote_shared(&next[unit], warp_lane()) = value;
      }
    }
    if constexpr (exchange == Exchange::bulk) {
      fence_async();   // the slice is written before the copies read it
      sync_threads();  // by all warps, which have read y_t
      float* mine = next + rank * slice;
      if (thread_index() < blocks && thread_index() != rank)
        bulk_to_remote(mine, mine, slice_bytes, next_filled, thread_index());
    }
    if constexpr (exchange == Exchange::remote) {
      sync_warp();  // all lanes have read y_t before any arrives
      if (warp_lane() < blocks) {
        barrier_arrive_remote(next_filled, warp_lane());  // after the values that the lane stored
      }
    }
  }
  if (T > 0) {
    barrier_wait(&filled[T % 2], (T - 1) / 2 % 2);  // all of y_T is here: nothing is on its way
  }
  for (int64_t i = thread_index(); i < slice && rank * slice + i < H; i += block_size())
    result[rank * slice + i] = y[T % 2 * padded + rank * slice + i];
  if constexpr (exchange == Exchange::bulk) {
    cluster_sync();  // the others' copies have read this block's memory before it ends
  }
}

// cluster_words: the rest of what blocks of a cluster do with each other. Each hands its right
// neighbour 4, 8 and 16 bytes, which completes on the neighbour's barrier; each thread adds its
// number to a counter of the first block, which all read.
//
//   ring (blocks, 7) of uint32: what arrived from the left;  counts (blocks): the counter, as read
KERNEL void cluster_words_kernel(unsigned* ring, unsigned* counts) {
  STATIC_SHARED(Barrier, arrived, 1);
  STATIC_SHARED(Words4, four_words, 1);
  STATIC_SHARED(uint64_t, two_words, 1);
  STATIC_SHARED(unsigned, one_word, 1);
  STATIC_SHARED(unsigned, counter, 1);
  const unsigned rank = cluster_rank(), right = (rank + 1) % cluster_size();
  if (thread_index() == 0) {
    barrier_init(arrived, 1);
    // The arrival below releases the barrier, and store_async needs no more.
    barrier_init_fence();
    store_relaxed<cluster>(counter, 0u);
  }
  cluster_arrive();
  const unsigned mine = rank * 1000;  // what needs no neighbour goes on between arrival and wait
  cluster_wait();                     // all blocks run and have set up their memory
  if (thread_index() == 0) {
    barrier_expect(arrived, 28);
    store_async(one_word, mine, arrived, right);
    store_async(two_words, uint64_t(mine + 2) << 32 | (mine + 1), arrived, right);
    store_async(four_words, Words4{{mine + 3, mine + 4, mine + 5, mine + 6}}, arrived, right);
  }
  barrier_wait(arrived, 0);  // all 28 bytes from the left are here
  unsigned* row = ring + block_index().x * 7;
  if (thread_index() == 0) row[0] = one_word[0];
  if (thread_index() == 1) row[1] = static_cast<unsigned>(two_words[0]);
  if (thread_index() == 2) row[2] = static_cast<unsigned>(two_words[0] >> 32);
  if (thread_index() >= 3 && thread_index() < 7)
    row[thread_index()] = four_words[0].w[thread_index() - 3];
  atomic_add<cluster>(remote_shared(counter, 0), thread_index() + 1);
  cluster_sync();  // all have counted
  if (thread_index() == 0)
    counts[block_index().x] = load_relaxed<cluster>(remote_shared(counter, 0));
  cluster_sync();  // all have read the first block's counter before it ends
}

// cluster_chain: words that pass a value along the blocks of a cluster by flags in shared
// memory. Block i waits for its own flag, which block i - 1 sets when it has written block i's
// value.
//
//   values (blocks): 1, 2, 3, ...
KERNEL void cluster_chain_kernel(unsigned* values) {
  STATIC_SHARED(unsigned, value, 1);
  STATIC_SHARED(unsigned, flag, 1);
  const unsigned rank = cluster_rank();
  if (thread_index() == 0) {
    value[0] = 1;
    flag[0] = rank == 0;
  }
  cluster_sync();  // all blocks run and have cleared their flags
  if (thread_index() == 0) {
    const auto is_set = [](unsigned set) { return set != 0; };
    wait_until<cluster>(flag, is_set);  // the value is here
    values[block_index().x] = value[0];
    if (rank + 1 < cluster_size()) {
      *remote_shared(value, rank + 1) = value[0] + 1;
      if (rank % 2 == 0) {
        store_release<cluster>(remote_shared(flag, rank + 1),
                               1u);  // after the value of an odd block
      } else {
        fence<cluster>();  // the value of an even block comes before its flag
        store_relaxed<cluster>(remote_shared(flag, rank + 1), 1u);
      }
    }
  }
}

// mma_product: c (m, n) = a (m, k) b (k, n), the fragments loaded by hand. A block is a warp
// and owns a tile of c, 16 x 8; x of the grid counts tiles along n, y along m. What lies outside
// counts as zero.
//
//   lane = 4 row + pair:   a  rows row, row + 8;  pairs of columns 2 pair, 2 pair + 8   (16 bits)
//                             or columns pair, pair + 4                                 (TF32)
//                          b  the same along k, column row
//                          c  rows row, row + 8;  columns 2 pair, 2 pair + 1
template <class T>
DEVICE T element(const T* x, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  return row < rows && column < columns ? x[row * columns + column] : T{};
}

template <class S>
DEVICE uint32_t two(S low, S high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

DEVICE void store_tile(float* c, const float (&d)[4], int64_t row, int64_t column, int64_t m,
                       int64_t n) {
  for (int i = 0; i < 4; ++i)
    if (row + i / 2 * 8 < m && column + i % 2 < n) c[(row + i / 2 * 8) * n + column + i % 2] = d[i];
}

template <class S>
KERNEL void mma_product_kernel(const S* a, const S* b, float* c, int64_t m, int64_t n, int64_t k) {
  const int64_t pair = warp_lane() % 4, row = block_index().y * 16 + warp_lane() / 4;
  const int64_t left = block_index().x * 8, column = left + warp_lane() / 4;
  float d[4] = {0, 0, 0, 0};
  uint32_t of_a[4], of_b[2];
  if constexpr (std::is_same_v<S, float>) {
    for (int64_t at = pair; at < k + pair; at += 8) {
      for (int i = 0; i < 4; ++i)
        of_a[i] = to_tf32(element(a, row + i % 2 * 8, at + i / 2 * 4, m, k));
      for (int i = 0; i < 2; ++i) of_b[i] = to_tf32(element(b, at + i * 4, column, k, n));
      mma_m16n8k8_tf32(d, of_a, of_b);
    }
  } else {
    for (int64_t at = 2 * pair; at < k + 2 * pair; at += 16) {
      for (int i = 0; i < 4; ++i)
        of_a[i] = two(element(a, row + i % 2 * 8, at + i / 2 * 8, m, k),
                      element(a, row + i % 2 * 8, at + i / 2 * 8 + 1, m, k));
      for (int i = 0; i < 2; ++i)
        of_b[i] =
            two(element(b, at + i * 8, column, k, n), element(b, at + i * 8 + 1, column, k, n));
      mma_m16n8k16<S>(d, of_a, of_b);
    }
  }
  store_tile(c, d, row, left + 2 * pair, m, n);
}

// mma_pipeline: the same for 16 bits, with k and n multiples of 8. A block of two warps owns a
// tile of c, 32 x 16; tiles of a and b go through shared memory in two stages, one being copied
// while the other is multiplied.
//
//   a tile 32 x 16: 64 pieces of 8, one per thread      warp w multiplies rows 16 w ... 16 w + 15
//   b tile 16 x 16: 32 pieces, first warp's             by two halves of 8 columns
//
// Rows of 24 elements: 48 bytes, so that eight of them lie in different banks.
template <class S>
DEVICE void copy_piece(S* to, const S* x, int64_t row, int64_t column, int64_t rows,
                       int64_t columns) {
  if (row < rows && column < columns)
    copy_async<16>(to, x + row * columns + column);
  else
    *reinterpret_cast<Words4*>(to) = Words4{};
}

template <class S>
KERNEL void mma_pipeline_kernel(const S* a, const S* b, float* c, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t pitch = 24, tile_a = 32 * pitch, tile_b = 16 * pitch;
  S* tiles = dynamic_shared<S>();  // (2, tile_a + tile_b)
  const int64_t top = block_index().y * 32, left = block_index().x * 16;
  const int64_t piece_row = thread_index() / 2, piece_column = thread_index() % 2 * 8;
  const auto fetch = [&](int64_t step) {
    S* stage = tiles + step % 2 * (tile_a + tile_b);
    S* piece = stage + piece_row * pitch + piece_column;
    copy_piece(piece, a, top + piece_row, step * 16 + piece_column, m, k);
    if (warp_index() == 0)
      copy_piece(piece + tile_a, b, step * 16 + piece_row, left + piece_column, k, n);
  };
  float d[2][4] = {};
  const int64_t steps = (k + 15) / 16;
  fetch(0);
  copy_async_commit();
  for (int64_t step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch(step + 1);
    copy_async_commit();   // of nothing in the last step, so that the count below holds
    copy_async_wait<1>();  // this thread's pieces of the stage are here
    sync_threads();        // and everybody else's
    const S* stage = tiles + step % 2 * (tile_a + tile_b);
    const S* piece = stage + warp_lane() % 16 * pitch + warp_lane() / 16 * 8;
    uint32_t of_a[4], of_b[4];
    load_matrix_x4(of_a, piece + warp_index() * 16 * pitch);
    load_matrix_x4_transposed(of_b, piece + tile_a);
    for (int half = 0; half < 2; ++half)
      mma_m16n8k16<S>(d[half], of_a, {of_b[2 * half], of_b[2 * half + 1]});
    sync_threads();  // all have read the stage before the next step fetches over it
  }
  for (int half = 0; half < 2; ++half)
    store_tile(c, d[half], top + warp_index() * 16 + warp_lane() / 4,
               left + half * 8 + warp_lane() % 4 * 2, m, n);
}

// bulk_sum: a block per row of x (rows, n), n a multiple of 4. One thread of the last warp has
// the row copied to shared memory, tile after tile, into two stages; the other four warps add up.
//
//   filled[s]    a phase per tile: the tile's bytes are here
//   drained[s]   a phase per tile: every adding thread has read it
KERNEL void bulk_sum_kernel(const float* x, float* sums, int64_t n) {
  constexpr int64_t tile = 1024, adding = 128;
  STATIC_SHARED(Barrier, filled, 2);
  STATIC_SHARED(Barrier, drained, 2);
  STATIC_SHARED(float, of_warps, 4);
  float* stages = dynamic_shared<float>();  // (2, tile)
  const float* row = x + block_index().x * n;
  const int64_t tiles = (n + tile - 1) / tile;
  if (thread_index() == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&filled[i], 1);
      barrier_init(&drained[i], adding);
    }
    barrier_init_fence();  // copies know the barriers
  }
  sync_threads();  // and so does the block
  if (thread_index() >= adding) {
    for (int64_t i = 0; i < tiles && warp_lane() == 0; ++i) {
      const int64_t count = n - i * tile < tile ? n - i * tile : tile;
      const auto bytes = static_cast<unsigned>(count * sizeof(float));
      if (i >= 2) {
        barrier_wait(&drained[i % 2], (i / 2 - 1) % 2);  // nobody reads what the copy replaces
      }
      barrier_expect(&filled[i % 2], bytes);  // the phase ends when the copy is done
      bulk_to_shared(stages + i % 2 * tile, row + i * tile, bytes, &filled[i % 2]);
    }
    return;
  }
  float sum = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    barrier_wait(&filled[i % 2], i / 2 % 2);  // the tile is here
    for (int64_t j = thread_index(); j < tile && i * tile + j < n; j += adding)
      sum += stages[i % 2 * tile + j];
    barrier_arrive(&drained[i % 2]);  // this thread has read it
  }
  sum = sum_of_warp(sum);
  if (warp_lane() == 0) of_warps[warp_index()] = sum;
  sync_some(1, adding);  // the adding warps' sums are there; the last warp is gone
  if (thread_index() == 0)
    sums[block_index().x] = of_warps[0] + of_warps[1] + of_warps[2] + of_warps[3];
}

// ping_pong: two warps pass a number to and fro through shared memory, adding one each time.
//
//   turn   whose it is: even turns are the first warp's, odd ones the second's
//   ball   the number
KERNEL void ping_pong_kernel(uint64_t* result, int64_t turns) {
  STATIC_SHARED(uint64_t, ball, 1);
  STATIC_SHARED(uint64_t, turn, 1);
  if (thread_index() == 0) {
    ball[0] = 0;
    turn[0] = 0;
  }
  sync_threads();  // the game is set up
  if (warp_lane() != 0) return;
  for (uint64_t t = warp_index(); t < static_cast<uint64_t>(turns); t += 2) {
    if (t % 2 == 0) {
      const auto is_mine = [t](uint64_t now) { return now == t; };
      wait_until<block>(turn, is_mine);  // the second warp has done with the ball
      ball[0] += 1;
      fence<block>();  // the ball comes before the turn that goes with it
      store_relaxed<block>(turn, t + 1);
    } else {
      while (load_relaxed<block>(turn) != t) {
      }
      fence<block>();  // the turn comes before the ball that goes with it
      ball[0] += 1;
      store_release<block>(turn, t + 1);  // after the ball
    }
  }
  if (warp_index() == 0) {
    while (load_acquire<block>(turn) < static_cast<uint64_t>(turns)) {
    }
    *result = ball[0];
  }
}

// hang: waits for what nobody sends, with a flag in L2 or at a transaction barrier. On a GPU the
// watchdog ends it, on the CPU the runner.
KERNEL void hang_kernel(Words4* never, unsigned patience) {
  for (Watchdog dog(patience, 7); load_relaxed_16(never).w[3] != 1; dog.look()) {
  }
}

KERNEL void hang_at_barrier_kernel(unsigned patience) {
  STATIC_SHARED(Barrier, never, 1);
  if (thread_index() == 0) barrier_init(never, 1);
  // The barrier is there; nobody arrives.
  sync_threads();
  barrier_wait(never, 0, patience, 7);
}

// words: what a block does with numbers. x (n) holds a float per thread of one block; n is a
// multiple of 64, up to 512.
//
//   floats (11, n)  exp, exp2, tanh, reciprocal of x; philox; shuffle, _xor, _down of x; x of the
//                   other thread of a pair; x backwards; x backwards in each half
//   counts (3, n)   ballot(x > 0); any + 2 all of x > 0; a number of its own, 0 ... n - 1
//   wide (n)        shuffle_down of 1 / 3 + x in double
//   sum (1)         of 2^32 + i over the threads
//   sign (1)        of -1 for negative x, 1 for others
KERNEL void words_kernel(const float* x, float* floats, unsigned* counts, double* wide,
                         uint64_t* sum, int* sign, uint64_t seed) {
  STATIC_SHARED(float, staged, 512);
  STATIC_SHARED(float, halves, 512);
  STATIC_SHARED(unsigned, counter, 1);
  const unsigned i = thread_index(), n = block_size(), half = n / 2;
  const float value = x[i];
  floats[i] = fast_exp(value);
  floats[n + i] = fast_exp2(value);
  floats[2 * n + i] = fast_tanh(value);
  floats[3 * n + i] = fast_reciprocal(value);
  floats[4 * n + i] = philox_uniform(seed, i);
  floats[5 * n + i] = shuffle(value, 31 - warp_lane());
  floats[6 * n + i] = shuffle_xor(value, 5);
  floats[7 * n + i] = shuffle_down(value, 3);
  wide[i] = shuffle_down(1.0 / 3 + value, 16);
  counts[i] = ballot(value > 0);
  counts[n + i] = any(value > 0) + 2 * all(value > 0);

  if (i % 2 == 0) copy_async<8>(&staged[i], &x[i]);
  copy_async_commit();
  copy_async_wait<0>();  // this thread's pair is here
  sync_warp();           // and those of the other lanes
  floats[8 * n + i] = staged[i ^ 1];
  if (i == 0) counter[0] = 0;
  sync_threads();  // all have read the pairs, and the counter is zero
  counts[2 * n + i] = atomic_add<block>(counter, 1);
  copy_async<4>(&staged[i], &x[i]);
  copy_async_commit();
  copy_async_wait<0>();  // this thread's value is here
  sync_threads();        // and everybody's
  floats[9 * n + i] = staged[n - 1 - i];
  halves[i] = value;
  sync_some(1 + i / half, half);  // the half has written its values
  floats[10 * n + i] = halves[i < half ? half - 1 - i : n + half - 1 - i];

  atomic_add<device>(sum, (uint64_t(1) << 32) + i);
  atomic_add<device>(sign, value < 0 ? -1 : 1);
}

// The host's side.

template <class T>
T* pointer(const Buffer& buffer) {
  return static_cast<T*>(buffer.data);
}

unsigned count(int64_t n) { return static_cast<unsigned>(n); }
unsigned tiles(int64_t n, int64_t side) { return count((n + side - 1) / side); }

// Launches what `launches` does, on these buffers. Returns null or what went wrong, in memory
// that lasts until the next call.
template <class Launches>
const char* run(std::initializer_list<Buffer> buffers, const Launches& launches) {
  static thread_local std::string message;
  try {
#if defined(__CUDACC__)
    launches();
    check(cudaDeviceSynchronize(), "kernel");
#else
    cuda_on_cpu::declare(buffers.begin(), buffers.size());
    launches();
#endif
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace
}  // namespace fused_rnn::cuda

// Not all of fused_rnn: its exp and tanh would be ambiguous with the ones of C.
using fused_rnn::BFloat16;
using fused_rnn::DType;
using fused_rnn::Half;
using namespace fused_rnn::cuda;

#define KERNEL_TEST extern "C" const char*

// x (rows, n), sums (rows): float32. sums = x.sum(1).
KERNEL_TEST block_sum(Buffer x, Buffer sums, int64_t rows, int64_t n, int64_t blocks) {
  return run({x, sums}, [&] {
    launch(block_sum_kernel, {{count(blocks), 1, 1}, 128}, nullptr, pointer<float>(x),
           pointer<float>(sums), rows, n);
  });
}

// x (n), shares (blocks), total (1): float32; ended (1): uint32, scratch. total = x.sum().
KERNEL_TEST total(Buffer x, Buffer shares, Buffer ended, Buffer total, int64_t n, int64_t blocks) {
  return run({x, shares, ended, total}, [&] {
    set_zero(ended.data, 4, nullptr);
    launch(total_kernel, {{count(blocks), 1, 1}, 64}, nullptr, pointer<float>(x),
           pointer<float>(shares), pointer<unsigned>(ended), pointer<float>(total), n);
  });
}

// x (m, n), y (n, m) of dtype 1 (float64) or 2 (bfloat16). y = x.T, bitwise.
KERNEL_TEST transpose(Buffer x, Buffer y, int64_t m, int64_t n, int64_t dtype) {
  return run({x, y}, [&] {
    const Grid grid{{tiles(n, 32), tiles(m, 32), 1}, 256};
    if (static_cast<DType>(dtype) == DType::float64)
      launch(transpose_kernel<double>, grid, nullptr, pointer<double>(x), pointer<double>(y), m, n);
    else
      launch(transpose_kernel<BFloat16>, grid, nullptr, pointer<BFloat16>(x), pointer<BFloat16>(y),
             m, n);
  });
}

// start (n), v (blocks, n): float32; flags (blocks): uint32, scratch. v[i] = start * 2**i, exactly.
// fenced: 0 publishes by store_release, 1 by a fence and store_relaxed.
KERNEL_TEST hand_over(Buffer start, Buffer v, Buffer flags, int64_t n, int64_t blocks,
                      int64_t fenced) {
  return run({start, v, flags}, [&] {
    set_zero(flags.data, blocks * 4, nullptr);
    Grid grid{{count(blocks), 1, 1}, 64};
    grid.cooperative = true;
    launch(fenced ? hand_over_kernel<Publish::fence> : hand_over_kernel<Publish::release>, grid,
           nullptr, pointer<float>(start), pointer<float>(v), pointer<unsigned>(flags), n);
  });
}

// start (n): float32; v (blocks, ceil(n / 3), 4): 32 bits. v[i, j, e] = start[3 j + e] * 2**i as
// float32 for e < 3, zeros beyond n; v[i, j, 3] = 7 as uint32.
KERNEL_TEST hand_over_tagged(Buffer start, Buffer v, int64_t n, int64_t blocks) {
  return run({start, v}, [&] {
    set_zero(v.data, blocks * ((n + 2) / 3) * 16, nullptr);
    Grid grid{{count(blocks), 1, 1}, 64};
    grid.cooperative = true;
    launch(hand_over_tagged_kernel, grid, nullptr, pointer<float>(start), pointer<Words4>(v), 7u,
           n);
  });
}

// weight (H, H), initial (H), result (H): float32; y (2, H): float32, scratch. result = y_T, where
// y_0 = initial and y_{t+1} = a / (1 + |a|), a = weight @ y_t. The three functions agree bitwise,
// for any number of blocks.
KERNEL_TEST grid_steps(Buffer weight, Buffer initial, Buffer y, Buffer result, int64_t H, int64_t T,
                       int64_t blocks) {
  return run({weight, initial, y, result}, [&] {
    Grid grid{{count(blocks), 1, 1}, 128};
    grid.cooperative = true;
    launch(grid_steps_kernel, grid, nullptr, pointer<float>(weight), pointer<float>(initial),
           pointer<float>(y), pointer<float>(result), H, T);
  });
}

// The same; y (2, ceil(H / 3), 4): 32 bits, scratch.
KERNEL_TEST grid_steps_tagged(Buffer weight, Buffer initial, Buffer y, Buffer result, int64_t H,
                              int64_t T, int64_t blocks) {
  return run({weight, initial, y, result}, [&] {
    set_zero(y.data, 2 * ((H + 2) / 3) * 16, nullptr);
    Grid grid{{count(blocks), 1, 1}, 128, 2 * H * sizeof(float)};
    grid.cooperative = true;
    launch(grid_steps_tagged_kernel, grid, nullptr, pointer<float>(weight), pointer<float>(initial),
           pointer<Words4>(y), pointer<float>(result), H, T);
  });
}

// The same, in one cluster of 2 to 16 blocks. exchange: 0 store_async, 1 bulk_to_remote, 2 plain
// stores and barrier_arrive_remote.
KERNEL_TEST cluster_steps(Buffer weight, Buffer initial, Buffer result, int64_t H, int64_t T,
                          int64_t blocks, int64_t exchange) {
  return run({weight, initial, result}, [&] {
    const auto kernel = exchange == 0   ? cluster_steps_kernel<Exchange::store>
                        : exchange == 1 ? cluster_steps_kernel<Exchange::bulk>
                                        : cluster_steps_kernel<Exchange::remote>;
    const int64_t padded = (H + blocks * 4 - 1) / (blocks * 4) * 4 * blocks;
    launch(kernel, {{count(blocks), 1, 1}, 128, 2 * padded * sizeof(float), count(blocks)}, nullptr,
           pointer<float>(weight), pointer<float>(initial), pointer<float>(result), H, T);
  });
}

// ring (blocks, 7), counts (blocks): int32, in clusters of `cluster` blocks, 2 or more. ring[b, j] =
// 1000 left + j, where left is the rank before b's in its cluster, the last before the first.
// counts = cluster * 2080.
KERNEL_TEST cluster_words(Buffer ring, Buffer counts, int64_t blocks, int64_t cluster) {
  return run({ring, counts}, [&] {
    launch(cluster_words_kernel, {{count(blocks), 1, 1}, 64, 0, count(cluster)}, nullptr,
           pointer<unsigned>(ring), pointer<unsigned>(counts));
  });
}

// values (blocks): int32, in clusters of `cluster` blocks. values[b] = 1 + b % cluster.
KERNEL_TEST cluster_chain(Buffer values, int64_t blocks, int64_t cluster) {
  return run({values}, [&] {
    launch(cluster_chain_kernel, {{count(blocks), 1, 1}, 32, 0, count(cluster)}, nullptr,
           pointer<unsigned>(values));
  });
}

// a (m, k), b (k, n) of dtype 0 (float32, multiplied as TF32), 2 (bfloat16) or 3 (float16); c (m,
// n): float32. c = a @ b, accumulated in float32; exact if all is small integers.
KERNEL_TEST mma_product(Buffer a, Buffer b, Buffer c, int64_t m, int64_t n, int64_t k,
                        int64_t dtype) {
  return run({a, b, c}, [&] {
    const Grid grid{{tiles(n, 8), tiles(m, 16), 1}, 32};
    const auto go = [&](auto kernel, auto element) {
      using S = decltype(element);
      launch(kernel, grid, nullptr, pointer<S>(a), pointer<S>(b), pointer<float>(c), m, n, k);
    };
    switch (static_cast<DType>(dtype)) {
      case DType::float32:
        return go(mma_product_kernel<float>, float{});
      case DType::bfloat16:
        return go(mma_product_kernel<BFloat16>, BFloat16{});
      default:
        return go(mma_product_kernel<Half>, Half{});
    }
  });
}

// The same for dtype 2 or 3, with n and k multiples of 8 and buffers aligned to 16 bytes.
KERNEL_TEST mma_pipeline(Buffer a, Buffer b, Buffer c, int64_t m, int64_t n, int64_t k,
                         int64_t dtype) {
  return run({a, b, c}, [&] {
    const Grid grid{{tiles(n, 16), tiles(m, 32), 1}, 64, 2 * (32 + 16) * 24 * 2};
    if (static_cast<DType>(dtype) == DType::bfloat16)
      launch(mma_pipeline_kernel<BFloat16>, grid, nullptr, pointer<BFloat16>(a),
             pointer<BFloat16>(b), pointer<float>(c), m, n, k);
    else
      launch(mma_pipeline_kernel<Half>, grid, nullptr, pointer<Half>(a), pointer<Half>(b),
             pointer<float>(c), m, n, k);
  });
}

// x (rows, n), sums (rows): float32, n a multiple of 4, x aligned to 16 bytes. sums = x.sum(1).
KERNEL_TEST bulk_sum(Buffer x, Buffer sums, int64_t rows, int64_t n) {
  return run({x, sums}, [&] {
    launch(bulk_sum_kernel, {{count(rows), 1, 1}, 160, 2 * 1024 * sizeof(float)}, nullptr,
           pointer<float>(x), pointer<float>(sums), n);
  });
}

// result (1): int64. result = turns.
KERNEL_TEST ping_pong(Buffer result, int64_t turns) {
  return run({result}, [&] {
    launch(ping_pong_kernel, {{1, 1, 1}, 64}, nullptr, pointer<uint64_t>(result), turns);
  });
}

// never (4): int32, scratch. Fails after `patience` clock_unit cycles.
KERNEL_TEST hang(Buffer never, int64_t patience, int64_t at_barrier) {
  return run({never}, [&] {
    set_zero(never.data, 16, nullptr);
    const Grid grid{{1, 1, 1}, 32};
    if (at_barrier)
      launch(hang_at_barrier_kernel, grid, nullptr, static_cast<unsigned>(patience));
    else
      launch(hang_kernel, grid, nullptr, pointer<Words4>(never), static_cast<unsigned>(patience));
  });
}

// x (n): float32, n a multiple of 64 up to 512; floats (11, n): float32; counts (3, n): int32; wide
// (n): float64; sum (1): int64; sign (1): int32. With w = i // 32 * 32 the warp's first thread:
//   floats[0 ... 3] = exp(x), 2**x, tanh(x), 1 / x, approximately
//   floats[4] = as torch.ops' masks: philox(seed, i), in [0, 1)
//   floats[5, i] = x[w + 31 - i % 32], floats[6, i] = x[i ^ 5]
//   floats[7, i] = x[i + 3] if i % 32 < 29 else x[i]
//   floats[8, i] = x[i ^ 1], floats[9] = x.flip(0), floats[10] = x.view(2, n / 2).flip(1)
//   counts[0, i] = bit j set if x[w + j] > 0; counts[1] = any + 2 * all of x > 0 over the warp
//   counts[2] = a permutation of 0 ... n - 1
//   wide[i] = 1 / 3 + x[i + 16 if i % 32 < 16 else i], in float64
//   sum = n * 2**32 + n (n - 1) / 2, sign = number of x >= 0 less number of x < 0
KERNEL_TEST words(Buffer x, Buffer floats, Buffer counts, Buffer wide, Buffer sum, Buffer sign,
                  int64_t n, int64_t seed) {
  return run({x, floats, counts, wide, sum, sign}, [&] {
    set_zero(sum.data, 8, nullptr);
    set_zero(sign.data, 4, nullptr);
    launch(words_kernel, {{1, 1, 1}, count(n)}, nullptr, pointer<float>(x), pointer<float>(floats),
           pointer<unsigned>(counts), pointer<double>(wide), pointer<uint64_t>(sum),
           pointer<int>(sign), static_cast<uint64_t>(seed));
  });
}
