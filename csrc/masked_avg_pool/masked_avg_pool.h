// Masked average pooling on raw pointers. Torch-free; compiled once per instruction set by common/each_isa.h.
//
//   pooled[b,m,c] = sum_n w[b,m,n] x[b,c,n] / (area[b,m] + eps),   area = sum_n w,   w = mask resized to the grid
//
// x is N = H*W pixels by C channels, stored as planes (NCHW: a row is one channel) or as channels_last (a row is one
// pixel). In both layouts every step is one of two row operations, so that rows are always read or written in order:
//   dot_rows         several rows of x against M operand rows   forward on planes, mask gradient on channels_last
//   accumulate_rows  M weighted sums of rows of x               forward on channels_last, mask gradient on planes
// and the gradient to the features is combine_row: one row as a sum of M operand rows.
//
// Parallel decomposition: a task is a fixed piece of the output, so results do not depend on the number of threads.
// Memory traffic: x is read once for all masks, 64-pixel blocks on which every mask is 0 are not read; the gradient
// is written once. Accumulation: float (double for double), at most 256 terms per lane before a second level.
// Limits: 64-bit offsets everywhere; columns of the mask contiguous.

#ifndef FSS_MASKED_AVG_POOL_H
#define FSS_MASKED_AVG_POOL_H

namespace fss {
namespace masked_avg_pool {

struct PoolArgs {
  int64_t batch, masks, channels, pixels;
  double eps;
  const void* features;
  bool channels_last;  // rows are pixels (row = stride_n) instead of channels (row = stride_c)
  int64_t stride_b, stride_row;
  const void* weights;  // w, dense (B, M, N), accumulation type
  void* area;           // (B, M), accumulation type
  void* pooled;         // (B, M, C), features' type
  const void* grad;     // gradient of pooled
  void* grad_features;  // dense, same layout as features
  bool stream;          // write grad_features past the caches
  void* moments;        // (B, M, N): sum_c grad x, then the gradient to w
};

constexpr int64_t kRows = 8;           // rows of x handled together: as many streams as keep memory busy
constexpr int64_t kPrefetchLines = 4;  // of each of the next kRows rows: a stream is slow to start
constexpr int64_t kBlock = 64;         // pixels: granularity at which pixels without weight are skipped
constexpr int64_t kColumns = 1024;     // pixels of one task, mask gradient on planes
constexpr int64_t kRowsPerLevel = 64;  // rows accumulated between two second-level additions
constexpr int64_t kSlab = 256;         // channels of one task, channels_last forward
constexpr int64_t kPixelTask = 64;     // pixels of one task, channels_last backward

// Number of tasks of each step.
inline int64_t pool_tasks(const PoolArgs& a) {
  return a.batch * (a.channels_last ? ceil_div(a.channels, kSlab) : ceil_div(a.channels, kRows));
}
inline int64_t grad_features_tasks(const PoolArgs& a) {
  return a.batch * (a.channels_last ? ceil_div(a.pixels, kPixelTask) : a.channels);
}
inline int64_t moments_tasks(const PoolArgs& a) {
  return a.batch * ceil_div(a.pixels, a.channels_last ? kPixelTask : kColumns);
}

}  // namespace masked_avg_pool
}  // namespace fss
#endif

