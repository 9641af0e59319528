#define FSS_CORE "masked_avg_pool/masked_avg_pool.h"
#include "fuzz.h"

namespace fss {
namespace fuzz {

namespace core = FUZZ_ISA::masked_avg_pool;

// R(source -> target) as a matrix, by the definition.
std::vector<Doubles> matrix(int64_t source, int64_t target, bool nearest, bool align_corners) {
  std::vector<Doubles> result;
  for (int64_t i = 0; i < target; ++i) {
    Doubles row(source);
    double at = nearest         ? double(i * source / target)
                : align_corners ? double(i) * double(source - 1) / double(std::max<int64_t>(target - 1, 1))
                                : std::max(double(2 * i + 1) * double(source) / double(2 * target) - 0.5, 0.0);
    at = std::min(at, double(source - 1));
    const int64_t low = int64_t(at);
    row[low] += 1 - (at - double(low));
    row[std::min(low + 1, source - 1)] += at - double(low);
    result.push_back(row);
  }
  return result;
}

struct Mode {
  bool nearest, align_corners, transposed;
};

// target (B, M, H, W) = R source (B, M, h, w), by the core and by two matrices.
template <class S, class D>
void resize(const Array<S>& source, const Array<D>& target, const std::vector<int64_t>& from,
            const std::vector<int64_t>& to, const Samples& samples, int64_t masks, Mode mode, int threads) {
  ResizeArgs args{};
  args.source = source.data;
  args.stride_b = source.strides()[0] / samples.apart, args.stride_m = source.strides()[1],
  args.stride_h = source.strides()[2];
  args.source_height = from[0], args.source_width = from[1];
  args.target = target.data, args.target_height = to[0], args.target_width = to[1];
  args.masks = masks;
  args.nearest = mode.nearest, args.align_corners = mode.align_corners, args.transposed = mode.transposed;
  samples.run(samples.batch() * masks, threads,
              [&](int64_t begin, int64_t end) { FUZZ_ISA::resize<S, D>(args, begin, end); });
  if (threads > 1) return;
  std::vector<Doubles> r[2];
  for (size_t d : {0, 1}) {
    r[d] = mode.transposed ? matrix(to[d], from[d], mode.nearest, mode.align_corners)
                           : matrix(from[d], to[d], mode.nearest, mode.align_corners);
  }
  const auto weight = [&](size_t d, int64_t out, int64_t in) {
    return mode.transposed ? r[d][size_t(in)][out] : r[d][size_t(out)][in];
  };
  for (int64_t b = 0; b < samples.count; ++b) {
    for (int64_t m = 0; m < masks; ++m) {
      for (int64_t y = 0; y < to[0]; ++y) {
        Doubles line(from[1]), sizes(from[1]);
        for (int64_t i = 0; i < from[0]; ++i) {
          const double w = weight(0, y, i);
          for (int64_t j = 0; w != 0 && j < from[1]; ++j) {
            line[j] += w * value(source(b, m, i, j)), sizes[j] += w * std::abs(value(source(b, m, i, j)));
          }
        }
        for (int64_t x = 0; x < to[1]; ++x) {
          double want = 0, size = 0;
          for (int64_t j = 0; j < from[1]; ++j) {
            want += weight(1, x, j) * line[j], size += weight(1, x, j) * sizes[j];
          }
          if (std::isfinite(size)) close("resized", target(b, m, y, x), want, size);
        }
      }
    }
  }
}

template <class T, class S>
void one(Random& random) {
  using A = accumulate_t<T>;
  const int64_t batch = random.below(20) == 0 ? 0 : random.size(5), masks = random.below(20) == 0 ? 0 : random.size(5);
  int64_t channels, height, width;
  do {
    channels = random.size(600), height = random.size(70), width = random.size(70);
  } while (batch * channels * height * width * (masks + 1) > 200000);
  const int64_t h = random.chance(30) ? height : random.size(40), w = random.chance(30) ? width : random.size(40);
  const Mode mode{random.chance(30), random.chance(50), random.chance(30)};
  const double eps = random.pick({0.0, 5e-4, 1.0});
  const bool past = random.chance(50), last = random.chance(50);
  const int64_t pixels = height * width, shift = random.below(4);
  const Samples samples(random, batch, channels * pixels, std::max(channels, masks) * std::max(pixels, h * (w + 2)));
  const int64_t apart = samples.apart;
  note("M", masks, "C", channels, "grid", height, width, "mask", h, w, "eps", eps, "stream", past);
  const Features<T> x(random, batch, channels, pixels, last, 1, apart);
  const int64_t row = w + random.below(3), plane = apart == 1 && random.chance(10) ? kFar : h * row + random.below(3);
  const Array<S> mask({batch, masks, h, w}, {plane * masks * apart, plane, row, 1}, random.below(4), 0xff);
  const int density = int(random.pick({0, 5, 50, 100}));
  mask.each([&](S& v) {
    const bool on = random.chance(density);
    if constexpr (std::is_same_v<S, uint8_t>) {
      v = on;
    } else {
      v = number<S>(on ? random.real() : 0.0);
    }
  });
  const Array<T> grad({batch, masks, channels}, 0xff, 1, apart);
  grad.each([&](T& v) { v = number<T>(2 * random.real() - 1); });
  for (int i = 0; batch > 0 && random.chance(30) && i < 5; ++i) {  // counts for the masks that see it
    x(random.below(batch), random.below(channels), random.below(pixels)) =
        number<T>(random.chance(50) ? NAN : HUGE_VAL);
  }

  struct Results {
    Array<A> resized, area, moments;
    Array<T> pooled;
    Dense<T> grad_features;
    Array<T> grad_mask;
  };
  const auto calculate = [&](int threads, int fill) {
    auto r = std::unique_ptr<Results>(new Results{{{batch, masks, height, width}, fill, 1, apart},
                                                  {{batch, masks}, fill, 1, apart},
                                                  {{batch, masks, height, width}, fill, 1, apart},
                                                  {{batch, masks, channels}, fill, 1, apart},
                                                  {batch, channels, pixels, last, fill, shift, apart},
                                                  {{batch, masks, h, w}, fill, 1, apart}});
    resize(mask, r->resized, {h, w}, {height, width}, samples, masks, mode, threads);
    masked_avg_pool::PoolArgs args{};
    args.batch = samples.batch(), args.masks = masks, args.channels = channels, args.pixels = pixels, args.eps = eps;
    args.features = x.array.data, args.channels_last = last, args.stride_b = x.stride_b, args.stride_row = x.stride_row;
    args.weights = r->resized.data, args.area = r->area.data, args.pooled = r->pooled.data, args.grad = grad.data;
    args.grad_features = r->grad_features.array.data, args.stream = past, args.moments = r->moments.data;
    const auto step = [&](int64_t tasks, auto f) {
      samples.run(tasks, threads, [&](int64_t begin, int64_t end) { f(args, begin, end); });
    };
    step(args.batch * masks, core::sum_weights<A>);
    step(pool_tasks(args), core::pool<T>);
    step(grad_features_tasks(args), core::grad_features<T>);
    step(moments_tasks(args), core::moments<T>);
    step(args.batch * masks, core::grad_weights<A>);
    if constexpr (!std::is_same_v<S, uint8_t>) {
      resize(r->moments, r->grad_mask, {height, width}, {h, w}, samples, masks,
             {mode.nearest, mode.align_corners, !mode.transposed}, threads);
    } else {
      r->grad_mask.each([](T& v) { v = T{}; });
    }
    return r;
  };
  const auto r = calculate(1, 0xff), other = calculate(4, 0x5a);
  same("resized", r->resized, other->resized), same("area", r->area, other->area);
  same("pooled", r->pooled, other->pooled);
  same("grad_features", r->grad_features.array, other->grad_features.array);
  same("grad_weights", r->moments, other->moments), same("grad_mask", r->grad_mask, other->grad_mask);

  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t m = 0; m < masks; ++m) {
      const A* weights = &r->resized(b, m, 0, 0);
      const double area = std::accumulate(weights, weights + pixels, 0.0), d = double(r->area(b, m) + A(eps));
      close("area", r->area(b, m), area, area);
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0, size = 0;
        for (int64_t n = 0; n < pixels; ++n) {
          const double term = weights[n] == 0 ? 0 : double(weights[n]) * value(x(b, c, n));
          sum += term, size += std::abs(term);
        }
        close("pooled", r->pooled(b, m, c), d == 0 ? 0 : sum / d, d == 0 ? 0 : size / d);
      }
      Doubles t(pixels), sizes(pixels);
      double mean = 0, mean_size = 0;
      for (int64_t n = 0; n < pixels; ++n) {
        for (int64_t c = 0; c < channels; ++c) {
          const double v = value(x(b, c, n)),
                       term = weights[n] == 0 && !std::isfinite(v) ? 0 : value(grad(b, m, c)) * v;
          t[n] += term, sizes[n] += std::abs(term);
        }
        mean += double(weights[n]) * t[n], mean_size += double(weights[n]) * sizes[n];
      }
      for (int64_t n = 0; n < pixels; ++n) {
        close("grad_weights", (&r->moments(b, m, 0, 0))[n], d == 0 ? 0 : (t[n] - mean / d) / d,
              d == 0 ? 0 : (sizes[n] + mean_size / d) / d);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t n = 0; n < pixels; ++n) {
        double want = 0, size = 0;
        for (int64_t m = 0; m < masks; ++m) {
          const double d = double(r->area(b, m) + A(eps));
          const double term = d == 0 ? 0 : value(grad(b, m, c)) / d * double((&r->resized(b, m, 0, 0))[n]);
          want += term, size += std::abs(term);
        }
        close("grad_features", r->grad_features(b, c, n), want, size);
      }
    }
  }
}

}  // namespace fuzz
}  // namespace fss

int main(int argc, char** argv) {
  using namespace fss;
  return fuzz::cases<FUZZ_TYPES>("masked_avg_pool", argc, argv, [](auto x, fuzz::Random& random) {
    random.chance(50) ? fuzz::one<decltype(x), uint8_t>(random) : fuzz::one<decltype(x), decltype(x)>(random);
  });
}
