// Cosine of every pixel with every prototype, on raw pointers. Torch-free; compiled once per instruction set by
// common/each_isa.h.
//
//   cosine[b,p,n] = sum_c x[b,c,n] w[p,c] / (N(|x[b,:,n]|) N(|w[p]|)),   score = scale cosine     N: common/cosine.h
//   dL/dx[c,n] = sum_p k[p,n] u[p,c] - s[n] x[c,n]     u[p] = w[p] / N(|w[p]|)
//   dL/du[p,c] = sum_n k[p,n] x[c,n]                   k[p,n] = scale g[p,n] / N(|x[n]|)
//   dL/dw[p] = dL/du / N - w (w . dL/du) / (|w| N^2)   s[n] = scale sum_p g[p,n] cosine[p,n] / (|x[n]| N(|x[n]|))
//
// s leaves the range of A before |x| does: short pixels, which no network has, get their gradient in a step of its own.
//
// x is N = H*W pixels by C channels, stored as planes (NCHW: a row is one channel) or as channels_last (a row is one
// pixel). Every step is one of three row operations, so that rows are always read or written in order:
//   accumulate_rows  weighted sums of rows of x    forward on planes, prototype gradient on channels_last
//                    (accumulate_tiles: the same sums, faster on AVX2)
//   dot_rows         rows of x against P operands  forward on channels_last, prototype gradient on planes
//   combine_row      a row from P operand rows     feature gradient
//
// Parallel decomposition: a task is a fixed piece of the output, or of the pixels whose sums a later step adds in
// order, so results do not depend on the number of threads. Memory traffic: the forward reads x once for all maps and
// the norms; the backward reads it once for both gradients, in blocks that stay in L1 between the two, and writes the
// gradient once. The cosines are kept from the forward (P values a pixel) because s[n] needs all channels of a pixel
// before the first of them can be written: without them the backward would read x (C values a pixel) once more.
// Accumulation: float (double for double), at most 256 terms before a second level; prototypes in double. Limits:
// 64-bit offsets everywhere.

#ifndef FSS_PROTOTYPE_COSINE_H
#define FSS_PROTOTYPE_COSINE_H

namespace fss {
namespace prototype_cosine {

struct CosineArgs {
  int64_t batch, sets, prototypes, channels, pixels;  // sets of prototypes: `batch`, or 1 that all samples share
  double scale, eps;
  int64_t columns;  // of one task, forward on planes
  bool add;         // eps is added to norms instead of bounding them from below
  const void* features;
  bool channels_last;  // rows are pixels (row = stride_n) instead of channels (row = stride_c)
  int64_t stride_b, stride_row;
  const void* weights;  // prototypes, dense (sets, P, C), features' type
  void* units;          // normalised prototypes (sets, P, padded C), accumulation type
  int64_t padded;       // C rounded up to whole vectors; the rest of `units` is 0
  void* norms;          // (B, N), accumulation type
  void* cosines;        // (B, P, N), accumulation type
  void* scores;         // (B, P, N), features' type
  const void* grad;     // gradient of the scores
  void* coefficients;   // k, (B, P, N), accumulation type
  void* slopes;         // s, (B, N), accumulation type
  void* grad_features;  // dense, same layout as features; null when nobody wants it
  bool stream;          // write grad_features past the caches
  void* sums;           // dL/du of each piece of pixels, (B, pieces, P, C), accumulation type; null likewise
  void* grad_prototypes;
};

constexpr int64_t kRows = 8;           // rows of x handled together: as many streams as keep memory busy
constexpr int64_t kColumns = 2048;     // most pixels of one task, forward on planes: long runs, sums that stay in L2
constexpr int64_t kRowsPerLevel = 64;  // rows accumulated between two second-level additions
constexpr int64_t kTileRows = 16;      // over which the sums of a tile stay in registers
constexpr int64_t kTileAhead = 512;    // bytes of a row from a tile to what it asks for
constexpr int64_t kPixelTask = 64;     // pixels of one task, channels_last forward
constexpr int64_t kPiece = 256;        // pixels of one task, channels_last backward
constexpr int64_t kBlock = 256;        // pixels whose x stays in L1 between the two gradients, planes
constexpr int64_t kPixelsAtOnce = 1024;
constexpr int64_t kPadding = 16;  // of units, in elements: whole vectors of every instruction set

// Pixels of one task, forward on planes: equal pieces of a sample, at least `tasks` in all if they can be 256 pixels.
// The sums of a pixel do not depend on where its piece begins.
inline int64_t columns_for(int64_t pixels, int64_t batch, int64_t tasks) {
  const int64_t wanted = std::min(ceil_div(tasks, batch), ceil_div(pixels, 256));
  return ceil_div(ceil_div(pixels, std::max(ceil_div(pixels, kColumns), wanted)), 32) * 32;
}

// Number of tasks of each step.
inline int64_t unit_tasks(const CosineArgs& a) { return a.sets * a.prototypes; }
inline int64_t score_tasks(const CosineArgs& a) {
  return a.batch * ceil_div(a.pixels, a.channels_last ? kPixelTask : a.columns);
}
inline int64_t coefficient_tasks(const CosineArgs& a) { return a.batch * ceil_div(a.pixels, kPixelsAtOnce); }
inline int64_t pieces(const CosineArgs& a) { return a.channels_last ? ceil_div(a.pixels, kPiece) : 1; }
inline int64_t gradient_tasks(const CosineArgs& a) {
  return a.batch * (a.channels_last ? ceil_div(a.pixels, kPiece) : ceil_div(a.channels, kRows));
}

}  // namespace prototype_cosine
}  // namespace fss
#endif

