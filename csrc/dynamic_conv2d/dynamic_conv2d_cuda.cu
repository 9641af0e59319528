// Per-sample depthwise convolution on CUDA.
//
//   out[b,o,c,n]   = sum_t k[b,c,t] x[b,c,n + t]     over the taps t of output o: a kernel, or the union of merged ones
//   dL/dx[b,c,n]   = sum_o sum_t k[b,c,t] g[b,o,c,n - t]
//   dL/dk[b,c,t]   = sum_n g[b,o,c,n] x[b,c,n + t]
//
// A block owns a tile of one plane, or of kChannels channels when channels_last, in shared memory with a halo that is 0
// outside the plane. A thread computes items of kRows x 1 pixels, so that a value of shared memory serves up to kRows
// taps of a column; an output is a list of panels (all of a 5x5, 3x3 or 1x5, else single columns) whose weights, or
// whose gradient sums, are in registers. Forward: a block is one tile and writes all outputs of it. Backward: a block
// goes through the tiles of its plane (channels_last: of a fixed piece of them) and keeps the sums of the kernel
// gradients; warps are added in order, pieces by a second kernel: no atomics, and the cut depends on H, W and the taps
// alone, so a sample has the same bits in every batch. Memory traffic: x once (and the halo again) for up to kOutputs
// outputs, kernels straight from their tensors, outputs written once; backwards x and every g once for all gradients.
// 16-byte loads where every row of a tile starts on such a boundary, else one element at a time. Accumulation: float32.
// Limits: float32, bfloat16, float16; sizes 1 ... 9; H, W < 2^31 with 64-bit offsets; any number of kernels, kOutputs
// and kTaps a launch.
//
// Legend: B batch, C channels, H W grid, T taps; S floats from a pixel to the next in shared memory: 1, or kChannels.

#include "common/cuda/arguments.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vectors.cuh"

namespace fss {
namespace {

constexpr const char* kOp = "dynamic_conv2d";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 4;       // of an item
constexpr int kChannels = 16;  // of a block, channels_last: a 32-byte sector of half precision
constexpr int kTaps = 96;      // of a launch: a 9x9, or DPCN's three
constexpr int kOutputs = 8;
constexpr int kBranches = 16;
constexpr int kPieces = 16;  // blocks that share the kernel gradients of kChannels channels
// Of shared memory: for three blocks, and for the two that the backward's registers leave (planes, channels_last).
constexpr int64_t kForwardFloats = 48 * 256, kBackwardFloats[2] = {80 * 256, 96 * 256};

// Columns next to each other with taps in `height` rows around the middle one; `at` is the first of the taps.
struct Panel {
  int8_t height, columns, dx;
  uint8_t at;
};

// The taps of the outputs of one launch, panel after panel.
struct Plan {
  int outputs, first_output, taps, reach_rows, reach_columns;
  int64_t all_taps;  // of all launches: T
  bool merge;
  uint8_t first_panel[kOutputs + 1];
  Panel panel[kTaps];
  int8_t row[kTaps], column[kTaps];
  uint8_t output[kTaps];  // of this launch
  int16_t tap[kTaps];     // in (B, C, T)
};

// Kernels, or their gradients (null: not wanted). Without merging, branch l belongs to output l of the launch.
struct Branch {
  void* data;
  int64_t stride_b, stride_c, stride_h, stride_w;
  int height, width;
};
struct Branches {
  int count;
  Branch branch[kBranches];
};

struct Divisor {  // of numbers below 2^16
  unsigned by, magic;

  Divisor() = default;
  explicit Divisor(int d) : by(unsigned(d)), magic(d > 1 ? unsigned(((uint64_t(1) << 32) + d - 1) / d) : 0) {}
  __device__ int operator()(int i) const { return by == 1 ? i : int((uint64_t(i) * magic) >> 32); }
};

// How a plane is cut, and a tile in shared memory: `stored` rows of `pitch` pixels, the own ones after the halo and
// after `left` pixels. What is right of a row of the whole width is the 0 left of the next one.
struct Tiles {
  int height, width, rows, columns, across, count;
  int left, pitch, stored, reach_rows;
  Divisor by_columns, by_unit, by_group;  // by_unit, by_group: elements and 16-byte groups of a row

  __host__ __device__ int items() const { return (rows + kRows - 1) / kRows * columns; }
  __host__ __device__ int padded_floats(int s) const { return ((stored * pitch + left) * s + 3) / 4 * 4; }
  __host__ __device__ int dense_floats(int s) const { return items() * kRows * s; }
};

struct Tile {
  int y, x, rows, columns;

