// Host side of masked_avg_pool on CPU: checks, allocation, parallel loops, registration.
#include "common/tensor.h"

#define FSS_CORE "masked_avg_pool/masked_avg_pool.h"
#include "common/each_isa.h"

namespace fss {
namespace {

using masked_avg_pool::PoolArgs;

constexpr const char* kOp = "masked_avg_pool";

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
}

PoolArgs pool_args(const Rows& features, const Tensor& resized, const Tensor& area, double eps) {
  PoolArgs args{};
  args.batch = resized.size(0), args.masks = resized.size(1);
  args.channels = features.tensor.size(1), args.pixels = resized.size(2) * resized.size(3);
  args.eps = eps;
  args.features = features.tensor.const_data_ptr();
  args.channels_last = features.channels_last;
  args.stride_b = features.stride_b, args.stride_row = features.stride_row;
  args.weights = resized.const_data_ptr();
  args.area = area.mutable_data_ptr();
  return args;
}

// Resizes images [begin, end) of source (B, M, ., .) into the dense target (B, M, ., .), on the calling thread.
using Resizer = std::pair<void (*)(const ResizeArgs&, int64_t, int64_t), ResizeArgs>;

Resizer resizer(const Tensor& source, const Tensor& target, const Resize& mode, bool transposed) {
  ResizeArgs args{};
  args.source = source.const_data_ptr();
  args.stride_b = source.stride(0), args.stride_m = source.stride(1), args.stride_h = source.stride(2);
  args.source_height = source.size(2), args.source_width = source.size(3);
  args.target = target.mutable_data_ptr();
  args.target_height = target.size(2), args.target_width = target.size(3);
  args.masks = target.size(1);
  args.nearest = mode.nearest, args.align_corners = mode.align_corners, args.transposed = transposed;
  return dispatch_mask(source.scalar_type(), kOp, [&](auto s) {
    return dispatch_floating(target.scalar_type(), kOp, [&](auto d) -> Resizer {
      using S = typename decltype(s)::type;
      using D = typename decltype(d)::type;
      return {FSS_FOR_ISA(resize<S, D>), args};
    });
  });
}

int64_t resize_work(const ResizeArgs& args) {
  return args.transposed ? args.source_height * args.source_width : args.target_height * args.target_width;
}

std::tuple<Tensor, Tensor, Tensor> masked_avg_pool_fwd(Tensor features, Tensor mask, double eps, Text resize_name,
                                                       bool align_corners) {
  check_inputs(features, mask);
  const Resize mode = resize_mode(resize_name, align_corners);
  const ScalarType dtype = features.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t batch = mask.size(0), masks = mask.size(1);
  Tensor pooled = empty(features, {batch, masks, features.size(1)}, dtype);
  Tensor resized = empty(features, {batch, masks, features.size(2), features.size(3)}, accumulate);
  Tensor area = empty(features, {batch, masks}, accumulate);
  if (batch * masks == 0) return {pooled, resized, area};

  const Rows rows = as_rows(features);
  const Tensor readable = mask.stride(3) == 1 || mask.size(3) == 1 ? mask : torch::stable::contiguous(mask);
  const auto [resize, resize_args] = resizer(readable, resized, mode, mode.adjoint);
  PoolArgs args = pool_args(rows, resized, area, eps);
  args.pooled = pooled.mutable_data_ptr();
  dispatch_floating(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto sum_weights = FSS_FOR_ISA(masked_avg_pool::sum_weights<accumulate_t<T>>);
    const auto pool = FSS_FOR_ISA(masked_avg_pool::pool<T>);
    const int64_t tasks = masked_avg_pool::pool_tasks(args), per_sample = tasks / batch;
    // Images [begin, end) and then tasks [begin, end); the pieces are the same whatever thread runs them.
    const auto weigh = [&, run = resize, &a = resize_args](int64_t begin, int64_t end) {
      run(a, begin, end);
      sum_weights(args, begin, end);
    };
    if (batch >= 4 * int64_t(torch::stable::get_num_threads())) {
      // Sample after sample: reading a mask is all latency, and another thread then has the memory to itself.
      parallel_tasks(batch, args.channels * args.pixels, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          weigh(b * masks, (b + 1) * masks);
          pool(args, b * per_sample, (b + 1) * per_sample);
        }
      });
    } else {
      parallel_tasks(batch * masks, resize_work(resize_args) + args.pixels, weigh);
      parallel_tasks(tasks, batch * args.channels * args.pixels / tasks,
                     [&](int64_t begin, int64_t end) { pool(args, begin, end); });
    }
  });
  return {pooled, resized, area};
}

