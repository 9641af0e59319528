// Hypercorrelation on raw pointers. Torch-free; compiled once per instruction set by common/each_isa.h.
//
//   out[b,i,j] = max(u[b,i] v[b,j] sum_c q[b,c,i] s[b,c,j], 0)
//   u = 1 / (|q_i| + eps),  v = m_j / (|m_j s_j| + eps)      ("clamp": max(|.|, eps); 0 for a zero vector)
//
// i runs over the Na pixels of the query, j over the Nb pixels of the support, m is the mask on the support's grid.
// Norms never touch the operands: the product is of the features as they are, u and v scale a finished tile, and a
// support vector whose m is 0 is packed as zeros. With D = sum_j g[i,j] v_j s_j, g being the output's gradient where
// the output is not below 0,
//   grad q_i = u D - beta (q_i . D) q_i,   beta = u^2 / |q_i|   ("clamp": the same, or 0 where |q_i| <= eps)
// and the support's is its mirror image, times m.
//
// Parallel decomposition: forward, a task is a block of query pixels against the packed support; gradients, a block of
// pixels of one operand with all its channels. A dot product has one order of summation wherever its tile lies.
// Memory traffic: each operand is read once and packed (the support for all tasks, the query by its task), the output
// is written once, past the caches where it is large; a gradient reads the output's gradient once and packs it in
// cache. What the gradients need of the output is one bit an element. Accumulation: float (double for double). Limits:
// 64-bit offsets everywhere.

#ifndef FSS_HYPERCORRELATION_H
#define FSS_HYPERCORRELATION_H

namespace fss {
namespace hypercorrelation {

struct Operand {  // (B, C, N), planes or channels_last
  const void* features;
  bool channels_last;
  int64_t stride_b, stride_row;
  int64_t pixels;
  void* norms;          // (B, N), accumulation type
  const void* weights;  // (B, N), accumulation type, or nullptr for 1
  void* gradient;       // dense, same layout as features, or nullptr
};

struct Args {
  int64_t batch, channels;
  Operand query, support;
  double eps;
  bool add, clamp;  // eps_mode "add" or "clamp"; max(., 0)
  void* out;        // sample b at out + b * out_stride_b; (Na, Nb) dense
  int64_t out_stride_b;
  bool stream;       // write out past the caches
  uint8_t* signs;    // (B, Na, ceil(Nb / 8)), bit j % 8 of byte j / 8: out is above 0 or NaN; nullptr unless `clamp`
  const void* grad;  // gradient of out, strides of out
  int64_t first;     // the samples [first, first + samples) whose operands are in `packed`
  int64_t samples;
  void* packed;
};

constexpr int64_t kPackedBytes = int64_t(16) << 20;  // operands of several samples are packed together up to this size
constexpr int64_t kQueryBytes = int64_t(512) << 10;  // query pixels of one task: they stay in a second-level cache
constexpr int64_t kDepthBlock = 256;                 // gradients: pixels summed between two visits of a tile
constexpr int64_t kGradientBytes = int64_t(400) << 10;  // gradients: sums of one task, in a second-level cache

inline int64_t sign_bytes(const Args& a) { return ceil_div(a.support.pixels, 8); }

// Query pixels of one forward task.
inline int64_t task_rows(const Args& a, int64_t element) {
  const int64_t most = a.query.pixels < 1024 ? 48 : 96;
  return std::min(most, std::max<int64_t>(16, kQueryBytes / (a.channels * element) / 16 * 16));
}
inline int64_t correlate_tasks(const Args& a, int64_t element) {
  return a.samples * ceil_div(a.query.pixels, task_rows(a, element));
}
// Pixels of one gradient task.
inline int64_t task_pixels(const Args& a, int64_t element) {
  const int64_t fit = kGradientBytes / (a.channels * element);
  return fit >= 192 ? 192 : fit >= 96 ? 96 : 48;
}
inline int64_t gradient_tasks(const Args& a, const Operand& of, int64_t element) {
  return of.gradient == nullptr ? 0 : a.samples * ceil_div(of.pixels, task_pixels(a, element));
}

}  // namespace hypercorrelation
}  // namespace fss
#endif