#ifdef FSS_ISA
#include "common/cosine.h"

namespace fss {
namespace FSS_ISA {
namespace prototype_cosine {

using namespace ::fss::prototype_cosine;

constexpr int kDotRows = FSS_ISA_LEVEL == 2 ? 4 : 2;         // pixels whose sums with kDotPrototypes fit the registers
constexpr int kDotPrototypes = 5;                            // of the forward on channels_last
constexpr int kGradPrototypes = FSS_ISA_LEVEL == 2 ? 2 : 1;  // whose sums with kRows channels fit the registers
constexpr int64_t kDotColumns = 4096;                        // of a row between two second-level additions

template <class A>
inline const A* units_of(const CosineArgs& args, int64_t b) {
  return static_cast<const A*>(args.units) + (args.sets == 1 ? 0 : b) * args.prototypes * args.padded;
}

// ---- row operations -------------------------------------------------------------------------------------------------

// Into L2: requests for L1 wait in a queue too short for the latency of memory.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

template <class T>
inline void prefetch_row(const T* row, int64_t columns) {
  for (int64_t i = 0; i < columns; i += 64 / int64_t(sizeof(T))) prefetch_far(row + i);
}

// sums[m][column] += sum_r coefficient[m][r] x[r][column]; with Squares, sums[count][column] += sum_r x[r][column]^2.
// Rows of sums are padded to whole vectors. V vectors of a row at once. Every line that is read here asks for the same
// line of `next`.
template <int R, int V, bool Squares, class T, class A>
inline void accumulate_rows(const T* const* x, const T* const* next, const A* coefficient, int64_t stride,
                            int64_t count, int64_t columns, A* sums, int64_t sums_stride) {
  constexpr int64_t step = V * lanes<A>;
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  const auto accumulate = [&](auto vectors, int64_t n, const auto& read) {
    constexpr int W = decltype(vectors)::value;
    vec<A> value[R][W];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < W; ++v) value[r][v] = read(x[r] + n + v * lanes<A>);
    }
    for (int64_t m = 0; m < count; ++m) {
      A* to = sums + m * sums_stride + n;
      vec<A> s[W];
      for (int v = 0; v < W; ++v) s[v] = load(to + v * lanes<A>);
      for (int r = 0; r < R; ++r) {
        const vec<A> k = broadcast(coefficient[m * stride + r]);
        for (int v = 0; v < W; ++v) s[v] += k * value[r][v];
      }
      for (int v = 0; v < W; ++v) store(to + v * lanes<A>, s[v]);
    }
    if constexpr (Squares) {
      A* to = sums + count * sums_stride + n;
      for (int v = 0; v < W; ++v) {
        vec<A> s = load(to + v * lanes<A>);
        for (int r = 0; r < R; ++r) s += value[r][v] * value[r][v];
        store(to + v * lanes<A>, s);
      }
    }
  };
  int64_t n = 0;
  for (; n + step <= columns; n += step) {
    for (int r = 0; r < R; ++r) {
      for (int64_t ahead = 0; ahead < step; ahead += line) {
        if (step >= line || n % line == 0) prefetch_far(next[r] + n + ahead);
      }
    }
    accumulate(std::integral_constant<int, V>{}, n, [](const T* p) { return load(p); });
  }
  for (; n < columns; n += lanes<A>) {
    const int64_t left = std::min<int64_t>(columns - n, lanes<A>);
    accumulate(std::integral_constant<int, 1>{}, n, [&](const T* p) { return load_partial(p, left); });
  }
}

// Groups of kRows rows, then single ones: f(integral_constant rows, first row).
template <class F>
inline void in_groups(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) f(std::integral_constant<int, kRows>{}, i);
  for (; i < end; ++i) f(std::integral_constant<int, 1>{}, i);
}

