// The parameters of the ops: plain old data, no torch.
//
// Letters: T timesteps, B batch rows, L lanes, I inputs, H hidden units, P width of h (the projection,
// or H), G gates of the cell, S saved values of the cell, U weights of the cell's own per unit. Storage
// type s is that of the input; compute type c is float for half types and s otherwise. Lanes are
// independent recurrences with weights of their own; lane l runs backwards in time when directions == 2
// and l is odd.
//
// No pointer aliases another. Optional pointers are null when absent. Where `lengths` are given, engines
// write, and read, only steps that exist; the caller has zeroed what others will see.
#pragma once

#include <cstdint>

#include "macros.h"

namespace fused_rnn {

// The last two are duals of the first (dual.h).
enum class DType : int { float32, float64, bfloat16, float16, dual32, dual64 };

// A (T, B, L, n) tensor whose last dimension is contiguous; strides in elements. Or a packed one, as
// torch's PackedSequence: (rows, L, n), where rows_before[t] rows belong to the timesteps before t, and
// the batch rows that take part in a timestep are its first ones.
struct Sequence {
  void* data;
  int64_t stride_t, stride_b, stride_l;
  const int64_t* rows_before;  // (T), or null

  template <class S>
  HOST_DEVICE S* at(int64_t t, int64_t b, int64_t lane) const {
    const int64_t before = rows_before ? rows_before[t] * stride_b : t * stride_t;
    return static_cast<S*>(data) + before + b * stride_b + lane * stride_l;
  }
  explicit operator bool() const { return data != nullptr; }
};

// What forward keeps for backward: some values for every unit, row and timestep, the units in blocks.
// Engines that take many units of one row at a time leave them as they lie in a Sequence; the CPU
// engine, which takes one block of all rows, keeps a block's rows together: (T, L, H/16, B, S, 16).
struct Reserve {
  static constexpr int64_t block = 16;
  void* data;
  int64_t stride_t, stride_b, stride_l, stride_block, stride_value;

  template <class S>
  HOST_DEVICE S* at(int64_t t, int64_t b, int64_t lane, int64_t unit, int64_t value) const {
    return static_cast<S*>(data) + t * stride_t + b * stride_b + lane * stride_l +
           unit / block * stride_block + value * stride_value + unit % block;
  }
  explicit operator bool() const { return data != nullptr; }
};

enum class LayerNorm : int { none, separate, joint };

// What options of a layer change in the step around the cell (step.h). Only varied ops read it.
struct Variation {
  LayerNorm layer_norm;
  double zoneout_h, zoneout_c;  // probability that a unit's h, c stays as it was
  double recurrent_dropout;     // probability that a unit's h is not seen by the next product
  double layer_norm_eps;        // added to the variance
  const int64_t* seed;          // (1), or null: nothing is drawn, and zoneout is its expectation
};

// What all of the ops share.
struct Shape {
  DType dtype;
  int64_t T, B, L, H, P;
  int directions;
  bool projected;
  const int64_t* lengths;  // (B), each within 0..T; null: every row has T steps
  const bool* resets;      // (T, B) contiguous; true: state is zeroed before that step
  Variation variation;
};

struct ForwardParams : Shape {
  const void* hx;  // (L, B, P) s, or null for zeros
  const void* cx;  // (L, B, H) s, or null for zeros

  Sequence output;       // (T, B, L, P) s
  void* h_n;             // (L, B, P) s
  void* c_n;             // (L, B, H) s, null for cells without c
  Sequence cells;        // (T, B, L, H) c: the states c, null unless the caller wants them
  Reserve reserve;       // S values s (varied: SavedValues), null when backward will not follow
  Reserve saved_cells;   // 1 value c: the states c again, null when backward will not follow;
                         //   2 under zoneout of c: before it, too
  Sequence unprojected;  // (T, B, L, H) s: o tanh(c) before the projection; null unless wanted
  void* statistics;      // (T, L, B, N) c: 1 / standard deviation for each normalisation of a step
                         //   (norm_count); null without layer_norm or when backward will not follow
};

struct BackwardParams : Shape {
  Sequence grad_output;    // (T, B, L, P) s, or null for zeros
  const void* grad_h_n;    // (L, B, P) s, or null for zeros
  const void* grad_c_n;    // (L, B, H) s, or null for zeros
  Sequence grad_cells;     // (T, B, L, H) c, or null for zeros
  Sequence output;         // (T, B, L, P) s, from forward
  Reserve reserve;         // from forward
  Reserve saved_cells;     // from forward; null for cells without c
  const void* statistics;  // from forward; null without layer_norm
  const void* hx;          // (L, B, P) s, or null for zeros
  const void* cx;          // (L, B, H) s, or null for zeros

