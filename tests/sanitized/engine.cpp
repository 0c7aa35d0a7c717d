// The CPU engine, compiled with sanitizers, on memory of exactly the sizes that params.h names: a read
// beyond a tensor, or from one piece of scratch into the next (scratch.h), ends the program, whether or not
// anything is made of what was read (test_sanitizer.py). All memory holds NaN at first, and no result may.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cells/cells.h"
#include "cpu/engine.h"
#include "step.h"

namespace fused_rnn {

namespace portable {
cpu::ForwardFn forward_function(cpu::CellId cell, DType dtype);
cpu::BackwardFn backward_function(cpu::CellId cell, DType dtype);
cpu::AttentionForwardFn attention_forward_function(DType dtype);
cpu::AttentionBackwardFn attention_backward_function(DType dtype);
// Layers of duals are compiled by themselves, and are the same text.
cpu::ForwardFn dual_forward_function(cpu::CellId, DType) { return nullptr; }
cpu::BackwardFn dual_backward_function(cpu::CellId, DType) { return nullptr; }
}  // namespace portable

namespace {

int64_t missing = 0;  // of the initial state, for a test of this test

// Memory of one case. The sanitizer surrounds each piece with what may not be touched.
class Pieces {
 public:
  void* bytes(size_t count) {
    void* piece = nullptr;
    if (posix_memalign(&piece, 64, count) != 0) std::abort();
    pieces_.emplace_back(piece, std::free);
    std::fill_n(static_cast<uint8_t*>(piece), count, uint8_t(0xff));  // NaN in any type
    return piece;
  }
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * sizeof(T)));
  }
  // Between -1 and 1.
  template <class T>
  T* random(int64_t count) {
    T* const piece = take<T>(count);
    for (int64_t i = 0; i < count; ++i) piece[i] = Narrow<T>::from(number());
    return piece;
  }
  float number() { return std::uniform_real_distribution<float>(-1, 1)(generator_); }
  int64_t integer(int64_t most) {
    return std::uniform_int_distribution<int64_t>(0, most)(generator_);
  }
  // What the engine has to fill; zeros where it may leave some out.
  template <class T>
  T* result(int64_t count, const char* name, bool zeroed = false) {
    T* const piece = take<T>(count);
    if (zeroed) std::fill_n(reinterpret_cast<uint8_t*>(piece), count * sizeof(T), uint8_t(0));
    results_.emplace_back(name, [=] {
      return std::all_of(piece, piece + count, [](T x) { return std::isfinite(widen(x)); });
    });
    return piece;
  }
  void check(const std::string& what) const {
    for (const auto& [name, is_finite] : results_) {
      if (is_finite()) continue;
      std::printf("%s: %s is not finite\n", what.c_str(), name);
      std::exit(1);
    }
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> pieces_;
  std::vector<std::pair<const char*, std::function<bool()>>> results_;
  std::mt19937 generator_{0};
};

cpu::Host host(Pieces& pieces, int threads) {
  return {
      threads,
      [](int64_t count, void (*task)(int64_t, int64_t, void*), void* context) {
        task(0, count, context);  // one thread does what is meant for all of them
      },
      [](void* allocator, size_t bytes) { return static_cast<Pieces*>(allocator)->bytes(bytes); },
      &pieces};
}

struct Sizes {
  int64_t T, B, directions, I, H, P;
  int threads;
};

struct Options {
  LayerNorm layer_norm;
  double zoneout_h, zoneout_c, recurrent_dropout;
  bool drawn, ragged, biases, states;
};

template <class T>
Sequence sequence(T* data, const Sizes& s, int64_t n, bool shared = false) {
  const int64_t lanes = shared ? 1 : s.directions;
  return {data, s.B * lanes * n, lanes * n, shared ? 0 : n, nullptr};
}

template <class T>
Reserve reserve(Pieces& pieces, const Sizes& s, int64_t values) {
  const int64_t blocks = (s.H + Reserve::block - 1) / Reserve::block, row = values * Reserve::block;
  return {pieces.take<T>(s.T * s.directions * blocks * s.B * row),
          s.directions * blocks * s.B * row,
          row,
          blocks * s.B * row,
          s.B * row,
          Reserve::block};
}

// Weights of a lane, or their gradients: take(count) is the memory of one.
template <class Cell, class Pointer, class Take>
LaneWeights<Pointer> weights(const Sizes& s, const Options& o, const Take& take) {
  const int64_t rows = Cell::gates * s.H;
  LaneWeights<Pointer> w{};
  w.weight_ih = take(rows * s.I);
  w.weight_hh = take(rows * s.P);
  if (o.biases) {
    w.bias_ih = take(rows);
    w.bias_hh = take(rows);
  }
  if (s.P != s.H) w.weight_hr = take(s.P * s.H);
  if (Cell::unit_weights > 0) w.weight_ch = take(Cell::unit_weights * s.H);
  if (o.layer_norm == LayerNorm::none) return w;
  w.ln_input = {take(rows), take(rows)};
  if (o.layer_norm == LayerNorm::separate) w.ln_hidden = {take(rows), take(rows)};
  if (Cell::has_c) w.ln_c = {take(s.H), take(s.H)};
  return w;
}

