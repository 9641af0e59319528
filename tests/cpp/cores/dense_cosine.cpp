#define FSS_CORE "dense_cosine/dense_cosine.h"
#include "fuzz.h"

namespace fss {
namespace fuzz {

namespace core = FUZZ_ISA::dense_cosine;
using dense_cosine::Args;
using dense_cosine::GradArgs;
using dense_cosine::List;
using dense_cosine::Operand;
using dense_cosine::Window;

// Whether bfloat16 products can screen the candidates: the code is part of AVX-512's.
template <class T>
constexpr bool kScreens = FSS_BFLOAT16_PRODUCTS && FUZZ_ISA::lanes<float> == 16 && !std::is_same_v<T, double>;

// The maxima of a chunk by way of the screen, or false where a match has to be done without.
template <class T>
bool screened(Args& a, int64_t blocks, bool match, int threads) {
#if FSS_BFLOAT16_PRODUCTS
  if constexpr (kScreens<T>) {
    namespace core = avx512::dense_cosine;
    const auto given_up = [&] { return std::count(a.unscreened, a.unscreened + blocks, 1) > 0; };
    if (match && given_up()) return false;
    run(blocks, threads, [&](int64_t begin, int64_t end) {
      match ? core::screened_maxima<T, true>(a, begin, end) : core::screened_maxima<T, false>(a, begin, end);
    });
    if (!match) return true;
    if (given_up()) return false;
    std::vector<int32_t> done;
    for (const bool first : {true, false}) {
      std::vector<core::RowJob> jobs = core::row_jobs(a, first, done);
      run(ceil_div(int64_t(jobs.size()), core::kPanel), threads,
          [&](int64_t begin, int64_t end) { core::rescore_rows(a, jobs, begin, end); });
      core::keep_rows(a, jobs);
    }
    a.row_blocks = 1;
    return true;
  }
#endif
  return false;
}

template <class T>
void one(Random& random) {
  using A = accumulate_t<T>;
  using I = core::integer<A>;
  const int64_t batch = random.size(2), shots = random.below(20) == 0 ? 0 : random.size(3), samples = batch * shots;
  const bool match = random.chance(40);
  std::vector<Window> windows{{1, 1}};
  if (!match && random.chance(60)) {
    windows.resize(size_t(random.size(3)));
    for (Window& w : windows) w = {2 * random.below(3) + 1, 2 * random.below(3) + 1};
  }
  const int64_t maps = int64_t(windows.size());
  Args a{};
  for (const Window& w : windows) a.up = std::max(a.up, w.up()), a.left = std::max(a.left, w.left());
  const bool summed = a.up + a.left > 0;
  int64_t channels, qh, qw, sh, sw;
  do {
    channels = random.size(1500), qh = random.size(40), qw = random.size(40), sh = random.size(40),
    sw = random.size(40);
  } while (samples * channels * qh * qw * sh * sw > 1500000);
  const int64_t nq = qh * qw, ns = sh * sw;
  a.channels = channels, a.eps = random.pick({1e-7, 1e-2, 2.0}), a.add = random.chance(50);
  a.exclude = match || random.chance(50), a.windows = windows.data(), a.maps = maps;
  a.screen = kScreens<T> && isa_supported(Isa::avx512_bf16) && !summed && random.chance(60);
  const bool want_query = random.chance(80), want_support = !want_query || random.chance(80);
  note("B", batch, "S", shots, "C", channels, "query", qh, qw, "support", sh, sw, "eps", a.eps, a.add ? "add" : "clamp",
       match       ? "match"
       : a.exclude ? "exclude"
                   : "zero",
       "screen", a.screen, "gradients", want_query, want_support, "windows");
  for (const Window& w : windows) note(w.height, 'x', w.width);
  const double scale = std::is_same_v<T, float16> ? 1 : random.pick({1.0, 1.0, 1.0, 1e-15, 1e15});
  const Features<T> query(random, batch, channels, nq, random.chance(50), scale);
  const Features<T> support(random, samples, channels, ns, random.chance(50), scale);
  const Array<uint8_t> keep({samples, ns}, 0xff);
  const int density = int(random.pick({0, 5, 50, 100}));
  keep.each([&](uint8_t& k) { k = random.chance(density); });
  if (samples > 0 && random.chance(40)) {  // a few vectors again and again: scores that nearly agree
    for (int64_t j = 0; j < nq; ++j) {
      for (int64_t c = 0; c < channels; ++c) query(0, c, j) = support(0, c, j % std::min<int64_t>(ns, 5));
    }
  }
  bool finite = true;
  if (samples > 0 && random.chance(30)) {  // vectors of zeros, and some that are not finite
    const int64_t b = random.below(batch), n = random.below(samples), j = random.below(nq), i = random.below(ns);
    for (int64_t c = 0; c < channels; ++c) query(b, c, j) = support(n, c, i) = T{};
    for (const bool left : {true, false}) {
      if (!random.chance(50)) continue;
      (left ? query(b, random.below(channels), random.below(nq))
            : support(n, random.below(channels), random.below(ns))) = number<T>(random.chance(50) ? NAN : HUGE_VAL);
      finite = false;
    }
  }
  const Array<T> grad({samples, maps, nq}, 0xff), support_grad({samples, ns}, 0xff);
  for (const Array<T>* g : {&grad, &support_grad}) g->each([&](T& v) { v = number<T>(2 * random.real() - 1); });
  const int64_t columns = core::columns_of_strip<A>(), strip_rows = core::rows_of_strip<A>();
  const int64_t chunk =
      round_up(std::min(summed ? dense_cosine::kRowsTogether * sw : random.size(2 * ns), ns), strip_rows);

  struct Results {
    Array<A> query_norms, support_norms;
    Array<T> scores, support_scores;
    Array<int64_t> indices, support_indices;
    Dense<T> grad_query, grad_support;
  };
  const auto calculate = [&](int threads, int fill) {
    auto r = std::unique_ptr<Results>(new Results{{{batch, nq}, fill},
                                                  {{samples, ns}, fill},
                                                  {{samples, maps, nq}, fill},
                                                  {{samples, match ? ns : 0}, fill},
                                                  {{samples, maps, nq}, fill},
                                                  {{samples, match ? ns : 0}, fill},
                                                  {batch, channels, nq, query.channels_last, fill, 1},
                                                  {samples, channels, ns, support.channels_last, fill, 1}});
    r->query_norms.each([](A& v) { v = 0; }), r->support_norms.each([](A& v) { v = 0; });
    r->support_scores.each([](T& v) { v = T{}; }), r->support_indices.each([](int64_t& i) { i = -1; });
    a.query = {query.array.data, query.channels_last, query.stride_b, query.stride_row, qh, qw, r->query_norms.data,
               nullptr};
    a.support = {support.array.data,
                 support.channels_last,
                 support.stride_b,
                 support.stride_row,
                 sh,
                 sw,
                 r->support_norms.data,
                 nullptr};
    a.positions = round_up(qh * padded_width(a), columns);
    a.ring_rows = summed ? 2 * a.up + dense_cosine::kRowsTogether : 0;
    const int64_t blocks = core::product_tasks<A>(a), half = a.screen ? ceil_div(channels, 2) : 0;
    const Array<int32_t> pixel_of({a.positions}, fill), kept({ns}, fill);
    const Array<A> packed_query({a.positions * channels}, fill), packed_support({chunk * channels}, fill);
    const Array<A> query_scales({a.positions}, fill), support_scales({chunk}, fill), best({maps * a.positions}, fill);
    const Array<A> bias({match ? a.positions : 0}, fill), row_best({match ? blocks * chunk : 0}, fill);
    const Array<I> index({maps * a.positions}, fill), row_index({match ? blocks * chunk : 0}, fill);
    const Array<uint32_t> coarse_query({a.positions * half}, fill), coarse_support({chunk * half}, fill);
    const Array<float> query_errors({a.screen ? a.positions : 0}, fill), support_errors({a.screen ? chunk : 0}, fill);
    const Array<float> row_bounds({a.screen && match ? chunk * (a.positions / columns) : 0}, fill);
    const Array<uint8_t> unscreened({blocks}, fill);
    const Array<A> ring({a.ring_rows * sw * line(a)}, fill);
    unscreened.each([](uint8_t& v) { v = 0; }), ring.each([](A& v) { v = 0; });
    pixel_of.each([](int32_t& j) { j = -1; });
    for (int64_t j = 0; j < nq; ++j) pixel_of(j / qw * padded_width(a) + j % qw) = int32_t(j);
    for (int64_t p = 0; match && p < a.positions; ++p) {
      bias(p) = pixel_of(p) < 0 ? -std::numeric_limits<A>::infinity() : A(0);
    }
    a.pixel_of = pixel_of.data, a.packed_query = packed_query.data, a.query_scales = query_scales.data;
    a.query_bias = bias.data, a.kept = kept.data, a.packed_support = packed_support.data;
    a.support_scales = support_scales.data, a.best = best.data, a.index = index.data, a.row_best = row_best.data;
    a.row_index = row_index.data, a.coarse_query = coarse_query.data, a.coarse_support = coarse_support.data;
    a.query_errors = query_errors.data, a.support_errors = support_errors.data, a.row_bounds = row_bounds.data;
    a.unscreened = unscreened.data, a.ring = ring.data;
    const auto step = [&](int64_t tasks, auto f) {
      run(tasks, threads, [&](int64_t begin, int64_t end) { f(a, begin, end); });
    };
    const auto product = [&](int64_t first, int64_t last) {
      a.first = first, a.count = last - first;
      if (a.count == 0) return;
      step(ceil_div(a.count, strip_rows), core::pack_support<T>);
      a.row_blocks = blocks;
      if (a.screen && screened<T>(a, blocks, match, threads)) return;
      step(blocks, summed ? core::cosines<T> : match ? core::maxima<T, true> : core::maxima<T, false>);
    };
    for (a.b = 0; a.b < batch; ++a.b) {
      step(a.positions / columns, core::pack_query<T>);
      a.bad_query = false;
      for (int64_t j = 0; j < nq; ++j) a.bad_query |= !std::isfinite(r->query_norms(a.b, j));
      for (int64_t shot = 0; shot < shots; ++shot) {
        a.n = a.b * shots + shot, a.keep = keep.data + a.n * ns;
        int64_t total = 0;
        for (int64_t i = 0; i < ns; ++i) {
          if (a.keep[i] != 0) kept(total++) = int32_t(i);
        }
        best.each([](A& v) { v = -std::numeric_limits<A>::infinity(); }), index.each([](I& i) { i = -1; });
        a.scores = r->scores.data + a.n * maps * nq, a.indices = r->indices.data + a.n * maps * nq;
        a.support_scores = r->support_scores.data + a.n * ns, a.support_indices = r->support_indices.data + a.n * ns;
        if (!summed) {
          for (int64_t first = 0; first < total; first += chunk) {
            product(first, std::min(total, first + chunk));
            if (match) core::finish_support<T>(a);
          }
        } else {
          int64_t first = 0, last = 0;
          for (int64_t y = 0; y < sh + a.up; y += dense_cosine::kRowsTogether, first = last) {
            while (last < total && kept(last) < (y + dense_cosine::kRowsTogether) * sw) ++last;
            product(first, last);
            const int64_t done = std::min(y + dense_cosine::kRowsTogether - a.up, sh);
            for (a.row = std::max<int64_t>(y - a.up, 0); total > 0 && a.row < done; ++a.row) {
              step(core::sum_tasks<A>(a), core::window_sums<A>);
            }
          }
        }
        core::finish_query<T>(a);
      }
    }
    packed_query.check_canaries("packed_query"), packed_support.check_canaries("packed_support");
    best.check_canaries("best"), row_best.check_canaries("row_best"), ring.check_canaries("ring");
    coarse_query.check_canaries("coarse_query"), coarse_support.check_canaries("coarse_support");
    row_bounds.check_canaries("row_bounds");

    GradArgs g{};
    g.channels = channels, g.shots = shots, g.query = a.query, g.support = a.support, g.eps = a.eps, g.add = a.add;
    if (want_query) g.query.gradient = r->grad_query.array.data;
    if (want_support) g.support.gradient = r->grad_support.array.data;
    g.windows = match ? nullptr : windows.data(), g.maps = maps, g.grad = grad.data, g.support_grad = support_grad.data;
    g.index = r->indices.data, g.support_index = r->support_indices.data;
    int64_t pairs = match ? nq + ns : 0;
    for (const Window& w : windows) pairs += match ? 0 : w.elements() * nq;
    std::vector<std::unique_ptr<Array<int32_t>>> starts, others;
    std::vector<std::unique_ptr<Array<A>>> list_weights;
    std::vector<List> lists;
    for (int64_t l = 0; l < 2 * shots; ++l) {
      starts.push_back(std::make_unique<Array<int32_t>>(std::vector<int64_t>{(l % 2 == 0 ? nq : ns) + 1}, fill));
      others.push_back(std::make_unique<Array<int32_t>>(std::vector<int64_t>{pairs}, fill));
      list_weights.push_back(std::make_unique<Array<A>>(std::vector<int64_t>{pairs}, fill));
      lists.push_back({starts.back()->data, others.back()->data, list_weights.back()->data});
    }
    const int64_t channel_blocks = core::channel_blocks<A>(g);
    const int64_t destinations = (want_query ? nq : 0) + (want_support ? shots * ns : 0);
    const Array<A> parts({destinations * channel_blocks}, fill);
    g.lists = lists.data(), g.parts = parts.data;
    const auto grad_step = [&](int64_t tasks, auto f) {
      run(tasks, threads, [&](int64_t begin, int64_t end) { f(g, begin, end); });
    };
    for (g.b = 0; g.b < batch; ++g.b) {
      grad_step(2 * shots, core::sort_pairs<T>);
      for (const bool last : {false, true}) {
        g.last = last;
        grad_step(core::gradient_tasks<A>(g), core::gradients<T>);
        if (!last) grad_step(core::targets(g), core::add_parts<A>);
      }
    }
    parts.check_canaries("parts");
    return r;
  };
  const auto r = calculate(1, 0xff), other = calculate(4, 0x5a);
  same("query_norms", r->query_norms, other->query_norms);
  same("support_norms", r->support_norms, other->support_norms);
  same("scores", r->scores, other->scores), same("indices", r->indices, other->indices);
  same("support_scores", r->support_scores, other->support_scores);
  same("support_indices", r->support_indices, other->support_indices);
  if (want_query) same("grad_query", r->grad_query.array, other->grad_query.array);
  if (want_support) same("grad_support", r->grad_support.array, other->grad_support.array);

  const auto inverse = [&](double norm) { return norm == 0 ? 0 : 1 / (a.add ? norm + a.eps : std::max(norm, a.eps)); };
  const auto slope = [&](double norm) { return norm == 0 || (!a.add && norm <= a.eps) ? 0 : inverse(norm) / norm; };
  for (int64_t b = 0; b < batch; ++b) {
    const auto q = [&](int64_t c, int64_t j) { return value(query(b, c, j)); };
    Doubles query_norms(nq), grad_query(channels * nq), grad_query_size(channels * nq), along(nq), along_size(nq);
    for (int64_t j = 0; j < nq; ++j) {
      for (int64_t c = 0; c < channels; ++c) query_norms[j] += q(c, j) * q(c, j);
      query_norms[j] = std::sqrt(query_norms[j]);
      close("query_norm", r->query_norms(b, j), query_norms[j], query_norms[j]);
    }
    int64_t bad_query = -1;
    for (int64_t j = nq - 1; j >= 0; --j) bad_query = std::isfinite(query_norms[j]) ? bad_query : j;
    for (int64_t n = b * shots; n < (b + 1) * shots; ++n) {
      const auto s = [&](int64_t c, int64_t i) { return keep(n, i) == 0 ? 0 : value(support(n, c, i)); };
      Doubles support_norms(ns), cosine(nq * ns), grad_support(channels * ns), grad_support_size(channels * ns);
      for (int64_t i = 0; i < ns; ++i) {
        for (int64_t c = 0; c < channels; ++c) support_norms[i] += s(c, i) * s(c, i);
        support_norms[i] = std::sqrt(support_norms[i]);
        close("support_norm", r->support_norms(n, i), support_norms[i], support_norms[i]);
        for (int64_t j = 0; j < nq; ++j) {
          double& dot = cosine[j * ns + i];
          for (int64_t c = 0; c < channels; ++c) dot += q(c, j) * s(c, i);
          dot *= inverse(query_norms[j]) * inverse(support_norms[i]);
        }
      }
      // the gradient of one cosine to both normalised vectors
      const auto pair = [&](int64_t j, int64_t i, double g) {
        if (query_norms[j] == 0 || support_norms[i] == 0) return;
        for (int64_t c = 0; c < channels; ++c) {
          const double to_query = g * s(c, i) * inverse(support_norms[i]);
          const double to_support = g * q(c, j) * inverse(query_norms[j]);
          grad_query[c * nq + j] += to_query, grad_query_size[c * nq + j] += std::abs(to_query);
          grad_support[c * ns + i] += to_support, grad_support_size[c * ns + i] += std::abs(to_support);
        }
      };
      // got is the largest of score(0) ... score(count - 1) among the candidates, and `at` is where it is
      const auto check = [&](const char* what, T got, int64_t at, int64_t count, const auto& score,
                             const auto& candidate, bool dead) {
        double most = -HUGE_VAL;
        for (int64_t i = 0; i < count; ++i) {
          if (candidate(i)) most = std::max(most, score(i));
        }
        const bool none = most == -HUGE_VAL || (dead && at < 0);
        if (none != (at < 0)) fail(std::string(what) + ": a wrong index -1");
        if (none || dead) most = std::max(most == -HUGE_VAL ? 0 : most, 0.0);
        close(what, got, most, 1);
        if (at >= 0 && !(at < count && candidate(at) && score(at) >= most - 4 * kSumError<T>)) {
          fail(std::string(what) + ": a wrong index");
        }
      };
      for (int64_t map = 0; map < maps; ++map) {
        const Window& w = windows[size_t(map)];
        const auto each = [&](int64_t j, int64_t i, const auto& f) {
          dense_cosine::each_offset(w, [&](int64_t dy, int64_t dx) {
            const int64_t y = j / qw + dy, x = j % qw + dx, sy = i / sw + dy, sx = i % sw + dx;
            if (y < 0 || y >= qh || x < 0 || x >= qw || sy < 0 || sy >= sh || sx < 0 || sx >= sw) return;
            f(y * qw + x, sy * sw + sx);
          });
        };
        std::vector<char> candidates;
        bool dead = false;
        int64_t lowest = -1, bad = -1;  // candidate; and whose window holds a kept vector that is not finite
        for (int64_t i = 0; i < ns; ++i) {
          bool live = false, unknown = false;
          dense_cosine::each_offset(w, [&](int64_t dy, int64_t dx) {
            const int64_t sy = i / sw + dy, sx = i % sw + dx;
            if (sy < 0 || sy >= sh || sx < 0 || sx >= sw || keep(n, sy * sw + sx) == 0) return;
            live = true, unknown |= !std::isfinite(support_norms[sy * sw + sx]);
          });
          candidates.push_back(a.exclude ? keep(n, i) != 0 : live);
          dead |= !a.exclude && !live;
          if (candidates.back() != 0 && lowest < 0) lowest = i;
          if (candidates.back() != 0 && unknown && bad < 0) bad = i;
        }
        for (int64_t j = 0; j < nq; ++j) {
          const int64_t at = r->indices(n, map, j);
          bool unknown = bad >= 0;
          dense_cosine::each_offset(w, [&](int64_t dy, int64_t dx) {
            const int64_t y = j / qw + dy, x = j % qw + dx;
            unknown |= lowest >= 0 && y >= 0 && y < qh && x >= 0 && x < qw && !std::isfinite(query_norms[y * qw + x]);
          });
          if (unknown) {
            if (!std::isnan(value(r->scores(n, map, j))) || at != (bad >= 0 ? bad : lowest))
              fail("score is not unknown");
            continue;
          }
          const auto score = [&](int64_t i) {
            double sum = 0;
            each(j, i, [&](int64_t jo, int64_t io) { sum += cosine[jo * ns + io]; });
            return sum / double(w.elements());
          };
          check(
              "score", r->scores(n, map, j), at, ns, score, [&](int64_t i) { return candidates[size_t(i)] != 0; },
              dead);
          const double g = value(grad(n, map, j)) / double(w.elements());
          if (at >= 0) each(j, at, [&](int64_t jo, int64_t io) { pair(jo, io, g); });
        }
      }
      for (int64_t i = 0; match && i < ns; ++i) {
        const int64_t at = r->support_indices(n, i);
        if (keep(n, i) != 0 && (bad_query >= 0 || !std::isfinite(support_norms[i]))) {
          if (!std::isnan(value(r->support_scores(n, i))) || at != std::max<int64_t>(bad_query, 0)) {
            fail("support_score is not unknown");
          }
          continue;
        }
        const auto score = [&](int64_t j) { return cosine[j * ns + i]; };
        check("support_score", r->support_scores(n, i), at, nq, score, [&](int64_t) { return keep(n, i) != 0; }, false);
        if (at >= 0) pair(at, i, value(support_grad(n, i)));
      }
      for (int64_t i = 0; finite && want_support && i < ns; ++i) {
        double dot = 0, size = 0;
        for (int64_t c = 0; c < channels; ++c) {
          dot += s(c, i) * grad_support[c * ns + i], size += std::abs(s(c, i)) * grad_support_size[c * ns + i];
        }
        const double u = inverse(support_norms[i]), k = u * slope(support_norms[i]);
        for (int64_t c = 0; c < channels; ++c) {
          close("grad_support", r->grad_support(n, c, i), u * grad_support[c * ns + i] - k * dot * s(c, i),
                u * grad_support_size[c * ns + i] + k * size * std::abs(s(c, i)));
        }
      }
    }
    for (int64_t j = 0; finite && want_query && j < nq; ++j) {
      for (int64_t c = 0; c < channels; ++c) {
        along[j] += q(c, j) * grad_query[c * nq + j], along_size[j] += std::abs(q(c, j)) * grad_query_size[c * nq + j];
      }
      const double u = inverse(query_norms[j]), k = u * slope(query_norms[j]);
      for (int64_t c = 0; c < channels; ++c) {
        close("grad_query", r->grad_query(b, c, j), u * grad_query[c * nq + j] - k * along[j] * q(c, j),
              u * grad_query_size[c * nq + j] + k * along_size[j] * std::abs(q(c, j)));
      }
    }
  }
}

}  // namespace fuzz
}  // namespace fss

int main(int argc, char** argv) {
  using namespace fss;
  return fuzz::cases<FUZZ_TYPES>("dense_cosine", argc, argv,
                                 [](auto x, fuzz::Random& random) { fuzz::one<decltype(x)>(random); });
}
