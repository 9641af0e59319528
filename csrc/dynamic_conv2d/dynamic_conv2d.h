// Per-sample depthwise convolution, CPU core: raw pointers and strides only, compiled once per instruction set.
//
//   out[b, o*C + c, y, z] = sum over taps t of output o: k[b,c,t] x[b, c, y + row(t), z + column(t)],  x = 0 outside
//
// A register holds `lanes` neighbours that share an offset: columns of one plane, or channels of one pixel when the
// tensor is channels_last. Only copying in and out knows which; the arithmetic is the same code.
//
// Decomposition: a task copies a strip of rows with its halo of zeros, widened, into scratch that stays in cache and
// computes every output of it from there, straight into memory. Strips are cut by the shape alone. While a strip is
// computed, the next one's input, and the lines its results will go to, are fetched.
// Registers: kTile rows at once; a shifted vector of x serves every tap and every output it meets, a tap kTile rows.
// Traffic: x once (and the halo of a strip), the outputs once; the backward reads x and the gradients once and writes
// both results from the same strips. Lines that a register fills alone are written past the caches.
// Gradients to the kernels: one task owns a plane (or `lanes` channels), so each is a plain sum in one order.
// Accumulation: float32 (float64 for float64); a strip's sums are added up strip by strip.
//
// Sizes: B batch, C channels, H x W pixels, L outputs (branches, or one when merged), T taps of all outputs.

#ifndef FSS_DYNAMIC_CONV2D_H
#define FSS_DYNAMIC_CONV2D_H

namespace fss {
namespace dynamic_conv2d {

constexpr int64_t kStripBytes = 64 << 10;  // of the padded x of one strip
constexpr int64_t kChannelBytes = 64;      // channels_last: a task owns whole cache lines of channels

// One branch's kernels, or their gradients: (B, C, height, width), and the tap of each of their elements.
struct Branch {
  void* data;
  int64_t stride_b, stride_c, stride_h, stride_w;
  int64_t height, width;
  const int64_t* tap;
};

struct Shift {
  int64_t row, column;  // of x, relative to the output
};

// The kernels of three sizes that the fast paths know: their first tap, -1 where there is none.
struct Cross {
  int64_t square, vertical, horizontal;  // 5x5, 5x1, 1x5
};

struct ConvArgs {
  int64_t batch, channels, height, width;
  bool channels_last;
  bool stream;  // results are too large to stay in cache
  const void* x;
  int64_t stride_b, stride_row;  // of x: samples; planes, or pixels when channels_last
  const void* grad;              // (B, L*C, H, W), for the backward
  int64_t grad_stride_b, grad_stride_row;
  void* kernels;       // (B, C, T) in the accumulation type
  void* out;           // (B, L*C, H, W) dense
  void* grad_x;        // (B, C, H, W) dense, or null
  void* grad_kernels;  // (B, C, T) in the accumulation type, or null
  int64_t outputs, taps;
  const int64_t* first;  // (L + 1): output o has the taps [first[o], first[o + 1])
  const Shift* tap;      // (T)
  int64_t reach_rows, reach_columns;
  bool cross;  // the outputs are exactly the kernels of `sizes`: one 5x5, or with 5x1 and 1x5 in any order
  Cross sizes;
};

}  // namespace dynamic_conv2d
}  // namespace fss

#endif

#ifdef FSS_ISA
namespace fss {
namespace FSS_ISA {
namespace dynamic_conv2d {

using namespace fss::dynamic_conv2d;

// Rows of one register tile. The sum of a row is a chain of multiply-adds that wait for each other: enough rows hide
// it. Accumulators about fill the 32 or 16 registers; what else is read, the first cache holds. A remainder goes in
// tiles of kTail and single rows.
constexpr int kTile = 4;                               // three outputs
constexpr int kTileOne = FSS_ISA_LEVEL == 2 ? 8 : 6;   // one result
constexpr int kTileSums = FSS_ISA_LEVEL == 2 ? 6 : 4;  // sums for the kernels
constexpr int kTail = 2;

// Where things are in a strip's scratch, in elements.
template <class A>
struct Strip {
  int64_t rows;    // of a full strip
  int64_t step;    // from a column to the next: 1, or lanes when channels_last
  int64_t blocks;  // vectors in a row of outputs
  int64_t block;   // from one of them to the next
  int64_t pitch;   // of the padded scratch: from a row to the next
  int64_t groups;  // vectors of channels that a task owns
  int64_t padded;  // elements of the scratch of one vector of channels

