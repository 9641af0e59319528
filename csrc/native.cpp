// The developer's module `_native`: what this machine can do at most (reading, writing, copying memory, fused
// multiply-add), which benchmarks compare the ops with. Its threads are std::thread: a second OpenMP runtime in the
// process would keep spinning next to PyTorch's. Never part of a wheel.
//
// The file is its own FSS_CORE: without FSS_ISA it is the module, with FSS_ISA the code of one instruction set.
#ifndef FSS_ISA

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

#define FSS_CORE "native.cpp"
#include "common/each_isa.h"

namespace py = pybind11;

namespace fss {
namespace {

template <class T>
using array = py::array_t<T, py::array::c_style>;

// Keeps the calling thread on the t-th of the processors it may use: two busy threads on one would measure half.
class Pinned {
 public:
  explicit Pinned(int t) {
#ifdef __linux__
    sched_getaffinity(0, sizeof(before_), &before_);
    t %= CPU_COUNT(&before_);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &before_) || t-- > 0) continue;
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      sched_setaffinity(0, sizeof(one), &one);
      break;
    }
#else
    (void)t;
#endif
  }
  ~Pinned() {
#ifdef __linux__
    sched_setaffinity(0, sizeof(before_), &before_);
#endif
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

 private:
#ifdef __linux__
  cpu_set_t before_;
#endif
};

// Seconds from a common start until part(0) .. part(threads - 1), one a thread, have all returned.
template <class F>
double timed(int threads, const F& part) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  std::atomic<int> waiting{0}, finished{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> workers;  // started before this thread is pinned: they inherit what it may use
  for (int t = 1; t < threads; ++t) {
    workers.emplace_back([&, t] {
      const Pinned pinned(t);
      ++waiting;
      while (!go) {
      }
      part(t);
      ++finished;
    });
  }
  const Pinned pinned(0);
  while (waiting < threads - 1) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go = true;
  part(0);
  while (finished < threads - 1) {
  }
  const auto end = std::chrono::steady_clock::now();
  for (std::thread& worker : workers) worker.join();
  return std::chrono::duration<double>(end - start).count();
}

// Part t of n elements, in whole cache lines.
std::pair<int64_t, int64_t> part_of(int64_t n, int threads, int t) {
  const int64_t lines = n / 16;
  return {lines * t / threads * 16, t == threads - 1 ? n : lines * (t + 1) / threads * 16};
}

constexpr int kPatterns = 8;  // 1, 2, 4 or 8 streams a thread, without and with software prefetch

double read_seconds(const array<float>& source, int threads, int pattern) {
  using read = float (*)(const float*, int64_t);
  const std::array<read, kPatterns> reads = {
      FSS_FOR_ISA(ceilings::read<1, false>), FSS_FOR_ISA(ceilings::read<2, false>),
      FSS_FOR_ISA(ceilings::read<4, false>), FSS_FOR_ISA(ceilings::read<8, false>),
      FSS_FOR_ISA(ceilings::read<1, true>),  FSS_FOR_ISA(ceilings::read<2, true>),
      FSS_FOR_ISA(ceilings::read<4, true>),  FSS_FOR_ISA(ceilings::read<8, true>)};
  const read chosen = reads.at(size_t(pattern));
  const float* data = source.data();
  std::atomic<float> sink{0};
  return timed(threads, [&](int t) {
    const auto [begin, end] = part_of(source.size(), threads, t);
    sink = chosen(data + begin, end - begin);
  });
}

double copy_seconds(const array<float>& source, array<float>& target, int threads) {
  if (source.size() != target.size()) throw std::invalid_argument("source and target differ in size");
  const auto copy = FSS_FOR_ISA(ceilings::copy);
  const float* from = source.data();
  float* to = target.mutable_data();
  return timed(threads, [&](int t) {
    const auto [begin, end] = part_of(source.size(), threads, t);
    copy(from + begin, to + begin, end - begin);
  });
}

double write_seconds(array<float>& target, int threads) {
  const auto fill = FSS_FOR_ISA(ceilings::fill);
  float* to = target.mutable_data();
  return timed(threads, [&](int t) {
    const auto [begin, end] = part_of(target.size(), threads, t);
    fill(to + begin, end - begin);
  });
}

double gflops(int threads, int64_t (*multiply_add)(int64_t, float*)) {
  constexpr int64_t kSteps = 4'000'000;
  std::atomic<int64_t> flops{0};
  std::atomic<float> sink{0};
  const double seconds = timed(threads, [&](int) {
    float result = 0;
    flops += multiply_add(kSteps, &result);
    sink = result;
  });
  return double(flops) / seconds * 1e-9;
}

double fma_gflops(int threads) { return gflops(threads, FSS_FOR_ISA(ceilings::multiply_add)); }

