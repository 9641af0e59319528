// The bfloat16 screen of dense_cosine.h, without windows: included by it for AVX-512, inside its namespace.
//
// A first pass multiplies normalised vectors rounded to bfloat16, twice as fast as float32, and bounds every cosine:
//   |c - c~| <= e_q + 1.005 e_s + slack        e = |x^ - bf16(x^)|, kept per pixel when it is packed
// What cannot be a maximum is never multiplied in float32; the rest is, in the order of summation of the plain kernel,
// so results have its bits. Rows are taken kScreenRows at a time, by panels of them:
//   the first pass keeps, per panel and query pixel, the upper bound of the panel's largest cosine
//   each query pixel's most promising panel is multiplied exactly, which gives it a score to beat
//   the panels whose bound reaches that score follow; all 48 pixels of a strip at once where many ask for a panel
// Match: the first pass also keeps the bound of every support pixel's largest cosine in a strip; strips follow
// likewise. A block in which most bounds reach the score is not screened again.
//
// A vector whose norm is extreme has the bound infinity. Zero vectors, and vectors that are not finite (their results
// are overwritten), win by the index alone and are left out.

constexpr int kPanel = kTileRows<float>, kColumns = kTileColumns<float>, kLanes = lanes<float>;

template <int N>
struct run_of {  // N lanes
  typedef float floats __attribute__((vector_size(N * 4)));
  typedef uint32_t words __attribute__((vector_size(N * 4)));
};
using panel_vec = run_of<kPanel>::floats;

// What the roundings of both products can add to their distance: a chain of the plain kernel, and a chain of pairs
// with four roundings each.
inline float slack(int64_t channels) {
  const double plain = double(std::min(channels, kLevel) + channels / kLevel + 16);
  const double pairs = double(2 * std::min(channels, 2 * kPairLevel) + 2 * (channels / kPairLevel) + 16);
  return float(1.02 * 0x1p-24 * (plain + pairs));
}

// N rows of a panel of W, scaled and rounded, with the channels in pairs; `norms` and `scales` of the rows, and how far
// rounding moves each of them.
template <int N, int W>
void coarsen(const float* panel, int64_t depth, const float* norms, const float* scales, uint32_t* pairs,
             float* errors) {
  using F = typename run_of<N>::floats;
  using U = typename run_of<N>::words;
  F scale, squares{};
  U finite;
  for (int i = 0; i < N; ++i) {
    finite[i] = norms[i] - norms[i] == 0 ? ~0u : 0u;
    scale[i] = finite[i] != 0 ? scales[i] : 0.0f;
  }
  const auto rounded = [&](const float* from) {
    F x;
    std::memcpy(&x, from, sizeof(x));
    x = (F)((U)(x * scale) & finite);
    const U bits = (U)x;
    const U result = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    const F moved = x - (F)result;
    squares += moved * moved;
    return result;
  };
  for (int64_t k = 0; k < depth; k += 2) {
    U pair = rounded(panel + k * W) >> 16;
    if (k + 1 < depth) pair |= rounded(panel + (k + 1) * W);
    std::memcpy(pairs + k / 2 * W, &pair, sizeof(pair));
  }
  for (int i = 0; i < N; ++i) {
    const float norm = norms[i];
    bool certain = norm - norm != 0 || (norm >= 0x1p-40f && norm <= 0x1p60f);
    if (norm == 0) {
      certain = true;
      for (int64_t k = 0; k < depth; ++k) certain &= panel[k * W + i] == 0;
    }
    errors[i] = certain ? std::sqrt(squares[i]) * (1.002f + float(depth) * 0x1p-23f) + 0x1p-23f
                        : std::numeric_limits<float>::infinity();
  }
}

struct Job {  // a panel and a query pixel
  int32_t row, position;
};

struct RowJob {  // a support pixel of the chunk and a strip; what they give
  int32_t row, strip;
  float value;
  int32_t index;
};

// ---- first pass -----------------------------------------------------------------------------------------------------

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

