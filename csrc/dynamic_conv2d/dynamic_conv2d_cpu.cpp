// Host side of dynamic_conv2d on CPU: checks, the list of taps, allocation, parallel loops, registration.
#include "common/tensor.h"

#define FSS_CORE "dynamic_conv2d/dynamic_conv2d.h"
#include "common/each_isa.h"

namespace fss {
namespace {

using dynamic_conv2d::Branch;
using dynamic_conv2d::ConvArgs;
using dynamic_conv2d::Shift;

constexpr const char* kOp = "dynamic_conv2d";

// The taps of every output, and for every element of every kernel its tap.
struct Plan {
  std::vector<Shift> taps;
  std::vector<int64_t> first;
  std::vector<std::vector<int64_t>> tap_of;
  int64_t reach_rows = 0, reach_columns = 0;
  bool cross = false;
  dynamic_conv2d::Cross sizes{-1, -1, -1};

  int64_t outputs() const { return int64_t(first.size()) - 1; }

  Plan(const std::vector<Tensor>& kernels, bool merge) {
    for (const Tensor& k : kernels) {
      reach_rows = std::max(reach_rows, k.size(2) / 2);
      reach_columns = std::max(reach_columns, k.size(3) / 2);
    }
    first.push_back(0);
    const auto list = [&](int64_t rows, int64_t columns) {  // returns the tap of the kernel's first element
      const int64_t begin = int64_t(taps.size());
      for (int64_t r = -rows; r <= rows; ++r) {
        for (int64_t c = -columns; c <= columns; ++c) taps.push_back({r, c});
      }
      return begin;
    };
    if (!merge) {
      for (const Tensor& k : kernels) {
        const int64_t begin = list(k.size(2) / 2, k.size(3) / 2);
        first.push_back(int64_t(taps.size()));
        tap_of.emplace_back();
        for (int64_t i = begin; i < first.back(); ++i) tap_of.back().push_back(i);
      }
    } else {  // one output: every position that some kernel covers
      const int64_t height = 2 * reach_rows + 1, width = 2 * reach_columns + 1;
      std::vector<int64_t> at(size_t(height * width), -1);
      const auto each = [&](const Tensor& k, const auto& f) {
        for (int64_t i = 0; i < k.size(2) * k.size(3); ++i) {
          const int64_t r = i / k.size(3) - k.size(2) / 2, c = i % k.size(3) - k.size(3) / 2;
          f(at[size_t((r + reach_rows) * width + c + reach_columns)]);
        }
      };
      for (const Tensor& k : kernels) each(k, [](int64_t& tap) { tap = 0; });
      for (int64_t i = 0; i < height * width; ++i) {
        if (at[size_t(i)] < 0) continue;
        at[size_t(i)] = int64_t(taps.size());
        taps.push_back({i / width - reach_rows, i % width - reach_columns});
      }
      for (const Tensor& k : kernels) {
        tap_of.emplace_back();
        each(k, [&](int64_t tap) { tap_of.back().push_back(tap); });
      }
      first.push_back(int64_t(taps.size()));
    }
    find_cross();
  }

  // Whether the outputs are what the register tiles know: one 5x5, or 5x5 with 5x1 and 1x5 in any order.
  void find_cross() {
    if (reach_rows != 2 || reach_columns != 2 || (outputs() != 1 && outputs() != 3)) return;
    for (int64_t o = 0; o < outputs(); ++o) {
      const int64_t begin = first[size_t(o)], count = first[size_t(o) + 1] - begin;
      if (count == 25) sizes.square = begin;
      if (count == 5) (taps[size_t(begin)].row == 0 ? sizes.horizontal : sizes.vertical) = begin;
    }
    cross = sizes.square >= 0 && (outputs() == 1 || (sizes.vertical >= 0 && sizes.horizontal >= 0));
  }
};

void check_inputs(const Tensor& x, const std::vector<Tensor>& kernels) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, kOp,
                  ": expected x (B, C, H, W) with channels and pixels");
  STD_TORCH_CHECK(!kernels.empty(), kOp, ": expected at least one kernel");
  for (const Tensor& k : kernels) {
    STD_TORCH_CHECK(k.dim() == 4 && k.size(0) == x.size(0) && k.size(1) == x.size(1) && k.size(2) % 2 == 1 &&
                        k.size(3) % 2 == 1 && k.scalar_type() == x.scalar_type(),
                    kOp, ": kernels must be (B, C, kh, kw) with odd sizes, in the dtype of x");
  }
}

ConvArgs conv_args(const Plan& plan, const Rows& x, const Tensor& kernels) {
  ConvArgs args{};
  args.batch = x.tensor.size(0), args.channels = x.tensor.size(1);
  args.height = x.tensor.size(2), args.width = x.tensor.size(3);
  args.channels_last = x.channels_last;
  args.x = x.tensor.const_data_ptr();
  args.stride_b = x.stride_b, args.stride_row = x.stride_row;
  args.kernels = kernels.mutable_data_ptr();
  args.outputs = plan.outputs(), args.taps = int64_t(plan.taps.size());
  args.first = plan.first.data(), args.tap = plan.taps.data();
  args.reach_rows = plan.reach_rows, args.reach_columns = plan.reach_columns;
  args.cross = plan.cross, args.sizes = plan.sizes;
  return args;
}

Branch branch(const Plan& plan, size_t l, const Tensor& k) {
  return {const_cast<void*>(k.const_data_ptr()),
          k.stride(0),
          k.stride(1),
          k.stride(2),
          k.stride(3),
          k.size(2),
          k.size(3),
          plan.tap_of[l].data()};
}

