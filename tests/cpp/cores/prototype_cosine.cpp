#define FSS_CORE "prototype_cosine/prototype_cosine.h"
#include "fuzz.h"

namespace fss {
namespace fuzz {

namespace core = FUZZ_ISA::prototype_cosine;

template <class T>
void one(Random& random) {
  using A = accumulate_t<T>;
  const int64_t batch = random.below(20) == 0 ? 0 : random.size(4);
  int64_t channels, pixels, count;
  do {
    channels = random.size(5000), pixels = random.size(4500), count = random.size(9);
  } while (batch * channels * pixels * (count + 1) > 300000);
  const double eps = random.pick({1e-8, 1e-2, 2.0}), scale = random.pick({1.0, 20.0});
  const bool add = random.chance(50), past = random.chance(50), last = random.chance(50);
  const bool want_features = random.chance(80), want_prototypes = !want_features || random.chance(80);
  const int64_t shift = random.below(4);
  const Samples samples(random, batch, channels * pixels, std::max(channels, count) * std::max(pixels, count));
  const int64_t apart = samples.apart, sets = batch > 0 && apart == 1 && random.chance(30) ? 1 : batch;
  note("sets", sets, "P", count, "C", channels, "N", pixels, "eps", eps, add ? "add" : "clamp", "stream", past,
       "gradients", want_features, want_prototypes);
  const Features<T> x(random, batch, channels, pixels, last, 1, apart);
  const Array<T> prototypes({sets, count, channels}, 0xff, 1, apart), grad({batch, count, pixels}, 0xff, 1, apart);
  prototypes.each([&](T& v) { v = number<T>(2 * random.real() - 1); });
  grad.each([&](T& v) { v = number<T>(2 * random.real() - 1); });
  if (batch > 0 && random.chance(30)) {  // vectors of zeros
    const int64_t b = random.below(batch), n = random.below(pixels), p = random.below(count);
    for (int64_t c = 0; c < channels; ++c) x(b, c, n) = prototypes(sets - 1, p, c) = T{};
  }
  const int64_t padded = ceil_div(channels, prototype_cosine::kPadding) * prototype_cosine::kPadding;

  struct Results {
    Array<A> units, norms, cosines, coefficients, slopes;
    std::unique_ptr<Array<A>> sums;
    Array<T> scores;
    Dense<T> grad_features;
    Array<T> grad_prototypes;
  };
  const auto calculate = [&](int threads, int fill) {
    prototype_cosine::CosineArgs args{};
    args.batch = samples.batch(), args.sets = sets == batch ? args.batch : 1, args.prototypes = count,
    args.channels = channels, args.pixels = pixels;
    args.scale = scale, args.eps = eps, args.add = add, args.padded = padded, args.channels_last = last;
    args.columns = batch == 0 ? 32 : prototype_cosine::columns_for(pixels, args.batch, 2 * threads);
    auto r = std::unique_ptr<Results>(new Results{
        {{sets, count, padded}, fill, 1, apart},
        {{batch, pixels}, fill, 1, apart},
        {{batch, count, pixels}, fill, 1, apart},
        {{batch, count, pixels}, fill, 1, apart},
        {{batch, pixels}, fill, 1, apart},
        std::make_unique<Array<A>>(std::vector<int64_t>{batch, pieces(args), count, channels}, fill, 1, apart),
        {{batch, count, pixels}, fill, 1, apart},
        {batch, channels, pixels, last, fill, shift, apart},
        {{sets, count, channels}, fill, 1, apart}});
    args.features = x.array.data, args.stride_b = x.stride_b, args.stride_row = x.stride_row;
    args.weights = prototypes.data, args.units = r->units.data, args.norms = r->norms.data;
    args.cosines = r->cosines.data, args.scores = r->scores.data, args.grad = grad.data;
    args.coefficients = r->coefficients.data, args.slopes = r->slopes.data, args.stream = past;
    if (want_features) args.grad_features = r->grad_features.array.data;
    if (want_prototypes) args.sums = r->sums->data, args.grad_prototypes = r->grad_prototypes.data;
    const auto step = [&](int64_t tasks, auto f) {
      samples.run(tasks, threads, [&](int64_t begin, int64_t end) { f(args, begin, end); });
    };
    step(unit_tasks(args), core::normalise_prototypes<T>);
    step(score_tasks(args), core::scores<T>);
    step(coefficient_tasks(args), core::coefficients<T>);
    step(gradient_tasks(args), core::gradients<T>);
    if (want_prototypes) step(unit_tasks(args), core::grad_prototypes<T>);
    return r;
  };
  const auto r = calculate(1, 0xff), other = calculate(4, 0x5a);
  same("units", r->units, other->units), same("norms", r->norms, other->norms);
  same("cosines", r->cosines, other->cosines), same("scores", r->scores, other->scores);
  same("coefficients", r->coefficients, other->coefficients), same("slopes", r->slopes, other->slopes);
  if (want_features) same("grad_features", r->grad_features.array, other->grad_features.array);
  if (want_prototypes) same("sums", *r->sums, *other->sums);
  if (want_prototypes) same("grad_prototypes", r->grad_prototypes, other->grad_prototypes);

  const auto divisor = [&](double norm) { return norm == 0 ? HUGE_VAL : add ? norm + eps : std::max(norm, eps); };
  const auto slope = [&](double norm) {  // of x / N(|x|) along x
    return norm == 0 || (!add && norm <= eps) ? 0.0 : 1 / (norm * divisor(norm));
  };
  const auto norm_of = [&](const auto& element) {
    double squares = 0;
    for (int64_t c = 0; c < channels; ++c) squares += element(c) * element(c);
    return std::sqrt(squares);
  };
  std::vector<Doubles> total(size_t(sets * count), Doubles(channels)), total_size(total);  // dL/du
  std::vector<double> lengths;
  for (int64_t i = 0; i < sets * count; ++i) {
    lengths.push_back(norm_of([&](int64_t c) { return value(prototypes(i / count, i % count, c)); }));
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t set = sets == 1 ? 0 : b;
    for (int64_t n = 0; n < pixels; ++n) {
      const double norm = norm_of([&](int64_t c) { return value(x(b, c, n)); }), inverse = 1 / divisor(norm);
      close("norm", r->norms(b, n), norm, norm);
      double along = 0, along_size = 0;
      for (int64_t p = 0; p < count; ++p) {
        const double u = 1 / divisor(lengths[size_t(set * count + p)]), g = value(grad(b, p, n));
        double dot = 0, size = 0;
        for (int64_t c = 0; c < channels; ++c) {
          const double term = value(x(b, c, n)) * value(prototypes(set, p, c)) * u * inverse;
          dot += term, size += std::abs(term);
          total[size_t(set * count + p)][c] += scale * g * inverse * value(x(b, c, n));
          total_size[size_t(set * count + p)][c] += std::abs(scale * g * inverse * value(x(b, c, n)));
        }
        close("cosine", r->cosines(b, p, n), dot, size);
        close("score", r->scores(b, p, n), scale * dot, scale * size);
        along += scale * g * dot * slope(norm), along_size += std::abs(scale * g) * size * slope(norm);
      }
      for (int64_t c = 0; want_features && c < channels; ++c) {
        double want = -along * value(x(b, c, n)), size = along_size * std::abs(value(x(b, c, n)));
        for (int64_t p = 0; p < count; ++p) {
          const double u = value(prototypes(set, p, c)) / divisor(lengths[size_t(set * count + p)]);
          const double term = scale * value(grad(b, p, n)) * inverse * u;
          want += term, size += std::abs(term);
        }
        close("grad_features", r->grad_features(b, c, n), want, size);
      }
    }
  }
  for (int64_t i = 0; want_prototypes && i < sets * count; ++i) {
    const double inverse = 1 / divisor(lengths[size_t(i)]);
    double dot = 0, dot_size = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const double w = value(prototypes(i / count, i % count, c));
      dot += w * total[size_t(i)][c], dot_size += std::abs(w) * total_size[size_t(i)][c];
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double w = value(prototypes(i / count, i % count, c)) * slope(lengths[size_t(i)]) * inverse;
      close("grad_prototypes", r->grad_prototypes(i / count, i % count, c), total[size_t(i)][c] * inverse - dot * w,
            total_size[size_t(i)][c] * inverse + dot_size * std::abs(w));
    }
  }
}

}  // namespace fuzz
}  // namespace fss

int main(int argc, char** argv) {
  using namespace fss;
  return fuzz::cases<FUZZ_TYPES>("prototype_cosine", argc, argv,
                                 [](auto x, fuzz::Random& random) { fuzz::one<decltype(x)>(random); });
}
