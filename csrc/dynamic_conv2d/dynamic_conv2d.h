// Per-sample depthwise convolution, CPU core: raw pointers and strides only, compiled once per instruction set.
//
//   out[b, o*C + c, y, z] = sum over taps t of output o: k[b,c,t] x[b, c, y + row(t), z + column(t)],  x = 0 outside
//
// A register holds `lanes` neighbours that share an offset: columns of one plane, or channels of one pixel when the
// tensor is channels_last. Only copying in and out knows which; the arithmetic is the same code.
//
// Decomposition: a task copies a strip of rows with its halo of zeros, widened, into scratch that stays in cache,
// computes every output of it from there and writes each result once. Strips are cut by the shape alone.
// Registers: kTile rows at once; a shifted vector of x serves every tap and every output it meets, a tap kTile rows.
// Traffic: x once (and the halo of a strip), the outputs once, past the caches when they are large. The backward reads
// x and the gradients once and writes both results from the same strips.
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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One branch's kernels, or their gradients: (B, C, height, width), and the tap of each of their elements.
struct Branch {
  void* data;
  int64_t stride_b, stride_c, stride_h, stride_w;
  int64_t height, width;
  const int64_t* tap;
};

struct Tap {
  int64_t row, column;  // of x, relative to the output
};

// The kernels of three sizes that the fast paths know: their first tap, -1 where there is none.
struct Cross {
  int64_t square, vertical, horizontal;  // 5x5, 5x1, 1x5
};

struct ConvArgs {
  int64_t batch, channels, height, width;
  bool channels_last;
  bool stream;  // write results past the caches
  const void* x;
  int64_t stride_b, stride_row;  // of x: samples; planes, or pixels when channels_last
  const void* grad;              // (B, L*C, H, W), for the backward
  int64_t grad_stride_b, grad_stride_row;
  void* kernels;  // (B, C, T) in the accumulation type
  void* out;            // (B, L*C, H, W) dense
  void* grad_x;         // (B, C, H, W) dense, or null
  void* grad_kernels;   // (B, C, T) in the accumulation type, or null
  int64_t outputs, taps;
  const int64_t* first;  // (L + 1): output o has the taps [first[o], first[o + 1])
  const Tap* tap;        // (T)
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

// Rows of one register tile: as many as leave the accumulators of three outputs in registers.
constexpr int kTile = FSS_ISA_LEVEL == 2 ? 4 : 2;

// Where things are in a strip's scratch, in elements.
template <class A>
struct Strip {
  int64_t rows;          // of a full strip
  int64_t step;          // from a column to the next: 1, or lanes when channels_last
  int64_t blocks;        // vectors in a row of outputs
  int64_t block;         // from one of them to the next
  int64_t pitch;         // of the padded scratch: from a row to the next
  int64_t out_pitch;     // the same of the results, which are dense
  int64_t groups;        // vectors of channels that a task owns
  int64_t padded, dense;  // elements of the padded and of the dense scratch of one vector of channels

