// additive_attention_forward and _backward on the CPU; on CUDA the two are Triton kernels
// (kernels/attention_scores.py).
//
//   primals   query (B, Tq, A), key (B, Tk, A), value (B, Tk, D), weight (A) and perhaps bias (A)
//   rest      lengths (B), mask (B, Tq or 1, Tk) and the seed of dropout, without which there is none;
//             each of them optional, in forward arguments of their own
//
// The settings of forward are causal, want_weights, want_scores, that of backward is causal. Forward's
// results are context, logsumexp, weights and scores; of shape (0,) if unwanted. Backward takes as
// `grads` those of context, weights and scores, each of them optional, as `results` context
// and logsumexp, and returns the gradients of primals.
#include <cmath>
#include <tuple>

#include "call.h"
#include "host.h"

namespace fused_rnn::binding {
namespace {

// What both ops take, checked and made contiguous; keeps it alive.
struct AttentionArguments {
  Tensor query, key, value, weight;
  OptionalTensor bias, lengths, mask;

  AttentionArguments(const TensorList& primals, const OptionalTensor& lengths_in,
                     const OptionalTensor& mask_in, const OptionalTensor& seed, double dropout_p,
                     bool causal, AttentionShape& p)
      : query(as_contiguous(of_four_or_five(primals)[0])),
        key(as_contiguous(primals[1])),
        value(as_contiguous(primals[2])),
        weight(as_contiguous(primals[3])),
        lengths(as_contiguous(lengths_in)),
        mask(as_contiguous(mask_in)) {
    if (primals.size() > 4) bias = as_contiguous(primals[4]);
    p.dtype = storage_type("query", query);
    const ScalarType dtype = query.scalar_type();
    for (const auto& [name, tensor] :
         {std::pair("query", query), std::pair("key", key), std::pair("value", value)})
      FUSED_RNN_EXPECT(tensor.dim() == 3, "Expected ", name, " of three dimensions, got ",
                       shape_string(tensor));
    p.B = query.size(0);
    p.Q = query.size(1);
    p.A = query.size(2);
    p.K = key.size(1);
    p.D = value.size(2);
    check_like("key", key, query, dtype);
    check_shape("key", key, {p.B, p.K, p.A}, "(B, Tk, A)");
    check_like("value", value, query, dtype);
    check_shape("value", value, {p.B, p.K, p.D}, "(B, Tk, D)");
    check_like("weight", weight, query, dtype);
    check_shape("weight", weight, {p.A}, "(A)");
    if (bias) {
      check_like("bias", *bias, query, dtype);
      check_shape("bias", *bias, {p.A}, "(A)");
    }
    if (lengths) check_lengths(*lengths, query, p.K, p.B, "the keys");
    if (mask) {
      check_like("mask", *mask, query, ScalarType::Bool);
      const int64_t rows = mask->dim() == 3 && mask->size(1) == 1 ? 1 : p.Q;
      check_shape("mask", *mask, {p.B, rows, p.K}, "(B, Tq or 1, Tk)");
      p.mask_per_query = rows != 1 || p.Q == 1;
    }
    FUSED_RNN_EXPECT(dropout_p >= 0 && dropout_p < 1, "Expected dropout_p in [0, 1), got ",
                     dropout_p);
    p.lengths = static_cast<const int64_t*>(pointer(lengths));
    p.mask = static_cast<const bool*>(pointer(mask));
    p.causal = causal;
    p.dropout_p = dropout_p;
    FUSED_RNN_EXPECT(seed || dropout_p == 0,
                     "Expected dropout_p of 0, since there is no seed, got ", dropout_p);
    p.seed = seed ? static_cast<uint64_t>(*seed_pointer(*seed, query)) : 0;
    if (p.A == 0) {  // for the engine, one of zeros
      const Results zeros{query, true};
      p.A = 1;
      query = zeros({p.B, p.Q, 1});
      key = zeros({p.B, p.K, 1});
      weight = zeros({1});
      if (bias) bias = zeros({1});
    }
    p.query = query.const_data_ptr();
    p.key = key.const_data_ptr();
    p.value = value.const_data_ptr();
    p.weight = weight.const_data_ptr();
    p.bias = pointer(bias);
  }