#ifdef FSS_ISA
namespace fss {
namespace FSS_ISA {
namespace masked_avg_pool {

using namespace ::fss::masked_avg_pool;

// Columns of a dot product between two second-level additions. Long runs keep the streams going; without AVX-512 each
// mask reads its run of x again, so the run has to stay in L1.
constexpr int64_t kRun = FSS_ISA_LEVEL == 2 ? 4096 : 512;

// ---- row operations -------------------------------------------------------------------------------------------------

struct Span {  // columns [begin, end)
  int64_t begin, end;
};

// total[row][mask] += x[row] . operand[mask] over one span, MN masks at a time. With Select, a column whose operand is
// 0 does not count, whatever x holds there; without, it may turn the sum into NaN.
template <class T, bool Select, int MN, class A>
inline void dot_span(const T* const* x, const A* operand, int64_t operand_stride, Span span, A* total,
                     int64_t total_stride) {
  vec<A> sums[kRows][MN] = {};
  int64_t n = span.begin;
  for (; n + lanes<A> <= span.end; n += lanes<A>) {
    vec<A> w[MN];
    for (int m = 0; m < MN; ++m) w[m] = load(operand + m * operand_stride + n);
    for (int r = 0; r < kRows; ++r) {
      const vec<A> value = load(x[r] + n);
      for (int m = 0; m < MN; ++m) sums[r][m] += w[m] * (Select ? keep_where_nonzero<A>(value, w[m]) : value);
    }
  }
  if (n < span.end) {
    for (int m = 0; m < MN; ++m) {
      const vec<A> w = load_partial(operand + m * operand_stride + n, span.end - n);
      for (int r = 0; r < kRows; ++r) {
        const vec<A> value = load_partial(x[r] + n, span.end - n);
        sums[r][m] += w * (Select ? keep_where_nonzero<A>(value, w) : value);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int m = 0; m < MN; ++m) {
      A* t = total + r * total_stride + m * lanes<A>;
      store(t, load(t) + sums[r][m]);
    }
  }
}

// total (kRows, masks, lanes) = kRows rows of x against `masks` operand rows, over all spans.
template <class T, bool Select, class A>
void dot_rows(const T* const* x, const A* operand, int64_t operand_stride, int64_t masks,
              const std::vector<Span>& spans, std::vector<A>& total) {
  const int64_t total_stride = masks * lanes<A>;
  std::fill(total.begin(), total.end(), A(0));
  for (const Span& span : spans) {
    int64_t m = 0;
    if constexpr (FSS_ISA_LEVEL == 2) {  // kRows * 2 sums fit the 32 registers of AVX-512
      for (; m + 2 <= masks; m += 2) {
        dot_span<T, Select, 2>(x, operand + m * operand_stride, operand_stride, span, total.data() + m * lanes<A>,
                               total_stride);
      }
    }
    for (; m < masks; ++m) {
      dot_span<T, Select, 1>(x, operand + m * operand_stride, operand_stride, span, total.data() + m * lanes<A>,
                             total_stride);
    }
  }
}

// sums[m][column] += coefficient[m][0..kRows) of kRows rows of x. Select as above, on the coefficient.
template <class T, bool Select, class A>
inline void accumulate_rows(const T* const* x, const A* coefficient, int64_t masks, int64_t columns, A* sums,
                            int64_t sums_stride) {
  for (int64_t n = 0; n < columns; n += lanes<A>) {
    const int64_t count = std::min<int64_t>(columns - n, lanes<A>);
    const bool whole = count == lanes<A>;
    vec<A> value[kRows];
    for (int r = 0; r < kRows; ++r) value[r] = whole ? load(x[r] + n) : load_partial(x[r] + n, count);
    for (int64_t m = 0; m < masks; ++m) {
      A* to = sums + m * sums_stride + n;  // rows of sums are padded to whole vectors
      vec<A> s = load(to);
      for (int r = 0; r < kRows; ++r) {
        const vec<A> k = broadcast(coefficient[m * kRows + r]);
        s += k * (Select ? keep_where_nonzero<A>(value[r], k) : value[r]);
      }
      store(to, s);
    }
  }
}

// out[0..columns) = sum_m coefficient[m] * operand[m], written in whole 64-byte lines wherever they are aligned.
template <class T, class A>
inline void combine_row(T* out, int64_t columns, const A* operand, int64_t operand_stride, const A* coefficient,
                        int64_t masks, bool stream_past) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  constexpr int vectors = int(line / lanes<A>);
  const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(out) % 64) / int64_t(sizeof(T));
  const int64_t head = stream_past ? std::min(columns, (line - misaligned) % line) : 0;
  int64_t n = 0;
  while (n < columns) {
    if (n >= head && n + line <= columns) {
      vec<A> s[vectors] = {};
      for (int64_t m = 0; m < masks; ++m) {
        const vec<A> k = broadcast(coefficient[m]);
        for (int v = 0; v < vectors; ++v) s[v] += k * load(operand + m * operand_stride + n + v * lanes<A>);
      }
      for (int v = 0; v < vectors; ++v) {
        stream_past ? stream(out + n + v * lanes<A>, s[v]) : store(out + n + v * lanes<A>, s[v]);
      }
      n += line;
    } else {
      const int64_t end = n < head ? head : columns;
      const int64_t count = std::min<int64_t>(end - n, lanes<A>);
      vec<A> s = {};
      for (int64_t m = 0; m < masks; ++m) {
        s += broadcast(coefficient[m]) * load_partial(operand + m * operand_stride + n, count);
      }
      store_partial(out + n, s, count);
      n += count;
    }
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class A>
inline A denominator(const PoolArgs& args, int64_t image) {
  return static_cast<const A*>(args.area)[image] + A(args.eps);
}

// area[b,m], task = (b,m). Summed in double so that it is as exact as the weights.
template <class A>
void sum_weights(const PoolArgs& args, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image) {
    const A* w = static_cast<const A*>(args.weights) + image * args.pixels;
    double sums[8] = {};
    int64_t n = 0;
    for (; n + 8 <= args.pixels; n += 8) {
      for (int i = 0; i < 8; ++i) sums[i] += double(w[n + i]);
    }
    for (int i = 0; n < args.pixels; ++n, ++i) sums[i] += double(w[n]);
    static_cast<A*>(args.area)[image] =
        A(((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7])));
  }
}

template <class A>
inline bool weightless(const A* weights, int64_t stride, int64_t masks, int64_t begin, int64_t end) {
  for (int64_t m = 0; m < masks; ++m) {
    for (int64_t n = begin; n < end; ++n) {
      if (weights[m * stride + n] != 0) return false;
    }
  }
  return true;
}

// Spans of at most kRun pixels that cover every pixel with a weight.
template <class A>
std::vector<Span> weighted_spans(const A* weights, int64_t pixels, int64_t masks) {
  std::vector<Span> spans;
  for (int64_t n = 0; n < pixels; n += kBlock) {
    const int64_t end = std::min(n + kBlock, pixels);
    if (weightless(weights, pixels, masks, n, end)) continue;
    if (!spans.empty() && spans.back().end == n && end - spans.back().begin <= kRun) {
      spans.back().end = end;
    } else {
      spans.push_back({n, end});
    }
  }
  return spans;
}

template <class A>
inline bool finite(const std::vector<A>& values) {
  A all = 0;
  for (A v : values) all += v - v;  // NaN once any v is NaN or infinite
  return all == 0;
}

template <class T>
void pool_planes(const PoolArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t blocks = ceil_div(args.channels, kRows);
  std::vector<A> total(size_t(kRows * args.masks * lanes<A>));
  std::vector<Span> spans;
  int64_t spans_of = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, c0 = task % blocks * kRows;
    const A* weights = static_cast<const A*>(args.weights) + b * args.masks * args.pixels;
    if (spans_of != b) {
      spans = weighted_spans(weights, args.pixels, args.masks);
      spans_of = b;
    }
    const T* x[kRows];  // past the last channel, the last channel again
    for (int64_t r = 0; r < kRows; ++r) {
      x[r] = static_cast<const T*>(args.features) + b * args.stride_b +
             std::min(c0 + r, args.channels - 1) * args.stride_row;
    }
    if (c0 + kRows < args.channels && !spans.empty()) {
      for (int64_t r = 0; r < kRows; ++r) {
        const char* next = reinterpret_cast<const char*>(x[0] + (kRows + r) * args.stride_row + spans[0].begin);
        for (int64_t i = 0; i < kPrefetchLines; ++i) __builtin_prefetch(next + 64 * i);
      }
    }
    dot_rows<T, false>(x, weights, args.pixels, args.masks, spans, total);
    if (!finite(total)) dot_rows<T, true>(x, weights, args.pixels, args.masks, spans, total);
    for (int64_t m = 0; m < args.masks; ++m) {
      const A d = denominator<A>(args, b * args.masks + m);
      T* pooled = static_cast<T*>(args.pooled) + (b * args.masks + m) * args.channels;
      for (int64_t r = 0; r < std::min(kRows, args.channels - c0); ++r) {
        const A s = sum<A>(load(total.data() + (r * args.masks + m) * lanes<A>));
        pooled[c0 + r] = narrow<T>(d == 0 ? A(0) : s / d);
      }
    }
  }
}

template <class T, bool Select, class A>
void pool_slab(const PoolArgs& args, const T* x, const A* weights, const std::vector<int64_t>& pixels, int64_t columns,
               int64_t padded, std::vector<A>& coefficient, std::vector<A>& level, std::vector<A>& total) {
  std::fill(total.begin(), total.end(), A(0));
  const int64_t count = int64_t(pixels.size());
  for (int64_t i0 = 0; i0 < count; i0 += kRowsPerLevel) {
    std::fill(level.begin(), level.end(), A(0));
    for (int64_t i = i0; i < std::min(i0 + kRowsPerLevel, count); i += kRows) {
      const T* rows[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t n = pixels[size_t(std::min(i + r, count - 1))];  // past the end: the last pixel with weight 0
        rows[r] = x + n * args.stride_row;
        for (int64_t m = 0; m < args.masks; ++m) {
          coefficient[size_t(m * kRows + r)] = i + r < count ? weights[m * args.pixels + n] : A(0);
        }
      }
      accumulate_rows<T, Select>(rows, coefficient.data(), args.masks, columns, level.data(), padded);
    }
    for (size_t j = 0; j < total.size(); ++j) total[j] += level[j];
  }
}

template <class T>
void pool_channels_last(const PoolArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t slabs = ceil_div(args.channels, kSlab);
  const int64_t padded = ceil_div(std::min(kSlab, args.channels), lanes<A>) * lanes<A>;
  std::vector<A> coefficient(size_t(args.masks * kRows));
  std::vector<A> level(size_t(args.masks * padded)), total(level.size());
  std::vector<int64_t> pixels;  // those with a weight
  int64_t pixels_of = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / slabs, c0 = task % slabs * kSlab;
    const int64_t columns = std::min(kSlab, args.channels - c0);
    const A* weights = static_cast<const A*>(args.weights) + b * args.masks * args.pixels;
    if (pixels_of != b) {
      pixels.clear();
      for (int64_t n = 0; n < args.pixels; ++n) {
        if (!weightless(weights, args.pixels, args.masks, n, n + 1)) pixels.push_back(n);
      }
      pixels_of = b;
    }
    const T* x = static_cast<const T*>(args.features) + b * args.stride_b + c0;
    pool_slab<T, false>(args, x, weights, pixels, columns, padded, coefficient, level, total);
    if (!finite(total)) pool_slab<T, true>(args, x, weights, pixels, columns, padded, coefficient, level, total);
    for (int64_t m = 0; m < args.masks; ++m) {
      const A d = denominator<A>(args, b * args.masks + m);
      T* pooled = static_cast<T*>(args.pooled) + (b * args.masks + m) * args.channels + c0;
      for (int64_t c = 0; c < columns; ++c) {
        pooled[c] = narrow<T>(d == 0 ? A(0) : total[size_t(m * padded + c)] / d);
      }
    }
  }
}

