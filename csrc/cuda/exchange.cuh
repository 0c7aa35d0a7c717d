// How the thread blocks of a team hand over what the others wait for, once per tile and timestep:
//
//   forward    its new h to every member            States::hand_over, await
//   backward   to every member its share of         Sums::hand_over, collect
//              d_gates W_hh, summed up there
//
// By a cluster: straight into the other's shared memory, counted by a transaction barrier there. Through
// L2: in words of 16 bytes, three numbers and a tag that says which hand-over they are of, so that
// reading them is the wait. Either has two buffers that alternate, `turn` says which, and that is enough:
// who hands over number n + 2 has the whole of n + 1, and members send that when they are done with n.
#pragma once

#include "../dtype.h"
#include "device.cuh"
#include "persistent.h"
#include "product.cuh"

namespace fused_rnn::cuda {

// A thread block of a team.
struct Member {
  unsigned rank, team;  // which member of which team

  DEVICE explicit Member(const Layout& layout)
      : rank(block_index().x % layout.team), team(block_index().x / layout.team) {}
};

// The unit and row that a thread computes: 16 units of a row, side by side, in half a warp.
struct Pair {
  bool exists;
  unsigned number;     // of the thread block's pairs
  int block;           // unit block of this thread block
  unsigned row, unit;  // of the tile, of the unit block
  int index;           // of unit in the layer

  DEVICE Pair(const Layout& layout, const Member& member) {
    number = thread_index_again();
    exists = number < unsigned(layout.unit_blocks * pairs_of_block);
    block = number / pairs_of_block;
    row = number / unit_block % tile_rows;
    unit = number % unit_block;
    index = (member.rank * layout.unit_blocks + block) * unit_block + unit;
  }
};

// The transaction barriers of a cluster, two for every tile.
class Arrivals {
 public:
  DEVICE Arrivals(const Layout& layout, void* barriers, unsigned bytes)
      : barriers_(static_cast<Barrier*>(barriers)), bytes_(bytes), patience_(layout.patience) {
    if (thread_index() == 0) {
      for (int i = 0; i < layout.tiles * 2; ++i) barrier_init(&barriers_[i], 1);
      barrier_init_fence();
      for (int i = 0; i < layout.tiles * 2; ++i) barrier_expect(&barriers_[i], bytes_);
    }
    cluster_sync();
  }

  DEVICE Barrier* of(int tile, unsigned turn) const { return &barriers_[tile * 2 + turn % 2]; }

  // Until hand-over `turn` is here. Thread 0 has to be among those who wait.
  DEVICE void wait(int tile, unsigned turn) const {
    barrier_wait(of(tile, turn), turn / 2 % 2, patience_, turn);
    if (thread_index() == 0) barrier_expect(of(tile, turn), bytes_);
  }

 private:
  Barrier* barriers_;
  unsigned bytes_, patience_;
};

// 16 bytes through L2, tagged, and how many of them carry `words` words.
constexpr int tagged_words(int words) { return (words + 2) / 3; }

// Calls take(i, words) for i = first, first + stride .. < end once at(i) bears the tag. Several are asked
// for at once.
template <class At, class Take>
DEVICE void poll(int first, int end, int stride, unsigned tag, unsigned patience, const At& at,
                 const Take& take) {
  constexpr int batch = 2;
  for (int i = first; i < end; i += batch * stride) {
    Words4 words[batch];
    for (int j = 0; j < batch; ++j)
      if (i + j * stride < end) words[j] = load_relaxed_16(at(i + j * stride));
    for (int j = 0; j < batch; ++j)
      if (i + j * stride < end) {
        for (Watchdog dog(patience, tag - 1); words[j].w[3] != tag; dog.look())
          words[j] = load_relaxed_16(at(i + j * stride));
        take(i + j * stride, words[j]);
      }
  }
}

// ---- h, forward. A warp hands over what its 32 threads computed: 16 units of 2 rows. A word is an
// operand's bits; of half types even lanes have their own and the next lane's.

template <class S>
constexpr int words_of_warp = 32 * sizeof(S) / 4;

template <class S>
DEVICE uint32_t word_of_lane(uint32_t operand) {
  if constexpr (sizeof(S) == 2) operand |= shuffle_xor(operand, 1) << 16;
  return operand;
}

// The operand of a slice: (slices, 8 rows, 4) of 16 bytes. Where a unit's 16 bytes of a row are.
template <class S>
DEVICE int place_of_unit(int unit, unsigned row) {
  const int chunk = unit * static_cast<int>(sizeof(S)) / 16;
  return chunk / 4 * warp_size + row * 4 + chunk % 4;
}

template <class S>
class ClusterStates {
 public:
  DEVICE ClusterStates(const Layout& layout, const ForwardPlaces& places, unsigned char* shared,
                       const Member&, Words4*)
      : states_(reinterpret_cast<Words4*>(shared + places.states)),
        team_(layout.team),
        words_(places.state_slices * warp_size),
        arrivals_(layout, shared + places.barriers,
                  layout.team * layout.unit_blocks * pairs_of_block * sizeof(S)) {}

