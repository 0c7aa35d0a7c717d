// The kernels of the persistent engines (persistent.h).
//
// A team of `team` thread blocks of 8 warps owns a lane; block `rank` of it owns the units from
// rank * unit_blocks * 16 on. Of a tile, 8 rows of the batch, at each step:
//
//   forward    await h (8, H)         each warp: its slices of h, all gates of one unit block
//              W h                    8 / unit_blocks warps share a unit block's columns
//              sync_threads           sums of a unit block in shared memory
//              cell, hand over h      a thread has one pair of unit and row
//
//   backward   collect d_gates W_hh   the members' shares of it, for own units
//              cell                   a thread has one pair of unit and row
//              sync_threads           own d_gates in shared memory
//              W^T d_gates, hand over each warp: every 8th unit block of the layer, all own gates
//
// One sync_threads per step is enough. Shared memory between its two halves alternates between two
// buffers; and who writes the buffer of step n + 2 has been through the meeting of step n + 1, which all
// threads reach when they are done with step n.
//
// What a step reads of global memory is asked for before the wait. c and what else a pair carries from
// step to step lie in shared memory, so that registers are the weights'.
#pragma once

#include <type_traits>

#include "../cells/cells.h"
#include "../step.h"
#include "exchange.cuh"
#include "fast.cuh"
#include "persistent.h"
#include "product.cuh"

namespace fused_rnn::cuda {

constexpr unsigned team_threads = team_warps * warp_size;

// Which warp this is, in a form that the compiler knows to be the same for all its lanes.
DEVICE int uniform_warp() { return static_cast<int>(shuffle(warp_index(), 0)); }

// The tiles that a team takes in turns.
struct Group {
  int lane, first;  // first tile of the lane
  int tiles;

