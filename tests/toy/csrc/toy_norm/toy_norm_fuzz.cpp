#define FSS_CORE "toy_norm/toy_norm.h"
#include "fuzz.h"

namespace fss {
namespace fuzz {

namespace core = FUZZ_ISA::toy_norm;

template <class T>
toy_norm::Map map_of(T* data, int64_t stride_b, int64_t stride_row, bool last) {
  return {data, stride_b, last ? 1 : stride_row, last ? stride_row : 1};
}

template <class T>
void one(Random& random) {
  using A = accumulate_t<T>;
  const int64_t batch = random.below(20) == 0 ? 0 : random.size(4), channels = random.size(100);
  const int64_t pixels = random.size(500);
  const double eps = random.pick({1e-5, 0.25});
  const bool last = random.chance(50);
  note("B", batch, "C", channels, "N", pixels, "eps", eps);
  const Features<T> x(random, batch, channels, pixels, last);
  const Array<T> gain({batch, channels}, 0xff), grad({batch, channels, pixels}, 0xff);
  gain.each([&](T& v) { v = number<T>(2 * random.real() - 1); });
  grad.each([&](T& v) { v = number<T>(2 * random.real() - 1); });

  struct Results {
    Array<A> factor;
    Dense<T> out, grad_features;
    Array<T> grad_gain;
  };
  const auto calculate = [&](int threads, int fill) {
    auto r = std::unique_ptr<Results>(new Results{{{batch, pixels}, fill},
                                                  {batch, channels, pixels, last, fill, 1},
                                                  {batch, channels, pixels, last, fill, 1},
                                                  {{batch, channels}, fill}});
    const int64_t row = last ? channels : pixels;
    toy_norm::Args args{};
    args.channels = channels, args.pixels = pixels, args.eps = eps;
    args.x = map_of(x.array.data, x.stride_b, x.stride_row, last);
    args.out = map_of(r->out.array.data, channels * pixels, row, last);
    args.grad = map_of(grad.data, channels * pixels, pixels, false);
    args.grad_x = map_of(r->grad_features.array.data, channels * pixels, row, last);
    args.gain = gain.data, args.grad_gain = r->grad_gain.data, args.factor = r->factor.data;
    const auto step = [&](int64_t tasks, auto f) {
      run(tasks, threads, [&](int64_t begin, int64_t end) { f(args, begin, end); });
    };
    step(batch * pixels, core::forward<T>);
    step(batch * pixels, core::grad_features<T>);
    step(batch * channels, core::grad_gain<T>);
    return r;
  };
  const auto r = calculate(1, 0xff), other = calculate(4, 0x5a);
  same("factor", r->factor, other->factor), same("out", r->out.array, other->out.array);
  same("grad_features", r->grad_features.array, other->grad_features.array);
  same("grad_gain", r->grad_gain, other->grad_gain);

  for (int64_t b = 0; b < batch; ++b) {
    Doubles to_gain(channels), to_gain_size(channels);
    for (int64_t n = 0; n < pixels; ++n) {
      double squares = 0, dot = 0, dot_size = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const double term = value(gain(b, c)) * value(grad(b, c, n)) * value(x(b, c, n));
        squares += value(x(b, c, n)) * value(x(b, c, n)), dot += term, dot_size += std::abs(term);
      }
      const double factor = 1 / std::sqrt(squares / double(channels) + eps), cube = factor * factor * factor;
      for (int64_t c = 0; c < channels; ++c) {
        const double v = value(x(b, c, n)), k = value(gain(b, c)), g = value(grad(b, c, n));
        close("out", r->out(b, c, n), k * v * factor, 0);
        close("grad_features", r->grad_features(b, c, n), k * g * factor - v * cube * dot / double(channels),
              std::abs(k * g * factor) + std::abs(v) * cube * dot_size / double(channels));
        to_gain[c] += g * v * factor, to_gain_size[c] += std::abs(g * v * factor);
      }
    }
    for (int64_t c = 0; c < channels; ++c) close("grad_gain", r->grad_gain(b, c), to_gain[c], to_gain_size[c]);
  }
}

}  // namespace fuzz
}  // namespace fss

int main(int argc, char** argv) {
  using namespace fss;
  return fuzz::cases<FUZZ_TYPES>("toy_norm", argc, argv,
                                 [](auto x, fuzz::Random& random) { fuzz::one<decltype(x)>(random); });
}
