// The CPU kernel, written once and compiled once per instruction set (span_dynamic_conv.cpp,
// _avx2.cpp, _avx512.cpp).
//
// Work goes in blocks of a few rows. First every (row, head) softmax of the block, with kWidth of
// them side by side in a vector: max, exp and sum are then plain vertical operations whatever K is,
// where a softmax inside one vector spends its time in shuffles. Then the windowed sum,
// kRowsTogether rows at a time so that each value row is loaded once for all of them.
#pragma once

#include "../runtime/vectors.h"
#include "span_dynamic_conv.h"

namespace convbert {
namespace {

// Softmaxes held at once: what a block of rows may need, in 16 KB of stack.
constexpr int kMaxGroups = 256;

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

// One head of some adjacent output rows, from the first channel of the head on. Row r uses the taps of
// column group + r * groupStep. Value rows low to high - 1 of the window exist; the window of the
// first row starts at `value`, and at `mask` where there is one.
template <typename T>
struct Window {
  T const* value;
  int64_t valueStride;
  int64_t const* mask;
  T* output;
  int64_t outputStride;
  float (*taps)[kMaxGroups];
  int group;
  int groupStep;
  int kernelSize;
  int low;
  int high;
};

// The one size that published checkpoints have: its loops are unrolled. 0 stands for any other, and
// for all with 16 registers, where unrolling costs more in spills than it saves.
constexpr int kUsualKernelSize = 9;
constexpr int kUnrolledSize = kWidth == 16 ? kUsualKernelSize : 0;

// kVectors * kWidth channels from `channel` (or `part` channels when kVectors is 1 and part > 0) of
// kRows rows. A pad is not read: whatever it holds, even NaN, it counts as zero. Every sum takes its
// taps in order, from zero: a row does not depend on the rows computed with it.
template <typename T, int kRows, int kSize, int kVectors>
inline void windowedSum(Window<T> const& window, int channel, int part) {
  int const kernelSize = kSize > 0 ? kSize : window.kernelSize;
  bool const partial = kVectors == 1 && part > 0;
  float(*const taps)[kMaxGroups] = window.taps;
  int const group = window.group;
  int const groupStep = window.groupStep;
  T const* const value = window.value + channel;
  int64_t const valueStride = window.valueStride;
  Floats sums[kRows][kVectors] = {};
  auto addRow = [&](int i) __attribute__((always_inline)) {
    T const* row = value + i * valueStride;
    Floats loaded[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      loaded[v] = partial ? loadPart(row, part) : load(row + v * kWidth);
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
  };
  if (kSize > 0 && window.mask == nullptr && window.low == 0 &&
      window.high == kSize + kRows - 1) {
#pragma GCC unroll 16
    for (int i = 0; i < kSize + kRows - 1; ++i) {
      addRow(i);
    }
  } else {
    for (int i = window.low; i < window.high; ++i) {
      if (window.mask == nullptr || window.mask[i] != 0) {
        addRow(i);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    T* to = window.output + r * window.outputStride + channel;
    for (int v = 0; v < kVectors; ++v) {
      if (partial) {
        storePart(to, sums[r][v], part);
      } else {
        store(to + v * kWidth, sums[r][v]);
      }
    }
  }
}

template <typename T, int kRows, int kSize>
inline void windowedSumOfHead(Window<T> const& window, int headDim) {
  int d = 0;
  for (; d + 4 * kWidth <= headDim; d += 4 * kWidth) {
    windowedSum<T, kRows, kSize, 4>(window, d, 0);
  }
  if (d + 3 * kWidth <= headDim) {  // head dim 48 is one piece
    windowedSum<T, kRows, kSize, 3>(window, d, 0);
    d += 3 * kWidth;
  }
  for (; d + kWidth <= headDim; d += kWidth) {
    windowedSum<T, kRows, kSize, 1>(window, d, 0);
  }
  if (d < headDim) {
    windowedSum<T, kRows, kSize, 1>(window, d, headDim - d);
  }
}

// Logits that lie in memory. A source of logits fills taps[k][i * heads + h] for `rows` rows from s0
// of item b and `heads` heads from h0.
template <typename T>
struct LogitsOfTensor {
  SpanDynamicConvParams const& p;

  void fill(int64_t b, int64_t s0, int rows, int h0, int heads, float (*taps)[kMaxGroups]) const {
    T const* logits = static_cast<T const*>(p.kernelLogits) + b * p.logitsBatchStride;
    for (int i = 0; i < rows; ++i) {
      T const* from = logits + (s0 + i) * p.logitsRowStride + int64_t(h0) * p.kernelSize;
      for (int h = 0; h < heads; ++h) {
        for (int k = 0; k < p.kernelSize; ++k) {
          taps[k][i * heads + h] = toFloat(from[h * p.kernelSize + k]);
        }
      }
    }
  }
};

template <typename T, int kSize, typename LogitsSource>
void runRowsOfSize(SpanDynamicConvParams const& p, LogitsSource const& source, int64_t firstRow,
                   int64_t lastRow) {
  alignas(64) float taps[kMaxKernelSize][kMaxGroups];
  int const kernelSize = kSize > 0 ? kSize : p.kernelSize;
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
    T* output = static_cast<T*>(p.output) + b * p.outputBatchStride;
    int64_t const* mask = p.mask == nullptr ? nullptr : p.mask + b * p.maskBatchStride;
    for (int h0 = 0; h0 < p.numHeads; h0 += headSlice) {
      int const heads = p.numHeads - h0 < headSlice ? p.numHeads - h0 : headSlice;
      int const groups = static_cast<int>(rows) * heads;
      int const padded = (groups + kWidth - 1) / kWidth * kWidth;
      source.fill(b, s0, static_cast<int>(rows), h0, heads, taps);
      for (int k = 0; k < kernelSize; ++k) {
        for (int g = groups; g < padded; ++g) {
          taps[k][g] = 0.0f;
        }
      }
      softmaxColumns(taps, kernelSize, padded);
      for (int64_t i = 0; i < rows;) {
        int64_t const s = s0 + i;
        bool const together = i + kRowsTogether <= rows;
        int const produced = together ? kRowsTogether : 1;
        int64_t const before = half - s;                   // window rows before the sequence
        int64_t const after = s + produced + half - p.seq;  // and after it
        Window<T> window{};
        window.valueStride = p.valueRowStride;
        window.mask = mask == nullptr ? nullptr : mask + s - half;
        window.outputStride = p.outputRowStride;
        window.taps = taps;
        window.groupStep = heads;
        window.kernelSize = kernelSize;
        window.low = before > 0 ? static_cast<int>(before) : 0;
        window.high = kernelSize + produced - 1 - (after > 0 ? static_cast<int>(after) : 0);
        for (int h = 0; h < heads; ++h) {
          int64_t const channel = int64_t(h0 + h) * p.headDim;
          window.value = value + (s - half) * p.valueRowStride + channel;
          window.output = output + s * p.outputRowStride + channel;
          window.group = static_cast<int>(i) * heads + h;
          if (together) {
            windowedSumOfHead<T, kRowsTogether, kSize>(window, p.headDim);
          } else {
            windowedSumOfHead<T, 1, kSize>(window, p.headDim);
          }
        }
        for (int r = 0; mask != nullptr && r < produced; ++r) {
          if (mask[s + r] == 0) {
            memset(output + (s + r) * p.outputRowStride + int64_t(h0) * p.headDim, 0,
                   sizeof(T) * heads * p.headDim);
          }
        }
        i += produced;
      }
    }
    row += rows;
  }
}

template <typename T, typename LogitsSource>
void runRows(SpanDynamicConvParams const& p, LogitsSource const& source, int64_t firstRow,
             int64_t lastRow) {
  if (p.kernelSize == kUsualKernelSize) {
    return runRowsOfSize<T, kUnrolledSize>(p, source, firstRow, lastRow);
  }
  return runRowsOfSize<T, 0>(p, source, firstRow, lastRow);
}

inline void runRowsOfType(SpanDynamicConvParams const& params, int64_t firstRow, int64_t lastRow) {
  switch (params.dtype) {
    case DataType::kFloat32: return runRows<float>(params, LogitsOfTensor<float>{params}, firstRow, lastRow);
    case DataType::kFloat16: return runRows<Float16>(params, LogitsOfTensor<Float16>{params}, firstRow, lastRow);
    case DataType::kBFloat16: return runRows<BFloat16>(params, LogitsOfTensor<BFloat16>{params}, firstRow, lastRow);
  }
}

}  // namespace
}  // namespace convbert
