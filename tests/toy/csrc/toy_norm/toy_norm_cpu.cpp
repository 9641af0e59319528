// Host side of toy_norm on CPU: checks, allocation, parallel loops, registration.
#include "common/tensor.h"

#define FSS_CORE "toy_norm/toy_norm.h"
#include "common/each_isa.h"

namespace fss {
namespace {

using toy_norm::Args;
using toy_norm::Map;

constexpr const char* kOp = "toy_norm";

Map map_of(const Rows& rows) {
  return {const_cast<void*>(rows.tensor.const_data_ptr()), rows.stride_b, rows.channels_last ? 1 : rows.stride_row,
          rows.channels_last ? rows.stride_row : 1};
}

Args args_of(const Tensor& features, const Tensor& gain, double eps) {
  STD_TORCH_CHECK(features.dim() == 4 && features.size(1) > 0 && has_shape(gain, {features.size(0), features.size(1)}),
                  kOp, ": expected features (B, C, H, W) and gain (B, C)");
  STD_TORCH_CHECK(features.scalar_type() == gain.scalar_type(), kOp, ": features and gain differ in dtype");
  Args args{};
  args.channels = features.size(1), args.pixels = features.size(2) * features.size(3), args.eps = eps;
  return args;
}

template <class F>
void run_tasks(F run, const Args& args, int64_t tasks, int64_t work) {
  parallel_tasks(tasks, work, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

std::tuple<Tensor, Tensor> toy_norm_fwd(Tensor features, Tensor gain, double eps) {
  Args args = args_of(features, gain, eps);
  const ScalarType dtype = features.scalar_type();
  const Rows x = as_rows(features);
  const Tensor dense_gain = torch::stable::contiguous(gain);
  Tensor out = empty_rows_like(features);
  Tensor factor = empty(features, {features.size(0), features.size(2), features.size(3)}, accumulate_dtype(dtype));
  args.x = map_of(x), args.out = map_of(as_rows(out));
  args.gain = dense_gain.const_data_ptr(), args.factor = factor.mutable_data_ptr();
  dispatch_floating(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    run_tasks(FSS_FOR_ISA(toy_norm::forward<T>), args, factor.numel(), args.channels);
  });
  return {out, factor};
}

std::tuple<Tensor, Tensor> toy_norm_bwd(Tensor grad, Tensor features, Tensor gain, Tensor factor, double eps,
                                        bool need_features, bool need_gain) {
  Args args = args_of(features, gain, eps);
  const ScalarType dtype = features.scalar_type();
  const int64_t batch = features.size(0), height = features.size(2), width = features.size(3);
  STD_TORCH_CHECK(has_shape(grad, {batch, args.channels, height, width}) && grad.scalar_type() == dtype, kOp,
                  ": grad must have the shape and dtype of features");
  STD_TORCH_CHECK(has_shape(factor, {batch, height, width}) && factor.scalar_type() == accumulate_dtype(dtype), kOp,
                  ": factor must be (B, H, W) in the accumulation dtype");
  Tensor grad_features = need_features ? empty_rows_like(features) : empty(features, {0}, dtype);
  Tensor grad_gain =
      empty(features, need_gain ? std::vector<int64_t>{batch, args.channels} : std::vector<int64_t>{0}, dtype);
  const Rows x = as_rows(features), g = as_rows(grad);
  const Tensor dense_gain = torch::stable::contiguous(gain), dense_factor = torch::stable::contiguous(factor);
  args.x = map_of(x), args.grad = map_of(g);
  args.gain = dense_gain.const_data_ptr(), args.factor = dense_factor.mutable_data_ptr();
  if (need_features) args.grad_x = map_of(as_rows(grad_features));
  if (need_gain) args.grad_gain = grad_gain.mutable_data_ptr();
  dispatch_floating(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    if (need_features) run_tasks(FSS_FOR_ISA(toy_norm::grad_features<T>), args, factor.numel(), args.channels);
    if (need_gain) run_tasks(FSS_FOR_ISA(toy_norm::grad_gain<T>), args, batch * args.channels, args.pixels);
  });
  return {grad_features, grad_gain};
}

}  // namespace
}  // namespace fss

STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CPU, m) {
  m.impl("toy_norm_fwd", TORCH_BOX(&fss::toy_norm_fwd));
  m.impl("toy_norm_bwd", TORCH_BOX(&fss::toy_norm_bwd));
}
