// Dense cosine on raw pointers. Torch-free; compiled once per instruction set by common/each_isa.h.
//
//   c[i,j] = u_j v_i sum_k q[k,j] s[k,i]        u, v = 1 / N(|.|), 0 for a zero vector and a dropped support pixel
//   score[j] = max_i (1 / (dh dw)) sum_o c[i+o, j+o]      and the lowest i that has it
//
// One sample and shot at a time. The query is packed once as the right operand of panels.h, in padded rows of pixels
// (zero columns between them, so that a shift by a window's offset never meets the next row); the kept support pixels
// are gathered into left panels, a chunk at a time. What becomes of a tile:
//   without windows  the running maximum of its query pixels and its index; v scales before, u after the maximum
//   match            the same, and the maximum of every support pixel over the columns of the task
//                    (AVX512-BF16: only where bfloat16 products leave it open, screen.h; the same results)
//   windows          c itself, into a ring of as many support rows as a window reaches; then, row by row, the sums of
//                    shifted runs of query pixels for every candidate of the row, and their running maximum
// Norms are summed from the packed panels. NaN never takes part: comparisons ignore it, and the final step writes it
// where the norms say so.
//
// Gradients: from the saved index the pairs (i, j, weight) are listed once by query and once by support pixel; then
//   grad x = u D - (x . D) u slope x,   D = sum over the pairs of x of weight * unit vector of the other    (cosine.h)
// in two passes over blocks of L channels, stored pixel by pixel in cache: the first for x . D, which needs all
// channels, the second for the result. D is computed twice and stored nowhere.
//
// Parallel decomposition: strips of pixels (packing), blocks of query pixels (products, sums), blocks of channels of
// one operand (gradients); each element has one order of summation wherever its tile lies, each maximum is taken in the
// order of the index, so results do not depend on tasks. Memory traffic: operands read once and packed; the packed
// query is read once a chunk of the support; the ring stays in cache. Accumulation: float (double for double), in
// chains of 1024 channels. Limits: 64-bit offsets; a grid has fewer than 2^31 pixels.

#ifndef FSS_DENSE_COSINE_H
#define FSS_DENSE_COSINE_H