  DEVICE Group(const Shape& p, const Layout& layout, int index) {
    lane = index / layout.groups;
    first = index % layout.groups * layout.tiles;
    const int left = static_cast<int>((p.B + tile_rows - 1) / tile_rows) - first;
    tiles = left < layout.tiles ? left : layout.tiles;
  }
  DEVICE int row(int tile, unsigned row_of_tile) const {
    return (first + tile) * tile_rows + row_of_tile;
  }
};

// Thread `tile` finds out which steps its tile has; steps count in the order of forward processing.
DEVICE void find_spans(const Shape& p, const Group& group, Span* spans) {
  const int tile = thread_index();
  if (tile >= group.tiles) return;
  int most = 0;
  for (int row = 0; row < tile_rows; ++row) {
    const int b = group.row(tile, row), length = b < p.B ? static_cast<int>(row_length(p, b)) : 0;
    if (length > most) most = length;
  }
  spans[tile].begin = is_reverse(p, group.lane) ? static_cast<int>(p.T) - most : 0;
  spans[tile].end = spans[tile].begin + most;
}

// After a group: the hand-overs that its tiles made.
DEVICE void count_turns(const Group& group, Span* spans) {
  const int tile = thread_index();
  if (tile < group.tiles) spans[tile].before += (spans[tile].end - spans[tile].begin);
}

DEVICE void no_turns(const Layout& layout, Span* spans) {
  for (int tile = thread_index(); tile < layout.tiles; tile += team_threads) spans[tile].before = 0;
}

// An element of a lane's W_hh, as an operand; outside of it zero.
template <class Product>
DEVICE uint32_t weight_operand(const typename Product::S* weight, unsigned H, unsigned gate,
                               unsigned unit, unsigned column, bool exists = true) {
  typename Product::S value{};
  if (exists && unit < H && column < H) value = weight[(gate * H + unit) * H + column];
  return Product::operand(value);
}

template <class Cell, class S>
DEVICE const S* weight_of_lane(const Shape& p, const void* weight_hh, int lane) {
  return static_cast<const S*>(weight_hh) + int64_t(lane) * Cell::gates * p.H * p.H;
}

// Pieces that did not find room in registers: a lane's own, 16 bytes at a time.
DEVICE void keep_piece(Words4* pieces, int index, const Piece& piece) {
  pieces[index * 2 * warp_size + warp_lane()] = piece.upper;
  pieces[(index * 2 + 1) * warp_size + warp_lane()] = piece.lower;
}
DEVICE Piece kept_piece(const Words4* pieces, int index) {
  return {pieces[index * 2 * warp_size + warp_lane()],
          pieces[(index * 2 + 1) * warp_size + warp_lane()]};
}

// An initial state as the first step sees it.
template <class S>
DEVICE float first_state(const Shape& p, const void* initial, int64_t lane, int64_t b,
                         int64_t unit) {
  if (!initial || first_step_resets(p, lane, b)) return 0;
  return widen(state_at<S>(initial, p.B, p.H, lane, b)[unit]);
}

template <class Cell, class Product, template <class> class StatesOf>
KERNEL_OF(team_threads)
void forward_kernel(RecurrenceForwardParams p, Layout layout, ForwardPlaces places, Words4* ring) {
  using S = typename Product::S;
  using V = Arithmetic<S>;
  constexpr int G = Cell::gates, kept = resident_slices(G, Product::resident);
  constexpr int width = slice_bytes / sizeof(S);  // columns of a slice
  unsigned char* const shared = dynamic_shared<unsigned char>();
  auto* const sums_of = reinterpret_cast<Words4*>(shared + places.sums);
  auto* const c_of = reinterpret_cast<float*>(shared + places.c);
  auto* const bias_of = reinterpret_cast<float*>(shared + places.bias);
  auto* const own_h_of = reinterpret_cast<S*>(shared + places.own_h);
  auto* const spans = reinterpret_cast<Span*>(shared + places.spans);
  const Member member(layout);
  // Columns beyond H stay zero. Before others may send anything.
  for (unsigned i = thread_index(); i < (places.sums - places.states) / 16; i += team_threads)
    reinterpret_cast<Words4*>(shared + places.states)[i] = {};
  const StatesOf<S> states(layout, places, shared, member, ring);
  const int pairs = layout.unit_blocks * pairs_of_block;

  // This warp's part of the product: slices first .. first + count of h, the gates of one unit block.
  const int warp = uniform_warp(), split = team_warps / layout.unit_blocks;
  const int first = warp % split * places.slices / split;
  const int count = (warp % split + 1) * places.slices / split - first;
  Piece pieces[kept][G];
  auto* const more_pieces = reinterpret_cast<Words4*>(shared + places.pieces) +
                            warp * places.more_slices * G * 2 * warp_size;

  no_turns(layout, spans);
  const int T = static_cast<int>(p.T), groups = static_cast<int>(p.L) * layout.groups;
  unsigned turns = 0;
  int lane = -1;
  bool reverse = false;
  for (int index = member.team; index < groups; index += layout.teams) {
    const Group group(p, layout, index);
    if (group.lane != lane) {
      lane = group.lane;
      reverse = is_reverse(p, lane);
      const S* const weight = weight_of_lane<Cell, S>(p, p.weight_hh, lane);
      const int units = (member.rank * layout.unit_blocks + warp / split) * unit_block;
      const auto piece = [&](int slice, int g) {
        return make_piece<S>([&](unsigned row, unsigned column) {
          return weight_operand<Product>(weight, p.H, g, units + row,
                                         (first + slice) * width + column);
        });
      };
#pragma unroll
      for (int i = 0; i < kept; ++i)
        for (int g = 0; g < G; ++g)
          if (i < count) pieces[i][g] = piece(i, g);
      for (int i = kept; i < count; ++i)
        for (int g = 0; g < G; ++g) keep_piece(more_pieces, (i - kept) * G + g, piece(i, g));
      const Pair pair(layout, member);
      if (pair.exists)
        for (int g = 0; g < G; ++g)
          bias_of[g * pairs + pair.number] =
              p.bias_hh && pair.index < p.H
                  ? widen(static_cast<const S*>(p.bias_hh)[(lane * G + g) * p.H + pair.index])
                  : 0.0f;
    }
    sync_threads();  // all are done with the group before
    find_spans(p, group, spans);
    if (const Pair pair(layout, member); pair.exists)
      for (int tile = 0; tile < group.tiles; ++tile) {
        const int b = group.row(tile, pair.row);
        S h{};
        float c = 0;
        if (b < p.B && pair.index < p.H) {
          h = Narrow<S>::from(initial_state<S, float>(p, p.hx, p.h_n, p.H, lane, b, pair.index, 1));
          if constexpr (Cell::has_c)
            c = initial_state<S, float>(p, p.cx, p.c_n, p.H, lane, b, pair.index, 1);
        }
        own_h_of[tile * pairs + pair.number] = h;
        c_of[tile * pairs + pair.number] = c;
      }
    sync_threads();  // spans are there

    for (int step = 0; step < T; ++step)
      for (int tile = 0; tile < group.tiles; ++tile) {
        const Span span = spans[tile];
        if (step < span.begin || step >= span.end) continue;
        const unsigned turn = span.before + step - span.begin;
        Words4* const state = states.at(tile, turn - 1);
        if (step == span.begin) {
          sync_threads();  // all have read what was there
          auto* const words = reinterpret_cast<uint32_t*>(state);
          constexpr int per_word = 4 / sizeof(S), row_words = slice_bytes / 4;
          for (int i = thread_index(); i < places.slices * tile_rows * row_words;
               i += team_threads) {
            const int from = group.row(tile, i / row_words % tile_rows);
            const int column = i / (row_words * tile_rows) * width + i % row_words * per_word;
            uint32_t word = 0;
            for (int j = 0; j < per_word; ++j)
              if (from < p.B && column + j < p.H)
                word |= Product::operand(
                            Narrow<S>::from(first_state<S>(p, p.hx, lane, from, column + j)))
                        << (8 * sizeof(S) * j);
            words[i] = word;
          }
          sync_threads();  // the initial state is there
        }
        RowStep row{};
        V input_gates[G];
        bool active;
        {
          const Pair pair(layout, member);
          const int b = group.row(tile, pair.row), t = reverse ? T - 1 - step : step;
          active = pair.exists && pair.index < p.H && b < p.B && t < row_length(p, b);
          if (active) {
            row = row_step(p, lane, b, t);
            for (int g = 0; g < G; ++g)
              input_gates[g] = widen(p.input_gates.at<S>(t, b, lane)[g * p.H + pair.index]);
          }
        }
        if (step > span.begin) states.await(tile, turn - 1, first, count);

        typename Product::Partial partial[G];
        const Words4* slice = state + first * warp_size;
#pragma unroll
        for (int i = 0; i < kept; ++i)
          if (i < count) Product::template multiply<G>(partial, pieces[i], slice + i * warp_size);
#pragma unroll 1
        for (int i = kept; i < count; ++i) {
          Piece more[G];
          for (int g = 0; g < G; ++g) more[g] = kept_piece(more_pieces, (i - kept) * G + g);
          Product::template multiply<G>(partial, more, slice + i * warp_size);
        }
        Words4* const sums = sums_of + turns++ % 2 * team_warps * G * warp_size;
        for (int g = 0; g < G; ++g)
          sums[(warp * G + g) * warp_size + place_of_lane()] =
              fused_rnn::detail::bit_cast<Words4>(Product::whole(partial[g]));
        sync_threads();  // all sums of the step are there
        const Pair pair(layout, member);
        if (!pair.exists) continue;

        S* const own_h = own_h_of + tile * pairs + pair.number;
        if (active) {
          const auto* of_pair = reinterpret_cast<const float*>(
              &sums[pair.block * split * G * warp_size + place_of(pair.unit, pair.row)]);
          of_pair += number_of(pair.unit, pair.row);
          V hidden_gates[G];
          for (int g = 0; g < G; ++g) {
            float sum = 0;
            for (int i = 0; i < split; ++i) sum += of_pair[(i * G + g) * warp_size * 4];
            hidden_gates[g] = sum + bias_of[g * pairs + pair.number];
          }
          forward_units<Cell, S>(p, row, pair.index, 1, input_gates, hidden_gates,
                                 weight_ch_of<Cell, S>(p, lane), own_h,
                                 c_of + tile * pairs + pair.number, own_h);
        }
        states.hand_over(tile, turn, pair.index, pair.row, Product::operand(*own_h));
      }
    // Nobody leaves, or begins again, before all that was sent to it is there.
    for (int tile = 0; tile < group.tiles; ++tile)
      if (spans[tile].end > spans[tile].begin)
        states.await(tile, spans[tile].before + (spans[tile].end - spans[tile].begin) - 1, first,
                     count);
    sync_threads();  // all have read the spans
    count_turns(group, spans);
  }
}

// A unit block's sums over own gates: one after the other, or several that share what they read.
template <class Cell, class Product, class Sums_, int unit_blocks>
KERNEL_OF(team_threads)
void backward_kernel(RecurrenceBackwardParams p, Layout layout, BackwardPlaces places,
                     Words4* ring) {
  using S = typename Product::S;
  using V = Arithmetic<S>;
  constexpr int G = Cell::gates, U = Cell::unit_weights;
  constexpr int width = slice_bytes / sizeof(S);  // own gates of a slice
  constexpr int slices = static_cast<int>(slices_of(G * unit_blocks * unit_block, sizeof(S)));
  constexpr int kept = resident_tiles(slices, Product::resident);
  constexpr int together = kept > 0 && kept % 4 == 0   ? 4
                           : kept > 0 && kept % 3 == 0 ? 3
                           : kept == 2                 ? 2
                                                       : 1;
  unsigned char* const shared = dynamic_shared<unsigned char>();
  auto* const d_gates_of = reinterpret_cast<Words4*>(shared + places.d_gates);
  auto* const d_h_of = reinterpret_cast<float*>(shared + places.d_h);
  auto* const d_c_of = reinterpret_cast<float*>(shared + places.d_c);
  auto* const unit_sums = reinterpret_cast<float*>(shared + places.unit_sums);
  auto* const spans = reinterpret_cast<Span*>(shared + places.spans);
  const Member member(layout);
  const Sums_ exchange(layout, places, shared, member, ring);
  constexpr int pairs = unit_blocks * pairs_of_block;

  // This warp's part of the product: every 8th unit block of the layer.
  const int warp = uniform_warp(), blocks = layout.team * unit_blocks;
  const auto block_at = [&](int i) { return warp + i * team_warps; };
  Piece pieces[kept > 0 ? kept / together : 1][slices][together];
  auto* const more_pieces = reinterpret_cast<Words4*>(shared + places.pieces) +
                            warp * places.more_blocks * slices * 2 * warp_size;

  no_turns(layout, spans);
  for (int i = thread_index(); i < 2 * slices * int(warp_size); i += team_threads)
    d_gates_of[i] = {};
  const int T = static_cast<int>(p.T), groups = static_cast<int>(p.L) * layout.groups;
  unsigned turns = 0;
  int lane = -1;
  bool reverse = false;
  for (int index = member.team; index < groups; index += layout.teams) {
    const Group group(p, layout, index);
    if (group.lane != lane) {
      lane = group.lane;
      reverse = is_reverse(p, lane);
      const S* const weight = weight_of_lane<Cell, S>(p, p.weight_hh, lane);
      // Rows are the layer's units, columns own gates, block by block.
      const auto piece = [&](int block, int slice) {
        return make_piece<S>([&](unsigned row, unsigned column) -> uint32_t {
          const int of = slice * width + column, gate = of / unit_block % G;
          const int unit =
              (member.rank * unit_blocks + of / (unit_block * G)) * unit_block + of % unit_block;
          return weight_operand<Product>(weight, p.H, gate, unit, block * unit_block + row,
                                         of < G * unit_blocks * unit_block);
        });
      };
#pragma unroll
      for (int i = 0; i < kept; ++i)
#pragma unroll
        for (int j = 0; j < slices; ++j)
          if (block_at(i) < blocks) pieces[i / together][j][i % together] = piece(block_at(i), j);
      for (int i = kept; block_at(i) < blocks; ++i)
        for (int j = 0; j < slices; ++j)
          keep_piece(more_pieces, (i - kept) * slices + j, piece(block_at(i), j));
    }
    sync_threads();  // all are done with the group before
    find_spans(p, group, spans);
    if (const Pair pair(layout, member); pair.exists)
      for (int tile = 0; tile < group.tiles; ++tile) {
        const int b = group.row(tile, pair.row), at = tile * pairs + pair.number;
        const bool is = b < p.B && pair.index < p.H;
        const auto given = [&](const void* grad) {
          return is && grad ? widen(state_at<S>(grad, p.B, p.H, lane, b)[pair.index]) : 0.0f;
        };
        d_h_of[at] = given(p.grad_h_n);
        if constexpr (Cell::has_c) d_c_of[at] = given(p.grad_c_n);
        for (int k = 0; k < U; ++k) unit_sums[(tile * U + k) * pairs + pair.number] = 0;
      }
    sync_threads();  // spans are there

    for (int step = T - 1; step >= 0; --step)
      for (int tile = 0; tile < group.tiles; ++tile) {
        const Span span = spans[tile];
        if (step < span.begin || step >= span.end) continue;
        const unsigned turn = span.before + (span.end - 1 - step);
        RowStep row{};
        ForwardResults<Cell, V> results;
        float grad_output = 0;
        bool active;
        {
          const Pair pair(layout, member);
          const int b = group.row(tile, pair.row), t = reverse ? T - 1 - step : step;
          active = pair.exists && pair.index < p.H && b < p.B && t < row_length(p, b);
          if (active) {
            row = row_step(p, lane, b, t);
            results = load_results<Cell, S, V>(p, row, pair.index, 1);
            if (p.grad_output.data)
              grad_output = widen(p.grad_output.at<S>(t, b, lane)[pair.index]);
          }
        }
        const float product =
            step < span.end - 1 ? exchange.collect(tile, turn - 1, Pair(layout, member)) : 0.0f;

        Words4* const d_gates = d_gates_of + turns++ % 2 * slices * warp_size;
        if (const Pair pair(layout, member); pair.exists) {
          const int at = tile * pairs + pair.number;
          V d_input_gates[G], d_hidden_gates[G];
          for (int g = 0; g < G; ++g) d_hidden_gates[g] = 0;
          if (active) {
            const V d_h = collect_d_hidden<false>(row, 1, V(product), &grad_output, &d_h_of[at]);
            V d_weight_ch[U > 0 ? U : 1];
            backward_units<Cell, S>(p, row, pair.index, 1, results, d_h,
                                    weight_ch_of<Cell, S>(p, lane), &d_h_of[at], &d_c_of[at],
                                    d_input_gates, d_hidden_gates, d_weight_ch);
            for (int k = 0; k < U; ++k)
              unit_sums[(tile * U + k) * pairs + pair.number] += d_weight_ch[k];
            for (int g = 0; g < G; ++g) {
              const int64_t of = g * p.H + pair.index;
              p.d_input_gates.at<S>(row.t, row.b, lane)[of] = Narrow<S>::from(d_input_gates[g]);
              if constexpr (Cell::split_gates)
                p.d_hidden_gates.at<S>(row.t, row.b, lane)[of] = Narrow<S>::from(d_hidden_gates[g]);
              if (row.reset) d_hidden_gates[g] = 0;
            }
          } else {
            d_h_of[at] += product;  // a reverse lane's row that has come to its initial state
          }
          // (gate slices, 8 rows, width), own gates block by block
          for (int g = 0; g < G; ++g) {
            const int of = (pair.block * G + g) * unit_block + pair.unit;
            const uint32_t operand = Product::operand(Narrow<S>::from(d_hidden_gates[g]));
            const int place = (of / width * tile_rows + pair.row) * width + of % width;
            if constexpr (sizeof(S) == 2)
              reinterpret_cast<uint16_t*>(d_gates)[place] = static_cast<uint16_t>(operand);
            else
              reinterpret_cast<uint32_t*>(d_gates)[place] = operand;
          }
        }
        sync_threads();  // own d_gates are there

#pragma unroll
        for (int i = 0; i < kept / together; ++i) {
          typename Product::Partial partial[together];
#pragma unroll
          for (int j = 0; j < slices; ++j)
            Product::template multiply<together>(partial, pieces[i][j], d_gates + j * warp_size);
          for (int j = 0; j < together; ++j) {
            const Sums sums = Product::whole(partial[j]);
            const int block = block_at(i * together + j);
            if (block < blocks) exchange.hand_over(tile, turn, block, sums);
          }
        }
#pragma unroll 1
        for (int i = kept; block_at(i) < blocks; ++i) {
          typename Product::Partial partial[1];
          for (int j = 0; j < slices; ++j) {
            const Piece piece = kept_piece(more_pieces, (i - kept) * slices + j);
            Product::template multiply<1>(partial, &piece, d_gates + j * warp_size);
          }
          exchange.hand_over(tile, turn, block_at(i), Product::whole(partial[0]));
        }
      }

    for (int tile = 0; tile < group.tiles; ++tile) {
      const Span span = spans[tile];
      float product = 0;
      if (span.end > span.begin)
        product =
            exchange.collect(tile, span.before + (span.end - span.begin) - 1, Pair(layout, member));
      const Pair pair(layout, member);
      const int at = tile * pairs + pair.number;
      const int b = group.row(tile, pair.row);
      if (pair.exists && b < p.B && pair.index < p.H) {
        if (p.d_hx)
          state_at<S>(p.d_hx, p.B, p.H, lane, b)[pair.index] =
              Narrow<S>::from(product + d_h_of[at]);
        if constexpr (Cell::has_c)
          if (p.d_cx)
            state_at<S>(p.d_cx, p.B, p.H, lane, b)[pair.index] = Narrow<S>::from(d_c_of[at]);
        for (int k = 0; k < U; ++k)
          static_cast<float*>(p.d_unit_weights)[((lane * p.B + b) * U + k) * p.H + pair.index] =
              unit_sums[(tile * U + k) * pairs + pair.number];
      }
      sync_threads();  // all have read the spans, and the sums
    }
    count_turns(group, spans);
  }
}

// ---- the host's side

inline Grid grid_of(const Layout& layout, size_t shared_bytes) {
  const bool cluster = layout.engine == Engine::persistent_cluster;
  return {{static_cast<unsigned>(layout.team * layout.teams), 1, 1},
          team_threads,
          shared_bytes,
          cluster ? static_cast<unsigned>(layout.team) : 1,
          !cluster};
}

// Zeroed scratch for words through L2, if the exchange has such.
inline Words4* take_ring(const Host& host, size_t words) {
  if (words == 0) return nullptr;
  const size_t bytes = words * sizeof(Words4);
  void* ring = host.allocate(bytes);
  set_zero(ring, bytes, static_cast<Stream>(host.stream));
  return static_cast<Words4*>(ring);
}

template <class Cell, class Product, template <class> class StatesOf>
void forward(const RecurrenceForwardParams& p, const Layout& layout, const Host& host) {
  using S = typename Product::S;
  const ForwardPlaces places(layout, Cell::gates, sizeof(S), p.H, Product::resident);
  launch(forward_kernel<Cell, Product, StatesOf>, grid_of(layout, places.bytes),
         static_cast<Stream>(host.stream), p, layout, places,
         take_ring(host, layout.teams * StatesOf<S>::ring_words(layout)));
}

template <class Cell, class Product, class Exchange, int unit_blocks>
void backward(const RecurrenceBackwardParams& p, const Layout& layout, const Host& host) {
  using S = typename Product::S;
  const BackwardPlaces places(layout, Cell::gates, Cell::unit_weights, sizeof(S),
                              Product::resident);
  launch(backward_kernel<Cell, Product, Exchange, unit_blocks>, grid_of(layout, places.bytes),
         static_cast<Stream>(host.stream), p, layout, places,
         take_ring(host, layout.teams * Exchange::ring_words(layout)));
}

template <class Params>
using Run = void (*)(const Params&, const Layout&, const Host&);

// How a table of functions is indexed, beside the cell.
inline int product_index(DType dtype, const Layout& layout) {
  return dtype == DType::float32 ? (layout.tf32 ? 0 : 1) : dtype == DType::bfloat16 ? 2 : 3;
}

#define FUSED_RNN_PRODUCTS(function, cell)                              \
  {function<cell, MmaProduct<float>>(), function<cell, ExactProduct>(), \
   function<cell, MmaProduct<BFloat16>>(), function<cell, MmaProduct<Half>>()},

}  // namespace fused_rnn::cuda
