// Masked average pooling on CUDA.
//
//   pooled[b,m,c] = sum_n w[b,m,n] x[b,c,n] / (area[b,m] + eps),   area = sum_n w,   w = mask resized to the grid
//   dL/dx[b,c,n]  = sum_m g[b,m,c] / d[b,m] w[b,m,n]                                 d = area + eps
//   dL/dw[b,m,n]  = (t[n] - sum_k w[k] t[k] / d) / d   with t[n] = sum_c g[b,m,c] x[b,c,n]; dL/dmask = resize^T dL/dw
//
// x is stored as planes (a row is one channel) or channels_last (a row is one pixel). A block owns a tile of the output
// and loops over what is summed: no atomics. Where one sample has few tiles, the sum is cut into pieces, whose partial
// sums a second kernel adds in order; the cut follows the sizes of one sample and never the batch, so a sample has the
// same bits in every batch. Memory traffic: x is read once for up to 8 masks (more masks: once for every 8), groups of
// pixels on which all of them are 0 are not read; the gradient to x is written once, past the caches; w and g come from
// L2. Rows of 16-byte groups; planes that do not start on a 16-byte boundary are read and written in aligned groups and
// shifted in registers. Accumulation: float32, at most a few hundred terms a lane; area and the last step of the mask
// gradient in float64. Limits: float32, bfloat16 and float16 features; 64-bit offsets; columns of the mask contiguous.
//
// Legend: B batch, M masks, C channels, N = H*W pixels; V elements of a 16-byte group, MN masks of one read.

#include "common/cuda/arguments.cuh"
#include "common/cuda/interpolation.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vectors.cuh"

namespace fss {
namespace {

constexpr const char* kOp = "masked_avg_pool";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 4;            // rows of x, or of its gradient, that a warp reads or writes together
constexpr int kTile = 1024;         // pixels whose weights (channels whose gradients) are in shared memory
constexpr int kGradTile = 256;      // channels whose output gradients are in shared memory
constexpr int kPixels = 8;          // pixels of one thread, gradient to channels_last features
constexpr int kResizeThreads = 64;  // small: the columns of a 60-pixel grid fill them
constexpr int kAreaThreads = 512;
constexpr int64_t kBlocksPerSample = 64;  // wanted of one sample: 8 of them fill 132 multiprocessors four times
static_assert(kTile % kThreads == 0 && kThreads % kWarp == 0);
static_assert(kGradTile % (kWarps * kRows) == 0, "warps take whole groups of rows of a tile");

// Blocks of a multiprocessor that a kernel of MN masks leaves registers for.
constexpr int blocks_with(int masks) { return masks == 1 ? 4 : masks == 2 ? 3 : 2; }

// Rows whose sums with MN masks a warp holds: all of it in registers.
constexpr int rows_with(int masks) { return masks == 8 ? kRows / 2 : kRows; }

struct Sizes {
  int64_t batch, masks, channels, pixels;
  int64_t stride_b, stride_row;  // of the features
  int64_t tiles, groups;         // tiles of the output a sample has, groups of masks
  int64_t length, pieces;        // of what is summed: pixels, channels
  float eps;
};

// Cuts `total` so that a sample with `tiles` tiles has about kBlocksPerSample blocks.
void cut(Sizes& sizes, int64_t total, int64_t shortest, int64_t longest) {
  const int64_t wanted = ceil_div(total, ceil_div(kBlocksPerSample, sizes.tiles));
  sizes.length = ceil_div(std::min(std::max(wanted, shortest), longest), 32) * 32;
  sizes.pieces = ceil_div(total, sizes.length);
}

struct Task {  // of a block: blocks of one piece are neighbours and share its weights in L2
  int64_t tile, piece, group, b;