  explicit Strip(const ConvArgs& args, int64_t type_bytes) {
    constexpr int64_t n = lanes<A>;
    const int64_t columns = args.channels_last ? args.width : ceil_div(args.width, n) * n;
    step = args.channels_last ? n : 1;
    block = n;
    blocks = args.channels_last ? args.width : columns / n;
    groups = args.channels_last ? std::max<int64_t>(1, kChannelBytes / type_bytes / n) : 1;
    pitch = (columns + 2 * args.reach_columns) * step;
    const int64_t fit = kStripBytes / int64_t(sizeof(A)) / pitch - 2 * args.reach_rows;
    rows = std::min(args.height, std::max<int64_t>(2 * kTileOne, fit));
    rows = ceil_div(args.height, ceil_div(args.height, rows));  // strips of the same size
    padded = (rows + 2 * args.reach_rows) * pitch;
  }
  int64_t count(const ConvArgs& args) const { return ceil_div(args.height, rows); }
};

// Planes, or vectors of channels that one task owns.
template <class T>
int64_t owners(const ConvArgs& args) {
  using A = accumulate_t<T>;
  if (!args.channels_last) return args.batch * args.channels;
  const Strip<A> strip(args, int64_t(sizeof(T)));
  return args.batch * ceil_div(args.channels, strip.groups * lanes<A>);
}

template <class T>
int64_t forward_tasks(const ConvArgs& args) {
  return owners<T>(args) * Strip<accumulate_t<T>>(args, int64_t(sizeof(T))).count(args);
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// kernels (B, C, T) from the branches: branches that share a tap are added; task = (b,c).
template <class T>
void gather_kernels(const ConvArgs& args, const Branch* branches, int64_t count, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t task = begin; task < end; ++task) {
    A* to = static_cast<A*>(args.kernels) + task * args.taps;
    std::fill_n(to, args.taps, A(0));
    for (const Branch* k = branches; k < branches + count; ++k) {
      const T* from =
          static_cast<const T*>(k->data) + task / args.channels * k->stride_b + task % args.channels * k->stride_c;
      for (int64_t i = 0; i < k->height * k->width; ++i) {
        to[k->tap[i]] += widen<A>(from[i / k->width * k->stride_h + i % k->width * k->stride_w]);
      }
    }
  }
}

// The transpose: gradients of the branches from those of the taps.
template <class T>
void scatter_kernels(const ConvArgs& args, const Branch* branches, int64_t count, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t task = begin; task < end; ++task) {
    const A* from = static_cast<const A*>(args.grad_kernels) + task * args.taps;
    for (const Branch* k = branches; k < branches + count; ++k) {
      T* to = static_cast<T*>(k->data) + task / args.channels * k->stride_b + task % args.channels * k->stride_c;
      for (int64_t i = 0; i < k->height * k->width; ++i) {
        to[i / k->width * k->stride_h + i % k->width * k->stride_w] = narrow<T>(from[k->tap[i]]);
      }
    }
  }
}

// ---- between tensors and scratch ------------------------------------------------------------------------------------

// Rows [y0, y1) of a plane with its halo; rows and columns outside it are 0. Scratch starts as 0 and nothing else is
// written beside the plane, so that its columns stay 0. What passes the end of a row is overwritten by the next one:
// scratch has room for one more vector.
template <class T, class A>
void pad_plane(const ConvArgs& args, const Strip<A>& s, const T* plane, int64_t y0, int64_t y1, A* padded) {
  constexpr int64_t n = lanes<A>;
  const int64_t w = args.width;
  const vec<A> zero = {};
  for (int64_t y = y0 - args.reach_rows; y < y1 + args.reach_rows; ++y, padded += s.pitch) {
    if (y < 0 || y >= args.height) {
      for (int64_t z = 0; z < s.pitch; z += n) store(padded + z, zero);
      continue;
    }
    const T* row = plane + y * w;
    A* to = padded + args.reach_columns;
    if (w < n) {
      store(to, load_partial(row, w));
    } else {
      for (int64_t z = 0; z + n <= w; z += n) store(to + z, load(row + z));
      store(to + w - n, load(row + w - n));
    }
  }
}

// The same of `count` <= lanes channels of every pixel; the other lanes are 0.
template <class T, class A>
void pad_channels(const ConvArgs& args, const Strip<A>& s, const T* pixels, int64_t stride, int64_t count, int64_t y0,
                  int64_t y1, A* padded) {
  constexpr int64_t n = lanes<A>;
  for (int64_t y = y0 - args.reach_rows; y < y1 + args.reach_rows; ++y, padded += s.pitch) {
    if (y < 0 || y >= args.height) {
      std::fill_n(padded, s.pitch, A(0));
      continue;
    }
    const T* pixel = pixels + y * args.width * stride;
    A* to = padded + args.reach_columns * n;
    for (int64_t z = 0; z < args.width; ++z, pixel += stride, to += n) {
      store(to, count == n ? load(pixel) : load_partial(pixel, count));
    }
  }
}

// Results of one vector of channels in a dense (B, outputs * C, H, W) tensor, from one output's first row on.
template <class T>
struct Target {
  T* to;
  int64_t row, column, output;  // from one to the next

