// functions.h for all value types of one instruction set: numbers and vectors of them, and duals of both
// (test_cells.py). Compiled with FUSED_RNN_ISA and FUSED_RNN_VECTOR_BYTES, as csrc/cpu/engine_*.cpp are.
#include "cpu/prelude.h"
#include "dtype.h"
#include "functions.h"
#include "philox.h"

namespace fused_rnn {
namespace FUSED_RNN_ISA {
#include "cpu/simd.h"

template <class T>
struct Numbers {  // as they cross the boundary: values, and tangents where there are any
  static T make(double value, double) { return static_cast<T>(value); }
  static void take(T x, double* value, double*) { *value = x; }
};
template <class T>
struct Numbers<Dual<T>> {
  static Dual<T> make(double value, double tangent) {
    return {static_cast<T>(value), static_cast<T>(tangent)};
  }
  static void take(Dual<T> x, double* value, double* tangent) {
    *value = x.value;
    *tangent = x.tangent;
  }
};

struct Arrays {
  const double *a, *d_a, *b, *d_b;
  double *result, *d_result;
};

template <class T>
void by_number(const char* name, int64_t n, const Arrays& of) {
  for (int64_t i = 0; i < n; ++i)
    Numbers<T>::take(user::evaluate(name, Numbers<T>::make(of.a[i], of.d_a[i]),
                                    Numbers<T>::make(of.b[i], of.d_b[i])),
                     of.result + i, of.d_result + i);
}

// n is a multiple of every vector's size.
template <class T>
void by_vector(const char* name, int64_t n, const Arrays& of) {
  using V = Vector<T>;
  for (int64_t i = 0; i < n; i += V::size) {
    T a[V::size], b[V::size], result[V::size];
    for (int j = 0; j < V::size; ++j) {
      a[j] = Numbers<T>::make(of.a[i + j], of.d_a[i + j]);
      b[j] = Numbers<T>::make(of.b[i + j], of.d_b[i + j]);
    }
    user::evaluate(name, V::load(a), V::load(b)).store(result);
    for (int j = 0; j < V::size; ++j)
      Numbers<T>::take(result[j], of.result + i + j, of.d_result + i + j);
  }
}

}  // namespace FUSED_RNN_ISA
}  // namespace fused_rnn

#define FUSED_RNN_EXPORT(name, type)                                           \
  extern "C" void name##_numbers(const char* function, int64_t n,              \
                                 const fused_rnn::FUSED_RNN_ISA::Arrays* of) { \
    fused_rnn::FUSED_RNN_ISA::by_number<type>(function, n, *of);               \
  }                                                                            \
  extern "C" void name##_vectors(const char* function, int64_t n,              \
                                 const fused_rnn::FUSED_RNN_ISA::Arrays* of) { \
    fused_rnn::FUSED_RNN_ISA::by_vector<type>(function, n, *of);               \
  }
FUSED_RNN_EXPORT(float, float)
FUSED_RNN_EXPORT(double, double)
FUSED_RNN_EXPORT(dual_float, fused_rnn::Dual<float>)
FUSED_RNN_EXPORT(dual_double, fused_rnn::Dual<double>)
