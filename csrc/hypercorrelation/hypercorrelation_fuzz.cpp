#define FSS_CORE "hypercorrelation/hypercorrelation.h"
#include "fuzz.h"

namespace fss {
namespace fuzz {

namespace core = FUZZ_ISA::hypercorrelation;
using hypercorrelation::Args;

template <class T>
void one(Random& random) {
  using A = accumulate_t<T>;
  const int64_t batch = random.below(20) == 0 ? 0 : random.size(4);
  int64_t channels, query_pixels, support_pixels;
  do {
    channels = random.size(2000), query_pixels = random.size(700), support_pixels = random.size(700);
  } while (batch * channels * query_pixels * support_pixels > 700000);
  const double eps = random.pick({1e-8, 1e-2, 2.0});
  const bool add = random.chance(50), clamp = random.chance(70), past = sizeof(T) >= 4 && random.chance(50);
  const bool want_query = random.chance(80), want_support = !want_query || random.chance(80);
  const Samples samples(random, batch, query_pixels * support_pixels,
                        channels * std::max(query_pixels, support_pixels));
  const int64_t apart = samples.apart, shift = random.below(4);
  const int64_t group = apart > 1 ? 1 : random.size(std::max<int64_t>(batch, 1));
  note("C", channels, "query", query_pixels, "support", support_pixels, "eps", eps, add ? "add" : "clamp", "max", clamp,
       "stream", past, "gradients", want_query, want_support, "samples", group);
  const Features<T> query(random, batch, channels, query_pixels, random.chance(50), 1, apart);
  const Features<T> support(random, batch, channels, support_pixels, random.chance(50), 1, apart);
  const Array<A> weights({batch, support_pixels}, 0xff, 1, apart);
  const int density = int(random.pick({0, 5, 50, 100}));
  weights.each([&](A& w) { w = random.chance(density) ? A(random.chance(50) ? 1 : random.real()) : A(0); });
  // (B, layers, Na, Nb), one layer of which is ours
  const int64_t rows = query_pixels * support_pixels;
  const std::vector<int64_t> strides{apart > 1 ? rows * apart
                                     : random.chance(10)
                                         ? kFar
                                         : rows * random.size(3) + (random.chance(20) ? random.below(9) : 0),
                                     support_pixels, 1};
  const std::vector<int64_t> sizes{batch, query_pixels, support_pixels};
  const Array<T> grad(sizes, strides, random.below(4), 0xff);
  grad.each([&](T& v) { v = number<T>(2 * random.real() - 1); });
  if (batch > 0 && random.chance(30)) {  // vectors of zeros, and one that the mask leaves out and that is not finite
    const int64_t b = random.below(batch), i = random.below(query_pixels), j = random.below(support_pixels);
    for (int64_t c = 0; c < channels; ++c) query(b, c, i) = support(b, c, j) = T{};
    const int64_t dropped = random.below(support_pixels);
    if (support.stride_b != 0 && support.stride_row != 0 && weights(b, dropped) == 0) {
      support(b, random.below(channels), dropped) = number<T>(random.chance(50) ? NAN : HUGE_VAL);
    }
  }

  struct Results {
    Array<A> query_norms, support_norms;
    Array<T> out;
    Array<uint8_t> signs;
    Dense<T> grad_query, grad_support;
  };
  const int64_t sign_bytes = (support_pixels + 7) / 8;
  const auto calculate = [&](int threads, int fill) {
    auto r = std::unique_ptr<Results>(
        new Results{{{batch, query_pixels}, fill, 1, apart},
                    {{batch, support_pixels}, fill, 1, apart},
                    {sizes, strides, shift, fill},
                    {{batch, query_pixels, clamp ? sign_bytes : 0}, fill, 1, apart},
                    {batch, channels, query_pixels, query.channels_last, fill, shift, apart},
                    {batch, channels, support_pixels, support.channels_last, fill, shift, apart}});
    Args args{};
    args.batch = samples.batch(), args.channels = channels;
    args.query = {query.array.data, query.channels_last, query.stride_b, query.stride_row,
                  query_pixels,     r->query_norms.data, nullptr,        nullptr};
    args.support = {support.array.data, support.channels_last, support.stride_b, support.stride_row,
                    support_pixels,     r->support_norms.data, weights.data,     nullptr};
    args.eps = eps, args.add = add, args.clamp = clamp, args.stream = past;
    args.out = r->out.data, args.out_stride_b = strides[0] / apart, args.signs = clamp ? r->signs.data : nullptr;
    args.grad = grad.data;
    const auto each_group = [&](int64_t elements, const auto& f) {
      const Array<A> packed({std::min(group, batch) * elements}, fill, 0);
      args.packed = packed.data;
      for (args.first = 0; args.first < args.batch; args.first += group * apart) {
        args.samples = std::min(group, args.batch - args.first);
        f();
      }
      packed.check_canaries("packed");
    };
    const auto step = [&](int64_t tasks, auto f) {
      run(tasks, threads, [&](int64_t begin, int64_t end) { f(args, begin, end); });
    };
    each_group(core::packed_support<A>(args), [&] {
      step(core::support_tasks<A>(args), core::pack_support<T>);
      step(correlate_tasks(args, sizeof(A)), core::correlate<T>);
    });
    if (want_query) args.query.gradient = r->grad_query.array.data;
    if (want_support) args.support.gradient = r->grad_support.array.data;
    const int64_t packed = (want_support ? core::packed_operand<A>(args, args.query) : 0) +
                           (want_query ? core::packed_operand<A>(args, args.support) : 0);
    each_group(packed, [&] {
      step(args.samples, core::find_scales<A>);
      step(core::channel_tasks<A>(args) * (want_query + want_support), core::pack_operands<T>);
      step(gradient_tasks(args, args.query, sizeof(A)) + gradient_tasks(args, args.support, sizeof(A)),
           core::gradients<T>);
    });
    return r;
  };
  const auto r = calculate(1, 0xff), other = calculate(4, 0x5a);
  same("query_norms", r->query_norms, other->query_norms);
  same("support_norms", r->support_norms, other->support_norms);
  same("out", r->out, other->out), same("signs", r->signs, other->signs);
  if (want_query) same("grad_query", r->grad_query.array, other->grad_query.array);
  if (want_support) same("grad_support", r->grad_support.array, other->grad_support.array);

  for (int64_t b = 0; b < batch; ++b) {
    // features with their weight inside, and what multiplies a vector: 1 / N(|m x|), and its projection
    const auto left = [&](int64_t c, int64_t i) { return value(query(b, c, i)); };
    const auto right = [&](int64_t c, int64_t j) {
      return weights(b, j) == 0 ? 0 : double(weights(b, j)) * value(support(b, c, j));
    };
    const auto norms_of = [&](int64_t pixels, const auto& element) {
      Doubles norms(pixels);
      for (int64_t n = 0; n < pixels; ++n) {
        for (int64_t c = 0; c < channels; ++c) norms[n] += element(c, n) * element(c, n);
        norms[n] = std::sqrt(norms[n]);
      }
      return norms;
    };
    Doubles query_norms = norms_of(query_pixels, left), support_norms = norms_of(support_pixels, right);
    const auto inverse = [&](double norm) { return norm == 0 ? 0 : 1 / (add ? norm + eps : std::max(norm, eps)); };
    const auto slope = [&](double norm) {
      return norm == 0 || (!add && norm <= eps) ? 0 : inverse(norm) * inverse(norm) / norm;
    };
    for (int64_t i = 0; i < query_pixels; ++i)
      close("query_norm", r->query_norms(b, i), query_norms[i], query_norms[i]);
    for (int64_t j = 0; j < support_pixels; ++j) {
      close("support_norm", r->support_norms(b, j), support_norms[j], support_norms[j]);
    }
    Doubles live(rows);
    for (int64_t i = 0; i < query_pixels; ++i) {
      for (int64_t j = 0; j < support_pixels; ++j) {
        double dot = 0, size = 0;
        for (int64_t c = 0; c < channels; ++c) {
          const double term = left(c, i) * inverse(query_norms[i]) * right(c, j) * inverse(support_norms[j]);
          dot += term, size += std::abs(term);
        }
        close("out", r->out(b, i, j), clamp ? std::max(dot, 0.0) : dot, size);
        const bool sign = !clamp || (r->signs(b, i, j / 8) >> j % 8 & 1) != 0;
        if (clamp && std::abs(dot) > 1e-4 * size && sign != (dot > 0)) fail("signs disagree");
        live[i * support_pixels + j] = sign ? value(grad(b, i, j)) : 0;
      }
    }
    const auto check = [&](const char* what, const Dense<T>& got, int64_t pixels, const auto& x, Doubles& norms,
                           const auto& weight, int64_t others, const auto& y, Doubles& other_norms, int64_t step,
                           int64_t other_step) {
      for (int64_t n = 0; n < pixels; ++n) {
        Doubles d(channels), sizes(channels);
        double along = 0, along_size = 0;
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t o = 0; o < others; ++o) {
            const double term = live[n * step + o * other_step] * y(c, o) * inverse(other_norms[o]);
            d[c] += term, sizes[c] += std::abs(term);
          }
          along += x(c, n) * d[c], along_size += std::abs(x(c, n)) * sizes[c];
        }
        const double w = weight(n), u = inverse(norms[n]), s = slope(norms[n]);
        for (int64_t c = 0; c < channels; ++c) {
          close(what, got(b, c, n), w * (u * d[c] - s * along * x(c, n)),
                w * (u * sizes[c] + s * along_size * std::abs(x(c, n))));
        }
      }
    };
    if (want_query) {
      check(
          "grad_query", r->grad_query, query_pixels, left, query_norms, [](int64_t) { return 1.0; }, support_pixels,
          right, support_norms, support_pixels, 1);
    }
    if (want_support) {
      check(
          "grad_support", r->grad_support, support_pixels, right, support_norms,
          [&](int64_t j) { return double(weights(b, j)); }, query_pixels, left, query_norms, 1, support_pixels);
    }
  }
}

}  // namespace fuzz
}  // namespace fss

int main(int argc, char** argv) {
  using namespace fss;
  return fuzz::cases<FUZZ_TYPES>("hypercorrelation", argc, argv,
                                 [](auto x, fuzz::Random& random) { fuzz::one<decltype(x)>(random); });
}