  __device__ Tile(const Tiles& t, int index) {
    y = index / t.across * t.rows, x = index % t.across * t.columns;
    rows = t.height - y < t.rows ? t.height - y : t.rows;
    columns = t.width - x < t.columns ? t.width - x : t.columns;
  }
};

struct Source {
  const void* data;
  int64_t stride_b, stride_c, stride_n;
  bool aligned;
};

struct Target {
  void* data;
  int64_t stride_b, stride_c, stride_n;
};

struct Sizes {
  int64_t batch, channels, groups;  // groups of channels
  int pieces;
};

__host__ __device__ constexpr int rounded_up(int value, int to) { return (value + to - 1) / to * to; }

// f(branch, row, column) of every kernel element that is tap `p`.
template <class F>
__device__ inline void each_branch(const Plan& plan, const Branches& branches, int p, const F& f) {
  const int first = plan.merge ? 0 : plan.output[p], end = plan.merge ? branches.count : first + 1;
  for (int l = first; l < end; ++l) {
    const Branch& k = branches.branch[l];
    const int i = plan.row[p] + k.height / 2, j = plan.column[p] + k.width / 2;
    if (k.data != nullptr && i >= 0 && i < k.height && j >= 0 && j < k.width) f(k, i, j);
  }
}

template <class T>
__device__ inline T* element(const Branch& k, int64_t b, int64_t c, int i, int j) {
  return static_cast<T*>(k.data) + b * k.stride_b + c * k.stride_c + i * k.stride_h + j * k.stride_w;
}

template <class T>
__device__ inline float gathered(const Plan& plan, const Branches& branches, int p, int64_t b, int64_t c) {
  float sum = 0;
  each_branch(plan, branches, p,
              [&](const Branch& k, int i, int j) { sum += widen(*element<const T>(k, b, c, i, j)); });
  return sum;
}

template <class T>
__device__ inline void scatter(const Plan& plan, const Branches& branches, int p, int64_t b, int64_t c, float value) {
  each_branch(plan, branches, p, [&](const Branch& k, int i, int j) { *element<T>(k, b, c, i, j) = narrow<T>(value); });
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// A tile with its halo from a plane, or from `channels` of a pixel; E elements at a time. The whole block takes part.
template <int S, int E, class T>
__device__ inline void fill_by(const Tiles& t, const Tile& tile, const T* __restrict__ from, int64_t stride_n,
                               int channels, float* to) {
  constexpr int kUnits = S == 1 ? 1 : S / E;  // of a pixel
  constexpr int kPixels = S == 1 ? E : 1;     // of a unit
  const int in_row = t.pitch / kPixels * kUnits, count = t.stored * in_row;
#pragma unroll 4
  for (int i = int(threadIdx.x); i < count; i += kThreads) {
    const int row = (E == 1 ? t.by_unit : t.by_group)(i), unit = i - row * in_row;
    const int y = tile.y - t.reach_rows + row, x = tile.x - t.left + unit / kUnits * kPixels;
    const int lane = unit % kUnits * E;
    float value[E] = {};
    if (y >= 0 && y < t.height && x >= 0 && x < t.width && lane < channels) {
      load_widened(from + (int64_t(y) * t.width + x) * stride_n + lane, value);
    }
    float* at = to + row * t.pitch * S + unit * E;
    if constexpr (E == 1) {
      *at = value[0];
    } else {
#pragma unroll
      for (int j = 0; j < E; j += 4) {
        *reinterpret_cast<float4*>(at + j) = make_float4(value[j], value[j + 1], value[j + 2], value[j + 3]);
      }
    }
  }
  for (int i = int(threadIdx.x); i < t.left * S; i += kThreads) to[t.stored * t.pitch * S + i] = 0;
}

template <int S, class T>
__device__ inline void fill(const Tiles& t, const Tile& tile, const Source& source, int64_t b, int64_t c, int channels,
                            float* to) {
  const T* from = static_cast<const T*>(source.data) + b * source.stride_b + c * source.stride_c;
  if (source.aligned) {
    fill_by<S, kGroup<T>>(t, tile, from, source.stride_n, channels, to);
  } else {
    fill_by<S, 1>(t, tile, from, source.stride_n, channels, to);
  }
}

template <int N>
using int_tag = std::integral_constant<int, N>;

// f(int_tag<height>, int_tag<columns>) of a panel.
template <class F>
__device__ inline void dispatch_panel(const Panel& panel, const F& f) {
  switch (panel.height * 16 + panel.columns) {
    case 0x55:
      return f(int_tag<5>{}, int_tag<5>{});
    case 0x33:
      return f(int_tag<3>{}, int_tag<3>{});
    case 0x15:
      return f(int_tag<1>{}, int_tag<5>{});
    case 0x91:
      return f(int_tag<9>{}, int_tag<1>{});
    case 0x71:
      return f(int_tag<7>{}, int_tag<1>{});
    case 0x51:
      return f(int_tag<5>{}, int_tag<1>{});
    case 0x31:
      return f(int_tag<3>{}, int_tag<1>{});
    default:
      return f(int_tag<1>{}, int_tag<1>{});
  }
}

// f(y, x) of every item of this thread.
template <int S, class F>
__device__ inline void each_item(const Tiles& t, const Tile& tile, const F& f) {
  const int count = (tile.rows + kRows - 1) / kRows * t.columns;
  for (int i = int(threadIdx.x) / S; i < count; i += kThreads / S) {
    const int group = t.by_columns(i), x = i - group * t.columns;
    if (x < tile.columns) f(group * kRows, x);
  }
}

// f(y, x, sums) with the sums of one panel for every item of this thread; Flip: of the transposed convolution.
template <int S, int KH, int KW, bool Flip, class F>
__device__ inline void convolve(const Tiles& t, const Tile& tile, const float* values, const float* weights, int dx,
                                const F& f) {
  float w[KH * KW];
#pragma unroll
  for (int i = 0; i < KH * KW; ++i) w[i] = weights[(Flip ? KH * KW - 1 - i : i) * S];
  const int first = Flip ? -(dx + KW - 1) : dx;
  each_item<S>(t, tile, [&](int y, int x) {
    const float* from = values + ((y + t.reach_rows - KH / 2) * t.pitch + t.left + x + first) * S;
    float sums[kRows] = {};
#pragma unroll
    for (int j = 0; j < KW; ++j) {
#pragma unroll
      for (int r = 0; r < kRows + KH - 1; ++r) {
        const float v = from[(r * t.pitch + j) * S];
#pragma unroll
        for (int q = 0; q < kRows; ++q) {
          if (r - q >= 0 && r - q < KH) sums[q] += w[(r - q) * KW + j] * v;
        }
      }
    }
    f(y, x, sums);
  });
}

// Lanes whose bit D is set keep the upper of the first 2 D values, the others the lower, each with those of lane ^ D.
template <int D>
__device__ inline void fold_values(float (&v)[kWarp], int lane) {
#pragma unroll
  for (int i = 0; i < D; ++i) {
    const float kept = lane & D ? v[i + D] : v[i], sent = lane & D ? v[i] : v[i + D];
    v[i] = kept + __shfl_xor_sync(kWholeWarp, sent, D);
  }
  if constexpr (D > 1) fold_values<D / 2>(v, lane);
}

// Lane i of a warp gets the sum of all values[i], i < N: 31 exchanges instead of 5 N.
template <int N>
__device__ inline float warp_sums(const float (&values)[N]) {
  static_assert(N <= kWarp);
  float v[kWarp];
#pragma unroll
  for (int i = 0; i < kWarp; ++i) v[i] = i < N ? values[i] : 0.0f;
  fold_values<kWarp / 2>(v, int(threadIdx.x) % kWarp);
  return v[0];
}

// Adds a panel's sums of g[n] x[n + t] over a tile to those of this warp, `totals`.
template <int S, int KH, int KW>
__device__ inline void correlate(const Tiles& t, const Tile& tile, const float* values, const float* grads, int dx,
                                 float* totals) {
  float sums[KH * KW] = {};
  each_item<S>(t, tile, [&](int y, int x) {
    const float* own = grads + ((y + t.reach_rows) * t.pitch + t.left + x) * S;
    const float* from = values + ((y + t.reach_rows - KH / 2) * t.pitch + t.left + x + dx) * S;
    const int valid = tile.rows - y;  // what lies below the tile counts elsewhere
    float g[kRows];
#pragma unroll
    for (int q = 0; q < kRows; ++q) g[q] = own[q * t.pitch * S];
#pragma unroll
    for (int j = 0; j < KW; ++j) {
#pragma unroll
      for (int r = 0; r < kRows + KH - 1; ++r) {
        const float v = from[(r * t.pitch + j) * S];
#pragma unroll
        for (int q = 0; q < kRows; ++q) {
          if (r - q >= 0 && r - q < KH && q < valid) sums[(r - q) * KW + j] += g[q] * v;
        }
      }
    }
  });
  const int lane = int(threadIdx.x) % kWarp;
  if constexpr (S == 1) {
    const float total = warp_sums(sums);
    if (lane < KH * KW) totals[lane] += total;
  } else {
    static_assert(2 * S == kWarp);
#pragma unroll
    for (int i = 0; i < KH * KW; ++i) {
      const float total = sums[i] + __shfl_xor_sync(kWholeWarp, sums[i], S);
      if (lane < S) totals[i * S + lane] += total;
    }
  }
}

// ---- kernels --------------------------------------------------------------------------------------------------------

struct Block {  // blocks of neighbouring tiles run together
  int piece, channels;
  int64_t b, c;

  template <int S>
  __device__ static Block of(const Sizes& s) {
    unsigned i = blockIdx.x;
    Block block;
    block.piece = int(i % unsigned(s.pieces)), i /= unsigned(s.pieces);
    block.c = int64_t(i % unsigned(s.groups)) * S, block.b = i / unsigned(s.groups);
    block.channels = int(s.channels - block.c < S ? s.channels - block.c : S);
    return block;
  }
};

// The weights of a launch in shared memory, from the kernels (then also written to `taps`) or from `packed`.
template <int S, class T>
__device__ inline void load_weights(const Sizes& s, const Plan& plan, const Branches& branches, const Block& block,
                                    const float* __restrict__ packed, float* __restrict__ taps, float* weights) {
  for (int i = int(threadIdx.x); i < plan.taps * S; i += kThreads) {
    const int p = i / S, lane = i % S;
    float value = 0;
    if (lane < block.channels) {
      const int64_t at = (block.b * s.channels + block.c + lane) * plan.all_taps + plan.tap[p];
      value = packed != nullptr ? packed[at] : gathered<T>(plan, branches, p, block.b, block.c + lane);
      if (taps != nullptr && block.piece == 0) taps[at] = value;
    }
    weights[i] = value;
  }
}

template <class T, int S>
__global__ void __launch_bounds__(kThreads, 3)
    forward_kernel(const __grid_constant__ Sizes s, const __grid_constant__ Tiles t, const __grid_constant__ Plan plan,
                   const __grid_constant__ Branches branches, Source x, const float* __restrict__ packed,
                   float* __restrict__ taps, Target out) {
  float* weights = shared_memory();
  float* values = weights + rounded_up(plan.taps * S, 4);
  float* dense = values + t.padded_floats(S);  // sums of outputs with several panels; an item has one thread
  const Block block = Block::of<S>(s);
  const Tile tile(t, block.piece);
  const int lane = int(threadIdx.x) % S;
  load_weights<S, T>(s, plan, branches, block, packed, taps, weights);
  fill<S, T>(t, tile, x, block.b, block.c, block.channels, values);
  __syncthreads();
  if (lane >= block.channels) return;
  for (int o = 0; o < plan.outputs; ++o) {
    const int64_t channel = (plan.first_output + o) * s.channels + block.c + lane;
    T* to = static_cast<T*>(out.data) + block.b * out.stride_b + channel * out.stride_c;
    const int begin = plan.first_panel[o], end = plan.first_panel[o + 1];
    for (int p = begin; p < end; ++p) {
      const Panel panel = plan.panel[p];
      const auto write = [&](int y, int x, float (&sums)[kRows]) {
        float* held = dense + (y * t.columns + x) * S + lane;
#pragma unroll
        for (int q = 0; q < kRows; ++q) {
          if (p > begin) sums[q] += held[q * t.columns * S];
          if (p + 1 < end) {
            held[q * t.columns * S] = sums[q];
          } else if (y + q < tile.rows) {
            to[(int64_t(tile.y + y + q) * t.width + tile.x + x) * out.stride_n] = narrow<T>(sums[q]);
          }
        }
      };
      dispatch_panel(panel, [&](auto height, auto columns) {
        convolve<S, decltype(height)::value, decltype(columns)::value, false>(
            t, tile, values + lane, weights + panel.at * S + lane, panel.dx, write);
      });
    }
  }
}

// What a launch of the backward computes. Gradients to x of several launches meet in `previous` and `next`.
struct Wanted {
  bool x;
  unsigned outputs;  // bit o: the kernels of output o
  const float* previous;
  float* next;
  float* partial;  // (pieces, B, C, T), or null: the kernels' gradients are written at once
};

template <class T, int S>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const __grid_constant__ Sizes s, const __grid_constant__ Tiles t, const __grid_constant__ Plan plan,
                    const __grid_constant__ Branches targets, Source x, Source grad, const float* __restrict__ taps,
                    const __grid_constant__ Wanted wanted, Target grad_x) {
  const int lane = int(threadIdx.x) % S, warp = int(threadIdx.x) / kWarp;
  float* weights = shared_memory();
  float* totals = weights + (wanted.x ? rounded_up(plan.taps * S, 4) : 0);  // (warps, taps, S)
  float* grads = totals + (wanted.outputs ? kWarps * rounded_up(plan.taps * S, 4) : 0);
  float* values = grads + t.padded_floats(S);
  float* dense = values + (wanted.outputs ? t.padded_floats(S) : 0);  // of the gradient to x; an item has one thread
  const Block block = Block::of<S>(s);
  if (wanted.x) load_weights<S, T>(s, plan, targets, block, taps, nullptr, weights);
  const int width = rounded_up(plan.taps * S, 4);
  if (wanted.outputs) {
    for (int i = int(threadIdx.x); i < kWarps * width; i += kThreads) totals[i] = 0;
  }
  const int begin = int(int64_t(t.count) * block.piece / s.pieces);
  const int end = int(int64_t(t.count) * (block.piece + 1) / s.pieces);
  for (int index = begin; index < end; ++index) {
    const Tile tile(t, index);
    for (int o = 0; o < plan.outputs; ++o) {
      const bool correlated = wanted.outputs >> o & 1;
      if (!wanted.x && !correlated) continue;
      __syncthreads();
      if (o == 0 || !wanted.x) {  // x stays for the other outputs; without a gradient to x the first may be left out
        if (wanted.outputs && (wanted.x || (wanted.outputs & ((1u << o) - 1)) == 0)) {
          fill<S, T>(t, tile, x, block.b, block.c, block.channels, values);
        }
      }
      const int64_t channel = (plan.first_output + o) * s.channels + block.c;
      fill<S, T>(t, tile, grad, block.b, channel, block.channels, grads);
      __syncthreads();
      for (int p = plan.first_panel[o]; p < plan.first_panel[o + 1]; ++p) {
        const Panel panel = plan.panel[p];
        const auto add = [&](int y, int x, const float (&sums)[kRows]) {
          float* held = dense + (y * t.columns + x) * S + lane;
#pragma unroll
          for (int q = 0; q < kRows; ++q) held[q * t.columns * S] = sums[q] + (p > 0 ? held[q * t.columns * S] : 0.0f);
        };
        dispatch_panel(panel, [&](auto height, auto columns) {
          constexpr int kh = decltype(height)::value, kw = decltype(columns)::value;
          if (wanted.x) {
            convolve<S, kh, kw, true>(t, tile, grads + lane, weights + panel.at * S + lane, panel.dx, add);
          }
          if (correlated) {
            correlate<S, kh, kw>(t, tile, values + lane, grads + lane, panel.dx, totals + warp * width + panel.at * S);
          }
        });
      }
    }
    if (!wanted.x || lane >= block.channels) continue;
    const int64_t base = block.b * grad_x.stride_b + (block.c + lane) * grad_x.stride_c;
    each_item<S>(t, tile, [&](int y, int x) {
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        if (y + q >= tile.rows) break;
        const int64_t at = base + (int64_t(tile.y + y + q) * t.width + tile.x + x) * grad_x.stride_n;
        float sum = dense[((y + q) * t.columns + x) * S + lane];
        if (wanted.previous != nullptr) sum += wanted.previous[at];
        if (wanted.next != nullptr) {
          wanted.next[at] = sum;
        } else {
          static_cast<T*>(grad_x.data)[at] = narrow<T>(sum);
        }
      }
    });
  }
  if (!wanted.outputs) return;
  __syncthreads();
  for (int i = int(threadIdx.x); i < plan.taps * S; i += kThreads) {
    const int p = i / S;
    const int64_t c = block.c + i % S;
    if (c >= s.channels) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += totals[w * width + i];
    if (wanted.partial == nullptr) {
      scatter<T>(plan, targets, p, block.b, c, total);
    } else {
      wanted.partial[((block.piece * s.batch + block.b) * s.channels + c) * plan.all_taps + plan.tap[p]] = total;
    }
  }
}

// taps (B, C, T) from some of the kernels, `add`ed to what others left. Thread: one tap of a (b, c).
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ Sizes s, const __grid_constant__ Plan plan,
                const __grid_constant__ Branches branches, float* __restrict__ taps, bool add) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = i / plan.taps;
  const int p = int(i % plan.taps);
  if (row >= s.batch * s.channels) return;
  float* tap = taps + row * plan.all_taps + plan.tap[p];
  *tap = (add ? *tap : 0.0f) + gathered<T>(plan, branches, p, row / s.channels, row % s.channels);
}

