// Stands in for csrc/common/cuda/launch.cuh: a launch runs the emulator.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/tensor.h"

namespace fss {

constexpr size_t kPlainSharedBytes = 48 * 1024;

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t, Arguments... arguments) {
  emulated::run(blocks, threads, [&] { kernel(arguments...); });
}

inline void check_device(const char*, const char*, const Tensor&, const char*, const Tensor&) {}

// Shared memory is NaN when a block starts, and nothing may be written past its end.
template <class... Parameters, class... Arguments>
void launch_shared(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t bytes, cudaStream_t,
                   Arguments... arguments) {
  emulated::shared_bytes = bytes;
  emulated::run(blocks, threads, [&] { kernel(arguments...); });
  emulated::shared_bytes = 0;
}

inline float* shared_memory() { return reinterpret_cast<float*>(emulated::shared); }

}  // namespace fss