// Rows [from, to) of the chunk against the strips [begin, end). bounds[panel][column] of the largest cosine, without
// the column's own error; of every column the largest bound so far and its row. Match: row_bounds[row][strip] with all.
template <bool Match>
void coarse_products(const Args& a, int64_t begin, int64_t end, int64_t from, int64_t to, float* bounds, float* top,
                     int32_t* top_row) {
  const int64_t half = ceil_div(a.channels, 2), columns = (end - begin) * kColumns, strips = a.positions / kColumns;
  const float extra = slack(a.channels);
  for (int64_t r = from; r < to; r += kPanel) {
    const int64_t rows = std::min<int64_t>(to - r, kPanel);
    float error = 0;
    for (int64_t i = 0; i < rows; ++i) error = std::max(error, a.support_errors[r + i]);
    error = 1.005f * error + extra;
    for (int64_t strip = begin; strip < end; ++strip) {
      const uint32_t *left = a.coarse_support + r * half, *right = a.coarse_query + strip * half * kColumns;
      __m512 total[kPanel][3];
      for (int64_t k = 0; k < half; k += kPairLevel) {
        __m512 sums[kPanel][3];
        for (int i = 0; i < kPanel; ++i) {
          for (int v = 0; v < 3; ++v) sums[i][v] = _mm512_setzero_ps();
        }
        for (int64_t n = std::min(half - k, kPairLevel); n > 0; --n, left += kPanel, right += kColumns) {
          __m512bh b[3];
          for (int v = 0; v < 3; ++v) b[v] = (__m512bh)_mm512_loadu_si512(right + v * kLanes);
          for (int i = 0; i < kPanel; ++i) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int(left[i]));
            for (int v = 0; v < 3; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], x, b[v]);
          }
        }
        for (int i = 0; i < kPanel; ++i) {
          for (int v = 0; v < 3; ++v) total[i][v] = k == 0 ? sums[i][v] : _mm512_add_ps(total[i][v], sums[i][v]);
        }
      }
      const int64_t column = (strip - begin) * kColumns;
      for (int v = 0; v < 3; ++v) {
        __m512 most = total[0][v];
        for (int64_t i = 1; i < rows; ++i) most = _mm512_max_ps(most, total[i][v]);
        most = _mm512_add_ps(most, _mm512_set1_ps(error));
        _mm512_storeu_ps(bounds + (r - from) / kPanel * columns + column + v * kLanes, most);
        float* best = top + column + v * kLanes;
        const __mmask16 larger = _mm512_cmp_ps_mask(most, _mm512_loadu_ps(best), _CMP_GT_OQ);
        _mm512_mask_storeu_ps(best, larger, most);
        _mm512_mask_storeu_epi32(top_row + column + v * kLanes, larger, _mm512_set1_epi32(int(r)));
      }
      for (int64_t i = 0; Match && i < rows; ++i) {
        const float* own = a.query_errors + strip * kColumns;
        __m512 most = _mm512_add_ps(total[i][0], _mm512_loadu_ps(own));
        for (int v = 1; v < 3; ++v) {
          most = _mm512_max_ps(most, _mm512_add_ps(total[i][v], _mm512_loadu_ps(own + v * kLanes)));
        }
        a.row_bounds[(r + i) * strips + strip] = _mm512_reduce_max_ps(most) + 1.005f * a.support_errors[r + i] + extra;
      }
    }
  }
}

#pragma GCC pop_options

// ---- exact products of what is left ---------------------------------------------------------------------------------

// Keeps the larger value; of equal ones that with the lower index, in whatever order they come.
inline void keep_first(float value, int32_t at, float& best, int32_t& index) {
  if (value > best || (value == best && at < index)) best = value, index = at;
}