// The outputs, and the kernels as (B, C, T) in the accumulation type.
std::tuple<Tensor, Tensor> dynamic_conv2d_fwd(Tensor x, std::vector<Tensor> kernels, bool merge) {
  check_inputs(x, kernels);
  const Plan plan(kernels, merge);
  const int64_t batch = x.size(0), channels = x.size(1);
  Tensor out = empty_rows_like(x, plan.outputs() * channels);
  Tensor taps = empty(x, {batch, channels, int64_t(plan.taps.size())}, accumulate_dtype(x.scalar_type()));
  if (batch == 0) return {out, taps};

  const Rows rows = as_rows(x);
  ConvArgs args = conv_args(plan, rows, taps);
  args.out = out.mutable_data_ptr();
  args.stream = leaves_caches(out);
  std::vector<Branch> sources;
  for (size_t l = 0; l < kernels.size(); ++l) sources.push_back(branch(plan, l, kernels[l]));
  dispatch_floating(x.scalar_type(), kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto gather = FSS_FOR_ISA(dynamic_conv2d::gather_kernels<T>);
    parallel_tasks(batch * channels, args.taps, [&](int64_t begin, int64_t end) {
      gather(args, sources.data(), int64_t(sources.size()), begin, end);
    });
    const auto run = FSS_FOR_ISA(dynamic_conv2d::forward<T>);
    const int64_t tasks = FSS_FOR_ISA(dynamic_conv2d::forward_tasks<T>)(args);
    parallel_tasks(tasks, x.numel() * args.taps / tasks, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  });
  return {out, taps};
}

// Gradients to x and the kernels; one that is not asked for comes back with 0 elements.
std::tuple<Tensor, std::vector<Tensor>> dynamic_conv2d_bwd(Tensor grad, Tensor x, std::vector<Tensor> kernels,
                                                           Tensor taps, bool merge, bool need_x,
                                                           std::vector<bool> need_kernels) {
  check_inputs(x, kernels);
  const Plan plan(kernels, merge);
  const ScalarType dtype = x.scalar_type();
  const int64_t batch = x.size(0), channels = x.size(1), outputs = plan.outputs();
  STD_TORCH_CHECK(has_shape(grad, {batch, outputs * channels, x.size(2), x.size(3)}) && grad.scalar_type() == dtype,
                  kOp, ": grad must be (B, L*C, H, W) in the dtype of x");
  STD_TORCH_CHECK(
      has_shape(taps, {batch, channels, int64_t(plan.taps.size())}) && taps.scalar_type() == accumulate_dtype(dtype),
      kOp, ": taps must be (B, C, T) in the accumulation dtype");
  STD_TORCH_CHECK(need_kernels.size() == kernels.size(), kOp, ": need_kernels must have one flag a kernel");
  Tensor grad_x = need_x ? empty_rows_like(x, channels) : empty(x, {0}, dtype);
  std::vector<Tensor> grad_kernels;
  std::vector<Branch> targets;
  for (size_t l = 0; l < kernels.size(); ++l) {
    const Tensor& k = kernels[l];
    if (need_kernels[l]) {
      grad_kernels.push_back(empty(k, {batch, channels, k.size(2), k.size(3)}, dtype));
      targets.push_back(branch(plan, l, grad_kernels.back()));
    } else {
      grad_kernels.push_back(empty(k, {0}, dtype));
    }
  }
  const bool need_any = std::find(need_kernels.begin(), need_kernels.end(), true) != need_kernels.end();
  if (batch == 0 || (!need_x && !need_any)) return {grad_x, grad_kernels};

  // in the memory format of x
  const Tensor like_x =
      is_channels_last(grad) == is_channels_last(x)
          ? grad
          : torch::stable::contiguous(grad, is_channels_last(x) ? torch::headeronly::MemoryFormat::ChannelsLast
                                                                : torch::headeronly::MemoryFormat::Contiguous);
  Rows rows{x, is_channels_last(x), 0, 0};
  if (need_any) rows = as_rows(x);
  const Rows grads = as_rows(like_x);
  const Tensor dense_taps = torch::stable::contiguous(taps);
  ConvArgs args = conv_args(plan, rows, dense_taps);
  args.grad = grads.tensor.const_data_ptr();
  args.grad_stride_b = grads.stride_b, args.grad_stride_row = grads.stride_row;
  if (need_x) {
    args.grad_x = grad_x.mutable_data_ptr();
    args.stream = leaves_caches(grad_x);
  }
  const Tensor grad_taps =
      empty(x, {need_any ? batch : 0, channels, int64_t(plan.taps.size())}, accumulate_dtype(dtype));
  if (need_any) args.grad_kernels = grad_taps.mutable_data_ptr();
  dispatch_floating(dtype, kOp, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto run = FSS_FOR_ISA(dynamic_conv2d::backward<T>);
    const int64_t tasks = FSS_FOR_ISA(dynamic_conv2d::owners<T>)(args);
    parallel_tasks(tasks, 2 * x.numel() * args.taps / tasks,
                   [&](int64_t begin, int64_t end) { run(args, begin, end); });
    if (!need_any) return;
    const auto scatter = FSS_FOR_ISA(dynamic_conv2d::scatter_kernels<T>);
    parallel_tasks(batch * channels, args.taps, [&](int64_t begin, int64_t end) {
      scatter(args, targets.data(), int64_t(targets.size()), begin, end);
    });
  });
  return {grad_x, grad_kernels};
}

}  // namespace
}  // namespace fss

STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CPU, m) {
  m.impl("dynamic_conv2d_fwd", TORCH_BOX(&fss::dynamic_conv2d_fwd));
  m.impl("dynamic_conv2d_bwd", TORCH_BOX(&fss::dynamic_conv2d_bwd));
}
