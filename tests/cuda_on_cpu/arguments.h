// What a CUDA engine may touch, told to the runner: every pointer of its parameters with the extent that
// csrc/params.h gives it, and the scratch that it asks its host for. Of ragged sequences only the steps
// that exist.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../../csrc/cuda/per_step.h"
#include "../../csrc/params.h"
#include "runner.h"

namespace fused_rnn::cuda_on_cpu {

inline int64_t bytes_of(DType dtype) {
  constexpr int64_t bytes[] = {4, 8, 2, 2, 8, 16};
  return bytes[static_cast<int>(dtype)];
}

// How many values a unit has: of gates, weights of the cell's own, gradients of its own weights, and
// in the two reserves.
struct Counts {
  int64_t gates, unit_weights, unit_gradients, saved, cells;
  bool has_c;
};

class Arguments {
 public:
  Arguments(const RecurrenceForwardParams& p, const Counts& counts, const cuda::Host& host)
      : Arguments(p, host) {
    const int64_t storage = storage_bytes(), compute = compute_bytes(), gates = counts.gates;
    inputs(p, counts);
    given("bias_ih", p.bias_ih, p.L * gates * p.H * storage);
    sequence("input_gates", p.input_gates, gates * p.H * storage, storage, true);
    given("bias_hh", p.bias_hh, p.L * gates * p.H * storage);
    sequence("output", p.output, p.P * storage, storage, false);
    wanted("h_n", p.h_n, p.L * p.B * p.P * storage);
    wanted("c_n", p.c_n, p.L * p.B * p.H * storage);
    sequence("cells", p.cells, p.H * compute, compute, false);
    reserve("reserve", p.reserve, counts.saved, storage, false);
    reserve("saved_cells", p.saved_cells, counts.cells, compute, false);
    sequence("unprojected", p.unprojected, p.H * storage, storage, false);
    statistics(p.statistics, counts, false);
  }

  Arguments(const RecurrenceBackwardParams& p, const Counts& counts, const cuda::Host& host)
      : Arguments(p, host) {
    const int64_t storage = storage_bytes(), compute = compute_bytes(), gates = counts.gates;
    inputs(p, counts);
    sequence("grad_output", p.grad_output, p.P * storage, storage, true);
    given("grad_h_n", p.grad_h_n, p.L * p.B * p.P * storage);
    given("grad_c_n", p.grad_c_n, p.L * p.B * p.H * storage);
    sequence("grad_cells", p.grad_cells, p.H * compute, compute, true);
    sequence("output", p.output, p.P * storage, storage, true);
    reserve("reserve", p.reserve, counts.saved, storage, true);
    reserve("saved_cells", p.saved_cells, counts.cells, compute, true);
    statistics(const_cast<void*>(p.statistics), counts, true);
    given("d_unit_weights", p.d_unit_weights, p.L * p.B * counts.unit_gradients * p.H * compute);
    wanted("keep", p.keep, p.L * p.B * p.P * compute);
    wanted("d_hx", p.d_hx, p.L * p.B * p.P * storage);
    wanted("d_cx", p.d_cx, p.L * p.B * p.H * storage);
    sequence("d_input_gates", p.d_input_gates, gates * p.H * storage, storage, false);
    sequence("d_hidden_gates", p.d_hidden_gates, gates * p.H * storage, storage, false);
    sequence("d_output", p.d_output, p.P * storage, storage, false);
  }

  ~Arguments() { forget(); }
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  // What the engine is to be run with.
  cuda::Host host;

  // Throws unless the engine wrote all that was wanted of it.
  void check_results() const {
    for (const Span& span : wanted_) host_reads(span.data, span.bytes, "the caller");
  }

 private:
  struct Span {
    const void* data;
    size_t bytes;
  };

  Arguments(const Shape& p, const cuda::Host& given) : p_(p) {
    host.stream = given.stream;
    host.allocate = [&given](size_t bytes) {
      void* data = given.allocate(bytes);
      declare({data, static_cast<int64_t>(bytes), "scratch", 0});
      return data;
    };
    host.prepare = [&given, this](const cuda::Product& product) {
      const auto bytes = [&](int64_t rows, int64_t columns) {
        return static_cast<size_t>(product.lanes * rows * columns * storage_bytes());
      };
      return [this, product, run = given.prepare(product), a = bytes(product.m, product.k),
              b = bytes(product.k, product.n), out = bytes(product.m, product.n)] {
        host_reads(product.a, a, "a product");
        const int64_t stride = product.b_stride * storage_bytes();
        for (int64_t lane = 0; lane < (stride ? product.lanes : 1); ++lane)
          host_reads(static_cast<const char*>(product.b) + lane * stride,
                     stride ? b / product.lanes : b, "a product");
        run();
        host_wrote(product.out, out);
      };
    };
  }