namespace fss {
namespace dense_cosine {

struct Operand {  // (samples, C, H, W), planes or channels_last
  const void* features;
  bool channels_last;
  int64_t stride_b, stride_row;
  int64_t height, width;
  void* norms;     // (samples, H*W), accumulation type
  void* gradient;  // dense, same layout as features, or nullptr
  int64_t pixels() const { return height * width; }
};

struct Window {
  int64_t height, width;
  int64_t up() const { return height / 2; }
  int64_t left() const { return width / 2; }
  int64_t elements() const { return height * width; }
};

// What a call keeps the same.
struct Problem {
  int64_t channels;
  Operand query, support;
  double eps;
  bool add;      // eps_mode "add"
  bool exclude;  // candidates are the kept pixels
  const Window* windows;
  int64_t maps;             // number of windows
  int64_t up, left;         // the most that a window reaches; 0 and 0: pixels are compared as they are
  int64_t positions;        // of a packed query: padded pixels, then up to a whole strip
  const int32_t* pixel_of;  // of a position; -1 for padding
  bool screen;              // products of bfloat16 first, see screen.h
  int64_t ring_rows;
};

// What the steps hand on to each other.
struct Scratch {
  void* packed_query;
  void* query_scales;   // u of a position; 0 for padding
  void* query_bias;     // match: 0, and -infinity for padding
  const uint8_t* keep;  // of every support pixel
  const int32_t* kept;  // support pixels kept, ascending
  void* packed_support;
  void* support_scales;  // v of the chunk
  void* best;            // (maps, positions)
  void* index;           // (maps, positions), integers as wide as the accumulation type
  void* row_best;        // match: (blocks, kept), maxima of a block of columns, and their positions
  void* row_index;
  uint32_t*
      coarse_query;  // screen: normalised vectors in bfloat16, two channels a word, in strips and panels as packed
  uint32_t* coarse_support;
  float* query_errors;    // screen: of a position, |x^ - bfloat16(x^)| at most; -infinity for padding
  float* support_errors;  // screen: of the chunk
  float* row_bounds;      // screen, match: (chunk, strips)
  uint8_t* unscreened;    // screen: of a block, it has given up
  void* ring;             // windows: (ring rows, support width) lines of cosines
};

// Where a step is.
struct Step {
  int64_t b, n;          // sample of query and of support
  int64_t first, count;  // the chunk of kept support pixels that is packed
  int64_t row_blocks;    // match: rows of row_best that count
  int64_t row;           // windows: the support row whose candidates are summed
  bool bad_query;        // some norm of the query's sample is not finite
  void* scores;          // outputs of (b, n)
  int64_t* indices;
  void* support_scores;
  int64_t* support_indices;
};

struct Args : Problem, Scratch, Step {};

constexpr int64_t kChunkBytes = int64_t(2) << 20;    // kept support pixels that are packed together
constexpr int64_t kBlockBytes = int64_t(384) << 10;  // query pixels of one task: they stay in a second-level cache
constexpr int64_t kBlockColumns = 384;               // and their largest number
constexpr int64_t kRowsTogether = 2;                 // support rows whose products are made together, windows
constexpr int64_t kLevel = 1024;                     // channels that are summed in one chain
constexpr int64_t kScreenChannels = 64;              // from which on the screen pays
constexpr int64_t kScreenRows = 1024;                // support pixels that are screened together
constexpr int64_t kProbeRows = 128;                  // the first of them, which show whether it is worth it
constexpr double kHopeless = 0.5;                    // of their panels, what makes a block give up its screen at once
constexpr int64_t kPairLevel = 256;                  // pairs of channels that are summed in one chain
constexpr int64_t kJobColumns = 3;                   // what a panel with one query pixel costs, in columns of a tile
constexpr double kGiveUp = 0.4;                      // of the plain products, what makes it give up afterwards
constexpr int64_t kSumStrips = 8;                    // strips of query pixels of one task of window sums

inline int64_t padded_width(const Args& a) { return a.query.width + a.left; }
// A line of the ring: as many zeros before and after the positions as a window's shift can reach.
inline int64_t guard(const Args& a) { return a.up * padded_width(a) + a.left; }
inline int64_t line(const Args& a) { return a.positions + 2 * guard(a); }

// Whether support pixel i plus an offset lies in the grid and is kept.
inline bool kept_at(const Args& a, int64_t y, int64_t x) {
  return y >= 0 && y < a.support.height && x >= 0 && x < a.support.width && a.keep[y * a.support.width + x] != 0;
}

// f(y, x) for the offsets of a window.
template <class F>
inline void each_offset(const Window& w, const F& f) {
  for (int64_t y = -w.up(); y <= w.up(); ++y) {
    for (int64_t x = -w.left(); x <= w.left(); ++x) f(y, x);
  }
}

// The candidates of one window.
struct Survey {
  bool dead = false;    // some pixel is not one and scores 0
  int32_t lowest = -1;  // the first of all
  int32_t bad = -1;     // the first whose window holds a kept vector that is not finite
};

template <class A>
Survey survey(const Args& a, const Window& window) {
  const A* norms = static_cast<const A*>(a.support.norms) + a.n * a.support.pixels();
  Survey result;
  for (int64_t y = 0, i = 0; y < a.support.height; ++y) {
    for (int64_t x = 0; x < a.support.width; ++x, ++i) {
      bool live = false, bad = false;
      each_offset(window, [&](int64_t dy, int64_t dx) {
        if (!kept_at(a, y + dy, x + dx)) return;
        live = true;
        const A norm = norms[(y + dy) * a.support.width + x + dx];
        bad |= !(norm - norm == 0);
      });
      if (a.exclude) live = a.keep[i] != 0;
      result.dead |= !live && !a.exclude;
      if (live && result.lowest < 0) result.lowest = int32_t(i);
      if (live && bad && result.bad < 0) result.bad = int32_t(i);
    }
  }
  return result;
}

// ---- gradients ------------------------------------------------------------------------------------------------------

// The pairs of one sample and shot, listed by the pixels of one operand (`start` has one more): the other pixel and
// what multiplies its vector.
struct List {
  int32_t* start;
  int32_t* other;
  void* weight;
};

struct GradArgs {
  int64_t channels, shots, b;
  Operand query, support;
  double eps;
  bool add;
  const Window* windows;  // nullptr: match
  int64_t maps;
  const void* grad;  // (N, maps, Nq), or (N, Nq) of a match
  const void* support_grad;
  const int64_t* index;
  const int64_t* support_index;
  const List* lists;  // of every shot: by query pixel, by support pixel
  void* parts;        // (destinations of all operands, channel blocks): x . D of one block of channels
  bool last;          // the pass that writes
};

}  // namespace dense_cosine
}  // namespace fss
#endif

