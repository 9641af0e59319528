// Storage types of half precision and the accumulation type of each dtype. Torch-free.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fss {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Everything accumulates in float32, float64 in float64.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace fss