  __device__ explicit Task(const Sizes& s) {
    const unsigned tiles = unsigned(s.tiles), pieces = unsigned(s.pieces), groups = unsigned(s.groups);
    unsigned block = blockIdx.x;
    tile = block % tiles, block /= tiles;
    piece = block % pieces, block /= pieces;
    group = block % groups, b = block / groups;
  }
};

// ---- resize ---------------------------------------------------------------------------------------------------------

template <class S, class D>
using resize_t = std::conditional_t<std::is_same_v<S, double> || std::is_same_v<D, double>, double, float>;

struct Strides {
  int64_t b, m, row;
};

// target (images, H, W) = R_rows source R_columns^T; a thread has one column and `rows_each` rows of it.
template <class S, class D>
__global__ void __launch_bounds__(kResizeThreads, 8)
    resize_kernel(const S* __restrict__ source, D* __restrict__ target, Strides strides, int64_t masks, Axis rows,
                  Axis columns, int64_t rows_each) {
  using A = resize_t<S, D>;
  const unsigned strips = unsigned(ceil_div(columns.target, kResizeThreads));
  const unsigned bands = unsigned(ceil_div(rows.target, rows_each));
  const int64_t x = int64_t(blockIdx.x % strips) * kResizeThreads + threadIdx.x;
  const int64_t y0 = int64_t(blockIdx.x / strips % bands) * rows_each, image = blockIdx.x / strips / bands;
  if (x >= columns.target) return;
  const Tap<A> column = position(columns, x).tap<A>(columns);
  const S* from = source + image / masks * strides.b + image % masks * strides.m + column.low;
  D* to = target + (image * rows.target + y0) * columns.target + x;
  const int64_t count = rows.target - y0 < rows_each ? rows.target - y0 : rows_each;
  Position y = position(rows, y0);
  for (int64_t i = 0; i < count; ++i, y.advance(rows), to += columns.target) {
    const Tap<A> row = y.tap<A>(rows);
    const S* low = from + row.low * strides.row;
    A value = A(widen(low[0])) * column.low_weight;
    if (column.high_weight != 0) value += A(widen(low[1])) * column.high_weight;
    if (row.high_weight != 0) {
      const S* high = low + strides.row;
      A below = A(widen(high[0])) * column.low_weight;
      if (column.high_weight != 0) below += A(widen(high[1])) * column.high_weight;
      value = value * row.low_weight + below * row.high_weight;
    }
    *to = narrow<D>(value);
  }
}

// R^T along one axis: target (outer, axis.source, inner) gathers, in order, the positions of the source that reach it.
// Outer index o is image (o / masks, o % masks) of the source, strides.row steps along the axis; a thread has one
// position of `outer_each` outer indices.
template <class S, class D>
__global__ void __launch_bounds__(kResizeThreads, 8)
    transposed_axis_kernel(const S* __restrict__ source, D* __restrict__ target, Strides strides, int64_t masks,
                           Axis axis, int64_t outer, int64_t inner, int64_t outer_each) {
  using A = resize_t<S, D>;
  const int64_t size = axis.source * inner;
  const unsigned strips = unsigned(ceil_div(size, kResizeThreads));
  const int64_t i = int64_t(blockIdx.x % strips) * kResizeThreads + threadIdx.x;
  const int64_t o0 = int64_t(blockIdx.x / strips) * outer_each;
  if (i >= size) return;
  const int64_t at = i / inner, begin = reach_begin(axis, at), end = reach_end(axis, at);
  const Position first = position(axis, begin);
  int64_t b = o0 / masks, m = o0 % masks;
  for (int64_t o = o0; o < outer && o < o0 + outer_each; ++o) {
    const S* from = source + b * strides.b + m * strides.m + begin * strides.row + i % inner;
    A total = 0;
    Position p = first;
    for (int64_t s = begin; s < end; ++s, p.advance(axis), from += strides.row) {
      const A weight = p.weight<A>(axis, at);
      if (weight != 0) total += weight * A(widen(*from));
    }
    target[o * size + i] = narrow<D>(total);
    if (++m == masks) m = 0, ++b;
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// area (B*M) = sum_n w, in double so that it is as exact as the weights. Block: one image.
__global__ void __launch_bounds__(kAreaThreads)
    area_kernel(const float* __restrict__ weights, float* __restrict__ area, int64_t pixels) {
  __shared__ double scratch[kAreaThreads / kWarp];
  const float* w = weights + int64_t(blockIdx.x) * pixels;
  double sum = 0;
#pragma unroll 4
  for (int64_t n = threadIdx.x; n < pixels; n += kAreaThreads) sum += double(w[n]);
  sum = block_sum<kAreaThreads>(sum, scratch);
  if (threadIdx.x == 0) area[blockIdx.x] = float(sum);
}

__device__ inline float divided(float sum, float area, float eps) {
  const float d = area + eps;
  return d == 0 ? 0.0f : sum / d;
}

// The weights of up to kTile pixels from n0 on, 0 past `end` and for masks past M, in shared memory; for every V of
// them, whether any is not 0. The whole block takes part, `tile` is complete after the next barrier.
template <int MN, int V>
struct WeightTile {
  float weights[MN][kTile];
  bool counted[kTile / V];

  __device__ static int groups(int64_t n0, int64_t end) {
    return int(ceil_div(end - n0 < kTile ? end - n0 : kTile, V));
  }

  __device__ void fill(const Sizes& s, const Task& task, const float* all, int64_t n0, int64_t end) {
    const float* from = all + (task.b * s.masks + task.group * MN) * s.pixels;
    const int64_t masks = s.masks - task.group * MN;
    for (int k = threadIdx.x; k < groups(n0, end); k += kThreads) {
      bool any = false;
#pragma unroll 1
      for (int m = 0; m < MN; ++m) {
        float w[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const int64_t n = n0 + k * V + j;
          w[j] = m < masks && n < end ? __ldg(from + m * s.pixels + n) : 0.0f;
          any |= w[j] != 0;
        }
#pragma unroll
        for (int j = 0; j < V; ++j) weights[m][k * V + j] = w[j];
      }
      counted[k] = any;
    }
  }
};

// A sum of one piece: the result itself when there is no other piece.
template <class T>
__device__ inline void put_sum(const Sizes& s, const Task& task, int64_t m, int64_t c, float sum,
                               const float* __restrict__ area, T* __restrict__ pooled, float* __restrict__ partial) {
  const int64_t image = task.b * s.masks + m, i = image * s.channels + c;
  if (s.pieces == 1) {
    pooled[i] = narrow<T>(divided(sum, area[image], s.eps));
  } else {
    partial[task.piece * s.batch * s.masks * s.channels + i] = sum;
  }
}

// Planes. Block: kWarps * R channels x MN masks of one piece of pixels; a warp has R channels, its lanes the
// groups of V pixels. A pixel without weight does not count, whatever x holds there.
template <class T, int MN, bool Aligned>
__global__ void __launch_bounds__(kThreads, blocks_with(MN))
    pool_planes_kernel(Sizes s, const T* __restrict__ x, const float* __restrict__ weights,
                       const float* __restrict__ area, T* __restrict__ pooled, float* __restrict__ partial) {
  constexpr int V = kGroup<T>;
  constexpr int R = rows_with(MN);
  static_assert(R * MN <= kWarp, "one lane holds each result of a warp");
  __shared__ __align__(16) WeightTile<MN, V> tile;
  const Task task(s);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t c0 = (task.tile * kWarps + threadIdx.x / kWarp) * R;
  const int64_t begin = task.piece * s.length;
  const int64_t end = begin + s.length < s.pixels ? begin + s.length : s.pixels;
  const T* rows[R];  // past the last channel, the last channel again
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t c = c0 + r < s.channels ? c0 + r : s.channels - 1;
    rows[r] = x + task.b * s.stride_b + c * s.stride_row;
  }
  float sums[R][MN] = {};
  for (int64_t n0 = begin; n0 < end; n0 += kTile) {
    __syncthreads();
    tile.fill(s, task, weights, n0, end);
    __syncthreads();
    if (c0 >= s.channels) continue;
    for (int k = lane; k < tile.groups(n0, end); k += kWarp) {
      if (!tile.counted[k]) continue;
      Group<T> group[R];
      load_groups<Aligned>(rows, n0 + k * V, s.pixels, group);
#pragma unroll
      for (int m = 0; m < MN; ++m) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float w = tile.weights[m][k * V + j];
          if (w != 0) {
#pragma unroll
            for (int r = 0; r < R; ++r) sums[r][m] += w * widen(group[r].get(j));
          }
        }
      }
    }
  }
  float mine = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int m = 0; m < MN; ++m) {
      const float total = warp_sum(sums[r][m]);
      if (lane == r * MN + m) mine = total;
    }
  }
  const int64_t c = c0 + lane / MN, m = task.group * MN + lane % MN;
  if (lane < R * MN && c < s.channels && m < s.masks) put_sum(s, task, m, c, mine, area, pooled, partial);
}

