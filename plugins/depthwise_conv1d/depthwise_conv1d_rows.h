// The CPU kernel, written once and compiled once per instruction set (depthwise_conv1d.cpp,
// _avx2.cpp, _avx512.cpp).
//
// Work goes in strips: a few vectors of adjacent channels, sliding down a run of rows with the last
// K input rows of the strip in registers, so that each input is loaded and converted once a run. The
// window is a ring indexed by compile-time constants: sliding costs no moves. The strip's weights,
// converted once, lie in L1 and enter the multiplications from there.
#pragma once

#include "../runtime/vectors.h"
#include "depthwise_conv1d.h"

namespace convbert {
namespace {

// Rows a strip slides down before the next strip starts: enough that the K - 1 rows loaded twice are
// few, and few enough to stay in L2.
constexpr int64_t kMaxRunRows = 64;

// Rows of one batch item. Row 0 is the first to compute; rows begin to end - 1 are in the sequence.
template <typename T>
struct Run {
  T const* input;
  int64_t inputStride;
  int64_t const* mask;
  T* output;
  int64_t outputStride;
  int64_t begin;
  int64_t end;
  int64_t rows;

  // Pads are not read: whatever they hold, even NaN, they count as zero.
  bool present(int64_t row) const {
    return row >= begin && row < end && (mask == nullptr || mask[row] != 0);
  }
};

// kVectors * kWidth adjacent channels from `channel`; with kPart, the first `part` lanes of one vector.
template <typename T, int K, int kVectors, bool kPart>
struct Strip {
  Run<T> run;
  T const* input;  // row 0
  T* output;
  int part;
  alignas(64) float weight[K][kVectors * kWidth];

  void loadElements(T const* from, Floats (&to)[kVectors]) const {
    if constexpr (kPart) {
      to[0] = loadPart(from, part);
    } else {
      for (int v = 0; v < kVectors; ++v) {
        to[v] = load(from + v * kWidth);
      }
    }
  }

  void loadWeights(T const* from, int64_t stride) {
    for (int k = 0; k < K; ++k) {
      Floats loaded[kVectors];
      loadElements(from + k * stride, loaded);
      for (int v = 0; v < kVectors; ++v) {
        store(&weight[k][v * kWidth], loaded[v]);
      }
    }
  }

  void loadRow(int64_t row, Floats (&to)[kVectors]) const {
    if (run.present(row)) {
      loadElements(input + row * run.inputStride, to);
    } else {
      for (int v = 0; v < kVectors; ++v) {
        to[v] = Floats{};
      }
    }
  }

  // Output rows base + kPhase to base + K - 1. Row base + j reads the slots j, j + 1, ..., j + K - 1
  // (mod K) of the window; its newest input goes where the oldest of the row before lay. Without
  // kChecked, all of them are to be computed, all their inputs are in the sequence and none is a pad.
  template <int kPhase, bool kChecked>
  __attribute__((always_inline)) void slide(Floats (&window)[K][kVectors], int64_t base) const {
    if constexpr (kPhase < K) {
      int64_t const row = base + kPhase;
      if (kChecked && row >= run.rows) {
        return;
      }
      constexpr int kNewest = (kPhase + K - 1) % K;
      if constexpr (kChecked) {
        loadRow(row + K / 2, window[kNewest]);
      } else {
        loadElements(input + (row + K / 2) * run.inputStride, window[kNewest]);
      }
      // From zero, so that every term is one fused operation: of a sum of two products the compiler
      // may fuse either, and a row would depend on which part of the sequence it was computed with.
      Floats sums[kVectors] = {};
      accumulate<kPhase, 0>(window, sums);
      if (kChecked && run.mask != nullptr && run.mask[row] == 0) {
        for (int v = 0; v < kVectors; ++v) {
          sums[v] = Floats{};
        }
      }
      T* to = output + row * run.outputStride;
      if constexpr (kPart) {
        storePart(to, sums[0], part);
      } else {
        for (int v = 0; v < kVectors; ++v) {
          store(to + v * kWidth, sums[v]);
        }
      }
      slide<kPhase + 1, kChecked>(window, base);
    }
  }

  template <int kPhase, int k>
  __attribute__((always_inline)) void accumulate(Floats const (&window)[K][kVectors],
                                                 Floats (&sums)[kVectors]) const {
    if constexpr (k < K) {
      for (int v = 0; v < kVectors; ++v) {
        sums[v] += load(&weight[k][v * kWidth]) * window[(kPhase + k) % K][v];
      }
      accumulate<kPhase, k + 1>(window, sums);
    }
  }

