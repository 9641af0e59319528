// Host side of dense_cosine_max and dense_cosine_match on CPU: checks, allocation, parallel loops, registration.
#include "common/tensor.h"

#define FSS_CORE "dense_cosine/dense_cosine.h"
#include "common/each_isa.h"
#include "common/resize_cpu.h"

namespace fss {
namespace {

using dense_cosine::Args;
using dense_cosine::GradArgs;
using dense_cosine::List;
using dense_cosine::Operand;
using dense_cosine::Window;

constexpr const char* kOp = "dense_cosine";

void check_inputs(const Tensor& query, const Tensor& support, const Tensor& mask, const std::string& eps_mode) {
  STD_TORCH_CHECK(query.dim() == 4 && support.dim() == 4 && mask.dim() == 3 && support.size(0) == mask.size(0) &&
                      query.size(1) == support.size(1) &&
                      (query.size(0) == 0 ? support.size(0) == 0 : support.size(0) % query.size(0) == 0),
                  kOp, ": expected query (B, C, Hq, Wq), support (B*S, C, Hs, Ws) and mask (B*S, h, w)");
  STD_TORCH_CHECK(query.scalar_type() == support.scalar_type(), kOp, ": query and support must have one dtype");
  STD_TORCH_CHECK(query.size(1) > 0 && query.size(2) > 0 && query.size(3) > 0 && support.size(2) > 0 &&
                      support.size(3) > 0 && mask.size(1) > 0 && mask.size(2) > 0,
                  kOp, ": channels and grids must not be empty");
  STD_TORCH_CHECK(
      query.size(2) * query.size(3) < (int64_t(1) << 31) && support.size(2) * support.size(3) < (int64_t(1) << 31), kOp,
      ": a grid must have fewer than 2^31 pixels");
  STD_TORCH_CHECK(eps_mode == "clamp" || eps_mode == "add", kOp, ": eps_mode must be 'clamp' or 'add', got '", eps_mode,
                  "'");
}

std::vector<Window> check_windows(const std::vector<int64_t>& sizes) {
  std::vector<Window> windows;
  STD_TORCH_CHECK(!sizes.empty() && sizes.size() % 2 == 0, kOp,
                  ": windows must be dh, dw of one window after the other");
  for (size_t i = 0; i < sizes.size(); i += 2) {
    STD_TORCH_CHECK(sizes[i] > 0 && sizes[i + 1] > 0 && sizes[i] % 2 == 1 && sizes[i + 1] % 2 == 1, kOp,
                    ": windows must have odd sizes, got ", sizes[i], " x ", sizes[i + 1]);
    windows.push_back({sizes[i], sizes[i + 1]});
  }
  return windows;
}

Operand operand(const Rows& rows, const Tensor& norms) {
  Operand x{};
  x.features = rows.tensor.const_data_ptr();
  x.channels_last = rows.channels_last;
  x.stride_b = rows.stride_b, x.stride_row = rows.stride_row;
  x.height = rows.tensor.size(2), x.width = rows.tensor.size(3);
  x.norms = norms.mutable_data_ptr();
  return x;
}

// Whether bfloat16 products screen the candidates.
bool screens(const Args& a, ScalarType accumulate) {
  return cpu_isa() == Isa::avx512_bf16 && accumulate == ScalarType::Float && a.up + a.left == 0 &&
         a.channels >= dense_cosine::kScreenChannels;
}

// ---- forward: allocate ----------------------------------------------------------------------------------------------

// What a call asks for besides its tensors.
struct Options {
  const std::vector<Window>& windows;
  bool match, exclude;
  double eps;
  bool add;
};

struct Results {
  Tensor scores, indices;                  // (N, maps, Hq, Wq); match: (N, Hq, Wq)
  Tensor support_scores, support_indices;  // match: (N, Hs, Ws)
  Tensor query_norms, support_norms;
};

Results allocate(const Tensor& query, const Tensor& support, const Options& options) {
  const ScalarType dtype = query.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t pairs = support.size(0), height = query.size(2), width = query.size(3);
  const std::vector<int64_t> query_grid{query.size(0), height, width};
  const std::vector<int64_t> support_grid{pairs, support.size(2), support.size(3)};
  std::vector<int64_t> maps{pairs, height, width};
  if (!options.match) maps.insert(maps.begin() + 1, int64_t(options.windows.size()));
  Results r;
  r.scores = empty(query, maps, dtype), r.indices = empty(query, maps, ScalarType::Long);
  if (options.match) {
    r.support_scores = empty(query, support_grid, dtype),
    r.support_indices = empty(query, support_grid, ScalarType::Long);
  }
  r.query_norms = empty(query, query_grid, accumulate), r.support_norms = empty(query, support_grid, accumulate);
  return r;
}

// ---- forward: plan --------------------------------------------------------------------------------------------------

// How a call is cut, and where its steps leave what they hand on.
struct Plan {
  Rows query, support;
  const Tensor& mask;
  bool match, summed;  // summed: over windows
  int64_t batch, shots;
  int64_t columns, strip_rows;  // positions and support pixels of one strip
  int64_t chunk;                // kept support pixels that are packed together
  int64_t blocks;               // of query pixels: tasks of a product
  Args args;                    // without a step
  void* weights;                // the resized mask (N, Ns)
  uint8_t* keep;
  int32_t *kept, *pixel_of;
  Tensor packed, scratch;
};

// Hands out parts of one allocation, each at a cache line; without a base it only counts.
class Parts {
 public:
  explicit Parts(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class A>
  A* take(int64_t count) {
    const uintptr_t at = base_ + uintptr_t(bytes);
    bytes += round_up(count * int64_t(sizeof(A)), 64);
    return reinterpret_cast<A*>(at);
  }
  int64_t bytes = 0;

 private:
  uintptr_t base_;
};

// Everything but the packed query, which alone may be as large as the features.
template <class A>
void lay_out(Plan& p, Parts& parts) {
  using I = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  Args& a = p.args;
  const int64_t positions = a.positions, pixels = a.support.pixels(), half = a.screen ? ceil_div(a.channels, 2) : 0;
  p.weights = parts.take<A>(p.batch * p.shots * pixels);
  a.keep = p.keep = parts.take<uint8_t>(pixels);
  a.kept = p.kept = parts.take<int32_t>(pixels);
  a.pixel_of = p.pixel_of = parts.take<int32_t>(positions);
  a.packed_support = parts.take<A>(p.chunk * a.channels);
  a.query_scales = parts.take<A>(positions);
  a.support_scales = parts.take<A>(p.chunk);
  a.best = parts.take<A>(a.maps * positions);
  a.index = parts.take<I>(a.maps * positions);
  a.unscreened = parts.take<uint8_t>(p.blocks);
  a.ring = parts.take<A>(a.ring_rows * a.support.width * line(a));
  if (p.match) {
    a.query_bias = parts.take<A>(positions);
    a.row_best = parts.take<A>(p.blocks * p.chunk);
    a.row_index = parts.take<I>(p.blocks * p.chunk);
  }
  if (a.screen) {
    a.coarse_query = parts.take<uint32_t>(positions * half);
    a.coarse_support = parts.take<uint32_t>(p.chunk * half);
    a.query_errors = parts.take<float>(positions);
    a.support_errors = parts.take<float>(p.chunk);
    if (p.match) a.row_bounds = parts.take<float>(p.chunk * (positions / p.columns));
  }
}

// Kept support pixels that are packed together.
template <class A>
int64_t chunk_of(const Args& a, int64_t strip_rows, bool summed) {
  const int64_t all = round_up(a.support.pixels(), strip_rows);
  if (summed) return std::min(all, round_up(dense_cosine::kRowsTogether * a.support.width, strip_rows));
  const int64_t bytes = (a.screen ? 2 : 1) * dense_cosine::kChunkBytes;
  return std::min(all, std::max(bytes / (a.channels * int64_t(sizeof(A))) / strip_rows * strip_rows, strip_rows));
}

// The padded pixels of the query, and what the steps expect to be there.
template <class A>
void fill(const Plan& p) {
  const Args& a = p.args;
  std::fill_n(p.pixel_of, a.positions, -1);
  for (int64_t y = 0, j = 0; y < a.query.height; ++y) {
    for (int64_t x = 0; x < a.query.width; ++x, ++j) p.pixel_of[y * padded_width(a) + x] = int32_t(j);
  }
  for (int64_t i = 0; p.match && i < a.positions; ++i) {
    static_cast<A*>(a.query_bias)[i] = p.pixel_of[i] < 0 ? -std::numeric_limits<A>::infinity() : A(0);
  }
  std::fill_n(a.unscreened, p.blocks, uint8_t(0));
  std::fill_n(static_cast<A*>(a.ring), a.ring_rows * a.support.width * line(a), A(0));
  // the norms of dropped support pixels stay 0
  std::fill_n(static_cast<A*>(a.support.norms), p.batch * p.shots * a.support.pixels(), A(0));
}

template <class A>
Plan plan(const Tensor& query, const Tensor& support, const Tensor& mask, const Options& options, const Results& r) {
  Plan p{as_rows(query), as_rows(support), mask, options.match};
  Args& a = p.args;
  a.channels = query.size(1);
  a.query = operand(p.query, r.query_norms), a.support = operand(p.support, r.support_norms);
  a.eps = options.eps, a.add = options.add, a.exclude = options.exclude;
  a.windows = options.windows.data(), a.maps = int64_t(options.windows.size());
  for (const Window& w : options.windows) a.up = std::max(a.up, w.up()), a.left = std::max(a.left, w.left());
  p.summed = a.up + a.left > 0;
  a.screen = screens(a, accumulate_dtype(query.scalar_type()));
  a.ring_rows = p.summed ? 2 * a.up + dense_cosine::kRowsTogether : 0;
  p.batch = query.size(0), p.shots = support.size(0) / p.batch;
  p.columns = FSS_FOR_ISA(dense_cosine::columns_of_strip<A>)();
  p.strip_rows = FSS_FOR_ISA(dense_cosine::rows_of_strip<A>)();
  a.positions = round_up(a.query.height * padded_width(a), p.columns);
  p.chunk = chunk_of<A>(a, p.strip_rows, p.summed);
  p.blocks = FSS_FOR_ISA(dense_cosine::product_tasks<A>)(a);
  Parts measured(nullptr);
  lay_out<A>(p, measured);
  p.scratch = empty(query, {measured.bytes / int64_t(sizeof(float))}, ScalarType::Float);
  p.packed = empty(query, {a.positions * a.channels}, accumulate_dtype(query.scalar_type()));
  Parts parts(p.scratch.mutable_data_ptr());
  lay_out<A>(p, parts);
  a.packed_query = p.packed.mutable_data_ptr();
  fill<A>(p);
  return p;
}

// ---- forward: run ---------------------------------------------------------------------------------------------------

#if FSS_BFLOAT16_PRODUCTS
// The maxima of the chunk by way of the screen, or false where a match has to be done without.
template <class T>
bool screened(const Args& a, int64_t blocks, bool match) {
  namespace core = avx512::dense_cosine;
  const auto maxima = match ? core::screened_maxima<T, true> : core::screened_maxima<T, false>;
  const auto given_up = [&] { return std::find(a.unscreened, a.unscreened + blocks, 1) != a.unscreened + blocks; };
  if (match && given_up()) return false;
  parallel_tasks(blocks, a.positions / blocks * a.count * a.channels / 2,
                 [&](int64_t begin, int64_t end) { maxima(a, begin, end); });
  if (!match) return true;
  if (given_up()) return false;
  std::vector<int32_t> done;
  for (const bool first : {true, false}) {
    std::vector<core::RowJob> jobs = core::row_jobs(a, first, done);
    if (double(jobs.size()) > dense_cosine::kGiveUp * double(a.count * (a.positions / core::kColumns))) {
      a.unscreened[0] = 1;
      return false;
    }
    parallel_tasks(ceil_div(int64_t(jobs.size()), core::kPanel), core::kPanel * core::kColumns * a.channels,
                   [&](int64_t begin, int64_t end) { core::rescore_rows(a, jobs, begin, end); });
    core::keep_rows(a, jobs);
  }
  return true;
}
#endif

// One pair of sample and shot after the other. A step gets its own Args, which nothing changes while it runs.
template <class T>
class Run {
  using A = accumulate_t<T>;
  using I = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

