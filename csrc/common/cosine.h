// Normalisation of the cosine ops: x / N(|x|) with N = max(|x|, eps) ("clamp") or |x| + eps ("add"). Included by a core
// inside namespace fss::FSS_ISA, after simd.h. A zero vector has the cosine 0, a vector whose norm is not finite NaN.

namespace fss {
namespace FSS_ISA {

template <class A>
inline vec<A> square_root(vec<A> v) {
#if FSS_ISA_LEVEL == 2
  if constexpr (std::is_same_v<A, float>) return (vec<A>)_mm512_sqrt_ps((__m512)v);
  if constexpr (std::is_same_v<A, double>) return (vec<A>)_mm512_sqrt_pd((__m512d)v);
#elif FSS_ISA_LEVEL == 1
  if constexpr (std::is_same_v<A, float>) return (vec<A>)_mm256_sqrt_ps((__m256)v);
  if constexpr (std::is_same_v<A, double>) return (vec<A>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < lanes<A>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// if_true where the condition holds, lane by lane; `condition` is a comparison of two vec<A>.
template <class A, class Condition>
inline vec<A> select(Condition condition, vec<A> if_true, vec<A> if_false) {
  return condition ? if_true : if_false;
}

// N(n) of a norm n > 0.
template <class A>
inline vec<A> norm_divisor(vec<A> n, A eps, bool add) {
  return add ? n + eps : select<A>(n > broadcast(eps), n, broadcast(eps));
}

// 1 / N(n); 0 for n = 0, NaN for an infinite or NaN n.
template <class A>
inline vec<A> inverse_norm(vec<A> n, A eps, bool add) {
  const vec<A> zero = broadcast(A(0));
  const vec<A> inverse = broadcast(A(1)) / select<A>(n == zero, broadcast(A(1)), norm_divisor<A>(n, eps, add));
  return select<A>(n == zero, zero, inverse) + (n - n);
}

// How strongly the normalisation projects: d(x/N) = dx/N - x (x.dx) inverse_norm slope. 1 / (n N), and 0 where eps
// alone divides or n = 0.
template <class A>
inline vec<A> norm_slope(vec<A> n, A eps, bool add) {
  const vec<A> zero = broadcast(A(0));
  const auto constant = add ? n == zero : n <= broadcast(eps);
  const vec<A> slope = broadcast(A(1)) / select<A>(constant, broadcast(A(1)), n * norm_divisor<A>(n, eps, add));
  return select<A>(constant, zero, slope);
}

}  // namespace FSS_ISA
}  // namespace fss