// totals[r][m] += x[r] . operand[m] over `columns`, PN operands; with Squares, totals[r][PN] += |x[r]|^2. Totals are
// vectors, `stride` of them apart from row to row.
template <int R, int PN, bool Squares, class T, class A>
inline void dot_rows(const T* const* x, const A* operand, int64_t operand_stride, int64_t columns, A* totals,
                     int64_t stride) {
  vec<A> sums[R][PN + Squares] = {};
  int64_t n = 0;
  for (; n + lanes<A> <= columns; n += lanes<A>) {
    vec<A> value[R];
    for (int r = 0; r < R; ++r) value[r] = load(x[r] + n);
    for (int m = 0; m < PN; ++m) {
      const vec<A> w = load(operand + m * operand_stride + n);
      for (int r = 0; r < R; ++r) sums[r][m] += w * value[r];
    }
    if constexpr (Squares) {
      for (int r = 0; r < R; ++r) sums[r][PN] += value[r] * value[r];
    }
  }
  if (n < columns) {
    for (int r = 0; r < R; ++r) {
      const vec<A> value = load_partial(x[r] + n, columns - n);
      for (int m = 0; m < PN; ++m) {
        sums[r][m] += value * load_partial(operand + m * operand_stride + n, columns - n);
      }
      if constexpr (Squares) sums[r][PN] += value * value;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < PN + Squares; ++m) {
      A* to = totals + (r * stride + m) * lanes<A>;
      store(to, load(to) + sums[r][m]);
    }
  }
}

// Calls f(integral_constant n) for 1 <= n <= Most.
template <int Most, class F>
inline void with_count(int64_t n, const F& f) {
  if constexpr (Most > 1) {
    if (n < Most) return with_count<Most - 1>(n, f);
  }
  f(std::integral_constant<int, Most>{});
}

// The sums of V vectors of columns over `rows` rows, row after row: those with PN operands, and the squares, stay in
// registers. What is read of a row asks for what lies `ahead` elements further.
template <int PN, bool Squares, int V, class T, class A, class Read>
inline void accumulate_tile(const T* x, int64_t ahead, int64_t stride_row, int64_t rows, const A* coefficient,
                            int64_t stride, A* sums, A* squares, int64_t sums_stride, const Read& read) {
  vec<A> s[PN][V], square[V];
  for (int v = 0; v < V; ++v) {
    for (int m = 0; m < PN; ++m) s[m][v] = load(sums + m * sums_stride + v * lanes<A>);
    if constexpr (Squares) square[v] = load(squares + v * lanes<A>);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * stride_row;
    __builtin_prefetch(row + ahead);
    vec<A> value[V];
    for (int v = 0; v < V; ++v) value[v] = read(row + v * lanes<A>);
    for (int m = 0; m < PN; ++m) {
      const vec<A> k = broadcast(coefficient[m * stride + r]);
      for (int v = 0; v < V; ++v) s[m][v] += k * value[v];
    }
    if constexpr (Squares) {
      for (int v = 0; v < V; ++v) square[v] += value[v] * value[v];
    }
  }
  for (int v = 0; v < V; ++v) {
    for (int m = 0; m < PN; ++m) store(sums + m * sums_stride + v * lanes<A>, s[m][v]);
    if constexpr (Squares) store(squares + v * lanes<A>, square[v]);
  }
}

// What accumulate_rows with Squares adds for `rows` rows from x on, the same bits, tile after tile.
template <class T, class A>
inline void accumulate_tiles(const T* x, int64_t stride_row, int64_t rows, const A* coefficient, int64_t stride,
                             int64_t count, int64_t columns, A* sums, int64_t sums_stride) {
  constexpr int kVectors = 2, kMost = 5;  // six sums of two vectors, two values, a factor: the registers of AVX2
  constexpr int64_t step = kVectors * lanes<A>;
  const auto tile = [&](auto vectors, int64_t n, const auto& read) {
    constexpr int V = decltype(vectors)::value;
    const int64_t ahead = std::min(kTileAhead / int64_t(sizeof(T)), columns - 1 - n);
    for (int64_t p = 0; p < count; p += kMost) {
      with_count<kMost>(std::min<int64_t>(count - p, kMost), [&](auto size) {
        constexpr int PN = decltype(size)::value;
        const auto add = [&](auto squares) {  // the last operands also sum the squares
          accumulate_tile<PN, decltype(squares)::value, V>(x + n, ahead, stride_row, rows, coefficient + p * stride,
                                                           stride, sums + p * sums_stride + n,
                                                           sums + count * sums_stride + n, sums_stride, read);
        };
        p + PN == count ? add(std::true_type()) : add(std::false_type());
      });
    }
  };
  int64_t n = 0;
  for (; n + step <= columns; n += step) {
    tile(std::integral_constant<int, kVectors>{}, n, [](const T* p) { return load(p); });
  }
  for (; n < columns; n += lanes<A>) {
    const int64_t left = std::min<int64_t>(columns - n, lanes<A>);
    tile(std::integral_constant<int, 1>{}, n, [left](const T* p) { return load_partial(p, left); });
  }
}

