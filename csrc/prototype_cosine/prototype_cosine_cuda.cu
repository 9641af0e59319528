// Cosine of every pixel with every prototype on CUDA.
//
//   cosine[b,p,n] = x[n] . w[p] / (N(|x[n]|) N(|w[p]|)),   score = scale cosine     N(t) = max(t, eps) or t + eps
//   dL/dx[c,n] = sum_p k[p,n] u[p,c] - s[n] x[c,n]     u[p] = w[p] / N(|w[p]|), k[p,n] = scale g[p,n] / N(|x[n]|)
//   v[p,c] = sum_n k[p,n] x[c,n],   dL/dw[p] = v / N - w (w . v) / (|w| N^2)
//   s[n] = scale sum_p g[p,n] cosine[p,n] / (|x[n]| N(|x[n]|)); of a short vector, that of the magnified one (cosine.h)
//
// x is stored as planes (a row is one channel) or channels_last (a row is one pixel). A block owns a tile of the output
// and loops over what is summed: no atomics. Forward, one launch: a block has 8 groups of V pixels (planes; its warps
// and quarter warps take the channels in turn and are added in order) or 32 pixels (channels_last) and all channels, so
// it also has the norms of its prototypes. Backward: one launch for the pixels' factors k and s and the normalised
// prototypes, one for each wanted gradient, one that adds the pieces of v in order; pieces follow the sizes of one
// sample and never the batch, so a sample has the same bits in every batch. Memory traffic: x is read once for up to 8
// prototypes (more: once for every 8) in the forward, and once for each gradient; the gradient to x is written once,
// past the caches; k, s and prototypes come from L2. Accumulation: float32, at most C / 32 terms (planes: N / 32 of a
// piece) a lane. Limits: float32, bfloat16 and float16; 64-bit offsets; rows that do not start on a 16-byte boundary
// are read element by element.
//
// Legend: B batch, P prototypes, C channels, N = H*W pixels; V elements of an access, PN prototypes of one read.

#include "common/cuda/arguments.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vectors.cuh"

namespace fss {
namespace {

constexpr const char* kOp = "prototype_cosine";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLanes = 8;                  // groups of pixels side by side in a block, forward on planes
constexpr int kSlots = kThreads / kLanes;  // channels a block reads together there
constexpr int kRows = 4;                   // rows of x of one warp in flight
constexpr int kTile = 256;                 // channels of w (pixels of k) in shared memory
constexpr int64_t kBlocksPerSample = 64;   // wanted of one sample: 8 of them fill 132 multiprocessors four times
static_assert(kTile % kSlots == 0);

struct Sizes {
  int64_t batch, sets, prototypes, channels, pixels;
  int64_t stride_b, stride_row;  // of the features
  int64_t tiles, groups, pieces, length;
  float scale, eps;
  bool add;
};

struct Task {  // of a block
  int64_t tile, piece, group, b;