 private:
  static const TensorList& of_four_or_five(const TensorList& primals) {
    FUSED_RNN_EXPECT(primals.size() == 4 || primals.size() == 5,
                     "Expected primals of 4 tensors, or 5 with a bias, got ", primals.size());
    return primals;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_forward(
    const TensorList& primals, const OptionalTensor& lengths, const OptionalTensor& mask,
    const OptionalTensor& seed, double dropout_p, const Settings& settings) {
  FUSED_RNN_EXPECT(settings.size() == 3, "Expected settings of 3 numbers, got ", settings.size());
  const bool want_weights = settings[1] != 0, want_scores = settings[2] != 0;
  AttentionForwardParams p{};
  const AttentionArguments inputs(primals, lengths, mask, seed, dropout_p, settings[0] != 0, p);
  const ScalarType c_type = compute_type(inputs.query.scalar_type());
  const bool empty = p.B * p.Q * p.K == 0;  // then there is nothing to attend to
  const Results make{inputs.query, empty};
  Tensor context = make({p.B, p.Q, p.D});
  Tensor logsumexp = make({p.B, p.Q}, c_type);
  Tensor weights = want_weights ? make({p.B, p.Q, p.K}) : make.none();
  Tensor scores = want_scores ? make({p.B, p.Q, p.K}) : make.none();
  p.context = context.data_ptr();
  p.logsumexp = logsumexp.data_ptr();
  p.weights = want_weights ? weights.data_ptr() : nullptr;
  p.scores = want_scores ? scores.data_ptr() : nullptr;
  if (empty)
    torch::stable::fill_(logsumexp, -INFINITY);
  else
    on_cpu(inputs.query, [&](const cpu::Host& host) {
      cpu::active_instruction_set().attention_forward(p.dtype)(p, host);
    });
  return {context, logsumexp, weights, scores};
}

TensorList attention_backward(const OptionalTensorList& grads, const TensorList& primals,
                              const TensorList& results, const OptionalTensorList& rest,
                              double dropout_p, const Settings& settings) {
  FUSED_RNN_EXPECT(settings.size() == 1, "Expected settings of 1 number, got ", settings.size());
  FUSED_RNN_EXPECT(rest.size() == 3, "Expected rest of 3 tensors or None, got ", rest.size());
  FUSED_RNN_EXPECT(grads.size() == 3, "Expected grads of 3 tensors or None, got ", grads.size());
  FUSED_RNN_EXPECT(results.size() == 2,
                   "Expected results of 2 tensors, context and logsumexp, got ", results.size());
  AttentionBackwardParams p{};
  const AttentionArguments inputs(primals, rest[0], rest[1], rest[2], dropout_p, settings[0] != 0,
                                  p);
  const Tensor& query = inputs.query;
  const ScalarType dtype = query.scalar_type();
  const auto check_gradient = [&](const char* name, const OptionalTensor& gradient, int64_t n,
                                  const char* letters) {
    if (!gradient) return;
    check_like(name, *gradient, query, dtype);
    check_shape(name, *gradient, {p.B, p.Q, n}, letters);
  };
  check_gradient("grad_context", grads[0], p.D, "(B, Tq, D)");
  check_gradient("grad_weights", grads[1], p.K, "(B, Tq, Tk)");
  check_gradient("grad_scores", grads[2], p.K, "(B, Tq, Tk)");
  check_like("logsumexp", results[1], query, compute_type(dtype));
  check_shape("logsumexp", results[1], {p.B, p.Q}, "(B, Tq)");
  const OptionalTensor grad_context = as_contiguous(grads[0]);
  const OptionalTensor grad_weights = as_contiguous(grads[1]);
  const OptionalTensor grad_scores = as_contiguous(grads[2]);
  const Tensor logsumexp = as_contiguous(results[1]);
  const bool empty = p.B * p.Q * p.K == 0;
  const Results make{inputs.query, empty};
  TensorList gradients{make({p.B, p.Q, p.A}), make({p.B, p.K, p.A}), make({p.B, p.K, p.D}),
                       make({p.A})};
  if (inputs.bias) gradients.push_back(make({p.A}));
  p.grad_context = pointer(grad_context);
  p.grad_weights = pointer(grad_weights);
  p.grad_scores = pointer(grad_scores);
  p.logsumexp = logsumexp.const_data_ptr();
  p.d_query = gradients[0].data_ptr();
  p.d_key = gradients[1].data_ptr();
  p.d_value = gradients[2].data_ptr();
  p.d_weight = gradients[3].data_ptr();
  p.d_bias = inputs.bias ? gradients[4].data_ptr() : nullptr;
  if (!empty)
    on_cpu(inputs.query, [&](const cpu::Host& host) {
      cpu::active_instruction_set().attention_backward(p.dtype)(p, host);
    });
  if (primals[0].size(2) == 0) {
    gradients[0] = make({p.B, p.Q, 0});
    gradients[1] = make({p.B, p.K, 0});
    for (size_t i = 3; i < gradients.size(); ++i) gradients[i] = make.none();
  }
  return gradients;
}

}  // namespace
}  // namespace fused_rnn::binding

FUSED_RNN_LIBRARY(FUSED_RNN_NAMESPACE, library) {
  library.def(
      "additive_attention_forward(Tensor[] primals, Tensor? lengths, Tensor? mask, Tensor? seed, "
      "float dropout_p, int[] settings) -> (Tensor context, Tensor logsumexp, Tensor weights, "
      "Tensor scores)");
  library.def(
      "additive_attention_backward(Tensor?[] grads, Tensor[] primals, Tensor[] results, "
      "Tensor?[] rest, float dropout_p, int[] settings) -> Tensor[]");
}

FUSED_RNN_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, CPU, library) {
  library.impl("additive_attention_forward", TORCH_BOX(&fused_rnn::binding::attention_forward));
  library.impl("additive_attention_backward", TORCH_BOX(&fused_rnn::binding::attention_backward));
}
