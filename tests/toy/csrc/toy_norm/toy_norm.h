// Every pixel's vector divided by the root of its mean square, on raw pointers. Torch-free.
//
//   out[b,c,n] = k[b,c] x[b,c,n] r[b,n],   r[b,n] = (sum_i x[b,i,n]^2 / C + eps)^(-1/2)
//
// Parallel decomposition: a task is a pixel, of the gradient to the gain a channel. Memory traffic: every pass reads
// its operands once, the sums over channels twice. Accumulation: float (double for double), over pixels double. Limits:
// 64-bit offsets everywhere.
#ifndef FSS_TOY_NORM_H
#define FSS_TOY_NORM_H

namespace fss {
namespace toy_norm {

struct Map {  // (B, C, N), of the features' type
  void* data;
  int64_t stride_b, stride_c, stride_n;
};

struct Args {
  int64_t channels, pixels;
  double eps;
  Map x, out, grad, grad_x;
  const void* gain;  // (B, C), of the features' type
  void* grad_gain;   // the same
  void* factor;      // (B, N), accumulation type
};

}  // namespace toy_norm
}  // namespace fss
#endif

#ifdef FSS_ISA
namespace fss {
namespace FSS_ISA {
namespace toy_norm {

using namespace ::fss::toy_norm;

template <class T>
inline T* at(const Map& map, int64_t b, int64_t c, int64_t n) {
  return static_cast<T*>(map.data) + b * map.stride_b + c * map.stride_c + n * map.stride_n;
}

// [begin, end): pixels of all samples.
template <class T>
void forward(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / a.pixels, n = i % a.pixels;
    const T *x = at<T>(a.x, b, 0, n), *gain = static_cast<const T*>(a.gain) + b * a.channels;
    A squares = 0;
    for (int64_t c = 0; c < a.channels; ++c) squares += widen<A>(x[c * a.x.stride_c]) * widen<A>(x[c * a.x.stride_c]);
    const A factor = 1 / std::sqrt(squares / A(a.channels) + A(a.eps));
    for (int64_t c = 0; c < a.channels; ++c) {
      *at<T>(a.out, b, c, n) = narrow<T>(widen<A>(gain[c]) * widen<A>(x[c * a.x.stride_c]) * factor);
    }
    static_cast<A*>(a.factor)[i] = factor;
  }
}

// [begin, end): pixels of all samples.
template <class T>
void grad_features(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / a.pixels, n = i % a.pixels;
    const T *x = at<T>(a.x, b, 0, n), *grad = at<T>(a.grad, b, 0, n),
            *gain = static_cast<const T*>(a.gain) + b * a.channels;
    const A factor = static_cast<const A*>(a.factor)[i];
    A dot = 0;
    for (int64_t c = 0; c < a.channels; ++c) {
      dot += widen<A>(gain[c]) * widen<A>(grad[c * a.grad.stride_c]) * widen<A>(x[c * a.x.stride_c]);
    }
    const A along = dot / A(a.channels) * factor * factor * factor;
    for (int64_t c = 0; c < a.channels; ++c) {
      const A toward = widen<A>(gain[c]) * widen<A>(grad[c * a.grad.stride_c]) * factor;
      *at<T>(a.grad_x, b, c, n) = narrow<T>(toward - along * widen<A>(x[c * a.x.stride_c]));
    }
  }
}

// [begin, end): channels of all samples.
template <class T>
void grad_gain(const Args& a, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / a.channels, c = i % a.channels;
    const A* factor = static_cast<const A*>(a.factor) + b * a.pixels;
    double sum = 0;
    for (int64_t n = 0; n < a.pixels; ++n) {
      sum += double(widen<A>(*at<T>(a.grad, b, c, n)) * widen<A>(*at<T>(a.x, b, c, n)) * factor[n]);
    }
    static_cast<T*>(a.grad_gain)[i] = narrow<T>(A(sum));
  }
}

}  // namespace toy_norm
}  // namespace FSS_ISA
}  // namespace fss
#endif