// What combine_row(s) needs of each row: out[j] = sum_m coefficient[m] operand[m][j] - slope x[j], the slope one number
// a row, or a row of them that all share.
template <class A>
struct Combination {
  const A* operand;
  int64_t operand_stride;
  const A* coefficient;
  int64_t stride_m, stride_r;
  int64_t count;
  const A* slope;
  bool slope_is_row;
};

// j in [begin, end) of row r.
template <class T, class A>
inline void combine_row(T* out, const T* x, int64_t r, int64_t begin, int64_t end, const Combination<A>& a) {
  const A* coefficient = a.coefficient + r * a.stride_r;
  for (int64_t n = begin; n < end; n += lanes<A>) {
    const int64_t left = std::min<int64_t>(end - n, lanes<A>);
    vec<A> s = {};
    for (int64_t m = 0; m < a.count; ++m) {
      s += broadcast(coefficient[m * a.stride_m]) * load_partial(a.operand + m * a.operand_stride + n, left);
    }
    s -= (a.slope_is_row ? load_partial(a.slope + n, left) : broadcast(a.slope[r])) * load_partial(x + n, left);
    store_partial(out + n, s, left);
  }
}

// The whole lines of R rows from `begin` on, at most up to `end`; returns where it stopped. PN > 0: that many operands,
// whose coefficients stay in registers.
template <int R, int PN, bool Stream, class T, class A>
inline int64_t combine_lines(T* const* out, const T* const* x, int64_t begin, int64_t end, const Combination<A>& a) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  constexpr int V = int(line / lanes<A>);
  vec<A> k[R][PN > 0 ? PN : 1];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < PN; ++m) k[r][m] = broadcast(a.coefficient[r * a.stride_r + m * a.stride_m]);
  }
  int64_t n = begin;
  for (; n + line <= end; n += line) {
    vec<A> s[R][V] = {};
    const auto add = [&](int64_t m, const auto& factor) {
      for (int v = 0; v < V; ++v) {
        const vec<A> w = load(a.operand + m * a.operand_stride + n + v * lanes<A>);
        for (int r = 0; r < R; ++r) s[r][v] += factor(r) * w;
      }
    };
    if constexpr (PN > 0) {
      for (int m = 0; m < PN; ++m) add(m, [&](int r) { return k[r][m]; });
    } else {
      for (int64_t m = 0; m < a.count; ++m) {
        add(m, [&](int r) { return broadcast(a.coefficient[r * a.stride_r + m * a.stride_m]); });
      }
    }
    for (int v = 0; v < V; ++v) {
      const int64_t j = n + v * lanes<A>;
      vec<A> slope = {};
      if (a.slope_is_row) slope = load(a.slope + j);
      for (int r = 0; r < R; ++r) {
        if (!a.slope_is_row) slope = broadcast(a.slope[r]);
        s[r][v] -= slope * load(x[r] + j);
        Stream ? stream(out[r] + j, s[r][v]) : store(out[r] + j, s[r][v]);
      }
    }
  }
  return n;
}

// Elements of a row before its first 64-byte line.
template <class T>
inline int64_t head_of(const T* row) {
  return int64_t((64 - reinterpret_cast<uintptr_t>(row) % 64) % 64 / sizeof(T));
}