template <class T>
void pool(const PoolArgs& args, int64_t begin, int64_t end) {
  args.channels_last ? pool_channels_last<T>(args, begin, end) : pool_planes<T>(args, begin, end);
}

// ---- gradient to the features ---------------------------------------------------------------------------------------

// grad / (area + eps), 0 where the denominator is 0.
template <class T, class A>
inline A scaled_grad(const PoolArgs& args, int64_t image, int64_t c) {
  const A d = denominator<A>(args, image);
  return d == 0 ? A(0) : widen<A>(static_cast<const T*>(args.grad)[image * args.channels + c]) / d;
}

template <class T>
void grad_features(const PoolArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  T* out = static_cast<T*>(args.grad_features);
  std::vector<A> coefficient(size_t(args.masks)), scaled;
  if (!args.channels_last) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / args.channels, c = task % args.channels;
      for (int64_t m = 0; m < args.masks; ++m) {
        coefficient[size_t(m)] = scaled_grad<T, A>(args, b * args.masks + m, c);
      }
      combine_row(out + task * args.pixels, args.pixels,
                  static_cast<const A*>(args.weights) + b * args.masks * args.pixels, args.pixels, coefficient.data(),
                  args.masks, args.stream);
    }
  } else {
    const int64_t chunks = ceil_div(args.pixels, kPixelTask);
    int64_t scaled_of = -1;
    scaled.resize(size_t(args.masks * args.channels));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks, n0 = task % chunks * kPixelTask;
      if (scaled_of != b) {
        for (int64_t m = 0; m < args.masks; ++m) {
          for (int64_t c = 0; c < args.channels; ++c) {
            scaled[size_t(m * args.channels + c)] = scaled_grad<T, A>(args, b * args.masks + m, c);
          }
        }
        scaled_of = b;
      }
      const A* weights = static_cast<const A*>(args.weights) + b * args.masks * args.pixels;
      for (int64_t n = n0; n < std::min(n0 + kPixelTask, args.pixels); ++n) {
        for (int64_t m = 0; m < args.masks; ++m) coefficient[size_t(m)] = weights[m * args.pixels + n];
        combine_row(out + (b * args.pixels + n) * args.channels, args.channels, scaled.data(), args.channels,
                    coefficient.data(), args.masks, args.stream);
      }
    }
  }
  if (args.stream) stream_fence();
}

