// Host-side helpers on stable-ABI tensors: checks, dtype dispatch, layout questions, parallel loops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dtypes.h"
#include "sizes.h"

namespace fss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A `str` argument. PyTorch's own conversion to std::string (2.10 ... 2.13) leaks it: pytorch issue 191340.
struct Text : std::string {
  using std::string::string;
};

template <class T>
struct type_tag {
  using type = T;
};

// Calls f(type_tag<T>) with the storage type of a feature tensor.
template <class F>
auto dispatch_floating(ScalarType dtype, const char* what, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(type_tag<float>{});
    case ScalarType::Double:
      return f(type_tag<double>{});
    case ScalarType::BFloat16:
      return f(type_tag<bfloat16>{});
    case ScalarType::Half:
      return f(type_tag<float16>{});
    default:
      STD_TORCH_CHECK(false, what, ": unsupported dtype ", torch::headeronly::toString(dtype));
  }
}

// The same for a mask, which may also be bool or uint8.
template <class F>
auto dispatch_mask(ScalarType dtype, const char* what, F&& f) {
  if (dtype == ScalarType::Bool || dtype == ScalarType::Byte) return f(type_tag<uint8_t>{});
  return dispatch_floating(dtype, what, std::forward<F>(f));
}

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// (B, C, H, W) stored with channels innermost. The rule of fss_kernels._layout.is_channels_last.
inline bool is_channels_last(const Tensor& x) { return x.size(1) > 1 && x.stride(1) == 1 && x.size(2) * x.size(3) > 1; }

// The H*W pixels of a plane (or of a channel, channels_last) are `step` apart, row after row.
inline bool pixels_are_dense(const Tensor& x, int64_t step) {
  return (x.size(3) == 1 || x.stride(3) == step) && (x.size(2) == 1 || x.stride(2) == step * x.size(3));
}

// A (B, C, H, W) tensor readable as rows: planes, or pixels when channels_last.
struct Rows {
  Tensor tensor;
  bool channels_last;
  int64_t stride_b, stride_row;
};

// Contiguous, channels_last and slices of either are taken as they are; anything else is copied.
inline Rows as_rows(const Tensor& x) {
  if (is_channels_last(x)) {
    const int64_t step = x.size(3) > 1 ? x.stride(3) : x.stride(2);
    if (pixels_are_dense(x, step)) return {x, true, x.stride(0), step};
    const Tensor dense = torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
    return {dense, true, x.size(1) * x.size(2) * x.size(3), x.size(1)};
  }
  if (pixels_are_dense(x, 1)) return {x, false, x.stride(0), x.stride(1)};
  const int64_t pixels = x.size(2) * x.size(3);
  return {torch::stable::contiguous(x), false, x.size(1) * pixels, pixels};
}

// (B, channels, H, W) in the memory format of x.
inline Tensor empty_rows_like(const Tensor& x, int64_t channels) {
  return torch::stable::empty({x.size(0), channels, x.size(2), x.size(3)}, x.scalar_type(), std::nullopt, x.device(),
                              std::nullopt,
                              is_channels_last(x) ? torch::headeronly::MemoryFormat::ChannelsLast
                                                  : torch::headeronly::MemoryFormat::Contiguous);
}

inline Tensor empty_rows_like(const Tensor& x) { return empty_rows_like(x, x.size(1)); }

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// Whether a result is so large that it leaves the caches before anyone reads it: then it is written past them.
inline bool leaves_caches(const Tensor& x) { return x.numel() * int64_t(x.element_size()) >= int64_t(8) << 20; }

inline bool has_shape(const Tensor& x, const std::vector<int64_t>& sizes) {
  return x.dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), x.sizes().begin());
}

// f(begin, end) over [0, tasks), each piece worth at least about 64K element operations.
template <class F>
void parallel_tasks(int64_t tasks, int64_t work_per_task, const F& f) {
  if (tasks == 0) return;
  const int64_t together = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work_per_task));
  if (tasks <= together) return f(int64_t(0), tasks);
  torch::stable::parallel_for(0, tasks, together, f);
}

}  // namespace fss

template <>
struct torch::stable::detail::ToImpl<fss::Text> {
  template <class... Rest>
  static fss::Text call(StableIValue value, Rest...) {
    const auto handle = to<StringHandle>(value);
    const char* data = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    const fss::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