#ifdef FSS_ISA
#include "common/cosine.h"

#undef FSS_SCREEN
#define FSS_SCREEN (FSS_BFLOAT16_PRODUCTS && FSS_ISA_LEVEL == 2)

namespace fss {
namespace FSS_ISA {
namespace dense_cosine {

using namespace ::fss::dense_cosine;
using panels::Buffer;
using panels::kStrip;
using panels::kTileColumns;
using panels::kTileRows;
using panels::kTileVectors;

template <class A>
using integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
using panels::ints;

// Sizes the host needs.
template <class A>
int64_t columns_of_strip() {
  return kTileColumns<A>;
}
template <class A>
int64_t rows_of_strip() {
  return kStrip<A, kTileRows<A>>;
}

template <class A>
inline A inverse_of(A norm, A eps, bool add) {
  return inverse_norm<A>(broadcast(norm), eps, add)[0];
}

// ---- packing --------------------------------------------------------------------------------------------------------

// Listed pixels as rows, channels as depth; a pixel below 0 is zeros.
template <class T>
struct PixelRows {
  using A = accumulate_t<T>;
  const T* x;
  int64_t stride_row;
  bool rows_adjacent;
  const int32_t* pixels;

  vec<A> along_rows(int64_t r, int64_t k, int64_t count) const {
    constexpr int L = lanes<A>;
    const T* row = x + k * stride_row;
    if (count <= 0) return vec<A>{};
    if (count >= L && pixels[r] >= 0 && pixels[r + L - 1] - pixels[r] == L - 1) return load(row + pixels[r]);
    A v[L] = {};
    for (int64_t i = 0; i < std::min<int64_t>(count, L); ++i) {
      if (pixels[r + i] >= 0) v[i] = widen<A>(row[pixels[r + i]]);
    }
    return load(v);
  }
  vec<A> along_depth(int64_t r, int64_t k, int64_t count) const {
    return pixels[r] < 0 ? vec<A>{} : panels::load_some(x + pixels[r] * stride_row + k, count);
  }
};

template <class T>
inline const T* sample_of(const Operand& x, int64_t b) {
  return static_cast<const T*>(x.features) + b * x.stride_b;
}

#if FSS_SCREEN
template <int N, int W>
void coarsen(const float* panel, int64_t depth, const float* norms, const float* scales, uint32_t* pairs,
             float* errors);
#endif

// Packs `rows` listed pixels of one strip, keeps their norms and finds their scales.
template <class T, int W>
inline void pack(const Args& a, const Operand& x, int64_t sample, const int32_t* pixels, int64_t rows,
                 accumulate_t<T>* strip, accumulate_t<T>* scales, uint32_t* coarse, float* errors) {
  using A = accumulate_t<T>;
  constexpr int S = kStrip<A, W>;
  const PixelRows<T> source{sample_of<T>(x, sample), x.stride_row, !x.channels_last, pixels};
  A squares[S], own_norms[S];
  panels::pack_strip<A, W>(source, rows, a.channels, strip);
  panels::sum_squares<A, W>(strip, a.channels, squares);
  A* norms = static_cast<A*>(x.norms) + sample * x.pixels();
  for (int64_t r = 0; r < S; ++r) {
    const bool real = r < rows && pixels[r] >= 0;
    const A norm = real ? std::sqrt(squares[r]) : A(0);
    if (real) norms[pixels[r]] = norm;
    own_norms[r] = norm;
    scales[r] = inverse_of<A>(norm, A(a.eps), a.add);
  }
#if FSS_SCREEN
  if constexpr (std::is_same_v<A, float>) {
    if (!a.screen) return;
    constexpr int N = W > lanes<A> ? lanes<A> : W;
    for (int r = 0; r < S; r += N) {
      const int64_t panel = r / W * W, row = r % W;
      coarsen<N, W>(strip + panel * a.channels + row, a.channels, own_norms + r, scales + r,
                    coarse + panel * ceil_div(a.channels, 2) + row, errors + r);
    }
  }
#endif
}

// Task = one strip of positions.
template <class T>
void pack_query(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = kTileColumns<A>;
  for (int64_t p = begin; p < end; ++p) {
    pack<T, W>(a, a.query, a.b, a.pixel_of + p * W, W, static_cast<A*>(a.packed_query) + p * W * a.channels,
               static_cast<A*>(a.query_scales) + p * W,
               a.screen ? a.coarse_query + p * W * ceil_div(a.channels, 2) : nullptr,
               a.screen ? a.query_errors + p * W : nullptr);
    for (int64_t j = p * W; a.screen && j < (p + 1) * W; ++j) {
      if (a.pixel_of[j] < 0) a.query_errors[j] = -std::numeric_limits<float>::infinity();
    }
  }
}

// Task = one strip of kept pixels of the chunk.
template <class T>
void pack_support(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int R = kTileRows<A>, S = kStrip<A, R>;
  for (int64_t p = begin; p < end; ++p) {
    pack<T, R>(a, a.support, a.n, a.kept + a.first + p * S, std::min<int64_t>(a.count - p * S, S),
               static_cast<A*>(a.packed_support) + p * S * a.channels, static_cast<A*>(a.support_scales) + p * S,
               a.screen ? a.coarse_support + p * S * ceil_div(a.channels, 2) : nullptr,
               a.screen ? a.support_errors + p * S : nullptr);
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

template <class A>
int64_t block_strips(const Args& a) {  // of one product task
  const int64_t bytes = a.channels * int64_t(a.screen ? sizeof(uint16_t) : sizeof(A));
  const int64_t columns = std::min(kBlockColumns, kBlockBytes / bytes);
  return std::max<int64_t>(1, columns / kTileColumns<A>);
}
template <class A>
int64_t product_tasks(const Args& a) {
  return ceil_div(a.positions / kTileColumns<A>, block_strips<A>(a));
}

// Keeps the larger value and its index; an equal one, or NaN, changes nothing.
template <class A>
inline void keep_larger(vec<A> value, ints<A> at, vec<A>& best, ints<A>& index) {
  const auto larger = value > best;
  best = larger ? value : best;
  index = larger ? at : index;
}

template <class A>
inline ints<A> load_index(const void* p) {
  ints<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// A left panel times a strip of the packed query.
template <class A>
inline panels::Tile<A> tile_of(const Args& a, const A* left, int64_t strip) {
  constexpr int R = kTileRows<A>, W = kTileColumns<A>;
  const A* right = static_cast<const A*>(a.packed_query) + strip * W * a.channels;
  panels::Tile<A> tile{};
  for (int64_t k = 0; k < a.channels; k += kLevel) {
    panels::Tile<A> level{};
    panels::multiply<A>(left + k * R, right + k * W, std::min(a.channels - k, kLevel), level);
    panels::add<A>(level, tile);
  }
  return tile;
}

// f(strip, panel, rows of it that exist, tile) for every tile of the blocks [begin, end): panels outside, so that a
// panel is read once a block. `before` and `after` see every panel of a block.
template <class A, class Before, class F, class After>
inline void products(const Args& a, int64_t begin, int64_t end, const Before& before, const F& f, const After& after) {
  constexpr int R = kTileRows<A>, W = kTileColumns<A>;
  const int64_t strips = a.positions / W, together = block_strips<A>(a);
  const A* left = static_cast<const A*>(a.packed_support);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t r = 0; r < a.count; r += R) {
      before();
      for (int64_t strip = block * together; strip < std::min(strips, (block + 1) * together); ++strip) {
        f(strip, r, std::min<int64_t>(a.count - r, R), tile_of<A>(a, left + r * a.channels, strip));
      }
      after(block, r, std::min<int64_t>(a.count - r, R));
    }
  }
}

// Task = a block of query pixels against the chunk: running maxima of the query pixels; of the support pixels too.
template <class T, bool Match>
void maxima(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int R = kTileRows<A>, W = kTileColumns<A>, V = kTileVectors<A>, L = lanes<A>;
  const A* v_scales = static_cast<const A*>(a.support_scales);
  const A *u_scales = static_cast<const A*>(a.query_scales), *bias = static_cast<const A*>(a.query_bias);
  ints<A> lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  const vec<A> lowest = broadcast(-std::numeric_limits<A>::infinity());
  vec<A> row_best[R];
  ints<A> row_index[R];
  products<A>(
      a, begin, end,
      [&] {
        for (int r = 0; Match && r < R; ++r) row_best[r] = lowest, row_index[r] = ints<A>{} - 1;
      },
      [&](int64_t strip, int64_t first, int64_t rows, const panels::Tile<A>& tile) {
        A* best = static_cast<A*>(a.best) + strip * W;
        integer<A>* index = static_cast<integer<A>*>(a.index) + strip * W;
        for (int v = 0; v < V; ++v) {
          vec<A> top = load(best + v * L);
          ints<A> at = load_index<A>(index + v * L);
          for (int64_t r = 0; r < rows; ++r) {
            keep_larger<A>(tile.at[r][v] * v_scales[first + r], ints<A>{} + integer<A>(a.kept[a.first + first + r]),
                           top, at);
            if constexpr (Match) {
              const int64_t j = strip * W + v * L;
              keep_larger<A>(tile.at[r][v] * load(u_scales + j) + load(bias + j), lane + integer<A>(j), row_best[r],
                             row_index[r]);
            }
          }
          std::memcpy(best + v * L, &top, sizeof(top));
          std::memcpy(index + v * L, &at, sizeof(at));
        }
      },
      [&](int64_t block, int64_t first, int64_t rows) {
        for (int64_t r = 0; Match && r < rows; ++r) {
          A top = row_best[r][0];
          integer<A> at = row_index[r][0];
          for (int i = 1; i < L; ++i) {
            const A value = row_best[r][i];
            const integer<A> j = row_index[r][i];
            if (value > top || (value == top && j < at)) top = value, at = j;
          }
          static_cast<A*>(a.row_best)[block * a.count + first + r] = top;
          static_cast<integer<A>*>(a.row_index)[block * a.count + first + r] = at;
        }
      });
}

#if FSS_SCREEN
#include "dense_cosine/screen.h"
#endif

// Task = a block of query pixels against the chunk: their cosines, into the ring.
template <class T>
void cosines(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int W = kTileColumns<A>, V = kTileVectors<A>, L = lanes<A>;
  const A *u_scales = static_cast<const A*>(a.query_scales), *v_scales = static_cast<const A*>(a.support_scales);
  products<A>(
      a, begin, end, [] {},
      [&](int64_t strip, int64_t first, int64_t rows, const panels::Tile<A>& tile) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t i = a.kept[a.first + first + r], y = i / a.support.width, x = i % a.support.width;
          A* to = static_cast<A*>(a.ring) + (y % a.ring_rows * a.support.width + x) * line(a) + guard(a) + strip * W;
          for (int v = 0; v < V; ++v) {
            store(to + v * L, tile.at[r][v] * v_scales[first + r] * load(u_scales + strip * W + v * L));
          }
        }
      },
      [](int64_t, int64_t, int64_t) {});
}

template <class A>
int64_t sum_tasks(const Args& a) {
  return ceil_div(a.positions / kTileColumns<A>, kSumStrips);
}

// Task = a block of query pixels: the window sums of all candidates of support row `row`, and their running maxima.
template <class A>
void window_sums(const Args& a, int64_t begin, int64_t end) {
  constexpr int V = kTileVectors<A>, L = lanes<A>;
  std::vector<const A*> lines;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t from = task * kSumStrips * kTileColumns<A>;
    const int64_t to = std::min(a.positions, from + kSumStrips * kTileColumns<A>);
    for (int64_t x = 0; x < a.support.width; ++x) {
      const int64_t i = a.row * a.support.width + x;
      if (a.exclude && a.keep[i] == 0) continue;
      for (int64_t map = 0; map < a.maps; ++map) {
        lines.clear();
        each_offset(a.windows[map], [&](int64_t dy, int64_t dx) {
          if (!kept_at(a, a.row + dy, x + dx)) return;
          const int64_t slot = (a.row + dy) % a.ring_rows * a.support.width + x + dx;
          lines.push_back(static_cast<const A*>(a.ring) + slot * line(a) + guard(a) + dy * padded_width(a) + dx);
        });
        if (lines.empty()) continue;
        A* best = static_cast<A*>(a.best) + map * a.positions;
        integer<A>* index = static_cast<integer<A>*>(a.index) + map * a.positions;
        for (int64_t p = from; p < to; p += V * L) {
          vec<A> sums[V];
          for (int v = 0; v < V; ++v) sums[v] = load(lines[0] + p + v * L);
          for (size_t t = 1; t < lines.size(); ++t) {
            for (int v = 0; v < V; ++v) sums[v] += load(lines[t] + p + v * L);
          }
          for (int v = 0; v < V; ++v) {
            vec<A> top = load(best + p + v * L);
            ints<A> at = load_index<A>(index + p + v * L);
            keep_larger<A>(sums[v], ints<A>{} + integer<A>(i), top, at);
            std::memcpy(best + p + v * L, &top, sizeof(top));
            std::memcpy(index + p + v * L, &at, sizeof(at));
          }
        }
      }
    }
  }
}

// ---- results --------------------------------------------------------------------------------------------------------

// Whether the window of query pixel (y, x) holds a vector that is not finite.
template <class A>
inline bool unknown_at(const Args& a, const Window& window, const A* norms, int64_t y, int64_t x) {
  bool unknown = false;
  each_offset(window, [&](int64_t dy, int64_t dx) {
    if (y + dy < 0 || y + dy >= a.query.height || x + dx < 0 || x + dx >= a.query.width) return;
    const A norm = norms[(y + dy) * a.query.width + x + dx];
    unknown |= !(norm - norm == 0);
  });
  return unknown;
}

// Scores and indices of the query pixels of every map, from the running maxima.
template <class T>
void finish_query(const Args& a) {
  using A = accumulate_t<T>;
  const A* norms = static_cast<const A*>(a.query.norms) + a.b * a.query.pixels();
  T* scores = static_cast<T*>(a.scores);
  int64_t* indices = a.indices;
  const bool summed = a.up + a.left > 0;
  for (int64_t map = 0; map < a.maps; ++map) {
    const Window& window = a.windows[map];
    const Survey found = survey<A>(a, window);
    const int64_t maxima_at = summed ? map * a.positions : 0;  // windows that are all one pixel share theirs
    const A* best = static_cast<const A*>(a.best) + maxima_at;
    const integer<A>* index = static_cast<const integer<A>*>(a.index) + maxima_at;
    for (int64_t y = 0; y < a.query.height; ++y) {
      for (int64_t x = 0; x < a.query.width; ++x) {
        const int64_t p = y * padded_width(a) + x;
        int64_t at = index[p];
        A score = at < 0   ? A(0)
                  : summed ? best[p] / A(window.elements())
                           : best[p] * static_cast<const A*>(a.query_scales)[p];
        if (found.dead && !(score > 0)) score = 0, at = -1;
        const bool unknown = found.bad >= 0 || (a.bad_query && found.lowest >= 0 && unknown_at(a, window, norms, y, x));
        if (unknown) {
          score = std::numeric_limits<A>::quiet_NaN();
          at = found.bad >= 0 ? found.bad : found.lowest;
        }
        *scores++ = narrow<T>(score);
        *indices++ = at;
      }
    }
  }
}

// Match: scores and indices of the kept support pixels of the chunk, from the maxima of the blocks.
template <class T>
void finish_support(const Args& a) {
  using A = accumulate_t<T>;
  const A* norms = static_cast<const A*>(a.query.norms) + a.b * a.query.pixels();
  int64_t bad = -1;
  for (int64_t j = a.query.pixels() - 1; a.bad_query && j >= 0; --j) {
    if (!(norms[j] - norms[j] == 0)) bad = j;
  }
  for (int64_t r = 0; r < a.count; ++r) {
    A top = -std::numeric_limits<A>::infinity();
    int64_t at = 0;
    for (int64_t block = 0; block < a.row_blocks; ++block) {
      const A value = static_cast<const A*>(a.row_best)[block * a.count + r];
      if (value > top) top = value, at = static_cast<const integer<A>*>(a.row_index)[block * a.count + r];
    }
    const A scale = static_cast<const A*>(a.support_scales)[r];
    if (bad >= 0) {
      at = bad;
    } else if (!(scale - scale == 0)) {
      at = 0;
    }
    const bool unknown = bad >= 0 || !(scale - scale == 0);
    const int64_t i = a.kept[a.first + r];
    static_cast<T*>(a.support_scores)[i] = narrow<T>(unknown ? std::numeric_limits<A>::quiet_NaN() : top * scale);
    a.support_indices[i] = at;
  }
}

// ---- gradients ------------------------------------------------------------------------------------------------------

// f(query pixel, support pixel, gradient of their cosine) for every winning pair of (b, n) in which both vectors count.
template <class T, class F>
inline void each_pair(const GradArgs& a, int64_t n, const F& f) {
  using A = accumulate_t<T>;
  const int64_t nq = a.query.pixels(), ns = a.support.pixels();
  const A* query_norms = static_cast<const A*>(a.query.norms) + a.b * nq;
  const A* support_norms = static_cast<const A*>(a.support.norms) + n * ns;
  const auto pair = [&](int64_t j, int64_t i, A g) {
    if (query_norms[j] != 0 && support_norms[i] != 0) f(j, i, g);
  };
  if (a.windows == nullptr) {
    const T *g = static_cast<const T*>(a.grad) + n * nq, *support_g = static_cast<const T*>(a.support_grad) + n * ns;
    for (int64_t j = 0; j < nq; ++j) {
      if (a.index[n * nq + j] >= 0) pair(j, a.index[n * nq + j], widen<A>(g[j]));
    }
    for (int64_t i = 0; i < ns; ++i) {
      if (a.support_index[n * ns + i] >= 0) pair(a.support_index[n * ns + i], i, widen<A>(support_g[i]));
    }
    return;
  }
  for (int64_t map = 0; map < a.maps; ++map) {
    const Window& window = a.windows[map];
    const int64_t* index = a.index + (n * a.maps + map) * nq;
    const T* grad = static_cast<const T*>(a.grad) + (n * a.maps + map) * nq;
    for (int64_t j = 0; j < nq; ++j) {
      if (index[j] < 0) continue;
      const int64_t y = j / a.query.width, x = j % a.query.width;
      const int64_t sy = index[j] / a.support.width, sx = index[j] % a.support.width;
      const A g = widen<A>(grad[j]) / A(window.elements());
      each_offset(window, [&](int64_t dy, int64_t dx) {
        const bool inside = y + dy >= 0 && y + dy < a.query.height && x + dx >= 0 && x + dx < a.query.width &&
                            sy + dy >= 0 && sy + dy < a.support.height && sx + dx >= 0 && sx + dx < a.support.width;
        if (inside) pair(j + dy * a.query.width + dx, index[j] + dy * a.support.width + dx, g);
      });
    }
  }
}

// Task = one list: the pairs of a shot sorted by query or by support pixel, in the order in which they are met.
template <class T>
void sort_pairs(const GradArgs& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t task = begin; task < end; ++task) {
    const bool by_query = task % 2 == 0;
    if ((by_query ? a.query : a.support).gradient == nullptr) continue;
    const int64_t n = a.b * a.shots + task / 2, pixels = by_query ? a.query.pixels() : a.support.pixels();
    const Operand& other = by_query ? a.support : a.query;
    const A* norms = static_cast<const A*>(other.norms) + (by_query ? n : a.b) * other.pixels();
    const List& list = a.lists[task];
    A* weight = static_cast<A*>(list.weight);
    std::fill(list.start, list.start + pixels + 1, 0);
    each_pair<T>(a, n, [&](int64_t j, int64_t i, A) { ++list.start[(by_query ? j : i) + 1]; });
    for (int64_t p = 0; p < pixels; ++p) list.start[p + 1] += list.start[p];
    each_pair<T>(a, n, [&](int64_t j, int64_t i, A g) {
      const int32_t at = list.start[by_query ? j : i]++;
      list.other[at] = int32_t(by_query ? i : j);
      weight[at] = g * inverse_of<A>(norms[list.other[at]], A(a.eps), a.add);
    });
    for (int64_t p = pixels; p > 0; --p) list.start[p] = list.start[p - 1];
    list.start[0] = 0;
  }
}