// ---- gradient to the resized mask -----------------------------------------------------------------------------------
//
// dL/dw[n] = (t[n] - sum_k w[k] t[k] / d) / d   with t[n] = sum_c grad[c] x[c,n] and d = area + eps: the pooled vector
// itself is not needed, so its rounding does not enter.

// grad (B, M, C) of one sample in the accumulation type, each row padded to whole vectors.
template <class T, class A>
void widen_grad(const PoolArgs& args, int64_t b, int64_t padded, std::vector<A>& grad) {
  grad.assign(size_t(args.masks * padded), A(0));
  const T* from = static_cast<const T*>(args.grad) + b * args.masks * args.channels;
  for (int64_t m = 0; m < args.masks; ++m) {
    for (int64_t c = 0; c < args.channels; ++c) grad[size_t(m * padded + c)] = widen<A>(from[m * args.channels + c]);
  }
}

// A NaN or infinite x where the mask is 0 does not count: such elements of t are summed again without it.
template <class T, class A>
void repair_moments(const PoolArgs& args, int64_t b, int64_t n0, int64_t n1) {
  const T* grad = static_cast<const T*>(args.grad) + b * args.masks * args.channels;
  for (int64_t m = 0; m < args.masks; ++m) {
    const A* w = static_cast<const A*>(args.weights) + (b * args.masks + m) * args.pixels;
    A* t = static_cast<A*>(args.moments) + (b * args.masks + m) * args.pixels;
    for (int64_t n = n0; n < n1; ++n) {
      if (w[n] != 0 || std::isfinite(t[n])) continue;
      A s = 0;
      for (int64_t c = 0; c < args.channels; ++c) {
        const int64_t offset = args.channels_last ? n * args.stride_row + c : c * args.stride_row + n;
        const A x = widen<A>(static_cast<const T*>(args.features)[b * args.stride_b + offset]);
        if (std::isfinite(x)) s += widen<A>(grad[m * args.channels + c]) * x;
      }
      t[n] = s;
    }
  }
}