// Pixels or channels [begin, end) of `rows` rows, or what of them lies between the lines that begin there: a row is
// written in whole lines of its own, so that successive blocks of it meet at a line. `length` of a row in all.
template <class T, class A>
inline void combine_rows(T* const* out, const T* const* x, int64_t rows, int64_t begin, int64_t end, int64_t length,
                         const Combination<A>& all, bool stream_past) {
  constexpr int kTogether = FSS_ISA_LEVEL == 2 ? 4 : 1;  // rows whose coefficients fit the registers
  const auto run = [&](auto size, auto count, int64_t r0, int64_t from, int64_t to) {
    constexpr int R = decltype(size)::value, PN = decltype(count)::value;
    Combination<A> a = all;
    a.coefficient += r0 * a.stride_r;
    if (!a.slope_is_row) a.slope += r0;
    return stream_past ? combine_lines<R, PN, true>(out + r0, x + r0, from, to, a)
                       : combine_lines<R, PN, false>(out + r0, x + r0, from, to, a);
  };
  for (int64_t r = 0; r < rows;) {
    const int64_t head = stream_past ? std::min(head_of(out[r]), length) : 0;
    const int64_t from = begin == 0 ? head : std::min(begin + head, length);
    const int64_t to = end == length ? length : std::min(end + head, length);
    bool together = r + kTogether <= rows;
    for (int64_t i = 1; together && stream_past && i < kTogether; ++i)
      together = head_of(out[r + i]) == head_of(out[r]);
    const int64_t done = together ? kTogether : 1;
    int64_t stopped = from;
    const auto choose = [&](auto count) {
      stopped = together ? run(std::integral_constant<int, kTogether>{}, count, r, from, to)
                         : run(std::integral_constant<int, 1>{}, count, r, from, to);
    };
    if (all.count > 5) {
      choose(std::integral_constant<int, 0>{});
    } else {
      with_count<5>(all.count, choose);
    }
    for (int64_t i = r; i < r + done; ++i) {
      if (begin == 0) combine_row(out[i], x[i], i, 0, std::min(head, to), all);
      combine_row(out[i], x[i], i, stopped, to, all);
    }
    r += done;
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// The norm of a prototype, in double; as that of a pixel it is 0 or not finite where its square is in type A.
template <class T>
double prototype_norm(const T* w, int64_t channels) {
  using A = accumulate_t<T>;
  double sums[8] = {};
  A squares[8] = {};
  for (int64_t c0 = 0; c0 < channels; c0 += 8) {
    for (int i = 0; i < std::min<int64_t>(channels - c0, 8); ++i) {
      const A v = widen<A>(w[c0 + i]);
      sums[i] += double(v) * double(v);
      squares[i] += v * v;
    }
  }
  A squared = 0;
  for (const A square : squares) squared += square;
  if (squared == 0 || !(squared - squared == 0)) return double(squared);
  return std::sqrt(((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7])));
}

// Task: one prototype of a set.
template <class T>
void normalise_prototypes(const CosineArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t task = begin; task < end; ++task) {
    const T* w = static_cast<const T*>(args.weights) + task * args.channels;
    A* unit = static_cast<A*>(args.units) + task * args.padded;
    const double inverse = inverse_norm<double>(broadcast(prototype_norm(w, args.channels)), args.eps, args.add)[0];
    for (int64_t c = 0; c < args.channels; ++c) unit[c] = A(double(widen<A>(w[c])) * inverse);
    std::fill(unit + args.channels, unit + args.padded, A(0));
  }
}

// sums (P + 1, stride): dots and squared norms of pixels [n0, n0 + columns) -> norms, cosines, scores.
template <class T, class A>
void finish_scores(const CosineArgs& args, int64_t b, int64_t n0, int64_t columns, const A* sums, int64_t stride) {
  const A eps = A(args.eps), scale = A(args.scale);
  A* norms = static_cast<A*>(args.norms) + b * args.pixels + n0;
  for (int64_t n = 0; n < columns; n += lanes<A>) {
    const int64_t left = std::min<int64_t>(columns - n, lanes<A>);
    const bool whole = left == lanes<A>;
    const vec<A> norm = square_root<A>(load(sums + args.prototypes * stride + n));
    whole ? store(norms + n, norm) : store_partial(norms + n, norm, left);
    const vec<A> inverse = inverse_norm<A>(norm, eps, args.add);
    for (int64_t p = 0; p < args.prototypes; ++p) {
      const int64_t at = (b * args.prototypes + p) * args.pixels + n0 + n;
      const vec<A> cosine = load(sums + p * stride + n) * inverse;
      A* cosines = static_cast<A*>(args.cosines) + at;
      T* scores = static_cast<T*>(args.scores) + at;
      whole ? store(cosines, cosine) : store_partial(cosines, cosine, left);
      whole ? store(scores, cosine * scale) : store_partial(scores, cosine * scale, left);
    }
  }
}

