// CUDA's execution model on a CPU, for the numerics of kernels where there is no GPU: one fiber a thread, blocks one
// after the other, barriers of the block and of the warp. Aborts on a shuffle in a partial warp, a barrier that some
// threads have left, and a misaligned vector access. The order in which fibers run is chosen from outside: results that
// depend on it are races.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

using cudaStream_t = void*;
using std::isfinite;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct EmulatedIndex {
  unsigned x, y, z;
};
inline EmulatedIndex threadIdx, blockIdx;

namespace emulated {

enum State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };
constexpr size_t kStackBytes = 65536;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = kReady;
  uint64_t slot = 0;  // what a shuffle shows to the rest of the warp
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int current = 0, order = 0;
alignas(16) inline unsigned char shared[240 << 10];
inline size_t shared_bytes = 0;
constexpr size_t kGuardBytes = 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s in block %u\n", what, blockIdx.x);
  std::abort();
}

inline void wait(State state) {
  const int me = current;
  fibers[me].state = state;
  swapcontext(&fibers[me].context, &scheduler);
}

inline void enter() {
  body();
  wait(kDone);
}

inline int count(int begin, int end, State state) {
  return int(
      std::count_if(fibers.begin() + begin, fibers.begin() + end, [&](const Fiber& f) { return f.state == state; }));
}

// Runs every ready fiber once, in the chosen order; false when there was none.
inline bool step(int threads) {
  bool ran = false;
  for (int i = 0; i < threads; ++i) {
    const int t = order == 0 ? threads - 1 - i : order == 1 ? i : (i * 37 + 11) % threads;
    if (fibers[t].state != kReady) continue;
    current = t;
    threadIdx = {unsigned(t), 0, 0};
    swapcontext(&scheduler, &fibers[t].context);
    ran = true;
  }
  return ran;
}

inline void run_block(int threads) {
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.state = kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    if (step(threads)) continue;
    bool released = false;
    for (int warp = 0; warp < threads; warp += 32) {
      const int waiting = count(warp, warp + 32, kAtWarpBarrier);
      if (waiting != 0 && waiting != 32) fail("shuffle with a partial warp");
      for (int t = warp; waiting != 0 && t < warp + 32; ++t) fibers[t].state = kReady;
      released = released || waiting != 0;
    }
    if (released) continue;
    if (count(0, threads, kDone) == threads) return;
    if (count(0, threads, kAtBlockBarrier) != threads) fail("barrier that some threads have left");
    for (int t = 0; t < threads; ++t) fibers[t].state = kReady;
  }
}

inline void run(int64_t blocks, int threads, std::function<void()> kernel) {
  body = std::move(kernel);
  if (int(fibers.size()) < threads) fibers.resize(size_t(threads));
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx = {unsigned(b), 0, 0};
    if (shared_bytes + kGuardBytes > sizeof(shared)) fail("too much shared memory");
    std::memset(shared, 0xff, shared_bytes + kGuardBytes);
    run_block(threads);
    const unsigned char* guard = shared + shared_bytes;
    if (shared_bytes && std::any_of(guard, guard + kGuardBytes, [](unsigned char c) { return c != 0xff; })) {
      fail("write past the shared memory");
    }
  }
}

template <class T>
T shuffle(T value, int from) {
  const int me = current;
  std::memcpy(&fibers[me].slot, &value, sizeof(T));
  wait(kAtWarpBarrier);
  T result;
  std::memcpy(&result, &fibers[me / 32 * 32 + from].slot, sizeof(T));
  wait(kAtWarpBarrier);
  return result;
}

inline void check_alignment(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned access");
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::kAtBlockBarrier); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return emulated::shuffle(value, (emulated::current % 32) ^ lanes);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int lanes) {
  const int lane = emulated::current % 32;
  return emulated::shuffle(value, lane >= lanes ? lane - lanes : lane);
}
template <class T>
T __ldg(const T* p) {
  emulated::check_alignment(p, sizeof(T));
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  emulated::check_alignment(p, sizeof(T));
  *p = value;
}
inline float __uint_as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof(u));
  return u;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t(((uint64_t(high) << 32) | low) >> (shift & 31));
}

extern "C" __attribute__((used, visibility("default"))) inline void emulated_order(int order) {
  emulated::order = order;
}