// Gradients of some of the kernels: the pieces added in order. Thread: one tap of a (b, c).
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Sizes s, const __grid_constant__ Plan plan,
                  const __grid_constant__ Branches targets, const float* __restrict__ partial) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = i / plan.taps;
  const int p = int(i % plan.taps);
  if (row >= s.batch * s.channels) return;
  float sum = 0;
  for (int piece = 0; piece < s.pieces; ++piece) {
    sum += partial[(piece * s.batch * s.channels + row) * plan.all_taps + plan.tap[p]];
  }
  scatter<T>(plan, targets, p, row / s.channels, row % s.channels, sum);
}

// ---- host -----------------------------------------------------------------------------------------------------------

// The launches of one call and, for each, the numbers of the kernels it reads.
struct Launches {
  std::vector<Plan> plans;
  std::vector<std::vector<size_t>> kernels;
  int64_t outputs, taps = 0;

  Launches(const std::vector<Tensor>& all, bool merge) : outputs(merge ? 1 : int64_t(all.size())) {
    if (merge) {
      std::vector<size_t> every;
      for (size_t l = 0; l < all.size(); ++l) every.push_back(l);
      add(all, every, 0, true);
      kernels.push_back(every);
    }
    for (size_t l = 0; !merge && l < all.size(); ++l) add(all, {l}, int(l), false);
    for (Plan& plan : plans) plan.all_taps = taps;
  }

