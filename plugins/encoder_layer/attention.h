// Softmax attention of one head over one sequence, query rows block by block: scores of a block
// against all keys, softmax in place, product with the values. No score leaves the cache.
#pragma once

#include "activations.h"
#include "encoder_layer.h"

namespace convbert {
namespace {

constexpr int kQueryRows = 48;
#if defined(CONVBERT_AMX)
constexpr int64_t kKeyMultiple = 32;  // keys of a tile of bfloat16
#else
constexpr int64_t kKeyMultiple = 16;
#endif
constexpr float kLowest = -3.4028234663852886e38f;

// Query, key and value of one head of one sequence, `stride` elements from row to row.
template <typename T>
struct Head {
  T const* query;
  T const* key;
  T const* value;
  int64_t stride;
  int64_t const* mask;
  int64_t length;
  int64_t dim;
};

// Where attention keeps what it packs; `keys` is length rounded up to kKeyMultiple.
struct AttentionScratch {
  uint32_t* key;     // (units of dim, keys)
  uint32_t* value;   // (units of keys, dim rounded up to 16)
  uint32_t* query;   // (kQueryRows, units of dim)
  float* scores;     // (kQueryRows, keys)
  uint32_t* weights; // (kQueryRows, units of keys)
  float* sums;       // (kQueryRows, dim rounded up to 16)
  float* instead;    // (keys): 0, or the score of a key that is hidden or does not exist
  int64_t keys;
};

inline AttentionScratch layOut(void* scratch, int64_t length, int64_t dim, int64_t elements) {
  AttentionScratch s;
  s.keys = roundUp(length, kKeyMultiple);
  int64_t const dimUnits = ceilDivide(dim, elements);
  auto* at = static_cast<uint32_t*>(scratch);
  auto take = [&at](int64_t count) {
    uint32_t* taken = at;
    at += roundUp(count, 16);
    return taken;
  };
  s.key = take(s.keys * dimUnits);
  s.value = take(s.keys / elements * roundUp(dim, kPanelColumns));
  s.query = take(kQueryRows * dimUnits);
  s.scores = reinterpret_cast<float*>(take(kQueryRows * s.keys));
  s.weights = elements == 1 ? reinterpret_cast<uint32_t*>(s.scores) : take(kQueryRows * s.keys / elements);
  s.sums = reinterpret_cast<float*>(take(kQueryRows * roundUp(dim, kPanelColumns)));
  s.instead = reinterpret_cast<float*>(take(s.keys));
  return s;
}

// to = the transpose of 16 rows of 16 units, its rows `stride` units apart.
#if defined(__AVX512F__)
inline void transposeUnits(uint32_t const* const (&rows)[16], uint32_t* to, int64_t stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) {
    a[i] = _mm512_loadu_si512(rows[i]);
  }
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 i + j] holds, in its quarter q, unit 4 q + j of rows 4 i to 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    b[4 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    b[8 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    _mm512_storeu_si512(to + (0 + j) * stride, _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88));
    _mm512_storeu_si512(to + (8 + j) * stride, _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd));
    _mm512_storeu_si512(to + (4 + j) * stride, _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0x88));
    _mm512_storeu_si512(to + (12 + j) * stride, _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0xdd));
  }
}
#else
inline void transposeUnits(uint32_t const* const (&rows)[16], uint32_t* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    for (int u = 0; u < 16; ++u) {
      to[u * stride + i] = rows[i][u];
    }
  }
}
#endif

// Keys side by side; zeros beyond the last.
template <typename T>
inline void packKeys(Head<T> const& head, AttentionScratch const& s) {
  int64_t const elements = 4 / sizeof(T);
  int64_t const units = ceilDivide(head.dim, elements);
  static uint32_t const kNothing[16] = {};
  for (int64_t j = 0; j < s.keys; j += 16) {
    uint32_t* to = s.key + j;
    int64_t u = 0;
    for (; (u + 16) * elements <= head.dim; u += 16) {
      uint32_t const* rows[16];
      for (int i = 0; i < 16; ++i) {
        T const* row = head.key + (j + i) * head.stride + u * elements;
        rows[i] = j + i < head.length ? reinterpret_cast<uint32_t const*>(row) : kNothing;
      }
      transposeUnits(rows, to + u * s.keys, s.keys);
    }
    for (; u < units; ++u) {
      for (int i = 0; i < 16; ++i) {
        T unit[4 / sizeof(T)] = {};
        for (int64_t e = 0; e < elements; ++e) {
          if (j + i < head.length && u * elements + e < head.dim) {
            unit[e] = head.key[(j + i) * head.stride + u * elements + e];
          }
        }
        memcpy(to + u * s.keys + i, unit, 4);
      }
    }
  }
}