 public:
  Run(const Plan& plan, const Results& results) : p(plan), r(results) {}

  void all() const {
    const int64_t height = p.args.support.height, width = p.args.support.width;
    if (p.shots > 0) resize_mask(p.mask, p.weights, r.support_norms.scalar_type(), height, width, kOp);
    for (int64_t b = 0; b < p.batch; ++b) sample(b);
  }

 private:
  void sample(int64_t b) const {
    Args a = p.args;
    a.b = b;
    const auto pack = FSS_FOR_ISA(dense_cosine::pack_query<T>);
    parallel_tasks(a.positions / p.columns, p.columns * a.channels,
                   [&](int64_t begin, int64_t end) { pack(a, begin, end); });
    const A* norms = static_cast<const A*>(a.query.norms) + b * a.query.pixels();
    a.bad_query = std::any_of(norms, norms + a.query.pixels(), [](A norm) { return !(norm - norm == 0); });
    for (int64_t shot = 0; shot < p.shots; ++shot) pair(a, b * p.shots + shot);
  }

  void pair(Args a, int64_t n) const {
    const int64_t queries = a.maps * a.query.pixels(), supports = a.support.pixels();
    a.n = n;
    a.scores = static_cast<T*>(r.scores.mutable_data_ptr()) + n * queries;
    a.indices = static_cast<int64_t*>(r.indices.mutable_data_ptr()) + n * queries;
    std::fill_n(static_cast<A*>(a.best), a.maps * a.positions, -std::numeric_limits<A>::infinity());
    std::fill_n(static_cast<I*>(a.index), a.maps * a.positions, I(-1));
    if (p.match) {
      a.support_scores = static_cast<T*>(r.support_scores.mutable_data_ptr()) + n * supports;
      a.support_indices = static_cast<int64_t*>(r.support_indices.mutable_data_ptr()) + n * supports;
      std::fill_n(static_cast<T*>(a.support_scores), supports, T{});
      std::fill_n(a.support_indices, supports, int64_t(-1));
    }
    const int64_t total = list_kept(n);
    p.summed ? by_rows(a, total) : by_chunks(a, total);
    FSS_FOR_ISA(dense_cosine::finish_query<T>)(a);
  }

