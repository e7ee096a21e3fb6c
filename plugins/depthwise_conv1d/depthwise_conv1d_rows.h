// The CPU kernel, written once and compiled once per instruction set (depthwise_conv1d.cpp,
// _avx2.cpp, _avx512.cpp).
//
// Work goes in strips: two vectors of adjacent channels down a run of rows, kRowsTogether rows at a
// time so that each input row is loaded once for all of them. The strip's weights, converted once,
// lie in L1 and enter the multiplications from there.
#pragma once

#include "../runtime/vectors.h"
#include "depthwise_conv1d.h"

namespace convbert {
namespace {

// Rows a strip goes down before the next strip starts: few enough that the run stays in L2.
constexpr int64_t kMaxRunRows = 64;
constexpr int kStripVectors = 2;
constexpr int kStrip = kStripVectors * kWidth;

// Rows of one batch item: `rows` to compute, from row `first` on. Pointers are at row 0.
template <typename T>
struct Run {
  T const* input;
  int64_t inputStride;
  int64_t const* mask;
  T* output;
  int64_t outputStride;
  int64_t first;
  int64_t rows;
  int64_t seq;
  int kernelSize;
};

// The one size that published checkpoints have: its loops are unrolled. 0 stands for any other.
constexpr int kUsualKernelSize = 9;

// Output rows [row, row + kRows) of kVectors * kWidth channels, or of `part` channels when kVectors
// is 1 and part > 0. Pads are not read: whatever they hold, even NaN, they count as zero. Every sum
// takes its taps in order, from zero: a row does not depend on the rows computed with it.
template <typename T, int kRows, int kVectors, int kSize>
inline void convolveRows(Run<T> const& run, int64_t channel, float const (*weight)[kStrip],
                         int64_t row, int part) {
  int const kernelSize = kSize > 0 ? kSize : run.kernelSize;
  int const half = kernelSize / 2;
  Floats sums[kRows][kVectors] = {};
  int64_t const low = row < half ? half - row : 0;
  int64_t const beyond = row + kRows + half - run.seq;
  int64_t const high = kernelSize + kRows - 1 - (beyond > 0 ? beyond : 0);
  auto addRow = [&](int64_t i) __attribute__((always_inline)) {
    int64_t const at = row - half + i;
    if (run.mask != nullptr && run.mask[at] == 0) {
      return;
    }
    T const* from = run.input + at * run.inputStride + channel;
    Floats loaded[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      loaded[v] = kVectors == 1 && part > 0 ? loadPart(from, part) : load(from + v * kWidth);
    }
    for (int r = 0; r < kRows; ++r) {
      int64_t const k = i - r;
      if (k >= 0 && k < kernelSize) {
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] += load(&weight[k][v * kWidth]) * loaded[v];
        }
      }
    }
  };
  if (kSize > 0 && low == 0 && beyond <= 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kSize + kRows - 1; ++i) {
      addRow(i);
    }
  } else {
    for (int64_t i = low; i < high; ++i) {
      addRow(i);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    T* to = run.output + (row + r) * run.outputStride + channel;
    bool const pad = run.mask != nullptr && run.mask[row + r] == 0;
    for (int v = 0; v < kVectors; ++v) {
      Floats const sum = pad ? Floats{} : sums[r][v];
      if (kVectors == 1 && part > 0) {
        storePart(to, sum, part);
      } else {
        store(to + v * kWidth, sum);
      }
    }
  }
}

template <typename T, int kVectors, int kSize>
void computeStrip(Run<T> const& run, T const* weight, int64_t channels, int64_t channel, int part) {
  alignas(64) float floats[kMaxKernelSize][kStrip];
  for (int k = 0; k < run.kernelSize; ++k) {
    T const* from = weight + k * channels + channel;
    for (int v = 0; v < kVectors; ++v) {
      bool const partial = kVectors == 1 && part > 0;
      store(&floats[k][v * kWidth], partial ? loadPart(from, part) : load(from + v * kWidth));
    }
  }
  int64_t row = run.first;
  int64_t const last = run.first + run.rows;
  for (; row + kRowsTogether <= last; row += kRowsTogether) {
    convolveRows<T, kRowsTogether, kVectors, kSize>(run, channel, floats, row, part);
  }
  for (; row < last; ++row) {
    convolveRows<T, 1, kVectors, kSize>(run, channel, floats, row, part);
  }
}

template <typename T, int kSize>
void runRows(DepthwiseConv1dParams const& p, int64_t firstRow, int64_t lastRow) {
  T const* weight = static_cast<T const*>(p.weight);
  for (int64_t row = firstRow; row < lastRow;) {
    int64_t const b = row / p.seq;
    Run<T> run;
    run.first = row % p.seq;
    run.rows = p.seq - run.first < lastRow - row ? p.seq - run.first : lastRow - row;
    run.rows = run.rows < kMaxRunRows ? run.rows : kMaxRunRows;
    run.seq = p.seq;
    run.kernelSize = p.kernelSize;
    run.inputStride = p.inputRowStride;
    run.outputStride = p.outputRowStride;
    run.input = static_cast<T const*>(p.input) + b * p.inputBatchStride;
    run.output = static_cast<T*>(p.output) + b * p.outputBatchStride;
    run.mask = p.mask == nullptr ? nullptr : p.mask + b * p.maskBatchStride;
    int64_t c = 0;
    for (; c + kStrip <= p.channels; c += kStrip) {
      computeStrip<T, kStripVectors, kSize>(run, weight, p.channels, c, 0);
    }
    for (; c + kWidth <= p.channels; c += kWidth) {
      computeStrip<T, 1, kSize>(run, weight, p.channels, c, 0);
    }
    if (c < p.channels) {
      computeStrip<T, 1, kSize>(run, weight, p.channels, c, static_cast<int>(p.channels - c));
    }
    row += run.rows;
  }
}

template <typename T>
void runRowsOfSize(DepthwiseConv1dParams const& p, int64_t firstRow, int64_t lastRow) {
  if (p.kernelSize == kUsualKernelSize) {
    return runRows<T, kUsualKernelSize>(p, firstRow, lastRow);
  }
  return runRows<T, 0>(p, firstRow, lastRow);
}

inline void runRowsOfType(DepthwiseConv1dParams const& p, int64_t firstRow, int64_t lastRow) {
  switch (p.dtype) {
    case DataType::kFloat32: return runRowsOfSize<float>(p, firstRow, lastRow);
    case DataType::kFloat16: return runRowsOfSize<Float16>(p, firstRow, lastRow);
    case DataType::kBFloat16: return runRowsOfSize<BFloat16>(p, firstRow, lastRow);
  }
}

}  // namespace
}  // namespace convbert