// Forward and backward of a layer.
template <class Cell, class S>
void run_layer(const std::string& what, int cell, DType dtype, const Sizes& s, const Options& o) {
  using C = Compute<S>;
  Pieces pieces;
  const int64_t L = s.directions, steps = s.T * s.B * L, rows = L * s.B;
  const bool varied = o.layer_norm != LayerNorm::none || o.zoneout_h > 0 || o.zoneout_c > 0 ||
                      o.recurrent_dropout > 0;
  Shape shape{};
  shape.dtype = dtype;
  shape.T = s.T;
  shape.B = s.B;
  shape.L = L;
  shape.H = s.H;
  shape.P = s.P;
  shape.directions = static_cast<int>(s.directions);
  shape.projected = s.P != s.H;
  shape.variation = {o.layer_norm, o.zoneout_h, o.zoneout_c, o.recurrent_dropout, 1e-5, nullptr};
  S* const input = pieces.random<S>(s.T * s.B * s.I);
  if (o.drawn) {
    auto* const seed = pieces.take<int64_t>(1);
    *seed = 7;
    shape.variation.seed = seed;
  }
  if (o.ragged) {
    auto* const lengths = pieces.take<int64_t>(s.B);
    auto* const resets = pieces.take<bool>(s.T * s.B);
    for (int64_t b = 0; b < s.B; ++b) lengths[b] = pieces.integer(s.T);
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t b = 0; b < s.B; ++b) {
        resets[t * s.B + b] = pieces.integer(3) == 0;
        if (t >= lengths[b])
          for (int64_t i = 0; i < s.I; ++i)
            input[(t * s.B + b) * s.I + i] = Narrow<S>::from(NAN);  // nobody's
      }
    shape.lengths = lengths;
    shape.resets = resets;
  }
  const int64_t saved = varied ? saved_values<Cell>(shape).count : Cell::saved;
  const int64_t norms = norm_count(o.layer_norm, Cell::has_c);

  std::vector<LaneWeights<const void*>> given;
  std::vector<LaneWeights<void*>> d_given;
  for (int64_t lane = 0; lane < L; ++lane) {
    given.push_back(
        weights<Cell, const void*>(s, o, [&](int64_t n) { return pieces.random<S>(n); }));
    d_given.push_back(weights<Cell, void*>(
        s, o, [&](int64_t n) { return pieces.result<S>(n, "the gradient of a weight"); }));
  }
  LayerForwardParams f{};
  static_cast<Shape&>(f) = shape;
  if (o.states) {
    f.hx = pieces.random<S>(rows * s.P - missing);
    if (Cell::has_c) f.cx = pieces.random<S>(rows * s.H);
  }
  f.output = sequence(pieces.result<S>(steps * s.P, "output", o.ragged), s, s.P);
  f.h_n = pieces.result<S>(rows * s.P, "h_n");
  if (Cell::has_c) {
    f.c_n = pieces.result<S>(rows * s.H, "c_n");
    f.cells = sequence(pieces.result<C>(steps * s.H, "cells", o.ragged), s, s.H);
    f.saved_cells = reserve<C>(pieces, s, varied && o.zoneout_c > 0 ? 2 : 1);
  }
  if (saved > 0) f.reserve = reserve<S>(pieces, s, saved);
  if (shape.projected) f.unprojected = sequence(pieces.take<S>(steps * s.H), s, s.H);
  if (norms > 0) f.statistics = pieces.take<C>(steps * norms);
  f.I = s.I;
  f.input = sequence(input, s, s.I, true);
  f.weights = given.data();
  portable::forward_function({cell, varied}, dtype)(f, host(pieces, s.threads));

  LayerBackwardParams b{};
  static_cast<Shape&>(b) = shape;
  b.grad_output = sequence(pieces.random<S>(steps * s.P), s, s.P);
  if (o.states) {
    b.grad_h_n = pieces.random<S>(rows * s.P);
    b.d_hx = pieces.result<S>(rows * s.P, "the gradient of hx");
  }
  if (Cell::has_c) {
    if (o.states) {
      b.grad_c_n = pieces.random<S>(rows * s.H);
      b.d_cx = pieces.result<S>(rows * s.H, "the gradient of cx");
    }
    b.grad_cells = sequence(pieces.random<C>(steps * s.H), s, s.H);
  }
  b.output = f.output;
  b.reserve = f.reserve;
  b.saved_cells = f.saved_cells;
  b.statistics = f.statistics;
  b.hx = f.hx;
  b.cx = f.cx;
  b.I = s.I;
  b.input = f.input;
  b.unprojected = f.unprojected;
  b.weights = f.weights;
  b.d_input =
      sequence(pieces.result<S>(s.T * s.B * s.I, "the gradient of input", o.ragged), s, s.I, true);
  b.d_weights = d_given.data();
  portable::backward_function({cell, varied}, dtype)(b, host(pieces, s.threads));
  pieces.check(what);
}