  __device__ explicit Task(const Sizes& s) {
    const unsigned tiles = unsigned(s.tiles), pieces = unsigned(s.pieces), groups = unsigned(s.groups);
    unsigned block = blockIdx.x;
    tile = block % tiles, block /= tiles;
    piece = block % pieces, block /= pieces;
    group = block % groups, b = block / groups;
  }
};

// First prototype of a sample.
__device__ inline int64_t set_of(const Sizes& s, int64_t b) { return (s.sets == 1 ? 0 : b) * s.prototypes; }

// 1 / N(norm); 0 for a zero vector, NaN for a norm that is not finite.
__device__ inline float inverse_norm(const Sizes& s, float norm) {
  if (!isfinite(norm)) return __uint_as_float(0x7fc00000u);
  return norm == 0 ? 0.0f : 1.0f / (s.add ? norm + s.eps : fmaxf(norm, s.eps));
}

// The power of two that magnifies a short vector; 1 for any other (common/cosine.h).
__device__ inline float magnification(float norm) { return norm < 0x1p-32f ? 0x1p64f : 1.0f; }

// What multiplies, with (mx . D) / N, the magnified vector mx in its gradient: 1 / (m norm N(norm)), 0 where eps alone
// divides or the vector is 0.
__device__ inline float norm_slope(const Sizes& s, float norm) {
  const float m = magnification(norm), size = norm * m, eps = s.eps * m;
  if (size == 0 || (!s.add && size <= eps)) return 0;
  return 1.0f / (size * (s.add ? size + eps : fmaxf(size, eps))) * m;
}

// ---- forward --------------------------------------------------------------------------------------------------------

__device__ inline void put_norm(const Sizes& s, const Task& task, int64_t n, float norm, float* __restrict__ norms) {
  if (task.group == 0) norms[task.b * s.pixels + n] = norm;
}

template <class T>
__device__ inline void put_cosine(const Sizes& s, const Task& task, int64_t p, int64_t n, float cosine,
                                  T* __restrict__ scores, float* __restrict__ cosines) {
  const int64_t i = (task.b * s.prototypes + p) * s.pixels + n;
  cosines[i] = cosine;
  scores[i] = narrow<T>(s.scale * cosine);
}

// Planes. Block: kLanes groups of V pixels x PN prototypes, all channels, kSlots at a time.
template <class T, int PN, int V>
__global__ void __launch_bounds__(kThreads, 2)
    scores_planes_kernel(Sizes s, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ scores,
                         float* __restrict__ cosines, float* __restrict__ norms) {
  constexpr int kPixels = kLanes * V;
  __shared__ float tile[PN][kTile];
  __shared__ float level[kSlots][kPixels];
  __shared__ float inverses[kPixels];
  __shared__ float scratch[kWarps];
  const Task task(s);
  const int lane = int(threadIdx.x) % kLanes, slot = int(threadIdx.x) / kLanes;
  const int64_t n0 = task.tile * kPixels, n = n0 + lane * V;
  const int64_t p0 = task.group * PN, count = s.prototypes - p0;
  const T* rows = x + task.b * s.stride_b + n;
  const T* first = w + (set_of(s, task.b) + p0) * s.channels;
  float dots[PN + 1][V] = {};
  float squares[PN] = {};  // of the prototypes: this thread's channels
  for (int64_t c0 = 0; c0 < s.channels; c0 += kTile) {
    const int length = int(s.channels - c0 < kTile ? s.channels - c0 : kTile);
    __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
#pragma unroll
      for (int m = 0; m < PN; ++m) {
        const float value = m < count && i < length ? widen(first[m * s.channels + c0 + i]) : 0.0f;
        tile[m][i] = value;
        squares[m] += value * value;
      }
    }
    __syncthreads();
    if (n >= s.pixels) continue;
#pragma unroll 4
    for (int i = slot; i < length; i += kSlots) {
      float value[V];
      load_widened(rows + (c0 + i) * s.stride_row, value);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        dots[PN][j] += value[j] * value[j];
#pragma unroll
        for (int m = 0; m < PN; ++m) dots[m][j] += tile[m][i] * value[j];
      }
    }
  }
  const int pixel = int(threadIdx.x);  // of the first kPixels threads: one sum each
#pragma unroll
  for (int turn = 0; turn <= PN; ++turn) {
    const int m = (turn + PN) % (PN + 1);  // the squares first
    float inverse = 1;
    if (m < PN) {
      __syncthreads();
      inverse = inverse_norm(s, sqrtf(block_sum<kThreads>(squares[m], scratch)));
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) level[slot][lane * V + j] = dots[m][j];
    __syncthreads();
    if (pixel < kPixels && n0 + pixel < s.pixels) {
      float total = 0;
#pragma unroll 8
      for (int i = 0; i < kSlots; ++i) total += level[i][pixel];
      if (m == PN) {
        const float norm = sqrtf(total);
        inverses[pixel] = inverse_norm(s, norm);  // read by this thread alone
        put_norm(s, task, n0 + pixel, norm, norms);
      } else if (m < count) {
        put_cosine(s, task, p0 + m, n0 + pixel, total * inverse * inverses[pixel], scores, cosines);
      }
    }
  }
}

