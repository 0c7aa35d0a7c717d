// The persistent engines: weights resident for the whole sequence. What they are, and how a layer is
// laid out over a GPU; the face to the binding. No torch and no CUDA here.
//
// A team of thread blocks shares the recurrent matrix of a lane. Each keeps the rows of its hidden
// units, all gates of them, from the first timestep to the last: some in registers, the rest in shared
// memory. Per timestep a team hands its new h (forward) or its products (backward) to all its members,
// and their arrival is the only synchronisation. Two ways to do that are two engines:
//
//   persistent_cluster   a team is a thread-block cluster, hands over through distributed shared memory
//   persistent_grid      a team is any set of blocks of a cooperative launch, hands over through L2
//
// Units lie in blocks of 16, as many as an mma has rows, rows of the batch in tiles of 8, as many as it
// has columns. A team takes several tiles in turns, so that one is computed while others are handed over.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "per_step.h"

namespace fused_rnn::cuda {

constexpr int tile_rows = 8;
constexpr int unit_block = 16;
constexpr int pairs_of_block = unit_block * tile_rows;  // of a unit and a row
constexpr int team_warps = 8;                           // of each thread block of a team
constexpr int max_unit_blocks = 2;                      // of each
// Pieces of the matrix (product.cuh) that a thread keeps in registers, at most, 8 registers each of the
// 255 that a thread of 8 warps may have. Exact products of floats need more for sums.
constexpr int resident_pieces = 16;
constexpr int resident_pieces_exact = 8;
constexpr int piece_bytes = 1024;
constexpr int slice_bytes = 64;                               // of a row, in each piece
constexpr int slice_columns_bytes = slice_bytes * tile_rows;  // of the other operand

enum class Engine : int { per_step, persistent_cluster, persistent_grid };

// A team that computes float32 rounds operands to TF32, or does not.
struct Layout {
  Engine engine;
  bool tf32;
  int team;         // thread blocks
  int unit_blocks;  // of each: 1 or 2, in a grid 1
  int tiles;        // that a team takes in turns
  int teams;        // at work at once
  int groups;       // of tiles taken in turns that each lane has
  // That a thread has with a hand-over, in clock_unit cycles, before it ends its kernel; 0: for ever.
  unsigned patience = 0;
};

HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

HOST_DEVICE constexpr int64_t slices_of(int64_t values, int storage) {
  return ceil_div(values * storage, slice_bytes);
}

// What of a piece's rows a warp has: forward, of the slices of its unit block's gates, `resident` in
// registers; backward, of the unit blocks that its part of the product gives.
HOST_DEVICE constexpr int resident_slices(int gates, int resident) { return resident / gates; }
HOST_DEVICE constexpr int resident_tiles(int gate_slices, int resident) {
  return resident / gate_slices;
}

// Where things lie in a thread block's shared memory, in bytes; the last is how many there are.
struct ForwardPlaces {
  unsigned states;    // (tiles, 2, state_slices) slices: h as an operand; in a grid (state_slices)
  unsigned sums;      // (2, warps, gates) x 512: what warps have summed up of a tile's gates
  unsigned bias;      // (gates, pairs) float
  unsigned c;         // (tiles, pairs) float
  unsigned own_h;     // (tiles, pairs) s
  unsigned spans;     // (tiles) Span
  unsigned barriers;  // (tiles, 2) Barrier
  unsigned pieces;    // (warps, more_slices, gates) pieces
  unsigned bytes;
  int slices;        // of h
  int state_slices;  // and of units beyond H, which members hand over too
  int more_slices;   // of a warp's, at most, that are not in registers

  HOST_DEVICE constexpr ForwardPlaces(const Layout& layout, int gates, int storage, int64_t H,
                                      int resident);
};

struct BackwardPlaces {
  unsigned inbox;      // (tiles, 2, team, unit blocks) x 512; in a grid 5 x 512
  unsigned d_gates;    // (2, gate slices) slices: as an operand
  unsigned d_h, d_c;   // (tiles, pairs) float
  unsigned unit_sums;  // (tiles, unit weights, pairs) float
  unsigned spans;      // (tiles) Span
  unsigned barriers;   // (tiles, 2) Barrier
  unsigned pieces;     // (warps, more_blocks, gate slices) pieces
  unsigned bytes;
  int more_blocks;  // of a warp's unit blocks, at most, that are not in registers