// A single step, which nothing is packed for; rows of their own; rows shared out; units shared out.
constexpr Sizes sizes[] = {{1, 1, 1, 3, 9, 9, 1},
                           {3, 5, 2, 6, 21, 21, 1},
                           {5, 7, 2, 5, 40, 40, 4},
                           {2, 3, 1, 70, 130, 130, 4}};
constexpr Options options[] = {
    {LayerNorm::none, 0, 0, 0, false, false, true, true},
    {LayerNorm::none, 0, 0, 0, false, true, false, false},
    {LayerNorm::none, 0, 0, 0.3, true, false, true, true},
    {LayerNorm::none, 0.2, 0.1, 0, true, true, true, false},
    {LayerNorm::none, 0.2, 0.1, 0.3, false, false, true, true},
    {LayerNorm::joint, 0.2, 0.1, 0.3, true, true, true, true},
    {LayerNorm::separate, 0, 0.1, 0.3, true, false, false, true},
    {LayerNorm::separate, 0, 0, 0, false, true, true, false},
};

template <class Cell, class S>
void run_cell(const char* name, int cell, DType dtype) {
  for (const Sizes& s : sizes)
    for (const Options& o : options) {
      if (Cell::late_gate && o.layer_norm != LayerNorm::none) continue;
      for (const int64_t P : {s.H, s.H / 3}) {
        if (P != s.H && !Cell::has_c) continue;
        Sizes of = s;
        of.P = P;
        char what[128];
        std::snprintf(what, sizeof(what), "%s, dtype %d, sizes %d, options %d, P = %d", name,
                      static_cast<int>(dtype), static_cast<int>(&s - sizes),
                      static_cast<int>(&o - options), static_cast<int>(P));
        std::fprintf(stderr, "%s\n",
                     what);  // so that a report of the sanitizer stands below its case
        run_layer<Cell, S>(what, cell, dtype, of, o);
      }
    }
}

template <class S>
void run_attention(DType dtype, int64_t Q, bool masked) {
  const int64_t B = 2, K = 11, A = 9, D = 5;
  using C = Compute<S>;
  Pieces pieces;
  AttentionShape shape{};
  shape.dtype = dtype;
  shape.B = B;
  shape.Q = Q;
  shape.K = K;
  shape.A = A;
  shape.D = D;
  shape.query = pieces.random<S>(B * Q * A);
  shape.key = pieces.random<S>(B * K * A);
  shape.value = pieces.random<S>(B * K * D);
  shape.weight = pieces.random<S>(A);
  shape.bias = pieces.random<S>(A);
  if (masked) {
    auto* const lengths = pieces.take<int64_t>(B);
    lengths[0] = K;
    lengths[1] = 3;
    auto* const mask = pieces.take<bool>(B * Q * K);
    for (int64_t i = 0; i < B * Q * K; ++i) mask[i] = i % K == 0 || pieces.integer(1) == 0;
    shape.lengths = lengths;
    shape.mask = mask;
    shape.mask_per_query = true;
    shape.causal = true;
    shape.dropout_p = 0.25;
  }
  AttentionForwardParams f{};
  static_cast<AttentionShape&>(f) = shape;
  f.context = pieces.result<S>(B * Q * D, "context");
  f.logsumexp = pieces.result<C>(B * Q, "logsumexp");
  f.weights = pieces.result<S>(B * Q * K, "weights");
  portable::attention_forward_function(dtype)(f, host(pieces, 2));
  AttentionBackwardParams b{};
  static_cast<AttentionShape&>(b) = shape;
  b.grad_context = pieces.random<S>(B * Q * D);
  b.grad_weights = pieces.random<S>(B * Q * K);
  b.logsumexp = f.logsumexp;
  b.d_query = pieces.result<S>(B * Q * A, "the gradient of query");
  b.d_key = pieces.result<S>(B * K * A, "the gradient of key");
  b.d_value = pieces.result<S>(B * K * D, "the gradient of value");
  b.d_weight = pieces.result<S>(A, "the gradient of weight");
  b.d_bias = pieces.result<S>(A, "the gradient of bias");
  portable::attention_backward_function(dtype)(b, host(pieces, 2));
  pieces.check("attention");
}

template <class S>
void run(DType dtype) {
  int index = 0;
#define FUSED_RNN_RUN(name, cell) run_cell<cell, S>(#name, index++, dtype);
  FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_RUN)
  for (const int64_t Q : {int64_t(1), int64_t(3), int64_t(37)})
    for (const bool masked : {false, true}) run_attention<S>(dtype, Q, masked);
}

}  // namespace
}  // namespace fused_rnn

// With any argument the initial state is a value too short, which has to be noticed.
int main(int count, char**) {
  fused_rnn::missing = count - 1;
  fused_rnn::run<float>(fused_rnn::DType::float32);
  fused_rnn::run<fused_rnn::BFloat16>(fused_rnn::DType::bfloat16);
}
