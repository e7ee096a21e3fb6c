// What happens to rows between the matrix products: conversion to a weight's element type,
// quantization, GELU, layer normalization.
#pragma once

#include "matmul.h"

namespace convbert {
namespace {

inline float sumOf(Floats values) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)values);
#else
  float sum = 0.0f;
  for (int i = 0; i < kWidth; ++i) {
    sum += values[i];
  }
  return sum;
#endif
}

inline Floats largerOf(Floats a, Floats b) { return a > b ? a : b; }
inline Floats magnitude(Floats a) { return (Floats)((Ints)a & 0x7fffffff); }

inline float largestOf(Floats values) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)values);
#else
  float largest = values[0];
  for (int i = 1; i < kWidth; ++i) {
    largest = values[i] > largest ? values[i] : largest;
  }
  return largest;
#endif
}

// Loads and stores of `count` lanes, all of them in most calls.
inline Floats loadSome(float const* from, int count) {
  return count == kWidth ? load(from) : loadPart(from, count);
}

template <typename T>
inline void storeSome(T* to, Floats values, int count) {
  if (count == kWidth) {
    store(to, values);
  } else {
    storePart(to, values, count);
  }
}

// As storeSome, with the conversion instruction where there is one.
inline void storeRounded(float* to, Floats values, int count) { storeSome(to, values, count); }

inline void storeRounded(BFloat16* to, Floats values, int count) {
#if defined(__AVX512BF16__)
  if (count == kWidth) {
    __m256bh const halves = _mm512_cvtneps_pbh((__m512)values);
    memcpy(to, &halves, sizeof(halves));
    return;
  }
#endif
  storeSome(to, values, count);
}

inline float squareRoot(float value) {
  return __builtin_sqrtf(value);  // an instruction, as -fno-math-errno is given
}

// erf, within 3.5e-7: an odd rational function fitted to [-3.9, 3.9] (the maximum of the absolute
// error minimized by iteratively reweighted least squares), constant beyond.
inline Floats errorFunction(Floats x) {
  Floats const low = x < -3.9f ? broadcast(-3.9f) : x;
  Floats const z = low > 3.9f ? broadcast(3.9f) : low;
  Floats const t = z * z;
  Floats p = broadcast(2.0504003e-06f);
  p = p * t + 0.00028745702f;
  p = p * t + 0.0038368422f;
  p = p * t + 0.052966814f;
  p = p * t + 0.19194014f;
  p = p * t + 1.128379f;
  Floats q = broadcast(3.8230868e-05f);
  q = q * t + 0.0011817273f;
  q = q * t + 0.015109136f;
  q = q * t + 0.11475785f;
  q = q * t + 0.5034343f;
  q = q * t + 1.0f;
  return z * p / q;
}

// x Phi(x), the exact form (not the tanh approximation).
inline Floats gelu(Floats x) {
  return 0.5f * x * (1.0f + errorFunction(x * 0.70710678f));
}

// Rows of an input in a weight's type, as matmul takes them. Room for kMaxRows rows.
struct ActivationBuffers {
  uint32_t* units;
  float* steps;
  int32_t* surpluses;  // (groups, kMaxRows)
};

// One row of a group: `to` has units * 4 bytes, zeros beyond the `count` elements.
inline void convertToHalves(float const* from, float const* multiplier, int64_t count,
                            uint32_t* to, int64_t units) {
  BFloat16* halves = reinterpret_cast<BFloat16*>(to);
  if (count < units * 2) {
    to[units - 1] = 0;
  }
  for (int64_t i = 0; i < count; i += kWidth) {
    int const some = count - i < kWidth ? static_cast<int>(count - i) : kWidth;
    Floats values = loadSome(from + i, some);
    if (multiplier != nullptr) {
      values *= loadSome(multiplier + i, some);
    }
    storeRounded(halves + i, values, some);
  }
}

inline float largestMagnitude(float const* from, float const* multiplier, int64_t count) {
  Floats largest{};
  for (int64_t i = 0; i < count; i += kWidth) {
    int const some = count - i < kWidth ? static_cast<int>(count - i) : kWidth;
    Floats values = loadSome(from + i, some);
    if (multiplier != nullptr) {
      values *= loadSome(multiplier + i, some);
    }
    largest = largerOf(magnitude(values), largest);
  }
  return largestOf(largest);
}

