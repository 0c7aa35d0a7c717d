// csrc/cells compiled for the host, one unit at a time, in double and in float, behind a C interface
// (test_cells.py). Numbers cross as double; states are (h, c) pairs. Results are poisoned first, so
// that a value a cell forgets shows.
#include <cmath>

#include "cells/cells.h"
#include "functions.h"

// W_hh for a late gate, of a single unit.
extern "C" const double late_weight = 0.75;

namespace {

template <class T, int N>
struct Values {
  T v[N > 0 ? N : 1];
  Values() {
    for (T& x : v) x = NAN;
  }
  explicit Values(const double* from) {
    for (int i = 0; i < N; ++i) v[i] = static_cast<T>(from[i]);
  }
  void copy_to(double* to) const {
    for (int i = 0; i < N; ++i) to[i] = v[i];
  }
};

template <class T>
fused_rnn::State<T> state(const double* from) {
  return {static_cast<T>(from[0]), static_cast<T>(from[1])};
}

template <class T>
void copy_state(const fused_rnn::State<T>& from, double* to) {
  to[0] = from.h;
  to[1] = from.c;
}

template <class Cell, class T>
void forward(const double* inputs, const double* hidden, const double* weights, const double* prev,
             double* next, double* saved) {
  Values<T, Cell::gates> input_gates(inputs), hidden_gates(hidden);
  const Values<T, Cell::unit_weights> own(weights);
  Values<T, Cell::saved> kept;
  fused_rnn::State<T> after{NAN, NAN};
  if constexpr (Cell::late_gate) {
    constexpr int late = Cell::gates - 1;
    Cell::forward_early(input_gates.v, hidden_gates.v, kept.v);
    hidden_gates.v[late] += T(late_weight) * Cell::read(kept.v, state<T>(prev));
    for (int k = 0; k < late; ++k) input_gates.v[k] = hidden_gates.v[k] = NAN;
  }
  Cell::forward(input_gates.v, hidden_gates.v, own.v, state<T>(prev), after, kept.v);
  copy_state(after, next);
  kept.copy_to(saved);
}

template <class Cell, class T>
void backward(const double* saved, const double* weights, const double* prev, const double* next,
              const double* d_next, double* d_inputs, double* d_hidden, double* d_weights,
              double* d_prev) {
  const Values<T, Cell::saved> kept(saved);
  const Values<T, Cell::unit_weights> own(weights);
  Values<T, Cell::unit_weights> d_own;
  Values<T, Cell::gates> d_input_gates, d_hidden_gates;
  fused_rnn::State<T> d_before{NAN, NAN};
  Cell::backward(kept.v, own.v, state<T>(prev), state<T>(next), state<T>(d_next), d_input_gates.v,
                 d_hidden_gates.v, d_own.v, d_before);
  if constexpr (Cell::late_gate) {
    const T d_read = T(late_weight) * d_hidden_gates.v[Cell::gates - 1];
    d_input_gates.v[0] = Cell::backward_early(kept.v, state<T>(prev), d_read, d_before);
    d_hidden_gates.v[0] = d_input_gates.v[0];
  }
  d_own.copy_to(d_weights);
  d_input_gates.copy_to(d_inputs);
  d_hidden_gates.copy_to(d_hidden);
  copy_state(d_before, d_prev);
}

}  // namespace

#define FUSED_RNN_EXPORT_AS(name, cell, type)                                               \
  extern "C" void name##_forward_##type(const double* i, const double* h, const double* w,  \
                                        const double* p, double* n, double* s) {            \
    forward<fused_rnn::cell, type>(i, h, w, p, n, s);                                       \
  }                                                                                         \
  extern "C" void name##_backward_##type(const double* s, const double* w, const double* p, \
                                         const double* n, const double* dn, double* di,     \
                                         double* dh, double* dw, double* dp) {              \
    backward<fused_rnn::cell, type>(s, w, p, n, dn, di, dh, dw, dp);                        \
  }
#define FUSED_RNN_EXPORT(name, cell)      \
  FUSED_RNN_EXPORT_AS(name, cell, double) \
  FUSED_RNN_EXPORT_AS(name, cell, float)
FUSED_RNN_FOR_EACH_CELL(FUSED_RNN_EXPORT)

extern "C" double function_of_double(const char* name, double a, double b) {
  return fused_rnn::user::evaluate(name, a, b);
}
extern "C" double function_of_float(const char* name, double a, double b) {
  return fused_rnn::user::evaluate(name, static_cast<float>(a), static_cast<float>(b));
}
