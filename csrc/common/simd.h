// One vector register of float or double for the instruction set being compiled (FSS_ISA): loads and stores of every
// storage dtype, tails, non-temporal stores, a horizontal sum in a fixed order. Arithmetic is GCC's vector extension,
// so `a * b + c` is a fused multiply-add where the processor has one. Included once per instruction set (each_isa.h).

namespace fss {
namespace FSS_ISA {

template <class A>
struct vector_of {
  typedef A type __attribute__((vector_size(FSS_VECTOR_BYTES)));
};
template <class A>
using vec = typename vector_of<A>::type;
using vfloat = vec<float>;
typedef uint16_t vhalfbits __attribute__((vector_size(FSS_VECTOR_BYTES / 2)));

template <class A>
constexpr int lanes = FSS_VECTOR_BYTES / int(sizeof(A));

inline float to_float(float16 h) {
#if FSS_ISA_LEVEL >= 1
  return _cvtsh_ss(h.bits);
#else
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16;
  const uint32_t rest = h.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Scaling by 2^112 moves the exponent from half's bias to float's and makes subnormals exact.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
#endif
}
inline float to_float(bfloat16 b) { return bit_cast<float>(uint32_t(b.bits) << 16); }

inline bfloat16 to_bfloat16(float f) {
  const uint32_t u = bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40u)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
inline float16 to_float16(float f) {
#if FSS_ISA_LEVEL >= 1
  return {uint16_t(_cvtss_sh(f, 0))};
#else
  const uint32_t u = bit_cast<uint32_t>(f);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds the magnitude to a multiple of 2^-24, ties to even
    return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
#endif
}

// One element, to and from the accumulation type A.
template <class A, class T>
inline A widen(T value) {
  if constexpr (std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>) {
    return A(to_float(value));
  } else {
    return A(value);
  }
}
template <class T, class A>
inline T narrow(A value) {
  if constexpr (std::is_same_v<T, float16>) {
    return to_float16(float(value));
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(float(value));
  } else {
    return T(value);
  }
}

template <class A>
inline vec<A> broadcast(A value) {
  return vec<A>{} + value;
}

template <class T>
inline vec<accumulate_t<T>> load(const T* p) {
  vec<accumulate_t<T>> v;
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    std::memcpy(&v, p, sizeof(v));
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    vhalfbits half;
    std::memcpy(&half, p, sizeof(half));
    v = (vfloat)(__builtin_convertvector(half, vec<uint32_t>) << 16);
  } else {
#if FSS_ISA_LEVEL == 2
    v = (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FSS_ISA_LEVEL == 1
    v = (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    for (int i = 0; i < lanes<float>; ++i) v[i] = to_float(p[i]);
#endif
  }
  return v;
}

// A register in storage dtype T: rounded to nearest even, NaN kept NaN.
template <class T>
inline auto pack(vec<accumulate_t<T>> v) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    return v;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    const vec<uint32_t> u = (vec<uint32_t>)v;
    const vec<uint32_t> is_nan = (vec<uint32_t>)(v != v);
    const vec<uint32_t> rounded = u + 0x7fffu + ((u >> 16) & 1u);
    const vec<uint32_t> bits = ((rounded & ~is_nan) | ((u | 0x400000u) & is_nan)) >> 16;
#if FSS_ISA_LEVEL == 2
    return (vhalfbits)_mm512_cvtepi32_epi16((__m512i)bits);
#elif FSS_ISA_LEVEL == 1
    const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
    return (vhalfbits)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(bits, vhalfbits);
#endif
  } else {
#if FSS_ISA_LEVEL == 2
    return (vhalfbits)_mm512_cvtps_ph((__m512)v, 0);
#elif FSS_ISA_LEVEL == 1
    return (vhalfbits)_mm256_cvtps_ph((__m256)v, 0);
#else
    vhalfbits half = {};
    for (int i = 0; i < lanes<float>; ++i) half[i] = to_float16(v[i]).bits;
    return half;
#endif
  }
}

template <class T>
inline void store(T* p, vec<accumulate_t<T>> v) {
  const auto packed = pack<T>(v);
  std::memcpy(p, &packed, sizeof(packed));
}

// The same past the caches; p is aligned to the bytes written. Only for whole 64-byte lines written in a row.
template <class T>
inline void stream(T* p, vec<accumulate_t<T>> v) {
#if FSS_X86_VARIANTS
  const auto packed = pack<T>(v);
  constexpr size_t bytes = sizeof(packed);
#if FSS_ISA_LEVEL == 2
  if constexpr (bytes == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)packed);
#endif
#if FSS_ISA_LEVEL >= 1
  if constexpr (bytes == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)packed);
#endif
  if constexpr (bytes == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)packed);
  if constexpr (bytes == 8) return _mm_stream_si64(reinterpret_cast<long long*>(p), bit_cast<long long>(packed));
#else
  store(p, v);
#endif
}
// Orders streamed lines before whatever this thread does next.
inline void stream_fence() {
#if FSS_X86_VARIANTS
  _mm_sfence();
#endif
}

// The first `count` elements; the other lanes of a load are 0.
template <class T>
inline vec<accumulate_t<T>> load_partial(const T* p, int64_t count) {
  T buffer[lanes<accumulate_t<T>>] = {};
  std::memcpy(buffer, p, size_t(count) * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store_partial(T* p, vec<accumulate_t<T>> v, int64_t count) {
  T buffer[lanes<accumulate_t<T>>];
  store(buffer, v);
  std::memcpy(p, buffer, size_t(count) * sizeof(T));
}

// Lanes added pairwise: always the same order.
template <class A>
inline A sum(vec<A> v) {
  A buffer[lanes<A>];
  std::memcpy(buffer, &v, sizeof(v));
  for (int width = lanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) buffer[i] += buffer[i + width];
  }
  return buffer[0];
}

// v where `weight` is not 0, and 0 elsewhere, whatever v holds there.
template <class A>
inline vec<A> keep_where_nonzero(vec<A> v, vec<A> weight) {
  using bits = vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>;
  return (vec<A>)((bits)v & (bits)(weight != broadcast(A(0))));
}

}  // namespace FSS_ISA
}  // namespace fss