// Threads of a block as (slot, column): 2^k columns of V channels, the rest of the threads on other pixels.
struct Columns {
  int count, slots;

  __host__ __device__ Columns(int64_t channels, int v) : count(1) {
    while (count < kWarp && count * v < channels) count *= 2;
    slots = kThreads / count;
  }
  __host__ __device__ int64_t tiles(int64_t channels, int v) const { return ceil_div(channels, int64_t(count) * v); }
};

// channels_last. Block: up to 32 * V channels x MN masks of one piece of pixels; a thread has V channels and every
// slots-th pixel, and the slots are added in order.
template <class T, int MN, int V>
__global__ void __launch_bounds__(kThreads, blocks_with(MN))
    pool_channels_last_kernel(Sizes s, const T* __restrict__ x, const float* __restrict__ weights,
                              const float* __restrict__ area, T* __restrict__ pooled, float* __restrict__ partial) {
  static_assert(kWarp * V <= kThreads, "a thread adds the slots of one channel");
  __shared__ __align__(16) WeightTile<MN, 1> tile;
  __shared__ float level[kThreads][V];
  const Task task(s);
  const Columns columns(s.channels, V);
  const int slot = int(threadIdx.x) / columns.count;
  const int64_t c0 = task.tile * columns.count * V;
  const int64_t c = c0 + int64_t(threadIdx.x) % columns.count * V;
  const int64_t begin = task.piece * s.length;
  const int64_t end = begin + s.length < s.pixels ? begin + s.length : s.pixels;
  const T* from = x + task.b * s.stride_b + c;
  float sums[MN][V] = {};
  for (int64_t n0 = begin; n0 < end; n0 += kTile) {
    __syncthreads();
    tile.fill(s, task, weights, n0, end);
    __syncthreads();
    const int count = tile.groups(n0, end);
    for (int i = slot; c < s.channels && i < count; i += kRows * columns.slots) {
      float value[kRows][V] = {};
      bool counted[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int k = i + r * columns.slots;
        counted[r] = k < count && tile.counted[k];
        if (counted[r]) load_widened(from + (n0 + k) * s.stride_row, value[r]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int m = 0; m < MN; ++m) {
          const float w = counted[r] ? tile.weights[m][i + r * columns.slots] : 0.0f;
          if (w != 0) {
#pragma unroll
            for (int j = 0; j < V; ++j) sums[m][j] += w * value[r][j];
          }
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < MN; ++m) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) level[threadIdx.x][j] = sums[m][j];
    __syncthreads();
    const int column = int(threadIdx.x);
    if (column < columns.count * V && c0 + column < s.channels && task.group * MN + m < s.masks) {
      float total = 0;
      for (int i = 0; i < columns.slots; ++i) total += level[i * columns.count + column / V][column % V];
      put_sum(s, task, task.group * MN + m, c0 + column, total, area, pooled, partial);
    }
  }
}

// pooled = (sum of the pieces, in order) / (area + eps). Thread: one of B*M*C results.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    finish_pool_kernel(Sizes s, const float* __restrict__ partial, const float* __restrict__ area,
                       T* __restrict__ pooled) {
  const int64_t size = s.batch * s.masks * s.channels, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 4
  for (int64_t piece = 0; piece < s.pieces; ++piece) sum += partial[piece * size + i];
  pooled[i] = narrow<T>(divided(sum, area[i / s.channels], s.eps));
}