template <class T>
void moments_planes(const PoolArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t chunks = ceil_div(args.pixels, kColumns);
  const int64_t padded = ceil_div(std::min(kColumns, args.pixels), lanes<A>) * lanes<A>;
  std::vector<A> coefficient(size_t(args.masks * kRows)), level(size_t(args.masks * padded)), total(level.size());
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / chunks, n0 = task % chunks * kColumns;
    const int64_t columns = std::min(kColumns, args.pixels - n0);
    const T* grad = static_cast<const T*>(args.grad) + b * args.masks * args.channels;
    const T* x = static_cast<const T*>(args.features) + b * args.stride_b + n0;
    std::fill(total.begin(), total.end(), A(0));
    for (int64_t c0 = 0; c0 < args.channels; c0 += kRowsPerLevel) {
      std::fill(level.begin(), level.end(), A(0));
      for (int64_t c = c0; c < std::min(c0 + kRowsPerLevel, args.channels); c += kRows) {
        const T* rows[kRows];
        for (int64_t r = 0; r < kRows; ++r) {  // past the last channel: the last channel with coefficient 0
          rows[r] = x + std::min(c + r, args.channels - 1) * args.stride_row;
          for (int64_t m = 0; m < args.masks; ++m) {
            coefficient[size_t(m * kRows + r)] =
                c + r < args.channels ? widen<A>(grad[m * args.channels + c + r]) : A(0);
          }
        }
        accumulate_rows<T, false>(rows, coefficient.data(), args.masks, columns, level.data(), padded);
      }
      for (size_t j = 0; j < total.size(); ++j) total[j] += level[j];
    }
    for (int64_t m = 0; m < args.masks; ++m) {
      std::copy_n(total.data() + m * padded, columns,
                  static_cast<A*>(args.moments) + (b * args.masks + m) * args.pixels + n0);
    }
    repair_moments<T, A>(args, b, n0, n0 + columns);
  }
}

