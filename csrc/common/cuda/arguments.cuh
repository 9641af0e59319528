// Host side of a kernel's arguments: dtype dispatch, typed pointers, alignment.
#pragma once

#include "common/tensor.h"

namespace fss {

// Calls f(type_tag<T>) with the storage type of the features; there are no float64 kernels on a GPU.
template <class F>
void dispatch_features(ScalarType dtype, const char* what, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(type_tag<float>{});
    case ScalarType::BFloat16:
      return f(type_tag<bfloat16>{});
    case ScalarType::Half:
      return f(type_tag<float16>{});
    default:
      STD_TORCH_CHECK(false, what, ": unsupported dtype ", torch::headeronly::toString(dtype), " on CUDA");
  }
}

template <class F>
void dispatch_bool(bool value, F&& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

inline bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// Whether every row of the features starts on a 16-byte boundary.
inline bool aligned_rows(const Rows& rows) {
  const int64_t size = int64_t(rows.tensor.element_size());
  return aligned(rows.tensor) && rows.stride_b * size % 16 == 0 && rows.stride_row * size % 16 == 0;
}

}  // namespace fss
