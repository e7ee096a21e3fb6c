// The CPU kernel, written once on compiler vectors of kWidth floats and compiled once per
// instruction set (span_dynamic_conv.cpp, _avx2.cpp, _avx512.cpp).
//
// Work goes in blocks of a few rows. First every (row, head) softmax of the block, with kWidth of
// them side by side in a vector: max, exp and sum are then plain vertical operations whatever K is,
// where a softmax inside one vector spends its time in shuffles. Then the windowed sum,
// kRowsTogether rows at a time so that each value row is loaded once for all of them.
//
// No function of the standard library is called: an inline function compiled here for AVX-512 could
// become the copy that the whole library uses.
#pragma once

#include "../runtime/half.h"
#include "span_dynamic_conv.h"

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

// Softmaxes held at once: what a block of rows may need, in 16 KB of stack.
constexpr int kMaxGroups = 256;

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

// Softmax of `groups` kernels. `taps` is [K][kMaxGroups]: column g holds the logits of kernel g on
// entry and its weights on exit.
inline void softmaxColumns(float (*taps)[kMaxGroups], int kernelSize, int groups) {
  for (int g = 0; g < groups; g += kWidth) {
    Floats top = load(&taps[0][g]);
    for (int k = 1; k < kernelSize; ++k) {
      Floats const logit = load(&taps[k][g]);
      top = logit > top ? logit : top;
    }
    Floats sum = {};
    for (int k = 0; k < kernelSize; ++k) {
      Floats const e = expNonPositive(load(&taps[k][g]) - top);
      store(&taps[k][g], e);
      sum += e;
    }
    Floats const scale = 1.0f / sum;
    for (int k = 0; k < kernelSize; ++k) {
      store(&taps[k][g], load(&taps[k][g]) * scale);
    }
  }
}

// kVectors * kWidth channels (or `part` channels when kVectors is 1 and part > 0) of kRows adjacent
// output rows. Row r uses the taps of column group + r * groupStep. Value rows kLow to
// kHigh - 1 of the window exist; the window of the first row starts at `value`.
template <typename T, int kRows, int kVectors>
inline void windowedSum(T const* value, int64_t valueStride, T* output, int64_t outputStride,
                        float (*taps)[kMaxGroups], int group, int groupStep, int kernelSize,
                        int kLow, int kHigh, int part) {
  Floats sums[kRows][kVectors] = {};
  for (int i = kLow; i < kHigh; ++i) {
    T const* row = value + i * valueStride;
    Floats loaded[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      loaded[v] = part > 0 ? loadPart(row, part) : load(row + v * kWidth);
    }
    for (int r = 0; r < kRows; ++r) {
      int const k = i - r;
      if (kRows == 1 || (k >= 0 && k < kernelSize)) {
        Floats const weight = broadcast(taps[k][group + r * groupStep]);
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] += weight * loaded[v];
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      T* to = output + r * outputStride + v * kWidth;
      if (part > 0) {
        storePart(to, sums[r][v], part);
      } else {
        store(to, sums[r][v]);
      }
    }
  }
}

template <typename T, int kRows>
inline void windowedSumOfHead(T const* value, int64_t valueStride, T* output, int64_t outputStride,
                              float (*taps)[kMaxGroups], int group, int groupStep, int kernelSize,
                              int kLow, int kHigh, int headDim) {
  int d = 0;
  for (; d + 4 * kWidth <= headDim; d += 4 * kWidth) {
    windowedSum<T, kRows, 4>(value + d, valueStride, output + d, outputStride, taps, group,
                             groupStep, kernelSize, kLow, kHigh, 0);
  }
  if (d + 3 * kWidth <= headDim) {  // head dim 48 is one piece
    windowedSum<T, kRows, 3>(value + d, valueStride, output + d, outputStride, taps, group,
                             groupStep, kernelSize, kLow, kHigh, 0);
    d += 3 * kWidth;
  }
  for (; d + kWidth <= headDim; d += kWidth) {
    windowedSum<T, kRows, 1>(value + d, valueStride, output + d, outputStride, taps, group,
                             groupStep, kernelSize, kLow, kHigh, 0);
  }
  if (d < headDim) {
    windowedSum<T, kRows, 1>(value + d, valueStride, output + d, outputStride, taps, group,
                             groupStep, kernelSize, kLow, kHigh, headDim - d);
  }
}

