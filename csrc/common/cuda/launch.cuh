// Host side of a launch: current stream, one-dimensional grids, error checks.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <limits>

#include "common/tensor.h"

namespace fss {

constexpr size_t kPlainSharedBytes = 48 * 1024;  // of a block that does not ask for more

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_device(const char* op, const char* features_name, const Tensor& features, const char* name,
                         const Tensor& other) {
  STD_TORCH_CHECK(other.is_cuda() && other.get_device_index() == features.get_device_index(), op, ": ", name,
                  " must be on the device of ", features_name);
}

// Launches `blocks` blocks; every index lies in x, where 2^31 - 1 fit. Nothing to do is no launch.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "too many blocks for one launch: ", blocks);
  kernel<<<unsigned(blocks), threads, 0, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The same with `bytes` of shared memory, which the kernel finds at `shared_memory`.
template <class... Parameters, class... Arguments>
void launch_shared(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "too many blocks for one launch: ", blocks);
  if (bytes > kPlainSharedBytes) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  }
  kernel<<<unsigned(blocks), threads, bytes, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

#ifdef __CUDACC__
__device__ inline float* shared_memory() {
  extern __shared__ __align__(16) float all[];
  return all;
}
#endif

}  // namespace fss