// ---- gradient to the features ---------------------------------------------------------------------------------------

// Planes. A warp writes kRows channels x 32 groups of V pixels of any number of masks. When the rows of the gradient do
// not start on a 16-byte boundary, an aligned group of V elements holds the end of one lane's group and the start of
// the next one's: a lane then writes with its left neighbour's group, and lane 0 only computes.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kThreads, 3)
    grad_features_planes_kernel(Sizes s, const T* __restrict__ grad, const float* __restrict__ weights,
                                const float* __restrict__ area, T* __restrict__ out) {
  constexpr int V = kGroup<T>;
  constexpr int F = kGroup<float>;
  const Task task(s);  // a piece is a strip of pixels
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t c0 = (task.tile * kWarps + threadIdx.x / kWarp) * kRows;
  if (c0 >= s.channels) return;
  const int64_t n = Aligned ? (task.piece * kWarp + lane) * V : (task.piece * (kWarp - 1) + lane - 1) * V;
  float sums[kRows][V] = {};
  for (int64_t m = 0; m < s.masks; ++m) {
    const int64_t image = task.b * s.masks + m;
    const float* const w[1] = {weights + image * s.pixels};
    float k[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t c = c0 + r < s.channels ? c0 + r : s.channels - 1;
      k[r] = divided(widen(grad[image * s.channels + c]), area[image], s.eps);
    }
#pragma unroll
    for (int f = 0; f < V; f += F) {
      Group<float> group[1];
      load_groups<Aligned>(w, n + f, s.pixels, group);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < F; ++j) sums[r][f + j] += k[r] * group[0].get(j);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    T* row = out + (task.b * s.channels + (c0 + r < s.channels ? c0 + r : s.channels - 1)) * s.pixels;
    Group<T> group{};
#pragma unroll
    for (int j = 0; j < V; ++j) group.set(j, narrow<T>(sums[r][j]));
    int64_t start = n;  // of the elements this lane writes
    bool writes = c0 + r < s.channels;
    if constexpr (!Aligned) {
      Group<T> left;
#pragma unroll
      for (int i = 0; i < 4; ++i) left.words[i] = __shfl_up_sync(kWholeWarp, group.words[i], 1);
      const int bytes = misalignment(row);
      if (bytes != 0) group = realign(left, group, 16 - bytes);
      start -= bytes / int(sizeof(T));
      writes = writes && lane > 0;
    }
    if (!writes) continue;
    if (start >= 0 && start + V <= s.pixels) {
      stream_group(row + start, group);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (start + j >= 0 && start + j < s.pixels) row[start + j] = group.get(j);
      }
    }
  }
}

// channels_last. A thread writes V channels of kPixels pixels.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    grad_features_channels_last_kernel(Sizes s, const T* __restrict__ grad, const float* __restrict__ weights,
                                       const float* __restrict__ area, T* __restrict__ out) {
  const Task task(s);  // a piece is kPixels pixels for every slot
  const Columns columns(s.channels, V);
  const int64_t c = (task.tile * columns.count + int64_t(threadIdx.x) % columns.count) * V;
  const int64_t n0 = task.piece * kPixels * columns.slots + threadIdx.x / columns.count;
  if (c >= s.channels) return;
  float sums[kPixels][V] = {};
  for (int64_t m = 0; m < s.masks; ++m) {
    const int64_t image = task.b * s.masks + m;
    float k[V];
    load_widened(grad + image * s.channels + c, k);
#pragma unroll
    for (int j = 0; j < V; ++j) k[j] = divided(k[j], area[image], s.eps);
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int64_t n = n0 + p * columns.slots;
      const float w = n < s.pixels ? __ldg(weights + image * s.pixels + n) : 0.0f;
#pragma unroll
      for (int j = 0; j < V; ++j) sums[p][j] += k[j] * w;
    }
  }
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int64_t n = n0 + p * columns.slots;
    if (n >= s.pixels) continue;
    T* to = out + (task.b * s.pixels + n) * s.channels + c;
    if constexpr (V == 1) {
      *to = narrow<T>(sums[p][0]);
    } else {
      Group<T> group{};
#pragma unroll
      for (int j = 0; j < V; ++j) group.set(j, narrow<T>(sums[p][j]));
      stream_group(to, group);
    }
  }
}