template <typename T>
void runRows(SpanDynamicConvParams const& p, int64_t firstRow, int64_t lastRow) {
  alignas(64) float taps[kMaxKernelSize][kMaxGroups];
  int const kernelSize = p.kernelSize;
  int const half = kernelSize / 2;
  // Heads beyond kMaxGroups are taken in slices; rows as many as fit.
  int const headSlice = p.numHeads < kMaxGroups ? p.numHeads : kMaxGroups;
  int const rowsPerBlock = kMaxGroups / headSlice < 32 ? kMaxGroups / headSlice : 32;
  int64_t row = firstRow;
  while (row < lastRow) {
    int64_t const b = row / p.seq;
    int64_t const s0 = row % p.seq;
    int64_t rows = p.seq - s0 < lastRow - row ? p.seq - s0 : lastRow - row;
    rows = rows < rowsPerBlock ? rows : rowsPerBlock;
    T const* value = static_cast<T const*>(p.value) + b * p.valueBatchStride;
    T const* logits = static_cast<T const*>(p.kernelLogits) + b * p.logitsBatchStride;
    T* output = static_cast<T*>(p.output) + b * p.outputBatchStride;
    for (int h0 = 0; h0 < p.numHeads; h0 += headSlice) {
      int const heads = p.numHeads - h0 < headSlice ? p.numHeads - h0 : headSlice;
      int const groups = static_cast<int>(rows) * heads;
      int const padded = (groups + kWidth - 1) / kWidth * kWidth;
      for (int64_t i = 0; i < rows; ++i) {
        T const* from = logits + (s0 + i) * p.logitsRowStride + int64_t(h0) * kernelSize;
        for (int h = 0; h < heads; ++h) {
          for (int k = 0; k < kernelSize; ++k) {
            taps[k][i * heads + h] = toFloat(from[h * kernelSize + k]);
          }
        }
      }
      for (int k = 0; k < kernelSize; ++k) {
        for (int g = groups; g < padded; ++g) {
          taps[k][g] = 0.0f;
        }
      }
      softmaxColumns(taps, kernelSize, padded);
      for (int64_t i = 0; i < rows;) {
        int64_t const s = s0 + i;
        bool const inside = s >= half && s + kRowsTogether - 1 + half < p.seq;
        bool const together = inside && i + kRowsTogether <= rows;
        int64_t const before = half - s;           // taps that fall before the sequence
        int64_t const after = s + half + 1 - p.seq;  // and after it
        int const kLow = before > 0 ? static_cast<int>(before) : 0;
        int const kHigh = kernelSize - (after > 0 ? static_cast<int>(after) : 0);
        for (int h = 0; h < heads; ++h) {
          int64_t const channel = int64_t(h0 + h) * p.headDim;
          T const* from = value + (s - half) * p.valueRowStride + channel;
          T* to = output + s * p.outputRowStride + channel;
          int const group = static_cast<int>(i) * heads + h;
          if (together) {
            windowedSumOfHead<T, kRowsTogether>(from, p.valueRowStride, to, p.outputRowStride,
                                                taps, group, heads, kernelSize, 0,
                                                kernelSize + kRowsTogether - 1, p.headDim);
          } else {
            windowedSumOfHead<T, 1>(from, p.valueRowStride, to, p.outputRowStride, taps, group,
                                    heads, kernelSize, kLow, kHigh, p.headDim);
          }
        }
        i += together ? kRowsTogether : 1;
      }
    }
    row += rows;
  }
}

inline void runRowsOfType(SpanDynamicConvParams const& params, int64_t firstRow, int64_t lastRow) {
  switch (params.dtype) {
    case DataType::kFloat32: return runRows<float>(params, firstRow, lastRow);
    case DataType::kFloat16: return runRows<Float16>(params, firstRow, lastRow);
    case DataType::kBFloat16: return runRows<BFloat16>(params, firstRow, lastRow);
  }
}

}  // namespace
}  // namespace convbert