  Target(const ConvArgs& args, void* data, int64_t outputs, int64_t b, int64_t c, int64_t y) {
    const int64_t pixels = args.height * args.width, all = outputs * args.channels;
    T* sample = static_cast<T*>(data) + b * all * pixels;
    if (args.channels_last) {
      to = sample + y * args.width * all + c;
      row = args.width * all, column = all, output = args.channels;
    } else {
      to = sample + c * pixels + y * args.width;
      row = args.width, column = 1, output = args.channels * pixels;
    }
  }
  // Whether every register is a cache line of its own.
  template <class A>
  bool lines(const ConvArgs& args) const {
    constexpr int64_t n = lanes<A>, line = 64 / int64_t(sizeof(T));
    return n == line && reinterpret_cast<uintptr_t>(to) % 64 == 0 && row % line == 0 && output % line == 0 &&
           (args.channels_last ? column % line == 0 : args.width % n == 0);
  }
};

// Calls f(past, filled): whether the registers of `target` go past the caches, as a constant, and how many of a
// register's lanes are results; of `count` channels.
template <class A, class T, class F>
inline void with_stores(const ConvArgs& args, const Target<T>& target, int64_t count, const F& f) {
  const int64_t filled = std::min<int64_t>(args.channels_last ? count : args.width, lanes<A>);
  if constexpr (sizeof(T) * lanes<A> == 64) {
    if (args.stream && target.template lines<A>(args)) return f(std::true_type{}, lanes<A>);
  }
  f(std::false_type{}, filled);
}

// Where a tile's rows go: into the result, or first aside where fewer lanes of a register are results.
template <bool Past, int Rows, class A, class T>
struct Put {
  int64_t filled, pitch;  // of the result
  T aside[Rows * lanes<A>];

  Put(int64_t filled, int64_t pitch) : filled(filled), pitch(pitch) {}
  __attribute__((always_inline)) void operator()(T* to, const vec<A> (&rows)[Rows]) {
    const bool whole = Past || filled == lanes<A>;
    T* at = whole ? to : aside;
    const int64_t next = whole ? pitch : lanes<A>;
    for (int i = 0; i < Rows; ++i) Past ? stream(at + i * next, rows[i]) : store(at + i * next, rows[i]);
    if (whole) return;
    for (int i = 0; i < Rows; ++i) std::copy_n(aside + i * lanes<A>, filled, to + i * pitch);
  }
};

// Kernels of one owner's vector of channels as vectors (T, lanes): one value a plane, or one a channel.
template <class A>
void spread_kernels(const ConvArgs& args, int64_t b, int64_t c, int64_t count, A* spread) {
  constexpr int64_t n = lanes<A>;
  const A* from = static_cast<const A*>(args.kernels) + (b * args.channels + c) * args.taps;
  for (int64_t t = 0; t < args.taps; ++t) {
    if (!args.channels_last) {
      store(spread + t * n, broadcast(from[t]));
    } else {
      for (int64_t i = 0; i < n; ++i) spread[t * n + i] = i < count ? from[i * args.taps + t] : A(0);
    }
  }
}

// ---- what happens beside the arithmetic -----------------------------------------------------------------------------

// Memory that the next strip will read or write: `count` pieces of `bytes`, `stride` apart.
struct Fetch {
  const char* data;
  int64_t count, stride, bytes;
  bool write;

  // always_inline: GCC 12 may take a function that prefetches for one without effect, and drop its calls
  __attribute__((always_inline)) void run(int64_t pieces) {
    for (int64_t i = 0, n = std::min(pieces, count); i < n; ++i, data += stride) {
      for (int64_t at = 0; at < bytes; at += 64)
        write ? __builtin_prefetch(data + at, 1, 3) : __builtin_prefetch(data + at, 0, 2);
    }
    count -= std::min(pieces, count);
  }
};

// A share of the fetches after every tile: one after the other, reading and computing would take turns. No division in
// a step: eight of them a tile took a twentieth of the forward.
struct Ahead {
  std::vector<std::pair<Fetch, int64_t>> fetches;  // and its pieces a step
  int64_t steps = 1;

