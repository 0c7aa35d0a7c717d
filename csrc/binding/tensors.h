// What every op does with tensors: checks in words, layouts as engines read them, results. Only this
// folder talks to torch, through its stable ABI.
#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include "../params.h"

namespace fused_rnn::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;
using OptionalTensorList = std::vector<OptionalTensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Refuses with the words that follow; torch's own macro adds a place in our sources.
#define FUSED_RNN_EXPECT(condition, ...) \
  ((condition) ? (void)0 : ::fused_rnn::binding::refuse(__VA_ARGS__))

template <class... Words>
[[noreturn]] void refuse(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// ---- checks ----------------------------------------------------------------------------------------

inline std::string shape_string(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i)
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

inline bool has_shape(const Tensor& tensor, Sizes expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i)
    same = tensor.size(static_cast<int64_t>(i)) == expected[i];
  return same;
}

inline void check_shape(const char* name, const Tensor& tensor, Sizes expected,
                        const char* letters) {
  if (has_shape(tensor, expected)) return;
  std::string text;
  for (const int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  refuse("Expected ", name, " of shape ", letters, " = (", text, "), got ", shape_string(tensor));
}

// As Python writes it, for the types that people pass.
inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return torch::headeronly::toString(type);
  }
}

// What a tensor holds and where, in torch's numbers: stable::Tensor takes longer to translate them than
// a small layer's checks may.
struct Kind {
  int32_t dtype, device_type, device_index;
  explicit Kind(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  }
  bool operator!=(const Kind& other) const {
    return dtype != other.dtype || device_type != other.device_type ||
           device_index != other.device_index;
  }
};

inline int32_t dtype_number(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline void check_kind(const char* name, const Tensor& tensor, const Kind& expected) {
  const Kind kind(tensor);
  const auto dtype_of = [](const Kind& of) {
    return dtype_name(torch::stable::detail::to<ScalarType>(torch::stable::detail::from(of.dtype)));
  };
  FUSED_RNN_EXPECT(kind.dtype == expected.dtype, "Expected ", name, " of dtype ",
                   dtype_of(expected), ", got ", dtype_of(kind));
  FUSED_RNN_EXPECT(
      kind.device_type == expected.device_type && kind.device_index == expected.device_index,
      "Expected ", name, " on the same device as the other arguments");
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& like,
                       ScalarType dtype) {
  Kind expected(like);
  expected.dtype = dtype_number(dtype);
  check_kind(name, tensor, expected);
}

inline DType storage_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      refuse("Expected ", name, " of dtype torch.float32, float64, bfloat16 or float16, got ",
             dtype_name(tensor.scalar_type()));
  }
}

// The same where complex numbers stand for duals (dual.h).
inline DType storage_or_dual_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::ComplexFloat:
      return DType::dual32;
    case ScalarType::ComplexDouble:
      return DType::dual64;
    default:
      return storage_type(name, tensor);
  }
}

inline ScalarType compute_type(ScalarType storage) {
  switch (storage) {
    case ScalarType::Double:
    case ScalarType::ComplexFloat:
    case ScalarType::ComplexDouble:
      return storage;
    default:
      return ScalarType::Float;
  }
}

// ---- tensors -----------------------------------------------------------------------------------------

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor as_contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
}

inline const void* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// A (T, B, L, n) tensor; here and below the caller has seen to a contiguous last dimension.
inline Sequence sequence(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline Sequence sequence(const OptionalTensor& tensor) {
  return tensor ? sequence(*tensor) : Sequence{};
}

// A (T, B, L, S*H) tensor.
inline Reserve natural_reserve(const Tensor& tensor, int64_t H) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1),
          tensor.stride(2),  Reserve::block,   H};
}

// A (T, L, H/16, B, S, 16) tensor.
inline Reserve blocked_reserve(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(3),
          tensor.stride(1),  tensor.stride(2), tensor.stride(4)};
}

inline int64_t reserve_blocks(int64_t H) { return (H + Reserve::block - 1) / Reserve::block; }

inline Tensor with_contiguous_units(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor
                                                            : torch::stable::contiguous(tensor);
}

inline OptionalTensor with_contiguous_units(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(with_contiguous_units(*tensor)) : std::nullopt;
}

// Allocates results beside `like`; `zeroed` where ragged rows leave steps unwritten.
class Results {
 public:
  Results(const Tensor& like, bool zeroed) : like_(like), kind_(like), zeroed_(zeroed) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout_));
  }

  Tensor operator()(Sizes shape, ScalarType dtype) const {
    return zeroed_ ? torch::stable::new_zeros(like_, shape, dtype)
                   : empty(shape, dtype_number(dtype));
  }
  Tensor operator()(Sizes shape) const {
    return zeroed_ ? torch::stable::new_zeros(like_, shape) : empty(shape, kind_.dtype);
  }
  Tensor none() const { return (*this)({0}); }

 private:
  // stable::new_empty looks its op up by name; this takes half as long.
  Tensor empty(Sizes shape, int32_t dtype) const {
    int32_t layout = layout_, device_type = kind_.device_type;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
        like_.get(), shape.data(), static_cast<int64_t>(shape.size()), &dtype, &layout,
        &device_type, kind_.device_index, nullptr, &handle));
    return Tensor(handle);
  }

  const Tensor& like_;
  const Kind kind_;
  const bool zeroed_;
  int32_t layout_;
};
}  // namespace fused_rnn::binding