// channels_last. A warp has R pixels x PN prototypes and all channels.
template <class T, int PN, int V>
__global__ void __launch_bounds__(kThreads, 2)
    scores_channels_last_kernel(Sizes s, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ scores,
                                float* __restrict__ cosines, float* __restrict__ norms) {
  constexpr int R = PN == 8 ? 2 : 4;
  static_assert(R * PN <= kWarp, "one lane writes each result of a warp");
  const Task task(s);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t n0 = (task.tile * kWarps + threadIdx.x / kWarp) * R;
  if (n0 >= s.pixels) return;
  const int64_t p0 = task.group * PN;
  float dots[R][PN + 1] = {};
  float squares[PN] = {};
#pragma unroll 1  // R loads are in flight; more of them cost a spill
  for (int64_t c = lane * V; c < s.channels; c += kWarp * V) {
    float value[R][V];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t n = n0 + r < s.pixels ? n0 + r : s.pixels - 1;
      load_widened(x + task.b * s.stride_b + n * s.stride_row + c, value[r]);
#pragma unroll
      for (int j = 0; j < V; ++j) dots[r][PN] += value[r][j] * value[r][j];
    }
#pragma unroll
    for (int m = 0; m < PN; ++m) {
      const int64_t p = p0 + m < s.prototypes ? p0 + m : s.prototypes - 1;
      float u[V];
      load_widened(w + (set_of(s, task.b) + p) * s.channels + c, u);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        squares[m] += u[j] * u[j];
#pragma unroll
        for (int r = 0; r < R; ++r) dots[r][m] += u[j] * value[r][j];
      }
    }
  }
  float norm = 0, mine = 0, square = 0;
#pragma unroll
  for (int m = 0; m < PN; ++m) {
    const float total = warp_sum(squares[m]);
    if (lane % PN == m) square = total;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const float length = sqrtf(warp_sum(dots[r][PN]));
    if (lane / PN == r) norm = length;
#pragma unroll
    for (int m = 0; m < PN; ++m) {
      const float total = warp_sum(dots[r][m]);
      if (lane == r * PN + m) mine = total;
    }
  }
  const int64_t n = n0 + lane / PN, p = p0 + lane % PN;
  if (lane >= R * PN || n >= s.pixels || p >= s.prototypes) return;
  if (lane % PN == 0) put_norm(s, task, n, norm, norms);
  put_cosine(s, task, p, n, mine * inverse_norm(s, sqrtf(square)) * inverse_norm(s, norm), scores, cosines);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Blocks of pixels first: k (B, P, N) and s (B, N); then a block for each prototype: u (sets, P, C).
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    factors_kernel(Sizes s, const T* __restrict__ grad, const float* __restrict__ cosines,
                   const float* __restrict__ norms, const T* __restrict__ w, float* __restrict__ k,
                   float* __restrict__ slopes, float* __restrict__ units) {
  __shared__ float scratch[kWarps];
  const int64_t of_pixels = s.batch * s.tiles;
  if (blockIdx.x >= of_pixels) {
    const int64_t row = (blockIdx.x - of_pixels) * s.channels;
    float square = 0;
    for (int64_t c = threadIdx.x; c < s.channels; c += kThreads) square += widen(w[row + c]) * widen(w[row + c]);
    const float inverse = inverse_norm(s, sqrtf(block_sum<kThreads>(square, scratch)));
    for (int64_t c = threadIdx.x; c < s.channels; c += kThreads) units[row + c] = widen(w[row + c]) * inverse;
    return;
  }
  const int64_t b = blockIdx.x / s.tiles, n = blockIdx.x % s.tiles * kThreads + threadIdx.x;
  if (n >= s.pixels) return;
  const float norm = norms[b * s.pixels + n], inverse = s.scale * inverse_norm(s, norm);
  float along = 0;
#pragma unroll 4
  for (int64_t p = 0; p < s.prototypes; ++p) {
    const int64_t i = (b * s.prototypes + p) * s.pixels + n;
    const float g = widen(grad[i]);
    along += g * cosines[i];
    k[i] = g * inverse;
  }
  slopes[b * s.pixels + n] = along * s.scale * norm_slope(s, norm);
}

template <class T, int V>
__device__ inline void put_group(T* to, const float (&v)[V]) {
  if constexpr (V == 1) {
    *to = narrow<T>(v[0]);
  } else {
    Group<T> group{};
#pragma unroll
    for (int j = 0; j < V; ++j) group.set(j, narrow<T>(v[j]));
    stream_group(to, group);
  }
}

