// Resizing of masks by interpolation matrices with exact positions, and its transpose. Torch-free; compiled once per
// instruction set by each_isa.h. 64-bit offsets; columns of the source contiguous.

#ifndef FSS_RESIZE_H
#define FSS_RESIZE_H

namespace fss {

// Resizes B*M images (task = image). Interpolation matrix R(source -> target); `transposed` applies R(target ->
// source)^T.
struct ResizeArgs {
  const void* source;  // columns contiguous
  int64_t stride_b, stride_m, stride_h;
  int64_t source_height, source_width;
  void* target;  // dense (B, M, target_height, target_width)
  int64_t target_height, target_width;
  int64_t masks;
  bool nearest, align_corners, transposed;
};

constexpr size_t kRowsAhead = 6;  // mask rows prefetched: a strided read of an image is all latency

}  // namespace fss
#endif

#ifdef FSS_ISA
namespace fss {
namespace FSS_ISA {

template <class A>
struct Tap {  // target[i] = low_weight * source[low] + high_weight * source[low + 1]
  int64_t low;
  A low_weight, high_weight;
};

// Rows of R(source -> target). The position is an exact quotient and remainder, so a weight that should be 0 is 0.
template <class A>
std::vector<Tap<A>> taps(int64_t source, int64_t target, bool nearest, bool align_corners) {
  std::vector<Tap<A>> result;
  result.reserve(size_t(target));
  for (int64_t i = 0; i < target; ++i) {
    int64_t numerator, denominator;
    if (nearest) {
      numerator = i * source / target, denominator = 1;
    } else if (align_corners) {
      numerator = i * (source - 1), denominator = std::max<int64_t>(target - 1, 1);
    } else {
      numerator = std::max<int64_t>((2 * i + 1) * source - target, 0), denominator = 2 * target;
    }
    const int64_t low = std::min(numerator / denominator, source - 1);
    const A high = low == source - 1 ? A(0) : A(numerator % denominator) / A(denominator);
    result.push_back({low, A(1) - high, high});
  }
  return result;
}

template <class S, class D, class A>
void interpolate(const ResizeArgs& args, const S* source, D* target, const std::vector<Tap<A>>& rows,
                 const std::vector<Tap<A>>& columns) {
  for (size_t y = 0; y < rows.size(); ++y) {
    const Tap<A> row = rows[y];
    const S* low = source + row.low * args.stride_h;
    const S* high = low + args.stride_h;
    const S* next = source + rows[std::min(y + kRowsAhead, rows.size() - 1)].low * args.stride_h;
    for (const Tap<A>& column : columns) {
      __builtin_prefetch(next + column.low);
      A value = widen<A>(low[column.low]) * column.low_weight;
      if (column.high_weight != 0) value += widen<A>(low[column.low + 1]) * column.high_weight;
      if (row.high_weight != 0) {
        A below = widen<A>(high[column.low]) * column.low_weight;
        if (column.high_weight != 0) below += widen<A>(high[column.low + 1]) * column.high_weight;
        value = value * row.low_weight + below * row.high_weight;
      }
      *target++ = narrow<D>(value);
    }
  }
}

// Rows first, over contiguous columns; then the few columns of the result.
template <class S, class D, class A>
void interpolate_transposed(const ResizeArgs& args, const S* source, D* target, const std::vector<Tap<A>>& rows,
                            const std::vector<Tap<A>>& columns) {
  std::vector<A> gathered(size_t(args.source_width)), line(size_t(args.target_width) + 1);
  int64_t first = 0;  // first source row that reaches target row y
  for (int64_t y = 0; y < args.target_height; ++y) {
    while (first < args.source_height && rows[size_t(first)].low < y - 1) ++first;
    std::fill(gathered.begin(), gathered.end(), A(0));
    bool any = false;
    for (int64_t s = first; s < args.source_height && rows[size_t(s)].low <= y; ++s) {
      const A weight = rows[size_t(s)].low == y ? rows[size_t(s)].low_weight : rows[size_t(s)].high_weight;
      if (weight == 0) continue;
      any = true;
      const S* from = source + s * args.stride_h;
      A* to = gathered.data();
      for (int64_t x = 0; x < args.source_width; ++x) to[x] += weight * widen<A>(from[x]);
    }
    std::fill(line.begin(), line.end(), A(0));
    if (any) {
      for (int64_t x = 0; x < args.source_width; ++x) {
        const Tap<A>& tap = columns[size_t(x)];
        line[size_t(tap.low)] += tap.low_weight * gathered[size_t(x)];
        line[size_t(tap.low) + 1] += tap.high_weight * gathered[size_t(x)];
      }
    }
    for (int64_t x = 0; x < args.target_width; ++x) *target++ = narrow<D>(line[size_t(x)]);
  }
}

template <class S, class D>
void resize(const ResizeArgs& args, int64_t begin, int64_t end) {
  using A = std::conditional_t<std::is_same_v<S, double> || std::is_same_v<D, double>, double, float>;
  const int64_t from_h = args.transposed ? args.target_height : args.source_height;
  const int64_t from_w = args.transposed ? args.target_width : args.source_width;
  const int64_t to_h = args.transposed ? args.source_height : args.target_height;
  const int64_t to_w = args.transposed ? args.source_width : args.target_width;
  const auto rows = taps<A>(from_h, to_h, args.nearest, args.align_corners);
  const auto columns = taps<A>(from_w, to_w, args.nearest, args.align_corners);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / args.masks, m = task % args.masks;
    const S* source = static_cast<const S*>(args.source) + b * args.stride_b + m * args.stride_m;
    D* target = static_cast<D*>(args.target) + task * args.target_height * args.target_width;
    if (args.transposed) {
      interpolate_transposed<S, D, A>(args, source, target, rows, columns);
    } else {
      interpolate<S, D, A>(args, source, target, rows, columns);
    }
  }
}

}  // namespace FSS_ISA
}  // namespace fss
#endif
