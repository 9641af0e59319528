// Sums over a warp and a block in one fixed order.
#pragma once

namespace fss {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Every lane gets the sum; the whole warp takes part.
template <class A>
__device__ inline A warp_sum(A v) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(kWholeWarp, v, distance);
  return v;
}

// Every thread gets the sum; the whole block takes part. `scratch` holds one A a warp and is free again after the next
// barrier.
template <int Threads, class A>
__device__ inline A block_sum(A v, A* scratch) {
  static_assert(Threads % kWarp == 0);
  v = warp_sum(v);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = v;
  __syncthreads();
  A total = 0;
  for (int warp = 0; warp < Threads / kWarp; ++warp) total += scratch[warp];
  return total;
}

}  // namespace fss