  void restart(int64_t of) {
    fetches.clear();
    steps = std::max<int64_t>(1, of);
  }
  void add(const Fetch& fetch) { fetches.push_back({fetch, ceil_div(fetch.count, steps)}); }
  void step() {
    for (auto& [fetch, share] : fetches) fetch.run(share);
  }
};

// ---- one tile: Rows rows of one vector ------------------------------------------------------------------------------
//
// `x` is the padded scratch at the tile's first row and column, halo included: the tap (r, c) of row i is at
// (i + reach_rows + r) * pitch + (reach_columns + c) * step.

template <int Rows, class A>
struct Window {
  vec<A> v[Rows + 4];
  Window(const A* x, int64_t pitch) {
    for (int i = 0; i < Rows + 4; ++i) v[i] = load(x + i * pitch);
  }
};

// 5x5, and 5x1 and 1x5 with Three. Flipped kernels give the gradient to x of one output.
template <int Rows, bool Three, bool Past, class A, class T>
inline void cross_tile(const A* x, int64_t pitch, int64_t step, const A* square, const A* vertical, const A* horizontal,
                       T* const (&out)[3], Put<Past, Rows, A, T>& put) {
  constexpr int64_t n = lanes<A>;
  vec<A> acc[3][Rows] = {}, odd[Rows] = {};  // odd columns of the square: two chains half as long
#pragma GCC unroll 5
  for (int c = 0; c < 5; ++c) {
    const Window<Rows, A> window(x + c * step, pitch);
    vec<A>(&sum)[Rows] = c % 2 ? odd : acc[0];
#pragma GCC unroll 5
    for (int r = 0; r < 5; ++r) {
      const vec<A> k = load(square + (r * 5 + c) * n);
      for (int i = 0; i < Rows; ++i) sum[i] += window.v[i + r] * k;
    }
    if (Three) {
      if (c == 2) {
#pragma GCC unroll 5
        for (int r = 0; r < 5; ++r) {
          const vec<A> k = load(vertical + r * n);
          for (int i = 0; i < Rows; ++i) acc[1][i] += window.v[i + r] * k;
        }
      }
      const vec<A> k = load(horizontal + c * n);
      for (int i = 0; i < Rows; ++i) acc[2][i] += window.v[i + 2] * k;
    }
  }
  for (int i = 0; i < Rows; ++i) acc[0][i] += odd[i];
#pragma GCC unroll 3  // an index that the compiler does not know would put the accumulators into memory
  for (int o = 0; o < (Three ? 3 : 1); ++o) put(out[o], acc[o]);
}

// The gradient to x: sum over the outputs of their gradients with flipped kernels.
template <int Rows, bool Three, bool Past, class A, class T>
inline void cross_tile_grad(const A* const (&grad)[3], int64_t pitch, int64_t step, const A* square, const A* vertical,
                            const A* horizontal, T* out, Put<Past, Rows, A, T>& put) {
  constexpr int64_t n = lanes<A>;
  vec<A> acc[Rows] = {}, odd[Rows] = {};
#pragma GCC unroll 5
  for (int c = 0; c < 5; ++c) {
    const Window<Rows, A> window(grad[0] + c * step, pitch);
    vec<A>(&sum)[Rows] = c % 2 ? odd : acc;
#pragma GCC unroll 5
    for (int r = 0; r < 5; ++r) {
      const vec<A> k = load(square + ((4 - r) * 5 + 4 - c) * n);
      for (int i = 0; i < Rows; ++i) sum[i] += window.v[i + r] * k;
    }
    if (Three) {
      const vec<A> k = load(horizontal + (4 - c) * n);
      for (int i = 0; i < Rows; ++i) odd[i] += load(grad[2] + (i + 2) * pitch + c * step) * k;
    }
  }
  if (Three) {
    const Window<Rows, A> window(grad[1] + 2 * step, pitch);
#pragma GCC unroll 5
    for (int r = 0; r < 5; ++r) {
      const vec<A> k = load(vertical + (4 - r) * n);
      for (int i = 0; i < Rows; ++i) acc[i] += window.v[i + r] * k;
    }
  }
  for (int i = 0; i < Rows; ++i) acc[i] += odd[i];
  put(out, acc);
}

template <class A>
inline vec<A> keep(vec<A> v, vec<A> mask) {
  using bits = vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>;
  return (vec<A>)((bits)v & (bits)mask);
}

// Sums of grad * shifted x over Rows whole rows, for one column of the kernels; `last` keeps the lanes of the last
// vector that lie in the plane.
template <int Rows, bool Three, int Column, class A>
inline void cross_sums_column(const A* x, const A* const (&grad)[3], int64_t pitch, int64_t step, int64_t block,
                              int64_t blocks, vec<A> last, A* square, A* vertical, A* horizontal) {
  constexpr int64_t n = lanes<A>;
  constexpr bool middle = Three && Column == 2;
  vec<A> s[5], h = {}, v[5] = {};
  for (int r = 0; r < 5; ++r) s[r] = load(square + (r * 5 + Column) * n);
  if (Three) h = load(horizontal + Column * n);
  if (middle) {
    for (int r = 0; r < 5; ++r) v[r] = load(vertical + r * n);
  }
  const auto visit = [&](int64_t at, auto masked) {
    Window<Rows, A> window(x + at + Column * step, pitch);
    if constexpr (decltype(masked)::value) {
      for (auto& row : window.v) row = keep<A>(row, last);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const vec<A> g = load(grad[0] + at + i * pitch);
#pragma GCC unroll 5
      for (int r = 0; r < 5; ++r) s[r] += g * window.v[i + r];
      if (Three) h += load(grad[2] + at + i * pitch) * window.v[i + 2];
      if (middle) {
        const vec<A> gv = load(grad[1] + at + i * pitch);
#pragma GCC unroll 5
        for (int r = 0; r < 5; ++r) v[r] += gv * window.v[i + r];
      }
    }
  };
  for (int64_t j = 0; j + 1 < blocks; ++j) visit(j * block, std::false_type{});
  visit((blocks - 1) * block, std::true_type{});
  for (int r = 0; r < 5; ++r) store(square + (r * 5 + Column) * n, s[r]);
  if (Three) store(horizontal + Column * n, h);
  if (middle) {
    for (int r = 0; r < 5; ++r) store(vertical + r * n, v[r]);
  }
}

template <int Rows, bool Three, class A>
inline void cross_sums(const A* x, const A* const (&grad)[3], int64_t pitch, int64_t step, int64_t block,
                       int64_t blocks, vec<A> last, A* square, A* vertical, A* horizontal, Ahead& ahead) {
  cross_sums_column<Rows, Three, 0>(x, grad, pitch, step, block, blocks, last, square, vertical, horizontal);
  ahead.step();
  cross_sums_column<Rows, Three, 1>(x, grad, pitch, step, block, blocks, last, square, vertical, horizontal);
  ahead.step();
  cross_sums_column<Rows, Three, 2>(x, grad, pitch, step, block, blocks, last, square, vertical, horizontal);
  ahead.step();
  cross_sums_column<Rows, Three, 3>(x, grad, pitch, step, block, blocks, last, square, vertical, horizontal);
  ahead.step();
  cross_sums_column<Rows, Three, 4>(x, grad, pitch, step, block, blocks, last, square, vertical, horizontal);
  ahead.step();
}

// Any taps: Sign is 1 for the outputs and -1 for the gradient to x.
template <int Rows, int Sign, class A>
inline void any_tile(const A* center, int64_t pitch, int64_t step, const Shift* tap, int64_t taps, const A* kernels,
                     vec<A> (&acc)[Rows]) {
  constexpr int64_t n = lanes<A>;
  for (int64_t t = 0; t < taps; ++t) {
    const A* at = center + Sign * (tap[t].row * pitch + tap[t].column * step);
    const vec<A> k = load(kernels + t * n);
    for (int i = 0; i < Rows; ++i) acc[i] += load(at + i * pitch) * k;
  }
}

// n elements on a cache line, 0 at first.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n) : memory_(size_t(n) + 64 / sizeof(A)) {}
  A* data() {
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (64 - start % 64) % 64 / sizeof(A);
  }