#ifdef FSS_ISA
#include "common/cosine.h"

namespace fss {
namespace FSS_ISA {
namespace hypercorrelation {

using namespace ::fss::hypercorrelation;
using panels::Buffer;
using panels::kStrip;
using panels::kTileColumns;
using panels::kTileRows;
using panels::kTileVectors;
using panels::load_block;
using panels::store_block;

// ---- operands -------------------------------------------------------------------------------------------------------

// Pixels as rows, channels as depth; pixels of weight 0 are zeros whatever they hold.
template <class T>
struct PixelRows {
  using A = accumulate_t<T>;
  const T* x;
  int64_t stride_row;
  bool rows_adjacent;
  const A* weights;  // of these rows, or nullptr

  vec<A> along_rows(int64_t r, int64_t k, int64_t count) const {
    const vec<A> v = panels::load_some(x + k * stride_row + r, count);
    return weights == nullptr ? v : keep_where_nonzero<A>(v, panels::load_some(weights + r, count));
  }
  vec<A> along_depth(int64_t r, int64_t k, int64_t count) const {
    if (weights != nullptr && weights[r] == 0) return vec<A>{};
    return panels::load_some(x + r * stride_row + k, count);
  }
};

// Channels as rows, pixels as depth, each pixel times its scale; a scale of 0 gives 0 whatever the pixel holds.
template <class T>
struct ChannelRows {
  using A = accumulate_t<T>;
  const T* x;
  int64_t stride_row;
  bool rows_adjacent;
  const A* scales;

  vec<A> along_rows(int64_t r, int64_t k, int64_t count) const {
    const vec<A> scale = broadcast(scales[k]);
    return keep_where_nonzero<A>(panels::load_some(x + k * stride_row + r, count), scale) * scale;
  }
  vec<A> along_depth(int64_t r, int64_t k, int64_t count) const {
    const vec<A> scale = panels::load_some(scales + k, count);
    return keep_where_nonzero<A>(panels::load_some(x + r * stride_row + k, count), scale) * scale;
  }
};

// The output's gradient where the output is not below 0. Rows are support pixels (adjacent) or query pixels.
template <class T>
struct LiveGradient {
  using A = accumulate_t<T>;
  const T* grad;  // of sample b, (Na, Nb)
  int64_t columns;
  const uint8_t* signs;  // of sample b, or nullptr
  int64_t sign_stride;
  int64_t query, support;  // first query and support pixel
  bool rows_adjacent;