template <class T>
void moments_channels_last(const PoolArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t chunks = ceil_div(args.pixels, kPixelTask);
  const int64_t padded = ceil_div(args.channels, lanes<A>) * lanes<A>;
  std::vector<A> grad, total(size_t(kRows * args.masks * lanes<A>));
  std::vector<Span> spans;
  for (int64_t c = 0; c < args.channels; c += kRun) spans.push_back({c, std::min(c + kRun, args.channels)});
  int64_t grad_of = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / chunks, n0 = task % chunks * kPixelTask;
    const int64_t n1 = std::min(n0 + kPixelTask, args.pixels);
    if (grad_of != b) {
      widen_grad<T, A>(args, b, padded, grad);
      grad_of = b;
    }
    for (int64_t n = n0; n < n1; n += kRows) {
      const T* rows[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        rows[r] = static_cast<const T*>(args.features) + b * args.stride_b + std::min(n + r, n1 - 1) * args.stride_row;
      }
      dot_rows<T, false>(rows, grad.data(), padded, args.masks, spans, total);
      for (int64_t m = 0; m < args.masks; ++m) {
        A* t = static_cast<A*>(args.moments) + (b * args.masks + m) * args.pixels;
        for (int64_t r = 0; r < std::min(kRows, n1 - n); ++r) {
          t[n + r] = sum<A>(load(total.data() + (r * args.masks + m) * lanes<A>));
        }
      }
    }
    repair_moments<T, A>(args, b, n0, n1);
  }
}

template <class T>
void moments(const PoolArgs& args, int64_t begin, int64_t end) {
  args.channels_last ? moments_channels_last<T>(args, begin, end) : moments_planes<T>(args, begin, end);
}

// moments -> gradient to w, in place; task = (b,m). In double: with few pixels t and its mean nearly cancel.
template <class A>
void grad_weights(const PoolArgs& args, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image) {
    const A* w = static_cast<const A*>(args.weights) + image * args.pixels;
    A* t = static_cast<A*>(args.moments) + image * args.pixels;
    double area = 0, mean = 0;
    for (int64_t n = 0; n < args.pixels; ++n) {
      area += double(w[n]);
      mean += double(w[n]) * double(t[n]);
    }
    const double d = area + args.eps;
    const bool empty = denominator<A>(args, image) == 0;  // decided as in the forward
    for (int64_t n = 0; n < args.pixels; ++n) t[n] = empty ? A(0) : A((double(t[n]) - mean / d) / d);
  }
}

}  // namespace masked_avg_pool
}  // namespace FSS_ISA
}  // namespace fss
#endif
