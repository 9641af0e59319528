// One axis of the mask resize, R(source -> target), in exact integers: at most two weights a row, and a weight that
// should be 0 is 0. Also compiled for the host, where the tests compare it with the definition.
#pragma once

#include <cstdint>

namespace fss {

// Target i lies at (offset + i * step) / denominator of the source.
struct Axis {
  int64_t source, target;
  int64_t step, offset, denominator;
  int64_t step_quotient, step_remainder;  // of step / denominator: walking along the axis needs no division
  bool nearest;
};

template <class A>
struct Tap {  // target = low_weight * source[low] + high_weight * source[low + 1]
  int64_t low;
  A low_weight, high_weight;
};

// Target position `i` as the walk along an axis sees it: floor(position) and the remainder.
struct Position {
  int64_t floor, remainder;

  __host__ __device__ void advance(const Axis& axis) {
    floor += axis.step_quotient;
    remainder += axis.step_remainder;
    if (remainder >= axis.denominator) {
      remainder -= axis.denominator;
      ++floor;
    }
  }

  template <class A>
  __host__ __device__ Tap<A> tap(const Axis& axis) const {
    if (floor < 0) return {0, A(1), A(0)};
    if (floor >= axis.source - 1) return {axis.source - 1, A(1), A(0)};
    const A high = axis.nearest ? A(0) : A(remainder) / A(axis.denominator);
    return {floor, A(1) - high, high};
  }

  // Weight of this target on source position `at`, one of the two it may touch.
  template <class A>
  __host__ __device__ A weight(const Axis& axis, int64_t at) const {
    const Tap<A> t = tap<A>(axis);
    return t.low == at ? t.low_weight : t.low + 1 == at ? t.high_weight : A(0);
  }
};

inline Axis make_axis(int64_t source, int64_t target, bool nearest, bool align_corners) {
  Axis axis{source, target, 0, 0, 1, 0, 0, nearest};
  if (nearest) {
    axis.step = source, axis.denominator = target;
  } else if (align_corners) {
    axis.step = source - 1, axis.denominator = target > 1 ? target - 1 : 1;
  } else {
    axis.step = 2 * source, axis.offset = source - target, axis.denominator = 2 * target;
  }
  axis.step_quotient = axis.step / axis.denominator;
  axis.step_remainder = axis.step % axis.denominator;
  return axis;
}

__host__ __device__ inline Position position(const Axis& axis, int64_t i) {
  const int64_t numerator = axis.offset + i * axis.step;
  if (numerator >= 0) return {numerator / axis.denominator, numerator % axis.denominator};
  const int64_t floor = -((-numerator + axis.denominator - 1) / axis.denominator);
  return {floor, numerator - floor * axis.denominator};
}

// Smallest i of [0, target] whose position is at least `at`.
__host__ __device__ inline int64_t first_at(const Axis& axis, int64_t at) {
  const int64_t distance = at * axis.denominator - axis.offset;
  if (distance <= 0) return 0;
  if (axis.step == 0) return axis.target;
  const int64_t i = (distance + axis.step - 1) / axis.step;
  return i < axis.target ? i : axis.target;
}

// Targets [begin, end) that may have a weight on source position `at`; whoever is outside has none.
__host__ __device__ inline int64_t reach_begin(const Axis& axis, int64_t at) {
  return at == 0 ? 0 : first_at(axis, axis.nearest ? at : at - 1);
}
__host__ __device__ inline int64_t reach_end(const Axis& axis, int64_t at) {
  return at == axis.source - 1 ? axis.target : first_at(axis, at + 1);
}

}  // namespace fss