  vec<A> at(int64_t i, int64_t j, int64_t count) const {
    if (count <= 0) return vec<A>{};
    const vec<A> g = panels::load_some(grad + i * columns + j, count);
    if (signs == nullptr) return g;
    return panels::keep_bits<A>(g, panels::read_bits(signs + i * sign_stride, j, std::min<int64_t>(count, lanes<A>)));
  }
  vec<A> along_rows(int64_t r, int64_t k, int64_t count) const { return at(query + k, support + r, count); }
  vec<A> along_depth(int64_t r, int64_t k, int64_t count) const { return at(query + r, support + k, count); }
};

template <class A>
inline A not_finite_is_nan(A x) {
  return x - x == 0 ? x : std::numeric_limits<A>::quiet_NaN();
}

// What multiplies a vector of this norm (its weight included) and weight.
template <class A>
inline A scale_of(A norm, A weight, const Args& a) {
  if (norm == 0) return 0;
  return weight / (a.add ? norm + A(a.eps) : norm > A(a.eps) || norm != norm ? norm : A(a.eps));
}

// What magnifies a vector of this norm, its weight included (common/cosine.h).
template <class A>
inline A magnification_of(A norm, A weight) {
  return norm < kShort<A> * std::abs(weight) ? kMagnified<A> : A(1);
}

// What multiplies w (x . D) x in the gradient: w m / |m x|, with w = scale. All of a magnified vector.
template <class A>
inline A curvature_of(A norm, A weight, A scale, A magnify, const Args& a) {
  if (norm == 0 || (!a.add && norm <= A(a.eps))) return 0;
  return scale / magnify * (weight / (norm * magnify));
}

template <class A>
inline A norm_of(A squares, A weight) {
  return not_finite_is_nan(std::abs(weight) * std::sqrt(squares));
}

template <class A>
inline const A* row_of(const void* base, int64_t sample, int64_t pixels) {
  return base == nullptr ? nullptr : static_cast<const A*>(base) + sample * pixels;
}
template <class A>
inline A* row_of(void* base, int64_t sample, int64_t pixels) {
  return static_cast<A*>(base) + sample * pixels;
}

// The features of a sample from pixel n and channel c on.
template <class T>
inline const T* features_at(const Operand& x, int64_t b, int64_t n, int64_t c) {
  return static_cast<const T*>(x.features) + b * x.stride_b +
         (x.channels_last ? n * x.stride_row + c : c * x.stride_row + n);
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Elements of one packed strip of the support: its scales, then its panel.
template <class A>
inline int64_t support_strip(const Args& a) {
  return kTileColumns<A> * (a.channels + 1);
}

template <class A>
int64_t packed_support(const Args& a) {  // elements of one sample
  return ceil_div(a.support.pixels, kTileColumns<A>) * support_strip<A>(a);
}
template <class A>
int64_t support_tasks(const Args& a) {
  return a.samples * ceil_div(a.support.pixels, kTileColumns<A>);
}

// Task = one strip of support pixels.
template <class T>
void pack_support(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = kTileColumns<A>;
  const int64_t strips = ceil_div(a.support.pixels, W);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = a.first + task / strips, n = task % strips * W, rows = std::min(a.support.pixels - n, int64_t(W));
    A* scales = static_cast<A*>(a.packed) + task * support_strip<A>(a);
    const A* weights = row_of<A>(a.support.weights, b, a.support.pixels) + n;
    const PixelRows<T> source{features_at<T>(a.support, b, n, 0), a.support.stride_row, !a.support.channels_last,
                              weights};
    A squares[W] = {};
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) any |= weights[r] != 0;
    if (any) {
      panels::pack_strip<A, W>(source, rows, a.channels, scales + W);
      panels::sum_squares<A, W>(scales + W, a.channels, squares);
    }
    A* norms = row_of<A>(a.support.norms, b, a.support.pixels) + n;
    for (int64_t r = 0; r < W; ++r) {
      const A norm = r < rows ? norm_of(squares[r], weights[r]) : A(0);
      scales[r] = r < rows ? scale_of(norm, weights[r], a) : A(0);
      if (r < rows) norms[r] = norm;
    }
  }
}

// Scales, clamps and stores `rows` x `columns` of a tile; one bit an element where it is clamped.
template <class T>
inline void store_tile(const Args& a, const panels::Tile<accumulate_t<T>>& tile, const accumulate_t<T>* row_scales,
                       const accumulate_t<T>* column_scales, T* out, uint8_t* signs, int64_t rows, int64_t columns) {
  using A = accumulate_t<T>;
  constexpr int V = kTileVectors<A>, L = lanes<A>;
  const bool whole = columns == kTileColumns<A>;
  for (int64_t r = 0; r < rows; ++r, out += a.support.pixels) {
    const bool past = a.stream && whole && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    uint64_t bits = 0;
    for (int v = 0; v < V; ++v) {
      vec<A> x = tile.at[r][v] * row_scales[r] * load(column_scales + v * L);
      if (a.clamp) {
        bits |= uint64_t(panels::bits_above_zero<A>(x)) << (v * L);
        x = panels::above_zero<A>(x);
      }
      if (past) {
        stream(out + v * L, x);
      } else if (whole) {
        store(out + v * L, x);
      } else if (columns > v * L) {
        store_partial(out + v * L, x, std::min<int64_t>(columns - v * L, L));
      }
    }
    if (signs != nullptr) {
      std::memcpy(signs + r * sign_bytes(a), &bits, size_t(ceil_div(columns, 8)));
    }
  }
}

// Task = a block of query pixels of a sample, against all support pixels.
template <class T>
void correlate(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int R = kTileRows<A>, S = kStrip<A, R>, W = kTileColumns<A>;
  const int64_t block = task_rows(a, sizeof(A)), blocks = ceil_div(a.query.pixels, block);
  const int64_t strips = ceil_div(a.support.pixels, W);
  const Buffer<A> packed(round_up(block, S) * a.channels), scales(round_up(block, S));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / blocks, b = a.first + sample, i = task % blocks * block;
    const int64_t rows = std::min(a.query.pixels - i, block);
    A* norms = row_of<A>(a.query.norms, b, a.query.pixels) + i;
    for (int64_t r = 0; r < rows; r += S) {
      const PixelRows<T> source{features_at<T>(a.query, b, i + r, 0), a.query.stride_row, !a.query.channels_last,
                                nullptr};
      const int64_t count = std::min<int64_t>(rows - r, S);
      A squares[S];
      panels::pack_strip<A, R>(source, count, a.channels, packed.data + r * a.channels);
      panels::sum_squares<A, R>(packed.data + r * a.channels, a.channels, squares);
      for (int64_t s = 0; s < S; ++s) {
        const A norm = s < count ? norm_of(squares[s], A(1)) : A(0);
        scales.data[r + s] = scale_of(norm, A(1), a);
        if (s < count) norms[r + s] = norm;
      }
    }
    T* out = static_cast<T*>(a.out) + b * a.out_stride_b + i * a.support.pixels;
    uint8_t* signs = a.signs == nullptr ? nullptr : a.signs + (b * a.query.pixels + i) * sign_bytes(a);
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t j = strip * W, columns = std::min<int64_t>(a.support.pixels - j, W);
      const A* column_scales = static_cast<const A*>(a.packed) + (sample * strips + strip) * support_strip<A>(a);
      bool live = false;
      for (int w = 0; w < W; ++w) live |= column_scales[w] != 0;
      for (int64_t r = 0; r < rows; r += R) {
        panels::Tile<A> tile{};
        if (live) panels::multiply<A>(packed.data + r * a.channels, column_scales + W, a.channels, tile);
        store_tile<T>(a, tile, scales.data + r, column_scales, out + r * a.support.pixels + j,
                      signs == nullptr ? nullptr : signs + r * sign_bytes(a) + j / 8, std::min<int64_t>(rows - r, R),
                      columns);
      }
    }
  }
  if (a.stream) stream_fence();
}