 private:
  // One more output, the union of some kernels, in the last launch if it has room.
  void add(const std::vector<Tensor>& all, const std::vector<size_t>& chosen, int output, bool merge) {
    int heights[9] = {}, widths[9] = {}, count = 0;  // of the columns and rows -4 ... 4
    for (size_t l : chosen) {
      const int h = int(all[l].size(2)), w = int(all[l].size(3));
      for (int d = -(w / 2); d <= w / 2; ++d) heights[d + 4] = std::max(heights[d + 4], h);
      for (int d = -(h / 2); d <= h / 2; ++d) widths[d + 4] = std::max(widths[d + 4], w);
    }
    for (int width : widths) count += width;
    if (plans.empty() || plans.back().taps + count > kTaps || plans.back().outputs == kOutputs) {
      plans.emplace_back();
      plans.back() = Plan{};
      plans.back().merge = merge, plans.back().first_output = output;
      if (!merge) kernels.emplace_back();
    }
    if (!merge) kernels.back().push_back(chosen[0]);
    Plan& plan = plans.back();
    int panels = plan.first_panel[plan.outputs];
    const int columns = widths[4], rows = heights[4];
    const bool whole =
        count == rows * columns && columns > 1 && ((rows == columns && rows <= 5) || (rows == 1 && columns == 5));
    for (int d = -(columns / 2); d <= columns / 2; d += whole ? columns : 1) {
      const int height = heights[d + 4], across = whole ? columns : 1;
      plan.panel[panels++] = {int8_t(height), int8_t(across), int8_t(d), uint8_t(plan.taps)};
      for (int r = -(height / 2); r <= height / 2; ++r) {
        for (int c = d; c < d + across; ++c) {
          int before = c + widths[r + 4] / 2;
          for (int above = -4; above < r; ++above) before += widths[above + 4];
          plan.row[plan.taps] = int8_t(r), plan.column[plan.taps] = int8_t(c);
          plan.output[plan.taps] = uint8_t(plan.outputs);
          STD_TORCH_CHECK(taps + before <= INT16_MAX, kOp, ": too many kernels");
          plan.tap[plan.taps++] = int16_t(taps + before);
        }
      }
    }
    plan.first_panel[++plan.outputs] = uint8_t(panels);
    plan.reach_rows = std::max(plan.reach_rows, rows / 2);
    plan.reach_columns = std::max(plan.reach_columns, columns / 2);
    taps += count;
  }
};