  HOST_DEVICE constexpr BackwardPlaces(const Layout& layout, int gates, int unit_weights,
                                       int storage, int resident);
};

// The steps 0..T of a tile that have rows, and how many hand-overs there were before them.
struct Span {
  int begin, end;
  unsigned before;
};

namespace detail {

struct Carver {
  size_t at = 0;
  HOST_DEVICE constexpr unsigned take(size_t bytes) {
    const size_t place = at;
    at += (bytes + 15) / 16 * 16;
    return static_cast<unsigned>(place);
  }
};

}  // namespace detail

HOST_DEVICE constexpr ForwardPlaces::ForwardPlaces(const Layout& layout, int gates, int storage,
                                                   int64_t H, int resident)
    : states(0),
      sums(0),
      bias(0),
      c(0),
      own_h(0),
      spans(0),
      barriers(0),
      pieces(0),
      bytes(0),
      slices(static_cast<int>(slices_of(H, storage))),
      state_slices(static_cast<int>(
          slices_of(int64_t(layout.team) * layout.unit_blocks * unit_block, storage))),
      more_slices(0) {
  detail::Carver carve;
  const bool cluster = layout.engine == Engine::persistent_cluster;
  const size_t tiles = layout.tiles, pairs = size_t(layout.unit_blocks) * pairs_of_block;
  const int64_t of_warp = ceil_div(slices, team_warps / layout.unit_blocks);
  const int64_t kept = resident_slices(gates, resident);
  states = carve.take((cluster ? tiles * 2 : 1) * state_slices * slice_columns_bytes);
  sums = carve.take(size_t(2) * team_warps * gates * 512);
  bias = carve.take(gates * pairs * sizeof(float));
  c = carve.take(tiles * pairs * sizeof(float));
  own_h = carve.take(tiles * pairs * storage);
  spans = carve.take(tiles * sizeof(Span));
  barriers = carve.take(tiles * 2 * sizeof(uint64_t));
  more_slices = static_cast<int>(of_warp > kept ? of_warp - kept : 0);
  pieces = carve.take(size_t(team_warps) * more_slices * gates * piece_bytes);
  bytes = static_cast<unsigned>(carve.at);
}

HOST_DEVICE constexpr BackwardPlaces::BackwardPlaces(const Layout& layout, int gates,
                                                     int unit_weights, int storage, int resident)
    : inbox(0),
      d_gates(0),
      d_h(0),
      d_c(0),
      unit_sums(0),
      spans(0),
      barriers(0),
      pieces(0),
      bytes(0),
      more_blocks(0) {
  detail::Carver carve;
  const bool cluster = layout.engine == Engine::persistent_cluster;
  const size_t tiles = layout.tiles, pairs = size_t(layout.unit_blocks) * pairs_of_block;
  const int64_t slices = slices_of(int64_t(gates) * layout.unit_blocks * unit_block, storage);
  const int64_t of_warp = ceil_div(int64_t(layout.team) * layout.unit_blocks, team_warps);
  const int64_t kept = resident_tiles(slices, resident);
  inbox = carve.take(512 * (cluster ? tiles * 2 * layout.team * layout.unit_blocks : 5));
  d_gates = carve.take(size_t(2) * slices * slice_columns_bytes);
  d_h = carve.take(tiles * pairs * sizeof(float));
  d_c = carve.take(tiles * pairs * sizeof(float));
  unit_sums = carve.take(tiles * unit_weights * pairs * sizeof(float));
  spans = carve.take(tiles * sizeof(Span));
  barriers = carve.take(tiles * 2 * sizeof(uint64_t));
  more_blocks = static_cast<int>(of_warp > kept ? of_warp - kept : 0);
  pieces = carve.take(size_t(team_warps) * more_blocks * slices * piece_bytes);
  bytes = static_cast<unsigned>(carve.at);
}

void run_persistent_cluster(CellId cell, const RecurrenceForwardParams& p, const Layout& layout,
                            const Host& host);
void run_persistent_cluster(CellId cell, const RecurrenceBackwardParams& p, const Layout& layout,
                            const Host& host);
void run_persistent_grid(CellId cell, const RecurrenceForwardParams& p, const Layout& layout,
                         const Host& host);
void run_persistent_grid(CellId cell, const RecurrenceBackwardParams& p, const Layout& layout,
                         const Host& host);

}  // namespace fused_rnn::cuda