// ---- gradient to the resized mask -----------------------------------------------------------------------------------

// partial (pieces, B, M, N): sums over one piece of channels [begin, end). A NaN or infinite x where the mask is 0 does
// not count: such an element is summed again without it.
template <class T>
__device__ inline void put_moment(const Sizes& s, const Task& task, int64_t m, int64_t n, int64_t begin, int64_t end,
                                  float moment, const T* __restrict__ grad, const T* __restrict__ x, int64_t stride_c,
                                  int64_t stride_n, const float* __restrict__ weights, float* __restrict__ partial) {
  const int64_t image = task.b * s.masks + m, i = image * s.pixels + n;
  if (!isfinite(moment) && weights[i] == 0) {
    moment = 0;
    for (int64_t c = begin; c < end; ++c) {
      const float value = widen(x[task.b * s.stride_b + c * stride_c + n * stride_n]);
      if (isfinite(value)) moment += widen(grad[image * s.channels + c]) * value;
    }
  }
  partial[task.piece * s.batch * s.masks * s.pixels + i] = moment;
}

// Planes. Block: 32 groups of V pixels x MN masks of one piece of channels; a lane has V pixels, the warps take the
// channels in turn, R at a time, and are added in order.
template <class T, int MN, bool Aligned>
__global__ void __launch_bounds__(kThreads, blocks_with(2 * MN))
    moments_planes_kernel(Sizes s, const T* __restrict__ grad, const T* __restrict__ x,
                          const float* __restrict__ weights, float* __restrict__ partial) {
  constexpr int V = kGroup<T>;
  constexpr int R = rows_with(MN);
  static_assert(kWarp * V <= kThreads, "a thread adds the warps' sums of one pixel");
  __shared__ float grads[MN][kGradTile];
  __shared__ __align__(16) float level[kWarps][kWarp * V];
  const Task task(s);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t strip = task.tile * kWarp * V, n = strip + lane * V;
  const int64_t begin = task.piece * s.length;
  const int64_t end = begin + s.length < s.channels ? begin + s.length : s.channels;
  const int64_t image = task.b * s.masks + task.group * MN, masks = s.masks - task.group * MN;
  const T* plane = x + task.b * s.stride_b;
  float sums[MN][V] = {};
  for (int64_t c0 = begin; c0 < end; c0 += kGradTile) {
    __syncthreads();
    for (int i = threadIdx.x; i < MN * kGradTile; i += kThreads) {
      const int64_t m = i / kGradTile, c = c0 + i % kGradTile;
      grads[m][i % kGradTile] = m < masks && c < end ? widen(grad[(image + m) * s.channels + c]) : 0.0f;
    }
    __syncthreads();
    const int count = int(end - c0 < kGradTile ? end - c0 : kGradTile);
    for (int i = warp * R; n < s.pixels && i < count; i += kWarps * R) {
      const T* rows[R];  // past the last channel, the last channel again
#pragma unroll
      for (int r = 0; r < R; ++r) rows[r] = plane + (c0 + (i + r < count ? i + r : count - 1)) * s.stride_row;
      Group<T> group[R];
      load_groups<Aligned>(rows, n, s.pixels, group);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (i + r >= count) continue;
#pragma unroll
        for (int m = 0; m < MN; ++m) {
#pragma unroll
          for (int j = 0; j < V; ++j) sums[m][j] += grads[m][i + r] * widen(group[r].get(j));
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < MN; ++m) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) level[warp][lane * V + j] = sums[m][j];
    __syncthreads();
    const int column = int(threadIdx.x);
    if (column < kWarp * V && strip + column < s.pixels && m < masks) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) total += level[i][column];
      put_moment(s, task, task.group * MN + m, strip + column, begin, end, total, grad, x, s.stride_row, 1, weights,
                 partial);
    }
  }
}

