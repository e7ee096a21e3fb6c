// Rows of activations times a packed weight, written once and compiled once per instruction set.
//
// All element types share one loop. An operand's unit is 4 bytes: one float32, two bfloat16 or four
// int8 of adjacent inputs. For each unit, a vector of weights (a unit for each column) meets one
// unit of a row, broadcast, in one multiply-accumulate instruction: FMA, VDPBF16PS or VPDPBUSD.
// Where the instruction is missing the same sums are made of what there is.
//
// int8 weights are unsigned with 128 added (VPDPBUSD multiplies unsigned by signed); a row's surplus,
// 128 times the sum of its inputs, is subtracted at the end.
#pragma once

#include "../runtime/vectors.h"
#include "amx_tiles.h"
#include "packed_weight.h"

namespace convbert {
namespace {

// Tile of the result that stays in registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;
#else
constexpr int kTileRows = 2;
constexpr int kTileVectors = 4;
#endif
constexpr int kTileColumns = kTileVectors * kWidth;

// Units taken before the next block of rows: a block's part of 64 columns is 96 KB, which stays in
// L2 while all rows meet it.
constexpr int64_t kStepUnits = 384;

// Rows handed to one call of multiplyBlock at most.
constexpr int kMaxRows = 144;

// Sums of a block: float32, or int32 for int8.
union Sums {
  Floats floats;
  Ints ints;
};

template <WeightType kType>
inline Sums multiplyAdd(Sums sums, Ints weights, Ints unit) {
  if constexpr (kType == WeightType::kFloat32) {
    sums.floats += (Floats)weights * (Floats)unit;
  } else if constexpr (kType == WeightType::kBFloat16) {
#if defined(__AVX512BF16__)
    sums.floats = (Floats)_mm512_dpbf16_ps((__m512)sums.floats, (__m512bh)(__m512i)weights,
                                           (__m512bh)(__m512i)unit);
#else
    int const upper = static_cast<int>(0xffff0000u);
    sums.floats += (Floats)(weights << 16) * (Floats)(unit << 16);
    sums.floats += (Floats)(weights & upper) * (Floats)(unit & upper);
#endif
  } else {
#if defined(__AVX512VNNI__)
    sums.ints = (Ints)_mm512_dpbusd_epi32((__m512i)sums.ints, (__m512i)weights, (__m512i)unit);
#elif defined(__AVX512BW__)
    __m512i const bytes = _mm512_set1_epi16(0xff);
    __m512i const even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)unit, 8), 8);
    __m512i const odd = _mm512_srai_epi16((__m512i)unit, 8);
    sums.ints += (Ints)_mm512_madd_epi16(_mm512_and_si512((__m512i)weights, bytes), even);
    sums.ints += (Ints)_mm512_madd_epi16(_mm512_srli_epi16((__m512i)weights, 8), odd);
#elif defined(__AVX2__)
    __m256i const bytes = _mm256_set1_epi16(0xff);
    __m256i const even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)unit, 8), 8);
    __m256i const odd = _mm256_srai_epi16((__m256i)unit, 8);
    sums.ints += (Ints)_mm256_madd_epi16(_mm256_and_si256((__m256i)weights, bytes), even);
    sums.ints += (Ints)_mm256_madd_epi16(_mm256_srli_epi16((__m256i)weights, 8), odd);
#else
    for (int byte = 0; byte < 4; ++byte) {
      sums.ints += ((weights >> (8 * byte)) & 0xff) * ((unit << (24 - 8 * byte)) >> 24);
    }
#endif
  }
  return sums;
}

constexpr int64_t kLine = 64;  // bytes

// What multiplyBlock reads and writes. `a`: rows of units, `aStride` units apart. `b`: `units` rows
// of `columns` units, contiguous. `c`: rows of sums, `cStride` elements apart.
struct BlockOperands {
  uint32_t const* a;
  int64_t aStride;
  unsigned char const* b;
  int64_t columns;  // a multiple of kPanelColumns
  int64_t units;
  float* c;
  int64_t cStride;
  // [next, nextEnd) is brought into L2 meanwhile, a line for each unit, or else the products of a few
  // rows would wait for their weights.
  unsigned char const* next = nullptr;
  unsigned char const* nextEnd = nullptr;
};

template <WeightType kType, int kRows, int kVectors>
inline void multiplyTile(BlockOperands const& block, bool add) {
  Sums sums[kRows][kVectors];
  // Unrolled, so that all sums are registers from the first to the last line.
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v].floats = add ? load(block.c + r * block.cStride + v * kWidth) : Floats{};
    }
  }
  uint32_t const* a = block.a;
  unsigned char const* b = block.b;
  unsigned char const* next = block.next;
  int64_t const line = next < block.nextEnd ? kLine : 0;
  for (int64_t u = 0; u < block.units; ++u, ++a, b += block.columns * 4, next += line) {
    __builtin_prefetch(next, 0, 2);
    Ints weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      memcpy(&weights[v], b + v * kWidth * 4, sizeof(Ints));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Ints const unit = Ints{} + static_cast<int>(a[r * block.aStride]);
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = multiplyAdd<kType>(sums[r][v], weights[v], unit);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store(block.c + r * block.cStride + v * kWidth, sums[r][v].floats);
    }
  }
}