bool several_panels(const Plan& plan) {
  for (int o = 0; o < plan.outputs; ++o) {
    if (plan.first_panel[o + 1] - plan.first_panel[o] > 1) return true;
  }
  return false;
}

// Tiles of which `padded` with a halo and `dense` without fit in so many floats, as few and as equal as that allows. By
// sizes alone, not by where the planes lie in memory: the order of the kernel gradients' sums follows from the tiles.
Tiles make_tiles(const Plan& plan, const Tensor& x, bool channels_last, int padded, int dense, int64_t floats) {
  STD_TORCH_CHECK(x.size(2) <= INT32_MAX && x.size(3) <= INT32_MAX, kOp, ": a plane is too large");
  Tiles t{};
  const int s = channels_last ? kChannels : 1, size = int(x.element_size());
  const int group = channels_last || x.size(3) * size % 16 == 0 ? 16 / size : 1;  // of pixels, or of channels
  t.height = int(x.size(2)), t.width = int(x.size(3)), t.reach_rows = plan.reach_rows;
  const int widest = channels_last ? 16 : t.width <= 256 ? 256 : 128;
  t.columns = int(ceil_div(t.width, ceil_div(t.width, widest)));
  if (t.columns < t.width && !channels_last) t.columns = rounded_up(t.columns, 8);
  t.across = int(ceil_div(t.width, t.columns));
  t.left = channels_last ? plan.reach_columns : std::max(group, 4);
  t.pitch = (channels_last ? t.columns : rounded_up(t.columns, group)) + (t.across > 1 ? 2 : 1) * t.left;
  for (int64_t strips = 1;; ++strips) {
    t.rows = strips == 1 ? t.height : rounded_up(int(ceil_div(t.height, strips)), kRows);
    t.stored = rounded_up(t.rows, kRows) + 2 * t.reach_rows;
    if (t.stored < 4096 && padded * t.padded_floats(s) + dense * t.dense_floats(s) <= floats) break;
    STD_TORCH_CHECK(t.rows > kRows, kOp, ": no tile fits in shared memory");
  }
  t.count = t.across * int(ceil_div(t.height, t.rows));
  t.by_columns = Divisor(t.columns);
  t.by_unit = Divisor(t.pitch * s);
  t.by_group = Divisor(t.pitch * s / group);
  return t;
}

