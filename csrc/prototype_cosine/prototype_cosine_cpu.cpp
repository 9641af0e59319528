// Host side of prototype_cosine on CPU: checks, allocation, parallel loops, registration.
#include "common/tensor.h"

#define FSS_CORE "prototype_cosine/prototype_cosine.h"
#include "common/each_isa.h"

namespace fss {
namespace {

using prototype_cosine::CosineArgs;

constexpr const char* kOp = "prototype_cosine";

void check_inputs(const Tensor& features, const Tensor& prototypes, const std::string& eps_mode) {
  STD_TORCH_CHECK(features.dim() == 4 && prototypes.dim() == 3 && prototypes.size(2) == features.size(1) &&
                      (prototypes.size(0) == features.size(0) || prototypes.size(0) == 1),
                  kOp, ": expected features (B, C, H, W) and prototypes (B, P, C) or (1, P, C)");
  STD_TORCH_CHECK(features.scalar_type() == prototypes.scalar_type(), kOp, ": features and prototypes differ in dtype");
  STD_TORCH_CHECK(features.size(1) > 0 && features.size(2) > 0 && features.size(3) > 0, kOp,
                  ": channels and grid must not be empty");
  STD_TORCH_CHECK(eps_mode == "clamp" || eps_mode == "add", kOp, ": eps_mode must be 'clamp' or 'add', got '", eps_mode,
                  "'");
}

// The normalised prototypes live as long as `units`.
CosineArgs cosine_args(const Rows& rows, const Tensor& prototypes, const Tensor& units, double scale, double eps,
                       const std::string& eps_mode) {
  CosineArgs args{};
  const Tensor& features = rows.tensor;
  args.batch = features.size(0), args.sets = prototypes.size(0), args.prototypes = prototypes.size(1);
  args.channels = features.size(1), args.pixels = features.size(2) * features.size(3);
  args.scale = scale, args.eps = eps, args.add = eps_mode == "add";
  args.features = features.const_data_ptr();
  args.channels_last = rows.channels_last;
  args.stride_b = rows.stride_b, args.stride_row = rows.stride_row;
  args.weights = prototypes.const_data_ptr();
  args.units = units.mutable_data_ptr();
  args.padded = units.size(2);
  return args;
}

Tensor empty_units(const Tensor& prototypes) {
  return empty(prototypes,
               {prototypes.size(0), prototypes.size(1), round_up(prototypes.size(2), prototype_cosine::kPadding)},
               accumulate_dtype(prototypes.scalar_type()));
}

// run(args, begin, end) over tasks of `work` elements each.
template <class F>
void run_tasks(F run, const CosineArgs& args, int64_t tasks, int64_t work) {
  parallel_tasks(tasks, work, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> prototype_cosine_fwd(Tensor features, Tensor prototypes, double scale, double eps,
                                                        Text eps_mode) {
  check_inputs(features, prototypes, eps_mode);
  const ScalarType dtype = features.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t batch = features.size(0), height = features.size(2), width = features.size(3);
  Tensor scores = empty(features, {batch, prototypes.size(1), height, width}, dtype);
  Tensor cosines = empty(features, {batch, prototypes.size(1), height, width}, accumulate);
  Tensor norms = empty(features, {batch, height, width}, accumulate);
  if (batch * prototypes.size(1) == 0) {
    torch::stable::zero_(norms);
    return {scores, cosines, norms};
  }

  const Rows rows = as_rows(features);
  const Tensor weights = torch::stable::contiguous(prototypes), units = empty_units(prototypes);
  CosineArgs args = cosine_args(rows, weights, units, scale, eps, eps_mode);
  args.columns = prototype_cosine::columns_for(args.pixels, batch, 2 * int64_t(torch::stable::get_num_threads()));
  args.norms = norms.mutable_data_ptr();
  args.cosines = cosines.mutable_data_ptr();
  args.scores = scores.mutable_data_ptr();
  dispatch_floating(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    run_tasks(FSS_FOR_ISA(prototype_cosine::normalise_prototypes<T>), args, unit_tasks(args), args.channels);
    const int64_t tasks = score_tasks(args);
    run_tasks(FSS_FOR_ISA(prototype_cosine::scores<T>), args, tasks, features.numel() / tasks);
  });
  return {scores, cosines, norms};
}

// Gradients to features and prototypes; one that is not asked for comes back with 0 elements.
std::tuple<Tensor, Tensor> prototype_cosine_bwd(Tensor grad, Tensor features, Tensor prototypes, Tensor cosines,
                                                Tensor norms, double scale, double eps, Text eps_mode,
                                                bool need_features, bool need_prototypes) {
  check_inputs(features, prototypes, eps_mode);
  const ScalarType dtype = features.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t batch = features.size(0), count = prototypes.size(1), height = features.size(2),
                width = features.size(3);
  STD_TORCH_CHECK(has_shape(grad, {batch, count, height, width}) && grad.scalar_type() == dtype, kOp,
                  ": grad must be (B, P, H, W) in the dtype of features");
  STD_TORCH_CHECK(has_shape(cosines, {batch, count, height, width}) && has_shape(norms, {batch, height, width}) &&
                      cosines.scalar_type() == accumulate && norms.scalar_type() == accumulate,
                  kOp, ": cosines must be (B, P, H, W) and norms (B, H, W), in the accumulation dtype");
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
  const Tensor weights = torch::stable::contiguous(prototypes), units = empty_units(prototypes);
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const Tensor dense_cosines = torch::stable::contiguous(cosines), dense_norms = torch::stable::contiguous(norms);
  CosineArgs args = cosine_args(rows, weights, units, scale, eps, eps_mode);
  const Tensor coefficients = empty(features, {batch, count, height, width}, accumulate);
  const Tensor slopes = empty(features, {batch, height, width}, accumulate);
  const Tensor sums = empty(features, {need_prototypes ? batch : 0, pieces(args), count, args.channels}, accumulate);
  args.norms = dense_norms.mutable_data_ptr();
  args.cosines = dense_cosines.mutable_data_ptr();
  args.grad = dense_grad.const_data_ptr();
  args.coefficients = coefficients.mutable_data_ptr();
  args.slopes = slopes.mutable_data_ptr();
  if (need_features) {
    args.grad_features = grad_features.mutable_data_ptr();
    args.stream = leaves_caches(grad_features);
  }
  if (need_prototypes) {
    args.sums = sums.mutable_data_ptr();
    args.grad_prototypes = grad_prototypes.mutable_data_ptr();
  }
  dispatch_floating(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    if (need_features) {
      run_tasks(FSS_FOR_ISA(prototype_cosine::normalise_prototypes<T>), args, unit_tasks(args), args.channels);
    }
    int64_t tasks = coefficient_tasks(args);
    run_tasks(FSS_FOR_ISA(prototype_cosine::coefficients<T>), args, tasks, coefficients.numel() / tasks);
    tasks = gradient_tasks(args);
    run_tasks(FSS_FOR_ISA(prototype_cosine::gradients<T>), args, tasks, features.numel() / tasks);
    if (need_features) {
      tasks = coefficient_tasks(args);
      run_tasks(FSS_FOR_ISA(prototype_cosine::short_pixels<T>), args, tasks, dense_norms.numel() / tasks);
    }
    if (need_prototypes) {
      run_tasks(FSS_FOR_ISA(prototype_cosine::grad_prototypes<T>), args, unit_tasks(args), args.channels);
    }
  });
  return {grad_features, grad_prototypes};
}

}  // namespace
}  // namespace fss

STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CPU, m) {
  m.impl("prototype_cosine_fwd", TORCH_BOX(&fss::prototype_cosine_fwd));
  m.impl("prototype_cosine_bwd", TORCH_BOX(&fss::prototype_cosine_bwd));
}