template <WeightType kType, int kVectors>
inline void multiplyRows(BlockOperands block, int rows, bool add) {
  for (; rows >= kTileRows; rows -= kTileRows) {
    multiplyTile<kType, kTileRows, kVectors>(block, add);
    block.a += kTileRows * block.aStride;
    block.c += kTileRows * block.cStride;
    block.next += kLine * block.units;
  }
  switch (rows) {
    case 1: return multiplyTile<kType, 1, kVectors>(block, add);
    case 2: return multiplyTile<kType, 2, kVectors>(block, add);
    case 3: return multiplyTile<kType, 3, kVectors>(block, add);
    case 4: return multiplyTile<kType, 4, kVectors>(block, add);
    case 5: return multiplyTile<kType, 5, kVectors>(block, add);
    default: return;
  }
}

// c (+)= a b for the units of `block`; add: keep what c holds.
template <WeightType kType>
inline void multiplyColumns(BlockOperands const& block, int rows, bool add) {
  for (int64_t column = 0; column < block.columns;) {
    BlockOperands part = block;
    part.b += column * 4;
    part.c += column;
    int64_t const vectors = (block.columns - column) / kWidth;
    if (vectors >= kTileVectors) {
      multiplyRows<kType, kTileVectors>(part, rows, add);
      column += kTileColumns;
    } else if (vectors >= 2 && kTileVectors > 2) {
      multiplyRows<kType, 2>(part, rows, add);
      column += 2 * kWidth;
    } else {
      multiplyRows<kType, 1>(part, rows, add);
      column += kWidth;
    }
  }
}

// c = a b, rows at most kMaxRows.
template <WeightType kType>
inline void multiplyBlock(BlockOperands const& block, int rows) {
#if defined(CONVBERT_AMX)
  if (kType != WeightType::kFloat32 && block.units % kAmxUnits == 0) {
    return multiplyBlockAmx<kType>(block, rows);
  }
#endif
  for (int64_t first = 0; first < block.units; first += kStepUnits) {
    BlockOperands part = block;
    part.a += first;
    part.b += first * block.columns * 4;
    part.units = block.units - first < kStepUnits ? block.units - first : kStepUnits;
    part.next = part.b + part.units * block.columns * 4;
    part.nextEnd = part.next + part.units * block.columns * 4;
    multiplyColumns<kType>(part, rows, first > 0);
  }
}

// Activations in a weight's element type. Rows lie `stride` units apart; the units of a group begin
// at group * unitsOf().
struct Activations {
  uint32_t const* units;
  int64_t stride;
  float const* steps;        // int8: of each row
  int32_t const* surpluses;  // int8: 128 * sum of a row's inputs, (groups, kMaxRows)
};

template <WeightType kType, typename Finish>
inline void multiplyWeight(Activations const& a, PackedWeight const& w, float const* bias, int rows,
                           Finish&& finish) {
  alignas(64) float sums[kMaxRows][kBlockColumns];
  for (int32_t group = 0; group < w.groups; ++group) {
    unsigned char const* b = w.blocks + group * groupBytes(w);
    for (int64_t column = 0; column < w.outputs; column += kBlockColumns) {
      int64_t const left = w.outputs - column;
      int const real = static_cast<int>(left < kBlockColumns ? left : kBlockColumns);
      int64_t const columns = roundUp(real, kPanelColumns);
      multiplyBlock<kType>({a.units + group * unitsOf(w), a.stride, b, columns, unitsOf(w), sums[0],
                            kBlockColumns},
                           rows);
      b += columns * unitsOf(w) * 4;
      int64_t const out = group * w.outputs + column;
      for (int v = 0; v < real; v += kWidth) {
        int const count = real - v < kWidth ? real - v : kWidth;
        Floats const add = loadPart(bias + out + v, count);
        Floats scale{};
        if (kType == WeightType::kInt8) {
          scale = loadPart(w.scales + out + v, count);
        }
        for (int r = 0; r < rows; ++r) {
          Floats values = load(&sums[r][v]);
          if (kType == WeightType::kInt8) {
            Ints const exact = (Ints)values - a.surpluses[group * kMaxRows + r];
            values = __builtin_convertvector(exact, Floats) * (scale * a.steps[r]);
          }
          finish(r, out + v, count, values + add);
        }
      }
    }
  }
}

// y = x w + bias for `rows` rows (at most kMaxRows): calls finish(row, column, count, values) with
// `count` (at most kWidth) adjacent results.
template <typename Finish>
inline void matmul(Activations const& a, PackedWeight const& w, float const* bias, int rows,
                   Finish&& finish) {
#if defined(CONVBERT_AMX)
  AmxTiles const tiles;
#endif
  switch (w.type) {
    case WeightType::kFloat32: return multiplyWeight<WeightType::kFloat32>(a, w, bias, rows, finish);
    case WeightType::kBFloat16: return multiplyWeight<WeightType::kBFloat16>(a, w, bias, rows, finish);
    case WeightType::kInt8: return multiplyWeight<WeightType::kInt8>(a, w, bias, rows, finish);
  }
}

}  // namespace
}  // namespace convbert
