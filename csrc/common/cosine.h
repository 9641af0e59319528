// Normalisation of the cosine ops: x / N(|x|) with N = max(|x|, eps) ("clamp") or |x| + eps ("add"). Included by a core
// inside namespace fss::FSS_ISA, after simd.h. A norm is the root of a sum of squares in the accumulation type: one
// that underflows to 0 is a zero vector's, whose cosine is 0; one that is not finite gives NaN.

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
inline vec<A> norm_divisor(vec<A> n, vec<A> eps, bool add) {
  return add ? n + eps : select<A>(n > eps, n, eps);
}

// 1 / N(n); 0 for n = 0, NaN for an infinite or NaN n.
template <class A>
inline vec<A> inverse_norm(vec<A> n, A eps, bool add) {
  const vec<A> zero = broadcast(A(0)), divisor = norm_divisor<A>(n, broadcast(eps), add);
  const vec<A> inverse = broadcast(A(1)) / select<A>(n == zero, broadcast(A(1)), divisor);
  return select<A>(n == zero, zero, inverse) + (n - n);
}

// Norms below kShort are short; what magnifies such a vector is a power of two.
template <class A>
constexpr A kShort = sizeof(A) == 8 ? A(0x1p-256) : A(0x1p-32);
template <class A>
constexpr A kMagnified = A(1) / (kShort<A> * kShort<A>);

template <class A>
inline vec<A> magnification(vec<A> n) {
  return select<A>(n < broadcast(kShort<A>), broadcast(kMagnified<A>), broadcast(A(1)));
}

// The gradient at x from D, that at x / N(n): inverse D - along(mx . D) mx, m = magnify. 1 / (n N) overflows for a
// short vector, so what it multiplies is mx.
template <class A>
struct Projection {
  vec<A> magnify, inverse, slope;  // slope: 1 / (mn mN), 0 where eps alone divides or n = 0

  Projection(vec<A> n, A eps, bool add) : magnify(magnification<A>(n)), inverse(inverse_norm<A>(n, eps, add)) {
    const vec<A> zero = broadcast(A(0)), one = broadcast(A(1)), size = n * magnify, constant = magnify * eps;
    const auto flat = add ? size == zero : size <= constant;
    slope = select<A>(flat, zero, one / select<A>(flat, one, size * norm_divisor<A>(size, constant, add)));
  }
  vec<A> along(vec<A> dot) const { return dot * (inverse / magnify) * slope * magnify; }
};

}  // namespace FSS_ISA
}  // namespace fss