  static HOST_DEVICE size_t ring_words(const Layout&) { return 0; }

  // The state that hand-over `turn` brings.
  DEVICE Words4* at(int tile, unsigned turn) const {
    return states_ + (tile * 2 + turn % 2) * words_;
  }

  DEVICE void await(int tile, unsigned turn, int, int) const { arrivals_.wait(tile, turn); }

  DEVICE void hand_over(int tile, unsigned turn, int unit, unsigned row, uint32_t operand) const {
    constexpr unsigned lanes = 16 / sizeof(S);  // that share 16 bytes
    const uint32_t word = word_of_lane<S>(operand);
    const unsigned first = warp_lane() / lanes * lanes;
    Words4 chunk;
    for (unsigned i = 0; i < 4; ++i) chunk.w[i] = shuffle(word, first + i * (lanes / 4));
    Words4* const to = at(tile, turn) + place_of_unit<S>(unit, row);
    for (unsigned rank = warp_lane() % lanes; rank < team_; rank += lanes)
      store_async(to, chunk, arrivals_.of(tile, turn), rank);
  }

 private:
  Words4* states_;
  unsigned team_;
  int words_;
  Arrivals arrivals_;
};

template <class S>
class GridStates {
 public:
  DEVICE GridStates(const Layout& layout, const ForwardPlaces& places, unsigned char* shared,
                    const Member& member, Words4* ring)
      : state_(reinterpret_cast<Words4*>(shared + places.states)),
        ring_(ring + member.team * ring_words(layout)),
        team_(layout.team),
        patience_(layout.patience) {}

  // Of 16 bytes, for each team; the caller has zeroed them.
  static HOST_DEVICE size_t ring_words(const Layout& layout) {
    return size_t(layout.tiles) * 2 * layout.team * of_block;
  }

  DEVICE Words4* at(int, unsigned) const { return state_; }

  // Brings slices first .. first + count, for the warp that asks. What they overwrite was read before the
  // last sync_threads.
  DEVICE void await(int tile, unsigned turn, int first, int count) const {
    constexpr int blocks = slice_bytes / (unit_block * sizeof(S));  // of a slice
    const int begin = first * blocks, after = begin + count * blocks;
    const int end = after < team_ ? after : team_;
    const Words4* const from = of(tile, turn);
    uint32_t* const to = reinterpret_cast<uint32_t*>(state_);
    const int lane = thread_index_again() % warp_size;
    poll(
        begin * of_block + lane, end * of_block, warp_size, turn + 1, patience_,
        [&](int i) { return from + i; },
        [&](int i, const Words4& words) {
          const int block = i / of_block, pair = i % of_block / of_warp;
          for (int j = 0; j < 3; ++j) {
            const int word = i % of_warp * 3 + j, half = words_of_warp<S> / 2;
            if (word < words_of_warp<S>)
              to[block / blocks * slice_columns_bytes / 4 + (pair * 2 + word / half) * 16 +
                 block % blocks * half + word % half] = words.w[j];
          }
        });
    sync_warp();  // all of it is there
  }

  DEVICE void hand_over(int tile, unsigned turn, int unit, unsigned row, uint32_t operand) const {
    constexpr unsigned lanes = 4 / sizeof(S);  // that share a word
    const uint32_t word = word_of_lane<S>(operand);
    Words4 words;
    for (unsigned i = 0; i < 3; ++i) {
      const unsigned lane = (warp_lane() * 3 + i) * lanes;
      words.w[i] = shuffle(word, lane < warp_size ? lane : 0);
    }
    words.w[3] = turn + 1;
    if (warp_lane() < of_warp)
      store_relaxed_16(
          of(tile, turn) + unit / unit_block * of_block + row / 2 * of_warp + warp_lane(), words);
  }

 private:
  static constexpr int of_warp = tagged_words(words_of_warp<S>);
  static constexpr int of_block = of_warp * tile_rows / 2;

  DEVICE Words4* of(int tile, unsigned turn) const {
    return ring_ + (tile * 2 + turn % 2) * int64_t(team_) * of_block;
  }

  Words4* state_;
  Words4* ring_;
  int team_;
  unsigned patience_;
};

// ---- shares of d_gates W_hh, backward. A warp hands over the sums of 16 units and 8 rows (product.cuh).

class ClusterSums {
 public:
  DEVICE ClusterSums(const Layout& layout, const BackwardPlaces& places, unsigned char* shared,
                     const Member& member, Words4*)
      : inbox_(reinterpret_cast<Words4*>(shared + places.inbox)),
        rank_(member.rank),
        team_(layout.team),
        unit_blocks_(layout.unit_blocks),
        arrivals_(layout, shared + places.barriers, layout.team * layout.unit_blocks * 512) {}

  static HOST_DEVICE size_t ring_words(const Layout&) { return 0; }

  // Sums of unit block `block` of the layer.
  DEVICE void hand_over(int tile, unsigned turn, int block, const Sums& sums) const {
    store_async(at(tile, turn, rank_, block % unit_blocks_) + place_of_lane(),
                fused_rnn::detail::bit_cast<Words4>(sums), arrivals_.of(tile, turn),
                block / unit_blocks_);
  }