template <class T>
void scores_planes(const CosineArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t chunks = ceil_div(args.pixels, args.columns), stride = ceil_div(args.columns, kPadding) * kPadding;
  const bool few = args.prototypes <= 2;  // too few operations a vector for the loads of two to pay
  std::vector<A> level(size_t((args.prototypes + 1) * stride)), total(level.size());
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / chunks, n0 = task % chunks * args.columns;
    const int64_t columns = std::min(args.columns, args.pixels - n0);
    const T* x = static_cast<const T*>(args.features) + b * args.stride_b + n0;
    const A* units = units_of<A>(args, b);
    std::fill(total.begin(), total.end(), A(0));
    for (int64_t c0 = 0; c0 < args.channels; c0 += kRowsPerLevel) {
      const int64_t c1 = std::min(c0 + kRowsPerLevel, args.channels);
      std::fill(level.begin(), level.end(), A(0));
      if constexpr (FSS_ISA_LEVEL == 1) {
        for (int64_t c = c0; c < c1; c += kTileRows) {
          accumulate_tiles(x + c * args.stride_row, args.stride_row, std::min(kTileRows, c1 - c), units + c,
                           args.padded, args.prototypes, columns, level.data(), stride);
        }
      } else {
        in_groups(c0, c1, [&](auto size, int64_t c) {
          constexpr int R = decltype(size)::value;
          const T *rows[R], *next[R];
          // the next rows of these pixels; after the last ones, the first rows of the next pixels
          const bool last = c + 2 * R > args.channels;
          for (int r = 0; r < R; ++r) {
            rows[r] = x + (c + r) * args.stride_row;
            next[r] = last ? (columns == args.columns ? x + columns + r * args.stride_row : rows[r])
                           : rows[r] + R * args.stride_row;
          }
          const auto run = R == 1 || FSS_ISA_LEVEL < 2 || few ? &accumulate_rows<R, 1, true, T, A>
                                                              : &accumulate_rows<R, 2, true, T, A>;
          run(rows, next, units + c, args.padded, args.prototypes, columns, level.data(), stride);
        });
      }
      for (size_t i = 0; i < total.size(); ++i) total[i] += level[i];
    }
    finish_scores<T>(args, b, n0, columns, total.data(), stride);
  }
}

template <class T>
void scores_channels_last(const CosineArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t chunks = ceil_div(args.pixels, kPixelTask), sums = args.prototypes + 1;
  std::vector<A> tile(size_t(sums * kPixelTask));
  std::vector<A> totals(size_t(kDotRows * sums * lanes<A>));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / chunks, n0 = task % chunks * kPixelTask;
    const int64_t columns = std::min(kPixelTask, args.pixels - n0);
    const A* units = units_of<A>(args, b);
    for (int64_t n = 0; n < columns; n += kDotRows) {
      std::fill(totals.begin(), totals.end(), A(0));
      for (int64_t r = 0; r < kDotRows && n0 + n + 2 * kDotRows + r < args.pixels; ++r) {
        prefetch_row(
            static_cast<const T*>(args.features) + b * args.stride_b + (n0 + n + 2 * kDotRows + r) * args.stride_row,
            args.channels);
      }
      for (int64_t c = 0; c < args.channels; c += kDotColumns) {
        const int64_t run = std::min(kDotColumns, args.channels - c);
        const T* rows[kDotRows];  // past the last pixel, the last pixel again
        for (int64_t r = 0; r < kDotRows; ++r) {
          rows[r] = static_cast<const T*>(args.features) + b * args.stride_b +
                    (n0 + std::min(n + r, columns - 1)) * args.stride_row + c;
        }
        for (int64_t p = 0; p < args.prototypes; p += kDotPrototypes) {
          with_count<kDotPrototypes>(std::min<int64_t>(args.prototypes - p, kDotPrototypes), [&](auto count) {
            constexpr int PN = decltype(count)::value;
            const A* operand = units + p * args.padded + c;
            // the last group also sums the squares
            if (p + PN == args.prototypes) {
              dot_rows<kDotRows, PN, true>(rows, operand, args.padded, run, totals.data() + p * lanes<A>, sums);
            } else {
              dot_rows<kDotRows, PN, false>(rows, operand, args.padded, run, totals.data() + p * lanes<A>, sums);
            }
          });
        }
      }
      for (int64_t r = 0; r < std::min<int64_t>(kDotRows, columns - n); ++r) {
        for (int64_t i = 0; i < sums; ++i)
          tile[size_t(i * kPixelTask + n + r)] = sum<A>(load(totals.data() + (r * sums + i) * lanes<A>));
      }
    }
    finish_scores<T>(args, b, n0, columns, tile.data(), kPixelTask);
  }
}