// ---- gradients ------------------------------------------------------------------------------------------------------

// Elements of one packed operand of a sample: its scales, then channels as rows and pixels as depth.
template <class A>
inline int64_t scale_elements(const Operand& x) {
  return round_up(x.pixels, 16);
}
template <class A>
int64_t packed_operand(const Args& a, const Operand& x) {
  return scale_elements<A>(x) + round_up(a.channels, kStrip<A, kTileRows<A>>) * x.pixels;
}
// `packed` holds for every sample the query (for the support's gradient) and then the support (for the query's).
template <class A>
inline A* packed_at(const Args& a, int64_t sample, bool query) {
  const int64_t left = a.support.gradient == nullptr ? 0 : packed_operand<A>(a, a.query);
  const int64_t right = a.query.gradient == nullptr ? 0 : packed_operand<A>(a, a.support);
  return static_cast<A*>(a.packed) + sample * (left + right) + (query ? 0 : left);
}

// Task = a sample.
template <class A>
void find_scales(const Args& a, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    for (const bool query : {true, false}) {
      const Operand& x = query ? a.query : a.support;
      if ((query ? a.support : a.query).gradient == nullptr) continue;
      const A* norms = row_of<A>(static_cast<const void*>(x.norms), a.first + sample, x.pixels);
      const A* weights = row_of<A>(x.weights, a.first + sample, x.pixels);
      A* scales = packed_at<A>(a, sample, query);
      for (int64_t n = 0; n < x.pixels; ++n) scales[n] = scale_of(norms[n], weights ? weights[n] : A(1), a);
    }
  }
}