  explicit Strip(const ConvArgs& args, int64_t type_bytes) {
    constexpr int64_t n = lanes<A>;
    const int64_t columns = args.channels_last ? args.width : ceil_div(args.width, n) * n;
    step = args.channels_last ? n : 1;
    block = n;
    blocks = args.channels_last ? args.width : columns / n;
    groups = args.channels_last ? std::max<int64_t>(1, kChannelBytes / type_bytes / n) : 1;
    pitch = (columns + 2 * args.reach_columns) * step;
    out_pitch = args.width * step;
    const int64_t fit = kStripBytes / int64_t(sizeof(A)) / pitch - 2 * args.reach_rows;
    rows = std::min(args.height, std::max<int64_t>(2 * kTile, fit));
    rows = ceil_div(args.height, ceil_div(args.height, rows));  // strips of the same size
    padded = (rows + 2 * args.reach_rows) * pitch;
    dense = rows * out_pitch + n;  // the last vector of a row may pass its end
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
      const T* from = static_cast<const T*>(k->data) + task / args.channels * k->stride_b +
                      task % args.channels * k->stride_c;
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

// Rows [y0, y1) of a plane with its halo; rows and columns outside it are 0.
template <class T, class A>
void pad_plane(const ConvArgs& args, const Strip<A>& s, const T* plane, int64_t y0, int64_t y1, A* padded) {
  constexpr int64_t n = lanes<A>;
  const int64_t w = args.width;
  for (int64_t y = y0 - args.reach_rows; y < y1 + args.reach_rows; ++y, padded += s.pitch) {
    if (y < 0 || y >= args.height) {
      std::fill_n(padded, s.pitch, A(0));
      continue;
    }
    const T* row = plane + y * w;
    A* to = padded + args.reach_columns;
    std::fill_n(padded, args.reach_columns, A(0));
    int64_t z = 0;
    for (; z + n <= w; z += n) store(to + z, load(row + z));
    if (z < w) {
      for (; z < w; ++z) to[z] = widen<A>(row[z]);
    }
    std::fill(to + w, padded + s.pitch, A(0));
  }
}

// The same of `count` <= lanes channels of every pixel; the other lanes are 0.
template <class T, class A>
void pad_channels(const ConvArgs& args, const Strip<A>& s, const T* pixels, int64_t stride, int64_t count, int64_t y0,
                  int64_t y1, A* padded) {
  constexpr int64_t n = lanes<A>;
  const int64_t edge = args.reach_columns * n;
  for (int64_t y = y0 - args.reach_rows; y < y1 + args.reach_rows; ++y, padded += s.pitch) {
    if (y < 0 || y >= args.height) {
      std::fill_n(padded, s.pitch, A(0));
      continue;
    }
    std::fill_n(padded, edge, A(0));
    const T* pixel = pixels + y * args.width * stride;
    A* to = padded + edge;
    for (int64_t z = 0; z < args.width; ++z, pixel += stride, to += n) {
      store(to, count == n ? load(pixel) : load_partial(pixel, count));
    }
    std::fill_n(to, edge, A(0));
  }
}

// `count` results to dense memory.
template <class T, class A>
void write_plane(const A* from, T* to, int64_t count, bool past_caches) {
  constexpr int64_t n = lanes<A>;
  int64_t i = 0;
  if (past_caches) {
    constexpr int64_t line = 64 / int64_t(sizeof(T));
    const int64_t head = int64_t((64 - reinterpret_cast<uintptr_t>(to) % 64) % 64 / sizeof(T));
    for (; i < std::min(head, count); ++i) to[i] = narrow<T>(from[i]);
    for (; i + line <= count; i += line) {
      for (int64_t j = 0; j < line; j += n) stream(to + i + j, load(from + i + j));
    }
  }
  for (; i + n <= count; i += n) store(to + i, load(from + i));
  if (i < count) store_partial(to + i, load(from + i), count - i);
}

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
template <int Rows, bool Three, class A>
inline void cross_tile(const A* x, int64_t pitch, int64_t step, const A* square, const A* vertical, const A* horizontal,
                       A* const (&out)[3], int64_t out_pitch) {
  constexpr int64_t n = lanes<A>;
  vec<A> acc[3][Rows] = {};
#pragma GCC unroll 5
  for (int c = 0; c < 5; ++c) {
    const Window<Rows, A> window(x + c * step, pitch);
#pragma GCC unroll 5
    for (int r = 0; r < 5; ++r) {
      const vec<A> k = load(square + (r * 5 + c) * n);
      for (int i = 0; i < Rows; ++i) acc[0][i] += window.v[i + r] * k;
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
  for (int o = 0; o < (Three ? 3 : 1); ++o) {
    for (int i = 0; i < Rows; ++i) store(out[o] + i * out_pitch, acc[o][i]);
  }
}

// The gradient to x: sum over the outputs of their gradients with flipped kernels.
template <int Rows, bool Three, class A>
inline void cross_tile_grad(const A* const (&grad)[3], int64_t pitch, int64_t step, const A* square, const A* vertical,
                            const A* horizontal, A* out, int64_t out_pitch) {
  constexpr int64_t n = lanes<A>;
  vec<A> acc[Rows] = {};
#pragma GCC unroll 5
  for (int c = 0; c < 5; ++c) {
    const Window<Rows, A> window(grad[0] + c * step, pitch);
#pragma GCC unroll 5
    for (int r = 0; r < 5; ++r) {
      const vec<A> k = load(square + ((4 - r) * 5 + 4 - c) * n);
      for (int i = 0; i < Rows; ++i) acc[i] += window.v[i + r] * k;
    }
    if (Three) {
      const vec<A> k = load(horizontal + (4 - c) * n);
      for (int i = 0; i < Rows; ++i) acc[i] += load(grad[2] + (i + 2) * pitch + c * step) * k;
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
  for (int i = 0; i < Rows; ++i) store(out + i * out_pitch, acc[i]);
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
#pragma GCC unroll 4
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
                       int64_t blocks, vec<A> last, A* square, A* vertical, A* horizontal) {
  cross_sums_column<Rows, Three, 0>(x, grad, pitch, step, block, blocks, last, square, vertical, horizontal);
  cross_sums_column<Rows, Three, 1>(x, grad, pitch, step, block, blocks, last, square, vertical, horizontal);
  cross_sums_column<Rows, Three, 2>(x, grad, pitch, step, block, blocks, last, square, vertical, horizontal);
  cross_sums_column<Rows, Three, 3>(x, grad, pitch, step, block, blocks, last, square, vertical, horizontal);
  cross_sums_column<Rows, Three, 4>(x, grad, pitch, step, block, blocks, last, square, vertical, horizontal);
}

// Any taps: Sign is 1 for the outputs and -1 for the gradient to x.
template <int Rows, int Sign, class A>
inline void any_tile(const A* center, int64_t pitch, int64_t step, const Tap* tap, int64_t taps, const A* kernels,
                     vec<A> (&acc)[Rows]) {
  constexpr int64_t n = lanes<A>;
  for (int64_t t = 0; t < taps; ++t) {
    const A* at = center + Sign * (tap[t].row * pitch + tap[t].column * step);
    const vec<A> k = load(kernels + t * n);
    for (int i = 0; i < Rows; ++i) acc[i] += load(at + i * pitch) * k;
  }
}

// ---- one strip ------------------------------------------------------------------------------------------------------

// Calls f(integral_constant<Rows>, first row) for tiles that cover [0, rows).
template <class F>
inline void each_tile(int64_t rows, const F& f) {
  int64_t y = 0;
  for (; y + kTile <= rows; y += kTile) f(std::integral_constant<int, kTile>{}, y);
  for (; y < rows; ++y) f(std::integral_constant<int, 1>{}, y);
}

// Vectors of a row whose last one ends with the row where the row is long enough; results past its end are overwritten
// by the next row or never read.
template <class A, class F>
inline void each_vector(const ConvArgs& args, const Strip<A>& s, const F& f) {
  constexpr int64_t n = lanes<A>;
  for (int64_t j = 0; j < s.blocks; ++j) {
    const bool last = !args.channels_last && j + 1 == s.blocks && args.width >= n;
    f(last ? args.width - n : j * s.block);
  }
}

// x padded (one vector of channels) -> outputs (L, rows, ...) dense.
template <class A>
void convolve(const ConvArgs& args, const Strip<A>& s, int64_t rows, const A* x, const A* kernels, A* out) {
  constexpr int64_t n = lanes<A>;
  each_tile(rows, [&](auto tile, int64_t y) {
    constexpr int R = decltype(tile)::value;
    each_vector(args, s, [&](int64_t at) {
      const A* from = x + y * s.pitch + at;
      A* to = out + y * s.out_pitch + at;
      if (args.cross) {
        const Cross& k = args.sizes;
        const auto output = [&](int64_t first) {
          int64_t o = 0;
          while (args.first[o] != first) ++o;
          return to + o * s.dense;
        };
        if (args.outputs == 3) {
          A* const outs[3] = {output(k.square), output(k.vertical), output(k.horizontal)};
          cross_tile<R, true>(from, s.pitch, s.step, kernels + k.square * n, kernels + k.vertical * n,
                              kernels + k.horizontal * n, outs, s.out_pitch);
        } else {
          A* const outs[3] = {to, nullptr, nullptr};
          cross_tile<R, false, A>(from, s.pitch, s.step, kernels, nullptr, nullptr, outs, s.out_pitch);
        }
        return;
      }
      const A* center = from + args.reach_rows * s.pitch + args.reach_columns * s.step;
      for (int64_t o = 0; o < args.outputs; ++o) {
        vec<A> acc[R] = {};
        any_tile<R, 1>(center, s.pitch, s.step, args.tap + args.first[o], args.first[o + 1] - args.first[o],
                       kernels + args.first[o] * n, acc);
        for (int i = 0; i < R; ++i) store(to + o * s.dense + i * s.out_pitch, acc[i]);
      }
    });
  });
}

// gradients padded (L, padded) -> gradient to x (rows, ...) dense.
template <class A>
void convolve_back(const ConvArgs& args, const Strip<A>& s, int64_t rows, const A* const* grads, const A* kernels,
                   A* out) {
  constexpr int64_t n = lanes<A>;
  each_tile(rows, [&](auto tile, int64_t y) {
    constexpr int R = decltype(tile)::value;
    each_vector(args, s, [&](int64_t at) {
      const int64_t offset = y * s.pitch + at;
      A* to = out + y * s.out_pitch + at;
      if (args.cross && args.outputs == 3) {
        const Cross& k = args.sizes;
        const A* const from[3] = {grads[0] + offset, grads[1] + offset, grads[2] + offset};
        cross_tile_grad<R, true>(from, s.pitch, s.step, kernels + k.square * n, kernels + k.vertical * n,
                                 kernels + k.horizontal * n, to, s.out_pitch);
      } else if (args.cross) {
        const A* const from[3] = {grads[0] + offset, nullptr, nullptr};
        cross_tile_grad<R, false, A>(from, s.pitch, s.step, kernels, nullptr, nullptr, to, s.out_pitch);
      } else {
        const int64_t center = offset + args.reach_rows * s.pitch + args.reach_columns * s.step;
        vec<A> acc[R] = {};
        for (int64_t o = 0; o < args.outputs; ++o) {
          any_tile<R, -1>(grads[o] + center, s.pitch, s.step, args.tap + args.first[o],
                          args.first[o + 1] - args.first[o], kernels + args.first[o] * n, acc);
        }
        for (int i = 0; i < R; ++i) store(to + i * s.out_pitch, acc[i]);
      }
    });
  });
}

// sums (T, lanes) += gradient * shifted x over the strip.
template <class A>
void sum_products(const ConvArgs& args, const Strip<A>& s, int64_t rows, const A* x, const A* const* grads, A* sums) {
  constexpr int64_t n = lanes<A>;
  const int64_t center = args.reach_rows * s.pitch + args.reach_columns * s.step;
  using integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  integer inside[n];
  for (int64_t i = 0; i < n; ++i) {
    inside[i] = args.channels_last || (s.blocks - 1) * n + i < args.width ? integer(-1) : integer(0);
  }
  vec<A> last;
  std::memcpy(&last, inside, sizeof(last));
  each_tile(rows, [&](auto tile, int64_t y) {
    constexpr int R = decltype(tile)::value;
    const int64_t offset = y * s.pitch;
    if (args.cross && args.outputs == 3) {
      const Cross& k = args.sizes;
      const A* const g[3] = {grads[0] + center + offset, grads[1] + center + offset, grads[2] + center + offset};
      cross_sums<R, true>(x + offset, g, s.pitch, s.step, s.block, s.blocks, last, sums + k.square * n,
                          sums + k.vertical * n, sums + k.horizontal * n);
    } else if (args.cross) {
      const A* const g[3] = {grads[0] + center + offset, nullptr, nullptr};
      cross_sums<R, false, A>(x + offset, g, s.pitch, s.step, s.block, s.blocks, last, sums, nullptr, nullptr);
    } else {
      for (int64_t o = 0; o < args.outputs; ++o) {
        const A* g = grads[o] + center + offset;
        for (int64_t t = args.first[o]; t < args.first[o + 1]; ++t) {
          const A* at = x + center + offset + args.tap[t].row * s.pitch + args.tap[t].column * s.step;
          vec<A> acc[R] = {};
          for (int64_t j = 0; j < s.blocks; ++j) {
            for (int i = 0; i < R; ++i) {
              vec<A> v = load(at + i * s.pitch + j * s.block);
              if (j + 1 == s.blocks) v = keep<A>(v, last);
              acc[i] += load(g + i * s.pitch + j * s.block) * v;
            }
          }
          for (int i = 1; i < R; ++i) acc[0] += acc[i];
          store(sums + t * n, load(sums + t * n) + acc[0]);
        }
      }
    }
  });
}

// ---- tasks ----------------------------------------------------------------------------------------------------------

// The vectors of channels [c0, c0 + lanes) that an owner holds: one plane, or the channels of a group.
template <class T, class A>
struct Owner {
  int64_t b, c0, groups;

  Owner(const ConvArgs& args, const Strip<A>& s, int64_t owner) {
    const int64_t each = args.channels_last ? s.groups * lanes<A> : 1;
    const int64_t per_sample = ceil_div(args.channels, each);
    b = owner / per_sample, c0 = owner % per_sample * each;
    groups = args.channels_last ? ceil_div(std::min(each, args.channels - c0), lanes<A>) : 1;
  }
  int64_t channel(int64_t group) const { return c0 + group * lanes<A>; }
  int64_t count(const ConvArgs& args, int64_t group) const {
    return args.channels_last ? std::min<int64_t>(lanes<A>, args.channels - channel(group)) : 1;
  }
};

// Rows [y0, y1) of channel c of a (B, ., H, W) tensor into padded scratch.
template <class T, class A>
void read_strip(const ConvArgs& args, const Strip<A>& s, const void* data, int64_t stride_b, int64_t stride_row,
                int64_t b, int64_t c, int64_t count, int64_t y0, int64_t y1, A* padded) {
  const T* sample = static_cast<const T*>(data) + b * stride_b;
  if (args.channels_last) {
    pad_channels<T>(args, s, sample + c, stride_row, count, y0, y1, padded);
  } else {
    pad_plane<T>(args, s, sample + c * stride_row, y0, y1, padded);
  }
}

// Results (groups, rows, ...) of `channels` channels in all, to channel c of a dense tensor.
template <class T, class A>
void write_strip(const ConvArgs& args, const Strip<A>& s, const A* from, int64_t group_stride, void* data,
                 int64_t channels, int64_t b, int64_t c, const Owner<T, A>& owner, int64_t y0, int64_t rows) {
  constexpr int64_t n = lanes<A>;
  const int64_t pixels = args.height * args.width;
  T* sample = static_cast<T*>(data) + b * channels * pixels;
  if (!args.channels_last) {
    write_plane(from, sample + c * pixels + y0 * args.width, rows * args.width, args.stream);
    return;
  }
  for (int64_t i = 0; i < rows * args.width; ++i) {
    T* to = sample + (y0 * args.width + i) * channels + c;
    const bool whole = args.stream && reinterpret_cast<uintptr_t>(to) % 64 == 0 &&
                       owner.groups * n * int64_t(sizeof(T)) % 64 == 0;
    for (int64_t g = 0; g < owner.groups; ++g) {
      const vec<A> v = load(from + g * group_stride + i * n);
      const int64_t count = owner.count(args, g);
      if (count < n) {
        store_partial(to + g * n, v, count);
      } else if (whole) {
        stream(to + g * n, v);
      } else {
        store(to + g * n, v);
      }
    }
  }
}

// Outputs; task = (owner, strip).
template <class T>
void forward(const ConvArgs& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Strip<A> s(args, int64_t(sizeof(T)));
  const int64_t strips = s.count(args);
  std::vector<A> padded(size_t(s.padded + lanes<A>)), kernels(size_t(args.taps * lanes<A>));
  const int64_t outputs = args.outputs * s.dense;
  std::vector<A> out(size_t(s.groups * outputs));
  for (int64_t task = begin; task < end; ++task) {
    const Owner<T, A> owner(args, s, task / strips);
    const int64_t y0 = task % strips * s.rows, y1 = std::min(y0 + s.rows, args.height);
    for (int64_t g = 0; g < owner.groups; ++g) {
      const int64_t c = owner.channel(g), count = owner.count(args, g);
      spread_kernels(args, owner.b, c, count, kernels.data());
      read_strip<T>(args, s, args.x, args.stride_b, args.stride_row, owner.b, c, count, y0, y1, padded.data());
      convolve(args, s, y1 - y0, padded.data(), kernels.data(), out.data() + g * outputs);
    }
    for (int64_t o = 0; o < args.outputs; ++o) {
      write_strip<T>(args, s, out.data() + o * s.dense, outputs, args.out, args.outputs * args.channels, owner.b,
                     o * args.channels + owner.c0, owner, y0, y1 - y0);
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
  std::vector<A> x(size_t(need_kernels ? s.padded + n : 0)), grad(size_t(args.outputs * (s.padded + n)));
  std::vector<A> kernels(size_t(s.groups * args.taps * n)), result(size_t(need_x ? s.groups * s.dense : 0));
  std::vector<A> sums(size_t(need_kernels ? args.taps * n : 0)), totals(sums.size() * size_t(s.groups));
  std::vector<const A*> grads(static_cast<size_t>(args.outputs));
  // the tiles want 5x5, 5x1, 1x5
  std::vector<int64_t> order(static_cast<size_t>(args.outputs));
  for (int64_t o = 0; o < args.outputs; ++o) {
    const bool three = args.cross && args.outputs == 3;
    order[size_t(o)] = !three ? o : args.first[o] == args.sizes.square ? 0 : args.first[o] == args.sizes.vertical ? 1 : 2;
    grads[size_t(order[size_t(o)])] = grad.data() + o * (s.padded + n);
  }
  for (int64_t task = begin; task < end; ++task) {
    const Owner<T, A> owner(args, s, task);
    for (int64_t g = 0; g < owner.groups && need_x; ++g) {
      spread_kernels(args, owner.b, owner.channel(g), owner.count(args, g), kernels.data() + g * args.taps * n);
    }
    std::fill(totals.begin(), totals.end(), A(0));
    for (int64_t y0 = 0; y0 < args.height; y0 += s.rows) {
      const int64_t y1 = std::min(y0 + s.rows, args.height);
      for (int64_t g = 0; g < owner.groups; ++g) {
        const int64_t c = owner.channel(g), count = owner.count(args, g);
        for (int64_t o = 0; o < args.outputs; ++o) {
          read_strip<T>(args, s, args.grad, args.grad_stride_b, args.grad_stride_row, owner.b, o * args.channels + c,
                        count, y0, y1, grad.data() + o * (s.padded + n));
        }
        if (need_kernels) {
          read_strip<T>(args, s, args.x, args.stride_b, args.stride_row, owner.b, c, count, y0, y1, x.data());
          std::fill(sums.begin(), sums.end(), A(0));
          sum_products(args, s, y1 - y0, x.data(), grads.data(), sums.data());
          for (size_t i = 0; i < sums.size(); ++i) totals[size_t(g) * sums.size() + i] += sums[i];
        }
        if (need_x) {
          convolve_back(args, s, y1 - y0, grads.data(), kernels.data() + g * args.taps * n,
                        result.data() + g * s.dense);
        }
      }
      if (need_x) {
        write_strip<T>(args, s, result.data(), s.dense, args.grad_x, args.channels, owner.b, owner.c0, owner, y0,
                       y1 - y0);
      }
    }
    for (int64_t g = 0; g < owner.groups && need_kernels; ++g) {
      const A* total = totals.data() + size_t(g) * sums.size();
      A* to = static_cast<A*>(args.grad_kernels) + (owner.b * args.channels + owner.channel(g)) * args.taps;
      for (int64_t t = 0; t < args.taps; ++t) {
        if (!args.channels_last) {
          to[t] = sum<A>(load(total + t * n));
        } else {
          for (int64_t i = 0; i < owner.count(args, g); ++i) to[i * args.taps + t] = total[t * n + i];
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
