// Host side of resize.h for the ops whose mask only selects or weighs support pixels. After tensor.h and each_isa.h.
#pragma once

namespace fss {

// mask (B, h, w) on the grid of weights (B, H, W): bilinear with aligned corners.
inline void resize_mask(const Tensor& mask, const Tensor& weights, const char* what) {
  const Tensor source = mask.size(2) > 1 && mask.stride(2) != 1 ? torch::stable::contiguous(mask) : mask;
  ResizeArgs args{};
  args.source = source.const_data_ptr();
  args.stride_b = source.stride(0), args.stride_h = source.stride(1);
  args.source_height = source.size(1), args.source_width = source.size(2);
  args.target = weights.mutable_data_ptr();
  args.target_height = weights.size(1), args.target_width = weights.size(2);
  args.masks = 1;
  args.align_corners = true;
  const auto run = dispatch_mask(source.scalar_type(), what, [&](auto s) {
    using S = typename decltype(s)::type;
    return weights.scalar_type() == ScalarType::Double ? FSS_FOR_ISA(resize<S, double>) : FSS_FOR_ISA(resize<S, float>);
  });
  parallel_tasks(weights.size(0), args.target_height * args.target_width,
                 [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace fss
