// The recurrent product of the persistent engines: rows of a matrix that stay where they are, times
// 8 columns that change with every timestep.
//
// The matrix is cut into pieces of 16 rows by one slice of its columns, 64 bytes of each row: 32 half
// values or 16 floats. A piece is two mma tiles, held by a warp as tiles are:
//
//        columns   0      16     32     48  bytes
//   row  0        lane 0 lane 1 lane 2 lane 3
//   row  1        lane 4 lane 5 ...                   lane l: 16 bytes of row l / 4, and of row
//        ...                                          l / 4 + 8, at 16 (l % 4)
//   row  7        lane 28 ...         lane 31
//
// An mma wants of a lane values that lie 8 or 16 bytes apart. It does not matter which: the sum over
// columns is the same in any order, as long as the other operand is read in the same one. So a lane
// takes 16 adjacent bytes, the first 8 for the first tile, and both operands are read 16 bytes at a time.
//
// The other operand lies in shared memory slice by slice, 512 bytes each: 8 columns (rows of the batch)
// of 64 bytes. Lane l reads its 16 bytes at 16 l: a warp reads 512 in a row.
//
// Sums are of 16 rows and 8 columns, in each lane of rows l / 4 and l / 4 + 8 and columns
// 2 (l % 4) and the next: {row, column}, {row, column + 1}, {row + 8, column}, {row + 8, column + 1}.
#pragma once

#include <type_traits>

#include "../dtype.h"
#include "device.cuh"
#include "persistent.h"

namespace fused_rnn::cuda {

struct Piece {
  Words4 upper, lower;  // of row lane / 4, and of the one 8 below
};

// A lane's part of a piece: element(row, column) is one of the matrix, as an operand's bits.
template <class S, class Element>
DEVICE Piece make_piece(const Element& element) {
  constexpr unsigned per_word = 4 / sizeof(S), per_lane = 4 * per_word;
  Piece piece;
  const unsigned lane = thread_index_again() % warp_size;
  const auto fill = [&](Words4& words, unsigned row) {
    for (unsigned i = 0; i < 4; ++i) {
      words.w[i] = 0;
      for (unsigned j = 0; j < per_word; ++j)
        words.w[i] |= element(row, lane % 4 * per_lane + i * per_word + j) << (8 * sizeof(S) * j);
    }
  };
  fill(piece.upper, lane / 4);
  fill(piece.lower, lane / 4 + 8);
  return piece;
}

// What a lane has of the sums of a piece.
struct Sums {
  float v[4] = {0, 0, 0, 0};
};

// Products by mma, with sums in float; of floats rounded to TF32.
template <class S_>
struct MmaProduct {
  using S = S_;
  using Partial = Sums;
  static constexpr int resident = resident_pieces;

  // The bits of a value as an operand.
  static DEVICE uint32_t operand(S value) {
    if constexpr (std::is_same_v<S, float>)
      return to_tf32(value);
    else
      return value.bits;
  }

  // sums[i] += pieces[i] times a slice of the other operand
  template <int count>
  static DEVICE void multiply(Partial* sums, const Piece* pieces, const Words4* slice) {
    const Words4 b = slice[warp_lane()];
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < count; ++i) {
        const uint32_t* const upper = pieces[i].upper.w + 2 * half;
        const uint32_t* const lower = pieces[i].lower.w + 2 * half;
        const uint32_t rows[4] = {upper[0], lower[0], upper[1], lower[1]};
        const uint32_t columns[2] = {b.w[2 * half], b.w[2 * half + 1]};
        if constexpr (std::is_same_v<S, float>)
          mma_m16n8k8_tf32(sums[i].v, rows, columns);
        else
          mma_m16n8k16<S>(sums[i].v, rows, columns);
      }
  }

  static DEVICE Sums whole(const Partial& sums) { return sums; }
};

// Of floats as they are, by multiply-adds. A lane multiplies its two rows with all 8 columns, over the
// quarter of a slice that it holds; `whole` adds the quarters up.
struct ExactProduct {
  using S = float;
  static constexpr int resident = resident_pieces_exact;

  struct Partial {
    float v[2][tile_rows] = {};
  };

  static DEVICE uint32_t operand(float value) {
    return fused_rnn::detail::bit_cast<uint32_t>(value);
  }

  template <int count>
  static DEVICE void multiply(Partial* sums, const Piece* pieces, const Words4* slice) {
    for (int column = 0; column < tile_rows; ++column) {
      const Words4 b = slice[column * 4 + warp_lane() % 4];
      for (int i = 0; i < count; ++i)
        for (int j = 0; j < 4; ++j) {
          const float x = number(b.w[j]);
          float (&sum)[2][tile_rows] = sums[i].v;
          sum[0][column] = fmaf(number(pieces[i].upper.w[j]), x, sum[0][column]);
          sum[1][column] = fmaf(number(pieces[i].lower.w[j]), x, sum[1][column]);
        }
    }
  }

  // Lanes 4 i .. 4 i + 3 exchange halves of the columns, then quarters.
  static DEVICE Sums whole(const Partial& sum) {
    const bool high = warp_lane() & 2, odd = warp_lane() & 1;
    Sums result;
    for (int row = 0; row < 2; ++row) {
      float half[4];
      for (int i = 0; i < 4; ++i) {
        const float kept = high ? sum.v[row][i + 4] : sum.v[row][i];
        const float given = high ? sum.v[row][i] : sum.v[row][i + 4];
        half[i] = kept + shuffle_xor(given, 2);
      }
      for (int i = 0; i < 2; ++i) {
        const float kept = odd ? half[i + 2] : half[i];
        const float given = odd ? half[i] : half[i + 2];
        result.v[2 * row + i] = kept + shuffle_xor(given, 1);
      }
    }
    return result;
  }

 private:
  static DEVICE float number(uint32_t bits) { return fused_rnn::detail::bit_cast<float>(bits); }
};

// Where sums lie in memory, 16 bytes of each lane, so that both writing them lane by lane and reading
// them unit by unit (below) touches every bank of shared memory once.
DEVICE unsigned place_of_lane() {
  const unsigned lane = thread_index_again() % warp_size, column = lane % 4;
  return column * 8 + (lane / 4 + 2 * column) % 8;
}

// The place, and which of its four numbers is that of a row of sums (a unit) and a column (of the batch).
DEVICE unsigned place_of(unsigned unit, unsigned row) {
  const unsigned column = row / 2;
  return column * 8 + (unit % 8 + 2 * column) % 8;
}
DEVICE unsigned number_of(unsigned unit, unsigned row) { return unit / 8 * 2 + row % 2; }

}  // namespace fused_rnn::cuda