// Gradients to features and mask; one that is not asked for comes back with 0 elements.
std::tuple<Tensor, Tensor> masked_avg_pool_bwd(Tensor grad, Tensor features, Tensor mask, Tensor resized, Tensor area,
                                               double eps, Text resize_name, bool align_corners, bool need_features,
                                               bool need_mask) {
  check_inputs(features, mask);
  const Resize mode = resize_mode(resize_name, align_corners);
  const ScalarType dtype = features.scalar_type();
  const int64_t batch = mask.size(0), masks = mask.size(1);
  STD_TORCH_CHECK(has_shape(grad, {batch, masks, features.size(1)}) && grad.scalar_type() == dtype, kOp,
                  ": grad must be (B, M, C) in the dtype of features");
  STD_TORCH_CHECK(has_shape(resized, {batch, masks, features.size(2), features.size(3)}) &&
                      has_shape(area, {batch, masks}) && resized.scalar_type() == accumulate_dtype(dtype) &&
                      area.scalar_type() == accumulate_dtype(dtype),
                  kOp, ": resized must be (B, M, H, W) and area (B, M), in the accumulation dtype");
  Tensor grad_features = need_features ? empty_rows_like(features) : empty(features, {0}, dtype);
  Tensor grad_mask = empty(mask, {0}, mask.scalar_type());
  if (need_mask) grad_mask = empty(mask, {batch, masks, mask.size(2), mask.size(3)}, mask.scalar_type());
  if (batch * masks == 0) {
    if (need_features) torch::stable::zero_(grad_features);
    return {grad_features, grad_mask};
  }

  const Tensor dense_grad = torch::stable::contiguous(grad);
  const Tensor dense_resized = torch::stable::contiguous(resized), dense_area = torch::stable::contiguous(area);
  Rows rows{features, is_channels_last(features), 0, 0};
  if (need_mask) rows = as_rows(features);
  PoolArgs args = pool_args(rows, dense_resized, dense_area, eps);
  args.grad = dense_grad.const_data_ptr();
  if (need_features) {
    args.grad_features = grad_features.mutable_data_ptr();
    args.stream = leaves_caches(grad_features);
  }
  const Tensor moments =
      empty(features, {need_mask ? batch : 0, masks, resized.size(2), resized.size(3)}, accumulate_dtype(dtype));
  args.moments = moments.mutable_data_ptr();
  dispatch_floating(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    if (need_features) {
      const auto run = FSS_FOR_ISA(masked_avg_pool::grad_features<T>);
      const int64_t tasks = masked_avg_pool::grad_features_tasks(args);
      parallel_tasks(tasks, grad_features.numel() / tasks, [&](int64_t begin, int64_t end) { run(args, begin, end); });
    }
    if (need_mask) {
      const auto run = FSS_FOR_ISA(masked_avg_pool::moments<T>);
      const int64_t tasks = masked_avg_pool::moments_tasks(args);
      parallel_tasks(tasks, features.numel() / tasks, [&](int64_t begin, int64_t end) { run(args, begin, end); });
      const auto finish = FSS_FOR_ISA(masked_avg_pool::grad_weights<accumulate_t<T>>);
      parallel_tasks(batch * masks, args.pixels, [&](int64_t begin, int64_t end) { finish(args, begin, end); });
    }
  });
  if (need_mask) {
    const auto [resize, resize_args] = resizer(moments, grad_mask, mode, !mode.adjoint);
    parallel_tasks(batch * masks, resize_work(resize_args),
                   [&, run = resize, &a = resize_args](int64_t begin, int64_t end) { run(a, begin, end); });
  }
  return {grad_features, grad_mask};
}

}  // namespace
}  // namespace fss

STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CPU, m) {
  m.impl("masked_avg_pool_fwd", TORCH_BOX(&fss::masked_avg_pool_fwd));
  m.impl("masked_avg_pool_bwd", TORCH_BOX(&fss::masked_avg_pool_bwd));
}