// Every job: the products of its panel with its query pixel, each the chain of the plain kernel.
inline void rescore(const Args& a, const std::vector<Job>& jobs) {
  constexpr int G = 6;
  const float *support = static_cast<const float*>(a.packed_support), *v_scales = static_cast<float*>(a.support_scales);
  for (size_t first = 0; first < jobs.size(); first += G) {
    const float *left[G], *right[G];
    for (size_t g = 0; g < G; ++g) {
      const Job job = jobs[std::min(first + g, jobs.size() - 1)];
      left[g] = support + job.row * a.channels;
      right[g] = static_cast<const float*>(a.packed_query) + job.position / kColumns * kColumns * a.channels +
                 job.position % kColumns;
    }
    panel_vec totals[G] = {};
    for (int64_t k = 0; k < a.channels; k += kLevel) {
      panel_vec sums[G] = {};
      for (int64_t i = k, n = std::min(a.channels, k + kLevel); i < n; ++i) {
        for (int g = 0; g < G; ++g) {
          panel_vec x;
          std::memcpy(&x, left[g] + i * kPanel, sizeof(x));
          sums[g] += x * right[g][i * kColumns];
        }
      }
      for (int g = 0; g < G; ++g) totals[g] += sums[g];
    }
    for (size_t g = 0; g < std::min<size_t>(G, jobs.size() - first); ++g) {
      const Job job = jobs[first + g];
      float& best = static_cast<float*>(a.best)[job.position];
      int32_t& index = static_cast<int32_t*>(a.index)[job.position];
      for (int64_t r = 0; r < std::min<int64_t>(a.count - job.row, kPanel); ++r) {
        keep_first(totals[g][r] * v_scales[job.row + r], a.kept[a.first + job.row + r], best, index);
      }
    }
  }
}

// The same of one panel with all pixels of a strip.
inline void rescore_tile(const Args& a, int64_t row, int64_t strip) {
  const panels::Tile<float> tile =
      tile_of<float>(a, static_cast<const float*>(a.packed_support) + row * a.channels, strip);
  const float* v_scales = static_cast<const float*>(a.support_scales);
  float* best = static_cast<float*>(a.best) + strip * kColumns;
  int32_t* index = static_cast<int32_t*>(a.index) + strip * kColumns;
  for (int v = 0; v < kTileVectors<float>; ++v) {
    vfloat top = load(best + v * kLanes);
    ints<float> at = load_index<float>(index + v * kLanes);
    for (int64_t r = 0; r < std::min<int64_t>(a.count - row, kPanel); ++r) {
      const vfloat value = tile.at[r][v] * v_scales[row + r];
      const ints<float> i = ints<float>{} + a.kept[a.first + row + r];
      const auto first = (value > top) | ((value == top) & (i < at));
      top = first ? value : top;
      at = first ? i : at;
    }
    std::memcpy(best + v * kLanes, &top, sizeof(top));
    std::memcpy(index + v * kLanes, &at, sizeof(at));
  }
}

// ---- columns --------------------------------------------------------------------------------------------------------

struct Screen {  // one task's
  explicit Screen(int64_t columns)
      : bounds(columns * kScreenRows / kPanel), top(columns), needed(columns), top_row(columns) {}
  Buffer<float> bounds, top, needed;
  Buffer<int32_t> top_row;
  std::vector<Job> jobs;
};

// Of every column of the strips, the bound from which on a panel can hold its winner; NaN, which no bound reaches, for
// padding and for vectors that are zero or not finite.
inline void find_needed(const Args& a, int64_t begin, int64_t end, float* needed) {
  const float *u = static_cast<const float*>(a.query_scales), *best = static_cast<const float*>(a.best);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t j = begin * kColumns; j < end * kColumns; ++j) {
    const bool screened = u[j] > 0 || a.query_errors[j] == kInfinity;
    const float score = best[j] > -kInfinity ? best[j] * u[j] : -kInfinity;
    needed[j - begin * kColumns] = screened ? score - a.query_errors[j] : std::numeric_limits<float>::quiet_NaN();
  }
}

// What part of the panels of rows [from, to) could hold the largest cosine of them, whatever it is exactly.
inline double reached(const Args& a, int64_t begin, int64_t end, int64_t from, int64_t to, const Screen& s) {
  const int64_t columns = (end - begin) * kColumns;
  const float error = 1.005f * *std::max_element(a.support_errors + from, a.support_errors + to) + slack(a.channels);
  vec<int32_t> count{};
  for (int64_t j = 0; j < columns; j += kLanes) {
    const vfloat needed = load(s.top.data + j) - 2 * (error + load(a.query_errors + begin * kColumns + j));
    for (int64_t r = from; r < to; r += kPanel) {
      count -= load(s.bounds.data + (r - from) / kPanel * columns + j) >= needed;
    }
  }
  int64_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += count[i];
  return double(total) / double(ceil_div(to - from, kPanel) * columns);
}

