// Host side of hypercorrelation on CPU: checks, allocation, parallel loops, registration.
#include "common/tensor.h"

#define FSS_CORE "hypercorrelation/hypercorrelation.h"
#include "common/each_isa.h"
#include "common/resize_cpu.h"

namespace fss {
namespace {

using hypercorrelation::Args;
using hypercorrelation::Operand;

constexpr const char* kOp = "hypercorrelation";

using Layers = std::vector<Tensor>;

void check_inputs(const Layers& queries, const Layers& supports, const Tensor& mask, const std::string& eps_mode) {
  STD_TORCH_CHECK(!queries.empty() && queries.size() == supports.size(), kOp, ": expected as many supports as queries");
  for (size_t layer = 0; layer < queries.size(); ++layer) {
    const Tensor &query = queries[layer], &support = supports[layer];
    STD_TORCH_CHECK(query.dim() == 4 && support.dim() == 4 && mask.dim() == 3 && query.size(0) == support.size(0) &&
                        query.size(0) == mask.size(0) && query.size(1) == support.size(1),
                    kOp, ": expected query (B, C, Ha, Wa), support (B, C, Hb, Wb) and mask (B, h, w)");
    STD_TORCH_CHECK(query.size(0) == queries[0].size(0) && query.size(2) == queries[0].size(2) &&
                        query.size(3) == queries[0].size(3) && support.size(2) == supports[0].size(2) &&
                        support.size(3) == supports[0].size(3),
                    kOp, ": the layers of a level must have one batch size and one grid");
    STD_TORCH_CHECK(
        query.scalar_type() == queries[0].scalar_type() && support.scalar_type() == queries[0].scalar_type(), kOp,
        ": queries and supports must have one dtype");
    STD_TORCH_CHECK(query.size(1) > 0 && query.size(2) > 0 && query.size(3) > 0 && support.size(2) > 0 &&
                        support.size(3) > 0 && mask.size(1) > 0 && mask.size(2) > 0,
                    kOp, ": channels and grids must not be empty");
  }
  STD_TORCH_CHECK(eps_mode == "add" || eps_mode == "clamp", kOp, ": eps_mode must be 'add' or 'clamp', got '", eps_mode,
                  "'");
}

// Where a layer begins in a tensor (L, ...).
void* layer_of(const Tensor& t, int64_t layer) {
  return static_cast<char*>(t.mutable_data_ptr()) + layer * (t.numel() / t.size(0)) * int64_t(t.element_size());
}

// Where a layer begins in a tensor (B, L, ...) whose samples are dense.
void* layer_of_sample(const Tensor& t, int64_t layer) {
  return static_cast<char*>(t.mutable_data_ptr()) +
         layer * (t.numel() / (t.size(0) * t.size(1))) * int64_t(t.element_size());
}

// `norms` (L, B, H, W) are those of all layers.
Operand operand(const Rows& rows, const Tensor& norms, int64_t layer) {
  Operand x{};
  x.features = rows.tensor.const_data_ptr();
  x.channels_last = rows.channels_last;
  x.stride_b = rows.stride_b, x.stride_row = rows.stride_row;
  x.pixels = rows.tensor.size(2) * rows.tensor.size(3);
  x.norms = layer_of(norms, layer);
  return x;
}

// f(args) for samples [first, first + samples), as many together as keep what is packed small.
template <class F>
void in_groups(Args& args, int64_t packed_elements, const Tensor& like, const F& f) {
  const ScalarType dtype = accumulate_dtype(like.scalar_type());
  const int64_t bytes = packed_elements * (dtype == ScalarType::Double ? 8 : 4);
  const int64_t group = std::min(args.batch, std::max<int64_t>(1, hypercorrelation::kPackedBytes / bytes));
  const Tensor packed = empty(like, {group * packed_elements}, dtype);
  args.packed = packed.mutable_data_ptr();
  for (args.first = 0; args.first < args.batch; args.first += group) {
    args.samples = std::min(group, args.batch - args.first);
    f();
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hypercorrelation_fwd(Layers queries, Layers supports, Tensor mask,
                                                                        double eps, Text eps_mode, bool clamp) {
  check_inputs(queries, supports, mask, eps_mode);
  const Tensor &query = queries[0], &support = supports[0];
  const ScalarType dtype = query.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t layers = int64_t(queries.size()), batch = query.size(0), rows = query.size(2) * query.size(3);
  const int64_t columns = support.size(2) * support.size(3);
  Tensor out = empty(query, {batch, layers, query.size(2), query.size(3), support.size(2), support.size(3)}, dtype);
  Tensor query_norms = empty(query, {layers, batch, query.size(2), query.size(3)}, accumulate);
  Tensor support_norms = empty(query, {layers, batch, support.size(2), support.size(3)}, accumulate);
  Tensor weights = empty(query, {batch, support.size(2), support.size(3)}, accumulate);
  Tensor signs = empty(query, {layers, batch, rows, clamp ? (columns + 7) / 8 : 0}, ScalarType::Byte);
  if (batch == 0) return {out, query_norms, support_norms, weights, signs};

  resize_mask(mask, weights.mutable_data_ptr(), accumulate, support.size(2), support.size(3), kOp);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Rows query_rows = as_rows(queries[layer]), support_rows = as_rows(supports[layer]);
    Args args{};
    args.batch = batch, args.channels = queries[layer].size(1);
    args.query = operand(query_rows, query_norms, layer);
    args.support = operand(support_rows, support_norms, layer);
    args.support.weights = weights.const_data_ptr();
    args.eps = eps, args.add = eps_mode == "add", args.clamp = clamp;
    args.out = layer_of_sample(out, layer);
    args.out_stride_b = layers * rows * columns;
    args.stream = out.element_size() >= 4 && leaves_caches(out);
    args.signs = clamp ? static_cast<uint8_t*>(layer_of(signs, layer)) : nullptr;
    dispatch_floating(dtype, kOp, [&](auto t) {
      using T = typename decltype(t)::type;
      using A = accumulate_t<T>;
      const auto pack = FSS_FOR_ISA(hypercorrelation::pack_support<T>);
      const auto correlate = FSS_FOR_ISA(hypercorrelation::correlate<T>);
      in_groups(args, FSS_FOR_ISA(hypercorrelation::packed_support<A>)(args), query, [&] {
        const int64_t strips = FSS_FOR_ISA(hypercorrelation::support_tasks<A>)(args);
        parallel_tasks(strips, args.samples * args.channels * columns / strips,
                       [&](int64_t begin, int64_t end) { pack(args, begin, end); });
        const int64_t tasks = hypercorrelation::correlate_tasks(args, sizeof(A));
        parallel_tasks(tasks, args.samples * rows * columns * args.channels / tasks,
                       [&](int64_t begin, int64_t end) { correlate(args, begin, end); });
      });
    });
  }
  return {out, query_norms, support_norms, weights, signs};
}

// Gradients to queries and supports; one that is not asked for comes back with 0 elements.
std::tuple<Layers, Layers> hypercorrelation_bwd(Tensor grad, Layers queries, Layers supports, Tensor mask,
                                                Tensor query_norms, Tensor support_norms, Tensor weights, Tensor signs,
                                                double eps, Text eps_mode, bool clamp, std::vector<bool> need_queries,
                                                std::vector<bool> need_supports) {
  check_inputs(queries, supports, mask, eps_mode);
  const Tensor &query = queries[0], &support = supports[0];
  const ScalarType dtype = query.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t layers = int64_t(queries.size()), batch = query.size(0), rows = query.size(2) * query.size(3);
  const int64_t columns = support.size(2) * support.size(3);
  STD_TORCH_CHECK(has_shape(grad, {batch, layers, query.size(2), query.size(3), support.size(2), support.size(3)}) &&
                      grad.scalar_type() == dtype,
                  kOp, ": grad must be (B, L, Ha, Wa, Hb, Wb) in the dtype of the queries");
  STD_TORCH_CHECK(has_shape(query_norms, {layers, batch, query.size(2), query.size(3)}) &&
                      has_shape(support_norms, {layers, batch, support.size(2), support.size(3)}) &&
                      has_shape(weights, {batch, support.size(2), support.size(3)}) &&
                      query_norms.scalar_type() == accumulate && support_norms.scalar_type() == accumulate &&
                      weights.scalar_type() == accumulate,
                  kOp, ": norms must be (L, B, H, W) and weights (B, H, W) in the accumulation dtype");
  STD_TORCH_CHECK(
      has_shape(signs, {layers, batch, rows, clamp ? (columns + 7) / 8 : 0}) && signs.scalar_type() == ScalarType::Byte,
      kOp, ": signs must be (L, B, Ha*Wa, ceil(Hb*Wb / 8)) in uint8");
  STD_TORCH_CHECK(int64_t(need_queries.size()) == layers && int64_t(need_supports.size()) == layers, kOp,
                  ": expected one flag a layer");
  Layers grad_queries, grad_supports;
  for (int64_t layer = 0; layer < layers; ++layer) {
    grad_queries.push_back(need_queries[layer] ? empty_rows_like(queries[layer]) : empty(query, {0}, dtype));
    grad_supports.push_back(need_supports[layer] ? empty_rows_like(supports[layer]) : empty(query, {0}, dtype));
  }
  if (batch == 0) return {grad_queries, grad_supports};

  const Tensor dense_grad = torch::stable::contiguous(grad), dense_signs = torch::stable::contiguous(signs);
  const Tensor dense_query_norms = torch::stable::contiguous(query_norms),
               dense_support_norms = torch::stable::contiguous(support_norms);
  const Tensor dense_weights = torch::stable::contiguous(weights);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const bool need_query = need_queries[layer], need_support = need_supports[layer];
    if (!need_query && !need_support) continue;
    const Rows query_rows = as_rows(queries[layer]), support_rows = as_rows(supports[layer]);
    Args args{};
    args.batch = batch, args.channels = queries[layer].size(1);
    args.query = operand(query_rows, dense_query_norms, layer);
    args.support = operand(support_rows, dense_support_norms, layer);
    args.support.weights = dense_weights.const_data_ptr();
    if (need_query) args.query.gradient = grad_queries[layer].mutable_data_ptr();
    if (need_support) args.support.gradient = grad_supports[layer].mutable_data_ptr();
    args.eps = eps, args.add = eps_mode == "add", args.clamp = clamp;
    args.grad = layer_of_sample(dense_grad, layer);
    args.out_stride_b = layers * rows * columns;
    args.signs = clamp ? static_cast<uint8_t*>(layer_of(dense_signs, layer)) : nullptr;
    dispatch_floating(dtype, kOp, [&](auto t) {
      using T = typename decltype(t)::type;
      using A = accumulate_t<T>;
      const auto size = FSS_FOR_ISA(hypercorrelation::packed_operand<A>);
      const auto scales = FSS_FOR_ISA(hypercorrelation::find_scales<A>);
      const auto pack = FSS_FOR_ISA(hypercorrelation::pack_operands<T>);
      const auto gradients = FSS_FOR_ISA(hypercorrelation::gradients<T>);
      const int64_t packed = (need_support ? size(args, args.query) : 0) + (need_query ? size(args, args.support) : 0);
      in_groups(args, packed, query, [&] {
        parallel_tasks(args.samples, rows + columns, [&](int64_t begin, int64_t end) { scales(args, begin, end); });
        const int64_t strips = FSS_FOR_ISA(hypercorrelation::channel_tasks<A>)(args) * (need_query + need_support);
        parallel_tasks(strips, args.samples * packed / strips,
                       [&](int64_t begin, int64_t end) { pack(args, begin, end); });
        const int64_t tasks = hypercorrelation::gradient_tasks(args, args.query, sizeof(A)) +
                              hypercorrelation::gradient_tasks(args, args.support, sizeof(A));
        parallel_tasks(tasks, args.samples * rows * columns * args.channels / tasks,
                       [&](int64_t begin, int64_t end) { gradients(args, begin, end); });
      });
    });
  }
  return {grad_queries, grad_supports};
}

}  // namespace
}  // namespace fss

STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CPU, m) {
  m.impl("hypercorrelation_fwd", TORCH_BOX(&fss::hypercorrelation_fwd));
  m.impl("hypercorrelation_bwd", TORCH_BOX(&fss::hypercorrelation_bwd));
}