  int64_t storage_bytes() const { return bytes_of(p_.dtype); }
  int64_t compute_bytes() const { return std::max<int64_t>(storage_bytes(), 4); }

  // What both directions are given.
  template <class Params>
  void inputs(const Params& p, const Counts& counts) {
    const int64_t gates = counts.gates, storage = storage_bytes();
    forget();
    given("lengths", p.lengths, p.B * 8);
    given("resets", p.resets, p.T * p.B);
    given("hx", p.hx, p.L * p.B * p.P * storage);
    given("cx", p.cx, p.L * p.B * p.H * storage);
    given("weight_hh", p.weight_hh, p.L * gates * p.H * p.P * storage);
    given("weight_hr", p.weight_hr, p.L * p.P * p.H * storage);
    given("weight_ch", p.weight_ch, p.L * counts.unit_weights * p.H * storage);
    norm("input gates", p.norms.input, gates);
    norm("hidden gates", p.norms.hidden, gates);
    norm("c", p.norms.c, 1);
    given("seed", p.variation.seed, 8);
  }

  void norm(const char* of, const NormWeights<const void*>& norm, int64_t rows) {
    const int64_t bytes = p_.L * rows * p_.H * storage_bytes();
    given((std::string("norm weight of ") + of).c_str(), norm.weight, bytes);
    given((std::string("norm bias of ") + of).c_str(), norm.bias, bytes);
  }

  void statistics(void* data, const Counts& counts, bool is_given) {
    const int64_t n = norm_count(p_.variation.layer_norm, counts.has_c);
    const Sequence tensor{data, p_.L * p_.B * n, n, p_.B * n, nullptr};
    sequence("statistics", tensor, n * compute_bytes(), compute_bytes(), is_given);
  }

  void given(const char* name, const void* data, int64_t bytes) {
    if (data) declare({const_cast<void*>(data), bytes, name, 1});
  }

  void wanted(const char* name, void* data, int64_t bytes) {
    if (!data) return;
    declare({data, bytes, name, 0});
    wanted_.push_back({data, static_cast<size_t>(bytes)});
  }

  void span(const std::string& name, void* data, int64_t bytes, bool is_given) {
    if (is_given)
      given(name.c_str(), data, bytes);
    else
      wanted(name.c_str(), data, bytes);
  }

  template <class Visit>
  void every_step(const char* name, const Visit& visit) const {
    for (int64_t t = 0; t < p_.T; ++t)
      for (int64_t b = 0; b < p_.B; ++b)
        for (int64_t lane = 0; lane < p_.L; ++lane)
          if (!p_.lengths || t < p_.lengths[b])
            visit(t, b, lane,
                  std::string(name) + "[t " + std::to_string(t) + ", b " + std::to_string(b) +
                      ", lane " + std::to_string(lane) + "]");
  }

  void sequence(const char* name, const Sequence& tensor, int64_t row_bytes, int64_t element,
                bool is_given) {
    if (!tensor) return;
    every_step(name, [&](int64_t t, int64_t b, int64_t lane, const std::string& step) {
      const int64_t offset = t * tensor.stride_t + b * tensor.stride_b + lane * tensor.stride_l;
      span(step, static_cast<char*>(tensor.data) + offset * element, row_bytes, is_given);
    });
  }

  void reserve(const char* name, const Reserve& values, int64_t count, int64_t element,
               bool is_given) {
    if (!values) return;
    every_step(name, [&](int64_t t, int64_t b, int64_t lane, const std::string& step) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t unit = 0; unit < p_.H; unit += Reserve::block) {
          const int64_t units = std::min(Reserve::block, p_.H - unit);
          const int64_t offset =
              t * values.stride_t + b * values.stride_b + lane * values.stride_l +
              unit / Reserve::block * values.stride_block + i * values.stride_value;
          span(step, static_cast<char*>(values.data) + offset * element, units * element, is_given);
        }
    });
  }

  const Shape& p_;
  std::vector<Span> wanted_;
};

class DropoutArguments {
 public:
  explicit DropoutArguments(const DropoutParams& p) : p_(p) {
    forget();
    declare({const_cast<int64_t*>(p.seed), 8, "seed", 1});
    declare({const_cast<void*>(p.input), bytes(), "input", 1});
    declare({p.output, bytes(), "output", 0});
  }
  ~DropoutArguments() { forget(); }
  DropoutArguments(const DropoutArguments&) = delete;
  DropoutArguments& operator=(const DropoutArguments&) = delete;

  void check_results() const { host_reads(p_.output, bytes(), "the caller"); }

 private:
  int64_t bytes() const { return p_.rows * p_.n * bytes_of(p_.dtype); }

  const DropoutParams& p_;
};

}  // namespace fused_rnn::cuda_on_cpu