 private:
  std::vector<A> memory_;
};

// ---- one strip ------------------------------------------------------------------------------------------------------

// Calls f(integral_constant<Rows>, first row) for tiles that cover [0, rows). With Overlap the last one moves up to be
// whole, and repeats a few rows.
template <int Rows, bool Overlap, class F>
inline void each_tile(int64_t rows, const F& f) {
  int64_t y = 0;
  for (const int64_t end = Overlap && rows >= Rows ? rows : rows - Rows + 1; y < end; y += Rows) {
    f(std::integral_constant<int, Rows>{}, std::min(y, rows - Rows));
  }
  for (; y + kTail <= rows; y += kTail) f(std::integral_constant<int, kTail>{}, y);
  for (; y < rows; ++y) f(std::integral_constant<int, 1>{}, y);
}
// How many those are, without and with Overlap.
inline int64_t tiles(int64_t rows, int64_t tile) { return rows / tile + rows % tile / kTail + rows % tile % kTail; }
inline int64_t overlapping_tiles(int64_t rows, int64_t tile) {
  return rows < tile ? tiles(rows, tile) : ceil_div(rows, tile);
}

// Calls f(column) for the vectors of a row. Of planes the last one ends with the row, where the row is long enough.
template <class A, class F>
inline void each_vector(const ConvArgs& args, const Strip<A>& s, const F& f) {
  const int64_t next = args.channels_last ? 1 : lanes<A>;
  const int64_t last = args.channels_last || args.width < lanes<A> ? (s.blocks - 1) * next : args.width - lanes<A>;
  for (int64_t j = 0; j < s.blocks; ++j) f(std::min(j * next, last));
}

// x padded (one vector of channels) -> outputs.
template <bool Past, class A, class T>
void convolve(const ConvArgs& args, const Strip<A>& s, int64_t rows, const A* x, const A* kernels, const Target<T>& out,
              int64_t filled, Ahead& ahead) {
  constexpr int64_t n = lanes<A>;
  const Cross& k = args.sizes;
  if (args.cross) {
    const auto run = [&](auto three) {
      constexpr bool Three = decltype(three)::value;
      const A *square = kernels + k.square * n, *vertical = Three ? kernels + k.vertical * n : nullptr,
              *horizontal = Three ? kernels + k.horizontal * n : nullptr;
      T* outs[3] = {out.to, nullptr, nullptr};
      for (int64_t o = 0; o < (Three ? 3 : 0); ++o) {
        outs[args.first[o] == k.square ? 0 : args.first[o] == k.vertical ? 1 : 2] = out.to + o * out.output;
      }
      each_tile<Three ? kTile : kTileOne, true>(rows, [&](auto tile, int64_t y) {
        each_vector(args, s, [&](int64_t z) {
          const int64_t at = y * out.row + z * out.column;
          T* const to[3] = {outs[0] + at, Three ? outs[1] + at : nullptr, Three ? outs[2] + at : nullptr};
          Put<Past, decltype(tile)::value, A, T> put(filled, out.row);
          cross_tile<decltype(tile)::value, Three>(x + y * s.pitch + z * s.step, s.pitch, s.step, square, vertical,
                                                   horizontal, to, put);
          ahead.step();
        });
      });
    };
    return args.outputs == 3 ? run(std::true_type{}) : run(std::false_type{});
  }
  const A* center = x + args.reach_rows * s.pitch + args.reach_columns * s.step;
  each_tile<kTileOne, true>(rows, [&](auto tile, int64_t y) {
    constexpr int R = decltype(tile)::value;
    each_vector(args, s, [&](int64_t z) {
      for (int64_t o = 0; o < args.outputs; ++o) {
        vec<A> acc[R] = {};
        any_tile<R, 1>(center + y * s.pitch + z * s.step, s.pitch, s.step, args.tap + args.first[o],
                       args.first[o + 1] - args.first[o], kernels + args.first[o] * n, acc);
        Put<Past, R, A, T>(filled, out.row)(out.to + o * out.output + y * out.row + z * out.column, acc);
      }
      ahead.step();
    });
  });
}
template <class A>
int64_t convolve_steps(const ConvArgs& args, const Strip<A>& s, int64_t rows) {
  return overlapping_tiles(rows, args.cross && args.outputs == 3 ? kTile : kTileOne) * s.blocks;
}

// Gradients padded (L, padded) -> gradient to x.
template <bool Past, class A, class T>
void convolve_back(const ConvArgs& args, const Strip<A>& s, int64_t rows, const A* const* grads, const A* kernels,
                   const Target<T>& out, int64_t filled, Ahead& ahead) {
  constexpr int64_t n = lanes<A>;
  const Cross& k = args.sizes;
  if (args.cross) {
    const auto run = [&](auto three) {
      constexpr bool Three = decltype(three)::value;
      const A *square = kernels + k.square * n, *vertical = Three ? kernels + k.vertical * n : nullptr,
              *horizontal = Three ? kernels + k.horizontal * n : nullptr;
      each_tile<kTileOne, true>(rows, [&](auto tile, int64_t y) {
        each_vector(args, s, [&](int64_t z) {
          const int64_t from = y * s.pitch + z * s.step;
          const A* const g[3] = {grads[0] + from, Three ? grads[1] + from : nullptr, Three ? grads[2] + from : nullptr};
          Put<Past, decltype(tile)::value, A, T> put(filled, out.row);
          cross_tile_grad<decltype(tile)::value, Three>(g, s.pitch, s.step, square, vertical, horizontal,
                                                        out.to + y * out.row + z * out.column, put);
          ahead.step();
        });
      });
    };
    return args.outputs == 3 ? run(std::true_type{}) : run(std::false_type{});
  }
  const int64_t center = args.reach_rows * s.pitch + args.reach_columns * s.step;
  each_tile<kTileOne, true>(rows, [&](auto tile, int64_t y) {
    constexpr int R = decltype(tile)::value;
    each_vector(args, s, [&](int64_t z) {
      vec<A> acc[R] = {};
      for (int64_t o = 0; o < args.outputs; ++o) {
        any_tile<R, -1>(grads[o] + center + y * s.pitch + z * s.step, s.pitch, s.step, args.tap + args.first[o],
                        args.first[o + 1] - args.first[o], kernels + args.first[o] * n, acc);
      }
      Put<Past, R, A, T>(filled, out.row)(out.to + y * out.row + z * out.column, acc);
      ahead.step();
    });
  });
}

// sums (T, lanes) += gradient * shifted x over the strip.
template <class A>
void sum_products(const ConvArgs& args, const Strip<A>& s, int64_t rows, const A* x, const A* const* grads, A* sums,
                  Ahead& ahead) {
  constexpr int64_t n = lanes<A>;
  const int64_t center = args.reach_rows * s.pitch + args.reach_columns * s.step;
  using integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  integer inside[n];
  for (int64_t i = 0; i < n; ++i) {
    inside[i] = args.channels_last || (s.blocks - 1) * n + i < args.width ? integer(-1) : integer(0);
  }
  vec<A> last;
  std::memcpy(&last, inside, sizeof(last));
  each_tile<kTileSums, false>(rows, [&](auto tile, int64_t y) {
    constexpr int R = decltype(tile)::value;
    const int64_t at = y * s.pitch;
    if (args.cross) {
      const auto run = [&](auto three) {
        constexpr bool Three = decltype(three)::value;
        const Cross& k = args.sizes;
        const A* const g[3] = {grads[0] + center + at, Three ? grads[1] + center + at : nullptr,
                               Three ? grads[2] + center + at : nullptr};
        cross_sums<R, Three>(x + at, g, s.pitch, s.step, s.block, s.blocks, last, sums + k.square * n,
                             Three ? sums + k.vertical * n : nullptr, Three ? sums + k.horizontal * n : nullptr, ahead);
      };
      return args.outputs == 3 ? run(std::true_type{}) : run(std::false_type{});
    }
    for (int64_t o = 0; o < args.outputs; ++o) {
      const A* g = grads[o] + center + at;
      for (int64_t t = args.first[o]; t < args.first[o + 1]; ++t) {
        const A* from = x + center + at + args.tap[t].row * s.pitch + args.tap[t].column * s.step;
        vec<A> acc[R] = {};
        for (int64_t j = 0; j < s.blocks; ++j) {
          for (int i = 0; i < R; ++i) {
            vec<A> v = load(from + i * s.pitch + j * s.block);
            if (j + 1 == s.blocks) v = keep<A>(v, last);
            acc[i] += load(g + i * s.pitch + j * s.block) * v;
          }
        }
        for (int i = 1; i < R; ++i) acc[0] += acc[i];
        store(sums + t * n, load(sums + t * n) + acc[0]);
      }
    }
    for (int i = 0; i < 5; ++i) ahead.step();
  });
}
inline int64_t sum_steps(int64_t rows) { return tiles(rows, kTileSums) * 5; }

// ---- tasks ----------------------------------------------------------------------------------------------------------

// What one task owns: a plane, or `groups` vectors of channels from c0 on.
template <class T, class A>
struct Owner {
  int64_t b, c0, groups, owned;