// x, or gradients of outputs of so many channels each.
Source make_source(const Rows& rows, int64_t channels) {
  const int64_t in_row = (rows.channels_last ? channels : rows.tensor.size(3)) * int64_t(rows.tensor.element_size());
  return {rows.tensor.const_data_ptr(), rows.stride_b, rows.channels_last ? 1 : rows.stride_row,
          rows.channels_last ? rows.stride_row : 1, aligned_rows(rows) && in_row % 16 == 0};
}

// A dense tensor in the memory format of x.
Target make_target(const Tensor& t, bool channels_last) {
  const int64_t pixels = t.size(2) * t.size(3), channels = t.size(1);
  return {t.mutable_data_ptr(), channels * pixels, channels_last ? 1 : pixels, channels_last ? channels : 1};
}

// Kernels `chosen` from `begin` on, as many as a launch takes; those without elements stand for nothing.
Branches make_branches(const std::vector<Tensor>& kernels, const std::vector<size_t>& chosen, size_t begin) {
  Branches branches{};
  for (size_t l = begin; l < chosen.size() && branches.count < kBranches; ++l) {
    const Tensor& k = kernels[chosen[l]];
    Branch& branch = branches.branch[branches.count++];
    if (k.dim() != 4) continue;
    branch = {const_cast<void*>(k.const_data_ptr()),
              k.stride(0),
              k.stride(1),
              k.stride(2),
              k.stride(3),
              int(k.size(2)),
              int(k.size(3))};
  }
  return branches;
}

