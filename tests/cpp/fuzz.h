// What the fuzzers of the cores share. csrc/<op>/<op>_fuzz.cpp defines FSS_CORE, includes this file and has the cases;
// FUZZ_ISA is the namespace under test, FUZZ_TYPES are the dtypes. Every case runs with its tasks on one thread and on
// four, into memory filled with another byte each time: the results have to be the same bits, so an element that nobody
// wrote is seen. What a core may not touch is poisoned, and a canary for stores that no sanitizer sees.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <thread>

#include "common/each_isa.h"

#define FUZZ_STRING_(x) #x
#define FUZZ_STRING(x) FUZZ_STRING_(x)

namespace fss {
namespace fuzz {

// ---- cases ----------------------------------------------------------------------------------------------------------

inline std::string current;  // the case at hand, for whoever ends the program

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::abort();
}

inline void print_case(int) {  // of SIGABRT, in which sanitizers end too
  // no allocation: ThreadSanitizer waits for ever on one inside of a signal
  [[maybe_unused]] const auto written =
      write(2, "failed: ", 8) + write(2, current.data(), current.size()) + write(2, "\n", 1);
}

template <class... Args>
void note(const Args&... args) {
  std::ostringstream text;
  ((text << ' ' << args), ...);
  current += text.str();
}

inline const char* name(float) { return "float"; }
inline const char* name(bfloat16) { return "bfloat16"; }
inline const char* name(float16) { return "float16"; }
inline const char* name(double) { return "double"; }

struct Random {
  std::mt19937_64 engine;

  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  bool chance(int percent) { return below(100) < percent; }
  double real() { return double(engine() >> 11) * 0x1p-53; }
  // From 1 to `most`, small ones often, and neighbours of the sizes of registers, lines and tiles.
  int64_t size(int64_t most) {
    int64_t n = int64_t(std::exp(real() * std::log(double(most) + 1)));
    if (chance(40)) n = (n + 7) / 8 * 8 + below(3) - 1;
    return std::min(std::max<int64_t>(n, 1), most);
  }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[below(int64_t(values.size()))];
  }
};

// ---- numbers --------------------------------------------------------------------------------------------------------

struct Doubles : std::vector<double> {  // zeros
  explicit Doubles(int64_t n) : std::vector<double>(static_cast<size_t>(n)) {}
  double& operator[](int64_t i) { return std::vector<double>::operator[](size_t(i)); }
};

template <class T>
double value(T x) {
  return double(x);
}
inline double value(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline double value(float16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  double v = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25);
  if (exponent == 31) v = fraction == 0 ? HUGE_VAL : NAN;
  return x.bits & 0x8000 ? -v : v;
}

template <class T>
T number(double x) {
  return generic::narrow<T>(accumulate_t<T>(x));
}

// Of a sum in the accumulation type, in terms of what it adds up: chains of a thousand equal terms are the worst. The
// loops that it is compared with are in double too.
template <class T>
constexpr double kSumError = std::is_same_v<T, double> ? 0x1p-40 : 0x1p-15;

// |got - want| within the rounding of T and that of a sum in the accumulation type, whose terms add up to `magnitude`;
// finite where `want` is and only there.
template <class T>
void close(const char* what, T got, double want, double magnitude) {
  constexpr double rounding = std::is_same_v<T, bfloat16> ? 0x1p-8 : std::is_same_v<T, float16> ? 0x1p-10 : 0;
  constexpr double floor = std::is_same_v<T, float16> ? 0x1p-24 : 1e-35;
  const double tolerance = rounding * std::abs(want) + kSumError<T> * (magnitude + std::abs(want)) + floor;
  if (std::is_same_v<T, float16> && std::abs(want) > 65000) return;  // may be infinite
  if (std::isfinite(want) ? !(std::abs(value(got) - want) <= tolerance) : std::isfinite(value(got))) {
    std::ostringstream text;
    text << what << " is " << value(got) << ", not " << want << " within " << tolerance;
    fail(text.str());
  }
}

// ---- memory ---------------------------------------------------------------------------------------------------------

constexpr int64_t kFar = (int64_t(1) << 31) + 64;  // a stride that does not fit 32 bits
constexpr int64_t kGuard = 128;                    // elements before and after an array