#if FSS_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
// 12 independent chains of sums of two bfloat16 products a lane. Returns the operations.
int64_t multiply_add_pairs(int64_t steps, float* result) {
  constexpr int kChains = 12;
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80), b = (__m512bh)_mm512_set1_epi32(0x3a833a83);
  __m512 x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = _mm512_set1_ps(float(c));
  for (int64_t i = 0; i < steps; ++i) {
    for (int c = 0; c < kChains; ++c) x[c] = _mm512_dpbf16_ps(x[c], a, b);
  }
  for (int c = 1; c < kChains; ++c) x[0] = _mm512_add_ps(x[0], x[c]);
  *result = _mm512_cvtss_f32(x[0]);
  return 4 * steps * kChains * 16;
}
#pragma GCC pop_options
#endif

// Where kernels screen with bfloat16 products: their rate; elsewhere that of fma_gflops.
double screen_gflops(int threads) {
#if FSS_X86_VARIANTS
  if (cpu_isa() == Isa::avx512_bf16) return gflops(threads, &multiply_add_pairs);
#endif
  return fma_gflops(threads);
}

}  // namespace
}  // namespace fss

PYBIND11_MODULE(_native, m) {
  m.doc() = "The ceilings of this machine.";
  m.attr("read_patterns") = fss::kPatterns;
  m.def("read_seconds", &fss::read_seconds, py::arg("source").noconvert(), py::arg("threads"), py::arg("pattern") = 0);
  m.def("copy_seconds", &fss::copy_seconds, py::arg("source").noconvert(), py::arg("target").noconvert(),
        py::arg("threads"));
  m.def("write_seconds", &fss::write_seconds, py::arg("target").noconvert(), py::arg("threads"));
  m.def("fma_gflops", &fss::fma_gflops, py::arg("threads"));
  m.def("screen_gflops", &fss::screen_gflops, py::arg("threads"));
}

#else  // one instruction set

namespace fss {
namespace FSS_ISA {
namespace ceilings {

// Sums n floats as Streams equal parts read side by side, with 16 independent vectors of partial sums.
template <int Streams, bool Prefetch>
float read(const float* p, int64_t n) {
  constexpr int kUnroll = 16 / Streams;
  constexpr int64_t kStep = kUnroll * lanes<float>;
  constexpr int64_t kAhead = 512;  // floats
  const int64_t part = n / Streams / kStep * kStep;
  vfloat sums[Streams][kUnroll] = {};
  for (int64_t i = 0; i < part; i += kStep) {
    for (int s = 0; s < Streams; ++s) {
      const float* from = p + s * part + i;
      if (Prefetch) {
        for (int64_t line = 0; line < kStep; line += 16) __builtin_prefetch(from + kAhead + line);
      }
      for (int u = 0; u < kUnroll; ++u) sums[s][u] += load(from + u * lanes<float>);
    }
  }
  float total = 0;
  for (int s = 0; s < Streams; ++s) {
    for (int u = 0; u < kUnroll; ++u) total += sum<float>(sums[s][u]);
  }
  for (int64_t i = Streams * part; i < n; ++i) total += p[i];
  return total;
}

// The index from which p is aligned to a cache line.
inline int64_t aligned_from(const float* p, int64_t n) {
  return std::min<int64_t>(n, int64_t((64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(float)));
}

inline void copy(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  for (const int64_t head = aligned_from(to, n); i < head; ++i) to[i] = from[i];
  for (; i + 64 <= n; i += 64) {
    for (int j = 0; j < 64; j += lanes<float>) stream(to + i + j, load(from + i + j));
  }
  for (; i < n; ++i) to[i] = from[i];
  stream_fence();
}

inline void fill(float* to, int64_t n) {
  const vfloat one = broadcast(1.0f);
  int64_t i = 0;
  for (const int64_t head = aligned_from(to, n); i < head; ++i) to[i] = 1;
  for (; i + 64 <= n; i += 64) {
    for (int j = 0; j < 64; j += lanes<float>) stream(to + i + j, one);
  }
  for (; i < n; ++i) to[i] = 1;
  stream_fence();
}

// 12 independent chains of x = x * a + b: as many as hide the latency and fit 16 registers. Returns the operations.
inline int64_t multiply_add(int64_t steps, float* result) {
  constexpr int kChains = 12;
  const vfloat a = broadcast(0.999f), b = broadcast(0.001f);
  vfloat x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = broadcast(float(c));
  for (int64_t i = 0; i < steps; ++i) {
    for (int c = 0; c < kChains; ++c) x[c] = x[c] * a + b;
  }
  for (int c = 1; c < kChains; ++c) x[0] += x[c];
  *result = sum<float>(x[0]);
  return 2 * steps * kChains * lanes<float>;
}

}  // namespace ceilings
}  // namespace FSS_ISA
}  // namespace fss

#endif