// One row of dL/dx is a sum of P operand rows. Planes: a row is a channel, the operands are k, the coefficients u and s
// runs along the row; channels_last: a row is a pixel, the operands are u, the coefficients k. A warp writes kRows rows
// x 32 groups of V elements.
template <class T, int V, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 2)
    grad_features_kernel(Sizes s, const T* __restrict__ x, const float* __restrict__ k,
                         const float* __restrict__ slopes, const float* __restrict__ norms,
                         const float* __restrict__ units, T* __restrict__ out) {
  const Task task(s);  // a tile is kWarps * kRows rows, a piece 32 groups
  const int64_t rows = ChannelsLast ? s.pixels : s.channels, columns = ChannelsLast ? s.channels : s.pixels;
  const int64_t r0 = (task.tile * kWarps + threadIdx.x / kWarp) * kRows;
  const int64_t j0 = (task.piece * kWarp + threadIdx.x % kWarp) * V;
  if (r0 >= rows || j0 >= columns) return;
  const float* of_pixels = k + task.b * s.prototypes * s.pixels;
  const float* of_channels = units + set_of(s, task.b) * s.channels;
  const float* operand = (ChannelsLast ? of_channels : of_pixels) + j0;
  const float* coefficient = ChannelsLast ? of_pixels : of_channels;
  float sums[kRows][V] = {};
  for (int64_t p = 0; p < s.prototypes; ++p) {
    float a[V];
#pragma unroll
    for (int j = 0; j < V; ++j) a[j] = __ldg(operand + p * columns + j);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float f = __ldg(coefficient + p * rows + (r0 + r < rows ? r0 + r : rows - 1));
#pragma unroll
      for (int j = 0; j < V; ++j) sums[r][j] += f * a[j];
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r0 + r >= rows) continue;
    float value[V];
    load_widened(x + task.b * s.stride_b + (r0 + r) * s.stride_row + j0, value);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int64_t n = task.b * s.pixels + (ChannelsLast ? r0 + r : j0 + j);
      sums[r][j] -= __ldg(slopes + n) * (value[j] * magnification(__ldg(norms + n)));
    }
    put_group<T, V>(out + (task.b * rows + r0 + r) * columns + j0, sums[r]);
  }
}

// v of one piece of pixels, (B, pieces, P, C). Planes. A warp has kRows channels x PN prototypes.
template <class T, int PN, int V>
__global__ void __launch_bounds__(kThreads, 2)
    sums_planes_kernel(Sizes s, const T* __restrict__ x, const float* __restrict__ k, float* __restrict__ partial) {
  constexpr int R = PN == 8 ? kRows / 2 : kRows;
  static_assert(R * PN <= kWarp, "one lane writes each result of a warp");
  const Task task(s);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t c0 = (task.tile * kWarps + threadIdx.x / kWarp) * R;
  if (c0 >= s.channels) return;
  const int64_t begin = task.piece * s.length;
  const int64_t end = begin + s.length < s.pixels ? begin + s.length : s.pixels;
  const int64_t p0 = task.group * PN;
  float sums[R][PN] = {};
#pragma unroll 1
  for (int64_t n = begin + lane * V; n < end; n += kWarp * V) {
    float value[R][V];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t c = c0 + r < s.channels ? c0 + r : s.channels - 1;
      load_widened(x + task.b * s.stride_b + c * s.stride_row + n, value[r]);
    }
#pragma unroll
    for (int m = 0; m < PN; ++m) {
      const int64_t p = p0 + m < s.prototypes ? p0 + m : s.prototypes - 1;
      const float* from = k + (task.b * s.prototypes + p) * s.pixels + n;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float f = __ldg(from + j);
#pragma unroll
        for (int r = 0; r < R; ++r) sums[r][m] += f * value[r][j];
      }
    }
  }
  float mine = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int m = 0; m < PN; ++m) {
      const float total = warp_sum(sums[r][m]);
      if (lane == r * PN + m) mine = total;
    }
  }
  const int64_t c = c0 + lane / PN, p = p0 + lane % PN;
  if (lane >= R * PN || c >= s.channels || p >= s.prototypes) return;
  partial[((task.b * s.pieces + task.piece) * s.prototypes + p) * s.channels + c] = mine;
}