  Owner(const ConvArgs& args, const Strip<A>& s, int64_t owner) {
    const int64_t each = args.channels_last ? s.groups * lanes<A> : 1;
    const int64_t per_sample = ceil_div(args.channels, each);
    b = owner / per_sample, c0 = owner % per_sample * each;
    owned = std::min(each, args.channels - c0);
    groups = args.channels_last ? ceil_div(owned, lanes<A>) : 1;
  }
  int64_t channel(int64_t group) const { return c0 + group * lanes<A>; }
  int64_t count(int64_t group) const { return std::min<int64_t>(lanes<A>, owned - group * lanes<A>); }
};

// A (B, ., H, W) tensor as the tasks read it.
struct Source {
  const void* data;
  int64_t stride_b, stride_row;
};

// Rows [y0, y1) of channel c into padded scratch.
template <class T, class A>
void read_strip(const ConvArgs& args, const Strip<A>& s, const Source& from, int64_t b, int64_t c, int64_t count,
                int64_t y0, int64_t y1, A* padded) {
  const T* sample = static_cast<const T*>(from.data) + b * from.stride_b;
  if (args.channels_last) {
    pad_channels<T>(args, s, sample + c, from.stride_row, count, y0, y1, padded);
  } else {
    pad_plane<T>(args, s, sample + c * from.stride_row, y0, y1, padded);
  }
}

// The same rows, to be fetched.
template <class T>
Fetch fetch_strip(const ConvArgs& args, const Source& from, int64_t b, int64_t c, int64_t owned, int64_t y0,
                  int64_t y1) {
  const T* sample = static_cast<const T*>(from.data) + b * from.stride_b;
  y0 = std::max<int64_t>(0, y0 - args.reach_rows), y1 = std::min(args.height, y1 + args.reach_rows);
  const int64_t size = int64_t(sizeof(T)), pixels = (y1 - y0) * args.width;
  if (args.channels_last) {
    const T* first = sample + y0 * args.width * from.stride_row + c;
    return {reinterpret_cast<const char*>(first), pixels, from.stride_row * size, owned * size, false};
  }
  const T* first = sample + c * from.stride_row + y0 * args.width;
  return {reinterpret_cast<const char*>(first), ceil_div(pixels * size, 64), 64, 64, false};
}

// The lines of one output of a strip.
template <class T>
Fetch fetch_target(const ConvArgs& args, const Target<T>& target, int64_t output, int64_t owned, int64_t rows) {
  const int64_t size = int64_t(sizeof(T)), pixels = rows * args.width;
  const char* first = reinterpret_cast<const char*>(target.to + output * target.output);
  if (args.channels_last) return {first, pixels, target.column * size, owned * size, true};
  return {first, ceil_div(pixels * size, 64), 64, 64, true};
}

// Outputs; task = (owner, strip).
template <class T>
void forward(const ConvArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Strip<A> s(args, int64_t(sizeof(T)));
  const int64_t strips = s.count(args);
  const Source x{args.x, args.stride_b, args.stride_row};
  Scratch<A> padded(s.padded + lanes<A>), kernels(args.taps * lanes<A>);
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const Owner<T, A> owner(args, s, task / strips);
    const int64_t y0 = task % strips * s.rows, y1 = std::min(y0 + s.rows, args.height);
    ahead.restart(owner.groups * convolve_steps(args, s, y1 - y0));
    if (task + 1 < end) {
      const Owner<T, A> next(args, s, (task + 1) / strips);
      const int64_t a = (task + 1) % strips * s.rows, b = std::min(a + s.rows, args.height);
      ahead.add(fetch_strip<T>(args, x, next.b, next.c0, next.owned, a, b));
      const Target<T> target(args, args.out, args.outputs, next.b, next.c0, a);
      for (int64_t o = 0; o < args.outputs && args.stream && !target.template lines<A>(args); ++o) {
        ahead.add(fetch_target(args, target, o, next.owned, b - a));
      }
    }
    for (int64_t g = 0; g < owner.groups; ++g) {
      const int64_t c = owner.channel(g), count = owner.count(g);
      spread_kernels(args, owner.b, c, count, kernels.data());
      read_strip<T>(args, s, x, owner.b, c, count, y0, y1, padded.data());
      const Target<T> target(args, args.out, args.outputs, owner.b, c, y0);
      with_stores<A>(args, target, count, [&](auto past, int64_t filled) {
        convolve<decltype(past)::value>(args, s, y1 - y0, padded.data(), kernels.data(), target, filled, ahead);
      });
    }
  }
  if (args.stream) stream_fence();
}