// Rows [from, to) of the chunk against the strips [begin, end) of a block; the share of the plain products it took, or
// -1 when it gave up before anything was done.
template <bool Match>
double screen_rows(const Args& a, int64_t begin, int64_t end, int64_t from, int64_t to, Screen& s) {
  const int64_t columns = (end - begin) * kColumns, first = begin * kColumns;
  float* best = static_cast<float*>(a.best) + first;
  int32_t* index = static_cast<int32_t*>(a.index) + first;
  std::fill_n(s.top.data, columns, -std::numeric_limits<float>::infinity());
  std::fill_n(s.top_row.data, columns, int32_t(from));
  const int64_t probe = std::min(to, from + kProbeRows);
  coarse_products<Match>(a, begin, end, from, probe, s.bounds.data, s.top.data, s.top_row.data);
  if (reached(a, begin, end, from, probe, s) > kHopeless) return -1;
  coarse_products<Match>(a, begin, end, probe, to, s.bounds.data + (probe - from) / kPanel * columns, s.top.data,
                         s.top_row.data);
  find_needed(a, begin, end, s.needed.data);
  s.jobs.clear();
  for (int64_t j = 0; j < columns; ++j) {
    if (s.top.data[j] >= s.needed.data[j]) {
      s.jobs.push_back({s.top_row.data[j], int32_t(first + j)});
    } else {
      s.top_row.data[j] = -1;
      if (index[j] < 0) best[j] = 0, index[j] = a.kept[a.first + from];  // a zero vector: the first candidate wins
    }
  }
  rescore(a, s.jobs);
  int64_t work = kJobColumns * int64_t(s.jobs.size());
  find_needed(a, begin, end, s.needed.data);
  s.jobs.clear();
  for (int64_t r = from; r < to; r += kPanel) {
    const float* bounds = s.bounds.data + (r - from) / kPanel * columns;
    for (int64_t strip = 0; strip < end - begin; ++strip) {
      uint64_t asking = 0;
      for (int v = 0; v < 3; ++v) {
        const int64_t j = strip * kColumns + v * kLanes;
        const __mmask16 reached =
            _mm512_cmp_ps_mask((__m512)load(bounds + j), (__m512)load(s.needed.data + j), _CMP_GE_OQ);
        const __mmask16 done =
            _mm512_cmpeq_epi32_mask((__m512i)load_index<float>(s.top_row.data + j), _mm512_set1_epi32(int(r)));
        asking |= uint64_t(reached & ~done) << (v * kLanes);
      }
      if (asking == 0) continue;
      const int count = __builtin_popcountll(asking);
      work += std::min<int64_t>(kJobColumns * count, kColumns);
      if (kJobColumns * count >= kColumns) {
        rescore_tile(a, r, begin + strip);
      } else {
        for (; asking != 0; asking &= asking - 1) {
          s.jobs.push_back({int32_t(r), int32_t(first + strip * kColumns + __builtin_ctzll(asking))});
        }
      }
    }
  }
  rescore(a, s.jobs);
  return double(work) / double(ceil_div(to - from, kPanel) * columns);
}