// channels_last. A lane has V channels x PN prototypes; the warps take the pixels of a piece in turn and are added in
// order.
template <class T, int PN, int V>
__global__ void __launch_bounds__(kThreads, PN* V > 32 ? 1 : 2)
    sums_channels_last_kernel(Sizes s, const T* __restrict__ x, const float* __restrict__ k,
                              float* __restrict__ partial) {
  static_assert(kWarp * V <= kThreads, "a thread adds the warps' sums of one channel");
  __shared__ float level[kWarps][kWarp * V];
  const Task task(s);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t c0 = task.tile * kWarp * V, c = c0 + lane * V;
  const int64_t begin = task.piece * s.length;
  const int64_t end = begin + s.length < s.pixels ? begin + s.length : s.pixels;
  const int64_t p0 = task.group * PN;
  constexpr int kUnroll = PN * V > 32 ? 1 : 4;  // loads in flight; more of them cost a spill
  float sums[PN][V] = {};
#pragma unroll kUnroll
  for (int64_t n = begin + warp; c < s.channels && n < end; n += kWarps) {
    float value[V];
    load_widened(x + task.b * s.stride_b + n * s.stride_row + c, value);
#pragma unroll
    for (int m = 0; m < PN; ++m) {
      const int64_t p = p0 + m < s.prototypes ? p0 + m : s.prototypes - 1;
      const float f = __ldg(k + (task.b * s.prototypes + p) * s.pixels + n);
#pragma unroll
      for (int j = 0; j < V; ++j) sums[m][j] += f * value[j];
    }
  }
#pragma unroll
  for (int m = 0; m < PN; ++m) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) level[warp][lane * V + j] = sums[m][j];
    __syncthreads();
    const int column = int(threadIdx.x);
    if (column < kWarp * V && c0 + column < s.channels && p0 + m < s.prototypes) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) total += level[i][column];
      partial[((task.b * s.pieces + task.piece) * s.prototypes + p0 + m) * s.channels + c0 + column] = total;
    }
  }
}

