// The CPU kernel: SpanDynamicConv's, with the logits of a block of rows computed on the spot.
//
// A block is at most 32 rows. Its logits are a small matrix product: panels of kPanel columns, steps
// of kStep channels, with query * key_conv and the weights of a step side by side in L1 as floats.
#pragma once

#include "../span_dynamic_conv/span_dynamic_conv_rows.h"
#include "fused_span_dynamic_conv.h"

namespace convbert {
namespace {

constexpr int kMaxBlockRows = 32;
constexpr int kPanelVectors = 4;
constexpr int kPanel = kPanelVectors * kWidth;
constexpr int kStep = 64;

template <typename T>
struct GeneratedLogits {
  FusedSpanDynamicConvParams const& p;

  void fill(int64_t b, int64_t s0, int rows, int h0, int heads, float (*taps)[kMaxGroups]) const {
    alignas(64) float sums[kMaxBlockRows][kPanel];
    int const kernelSize = p.conv.kernelSize;
    int const columns = heads * kernelSize;
    int64_t const firstColumn = int64_t(h0) * kernelSize;
    for (int n0 = 0; n0 < columns; n0 += kPanel) {
      int const width = columns - n0 < kPanel ? columns - n0 : kPanel;
      multiply(b, s0, rows, firstColumn + n0, width, sums);
      T const* bias = static_cast<T const*>(p.bias) + firstColumn + n0;
      for (int n = 0; n < width; ++n) {
        int const head = (n0 + n) / kernelSize;
        float* to = taps[(n0 + n) % kernelSize] + head;
        float const add = toFloat(bias[n]);
        for (int i = 0; i < rows; ++i) {
          to[i * heads] = sums[i][n] + add;
        }
      }
    }
  }

 private:
  void multiply(int64_t b, int64_t s0, int rows, int64_t column, int width,
                float (*sums)[kPanel]) const {
    alignas(64) float products[kMaxBlockRows][kStep];
    alignas(64) float weights[kStep][kPanel];
    int64_t const channels = int64_t(p.conv.numHeads) * p.conv.headDim;
    int64_t const allColumns = int64_t(p.conv.numHeads) * p.conv.kernelSize;
    // Rows are taken kRowsTogether at a time: the ones beyond the block multiply zeros.
    int const paddedRows = (rows + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
    memset(sums, 0, sizeof(float) * paddedRows * kPanel);
    T const* query = static_cast<T const*>(p.query) + b * p.queryBatchStride;
    T const* keyConv = static_cast<T const*>(p.keyConv) + b * p.keyConvBatchStride;
    T const* weight = static_cast<T const*>(p.weight) + column;
    for (int64_t c0 = 0; c0 < channels; c0 += kStep) {
      int const step = channels - c0 < kStep ? static_cast<int>(channels - c0) : kStep;
      for (int i = 0; i < paddedRows; ++i) {
        multiplyElements(query + (s0 + i) * p.queryRowStride + c0,
                         keyConv + (s0 + i) * p.keyConvRowStride + c0, i < rows ? step : 0,
                         products[i]);
      }
      for (int c = 0; c < step; ++c) {
        convert(weight + (c0 + c) * allColumns, width, weights[c]);
      }
      for (int i = 0; i < paddedRows; i += kRowsTogether) {
        accumulate(&products[i], weights, step, &sums[i]);
      }
    }
  }

  // to[0, kStep) = query * keyConv, zero from `count` on.
  static void multiplyElements(T const* query, T const* keyConv, int count, float* to) {
    int c = 0;
    for (; c + kWidth <= count; c += kWidth) {
      store(to + c, load(query + c) * load(keyConv + c));
    }
    for (; c < count; ++c) {
      to[c] = toFloat(query[c]) * toFloat(keyConv[c]);
    }
    for (; c < kStep; ++c) {
      to[c] = 0.0f;
    }
  }

  // to[0, kPanel) = from, zero from `width` on.
  static void convert(T const* from, int width, float* to) {
    int n = 0;
    for (; n + kWidth <= width; n += kWidth) {
      store(to + n, load(from + n));
    }
    if (n < width) {
      store(to + n, loadPart(from + n, width - n));
      n += kWidth;
    }
    for (; n < kPanel; n += kWidth) {
      store(to + n, Floats{});
    }
  }

  static void accumulate(float const (*products)[kStep], float const (*weights)[kPanel], int step,
                         float (*sums)[kPanel]) {
    Floats held[kRowsTogether][kPanelVectors];
    for (int r = 0; r < kRowsTogether; ++r) {
      for (int v = 0; v < kPanelVectors; ++v) {
        held[r][v] = load(&sums[r][v * kWidth]);
      }
    }
    for (int c = 0; c < step; ++c) {
      Floats row[kPanelVectors];
      for (int v = 0; v < kPanelVectors; ++v) {
        row[v] = load(&weights[c][v * kWidth]);
      }
      for (int r = 0; r < kRowsTogether; ++r) {
        Floats const product = broadcast(products[r][c]);
        for (int v = 0; v < kPanelVectors; ++v) {
          held[r][v] += product * row[v];
        }
      }
    }
    for (int r = 0; r < kRowsTogether; ++r) {
      for (int v = 0; v < kPanelVectors; ++v) {
        store(&sums[r][v * kWidth], held[r][v]);
      }
    }
  }
};

template <typename T>
void runFusedRows(FusedSpanDynamicConvParams const& p, int64_t firstRow, int64_t lastRow) {
  runRows<T>(p.conv, GeneratedLogits<T>{p}, firstRow, lastRow);
}

inline void runRowsOfType(FusedSpanDynamicConvParams const& p, int64_t firstRow, int64_t lastRow) {
  switch (p.conv.dtype) {
    case DataType::kFloat32: return runFusedRows<float>(p, firstRow, lastRow);
    case DataType::kFloat16: return runFusedRows<Float16>(p, firstRow, lastRow);
    case DataType::kBFloat16: return runFusedRows<BFloat16>(p, firstRow, lastRow);
  }
}

}  // namespace
}  // namespace convbert