template <class A>
int64_t channel_blocks(const GradArgs& a) {
  return ceil_div(a.channels, lanes<A>);
}

// One operand whose gradient is wanted: a sample, its lists, and where its x . D are kept.
struct Target {
  const Operand* x;
  const Operand* other;
  int64_t sample, other_sample;
  const List* lists;  // two apart
  int64_t count;      // of lists: a query has one a shot
  int64_t parts;      // pixels of the targets before it
};

// Target t of a sample: its query, then its shots.
inline Target target_of(const GradArgs& a, int64_t t) {
  const bool query = a.query.gradient != nullptr;
  if (query && t == 0) return {&a.query, &a.support, a.b, a.b * a.shots, a.lists, a.shots, 0};
  const int64_t shot = t - query;
  return {&a.support,
          &a.query,
          a.b * a.shots + shot,
          a.b,
          a.lists + 2 * shot + 1,
          1,
          (query ? a.query.pixels() : 0) + shot * a.support.pixels()};
}
inline int64_t targets(const GradArgs& a) {
  return (a.query.gradient != nullptr ? 1 : 0) + (a.support.gradient != nullptr ? a.shots : 0);
}

template <class A>
int64_t gradient_tasks(const GradArgs& a) {
  return targets(a) * channel_blocks<A>(a);
}