template <class A>
int64_t channel_tasks(const Args& a) {  // of one operand of all samples
  return a.samples * ceil_div(a.channels, kStrip<A, kTileRows<A>>);
}

// Task = a strip of channels of one operand; those of the query come first.
template <class T>
void pack_operands(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int R = kTileRows<A>, S = kStrip<A, R>;
  const int64_t tasks = a.support.gradient == nullptr ? 0 : channel_tasks<A>(a), strips = ceil_div(a.channels, S);
  for (int64_t task = begin; task < end; ++task) {
    const bool query = task < tasks;
    const Operand& x = query ? a.query : a.support;
    const int64_t rest = query ? task : task - tasks, sample = rest / strips, c = rest % strips * S;
    const A* scales = packed_at<A>(a, sample, query);
    const ChannelRows<T> source{features_at<T>(x, a.first + sample, 0, c), x.stride_row, x.channels_last, scales};
    panels::pack_strip<A, R>(source, std::min<int64_t>(a.channels - c, S), x.pixels,
                             packed_at<A>(a, sample, query) + scale_elements<A>(x) + c * x.pixels);
  }
}

// The gradient of x from D, the gradient of the normalised vectors (channels, stride), for L pixels:
// w D - (w m / |m x|) w (x . D) x with w = scale_of(...), short vectors magnified. 0 where w is 0, whatever x and D
// hold.
template <class T, class A>
inline void finish_gradient(const Args& a, const Operand& x, int64_t b, int64_t n, int64_t pixels, const A* sums,
                            int64_t stride) {
  constexpr int L = lanes<A>;
  const A* norms = row_of<A>(static_cast<const void*>(x.norms), b, x.pixels) + n;
  const A* weights = x.weights == nullptr ? nullptr : row_of<A>(x.weights, b, x.pixels) + n;
  A scale[L] = {}, factor[L] = {}, magnify[L] = {};
  for (int64_t p = 0; p < std::min<int64_t>(pixels, L); ++p) {
    const A weight = weights == nullptr ? A(1) : weights[p];
    scale[p] = scale_of(norms[p], weight, a);
    magnify[p] = magnification_of(norms[p], weight);
    factor[p] = curvature_of(norms[p], weight, scale[p], magnify[p], a);
  }
  const vec<A> w = load(scale), f = load(factor), longer = load(magnify);
  const panels::ints<A> live = (panels::ints<A>)(w != vec<A>{});
  const T* from = features_at<T>(x, b, n, 0);
  const int64_t step = x.channels_last ? 1 : x.stride_row;
  vec<A> block[L], total = {};
  for (int64_t c = 0; c < a.channels; c += L) {
    const int64_t channels = std::min<int64_t>(a.channels - c, L);
    load_block<T>(from + c * step, x.stride_row, x.channels_last, pixels, channels, block);
    vec<A> part = {};
    for (int64_t k = 0; k < channels; ++k) part += block[k] * longer * load(sums + (c + k) * stride);
    total += part;
  }
  const vec<A> slope = f * (w / longer * total) * longer;
  const int64_t out_row = x.channels_last ? a.channels : x.pixels;
  T* to = static_cast<T*>(x.gradient) + b * a.channels * x.pixels + (x.channels_last ? n * a.channels : n);
  for (int64_t c = 0; c < a.channels; c += L) {
    const int64_t channels = std::min<int64_t>(a.channels - c, L);
    load_block<T>(from + c * step, x.stride_row, x.channels_last, pixels, channels, block);
    for (int64_t k = 0; k < channels; ++k) {
      block[k] = (vec<A>)((panels::ints<A>)(w * load(sums + (c + k) * stride) - slope * (block[k] * longer)) & live);
    }
    store_block<T>(to + (x.channels_last ? c : c * x.pixels), out_row, x.channels_last, pixels, channels, block);
  }
}

