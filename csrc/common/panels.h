// Matrix products on packed panels, the core of the dense ops. Included once per instruction set, after each_isa.h.
//
//   tile[r][j] = sum_k a[k][r] b[k][j]      r < kTileRows, j < kTileColumns
//
// Both operands are packed depth-major (all rows of one k side by side) in the accumulation type, so that a step of k
// reads one short run of each: `a` is broadcast element by element, `b` is kTileVectors registers. A tile stays in
// registers while k runs; what becomes of it (scaled and stored, a running maximum, the next block of k) is the
// caller's. Every element of a tile is one chain of fused multiply-adds in the order of k, also when the caller stops
// in the middle and goes on later: its bits depend neither on where its tile lies nor on how the depth is cut.
//
// Packing converts the dtype, fills missing rows with 0 and may change values on the way (`Source`). Rows are packed in
// strips: as many rows as one register or one tile has, whichever is more.

#ifdef FSS_ISA
namespace fss {
namespace FSS_ISA {
namespace panels {

// Accumulators in registers: 24 of 32 (AVX-512), 12 or 8 of 16. Columns are whole bytes of one bit each; rows divide
// lanes.
template <class A>
constexpr int kTileRows = FSS_ISA_LEVEL == 2                     ? 8
                          : FSS_ISA_LEVEL == 0 && sizeof(A) == 8 ? 2
                                                                 : 4;
template <class A>
constexpr int kTileVectors = FSS_ISA_LEVEL == 2                     ? 3
                             : FSS_ISA_LEVEL == 1 && sizeof(A) == 4 ? 3
                                                                    : std::max(8 / lanes<A>, 2);
template <class A>
constexpr int kTileColumns = kTileVectors<A> * lanes<A>;
static_assert(kTileColumns<float> % 8 == 0 && kTileColumns<double> % 8 == 0);

template <class A>
class Buffer {  // uninitialised, aligned to a cache line
 public:
  explicit Buffer(int64_t size) : storage_(new A[size_t(size) + 64 / sizeof(A)]) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(storage_.get());
    data = reinterpret_cast<A*>((at + 63) / 64 * 64);
  }
  A* data;

 private:
  std::unique_ptr<A[]> storage_;
};

template <class A>
struct Tile {
  vec<A> at[kTileRows<A>][kTileVectors<A>];
};

// tile += a b over `depth` steps of k.
template <class A>
inline void multiply(const A* __restrict a, const A* __restrict b, int64_t depth, Tile<A>& tile) {
  constexpr int R = kTileRows<A>, V = kTileVectors<A>;
  vec<A> sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = tile.at[r][v];
  }
  for (int64_t k = 0; k < depth; ++k, a += R, b += V * lanes<A>) {
    vec<A> right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + v * lanes<A>);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) sums[r][v] += a[r] * right[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) tile.at[r][v] = sums[r][v];
  }
}

template <class A>
inline void add(const Tile<A>& from, Tile<A>& to) {
  for (int r = 0; r < kTileRows<A>; ++r) {
    for (int v = 0; v < kTileVectors<A>; ++v) to.at[r][v] += from.at[r][v];
  }
}

// Rows of one strip of panels that are `W` rows wide.
template <class A, int W>
constexpr int kStrip = W > lanes<A> ? W : lanes<A>;

template <class T>
inline vec<accumulate_t<T>> load_some(const T* p, int64_t count) {
  if (count >= lanes<accumulate_t<T>>) return load(p);
  if (count <= 0) return vec<accumulate_t<T>>{};
  return load_partial(p, count);
}

// strip[panel][k][row] of kStrip rows, `rows` of which exist. A Source has
//   rows_adjacent                       which of the two it can give
//   along_rows(r, k, count)             a register of rows r, r + 1, ... at k; beyond `count` 0
//   along_depth(r, k, count)            a register of k, k + 1, ... of row r; beyond `count` anything
template <class A, int W, class Source>
void pack_strip(const Source& source, int64_t rows, int64_t depth, A* strip) {
  constexpr int S = kStrip<A, W>, L = lanes<A>;
  if (source.rows_adjacent) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int v = 0; v < S / L; ++v) {
        const vec<A> x = source.along_rows(v * L, k, rows - v * L);
        if constexpr (W >= L) {
          std::memcpy(strip + k * W + v * L, &x, sizeof(x));
        } else {
          for (int p = 0; p < L / W; ++p) {
            std::memcpy(strip + (p * depth + k) * W, reinterpret_cast<const char*>(&x) + p * W * sizeof(A),
                        W * sizeof(A));
          }
        }
      }
    }
    return;
  }
  A block[S][L];
  for (int64_t k = 0; k < depth; k += L) {
    const int64_t count = std::min<int64_t>(depth - k, L);
    for (int r = 0; r < S; ++r) {
      const vec<A> x = r < rows ? source.along_depth(r, k, count) : vec<A>{};
      std::memcpy(block[r], &x, sizeof(x));
    }
    for (int p = 0; p < S / W; ++p) {
      A* to = strip + (p * depth + k) * W;
      for (int64_t i = 0; i < count; ++i) {
        for (int r = 0; r < W; ++r) to[i * W + r] = block[p * W + r][i];
      }
    }
  }
}