// Quantizes `count` elements with 1 / step = inverse; returns their sum. Symmetric: -127 to 127.
inline int32_t quantize(float const* from, float const* multiplier, int64_t count, float inverse,
                        uint32_t* to, int64_t units) {
  signed char* bytes = reinterpret_cast<signed char*>(to);
  to[units - 1] = 0;
  Ints sums{};
  for (int64_t i = 0; i < count; i += kWidth) {
    int const some = count - i < kWidth ? static_cast<int>(count - i) : kWidth;
    Floats values = loadSome(from + i, some);
    if (multiplier != nullptr) {
      values *= loadSome(multiplier + i, some);
    }
    values *= inverse;
    values = values < 127.0f ? values : broadcast(127.0f);  // NaN too: it has no integer
    values = values > -127.0f ? values : broadcast(-127.0f);
    // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, into the low mantissa bits.
    Ints const whole = (Ints)(values + 12582912.0f) - 0x4b400000;
    sums += whole;
#if defined(__AVX512F__)
    if (some == kWidth) {
      __m128i const narrow = _mm512_cvtepi32_epi8((__m512i)whole);
      memcpy(bytes + i, &narrow, sizeof(narrow));
      continue;
    }
#endif
    for (int lane = 0; lane < some; ++lane) {
      bytes[i + lane] = static_cast<signed char>(whole[lane]);
    }
  }
  int32_t sum = 0;
  for (int lane = 0; lane < kWidth; ++lane) {
    sum += sums[lane];
  }
  return sum;
}

// Rows of `from`, `stride` elements apart, in the type of `w`. float32 is taken where it lies.
inline Activations convertRows(float const* from, int64_t stride, int rows, PackedWeight const& w,
                               ActivationBuffers const& to) {
  int64_t const units = unitsOf(w);
  if (w.type == WeightType::kFloat32 && w.multiplier == nullptr) {
    return {reinterpret_cast<uint32_t const*>(from), stride, nullptr, nullptr};
  }
  int64_t const toStride = w.groups * units;
  for (int r = 0; r < rows; ++r) {
    float const* row = from + r * stride;
    float inverse = 0.0f;
    if (w.type == WeightType::kInt8) {
      float step = w.activationScale;
      if (step == 0.0f) {
        step = largestMagnitude(row, w.multiplier, allInputs(w)) / 127.0f;
      }
      to.steps[r] = step;
      inverse = step > 0.0f ? 1.0f / step : 0.0f;
    }
    for (int32_t group = 0; group < w.groups; ++group) {
      float const* part = row + group * w.inputs;
      float const* multiplier = w.multiplier == nullptr ? nullptr : w.multiplier + group * w.inputs;
      uint32_t* out = to.units + r * toStride + group * units;
      if (w.type == WeightType::kInt8) {
        to.surpluses[group * kMaxRows + r] =
            128 * quantize(part, multiplier, w.inputs, inverse, out, units);
      } else if (w.type == WeightType::kBFloat16) {
        convertToHalves(part, multiplier, w.inputs, out, units);
      } else {
        float* scaled = reinterpret_cast<float*>(out);
        for (int64_t i = 0; i < w.inputs; ++i) {
          scaled[i] = part[i] * multiplier[i];
        }
      }
    }
  }
  return {to.units, toStride, to.steps, to.surpluses};
}

// (x - mean) / sqrt(variance + epsilon) * gamma + beta, the variance from the differences.
inline void normalize(float const* from, int64_t count, float const* gamma, float const* beta,
                      float epsilon, float* to) {
  Floats sums{};
  for (int64_t i = 0; i < count; i += kWidth) {
    sums += loadSome(from + i, static_cast<int>(count - i < kWidth ? count - i : kWidth));
  }
  float const mean = sumOf(sums) / static_cast<float>(count);
  Floats squares{};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    Floats const difference = load(from + i) - mean;
    squares += difference * difference;
  }
  float rest = 0.0f;
  for (; i < count; ++i) {
    rest += (from[i] - mean) * (from[i] - mean);
  }
  float const variance = (sumOf(squares) + rest) / static_cast<float>(count);
  float const inverse = 1.0f / squareRoot(variance + epsilon);
  for (i = 0; i < count; i += kWidth) {
    int const some = count - i < kWidth ? static_cast<int>(count - i) : kWidth;
    Floats const scaled = (loadSome(from + i, some) - mean) * inverse;
    storeSome(to + i, scaled * loadSome(gamma + i, some) + loadSome(beta + i, some), some);
  }
}

}  // namespace
}  // namespace convbert
