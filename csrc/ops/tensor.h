// What the operators share: tensors of the stable ABI, checks, layouts, dispatch on the dtype.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../arguments.h"

namespace dtf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType row_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
// An uninitialised result on the device of `like`.
inline Tensor new_rows(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, row_dtype(like));
}
inline Tensor new_like(const Tensor& like) { return torch::stable::empty_like(like); }

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline void check_device(const char* name, const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.is_cuda() == other.is_cuda() && x.get_device_index() == other.get_device_index(), name,
                  " must be on the device of the other arguments");
}
inline void check_same(const char* name, const Tensor& x, const Tensor& other) {
  check_device(name, x, other);
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type(), name, ": dtypes differ");
  STD_TORCH_CHECK(x.sizes().equals(other.sizes()), name, ": shapes differ");
}
inline void check_logits(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, name, " must have shape [N, C] with C >= 1");
  STD_TORCH_CHECK(x.size(1) < INT32_MAX, name, " must have fewer than 2^31 classes");
}
inline void check_rows(const char* name, const Tensor& x, const Tensor& per_row, ScalarType dtype) {
  check_device(name, x, per_row);
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(0) == per_row.size(0), name, " must have one entry per sample");
}

// Calls f.operator()<T>() with the storage type of the tensor.
template <typename F>
auto visit_dtype(const char* name, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::Half:
      return f.template operator()<Half>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
  }
}

template <typename T>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// How a device may split the work of a kernel: anywhere, or only where full vectors of elements end.
enum class Split { anywhere, at_vectors };

inline int64_t sample_size(const Tensor& x) {
  int64_t size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) size *= x.size(d);
  return size;
}

// Whether each sample is one contiguous run of memory and the samples follow one another, in whatever order of the
// inner dimensions: contiguous, channels_last and the like.
inline bool is_dense_per_sample(const Tensor& x) {
  if (x.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size), inner dimensions only
  for (int64_t d = 1; d < x.dim(); ++d)
    if (x.size(d) != 1) dims.emplace_back(x.stride(d), x.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (auto [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return x.size(0) <= 1 || x.stride(0) == expected;
}
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}
// Whether tensors of one shape can be walked through memory together, sample by sample.
inline bool walk_together(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  return is_dense_per_sample(first) &&
         std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* x) { return same_strides(first, *x); });
}

}  // namespace dtf