// channels_last. A warp has R pixels x MN masks and all channels.
template <class T, int MN, int V>
__global__ void __launch_bounds__(kThreads, blocks_with(2 * MN))
    moments_channels_last_kernel(Sizes s, const T* __restrict__ grad, const T* __restrict__ x,
                                 const float* __restrict__ weights, float* __restrict__ partial) {
  constexpr int R = rows_with(MN);
  static_assert(R * MN <= kWarp, "one lane holds each result of a warp");
  const Task task(s);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t n0 = (task.tile * kWarps + threadIdx.x / kWarp) * R;
  if (n0 >= s.pixels) return;
  float sums[R][MN] = {};
#pragma unroll 1  // R loads are in flight; more of them cost a spill
  for (int64_t c = lane * V; c < s.channels; c += kWarp * V) {
    float value[R][V];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t n = n0 + r < s.pixels ? n0 + r : s.pixels - 1;
      load_widened(x + task.b * s.stride_b + n * s.stride_row + c, value[r]);
    }
#pragma unroll
    for (int m = 0; m < MN; ++m) {
      const int64_t mask = task.group * MN + m < s.masks ? task.group * MN + m : s.masks - 1;
      float g[V];
      load_widened(grad + (task.b * s.masks + mask) * s.channels + c, g);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int j = 0; j < V; ++j) sums[r][m] += g[j] * value[r][j];
      }
    }
  }
  float mine = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int m = 0; m < MN; ++m) {
      const float total = warp_sum(sums[r][m]);
      if (lane == r * MN + m) mine = total;
    }
  }
  const int64_t n = n0 + lane / MN, m = task.group * MN + lane % MN;
  if (lane < R * MN && n < s.pixels && m < s.masks) {
    put_moment(s, task, m, n, 0, s.channels, mine, grad, x, 1, s.stride_row, weights, partial);
  }
}