  template <int k>
  __attribute__((always_inline)) void fill(Floats (&window)[K][kVectors]) const {
    if constexpr (k < K - 1) {
      loadRow(k - K / 2, window[k]);
      fill<k + 1>(window);
    }
  }

  void compute() const {
    Floats window[K][kVectors];
    fill<0>(window);
    int64_t base = 0;
    if (run.mask == nullptr) {
      for (; base + K <= run.rows && base + K + K / 2 <= run.end; base += K) {
        slide<0, false>(window, base);
      }
    }
    for (; base < run.rows; base += K) {
      slide<0, true>(window, base);
    }
  }
};

template <typename T, int K, int kVectors, bool kPart>
void computeStrip(Run<T> const& run, T const* weight, int64_t channels, int64_t channel) {
  Strip<T, K, kVectors, kPart> strip;
  strip.run = run;
  strip.input = run.input + channel;
  strip.output = run.output + channel;
  strip.part = static_cast<int>(channels);
  strip.loadWeights(weight + channel, channels);
  strip.compute();
}

template <typename T, int K>
void runRows(DepthwiseConv1dParams const& p, int64_t firstRow, int64_t lastRow) {
  // Two vectors a strip where their windows fit the registers, of which AVX-512 has 32.
  constexpr int kVectors = K <= (kWidth == 16 ? 9 : 5) ? 2 : 1;
  T const* weight = static_cast<T const*>(p.weight);
  for (int64_t row = firstRow; row < lastRow;) {
    int64_t const b = row / p.seq;
    int64_t const s = row % p.seq;
    Run<T> run;
    run.rows = p.seq - s < lastRow - row ? p.seq - s : lastRow - row;
    run.rows = run.rows < kMaxRunRows ? run.rows : kMaxRunRows;
    run.begin = -s;
    run.end = p.seq - s;
    run.inputStride = p.inputRowStride;
    run.outputStride = p.outputRowStride;
    run.input =
        static_cast<T const*>(p.input) + b * p.inputBatchStride + s * p.inputRowStride;
    run.output = static_cast<T*>(p.output) + b * p.outputBatchStride + s * p.outputRowStride;
    run.mask = p.mask == nullptr ? nullptr : p.mask + b * p.maskBatchStride + s;
    int64_t c = 0;
    for (; c + kVectors * kWidth <= p.channels; c += kVectors * kWidth) {
      computeStrip<T, K, kVectors, false>(run, weight, p.channels, c);
    }
    if (p.channels < kWidth) {
      computeStrip<T, K, 1, true>(run, weight, p.channels, 0);
    } else {
      // What is left: the last strip moves back to end with the row and computes some channels again.
      for (; c < p.channels; c += kWidth) {
        int64_t const last = p.channels - kWidth;
        computeStrip<T, K, 1, false>(run, weight, p.channels, c < last ? c : last);
      }
    }
    row += run.rows;
  }
}

template <typename T>
void runRowsOfKernelSize(DepthwiseConv1dParams const& p, int64_t firstRow, int64_t lastRow) {
  switch (p.kernelSize) {
    case 1: return runRows<T, 1>(p, firstRow, lastRow);
    case 3: return runRows<T, 3>(p, firstRow, lastRow);
    case 5: return runRows<T, 5>(p, firstRow, lastRow);
    case 7: return runRows<T, 7>(p, firstRow, lastRow);
    case 9: return runRows<T, 9>(p, firstRow, lastRow);
    case 11: return runRows<T, 11>(p, firstRow, lastRow);
    case 13: return runRows<T, 13>(p, firstRow, lastRow);
    default: return runRows<T, 15>(p, firstRow, lastRow);  // validate() admits no other size
  }
}

inline void runRowsOfType(DepthwiseConv1dParams const& p, int64_t firstRow, int64_t lastRow) {
  switch (p.dtype) {
    case DataType::kFloat32: return runRowsOfKernelSize<float>(p, firstRow, lastRow);
    case DataType::kFloat16: return runRowsOfKernelSize<Float16>(p, firstRow, lastRow);
    case DataType::kBFloat16: return runRowsOfKernelSize<BFloat16>(p, firstRow, lastRow);
  }
}

}  // namespace
}  // namespace convbert
