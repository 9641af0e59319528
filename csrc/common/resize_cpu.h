// Host side of resize.h for the ops whose mask only selects or weighs support pixels. After tensor.h and each_isa.h.
#pragma once

namespace fss {

// mask (B, h, w) on the grid of weights (B, height, width), which are float or double: bilinear with aligned corners.
inline void resize_mask(const Tensor& mask, void* weights, ScalarType dtype, int64_t height, int64_t width,
                        const char* what) {
  const Tensor source = mask.size(2) > 1 && mask.stride(2) != 1 ? torch::stable::contiguous(mask) : mask;
  ResizeArgs args{};
  args.source = source.const_data_ptr();
  args.stride_b = source.stride(0), args.stride_h = source.stride(1);
  args.source_height = source.size(1), args.source_width = source.size(2);
  args.target = weights;
  args.target_height = height, args.target_width = width;
  args.masks = 1;
  args.align_corners = true;
  const auto run = dispatch_mask(source.scalar_type(), what, [&](auto s) {
    using S = typename decltype(s)::type;
    return dtype == ScalarType::Double ? FSS_FOR_ISA(resize<S, double>) : FSS_FOR_ISA(resize<S, float>);
  });
  parallel_tasks(mask.size(0), height * width, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace fss