  // Lists the support pixels that the mask keeps; how many there are.
  int64_t list_kept(int64_t n) const {
    const int64_t pixels = p.args.support.pixels();
    const A* weight = static_cast<const A*>(p.weights) + n * pixels;
    int64_t total = 0;
    for (int64_t i = 0; i < pixels; ++i) {
      p.keep[i] = weight[i] > 0;
      p.kept[total] = int32_t(i);
      total += p.keep[i];
    }
    return total;
  }

  void by_chunks(Args a, int64_t total) const {
    for (a.first = 0; a.first < total; a.first += p.chunk) {
      a.count = std::min(total - a.first, p.chunk);
      a.row_blocks = multiply(a);
      if (p.match) FSS_FOR_ISA(dense_cosine::finish_support<T>)(a);
    }
  }

  // A row of candidates is complete when the rows that its windows reach are.
  void by_rows(Args a, int64_t total) const {
    const auto window_sums = FSS_FOR_ISA(dense_cosine::window_sums<A>);
    const int64_t tasks = FSS_FOR_ISA(dense_cosine::sum_tasks<A>)(a);
    for (int64_t y = 0; y < a.support.height + a.up; y += dense_cosine::kRowsTogether, a.first += a.count) {
      const int64_t end = (y + dense_cosine::kRowsTogether) * a.support.width;
      for (a.count = 0; a.first + a.count < total && p.kept[a.first + a.count] < end;) ++a.count;
      if (a.count > 0) multiply(a);
      const int64_t done = std::min(y + dense_cosine::kRowsTogether - a.up, a.support.height);
      for (a.row = std::max<int64_t>(y - a.up, 0); total > 0 && a.row < done; ++a.row) {
        parallel_tasks(tasks, a.positions / tasks * a.support.width * a.maps * 8,
                       [&](int64_t begin, int64_t end) { window_sums(a, begin, end); });
      }
    }
  }