// Strided elements between guards. What is far apart lies in pages of its own and the rest of its memory is no memory.
template <class T>
class Array {
 public:
  Array(std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t shift, int fill)
      : sizes_(std::move(sizes)), strides_(std::move(strides)), fill_(fill) {
    int64_t last = 0;
    for (size_t d = 0; d < sizes_.size(); ++d) last += std::max<int64_t>(sizes_[d] - 1, 0) * strides_[d];
    bytes_ = size_t(count() == 0 ? shift + 2 * kGuard : last + 1 + shift + 2 * kGuard) * sizeof(T);
    far_ = bytes_ > (size_t(1) << 20) + size_t(16 * count()) * sizeof(T);
    if (far_) {
      void* pages = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (pages == MAP_FAILED) fail("mmap failed");
      memory_ = static_cast<char*>(pages);
    } else {
      memory_ = static_cast<char*>(std::aligned_alloc(64, (bytes_ + 63) / 64 * 64));
      std::memset(memory_, fill, bytes_);
      ASAN_POISON_MEMORY_REGION(memory_, bytes_);
    }
    data = reinterpret_cast<T*>(memory_) + kGuard + shift;
    each_run([&](T* run, int64_t n) {
      const size_t size = size_t(n) * sizeof(T);
      if (far_) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(run), page = uintptr_t(getpagesize()), from = at / page * page;
        if (mprotect(reinterpret_cast<void*>(from), at + size - from, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
        std::memset(static_cast<void*>(run), fill, size);
      }
      ASAN_UNPOISON_MEMORY_REGION(run, size);
    });
  }
  // Dense, its first element next to a cache line; of `apart` samples the last one besides the first, see Samples.
  Array(std::vector<int64_t> sizes, int fill, int64_t shift = 1, int64_t apart = 1)
      : Array(sizes, dense(sizes, apart), shift, fill) {}
  ~Array() {
    if (far_) {
      munmap(memory_, bytes_);
    } else {
      ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_);
      std::free(memory_);
    }
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  static std::vector<int64_t> dense(const std::vector<int64_t>& sizes, int64_t apart = 1) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
    strides[0] *= apart;
    return strides;
  }
  int64_t count() const {
    return std::accumulate(sizes_.begin(), sizes_.end(), int64_t(1), std::multiplies<int64_t>());
  }
  template <class... Index>
  T& operator()(Index... index) const {
    size_t d = 0;
    int64_t at = 0;
    ((at += index * strides_[d++]), ...);
    return data[at];
  }
  const std::vector<int64_t>& strides() const { return strides_; }

  // f(first, count) for runs of neighbours.
  template <class F>
  void each_run(const F& f) const {
    const int64_t total = count(), inner = sizes_.empty() || strides_.back() != 1 ? 1 : sizes_.back();
    for (int64_t i = 0; i < total; i += inner) {
      int64_t rest = i, at = 0;
      for (size_t d = sizes_.size(); d-- > 0; rest /= sizes_[d]) at += rest % sizes_[d] * strides_[d];
      f(data + at, inner);
    }
  }
  template <class F>
  void each(const F& f) const {
    each_run([&](T* run, int64_t n) {
      for (int64_t i = 0; i < n; ++i) f(run[i]);
    });
  }
  // Fails if a byte outside the elements has changed.
  void check_canaries(const char* what) const {
    if (far_) return;
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_);
    std::vector<char> own(bytes_, 0);
    each_run([&](T* run, int64_t n) {
      std::fill_n(own.begin() + (reinterpret_cast<char*>(run) - memory_), size_t(n) * sizeof(T), 1);
    });
    for (size_t i = 0; i < bytes_; ++i) {
      if (own[i] == 0 && memory_[i] != char(fill_)) {
        fail(std::string(what) + ": byte " + std::to_string(memory_ + i - reinterpret_cast<char*>(data)) +
             " is not its");
      }
    }
  }

  T* data;

 private:
  std::vector<int64_t> sizes_, strides_;
  int fill_;
  bool far_ = false;
  size_t bytes_ = 0;
  char* memory_ = nullptr;
};

// The results of two runs: the same bits, nothing beside them.
template <class T>
void same(const char* what, const Array<T>& first, const Array<T>& second) {
  first.check_canaries(what), second.check_canaries(what);
  std::vector<T> values;
  first.each([&](T x) { values.push_back(x); });
  size_t i = 0;
  second.each([&](T x) {
    const T one = values[i++];
    if (std::memcmp(&one, &x, sizeof(T)) == 0) return;
    std::ostringstream text;
    text << what << ": element " << i - 1 << " was not written or depends on the threads: " << value(one) << ", "
         << value(x);
    fail(text.str());
  });
}

// ---- tasks ----------------------------------------------------------------------------------------------------------

// f(begin, end) over [0, tasks), in equal parts, one a thread.
template <class F>
void run(int64_t tasks, int threads, const F& f) {
  if (tasks == 0) return;
  const int64_t parts = std::min<int64_t>(threads, tasks);
  std::vector<std::thread> workers;
  for (int64_t t = 1; t < parts; ++t) {
    workers.emplace_back([&, t] { f(tasks * t / parts, tasks * (t + 1) / parts); });
  }
  f(0, tasks / parts);
  for (std::thread& worker : workers) worker.join();
}