// The pieces added in order and turned into the gradient to w, in the first piece. In double: with few pixels t and its
// mean nearly cancel. Block: one image.
__global__ void __launch_bounds__(kAreaThreads)
    grad_weights_kernel(Sizes s, const float* __restrict__ weights, const float* __restrict__ area, float* moments) {
  __shared__ double scratch[kAreaThreads / kWarp];
  const int64_t image = blockIdx.x, size = s.batch * s.masks * s.pixels;
  const double d = double(area[image]) + double(s.eps);
  float* t = moments + image * s.pixels;
  double mean = 0;
  for (int64_t n = threadIdx.x; n < s.pixels; n += kAreaThreads) {
    float sum = t[n];
    for (int64_t piece = 1; piece < s.pieces; ++piece) sum += t[piece * size + n];
    t[n] = sum;  // read again by this thread
    mean += double(weights[image * s.pixels + n]) * double(sum);
  }
  mean = block_sum<kAreaThreads>(mean, scratch) / d;
  for (int64_t n = threadIdx.x; n < s.pixels; n += kAreaThreads) {
    t[n] = d == 0 ? 0.0f : float((double(t[n]) - mean) / d);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

struct Resize {
  bool adjoint, nearest, align_corners;
};

Resize resize_mode(const std::string& resize, bool align_corners) {
  STD_TORCH_CHECK(resize == "bilinear" || resize == "nearest" || resize == "adjoint", kOp, ": resize must be ",
                  "'bilinear', 'nearest' or 'adjoint', got '", resize, "'");
  return {resize == "adjoint", resize == "nearest", align_corners};
}

void check_inputs(const Tensor& features, const Tensor& mask) {
  STD_TORCH_CHECK(features.dim() == 4 && mask.dim() == 4 && features.size(0) == mask.size(0), kOp,
                  ": expected features (B, C, H, W) and mask (B, M, h, w)");
  STD_TORCH_CHECK(
      features.size(1) > 0 && features.size(2) > 0 && features.size(3) > 0 && mask.size(2) > 0 && mask.size(3) > 0, kOp,
      ": channels, grid and mask grid must not be empty");
  STD_TORCH_CHECK(features.scalar_type() != ScalarType::Double, kOp,
                  ": float64 features are not supported on CUDA; use float32 or the reference");
}

template <int N>
using int_tag = std::integral_constant<int, N>;

// Calls f(int_tag<MN>) with the number of masks of one read; all of `masks` up to 8.
template <class F>
void dispatch_masks(int64_t masks, F&& f) {
  if (masks == 1) return f(int_tag<1>{});
  if (masks == 2) return f(int_tag<2>{});
  if (masks <= 4) return f(int_tag<4>{});
  return f(int_tag<8>{});
}

// target (B, M, ., .) from source (B, M, ., .) by R(source -> target), or by R(target -> source)^T.
template <class S, class D>
void resize_images(const Tensor& source, const Tensor& target, const Resize& mode, bool transposed,
                   cudaStream_t stream) {
  using A = resize_t<S, D>;
  const int64_t images = target.size(0) * target.size(1), masks = target.size(1);
  const int64_t source_h = source.size(2), source_w = source.size(3), h = target.size(2), w = target.size(3);
  const Strides strides{source.stride(0), source.stride(1), source.stride(2)};
  const auto axis = [&](int64_t from, int64_t to) {
    return transposed ? make_axis(to, from, mode.nearest, mode.align_corners)
                      : make_axis(from, to, mode.nearest, mode.align_corners);
  };
  const Axis rows = axis(source_h, h), columns = axis(source_w, w);
  if (!transposed) {
    const int64_t rows_each = h > source_h ? 8 : 2;
    launch(resize_kernel<S, D>, images * ceil_div(h, rows_each) * ceil_div(w, kResizeThreads), kResizeThreads, stream,
           const_data<S>(source), data<D>(target), strides, masks, rows, columns, rows_each);
    return;
  }
  const Tensor lines =
      empty(source, {images, h, source_w}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  const int64_t outer_each = 8;
  launch(transposed_axis_kernel<S, A>, images * ceil_div(h * source_w, kResizeThreads), kResizeThreads, stream,
         const_data<S>(source), data<A>(lines), strides, masks, rows, images, source_w, int64_t(1));
  launch(transposed_axis_kernel<A, D>, ceil_div(images * h, outer_each) * ceil_div(w, kResizeThreads), kResizeThreads,
         stream, const_data<A>(lines), data<D>(target), Strides{source_w, 0, 1}, int64_t(1), columns, images * h,
         int64_t(1), outer_each);
}

std::tuple<Tensor, Tensor, Tensor> masked_avg_pool_fwd(Tensor features, Tensor mask, double eps, Text resize_name,
                                                       bool align_corners) {
  check_inputs(features, mask);
  check_device(kOp, "features", features, "mask", mask);
  const Resize mode = resize_mode(resize_name, align_corners);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const cudaStream_t stream = current_stream(features);
  const ScalarType dtype = features.scalar_type();
  const int64_t batch = mask.size(0), masks = mask.size(1), channels = features.size(1);
  const int64_t pixels = features.size(2) * features.size(3);
  Tensor pooled = empty(features, {batch, masks, channels}, dtype);
  Tensor resized = empty(features, {batch, masks, features.size(2), features.size(3)}, ScalarType::Float);
  Tensor area = empty(features, {batch, masks}, ScalarType::Float);
  if (batch * masks == 0) return {pooled, resized, area};

  const Tensor readable = mask.stride(3) == 1 || mask.size(3) == 1 ? mask : torch::stable::contiguous(mask);
  dispatch_mask(mask.scalar_type(), kOp, [&](auto s) {
    resize_images<typename decltype(s)::type, float>(readable, resized, mode, mode.adjoint, stream);
  });
  launch(area_kernel, batch * masks, kAreaThreads, stream, const_data<float>(resized), data<float>(area), pixels);

  const Rows rows = as_rows(features);
  Sizes sizes{batch, masks, channels, pixels, rows.stride_b, rows.stride_row, 1, 1, pixels, 1, float(eps)};
  dispatch_features(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    dispatch_masks(masks, [&](auto mn) {
      dispatch_bool(aligned_rows(rows) && (!rows.channels_last || channels % kGroup<T> == 0), [&](auto whole) {
        constexpr int V = decltype(whole)::value ? kGroup<T> : 1;
        sizes.groups = ceil_div(masks, mn.value);
        if (rows.channels_last) {
          sizes.tiles = Columns(channels, V).tiles(channels, V);
          cut(sizes, pixels, 128, 2048);
        } else {
          sizes.tiles = ceil_div(channels, kWarps * rows_with(mn.value));
          cut(sizes, pixels, 256, 8192);
        }
        const Tensor partial =
            empty(features, {sizes.pieces > 1 ? sizes.pieces : 0, batch, masks, channels}, ScalarType::Float);
        const auto kernel = rows.channels_last ? pool_channels_last_kernel<T, decltype(mn)::value, V>
                                               : pool_planes_kernel<T, decltype(mn)::value, decltype(whole)::value>;
        launch(kernel, batch * sizes.groups * sizes.pieces * sizes.tiles, kThreads, stream, sizes,
               const_data<T>(rows.tensor), const_data<float>(resized), const_data<float>(area), data<T>(pooled),
               data<float>(partial));
        if (sizes.pieces > 1) {
          launch(finish_pool_kernel<T>, ceil_div(pooled.numel(), kThreads), kThreads, stream, sizes,
                 const_data<float>(partial), const_data<float>(area), data<T>(pooled));
        }
      });
    });
  });
  return {pooled, resized, area};
}

// dL/dx (dense, planes or channels_last).
void grad_features(Sizes sizes, const Tensor& grad, const Tensor& weights, const Tensor& area, const Tensor& out,
                   bool channels_last, cudaStream_t stream) {
  dispatch_features(out.scalar_type(), kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool rows_aligned = (channels_last ? sizes.channels : sizes.pixels) % kGroup<T> == 0;
    dispatch_bool(rows_aligned && aligned(channels_last ? grad : weights) && aligned(out), [&](auto whole) {
      constexpr int V = decltype(whole)::value ? kGroup<T> : 1;
      if (channels_last) {
        const Columns columns(sizes.channels, V);
        sizes.tiles = columns.tiles(sizes.channels, V);
        sizes.pieces = ceil_div(sizes.pixels, kPixels * columns.slots);
      } else {
        // without alignment: one group more, shared between two pixel groups, and one lane that does not write
        const int64_t groups = ceil_div(sizes.pixels, kGroup<T>);
        sizes.tiles = ceil_div(sizes.channels, kWarps * kRows);
        sizes.pieces = whole.value ? ceil_div(groups, kWarp) : ceil_div(groups + 1, kWarp - 1);
      }
      const auto kernel = channels_last ? grad_features_channels_last_kernel<T, V>
                                        : grad_features_planes_kernel<T, decltype(whole)::value>;
      launch(kernel, sizes.batch * sizes.pieces * sizes.tiles, kThreads, stream, sizes, const_data<T>(grad),
             const_data<float>(weights), const_data<float>(area), data<T>(out));
    });
  });
}

// dL/dw (B, M, H, W), with scratch for the other pieces behind it.
Tensor grad_weights(Sizes sizes, const Tensor& grad, const Rows& rows, const Tensor& weights, const Tensor& area,
                    cudaStream_t stream) {
  Tensor moments = empty(weights, {0}, ScalarType::Float);
  dispatch_features(rows.tensor.scalar_type(), kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    dispatch_masks(sizes.masks, [&](auto mn) {
      const bool groups = !rows.channels_last || (sizes.channels % kGroup<T> == 0 && aligned(grad));
      dispatch_bool(aligned_rows(rows) && groups, [&](auto whole) {
        constexpr int V = decltype(whole)::value ? kGroup<T> : 1;
        sizes.groups = ceil_div(sizes.masks, mn.value);
        if (rows.channels_last) {
          sizes.tiles = ceil_div(sizes.pixels, kWarps * rows_with(mn.value));
        } else {
          sizes.tiles = ceil_div(sizes.pixels, kWarp * kGroup<T>);
          cut(sizes, sizes.channels, 64, 2048);
        }
        moments = empty(weights, {sizes.pieces, sizes.batch, sizes.masks, weights.size(2), weights.size(3)},
                        ScalarType::Float);
        const auto kernel = rows.channels_last ? moments_channels_last_kernel<T, decltype(mn)::value, V>
                                               : moments_planes_kernel<T, decltype(mn)::value, decltype(whole)::value>;
        launch(kernel, sizes.batch * sizes.groups * sizes.pieces * sizes.tiles, kThreads, stream, sizes,
               const_data<T>(grad), const_data<T>(rows.tensor), const_data<float>(weights), data<float>(moments));
      });
    });
  });
  launch(grad_weights_kernel, sizes.batch * sizes.masks, kAreaThreads, stream, sizes, const_data<float>(weights),
         const_data<float>(area), data<float>(moments));
  return torch::stable::select(moments, 0, 0);
}