// Task = a block of pixels of one operand with all channels; those of the query come first.
template <class T>
void gradients(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int R = kTileRows<A>, S = kStrip<A, R>, W = kTileColumns<A>, V = kTileVectors<A>, L = lanes<A>;
  const int64_t block = task_pixels(a, sizeof(A)), padded = round_up(a.channels, S);
  const int64_t query_tasks = gradient_tasks(a, a.query, sizeof(A));
  const Buffer<A> sums(padded * block), right(block * kDepthBlock);
  for (int64_t task = begin; task < end; ++task) {
    const bool query = task < query_tasks;
    const Operand &x = query ? a.query : a.support, &other = query ? a.support : a.query;
    const int64_t rest = query ? task : task - query_tasks, blocks = ceil_div(x.pixels, block);
    const int64_t sample = rest / blocks, b = a.first + sample, n = rest % blocks * block;
    const int64_t pixels = std::min(x.pixels - n, block), strips = ceil_div(pixels, W);
    const A* norms = row_of<A>(static_cast<const void*>(x.norms), b, x.pixels) + n;
    bool live = false;
    for (int64_t p = 0; p < pixels; ++p) live |= norms[p] != 0;
    if (!live) std::fill(sums.data, sums.data + padded * block, A(0));

    const A* scales = packed_at<A>(a, sample, !query);
    const A* left = scales + scale_elements<A>(other);
    bool started = false;
    for (int64_t k = 0; live && k < other.pixels; k += kDepthBlock) {
      const int64_t depth = std::min(other.pixels - k, kDepthBlock);
      bool any = !started && k + depth == other.pixels;  // at least one visit: it writes the sums
      for (int64_t p = k; p < k + depth; ++p) any |= scales[p] != 0;
      if (!any) continue;
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t first = n + strip * W;
        const LiveGradient<T> source{static_cast<const T*>(a.grad) + b * a.out_stride_b,
                                     a.support.pixels,
                                     a.signs == nullptr ? nullptr : a.signs + b * a.query.pixels * sign_bytes(a),
                                     sign_bytes(a),
                                     query ? first : k,
                                     query ? k : first,
                                     !query};
        panels::pack_strip<A, W>(source, std::min<int64_t>(pixels - strip * W, W), depth,
                                 right.data + strip * W * kDepthBlock);
      }
      for (int64_t c = 0; c < padded; c += R) {
        for (int64_t strip = 0; strip < strips; ++strip) {
          A* to = sums.data + c * block + strip * W;
          panels::Tile<A> tile{};
          panels::multiply<A>(left + c * other.pixels + k * R, right.data + strip * W * kDepthBlock, depth, tile);
          if (started) {  // after the products: chains of kDepthBlock additions, then one a block
            for (int r = 0; r < R; ++r) {
              for (int v = 0; v < V; ++v) tile.at[r][v] += load(to + r * block + v * L);
            }
          }
          for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) store(to + r * block + v * L, tile.at[r][v]);
          }
        }
      }
      started = true;
    }
    for (int64_t p = 0; p < pixels; p += L) {
      finish_gradient<T, A>(a, x, b, n + p, pixels - p, sums.data + p, block);
    }
  }
}

}  // namespace hypercorrelation
}  // namespace FSS_ISA
}  // namespace fss
#endif