// v, the pieces of all samples of a set added in order in the first of them, -> dL/dw. Block: one prototype.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_prototypes_kernel(Sizes s, const T* __restrict__ w, float* partial, T* __restrict__ out) {
  __shared__ float scratch[2][kWarps];
  const int64_t row = int64_t(blockIdx.x) * s.channels, per_set = s.batch / s.sets * s.pieces;
  const int64_t set = blockIdx.x / s.prototypes, p = blockIdx.x % s.prototypes;
  float* v = partial + (set * per_set * s.prototypes + p) * s.channels;
  float square = 0, dot = 0;
  for (int64_t c = threadIdx.x; c < s.channels; c += kThreads) {
    float total = v[c];
#pragma unroll 2
    for (int64_t i = 1; i < per_set; ++i) total += v[i * s.prototypes * s.channels + c];
    v[c] = total;  // read again by this thread
    const float value = widen(w[row + c]);
    square += value * value;
  }
  const float norm = sqrtf(block_sum<kThreads>(square, scratch[0])), inverse = inverse_norm(s, norm);
  const float m = magnification(norm);
  for (int64_t c = threadIdx.x; c < s.channels; c += kThreads) dot += widen(w[row + c]) * m * v[c];
  const float along = block_sum<kThreads>(dot, scratch[1]) * (inverse / m) * norm_slope(s, norm);
  for (int64_t c = threadIdx.x; c < s.channels; c += kThreads) {
    out[row + c] = narrow<T>(v[c] * inverse - along * (widen(w[row + c]) * m));
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

void check_inputs(const Tensor& features, const Tensor& prototypes, const std::string& eps_mode) {
  STD_TORCH_CHECK(features.dim() == 4 && prototypes.dim() == 3 && prototypes.size(2) == features.size(1) &&
                      (prototypes.size(0) == features.size(0) || prototypes.size(0) == 1),
                  kOp, ": expected features (B, C, H, W) and prototypes (B, P, C) or (1, P, C)");
  STD_TORCH_CHECK(features.scalar_type() == prototypes.scalar_type(), kOp, ": features and prototypes differ in dtype");
  STD_TORCH_CHECK(features.size(1) > 0 && features.size(2) > 0 && features.size(3) > 0, kOp,
                  ": channels and grid must not be empty");
  STD_TORCH_CHECK(eps_mode == "clamp" || eps_mode == "add", kOp, ": eps_mode must be 'clamp' or 'add', got '", eps_mode,
                  "'");
  STD_TORCH_CHECK(features.scalar_type() != ScalarType::Double, kOp,
                  ": float64 features are not supported on CUDA; use float32 or the reference");
}

template <int N>
using int_tag = std::integral_constant<int, N>;

// Calls f(int_tag<PN>) with the number of prototypes of one read; all of them up to 8.
template <class F>
void dispatch_prototypes(int64_t prototypes, F&& f) {
  if (prototypes <= 2) return f(int_tag<2>{});
  if (prototypes <= 4) return f(int_tag<4>{});
  return f(int_tag<8>{});
}

// Whether every row of the features starts on a 16-byte boundary and is whole 16-byte groups.
bool whole_rows(const Rows& rows) {
  const int64_t size = int64_t(rows.tensor.element_size());
  const int64_t columns = rows.channels_last ? rows.tensor.size(1) : rows.tensor.size(2) * rows.tensor.size(3);
  return aligned_rows(rows) && columns * size % 16 == 0;
}

Sizes make_sizes(const Rows& rows, const Tensor& prototypes, double scale, double eps, const std::string& eps_mode) {
  const Tensor& x = rows.tensor;
  return {x.size(0),
          prototypes.size(0),
          prototypes.size(1),
          x.size(1),
          x.size(2) * x.size(3),
          rows.stride_b,
          rows.stride_row,
          1,
          1,
          1,
          1,
          float(scale),
          float(eps),
          eps_mode == "add"};
}

int64_t blocks(const Sizes& s) { return s.batch * s.groups * s.pieces * s.tiles; }

std::tuple<Tensor, Tensor, Tensor> prototype_cosine_fwd(Tensor features, Tensor prototypes, double scale, double eps,
                                                        Text eps_mode) {
  check_inputs(features, prototypes, eps_mode);
  check_device(kOp, "features", features, "prototypes", prototypes);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const cudaStream_t stream = current_stream(features);
  const int64_t batch = features.size(0), count = prototypes.size(1), height = features.size(2),
                width = features.size(3);
  Tensor scores = empty(features, {batch, count, height, width}, features.scalar_type());
  Tensor cosines = empty(features, {batch, count, height, width}, ScalarType::Float);
  Tensor norms = empty(features, {batch, height, width}, ScalarType::Float);
  if (batch * count == 0) {
    torch::stable::zero_(norms);
    return {scores, cosines, norms};
  }

  const Rows rows = as_rows(features);
  const Tensor weights = torch::stable::contiguous(prototypes);
  Sizes sizes = make_sizes(rows, weights, scale, eps, eps_mode);
  dispatch_features(features.scalar_type(), kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    dispatch_prototypes(count, [&](auto pn) {
      dispatch_bool(whole_rows(rows) && aligned(weights), [&](auto whole) {
        constexpr int PN = decltype(pn)::value, V = decltype(whole)::value ? kGroup<T> : 1;
        sizes.groups = ceil_div(count, PN);
        const int64_t pixels_of_block = rows.channels_last ? kWarps * (PN == 8 ? 2 : 4) : kLanes * V;
        sizes.tiles = ceil_div(sizes.pixels, pixels_of_block);
        const auto kernel = rows.channels_last ? scores_channels_last_kernel<T, PN, V> : scores_planes_kernel<T, PN, V>;
        launch(kernel, blocks(sizes), kThreads, stream, sizes, const_data<T>(rows.tensor), const_data<T>(weights),
               data<T>(scores), data<float>(cosines), data<float>(norms));
      });
    });
  });
  return {scores, cosines, norms};
}

// dL/dw, from k.
void grad_to_prototypes(Sizes sizes, const Rows& rows, const Tensor& weights, const Tensor& k, const Tensor& out,
                        cudaStream_t stream) {
  dispatch_features(out.scalar_type(), kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    dispatch_prototypes(sizes.prototypes, [&](auto pn) {
      dispatch_bool(whole_rows(rows), [&](auto whole) {
        constexpr int PN = decltype(pn)::value, V = decltype(whole)::value ? kGroup<T> : 1;
        sizes.groups = ceil_div(sizes.prototypes, PN);
        sizes.tiles = ceil_div(sizes.channels, rows.channels_last ? kWarp * V : kWarps * (PN == 8 ? kRows / 2 : kRows));
        // pieces of whole accesses, such that a sample has about kBlocksPerSample blocks
        const int64_t wanted = ceil_div(sizes.pixels, ceil_div(kBlocksPerSample, sizes.tiles));
        sizes.length = ceil_div(std::max<int64_t>(wanted, 256), kWarp * V) * kWarp * V;
        sizes.pieces = ceil_div(sizes.pixels, sizes.length);
        const Tensor partial =
            empty(k, {sizes.batch, sizes.pieces, sizes.prototypes, sizes.channels}, ScalarType::Float);
        const auto kernel = rows.channels_last ? sums_channels_last_kernel<T, PN, V> : sums_planes_kernel<T, PN, V>;
        launch(kernel, blocks(sizes), kThreads, stream, sizes, const_data<T>(rows.tensor), const_data<float>(k),
               data<float>(partial));
        launch(grad_prototypes_kernel<T>, sizes.sets * sizes.prototypes, kThreads, stream, sizes,
               const_data<T>(weights), data<float>(partial), data<T>(out));
      });
    });
  });
}