  // The sum over all members for a thread's unit and row, in one of this member's unit blocks. Four
  // lanes read 16 bytes of different members and exchange what is not theirs.
  DEVICE float collect(int tile, unsigned turn, const Pair& pair) const {
    if (!pair.exists) return 0;
    arrivals_.wait(tile, turn);
    const bool high = warp_lane() & 8, odd = warp_lane() & 16;
    float sums[4] = {0, 0, 0, 0};
    for (unsigned from = warp_lane() / 8; from < team_; from += 4) {
      const Sums of = fused_rnn::detail::bit_cast<Sums>(
          at(tile, turn, from, pair.block)[place_of(pair.unit, pair.row)]);
      for (int i = 0; i < 4; ++i) sums[i] += of.v[i];
    }
    // Numbers 2, 3 are of the units above 8, odd ones of odd rows.
    float half[2];
    for (int i = 0; i < 2; ++i)
      half[i] = (high ? sums[2 + i] : sums[i]) + shuffle_xor(high ? sums[i] : sums[2 + i], 8);
    return (odd ? half[1] : half[0]) + shuffle_xor(odd ? half[0] : half[1], 16);
  }

 private:
  DEVICE Words4* at(int tile, unsigned turn, unsigned from, int block) const {
    return inbox_ + (((tile * 2 + turn % 2) * team_ + from) * unit_blocks_ + block) * warp_size;
  }

  Words4* inbox_;
  unsigned rank_, team_;
  int unit_blocks_;
  Arrivals arrivals_;
};

class GridSums {
 public:
  DEVICE GridSums(const Layout& layout, const BackwardPlaces& places, unsigned char* shared,
                  const Member& member, Words4* ring)
      : parts_(reinterpret_cast<float*>(shared + places.inbox)),
        ring_(ring + member.team * ring_words(layout)),
        rank_(member.rank),
        team_(layout.team),
        patience_(layout.patience) {}

  static HOST_DEVICE size_t ring_words(const Layout& layout) {
    return size_t(layout.tiles) * 2 * layout.team * layout.team * of_block;
  }

  // Numbers 4 lane .. 4 lane + 3 of 128: three lanes have four words of three.
  DEVICE void hand_over(int tile, unsigned turn, int block, const Sums& sums) const {
    const unsigned lane = warp_lane(), third = lane % 3;
    const auto bits = [](float x) { return fused_rnn::detail::bit_cast<uint32_t>(x); };
    const uint32_t v[4] = {bits(sums.v[0]), bits(sums.v[1]), bits(sums.v[2]), bits(sums.v[3])};
    const uint32_t next[2] = {shuffle_down(v[0], 1), shuffle_down(v[1], 1)};
    Words4* const to = at(tile, turn, block, rank_) + (lane * 4 + 2) / 3;
    const unsigned tag = turn + 1;
    if (third == 0) {
      store_relaxed_16(to, {{v[0], v[1], v[2], tag}});
      store_relaxed_16(to + 1, {{v[3], next[0], next[1], tag}});
    } else if (third == 1) {
      store_relaxed_16(to, {{v[2], v[3], next[0], tag}});
    } else {
      store_relaxed_16(to, {{v[1], v[2], v[3], tag}});
    }
  }

  // All threads of the block: each adds up one word of every fifth member.
  DEVICE float collect(int tile, unsigned turn, const Pair& pair) const {
    const int word = thread_index() % of_block, part = thread_index() / of_block;
    if (part < parts) {
      float sums[3] = {0, 0, 0};
      poll(
          part, team_, parts, turn + 1, patience_,
          [&](int from) { return at(tile, turn, rank_, from) + word; },
          [&](int, const Words4& words) {
            for (int i = 0; i < 3; ++i) sums[i] += fused_rnn::detail::bit_cast<float>(words.w[i]);
          });
      for (int i = 0; i < 3; ++i)
        if (word * 3 + i < pairs_of_block) parts_[part * pairs_of_block + word * 3 + i] = sums[i];
    }
    sync_threads();  // all parts are there
    float sum = 0;
    if (pair.exists)
      for (int i = 0; i < parts; ++i)
        sum += parts_[i * pairs_of_block + (pair.unit % 8 * 4 + pair.row / 2) * 4 +
                      number_of(pair.unit, pair.row)];
    return sum;
  }

 private:
  static constexpr int of_block = tagged_words(pairs_of_block);
  static constexpr int parts = 5;
  static_assert(parts * of_block <= int(team_warps * warp_size));

  // What goes to a member from another.
  DEVICE Words4* at(int tile, unsigned turn, unsigned to, unsigned from) const {
    return ring_ + (((tile * 2 + turn % 2) * team_ + to) * int64_t(team_) + from) * of_block;
  }

  float* parts_;
  Words4* ring_;
  unsigned rank_;
  int team_;
  unsigned patience_;
};

}  // namespace fused_rnn::cuda
