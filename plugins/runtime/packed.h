// Adjacent elements that move between memory and registers as one access, and as floats inside.
#pragma once

#include "half.h"

namespace convbert {
namespace {

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Packed {
  T element[kVec];
};

template <typename T, int kVec>
CONVBERT_HD void unpack(Packed<T, kVec> const& from, float (&to)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    to[i] = toFloat(from.element[i]);
  }
}

template <typename T, int kVec>
CONVBERT_HD void loadVector(T const* from, float (&to)[kVec]) {
  unpack(*reinterpret_cast<Packed<T, kVec> const*>(from), to);
}

template <typename T, int kVec>
CONVBERT_HD void storeVector(T* to, float const (&from)[kVec]) {
  Packed<T, kVec> packed;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    packed.element[i] = fromFloat<T>(from[i]);
  }
  *reinterpret_cast<Packed<T, kVec>*>(to) = packed;
}

}  // namespace
}  // namespace convbert
