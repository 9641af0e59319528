#define FSS_CORE "dynamic_conv2d/dynamic_conv2d.h"
#include "fuzz.h"

namespace fss {
namespace fuzz {

namespace core = FUZZ_ISA::dynamic_conv2d;
using dynamic_conv2d::Branch;
using dynamic_conv2d::ConvArgs;
using dynamic_conv2d::Cross;
using dynamic_conv2d::Shift;

struct Size {
  int64_t height, width;
};

// The taps of every output, and for every element of every kernel its tap: what the host gives the core.
struct Plan {
  std::vector<Shift> taps;
  std::vector<int64_t> first{0};
  std::vector<std::vector<int64_t>> tap_of;
  int64_t rows = 0, columns = 0;
  bool cross = false;
  Cross sizes{-1, -1, -1};

  Plan(const std::vector<Size>& kernels, bool merge) {
    const auto before = [](const Shift& a, const Shift& b) {
      return std::pair(a.row, a.column) < std::pair(b.row, b.column);
    };
    for (const Size& k : kernels) {
      rows = std::max(rows, k.height / 2), columns = std::max(columns, k.width / 2);
      for (int64_t i = 0; i < k.height * k.width; ++i) taps.push_back(shift(k, i));
      if (!merge) first.push_back(int64_t(taps.size()));
    }
    if (merge) {  // one output: every position that some kernel covers
      std::sort(taps.begin(), taps.end(), before);
      taps.erase(std::unique(taps.begin(), taps.end(), [&](auto& a, auto& b) { return !before(a, b); }), taps.end());
      first.push_back(int64_t(taps.size()));
    }
    for (size_t l = 0; l < kernels.size(); ++l) {
      tap_of.emplace_back();
      for (int64_t i = 0; i < kernels[l].height * kernels[l].width; ++i) {
        const auto at = std::lower_bound(taps.begin(), taps.end(), shift(kernels[l], i), before);
        tap_of.back().push_back(merge ? at - taps.begin() : first[l] + i);
      }
    }
    if (rows != 2 || columns != 2 || (outputs() != 1 && outputs() != 3)) return;
    for (int64_t o = 0; o < outputs(); ++o) {
      const int64_t begin = first[size_t(o)], count = first[size_t(o) + 1] - begin;
      if (count == 25) sizes.square = begin;
      if (count == 5) (taps[size_t(begin)].row == 0 ? sizes.horizontal : sizes.vertical) = begin;
    }
    cross = sizes.square >= 0 && (outputs() == 1 || (sizes.vertical >= 0 && sizes.horizontal >= 0));
  }
  int64_t outputs() const { return int64_t(first.size()) - 1; }
  static Shift shift(const Size& k, int64_t i) { return {i / k.width - k.height / 2, i % k.width - k.width / 2}; }
};

template <class T>
void one(Random& random) {
  using A = accumulate_t<T>;
  std::vector<Size> kernels{{5, 5}, {5, 1}, {1, 5}};
  std::shuffle(kernels.begin(), kernels.end(), random.engine);
  if (random.chance(25)) kernels = {{5, 5}};
  if (random.chance(50)) {
    kernels.resize(size_t(random.size(3)));
    for (Size& k : kernels) k = {2 * random.below(5) + 1, 2 * random.below(5) + 1};
  }
  const Plan plan(kernels, random.chance(30));
  const int64_t outputs = plan.outputs(), taps = int64_t(plan.taps.size());
  const int64_t batch = random.below(20) == 0 ? 0 : random.size(4);
  int64_t channels, height, width;
  do {
    channels = random.size(100), height = random.size(150), width = random.size(200);
  } while (batch * channels * height * width * taps > 400000);
  const int64_t pixels = height * width, shift = random.chance(50) ? 0 : random.below(4);
  const bool past = random.chance(50), last = random.chance(50);
  const bool want_x = random.chance(80), want_kernels = !want_x || random.chance(80);
  const Samples samples(random, batch, channels * pixels, channels * pixels);
  const int64_t apart = samples.apart;
  note("C", channels, "grid", height, width, "outputs", outputs, "stream", past, "gradients", want_x, want_kernels,
       "kernels");
  for (const Size& k : kernels) note(k.height, 'x', k.width);
  const Features<T> x(random, batch, channels, pixels, last, 1, apart);
  const Features<T> grad(random, batch, outputs * channels, pixels, last, 1, apart);
  std::vector<std::unique_ptr<Array<T>>> sources;
  std::vector<std::vector<int64_t>> strides;
  for (const Size& k : kernels) {  // (B, C, height, width), dimensions in any order, with gaps
    const std::vector<int64_t> sizes{batch, channels, k.height, k.width};
    std::vector<size_t> order{0, 1, 2, 3};
    if (random.chance(50)) std::shuffle(order.begin(), order.end(), random.engine);
    std::vector<int64_t> steps(4);
    int64_t step = random.size(3);
    for (size_t d = 4; d-- > 0;) {
      steps[order[d]] = step;
      step = std::max<int64_t>(step * sizes[order[d]], 1) + (random.chance(30) ? random.below(5) : 0);
    }
    if (apart == 1 && random.chance(5)) steps[random.chance(50) && channels <= 8 ? 1 : 0] = step + kFar;
    if (apart > 1) steps = Array<T>::dense(sizes, apart);
    strides.push_back(steps);
    sources.push_back(std::make_unique<Array<T>>(sizes, steps, random.below(4), 0xff));
    sources.back()->each([&](T& v) { v = number<T>(2 * random.real() - 1); });
  }

  struct Results {
    Array<A> taps;
    Dense<T> out, grad_x;
    Array<A> grad_taps;
    std::vector<std::unique_ptr<Array<T>>> grad_kernels;
  };
  const auto calculate = [&](int threads, int fill) {
    auto r = std::unique_ptr<Results>(new Results{{{batch, channels, taps}, fill, 1, apart},
                                                  {batch, outputs * channels, pixels, last, fill, shift, apart},
                                                  {batch, channels, pixels, last, fill, shift, apart},
                                                  {{batch, channels, taps}, fill, 1, apart},
                                                  {}});
    std::vector<Branch> from, to;
    for (size_t l = 0; l < kernels.size(); ++l) {
      const Size& k = kernels[l];
      const std::vector<int64_t>& s = strides[l];
      from.push_back({sources[l]->data, s[0] / apart, s[1], s[2], s[3], k.height, k.width, plan.tap_of[l].data()});
      r->grad_kernels.push_back(
          std::make_unique<Array<T>>(std::vector<int64_t>{batch, channels, k.height, k.width}, s, 1, fill));
      to.push_back(from.back()), to.back().data = r->grad_kernels.back()->data;
    }
    ConvArgs args{};
    args.batch = samples.batch(), args.channels = channels, args.height = height, args.width = width;
    args.channels_last = last, args.stream = past;
    args.x = x.array.data, args.stride_b = x.stride_b, args.stride_row = x.stride_row;
    args.grad = grad.array.data, args.grad_stride_b = grad.stride_b, args.grad_stride_row = grad.stride_row;
    args.kernels = r->taps.data, args.out = r->out.array.data;
    if (want_x) args.grad_x = r->grad_x.array.data;
    if (want_kernels) args.grad_kernels = r->grad_taps.data;
    args.outputs = outputs, args.taps = taps, args.first = plan.first.data(), args.tap = plan.taps.data();
    args.reach_rows = plan.rows, args.reach_columns = plan.columns, args.cross = plan.cross, args.sizes = plan.sizes;
    samples.run(args.batch * channels, threads, [&](int64_t begin, int64_t end) {
      core::gather_kernels<T>(args, from.data(), int64_t(from.size()), begin, end);
    });
    samples.run(core::forward_tasks<T>(args), threads,
                [&](int64_t begin, int64_t end) { core::forward<T>(args, begin, end); });
    samples.run(core::owners<T>(args), threads,
                [&](int64_t begin, int64_t end) { core::backward<T>(args, begin, end); });
    if (want_kernels) {
      samples.run(args.batch * channels, threads, [&](int64_t begin, int64_t end) {
        core::scatter_kernels<T>(args, to.data(), int64_t(to.size()), begin, end);
      });
    }
    return r;
  };
  const auto r = calculate(1, 0xff), other = calculate(4, 0x5a);
  same("taps", r->taps, other->taps), same("out", r->out.array, other->out.array);
  if (want_x) same("grad_x", r->grad_x.array, other->grad_x.array);
  for (size_t l = 0; want_kernels && l < kernels.size(); ++l) {
    same("grad_kernels", *r->grad_kernels[l], *other->grad_kernels[l]);
  }

  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      Doubles out(outputs * pixels), out_size(outputs * pixels), grad_x(pixels), grad_x_size(pixels);
      for (size_t l = 0; l < kernels.size(); ++l) {
        const int64_t o = outputs == 1 ? 0 : int64_t(l);
        for (int64_t i = 0; i < kernels[l].height; ++i) {
          for (int64_t j = 0; j < kernels[l].width; ++j) {
            const int64_t dy = i - kernels[l].height / 2, dz = j - kernels[l].width / 2;
            const double k = value((*sources[l])(b, c, i, j));
            double sum = 0, size = 0;
            for (int64_t y = std::max<int64_t>(0, -dy); y < std::min(height, height - dy); ++y) {
              for (int64_t z = std::max<int64_t>(0, -dz); z < std::min(width, width - dz); ++z) {
                const int64_t at = y * width + z, of = (y + dy) * width + z + dz;
                const double v = value(x(b, c, of)), g = value(grad(b, o * channels + c, at));
                out[o * pixels + at] += k * v, out_size[o * pixels + at] += std::abs(k * v);
                grad_x[of] += k * g, grad_x_size[of] += std::abs(k * g);
                sum += g * v, size += std::abs(g * v);
              }
            }
            if (want_kernels) close("grad_kernels", (*r->grad_kernels[l])(b, c, i, j), sum, size);
          }
        }
      }
      for (int64_t i = 0; i < outputs * pixels; ++i) {
        close("out", r->out(b, i / pixels * channels + c, i % pixels), out[i], out_size[i]);
      }
      for (int64_t i = 0; want_x && i < pixels; ++i) close("grad_x", r->grad_x(b, c, i), grad_x[i], grad_x_size[i]);
    }
  }
}

}  // namespace fuzz
}  // namespace fss

int main(int argc, char** argv) {
  using namespace fss;
  return fuzz::cases<FUZZ_TYPES>("dynamic_conv2d", argc, argv,
                                 [](auto x, fuzz::Random& random) { fuzz::one<decltype(x)>(random); });
}