void check_inputs(const Tensor& x, const std::vector<Tensor>& kernels) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, kOp,
                  ": expected x (B, C, H, W) with channels and pixels");
  STD_TORCH_CHECK(!kernels.empty(), kOp, ": expected at least one kernel");
  for (const Tensor& k : kernels) {
    STD_TORCH_CHECK(k.dim() == 4 && k.size(0) == x.size(0) && k.size(1) == x.size(1) && k.size(2) % 2 == 1 &&
                        k.size(3) % 2 == 1 && k.size(2) <= 9 && k.size(3) <= 9 && k.scalar_type() == x.scalar_type(),
                    kOp, ": kernels must be (B, C, kh, kw) with odd sizes 1 ... 9, in the dtype of x");
    check_device(kOp, "x", x, "kernels", k);
  }
}

// The outputs, and the kernels as taps (B, C, T) in float32.
std::tuple<Tensor, Tensor> dynamic_conv2d_fwd(Tensor x, std::vector<Tensor> kernels, bool merge) {
  check_inputs(x, kernels);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const Launches launches(kernels, merge);
  const int64_t batch = x.size(0), channels = x.size(1);
  Tensor out = empty_rows_like(x, launches.outputs * channels);
  Tensor taps = empty(x, {batch, channels, launches.taps}, ScalarType::Float);
  dispatch_features(x.scalar_type(), kOp, [&](auto type) {
    using T = typename decltype(type)::type;
    if (batch == 0) return;
    const Rows rows = as_rows(x);
    const int s = rows.channels_last ? kChannels : 1;
    for (size_t i = 0; i < launches.plans.size(); ++i) {
      const Plan& plan = launches.plans[i];
      const std::vector<size_t>& chosen = launches.kernels[i];
      const bool packed = chosen.size() > kBranches;
      Sizes sizes{batch, channels, ceil_div(channels, s), 1};
      for (size_t l = 0; packed && l < chosen.size(); l += kBranches) {
        launch(pack_kernel<T>, ceil_div(batch * channels * plan.taps, kThreads), kThreads, stream, sizes, plan,
               make_branches(kernels, chosen, l), data<float>(taps), l > 0);
      }
      const int weights = rounded_up(plan.taps * s, 4), dense = several_panels(plan) ? 1 : 0;
      const Tiles tiles = make_tiles(plan, x, rows.channels_last, 1, dense, kForwardFloats - weights);
      sizes.pieces = tiles.count;
      const int64_t floats = weights + tiles.padded_floats(s) + dense * tiles.dense_floats(s);
      launch_shared(rows.channels_last ? forward_kernel<T, kChannels> : forward_kernel<T, 1>,
                    batch * sizes.groups * tiles.count, kThreads, size_t(floats) * 4, stream, sizes, tiles, plan,
                    make_branches(kernels, chosen, 0), make_source(rows, channels),
                    packed ? const_data<float>(taps) : nullptr, packed ? nullptr : data<float>(taps),
                    make_target(out, rows.channels_last));
    }
  });
  return {out, taps};
}