// The samples of a case: all of a batch; or, of one whose results have more than 2^31 elements, the first and the last,
// `apart` samples apart.
struct Samples {
  int64_t count, apart = 1;

  // Samples of `elements` in the array that is to pass kFar; not where others would fill what a sanitizer leaves to
  // map.
  Samples(Random& random, int64_t count, int64_t elements, int64_t largest) : count(count) {
    if (count == 2 && random.chance(20) && largest / elements < 4) apart = kFar / elements + 1;
    note("samples", count, "apart", apart);
  }
  int64_t batch() const { return apart == 1 ? count : apart + 1; }
  // f(begin, end) over the tasks of these samples, in equal parts, one a thread.
  template <class F>
  void run(int64_t tasks, int threads, const F& f) const {
    if (apart == 1) return fuzz::run(tasks, threads, f);
    const int64_t each = tasks / batch(), skipped = (apart - 1) * each;
    fuzz::run(2 * each, threads, [&](int64_t begin, int64_t end) {
      if (begin < each) f(begin, std::min(end, each));
      if (end > each) f(std::max(begin, each) + skipped, end + skipped);
    });
  }
};

// An input (B, C, N) as the cores take it, at random: planes or channels_last; dense, sliced, with samples and rows
// exchanged, repeated by a stride of 0, or far apart.
template <class T>
struct Features {
  bool channels_last;
  int64_t stride_b, stride_row;
  Array<T> array;

  Features(Random& random, int64_t batch, int64_t channels, int64_t pixels, bool last, double scale = 1,
           int64_t apart = 1)
      : Features(random, last, strides(random, batch, last ? pixels : channels, last ? channels : pixels, apart), batch,
                 last ? pixels : channels, last ? channels : pixels, apart) {
    array.each([&](T& x) { x = number<T>((2 * random.real() - 1) * scale); });
  }
  T& operator()(int64_t b, int64_t c, int64_t n) const { return channels_last ? array(b, n, c) : array(b, c, n); }

 private:
  using Strides = std::pair<int64_t, int64_t>;
  Features(Random& random, bool last, Strides s, int64_t batch, int64_t rows, int64_t columns, int64_t apart)
      : channels_last(last),
        stride_b(s.first),
        stride_row(s.second),
        array({batch, rows, columns}, {s.first * apart, s.second, 1}, random.below(4), 0xff) {
    note("strides", stride_b, stride_row, channels_last ? "channels_last" : "planes");
  }
  static Strides strides(Random& random, int64_t batch, int64_t rows, int64_t columns, int64_t apart) {
    const int64_t row = columns + (random.chance(40) ? random.size(40) : 0);
    const int64_t sample = row * rows + (random.chance(40) ? random.size(40) : 0);
    switch (apart > 1 ? -1 : random.below(20)) {
      case 0:
        return {row, row * std::max<int64_t>(batch, 1)};
      case 1:
        return {0, row};
      case 2:
        return {sample, 0};
      case 3:
        return {kFar * (rows <= 8 ? 8 : 1), rows <= 8 ? kFar : row};
      default:
        return {sample, row};
    }
  }
};

// A dense output (B, C, N) in the layout of an input.
template <class T>
struct Dense {
  bool channels_last;
  Array<T> array;

  Dense(int64_t batch, int64_t channels, int64_t pixels, bool last, int fill, int64_t shift, int64_t apart = 1)
      : channels_last(last), array({batch, last ? pixels : channels, last ? channels : pixels}, fill, shift, apart) {}
  T& operator()(int64_t b, int64_t c, int64_t n) const { return channels_last ? array(b, n, c) : array(b, c, n); }
};

// ---- main -----------------------------------------------------------------------------------------------------------

// program seed first count: f(T, random) for the cases [first, first + count) of a seed, with the dtypes in turn.
template <class... Types, class F>
int cases(const char* op, int argc, char** argv, const F& f) {
  if (argc != 4) return 2;
  std::signal(SIGABRT, print_case);
  const int64_t first = std::atoll(argv[2]), count = std::atoll(argv[3]);
  for (int64_t i = first; i < first + count; ++i) {
    Random random{std::mt19937_64(uint64_t(std::atoll(argv[1])) * 1000003 + uint64_t(i))};
    int64_t type = 0;
    const auto run_if = [&](auto x) {
      if (type++ != i % int64_t(sizeof...(Types))) return;
      std::ostringstream text;
      text << op << " " FUZZ_STRING(FUZZ_ISA) " seed " << argv[1] << " case " << i << ": " << name(x);
      current = text.str();
      f(x, random);
    };
    (run_if(Types{}), ...);
  }
  return 0;
}

}  // namespace fuzz
}  // namespace fss