// Channels [c, c + L) of pixels [n, n + L) as one register a channel, and back. `pixels` and `channels` of them exist.
// With channels and pixels exchanged and `channels_last` negated: as one register a pixel.
template <class T>
inline void load_block(const T* x, int64_t stride_row, bool channels_last, int64_t pixels, int64_t channels,
                       vec<accumulate_t<T>>* block) {
  using A = accumulate_t<T>;
  constexpr int L = lanes<A>;
  if (!channels_last) {
    for (int64_t c = 0; c < L; ++c) block[c] = c < channels ? load_some(x + c * stride_row, pixels) : vec<A>{};
    return;
  }
  A by_pixel[L][L], by_channel[L][L];
  for (int64_t n = 0; n < L; ++n) {
    const vec<A> v = n < pixels ? load_some(x + n * stride_row, channels) : vec<A>{};
    std::memcpy(by_pixel[n], &v, sizeof(v));
  }
  for (int c = 0; c < L; ++c) {
    for (int n = 0; n < L; ++n) by_channel[c][n] = by_pixel[n][c];
    block[c] = load(by_channel[c]);
  }
}

template <class T>
inline void store_block(T* x, int64_t stride_row, bool channels_last, int64_t pixels, int64_t channels,
                        const vec<accumulate_t<T>>* block) {
  using A = accumulate_t<T>;
  constexpr int L = lanes<A>;
  const auto put = [](T* to, vec<A> v, int64_t count) { count >= L ? store(to, v) : store_partial(to, v, count); };
  if (!channels_last) {
    for (int64_t c = 0; c < std::min<int64_t>(channels, L); ++c) put(x + c * stride_row, block[c], pixels);
    return;
  }
  A by_pixel[L][L], by_channel[L][L];
  for (int c = 0; c < L; ++c) std::memcpy(by_channel[c], &block[c], sizeof(block[c]));
  for (int64_t n = 0; n < std::min<int64_t>(pixels, L); ++n) {
    for (int c = 0; c < L; ++c) by_pixel[n][c] = by_channel[c][n];
    put(x + n * stride_row, load(by_pixel[n]), channels);
  }
}

// squares[row] = sum_k strip[.][k][row]^2 for the kStrip rows of a packed strip, in levels of 256 terms.
template <class A, int W>
void sum_squares(const A* strip, int64_t depth, A* squares) {
  constexpr int S = kStrip<A, W>;
  for (int p = 0; p < S / W; ++p) {
    const A* panel = strip + p * depth * W;
    A total[W] = {};
    for (int64_t begin = 0; begin < depth; begin += 256) {
      A sums[W] = {};
      for (int64_t k = begin, end = std::min<int64_t>(depth, begin + 256); k < end; ++k) {
        for (int r = 0; r < W; ++r) sums[r] += panel[k * W + r] * panel[k * W + r];
      }
      for (int r = 0; r < W; ++r) total[r] += sums[r];
    }
    for (int r = 0; r < W; ++r) squares[p * W + r] = total[r];
  }
}

// One bit a lane: whether it is above 0 or NaN.
template <class A>
inline uint32_t bits_above_zero(vec<A> v) {
#if FSS_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) {
    return uint32_t(_mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NLE_UQ));
  } else {
    return uint32_t(_mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), _CMP_NLE_UQ));
  }
#elif FSS_ISA_LEVEL == 1
  if constexpr (sizeof(A) == 4) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_NLE_UQ)));
  } else {
    return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, _mm256_setzero_pd(), _CMP_NLE_UQ)));
  }
#else
  uint32_t bits = 0;
  for (int i = 0; i < lanes<A>; ++i) bits |= uint32_t(!(v[i] <= 0)) << i;
  return bits;
#endif
}

template <class A>
using ints = vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>;

// v where v is above 0 or NaN, 0 elsewhere.
template <class A>
inline vec<A> above_zero(vec<A> v) {
  return (vec<A>)((ints<A>)v & ~(ints<A>)(v <= vec<A>{}));
}

// v in the lanes whose bit is set, 0 elsewhere.
template <class A>
inline vec<A> keep_bits(vec<A> v, uint32_t bits) {
#if FSS_ISA_LEVEL == 2
  if constexpr (sizeof(A) == 4) {
    return (vec<A>)_mm512_maskz_mov_ps(__mmask16(bits), (__m512)v);
  } else {
    return (vec<A>)_mm512_maskz_mov_pd(__mmask8(bits), (__m512d)v);
  }
#else
  ints<A> lane;
  for (int i = 0; i < lanes<A>; ++i) lane[i] = 1 << i;
  const ints<A> chosen = (lane & (ints<A>{} + int32_t(bits))) != 0;
  return (vec<A>)((ints<A>)v & chosen);
#endif
}

// `count` <= 16 bits of a row of bits from position `at` on, which is a multiple of 8 or of `count`'s register.
inline uint32_t read_bits(const uint8_t* row, int64_t at, int64_t count) {
  uint32_t bits = row[at / 8];
  if (at % 8 + count > 8) bits |= uint32_t(row[at / 8 + 1]) << 8;
  return bits >> (at % 8);
}

}  // namespace panels
}  // namespace FSS_ISA
}  // namespace fss
#endif