// Values of adjacent keys together: (units of keys, columns), zeros beyond the last key.
template <typename T>
inline void packValues(Head<T> const& head, AttentionScratch const& s) {
  int64_t const elements = 4 / sizeof(T);
  int64_t const columns = roundUp(head.dim, kPanelColumns);
  for (int64_t u = 0; u < s.keys / elements; ++u) {
    uint32_t* to = s.value + u * columns;
    for (int64_t d = 0; d < columns; d += kWidth) {
      int64_t const left = head.dim - d;
      int const count = static_cast<int>(left < kWidth ? (left > 0 ? left : 0) : kWidth);
      Ints unit{};
      for (int64_t e = 0; e < elements; ++e) {
        int64_t const j = u * elements + e;
        if (j < head.length && count > 0) {
          T const* from = head.value + j * head.stride + d;
          Ints const bits = (Ints)(count == kWidth ? load(from) : loadPart(from, count));
          // a bfloat16 is a float's upper half: the first key's belongs into the lower one
          unit |= sizeof(T) == 2 && e == 0 ? (bits >> 16) & 0xffff : bits;
        }
      }
      memcpy(to + d, &unit, sizeof(unit));
    }
  }
}

template <typename T>
inline void copyQueries(Head<T> const& head, int64_t first, int rows, AttentionScratch const& s) {
  int64_t const units = ceilDivide(head.dim, int64_t(4 / sizeof(T)));
  for (int r = 0; r < rows; ++r) {
    uint32_t* to = s.query + r * units;
    to[units - 1] = 0;
    memcpy(to, head.query + (first + r) * head.stride, head.dim * sizeof(T));
  }
}

// Keys that the mask hides get the lowest score: they count only where no key is seen, as in
// transformers. Keys beyond the last never count.
inline void markHidden(int64_t const* mask, int64_t length, AttentionScratch const& s) {
  for (int64_t j = 0; j < s.keys; ++j) {
    bool const hidden = j < length && mask != nullptr && mask[j] == 0;
    s.instead[j] = j >= length ? -__builtin_inff() : hidden ? kLowest : 0.0f;
  }
}

// Turns a row of scores into weights that do not add up to 1 yet; returns their sum.
inline float softmaxRow(float* scores, AttentionScratch const& s, float scale) {
  Floats largest = broadcast(kLowest);
  for (int64_t j = 0; j < s.keys; j += kWidth) {
    Floats const instead = load(s.instead + j);
    Floats const values = instead == 0.0f ? load(scores + j) * scale : instead;
    store(scores + j, values);
    largest = largerOf(values, largest);
  }
  float const shift = largestOf(largest);
  Floats sums{};
  for (int64_t j = 0; j < s.keys; j += kWidth) {
    Floats const weights = expNonPositive(load(scores + j) - shift);
    sums += weights;
    store(scores + j, weights);
  }
  return sumOf(sums);
}

// Context of query rows [first, last): `output` is at row 0 of the sequence.
template <typename T>
inline void attendRows(Head<T> const& head, int64_t first, int64_t last, void* scratch,
                       float* output, int64_t outputStride) {
  constexpr WeightType kType = sizeof(T) == 2 ? WeightType::kBFloat16 : WeightType::kFloat32;
  constexpr int64_t kElements = 4 / sizeof(T);
  AttentionScratch const s = layOut(scratch, head.length, head.dim, kElements);
  int64_t const dimUnits = ceilDivide(head.dim, kElements);
  int64_t const keyUnits = s.keys / kElements;
  int64_t const columns = roundUp(head.dim, kPanelColumns);
  float const scale = 1.0f / squareRoot(static_cast<float>(head.dim));
#if defined(CONVBERT_AMX)
  AmxTiles const tiles;
#endif
  packKeys(head, s);
  packValues(head, s);
  markHidden(head.mask, head.length, s);
  for (int64_t row = first; row < last; row += kQueryRows) {
    int const rows = static_cast<int>(last - row < kQueryRows ? last - row : kQueryRows);
    copyQueries(head, row, rows, s);
    auto const* keys = reinterpret_cast<unsigned char const*>(s.key);
    multiplyBlock<kType>({s.query, dimUnits, keys, s.keys, dimUnits, s.scores, s.keys}, rows);
    alignas(64) float inverse[kQueryRows];
    for (int r = 0; r < rows; ++r) {
      float* scores = s.scores + r * s.keys;
      inverse[r] = 1.0f / softmaxRow(scores, s, scale);
      if constexpr (kType == WeightType::kBFloat16) {
        convertToHalves(scores, nullptr, s.keys, s.weights + r * keyUnits, keyUnits);
      }
    }
    auto const* values = reinterpret_cast<unsigned char const*>(s.value);
    multiplyBlock<kType>({s.weights, keyUnits, values, columns, keyUnits, s.sums, columns}, rows);
    for (int r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < head.dim; d += kWidth) {
        int const some = head.dim - d < kWidth ? static_cast<int>(head.dim - d) : kWidth;
        storeSome(output + (row + r) * outputStride + d, load(s.sums + r * columns + d) * inverse[r],
                  some);
      }
    }
  }
}

}  // namespace
}  // namespace convbert
