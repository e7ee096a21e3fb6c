// Vectors of kWidth floats for the CPU kernels, which are written once on them and compiled once per
// instruction set (each operator's _rows.h and its .cpp, _avx2.cpp, _avx512.cpp).
//
// No function of the standard library is called: an inline function compiled here for AVX-512 could
// become the copy that the whole library uses.
#pragma once

#include "half.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace convbert {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kRowsTogether = 4;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kRowsTogether = 2;
#else
constexpr int kWidth = 4;
constexpr int kRowsTogether = 2;
#endif

typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kWidth * sizeof(int32_t))));

inline Floats broadcast(float value) { return Floats{} + value; }

inline Floats load(float const* from) {
  Floats values;
  memcpy(&values, from, sizeof(values));
  return values;
}

inline void store(float* to, Floats values) { memcpy(to, &values, sizeof(values)); }

template <typename T>
inline Floats loadElements(T const* from) {
  Floats values;
  for (int i = 0; i < kWidth; ++i) {
    values[i] = toFloat(from[i]);
  }
  return values;
}

template <typename T>
inline void storeElements(T* to, Floats values) {
  for (int i = 0; i < kWidth; ++i) {
    to[i] = fromFloat<T>(values[i]);
  }
}

inline Floats load(Float16 const* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(from)));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(from)));
#else
  return loadElements(from);
#endif
}

inline void store(Float16* to, Floats values) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
#else
  storeElements(to, values);
#endif
}

inline Floats load(BFloat16 const* from) {
#if defined(__AVX512F__)
  __m256i const raw = _mm256_loadu_si256(reinterpret_cast<__m256i const*>(from));
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(__AVX2__)
  __m128i const raw = _mm_loadu_si128(reinterpret_cast<__m128i const*>(from));
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
  return loadElements(from);
#endif
}

inline void store(BFloat16* to, Floats values) {
#if defined(__AVX512F__)
  // Round to nearest even on the integer bits; a NaN keeps its upper half with the quiet bit set.
  __m512i const bits = (__m512i)values;
  __m512i const odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 const nan = _mm512_cmp_ps_mask((__m512)values, (__m512)values, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#elif defined(__AVX2__)
  __m256i const bits = (__m256i)values;
  __m256i const odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i const up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  __m256i const quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256 const nan = _mm256_cmp_ps((__m256)values, (__m256)values, _CMP_UNORD_Q);
  __m256i const rounded = (__m256i)_mm256_blendv_ps((__m256)_mm256_add_epi32(bits, up),
                                                    (__m256)quiet, nan);
  __m256i const upper = _mm256_srli_epi32(rounded, 16);
  // packus works within halves of 128 bits: the middle two quarters are its doubles.
  __m256i const packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
#else
  storeElements(to, values);
#endif
}

// The first `count` elements at `from`; the other lanes are 0.
template <typename T>
inline Floats loadPart(T const* from, int count) {
  T part[kWidth] = {};
  memcpy(part, from, count * sizeof(T));
  return load(part);
}

template <typename T>
inline void storePart(T* to, Floats values, int count) {
  T part[kWidth];
  store(part, values);
  memcpy(to, part, count * sizeof(T));
}

// exp for arguments <= 0 or NaN, within 2 units in the last place; below -87 it is 0.
inline Floats expNonPositive(Floats x) {
  Floats const clamped = x < -87.0f ? broadcast(-87.0f) : x;  // a NaN stays a NaN
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
  Floats const shifted = clamped * 1.44269504088896341f + 12582912.0f;
  Floats const n = shifted - 12582912.0f;
  Floats r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints const exponent = ((Ints)shifted + 127) << 23;
  return x < -87.0f ? Floats{} : p * (Floats)exponent;
}

}  // namespace
}  // namespace convbert
