// Dtype conversion and 16-byte groups of elements, also of rows that do not start on a 16-byte boundary.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtypes.h"

namespace fss {

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(uint8_t v) { return float(v); }
__device__ inline float widen(bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ inline float widen(float16 v) { return __half2float(__ushort_as_half(v.bits)); }

template <class T, class A>
__device__ inline T narrow(A v) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
  } else if constexpr (std::is_same_v<T, float16>) {
    return {__half_as_ushort(__float2half_rn(v))};
  } else {
    return T(v);
  }
}

template <class T>
constexpr int kGroup = 16 / sizeof(T);  // elements of one 16-byte access

// kGroup<T> elements in four registers; the first in the low bits of the first word.
template <class T>
struct Group {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "a word holds one or two elements");
  uint32_t words[4];

  __device__ T get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      return {uint16_t(words[i / 2] >> (i % 2 * 16))};
    }
  }
  __device__ void set(int i, T v) {  // of a group that was 0 there
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(v);
    } else {
      words[i / 2] |= uint32_t(v.bits) << (i % 2 * 16);
    }
  }
};

template <class T>
__device__ inline Group<T> load_group(const void* aligned) {
  const uint4 v = __ldg(static_cast<const uint4*>(aligned));
  return {{v.x, v.y, v.z, v.w}};
}

// Past the caches: what is written once and not read here.
template <class T>
__device__ inline void stream_group(T* aligned, const Group<T>& g) {
  __stcs(reinterpret_cast<uint4*>(aligned), make_uint4(g.words[0], g.words[1], g.words[2], g.words[3]));
}

// 16 bytes of the 32 of (low, high), from byte `bytes` in [0, 16) on.
template <class T>
__device__ inline Group<T> realign(const Group<T>& low, const Group<T>& high, int bytes) {
  const uint32_t all[8] = {low.words[0],  low.words[1],  low.words[2],  low.words[3],
                           high.words[0], high.words[1], high.words[2], high.words[3]};
  uint32_t by_two[6], by_one[5];
  for (int i = 0; i < 6; ++i) by_two[i] = bytes & 8 ? all[i + 2] : all[i];
  for (int i = 0; i < 5; ++i) by_one[i] = bytes & 4 ? by_two[i + 1] : by_two[i];
  Group<T> result;
  for (int i = 0; i < 4; ++i) result.words[i] = __funnelshift_r(by_one[i], by_one[i + 1], (bytes & 3) * 8);
  return result;
}

template <class T>
__device__ inline int misalignment(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) % 16);
}

// Elements [n, n + kGroup) of several rows, n a multiple of kGroup; 0 outside [0, end). A row that does not start on a
// 16-byte boundary is read as two aligned groups, none of which begins past `end` or before the group that holds row 0.
template <bool Aligned, int Rows, class T>
__device__ inline void load_groups(const T* const (&rows)[Rows], int64_t n, int64_t end, Group<T> (&groups)[Rows]) {
  constexpr int size = kGroup<T>;
  if (n >= 0 && n + (Aligned ? size : 2 * size) <= end) {
    if constexpr (Aligned) {
      for (int r = 0; r < Rows; ++r) groups[r] = load_group<T>(rows[r] + n);
    } else {
      Group<T> next[Rows];
      for (int r = 0; r < Rows; ++r) {
        const char* chunk = reinterpret_cast<const char*>(rows[r] + n) - misalignment(rows[r]);
        groups[r] = load_group<T>(chunk);
        next[r] = load_group<T>(chunk + 16);
      }
      for (int r = 0; r < Rows; ++r) groups[r] = realign(groups[r], next[r], misalignment(rows[r]));
    }
    return;
  }
  for (int r = 0; r < Rows; ++r) {
    groups[r] = {};
    for (int i = 0; i < size; ++i) {
      if (n + i >= 0 && n + i < end) groups[r].set(i, rows[r][n + i]);
    }
  }
}

// V contiguous elements widened to float: one 16-byte access, or V = 1.
template <int V, class T>
__device__ inline void load_widened(const T* from, float (&to)[V]) {
  static_assert(V == 1 || V == kGroup<T>);
  if constexpr (V == 1) {
    to[0] = widen(*from);
  } else {
    const Group<T> g = load_group<T>(from);
    for (int i = 0; i < V; ++i) to[i] = widen(g.get(i));
  }
}

}  // namespace fss