template <class T>
void scores(const CosineArgs& args, int64_t begin, int64_t end) {
  args.channels_last ? scores_channels_last<T>(args, begin, end) : scores_planes<T>(args, begin, end);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// k and s of pixels; task = kPixelsAtOnce pixels of a sample. k is 0 at a zero vector; s of a short one is that of the
// magnified vector (common/cosine.h).
template <class T>
void coefficients(const CosineArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const A eps = A(args.eps), scale = A(args.scale);
  const int64_t chunks = ceil_div(args.pixels, kPixelsAtOnce);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / chunks, n0 = task % chunks * kPixelsAtOnce;
    for (int64_t n = n0; n < std::min(n0 + kPixelsAtOnce, args.pixels); n += lanes<A>) {
      const int64_t left = std::min<int64_t>(args.pixels - n, lanes<A>);
      const bool whole = left == lanes<A>;
      const auto read = [&](const auto* p) { return whole ? load(p) : load_partial(p, left); };
      const auto write = [&](A* p, vec<A> v) { whole ? store(p, v) : store_partial(p, v, left); };
      const vec<A> norm = read(static_cast<const A*>(args.norms) + b * args.pixels + n);
      const Projection<A> project(norm, eps, args.add);
      const vec<A> inverse = project.inverse * scale;
      vec<A> slope = {};
      for (int64_t p = 0; p < args.prototypes; ++p) {
        const int64_t at = (b * args.prototypes + p) * args.pixels + n;
        const vec<A> g = read(static_cast<const T*>(args.grad) + at);
        slope += g * read(static_cast<const A*>(args.cosines) + at);
        write(static_cast<A*>(args.coefficients) + at, g * inverse);
      }
      slope = slope * scale * project.slope * project.magnify;
      write(static_cast<A*>(args.slopes) + b * args.pixels + n, slope);
    }
  }
}

// Both gradients of kRows channels of a sample, block after block of pixels.
template <class T>
void gradients_planes(const CosineArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t groups = ceil_div(args.channels, kRows);
  std::vector<A> totals(size_t(kRows * args.prototypes * lanes<A>));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / groups, c0 = task % groups * kRows, count = std::min(kRows, args.channels - c0);
    const A* k = static_cast<const A*>(args.coefficients) + b * args.prototypes * args.pixels;
    const A* slopes = static_cast<const A*>(args.slopes) + b * args.pixels;
    const A* units = units_of<A>(args, b) + c0;
    T* out = nullptr;
    if (args.grad_features != nullptr) {
      out = static_cast<T*>(args.grad_features) + (b * args.channels + c0) * args.pixels;
    }
    const T* rows[kRows];  // past the last channel, the last channel again
    T* to[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      rows[r] =
          static_cast<const T*>(args.features) + b * args.stride_b + (c0 + std::min(r, count - 1)) * args.stride_row;
      to[r] = out == nullptr ? nullptr : out + std::min(r, count - 1) * args.pixels;
    }
    std::fill(totals.begin(), totals.end(), A(0));
    for (int64_t n0 = 0; n0 < args.pixels; n0 += kBlock) {
      const int64_t n1 = std::min(n0 + kBlock, args.pixels);
      for (int64_t r = 0; r < kRows; ++r) {  // the block after the next, of these rows or of the next ones
        const int64_t ahead = n0 + 2 * kBlock;
        const bool further = ahead >= args.pixels;
        if (further && c0 + 2 * kRows > args.channels) break;
        prefetch_row(rows[r] + (further ? kRows * args.stride_row + ahead % kBlock : ahead), kBlock);
      }
      if (args.sums != nullptr) {
        const T* at[kRows];
        for (int64_t r = 0; r < kRows; ++r) at[r] = rows[r] + n0;
        for (int64_t p = 0; p < args.prototypes; p += kGradPrototypes) {
          with_count<kGradPrototypes>(std::min<int64_t>(args.prototypes - p, kGradPrototypes), [&](auto size) {
            dot_rows<kRows, decltype(size)::value, false>(at, k + p * args.pixels + n0, args.pixels, n1 - n0,
                                                          totals.data() + p * lanes<A>, args.prototypes);
          });
        }
      }
      if (out != nullptr) {
        combine_rows(to, rows, count, n0, n1, args.pixels,
                     Combination<A>{k, args.pixels, units, args.padded, 1, args.prototypes, slopes, true}, args.stream);
      }
    }
    for (int64_t p = 0; args.sums != nullptr && p < args.prototypes; ++p) {
      A* sums = static_cast<A*>(args.sums) + (b * args.prototypes + p) * args.channels + c0;
      for (int64_t r = 0; r < count; ++r) sums[r] = sum<A>(load(totals.data() + (r * args.prototypes + p) * lanes<A>));
    }
  }
  if (args.stream) stream_fence();
}