  void* d_hx;  // (L, B, P) s, or null if nobody wants it, and then d_cx is null too
  void* d_cx;  // (L, B, H) s, null for cells without c
};

// Weight and bias of a normalisation, or their gradients.
template <class Pointer>
struct NormWeights {
  Pointer weight, bias;
};

// ---- the recurrence alone: what a CUDA engine does between the library's large products

// The weights of normalisations, lanes stacked; null where LaneWeights has none.
struct StackedNorms {
  NormWeights<const void*> input;   // (L, G*H) s
  NormWeights<const void*> hidden;  // (L, G*H) s
  NormWeights<const void*> c;       // (L, H) s
};

struct RecurrenceForwardParams : ForwardParams {
  Sequence input_gates;   // (T, B, L, G*H) s: W_ih x_t + b_ih; W_ih x_t if layer_norm is separate
  const void* weight_hh;  // (L, G*H, P) s
  const void* bias_hh;    // (L, G*H) s, or null
  const void* weight_hr;  // (L, P, H) s, null unless projected
  const void* weight_ch;  // (L, U, H) s, null unless the cell has weights of its own
  const void* bias_ih;    // (L, G*H) s, or null; always null unless layer_norm is separate
  StackedNorms norms;
};

struct RecurrenceBackwardParams : BackwardParams {
  const void* weight_hh;  // (L, G*H, P) s
  const void* weight_hr;  // (L, P, H) s, null unless projected
  const void* weight_ch;  // (L, U, H) s, null unless the cell has weights of its own
  StackedNorms norms;
  Sequence d_input_gates;  // (T, B, L, G*H) s
  Sequence
      d_hidden_gates;    // (T, B, L, G*H) s, null where they are the same: if layer_norm is joint,
                         //   or there is none and the cell does not split its gates
  Sequence d_output;     // (T, B, L, P) s: the whole gradient of h_t; null unless projected
  void* d_unit_weights;  // (L, B, K, H) c, zeroed: gradients by row of the batch of the K weights
                         //   that a unit has for itself (UnitWeightPlaces); null without such
  void* keep;            // (L, B, P) c: by what recurrent dropout multiplied h; null without it
};

// ---- the whole layer, products included: what the CPU engine does

// One lane's weights as they lie in memory, contiguous; or their gradients.
template <class Pointer>
struct LaneWeights {
  Pointer weight_ih;  // (G*H, I) s
  Pointer weight_hh;  // (G*H, P) s
  Pointer bias_ih;    // (G*H) s, or null
  Pointer bias_hh;    // (G*H) s, or null, with bias_ih
  Pointer weight_hr;  // (P, H) s, null unless projected
  Pointer weight_ch;  // (U, H) s, null unless the cell has weights of its own
  NormWeights<Pointer>
      ln_input;  // (G*H) s, of input gates or of joint ones; null without layer_norm
  NormWeights<Pointer> ln_hidden;  // (G*H) s, null unless layer_norm is separate
  NormWeights<Pointer> ln_c;       // (H) s, null without layer_norm and for cells without c
};

struct LayerForwardParams : ForwardParams {
  int64_t I;
  Sequence input;                           // (T, B, L, I) s; lanes that read the same are 0 apart
  const LaneWeights<const void*>* weights;  // (L)
};

struct LayerBackwardParams : BackwardParams {
  int64_t I;
  Sequence input;                           // (T, B, L, I) s, from forward
  Sequence unprojected;                     // (T, B, L, H) s, from forward; null unless projected
  const LaneWeights<const void*>* weights;  // (L)

  Sequence
      d_input;  // (T, B, L, I) s, or null if nobody wants it; summed over lanes that are 0 apart
  const LaneWeights<void*>* d_weights;  // (L), or null if nobody wants them
};

// Element (lane, b, 0) of an (L, B, n) tensor.
template <class S>
HOST_DEVICE S* state_at(void* data, int64_t B, int64_t n, int64_t lane, int64_t b) {
  return static_cast<S*>(data) + (lane * B + b) * n;
}
template <class S>
HOST_DEVICE const S* state_at(const void* data, int64_t B, int64_t n, int64_t lane, int64_t b) {
  return static_cast<const S*>(data) + (lane * B + b) * n;
}

// ---- dropout of weights: output = input times 0 with probability p, else times 1 / (1 - p)

struct DropoutParams {
  DType dtype;
  int64_t rows, n;
  double p;
  const int64_t* seed;  // (1)
  const void* input;    // (rows, n) s
  void* output;         // (rows, n) s
};

// ---- additive attention
//
// Letters: B batch rows, Q queries, K keys, A channels of the score, D channels of the values. All
// tensors are contiguous.

struct AttentionShape {
  DType dtype;
  int64_t B, Q, K, A, D;
  const int64_t* lengths;  // (B), each within 0..K: keys beyond may not be attended to; or null
  const bool* mask;        // (B, Q or 1, K), true: may be attended to; or null
  bool mask_per_query;     // whether the mask has Q rows
  bool causal;             // query i attends to keys 0..i
  double dropout_p;        // of the weights; position (b*Q + i)*K + j of philox.h decides
  uint64_t seed;

  const void* query;   // (B, Q, A) s
  const void* key;     // (B, K, A) s
  const void* value;   // (B, K, D) s
  const void* weight;  // (A) s
  const void* bias;    // (A) s, or null
};

struct AttentionForwardParams : AttentionShape {
  void* context;    // (B, Q, D) s
  void* logsumexp;  // (B, Q) c; -inf for a row that may attend to nothing
  void* weights;    // (B, Q, K) s, before dropout; or null
  void* scores;     // (B, Q, K) s, -inf where not allowed; or null
};

struct AttentionBackwardParams : AttentionShape {
  const void* grad_context;  // (B, Q, D) s, or null for zeros
  const void* grad_weights;  // (B, Q, K) s, or null for zeros
  const void* grad_scores;   // (B, Q, K) s, or null for zeros
  const void* logsumexp;     // (B, Q) c, from forward
  void* d_query;             // (B, Q, A) s
  void* d_key;               // (B, K, A) s
  void* d_value;             // (B, K, D) s
  void* d_weight;            // (A) s
  void* d_bias;              // (A) s, or null
};

}  // namespace fused_rnn