// Gradients; task = owner.
template <class T>
void backward(const ConvArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int64_t n = lanes<A>;
  const Strip<A> s(args, int64_t(sizeof(T)));
  const bool need_x = args.grad_x != nullptr, need_kernels = args.grad_kernels != nullptr;
  const Source from_x{args.x, args.stride_b, args.stride_row};
  const Source from_grad{args.grad, args.grad_stride_b, args.grad_stride_row};
  const int64_t spread = args.taps * n, each = s.padded + n;
  Scratch<A> x(need_kernels ? each : 0), grad(args.outputs * each), kernels(s.groups * spread);
  Scratch<A> sums(spread), totals(s.groups * spread);
  std::vector<const A*> grads(static_cast<size_t>(args.outputs));  // the tiles want 5x5, 5x1, 1x5
  for (int64_t o = 0; o < args.outputs; ++o) {
    const bool three = args.cross && args.outputs == 3;
    const int64_t first = args.first[o];
    const int64_t place = !three ? o : first == args.sizes.square ? 0 : first == args.sizes.vertical ? 1 : 2;
    grads[size_t(place)] = grad.data() + o * each;
  }
  Ahead ahead;
  for (int64_t task = begin; task < end; ++task) {
    const Owner<T, A> owner(args, s, task);
    for (int64_t g = 0; g < owner.groups && need_x; ++g) {
      spread_kernels(args, owner.b, owner.channel(g), owner.count(g), kernels.data() + g * spread);
    }
    std::fill_n(totals.data(), s.groups * spread, A(0));
    for (int64_t y0 = 0; y0 < args.height; y0 += s.rows) {
      const int64_t y1 = std::min(y0 + s.rows, args.height), rows = y1 - y0;
      ahead.restart(owner.groups * ((need_x ? overlapping_tiles(rows, kTileOne) * s.blocks : 0) +
                                    (need_kernels ? sum_steps(rows) : 0)));
      const bool more = y1 < args.height;
      if (more || task + 1 < end) {
        const Owner<T, A> next = more ? owner : Owner<T, A>(args, s, task + 1);
        const int64_t a = more ? y1 : 0, b = std::min(a + s.rows, args.height);
        for (int64_t o = 0; o < args.outputs; ++o) {
          const int64_t c = o * args.channels + next.c0;
          ahead.add(fetch_strip<T>(args, from_grad, next.b, c, next.owned, a, b));
        }
        if (need_kernels) ahead.add(fetch_strip<T>(args, from_x, next.b, next.c0, next.owned, a, b));
        const Target<T> target(args, args.grad_x, 1, next.b, next.c0, a);
        if (need_x && args.stream && !target.template lines<A>(args)) {
          ahead.add(fetch_target(args, target, 0, next.owned, b - a));
        }
      }
      for (int64_t g = 0; g < owner.groups; ++g) {
        const int64_t c = owner.channel(g), count = owner.count(g);
        for (int64_t o = 0; o < args.outputs; ++o) {
          read_strip<T>(args, s, from_grad, owner.b, o * args.channels + c, count, y0, y1, grad.data() + o * each);
        }
        if (need_kernels) {
          read_strip<T>(args, s, from_x, owner.b, c, count, y0, y1, x.data());
          std::fill_n(sums.data(), spread, A(0));
          sum_products(args, s, rows, x.data(), grads.data(), sums.data(), ahead);
          for (int64_t i = 0; i < spread; ++i) totals.data()[g * spread + i] += sums.data()[i];
        }
        if (need_x) {
          const Target<T> target(args, args.grad_x, 1, owner.b, c, y0);
          with_stores<A>(args, target, count, [&](auto past, int64_t filled) {
            convolve_back<decltype(past)::value>(args, s, rows, grads.data(), kernels.data() + g * spread, target,
                                                 filled, ahead);
          });
        }
      }
    }
    for (int64_t g = 0; g < owner.groups && need_kernels; ++g) {
      const A* total = totals.data() + g * spread;
      A* to = static_cast<A*>(args.grad_kernels) + (owner.b * args.channels + owner.channel(g)) * args.taps;
      for (int64_t t = 0; t < args.taps; ++t) {
        if (!args.channels_last) {
          to[t] = sum<A>(load(total + t * n));
        } else {
          for (int64_t i = 0; i < owner.count(g); ++i) to[i * args.taps + t] = total[t * n + i];
        }
      }
    }
  }
  if (args.stream) stream_fence();
}

}  // namespace dynamic_conv2d
}  // namespace FSS_ISA
}  // namespace fss
#endif