// Gradients to x and the kernels; one that is not asked for comes back with 0 elements.
std::tuple<Tensor, std::vector<Tensor>> dynamic_conv2d_bwd(Tensor grad, Tensor x, std::vector<Tensor> kernels,
                                                           Tensor taps, bool merge, bool need_x,
                                                           std::vector<bool> need_kernels) {
  check_inputs(x, kernels);
  check_device(kOp, "x", x, "grad", grad);
  check_device(kOp, "x", x, "taps", taps);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const Launches launches(kernels, merge);
  const ScalarType dtype = x.scalar_type();
  const int64_t batch = x.size(0), channels = x.size(1);
  STD_TORCH_CHECK(
      has_shape(grad, {batch, launches.outputs * channels, x.size(2), x.size(3)}) && grad.scalar_type() == dtype, kOp,
      ": grad must be (B, L*C, H, W) in the dtype of x");
  STD_TORCH_CHECK(has_shape(taps, {batch, channels, launches.taps}) && taps.scalar_type() == ScalarType::Float, kOp,
                  ": taps must be (B, C, T) in float32");
  STD_TORCH_CHECK(need_kernels.size() == kernels.size(), kOp, ": need_kernels must have one flag a kernel");
  Tensor grad_x = need_x ? empty_rows_like(x) : empty(x, {0}, dtype);
  std::vector<Tensor> grad_kernels;
  for (size_t l = 0; l < kernels.size(); ++l) {
    const Tensor& k = kernels[l];
    const std::vector<int64_t> shape{batch, channels, k.size(2), k.size(3)};
    grad_kernels.push_back(empty(k, need_kernels[l] ? shape : std::vector<int64_t>{0}, dtype));
  }
  const bool need_any = std::find(need_kernels.begin(), need_kernels.end(), true) != need_kernels.end();
  if (batch == 0 || (!need_x && !need_any)) return {grad_x, grad_kernels};

  const bool channels_last = is_channels_last(x);
  const auto format =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  const Rows grads = as_rows(is_channels_last(grad) == channels_last ? grad : torch::stable::contiguous(grad, format));
  Rows rows{x, channels_last, 0, 0};
  if (need_any) rows = as_rows(x);
  const Tensor dense_taps = torch::stable::contiguous(taps);
  const int s = channels_last ? kChannels : 1;
  const bool several = need_x && launches.plans.size() > 1;
  const Tensor sums = several ? empty(x, {batch, channels, x.size(2), x.size(3)}, ScalarType::Float) : grad_x;
  dispatch_features(dtype, kOp, [&](auto type) {
    using T = typename decltype(type)::type;
    for (size_t i = 0; i < launches.plans.size(); ++i) {
      const Plan& plan = launches.plans[i];
      const std::vector<size_t>& chosen = launches.kernels[i];
      Wanted wanted{};
      wanted.x = need_x;
      for (size_t l = 0; l < chosen.size(); ++l) {
        if (need_kernels[chosen[l]]) wanted.outputs |= 1u << (merge ? 0 : l);
      }
      if (several && i > 0) wanted.previous = data<float>(sums);
      if (several && i + 1 < launches.plans.size()) wanted.next = data<float>(sums);
      if (!need_x && wanted.outputs == 0) continue;
      const int width = rounded_up(plan.taps * s, 4);
      const int fixed = (need_x ? width : 0) + (wanted.outputs ? kWarps * width : 0), padded = wanted.outputs ? 2 : 1;
      const Tiles tiles =
          make_tiles(plan, x, channels_last, padded, need_x ? 1 : 0, kBackwardFloats[channels_last] - fixed);
      Sizes sizes{batch, channels, ceil_div(channels, s), tiles.count};
      if (wanted.outputs) sizes.pieces = channels_last ? std::min(tiles.count, kPieces) : 1;
      const bool finish = wanted.outputs && (sizes.pieces > 1 || chosen.size() > kBranches);
      const Tensor partial = empty(x, {finish ? sizes.pieces : 0, batch, channels, launches.taps}, ScalarType::Float);
      if (finish) wanted.partial = data<float>(partial);
      const int64_t floats = fixed + padded * tiles.padded_floats(s) + (need_x ? tiles.dense_floats(s) : 0);
      launch_shared(channels_last ? backward_kernel<T, kChannels> : backward_kernel<T, 1>,
                    batch * sizes.groups * sizes.pieces, kThreads, size_t(floats) * 4, stream, sizes, tiles, plan,
                    make_branches(grad_kernels, chosen, 0), need_any ? make_source(rows, channels) : Source{},
                    make_source(grads, channels), const_data<float>(dense_taps), wanted,
                    need_x ? make_target(grad_x, channels_last) : Target{});
      for (size_t l = 0; finish && l < chosen.size(); l += kBranches) {
        launch(finish_kernel<T>, ceil_div(batch * channels * plan.taps, kThreads), kThreads, stream, sizes, plan,
               make_branches(grad_kernels, chosen, l), const_data<float>(partial));
      }
    }
  });
  return {grad_x, grad_kernels};
}

}  // namespace
}  // namespace fss

STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CUDA, m) {
  m.impl("dynamic_conv2d_fwd", TORCH_BOX(&fss::dynamic_conv2d_fwd));
  m.impl("dynamic_conv2d_bwd", TORCH_BOX(&fss::dynamic_conv2d_bwd));
}