// Channels [c, c + L) of pixels [n, n + L), a register a pixel, and back.
template <class T>
inline void load_pixels(const Operand& x, int64_t sample, int64_t c, int64_t channels, int64_t n, int64_t pixels,
                        vec<accumulate_t<T>>* block) {
  const T* from = sample_of<T>(x, sample) + (x.channels_last ? n * x.stride_row + c : c * x.stride_row + n);
  panels::load_block<T>(from, x.stride_row, !x.channels_last, channels, pixels, block);
}

// Task = a block of channels of one target. First pass: their part of x . D; last pass: the gradient.
template <class T>
void gradients(const GradArgs& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr int L = lanes<A>;
  const int64_t blocks = channel_blocks<A>(a), most = std::max(a.query.pixels(), a.support.pixels());
  const Buffer<A> units(round_up(most, L) * L), sums(round_up(most, L) * L);
  vec<A> block[L];
  for (int64_t task = begin; task < end; ++task) {
    const Target to = target_of(a, task / blocks);
    const Operand& x = *to.x;
    const int64_t c = task % blocks * L, channels = std::min<int64_t>(a.channels - c, L);
    std::fill(sums.data, sums.data + x.pixels() * L, A(0));
    for (int64_t l = 0; l < to.count; ++l) {
      const Operand& other = *to.other;
      for (int64_t n = 0; n < other.pixels(); n += L) {
        load_pixels<T>(other, to.other_sample + l, c, channels, n, other.pixels() - n, block);
        for (int i = 0; i < L; ++i) store(units.data + (n + i) * L, block[i]);
      }
      const List& list = to.lists[2 * l];
      const A* weight = static_cast<const A*>(list.weight);
      for (int64_t p = 0; p < x.pixels(); ++p) {
        vec<A> sum = load(sums.data + p * L);
        for (int32_t e = list.start[p]; e < list.start[p + 1]; ++e) {
          sum += weight[e] * load(units.data + int64_t(list.other[e]) * L);
        }
        store(sums.data + p * L, sum);
      }
    }
    A* parts = static_cast<A*>(a.parts) + to.parts * blocks;  // of this target, a row a block of channels
    const A* norms = static_cast<const A*>(x.norms) + to.sample * x.pixels();
    const int64_t out_row = x.channels_last ? a.channels : x.pixels();
    T* gradient = static_cast<T*>(x.gradient) + to.sample * a.channels * x.pixels();
    for (int64_t n = 0; n < x.pixels(); n += L) {
      const int64_t pixels = std::min<int64_t>(x.pixels() - n, L);
      load_pixels<T>(x, to.sample, c, channels, n, pixels, block);
      for (int64_t i = 0; i < pixels; ++i) {
        const vec<A> d = load(sums.data + (n + i) * L), norm = broadcast(norms[n + i]);
        const Projection<A> project(norm, A(a.eps), a.add);
        block[i] *= project.magnify;
        if (!a.last) {
          parts[task % blocks * x.pixels() + n + i] = sum<A>(block[i] * d);
          continue;
        }
        const vec<A> along = project.along(broadcast(parts[n + i]));
        block[i] = keep_where_nonzero<A>(project.inverse * d - along * block[i], norm);
      }
      if (a.last) {
        panels::store_block<T>(gradient + (x.channels_last ? n * a.channels + c : c * x.pixels() + n), out_row,
                               !x.channels_last, channels, pixels, block);
      }
    }
  }
}

// Between the passes, task = a target: the parts of x . D added up in order, into the first row.
template <class A>
void add_parts(const GradArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = channel_blocks<A>(a);
  for (int64_t t = begin; t < end; ++t) {
    const Target to = target_of(a, t);
    A* parts = static_cast<A*>(a.parts) + to.parts * blocks;
    for (int64_t block = 1; block < blocks; ++block) {
      for (int64_t p = 0; p < to.x->pixels(); ++p) parts[p] += parts[block * to.x->pixels() + p];
    }
  }
}

}  // namespace dense_cosine
}  // namespace FSS_ISA
}  // namespace fss
#endif