// Both gradients of kPiece pixels of a sample, kRows pixels after the other.
template <class T>
void gradients_channels_last(const CosineArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t chunks = ceil_div(args.pixels, kPiece);
  std::vector<A> level(size_t(args.prototypes * args.padded));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / chunks, n0 = task % chunks * kPiece;
    const A* k = static_cast<const A*>(args.coefficients) + b * args.prototypes * args.pixels;
    const A* slopes = static_cast<const A*>(args.slopes) + b * args.pixels;
    const T* x = static_cast<const T*>(args.features) + b * args.stride_b;
    T* out = nullptr;
    if (args.grad_features != nullptr) out = static_cast<T*>(args.grad_features) + b * args.pixels * args.channels;
    std::fill(level.begin(), level.end(), A(0));
    in_groups(n0, std::min(n0 + kPiece, args.pixels), [&](auto size, int64_t n) {
      constexpr int R = decltype(size)::value;
      const T *rows[R], *next[R];
      for (int r = 0; r < R; ++r) {
        rows[r] = x + (n + r) * args.stride_row;
        next[r] = n + 2 * R <= args.pixels ? rows[r] + R * args.stride_row : rows[r];
      }
      if (args.sums != nullptr) {
        accumulate_rows<R, 1, false>(rows, next, k + n, args.pixels, args.prototypes, args.channels, level.data(),
                                     args.padded);
      } else {
        for (int r = 0; r < R; ++r) prefetch_row(next[r], args.channels);
      }
      if (out != nullptr) {
        T* to[R];
        for (int r = 0; r < R; ++r) to[r] = out + (n + r) * args.channels;
        combine_rows(to, rows, R, 0, args.channels, args.channels,
                     Combination<A>{units_of<A>(args, b), args.padded, k + n, args.pixels, 1, args.prototypes,
                                    slopes + n, false},
                     args.stream);
      }
    });
    for (int64_t p = 0; args.sums != nullptr && p < args.prototypes; ++p) {
      std::copy_n(level.data() + p * args.padded, args.channels,
                  static_cast<A*>(args.sums) + (task * args.prototypes + p) * args.channels);
    }
  }
  if (args.stream) stream_fence();
}

template <class T>
void gradients(const CosineArgs& args, int64_t begin, int64_t end) {
  args.channels_last ? gradients_channels_last<T>(args, begin, end) : gradients_planes<T>(args, begin, end);
}

// The feature gradient of short pixels once more, with the magnified vector; tasks as for coefficients.
template <class T>
void short_pixels(const CosineArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t chunks = ceil_div(args.pixels, kPixelsAtOnce);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / chunks, n0 = task % chunks * kPixelsAtOnce;
    const A* units = units_of<A>(args, b);
    for (int64_t n = n0; n < std::min(n0 + kPixelsAtOnce, args.pixels); ++n) {
      const A norm = static_cast<const A*>(args.norms)[b * args.pixels + n];
      if (norm == 0 || !(norm < kShort<A>)) continue;
      const A slope = static_cast<const A*>(args.slopes)[b * args.pixels + n];
      for (int64_t c = 0; c < args.channels; ++c) {
        const T* x = static_cast<const T*>(args.features) + b * args.stride_b +
                     (args.channels_last ? n * args.stride_row + c : c * args.stride_row + n);
        A sum = 0;
        for (int64_t p = 0; p < args.prototypes; ++p) {
          sum += static_cast<const A*>(args.coefficients)[(b * args.prototypes + p) * args.pixels + n] *
                 units[p * args.padded + c];
        }
        const int64_t to =
            b * args.channels * args.pixels + (args.channels_last ? n * args.channels + c : c * args.pixels + n);
        static_cast<T*>(args.grad_features)[to] = narrow<T>(sum - slope * (widen<A>(*x) * kMagnified<A>));
      }
    }
  }
}

// dL/du, the samples of a set and their pieces added in order -> dL/dw; task = one prototype of a set.
template <class T>
void grad_prototypes(const CosineArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  std::vector<double> total(static_cast<size_t>(args.channels));
  const int64_t per_set = args.batch / args.sets * pieces(args);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t set = task / args.prototypes, p = task % args.prototypes;
    const T* w = static_cast<const T*>(args.weights) + task * args.channels;
    T* out = static_cast<T*>(args.grad_prototypes) + task * args.channels;
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t i = 0; i < per_set; ++i) {
      const A* from = static_cast<const A*>(args.sums) + ((set * per_set + i) * args.prototypes + p) * args.channels;
      for (int64_t c = 0; c < args.channels; ++c) total[size_t(c)] += double(from[c]);
    }
    const Projection<double> project(broadcast(prototype_norm(w, args.channels)), args.eps, args.add);
    const double magnify = project.magnify[0], inverse = project.inverse[0];
    double dot = 0;
    for (int64_t c = 0; c < args.channels; ++c) dot += total[size_t(c)] * (double(widen<A>(w[c])) * magnify);
    const double along = project.along(broadcast(dot))[0];
    for (int64_t c = 0; c < args.channels; ++c) {
      out[c] = narrow<T>(A(total[size_t(c)] * inverse - along * (double(widen<A>(w[c])) * magnify)));
    }
  }
}

}  // namespace prototype_cosine
}  // namespace FSS_ISA
}  // namespace fss
#endif