// Gradients to features and mask; one that is not asked for comes back with 0 elements.
std::tuple<Tensor, Tensor> masked_avg_pool_bwd(Tensor grad, Tensor features, Tensor mask, Tensor resized, Tensor area,
                                               double eps, Text resize_name, bool align_corners, bool need_features,
                                               bool need_mask) {
  check_inputs(features, mask);
  check_device(kOp, "features", features, "grad", grad);
  check_device(kOp, "features", features, "mask", mask);
  check_device(kOp, "features", features, "resized", resized);
  check_device(kOp, "features", features, "area", area);
  const Resize mode = resize_mode(resize_name, align_corners);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const cudaStream_t stream = current_stream(features);
  const ScalarType dtype = features.scalar_type();
  const int64_t batch = mask.size(0), masks = mask.size(1);
  Tensor grad_x = need_features ? empty_rows_like(features) : empty(features, {0}, dtype);
  Tensor grad_mask = empty(mask, {0}, mask.scalar_type());
  if (need_mask) grad_mask = empty(mask, {batch, masks, mask.size(2), mask.size(3)}, mask.scalar_type());
  if (batch * masks == 0) {
    if (need_features) torch::stable::zero_(grad_x);
    return {grad_x, grad_mask};
  }

  const Tensor dense_grad = torch::stable::contiguous(grad);
  const Tensor weights = torch::stable::contiguous(resized), dense_area = torch::stable::contiguous(area);
  Sizes sizes{batch, masks, features.size(1), features.size(2) * features.size(3), 0, 0, 1, 1, 0, 1, float(eps)};
  if (need_features) {
    grad_features(sizes, dense_grad, weights, dense_area, grad_x, is_channels_last(features), stream);
  }
  if (need_mask) {
    const Rows rows = as_rows(features);
    sizes.stride_b = rows.stride_b, sizes.stride_row = rows.stride_row;
    const Tensor grad_resized = grad_weights(sizes, dense_grad, rows, weights, dense_area, stream);
    dispatch_floating(mask.scalar_type(), kOp, [&](auto d) {
      resize_images<float, typename decltype(d)::type>(grad_resized, grad_mask, mode, !mode.adjoint, stream);
    });
  }
  return {grad_x, grad_mask};
}

}  // namespace
}  // namespace fss

STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CUDA, m) {
  m.impl("masked_avg_pool_fwd", TORCH_BOX(&fss::masked_avg_pool_fwd));
  m.impl("masked_avg_pool_bwd", TORCH_BOX(&fss::masked_avg_pool_bwd));
}
