// Intel AMX: eight tile registers of 16 rows of 64 bytes, and products of two of them. Compiled for
// the real registers with -mamx-*, or for an emulation in memory with CONVBERT_EMULATE_AMX, which
// tests run on any CPU: the code above the tiles is the same.
#pragma once

#include "packed_weight.h"

#if defined(__AMX_TILE__) || defined(CONVBERT_EMULATE_AMX)
#define CONVBERT_AMX

#include "../runtime/vectors.h"

namespace convbert {
namespace {

constexpr int64_t kAmxUnits = 16;  // units in a tile's row
constexpr int kAmxRows = 16;

#if defined(CONVBERT_EMULATE_AMX)

thread_local unsigned char emulatedTiles[8][kAmxRows][64];

// Tiles are configured as long as one of these lives.
struct AmxTiles {
  AmxTiles() { memset(emulatedTiles, 0xff, sizeof(emulatedTiles)); }
};

template <int kTile>
inline void tileZero() {
  memset(emulatedTiles[kTile], 0, sizeof(emulatedTiles[kTile]));
}

template <int kTile>
inline void tileLoad(void const* from, int64_t strideBytes) {
  for (int r = 0; r < kAmxRows; ++r) {
    memcpy(emulatedTiles[kTile][r], static_cast<unsigned char const*>(from) + r * strideBytes, 64);
  }
}

template <int kTile>
inline void tileStore(void* to, int64_t strideBytes) {
  for (int r = 0; r < kAmxRows; ++r) {
    memcpy(static_cast<unsigned char*>(to) + r * strideBytes, emulatedTiles[kTile][r], 64);
  }
}

// tile C += tile A times tile B
template <WeightType kType, int kC, int kA, int kB>
inline void tileMultiply() {
  for (int m = 0; m < kAmxRows; ++m) {
    for (int n = 0; n < 16; ++n) {
      unsigned char* sum = emulatedTiles[kC][m] + n * 4;
      float real;
      int32_t whole;
      memcpy(&real, sum, 4);
      memcpy(&whole, sum, 4);
      for (int u = 0; u < 16; ++u) {
        unsigned char const* a = emulatedTiles[kA][m] + u * 4;
        unsigned char const* b = emulatedTiles[kB][u] + n * 4;
        if (kType == WeightType::kInt8) {
          for (int e = 0; e < 4; ++e) {
            whole += static_cast<signed char>(a[e]) * b[e];
          }
        } else {
          for (int e = 0; e < 2; ++e) {
            BFloat16 x, y;
            memcpy(&x, a + 2 * e, 2);
            memcpy(&y, b + 2 * e, 2);
            real += toFloat(x) * toFloat(y);
          }
        }
      }
      memcpy(sum, kType == WeightType::kInt8 ? static_cast<void*>(&whole) : &real, 4);
    }
  }
}

#else

// Tiles are configured as long as one of these lives.
struct AmxTiles {
  AmxTiles() {
    struct alignas(64) {
      unsigned char palette = 1, startRow = 0, reserved[14] = {};
      uint16_t bytesOfRow[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
};

// GCC's intrinsics take literal tile numbers only, which a template's are not to it.
template <int kTile>
inline void tileZero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void tileLoad(void const* from, int64_t strideBytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(strideBytes) : "memory");
}

template <int kTile>
inline void tileStore(void* to, int64_t strideBytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(strideBytes) : "memory");
}

template <WeightType kType, int kC, int kA, int kB>
inline void tileMultiply() {
  if constexpr (kType == WeightType::kInt8) {  // signed activations, unsigned weights
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
}

#endif

// 32 rows by 32 columns: tiles 0-3 the sums, 4 and 5 of a, 6 and 7 of b.
template <WeightType kType, bool kLower, bool kRight, typename Operands>
inline void multiplyTilesAmx(Operands const& block) {
  int64_t const aBytes = block.aStride * 4;
  int64_t const bBytes = block.columns * 4;
  int64_t const cBytes = block.cStride * 4;
  tileZero<0>();
  tileZero<1>();
  tileZero<2>();
  tileZero<3>();
  for (int64_t u = 0; u < block.units; u += kAmxUnits) {
    unsigned char const* b = block.b + u * bBytes;
    tileLoad<4>(block.a + u, aBytes);
    tileLoad<6>(b, bBytes);
    tileMultiply<kType, 0, 4, 6>();
    if constexpr (kRight) {
      tileLoad<7>(b + 64, bBytes);
      tileMultiply<kType, 1, 4, 7>();
    }
    if constexpr (kLower) {
      tileLoad<5>(block.a + kAmxRows * block.aStride + u, aBytes);
      tileMultiply<kType, 2, 5, 6>();
      if constexpr (kRight) {
        tileMultiply<kType, 3, 5, 7>();
      }
    }
  }
  tileStore<0>(block.c, cBytes);
  if constexpr (kRight) {
    tileStore<1>(block.c + 16, cBytes);
  }
  if constexpr (kLower) {
    tileStore<2>(block.c + kAmxRows * block.cStride, cBytes);
    if constexpr (kRight) {
      tileStore<3>(block.c + kAmxRows * block.cStride + 16, cBytes);
    }
  }
}

// c = a b. Reads and writes whole tiles: `a` and `c` must have roundUp(rows, 16) rows.
template <WeightType kType, typename Operands>
inline void multiplyBlockAmx(Operands const& block, int rows) {
  for (int64_t column = 0; column < block.columns; column += 32) {
    bool const right = block.columns - column > 16;
    for (int row = 0; row < rows; row += 32) {
      Operands part = block;
      part.a += row * block.aStride;
      part.b += column * 4;
      part.c += row * block.cStride + column;
      bool const lower = rows - row > kAmxRows;
      if (lower && right) {
        multiplyTilesAmx<kType, true, true>(part);
      } else if (lower) {
        multiplyTilesAmx<kType, true, false>(part);
      } else if (right) {
        multiplyTilesAmx<kType, false, true>(part);
      } else {
        multiplyTilesAmx<kType, false, false>(part);
      }
    }
  }
}

}  // namespace
}  // namespace convbert

#endif