// Gradients to features and prototypes; one that is not asked for comes back with 0 elements.
std::tuple<Tensor, Tensor> prototype_cosine_bwd(Tensor grad, Tensor features, Tensor prototypes, Tensor cosines,
                                                Tensor norms, double scale, double eps, Text eps_mode,
                                                bool need_features, bool need_prototypes) {
  check_inputs(features, prototypes, eps_mode);
  check_device(kOp, "features", features, "grad", grad);
  check_device(kOp, "features", features, "prototypes", prototypes);
  check_device(kOp, "features", features, "cosines", cosines);
  check_device(kOp, "features", features, "norms", norms);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const cudaStream_t stream = current_stream(features);
  const ScalarType dtype = features.scalar_type();
  const int64_t batch = features.size(0), count = prototypes.size(1);
  Tensor grad_features = need_features ? empty_rows_like(features) : empty(features, {0}, dtype);
  Tensor grad_prototypes = empty(features, {0}, dtype);
  if (need_prototypes) grad_prototypes = empty(features, {prototypes.size(0), count, features.size(1)}, dtype);
  if (batch * count == 0) {
    if (need_features) torch::stable::zero_(grad_features);
    if (need_prototypes) torch::stable::zero_(grad_prototypes);
    return {grad_features, grad_prototypes};
  }
  if (!need_features && !need_prototypes) return {grad_features, grad_prototypes};

  const Rows rows = as_rows(features);
  const Tensor weights = torch::stable::contiguous(prototypes), dense_grad = torch::stable::contiguous(grad);
  const Tensor dense_cosines = torch::stable::contiguous(cosines), dense_norms = torch::stable::contiguous(norms);
  Sizes sizes = make_sizes(rows, weights, scale, eps, eps_mode);
  const Tensor k = empty(features, {batch, count, sizes.pixels}, ScalarType::Float);
  const Tensor slopes = empty(features, {batch, sizes.pixels}, ScalarType::Float);
  const Tensor units = empty(features, {need_features ? sizes.sets : 0, count, sizes.channels}, ScalarType::Float);
  dispatch_features(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    sizes.tiles = ceil_div(sizes.pixels, kThreads);
    const int64_t of_prototypes = need_features ? sizes.sets * count : 0;
    launch(factors_kernel<T>, batch * sizes.tiles + of_prototypes, kThreads, stream, sizes, const_data<T>(dense_grad),
           const_data<float>(dense_cosines), const_data<float>(dense_norms), const_data<T>(weights), data<float>(k),
           data<float>(slopes), data<float>(units));
    if (!need_features) return;
    const int64_t lines = rows.channels_last ? sizes.pixels : sizes.channels;
    const int64_t columns = rows.channels_last ? sizes.channels : sizes.pixels;
    dispatch_bool(whole_rows(rows) && aligned(grad_features), [&](auto whole) {
      constexpr int V = decltype(whole)::value ? kGroup<T> : 1;
      Sizes of_rows = sizes;
      of_rows.tiles = ceil_div(lines, kWarps * kRows), of_rows.pieces = ceil_div(columns, kWarp * V);
      const auto kernel = rows.channels_last ? grad_features_kernel<T, V, true> : grad_features_kernel<T, V, false>;
      launch(kernel, blocks(of_rows), kThreads, stream, of_rows, const_data<T>(rows.tensor), const_data<float>(k),
             const_data<float>(slopes), const_data<float>(dense_norms), const_data<float>(units),
             data<T>(grad_features));
    });
  });
  if (need_prototypes) grad_to_prototypes(sizes, rows, weights, k, grad_prototypes, stream);
  return {grad_features, grad_prototypes};
}

}  // namespace
}  // namespace fss

STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CUDA, m) {
  m.impl("prototype_cosine_fwd", TORCH_BOX(&fss::prototype_cosine_fwd));
  m.impl("prototype_cosine_bwd", TORCH_BOX(&fss::prototype_cosine_bwd));
}