  // Packs and multiplies the chunk; how many rows of row_best hold its maxima.
  int64_t multiply(const Args& a) const {
    const auto pack = FSS_FOR_ISA(dense_cosine::pack_support<T>);
    const auto product = p.summed  ? FSS_FOR_ISA(dense_cosine::cosines<T>)
                         : p.match ? FSS_FOR_ISA(dense_cosine::maxima<T, true>)
                                   : FSS_FOR_ISA(dense_cosine::maxima<T, false>);
    parallel_tasks(ceil_div(a.count, p.strip_rows), p.strip_rows * a.channels,
                   [&](int64_t begin, int64_t end) { pack(a, begin, end); });
#if FSS_BFLOAT16_PRODUCTS
    if constexpr (std::is_same_v<A, float>) {
      if (a.screen && screened<T>(a, p.blocks, p.match)) return 1;
    }
#endif
    parallel_tasks(p.blocks, a.positions / p.blocks * a.count * a.channels,
                   [&](int64_t begin, int64_t end) { product(a, begin, end); });
    return p.blocks;
  }

  const Plan& p;
  const Results& r;
};

Results forward(const Tensor& query, const Tensor& support, const Tensor& mask, const Options& options) {
  const Results results = allocate(query, support, options);
  if (query.size(0) == 0) return results;
  dispatch_floating(query.scalar_type(), kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    Run<T>(plan<accumulate_t<T>>(query, support, mask, options, results), results).all();
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dense_cosine_max_fwd(Tensor query, Tensor support, Tensor mask,
                                                                std::vector<int64_t> windows, Text masked, double eps,
                                                                Text eps_mode) {
  check_inputs(query, support, mask, eps_mode);
  STD_TORCH_CHECK(masked == "zero" || masked == "exclude", kOp, ": masked must be 'zero' or 'exclude', got '", masked,
                  "'");
  const std::vector<Window> list = check_windows(windows);
  const Results r = forward(query, support, mask, {list, false, masked == "exclude", eps, eps_mode == "add"});
  return {r.scores, r.indices, r.query_norms, r.support_norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dense_cosine_match_fwd(Tensor query, Tensor support,
                                                                                  Tensor mask, double eps,
                                                                                  Text eps_mode) {
  check_inputs(query, support, mask, eps_mode);
  const std::vector<Window> pixel{{1, 1}};
  const Results r = forward(query, support, mask, {pixel, true, true, eps, eps_mode == "add"});
  return {r.scores, r.support_scores, r.indices, r.support_indices, r.query_norms, r.support_norms};
}

// A gradient and an index of the same shape, the index below `pixels`.
void check_index(const Tensor& grad, const Tensor& index, ScalarType dtype, const std::vector<int64_t>& shape,
                 int64_t pixels) {
  STD_TORCH_CHECK(has_shape(grad, shape) && grad.scalar_type() == dtype, kOp,
                  ": a gradient must have the shape and dtype of its scores");
  STD_TORCH_CHECK(has_shape(index, shape) && index.scalar_type() == ScalarType::Long, kOp,
                  ": an index must be int64 in the shape of its scores");
  const int64_t* first = static_cast<const int64_t*>(index.const_data_ptr());
  STD_TORCH_CHECK(std::all_of(first, first + index.numel(), [&](int64_t i) { return i >= -1 && i < pixels; }), kOp,
                  ": an index must be -1 ... ", pixels - 1);
}

// What both backward ops share; `pairs` of one sample and shot at most. Gradients that are not wanted have 0 elements.
std::tuple<Tensor, Tensor> backward(GradArgs a, int64_t pairs, const Tensor& query, const Tensor& support,
                                    const Tensor& mask, const Tensor& query_norm, const Tensor& support_norm,
                                    double eps, const std::string& eps_mode, bool need_query, bool need_support) {
  const ScalarType dtype = query.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t batch = query.size(0);
  STD_TORCH_CHECK(has_shape(query_norm, {batch, query.size(2), query.size(3)}) &&
                      has_shape(support_norm, {support.size(0), support.size(2), support.size(3)}) &&
                      query_norm.scalar_type() == accumulate && support_norm.scalar_type() == accumulate,
                  kOp, ": norms must be (B, Hq, Wq) and (B*S, Hs, Ws) in the accumulation dtype");
  STD_TORCH_CHECK(pairs < (int64_t(1) << 31), kOp, ": too many pairs");
  const Tensor grad_query = need_query ? empty_rows_like(query) : empty(query, {0}, dtype);
  const Tensor grad_support = need_support ? empty_rows_like(support) : empty(support, {0}, dtype);
  if (batch == 0 || !(need_query || need_support)) return {grad_query, grad_support};

  const Rows query_rows = as_rows(query), support_rows = as_rows(support);
  const Tensor query_norms = torch::stable::contiguous(query_norm),
               support_norms = torch::stable::contiguous(support_norm);
  a.channels = query.size(1), a.shots = support.size(0) / batch;
  a.query = operand(query_rows, query_norms), a.support = operand(support_rows, support_norms);
  if (need_query) a.query.gradient = grad_query.mutable_data_ptr();
  if (need_support) a.support.gradient = grad_support.mutable_data_ptr();
  a.eps = eps, a.add = eps_mode == "add";
  const int64_t nq = a.query.pixels(), ns = a.support.pixels();
  dispatch_floating(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = accumulate_t<T>;
    const int64_t targets = (need_query ? 1 : 0) + (need_support ? a.shots : 0);
    const int64_t destinations = (need_query ? nq : 0) + (need_support ? a.shots * ns : 0);
    const int64_t starts = nq + ns + 2, blocks = FSS_FOR_ISA(dense_cosine::channel_blocks<A>)(a);
    const Tensor integers = empty(query, {a.shots * (starts + 2 * pairs)}, ScalarType::Int);
    const Tensor weights = empty(query, {a.shots * 2 * pairs}, accumulate);
    const Tensor parts = empty(query, {destinations * blocks}, accumulate);
    std::vector<List> lists;
    int32_t* next = static_cast<int32_t*>(integers.mutable_data_ptr());
    for (int64_t l = 0; l < 2 * a.shots; ++l) {
      int32_t* start = next;
      int32_t* other = start + (l % 2 == 0 ? nq : ns) + 1;
      next = other + pairs;
      lists.push_back({start, other, static_cast<A*>(weights.mutable_data_ptr()) + l * pairs});
    }
    a.lists = lists.data(), a.parts = parts.mutable_data_ptr();
    const auto sort = FSS_FOR_ISA(dense_cosine::sort_pairs<T>);
    const auto gradients = FSS_FOR_ISA(dense_cosine::gradients<T>);
    const auto add = FSS_FOR_ISA(dense_cosine::add_parts<A>);
    for (a.b = 0; a.b < batch; ++a.b) {
      parallel_tasks(2 * a.shots, 8 * pairs, [&](int64_t begin, int64_t end) { sort(a, begin, end); });
      for (const bool last : {false, true}) {
        a.last = last;
        parallel_tasks(targets * blocks, (nq + ns + pairs) * 16,
                       [&](int64_t begin, int64_t end) { gradients(a, begin, end); });
        if (!last) {
          parallel_tasks(targets, destinations / std::max<int64_t>(1, targets) * blocks,
                         [&](int64_t begin, int64_t end) { add(a, begin, end); });
        }
      }
    }
  });
  return {grad_query, grad_support};
}

std::tuple<Tensor, Tensor> dense_cosine_max_bwd(Tensor grad, Tensor query, Tensor support, Tensor mask, Tensor index,
                                                Tensor query_norm, Tensor support_norm, std::vector<int64_t> windows,
                                                Text, double eps, Text eps_mode, bool need_query, bool need_support) {
  check_inputs(query, support, mask, eps_mode);
  const std::vector<Window> list = check_windows(windows);
  const std::vector<int64_t> shape{support.size(0), int64_t(list.size()), query.size(2), query.size(3)};
  const Tensor dense_grad = torch::stable::contiguous(grad), dense_index = torch::stable::contiguous(index);
  check_index(dense_grad, dense_index, query.scalar_type(), shape, support.size(2) * support.size(3));
  GradArgs a{};
  a.windows = list.data(), a.maps = int64_t(list.size());
  a.grad = dense_grad.const_data_ptr();
  a.index = static_cast<const int64_t*>(dense_index.const_data_ptr());
  int64_t pairs = 0;
  for (const Window& w : list) pairs += w.elements() * query.size(2) * query.size(3);
  return backward(a, pairs, query, support, mask, query_norm, support_norm, eps, eps_mode, need_query, need_support);
}

std::tuple<Tensor, Tensor> dense_cosine_match_bwd(Tensor grad_query_scores, Tensor grad_support_scores, Tensor query,
                                                  Tensor support, Tensor mask, Tensor query_index, Tensor support_index,
                                                  Tensor query_norm, Tensor support_norm, double eps, Text eps_mode,
                                                  bool need_query, bool need_support) {
  check_inputs(query, support, mask, eps_mode);
  const int64_t nq = query.size(2) * query.size(3), ns = support.size(2) * support.size(3);
  const Tensor grad = torch::stable::contiguous(grad_query_scores), index = torch::stable::contiguous(query_index);
  const Tensor support_grad = torch::stable::contiguous(grad_support_scores),
               own_index = torch::stable::contiguous(support_index);
  check_index(grad, index, query.scalar_type(), {support.size(0), query.size(2), query.size(3)}, ns);
  check_index(support_grad, own_index, query.scalar_type(), {support.size(0), support.size(2), support.size(3)}, nq);
  GradArgs a{};
  a.grad = grad.const_data_ptr(), a.support_grad = support_grad.const_data_ptr();
  a.index = static_cast<const int64_t*>(index.const_data_ptr());
  a.support_index = static_cast<const int64_t*>(own_index.const_data_ptr());
  return backward(a, nq + ns, query, support, mask, query_norm, support_norm, eps, eps_mode, need_query, need_support);
}

}  // namespace
}  // namespace fss

STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CPU, m) {
  m.impl("dense_cosine_max_fwd", TORCH_BOX(&fss::dense_cosine_max_fwd));
  m.impl("dense_cosine_max_bwd", TORCH_BOX(&fss::dense_cosine_max_bwd));
  m.impl("dense_cosine_match_fwd", TORCH_BOX(&fss::dense_cosine_match_fwd));
  m.impl("dense_cosine_match_bwd", TORCH_BOX(&fss::dense_cosine_match_bwd));
}
