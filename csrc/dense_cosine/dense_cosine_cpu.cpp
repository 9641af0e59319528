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

struct Norms {
  Tensor query, support;
};

// Whether bfloat16 products screen the candidates.
bool screens(const Args& a, ScalarType accumulate) {
  return cpu_isa() == Isa::avx512_bf16 && accumulate == ScalarType::Float && a.up + a.left == 0 &&
         a.channels >= dense_cosine::kScreenChannels;
}

#if FSS_BFLOAT16_PRODUCTS
// The maxima of the chunk by way of the screen, or false where a match has to be done without.
template <class T>
bool screened(Args& a, int64_t blocks, bool match) {
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
    parallel_tasks(dense_cosine::ceil_div(int64_t(jobs.size()), core::kPanel),
                   core::kPanel * core::kColumns * a.channels,
                   [&](int64_t begin, int64_t end) { core::rescore_rows(a, jobs, begin, end); });
    core::keep_rows(a, jobs);
  }
  a.row_blocks = 1;
  return true;
}
#endif

// What both forward ops share: packs, multiplies and reduces one pair of sample and shot after the other. The scores
// and indices of the query are (N, maps, Nq), those of the support (N, Ns) or undefined.
Norms forward(const Tensor& query, const Tensor& support, const Tensor& mask, const std::vector<Window>& windows,
              bool exclude, double eps, const std::string& eps_mode, const Tensor& scores, const Tensor& indices,
              const Tensor* support_scores, const Tensor* support_indices) {
  const ScalarType dtype = query.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t batch = query.size(0), pairs = support.size(0), channels = query.size(1);
  const Norms norms{empty(query, {batch, query.size(2), query.size(3)}, accumulate),
                    empty(query, {pairs, support.size(2), support.size(3)}, accumulate)};
  Tensor query_norms = norms.query, support_norms = norms.support;
  torch::stable::zero_(query_norms), torch::stable::zero_(support_norms);  // the support's stay 0 where it is dropped
  if (batch == 0) return norms;
  const int64_t shots = pairs / batch;

  const Tensor weights = empty(query, {pairs, support.size(2), support.size(3)}, accumulate);
  if (pairs > 0) resize_mask(mask, weights, kOp);
  const Rows query_rows = as_rows(query), support_rows = as_rows(support);
  Args a{};
  a.channels = channels;
  a.query = operand(query_rows, query_norms), a.support = operand(support_rows, support_norms);
  a.eps = eps, a.add = eps_mode == "add", a.exclude = exclude;
  a.windows = windows.data(), a.maps = int64_t(windows.size());
  for (const Window& w : windows) a.up = std::max(a.up, w.up()), a.left = std::max(a.left, w.left());
  const bool summed = a.up + a.left > 0, match = support_scores != nullptr;
  a.screen = screens(a, accumulate);
  const int64_t nq = a.query.pixels(), ns = a.support.pixels();
  const Tensor keep = empty(query, {ns}, ScalarType::Byte), kept = empty(query, {ns}, ScalarType::Int);

  dispatch_floating(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = accumulate_t<T>;
    using I = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
    constexpr ScalarType kIndex = sizeof(A) == 8 ? ScalarType::Long : ScalarType::Int;
    const int64_t columns = FSS_FOR_ISA(dense_cosine::columns_of_strip<A>)();
    const int64_t strip_rows = FSS_FOR_ISA(dense_cosine::rows_of_strip<A>)();
    const auto pack_query = FSS_FOR_ISA(dense_cosine::pack_query<T>);
    const auto pack_support = FSS_FOR_ISA(dense_cosine::pack_support<T>);
    const auto multiply = summed  ? FSS_FOR_ISA(dense_cosine::cosines<T>)
                          : match ? FSS_FOR_ISA(dense_cosine::maxima<T, true>)
                                  : FSS_FOR_ISA(dense_cosine::maxima<T, false>);
    const auto window_sums = FSS_FOR_ISA(dense_cosine::window_sums<A>);

    a.positions = dense_cosine::round_up(a.query.height * dense_cosine::padded_width(a), columns);
    const Tensor pixel_of = empty(query, {a.positions}, ScalarType::Int);
    int32_t* pixels = static_cast<int32_t*>(pixel_of.mutable_data_ptr());
    std::fill(pixels, pixels + a.positions, -1);
    for (int64_t j = 0; j < nq; ++j) {
      pixels[j / a.query.width * dense_cosine::padded_width(a) + j % a.query.width] = int32_t(j);
    }
    const int64_t fitting =
        (a.screen ? 2 : 1) * dense_cosine::kChunkBytes / (channels * int64_t(sizeof(A))) / strip_rows * strip_rows;
    const int64_t chunk =
        std::min(dense_cosine::round_up(ns, strip_rows),
                 summed ? dense_cosine::round_up(dense_cosine::kRowsTogether * a.support.width, strip_rows)
                        : std::max(fitting, strip_rows));
    const int64_t blocks = FSS_FOR_ISA(dense_cosine::product_tasks<A>)(a);
    a.ring_rows = summed ? 2 * a.up + dense_cosine::kRowsTogether : 0;
    const Tensor packed_query = empty(query, {a.positions * channels}, accumulate);
    const Tensor packed_support = empty(query, {chunk * channels}, accumulate);
    const Tensor scales = empty(query, {a.positions + chunk}, accumulate);
    const Tensor best = empty(query, {a.maps * a.positions}, accumulate);
    const Tensor index = empty(query, {a.maps * a.positions}, kIndex);
    const Tensor bias = empty(query, {match ? a.positions : 0}, accumulate);
    const Tensor row_best = empty(query, {match ? blocks * chunk : 0}, accumulate);
    const Tensor row_index = empty(query, {match ? blocks * chunk : 0}, kIndex);
    const int64_t half = a.screen ? dense_cosine::ceil_div(channels, 2) : 0;
    const Tensor coarse = empty(query, {(a.positions + chunk) * half}, ScalarType::Int);
    const Tensor errors = empty(query, {a.screen ? a.positions + chunk : 0}, ScalarType::Float);
    const Tensor row_bounds =
        empty(query, {a.screen && match ? chunk * (a.positions / columns) : 0}, ScalarType::Float);
    Tensor unscreened = empty(query, {blocks}, ScalarType::Byte);
    torch::stable::zero_(unscreened);
    Tensor ring = empty(query, {a.ring_rows * a.support.width * dense_cosine::line(a)}, accumulate);
    torch::stable::zero_(ring);
    a.pixel_of = pixels;
    a.packed_query = packed_query.mutable_data_ptr(), a.packed_support = packed_support.mutable_data_ptr();
    a.query_scales = scales.mutable_data_ptr();
    a.support_scales = static_cast<A*>(scales.mutable_data_ptr()) + a.positions;
    a.best = best.mutable_data_ptr(), a.index = index.mutable_data_ptr();
    a.query_bias = bias.mutable_data_ptr();
    a.row_best = row_best.mutable_data_ptr(), a.row_index = row_index.mutable_data_ptr();
    a.coarse_query = static_cast<uint32_t*>(coarse.mutable_data_ptr());
    a.coarse_support = a.coarse_query + a.positions * half;
    a.query_errors = static_cast<float*>(errors.mutable_data_ptr());
    a.support_errors = a.query_errors + a.positions;
    a.row_bounds = static_cast<float*>(row_bounds.mutable_data_ptr());
    a.unscreened = static_cast<uint8_t*>(unscreened.mutable_data_ptr());
    a.ring = ring.mutable_data_ptr();
    for (int64_t p = 0; match && p < a.positions; ++p) {
      static_cast<A*>(a.query_bias)[p] = pixels[p] < 0 ? -std::numeric_limits<A>::infinity() : A(0);
    }
    uint8_t* flags = static_cast<uint8_t*>(keep.mutable_data_ptr());
    int32_t* list = static_cast<int32_t*>(kept.mutable_data_ptr());
    a.keep = flags, a.kept = list;

    const auto product = [&](int64_t first, int64_t last) {
      a.first = first, a.count = last - first;
      if (a.count == 0) return;
      parallel_tasks(dense_cosine::ceil_div(a.count, strip_rows), strip_rows * channels,
                     [&](int64_t begin, int64_t end) { pack_support(a, begin, end); });
      a.row_blocks = blocks;
#if FSS_BFLOAT16_PRODUCTS
      if constexpr (std::is_same_v<A, float>) {
        if (a.screen && screened<T>(a, blocks, match)) return;
      }
#endif
      parallel_tasks(blocks, a.positions / blocks * a.count * channels,
                     [&](int64_t begin, int64_t end) { multiply(a, begin, end); });
    };
    for (a.b = 0; a.b < batch; ++a.b) {
      parallel_tasks(a.positions / columns, columns * channels,
                     [&](int64_t begin, int64_t end) { pack_query(a, begin, end); });
      const A* own = static_cast<const A*>(a.query.norms) + a.b * nq;
      a.bad_query = std::any_of(own, own + nq, [](A norm) { return !(norm - norm == 0); });
      for (int64_t shot = 0; shot < shots; ++shot) {
        a.n = a.b * shots + shot;
        const A* weight = static_cast<const A*>(weights.const_data_ptr()) + a.n * ns;
        int64_t total = 0;
        for (int64_t i = 0; i < ns; ++i) {
          flags[i] = weight[i] > 0;
          list[total] = int32_t(i);
          total += flags[i];
        }
        std::fill_n(static_cast<A*>(a.best), a.maps * a.positions, -std::numeric_limits<A>::infinity());
        std::fill_n(static_cast<I*>(a.index), a.maps * a.positions, I(-1));
        a.scores = static_cast<T*>(scores.mutable_data_ptr()) + a.n * a.maps * nq;
        a.indices = static_cast<int64_t*>(indices.mutable_data_ptr()) + a.n * a.maps * nq;
        if (match) {
          a.support_scores = static_cast<T*>(support_scores->mutable_data_ptr()) + a.n * ns;
          a.support_indices = static_cast<int64_t*>(support_indices->mutable_data_ptr()) + a.n * ns;
          std::fill_n(static_cast<T*>(a.support_scores), ns, T{});
          std::fill_n(a.support_indices, ns, int64_t(-1));
        }
        if (!summed) {
          for (int64_t first = 0; first < total; first += chunk) {
            product(first, std::min(total, first + chunk));
            if (match) FSS_FOR_ISA(dense_cosine::finish_support<T>)(a);
          }
        } else {  // a row of candidates is complete when the rows that its windows reach are
          int64_t first = 0, last = 0;
          for (int64_t y = 0; y < a.support.height + a.up; y += dense_cosine::kRowsTogether, first = last) {
            while (last < total && list[last] < (y + dense_cosine::kRowsTogether) * a.support.width) ++last;
            product(first, last);
            const int64_t done = std::min(y + dense_cosine::kRowsTogether - a.up, a.support.height);
            for (a.row = std::max<int64_t>(y - a.up, 0); total > 0 && a.row < done; ++a.row) {
              const int64_t tasks = FSS_FOR_ISA(dense_cosine::sum_tasks<A>)(a);
              parallel_tasks(tasks, a.positions / tasks * a.support.width * a.maps * 8,
                             [&](int64_t begin, int64_t end) { window_sums(a, begin, end); });
            }
          }
        }
        FSS_FOR_ISA(dense_cosine::finish_query<T>)(a);
      }
    }
  });
  return norms;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dense_cosine_max_fwd(Tensor query, Tensor support, Tensor mask,
                                                                std::vector<int64_t> windows, Text masked, double eps,
                                                                Text eps_mode) {
  check_inputs(query, support, mask, eps_mode);
  STD_TORCH_CHECK(masked == "zero" || masked == "exclude", kOp, ": masked must be 'zero' or 'exclude', got '", masked,
                  "'");
  const std::vector<Window> list = check_windows(windows);
  const std::vector<int64_t> shape{support.size(0), int64_t(list.size()), query.size(2), query.size(3)};
  const Tensor scores = empty(query, shape, query.scalar_type()), indices = empty(query, shape, ScalarType::Long);
  const Norms norms =
      forward(query, support, mask, list, masked == "exclude", eps, eps_mode, scores, indices, nullptr, nullptr);
  return {scores, indices, norms.query, norms.support};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dense_cosine_match_fwd(Tensor query, Tensor support,
                                                                                  Tensor mask, double eps,
                                                                                  Text eps_mode) {
  check_inputs(query, support, mask, eps_mode);
  const auto results = [&](const Tensor& x, ScalarType dtype) {
    return empty(query, {support.size(0), x.size(2), x.size(3)}, dtype);
  };
  const Tensor scores = results(query, query.scalar_type()), indices = results(query, ScalarType::Long);
  const Tensor support_scores = results(support, query.scalar_type()),
               support_indices = results(support, ScalarType::Long);
  const Norms norms =
      forward(query, support, mask, {{1, 1}}, true, eps, eps_mode, scores, indices, &support_scores, &support_indices);
  return {scores, support_scores, indices, support_indices, norms.query, norms.support};
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
                                            double eps, const std::string& eps_mode, bool need_query,
                                            bool need_support) {
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

std::tuple<Tensor, Tensor> dense_cosine_max_bwd(Tensor grad, Tensor query, Tensor support, Tensor mask,
                                                        Tensor index, Tensor query_norm, Tensor support_norm,
                                                        std::vector<int64_t> windows, Text, double eps, Text eps_mode,
                                                        bool need_query, bool need_support) {
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

std::tuple<Tensor, Tensor> dense_cosine_match_bwd(Tensor grad_query_scores, Tensor grad_support_scores,
                                                          Tensor query, Tensor support, Tensor mask, Tensor query_index,
                                                          Tensor support_index, Tensor query_norm, Tensor support_norm,
                                                          double eps, Text eps_mode, bool need_query, bool need_support) {
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