// Task = a block of query pixels against the chunk, as `maxima`; a block that gives up goes on without the screen, or,
// in a match, leaves the rest to be done.
template <class T, bool Match>
void screened_maxima(const Args& a, int64_t begin, int64_t end) {
  const int64_t together = block_strips<float>(a), strips = a.positions / kColumns;
  Screen screen(together * kColumns);
  for (int64_t block = begin; block < end; ++block) {
    int64_t row = 0;
    while (row < a.count && a.unscreened[block] == 0) {
      const int64_t to = std::min(a.count, row + kScreenRows), last = std::min(strips, (block + 1) * together);
      const double share = screen_rows<Match>(a, block * together, last, row, to, screen);
      a.unscreened[block] = share < 0 || share > kGiveUp;
      if (share >= 0) row = to;
    }
    if (row < a.count && !Match) {
      Args rest = a;
      rest.first += row, rest.count -= row;
      rest.packed_support = static_cast<float*>(a.packed_support) + row * a.channels;
      rest.support_scales = static_cast<float*>(a.support_scales) + row;
      maxima<T, false>(rest, block, block + 1);
    }
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Whether support pixel r of the chunk is compared at all; its score is 0 at the first query pixel otherwise.
inline bool row_is_screened(const Args& a, int64_t r) {
  return static_cast<const float*>(a.support_scales)[r] > 0 ||
         a.support_errors[r] == std::numeric_limits<float>::infinity();
}

// Jobs of one row each, sorted by strip. First its most promising strip; then the others whose bound reaches the
// maximum that it has from there (`done`: the first jobs' strips).
inline std::vector<RowJob> row_jobs(const Args& a, bool first, std::vector<int32_t>& done) {
  const int64_t strips = a.positions / kColumns;
  const float* v = static_cast<const float*>(a.support_scales);
  float* best = static_cast<float*>(a.row_best);
  int32_t* index = static_cast<int32_t*>(a.row_index);
  std::vector<RowJob> jobs;
  done.resize(size_t(a.count));
  for (int64_t r = 0; r < a.count; ++r) {
    const bool screened = v[r] > 0 || a.support_errors[r] == std::numeric_limits<float>::infinity();
    if (first) best[r] = screened ? -std::numeric_limits<float>::infinity() : 0.0f, index[r] = screened ? -1 : 0;
    if (!screened) continue;
    const float* bounds = a.row_bounds + r * strips;
    if (first) {
      done[size_t(r)] = int32_t(std::max_element(bounds, bounds + strips) - bounds);
      jobs.push_back({int32_t(r), done[size_t(r)], 0, 0});
      continue;
    }
    const float needed = best[r] * v[r];
    for (int64_t strip = 0; strip < strips; ++strip) {
      if (bounds[strip] >= needed && strip != done[size_t(r)]) jobs.push_back({int32_t(r), int32_t(strip), 0, 0});
    }
  }
  std::stable_sort(jobs.begin(), jobs.end(), [](const RowJob& x, const RowJob& y) { return x.strip < y.strip; });
  return jobs;
}

// Task = kPanel jobs of one strip or of several.
inline void rescore_rows(const Args& a, std::vector<RowJob>& jobs, int64_t begin, int64_t end) {
  const float *u_scales = static_cast<const float*>(a.query_scales), *bias = static_cast<const float*>(a.query_bias);
  const Buffer<float> panel(a.channels * kPanel);
  const int64_t most = std::min<int64_t>(int64_t(jobs.size()), end * kPanel);
  for (int64_t first = begin * kPanel, last; first < most; first = last) {
    const int64_t strip = jobs[size_t(first)].strip;
    for (last = first; last < std::min(most, first + kPanel) && jobs[size_t(last)].strip == strip;) ++last;
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t r = jobs[size_t(std::min(first + i, last - 1))].row;
      const float* from = static_cast<const float*>(a.packed_support) + r / kPanel * kPanel * a.channels + r % kPanel;
      for (int64_t k = 0; k < a.channels; ++k) panel.data[k * kPanel + i] = from[k * kPanel];
    }
    const panels::Tile<float> tile = tile_of<float>(a, panel.data, strip);
    for (int64_t i = 0; i < last - first; ++i) {
      RowJob& job = jobs[size_t(first + i)];
      job.value = -std::numeric_limits<float>::infinity(), job.index = -1;
      for (int v = 0; v < kTileVectors<float>; ++v) {
        const int64_t j = strip * kColumns + v * kLanes;
        const vfloat values = tile.at[i][v] * load(u_scales + j) + load(bias + j);
        for (int lane = 0; lane < kLanes; ++lane) {
          if (values[lane] > job.value) job.value = values[lane], job.index = int32_t(j + lane);
        }
      }
    }
  }
}

inline void keep_rows(const Args& a, const std::vector<RowJob>& jobs) {
  for (const RowJob& job : jobs) {
    keep_first(job.value, job.index, static_cast<float*>(a.row_best)[job.row],
               static_cast<int32_t*>(a.row_index)[job.row]);
  }
}
