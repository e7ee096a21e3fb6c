// The CUDA kernel, in two stages that are plain functions of (block, thread), so that
// span_dynamic_conv_emulated.cpp can run the same index arithmetic on the host.
//
// A block owns `rowsPerThread * rowGroups` adjacent rows of one batch item and `headsPerBlock`
// heads. Stage 1: softmax of the block's kernels into shared memory, as float. Stage 2: a thread
// owns kVec adjacent channels of one head and slides down its rows with the last K value vectors in
// registers: each value is loaded once per thread's run plus K - 1 of halo (which its neighbour in
// the block has just brought into L1). The window is a ring indexed by compile-time constants, so
// sliding costs no moves.
#pragma once

#include "../runtime/dispatch.h"
#include "../runtime/half.h"
#include "../runtime/packed.h"
#include "span_dynamic_conv.h"

#ifndef __CUDACC__
#include <cmath>
#endif

namespace convbert {

struct SpanDynamicConvPlan {
  SpanDynamicConvParams params;
  int32_t headsPerBlock;
  int32_t headBlocks;
  int32_t lanesPerHead;  // vectors of kVec channels in a head
  int32_t rowsPerThread;
  int32_t rowGroups;
  int32_t rowBlocks;
  int32_t weightRowStride;  // floats between the weights of two rows in shared memory
  int32_t threads;
  int32_t sharedBytes;
  int64_t blocks;
  bool vectorised;  // 16-byte vectors; otherwise single channels
};

// Where block `block` works.
struct SpanDynamicConvTile {
  int64_t batch;
  int64_t firstRow;
  int32_t rows;
  int32_t firstHead;
  int32_t heads;
};

namespace {

constexpr int kMaxThreads = 192;  // four rows of 6 heads x 64 halves: no thread idles in base
// Rows whose values are asked for before they are used: without, every row of a thread's run would
// wait for device memory.
constexpr int kAhead = 2;
constexpr int kMaxLanes = 128;

inline bool canVectorise(SpanDynamicConvParams const& p) {
  int64_t const bytes = elementBytes(p.dtype);
  int64_t const mixed = p.valueBatchStride | p.valueRowStride | p.outputBatchStride |
                        p.outputRowStride | p.headDim;
  uintptr_t const pointers =
      reinterpret_cast<uintptr_t>(p.value) | reinterpret_cast<uintptr_t>(p.output);
  return mixed * bytes % 16 == 0 && pointers % 16 == 0;
}

inline void countBlocks(SpanDynamicConvPlan& plan) {
  int64_t const tileRows = int64_t(plan.rowsPerThread) * plan.rowGroups;
  plan.rowBlocks = static_cast<int32_t>((plan.params.seq + tileRows - 1) / tileRows);
  plan.blocks = plan.params.batch * plan.rowBlocks * plan.headBlocks;
}

// maxHeads: heads a block may take, for callers that keep more than the weights in shared memory.
inline SpanDynamicConvPlan makePlan(SpanDynamicConvParams const& p, int32_t multiprocessors,
                                    int32_t maxHeads = INT32_MAX) {
  SpanDynamicConvPlan plan{};
  plan.params = p;
  plan.vectorised = canVectorise(p);
  int32_t const vec = plan.vectorised ? 16 / elementBytes(p.dtype) : 1;
  plan.lanesPerHead = (p.headDim + vec - 1) / vec;
  int32_t heads = kMaxLanes / plan.lanesPerHead;
  heads = heads < maxHeads ? heads : maxHeads;
  heads = heads < 1 ? 1 : heads;
  plan.headBlocks = (p.numHeads + heads - 1) / heads;
  plan.headsPerBlock = (p.numHeads + plan.headBlocks - 1) / plan.headBlocks;
  int32_t const lanes = plan.headsPerBlock * plan.lanesPerHead;
  plan.rowGroups = kMaxThreads / lanes;
  plan.rowGroups = plan.rowGroups < 1 ? 1 : plan.rowGroups;
  // Longer runs re-read less halo; shorter ones give more threads. Take the longest run that still
  // leaves every multiprocessor about four blocks of threads.
  int64_t const vectors = int64_t(p.numHeads) * plan.lanesPerHead;
  plan.rowsPerThread = 16;
  while (plan.rowsPerThread > 1 &&
         p.batch * ((p.seq + plan.rowsPerThread - 1) / plan.rowsPerThread) * vectors <
             int64_t(multiprocessors) * 4 * kMaxThreads) {
    plan.rowsPerThread /= 2;
  }
  // A short sequence needs fewer row groups; shared memory must stay under the 48 KB every device
  // grants without asking.
  int64_t const runs = (p.seq + plan.rowsPerThread - 1) / plan.rowsPerThread;
  plan.rowGroups = plan.rowGroups < runs ? plan.rowGroups : static_cast<int32_t>(runs);
  auto bytes = [&] {
    return int64_t(plan.rowsPerThread) * plan.rowGroups * plan.headsPerBlock * p.kernelSize * 4;
  };
  while (plan.rowGroups > 1 && bytes() > 48 * 1024) {
    --plan.rowGroups;
  }
  while (plan.rowsPerThread > 1 && bytes() > 48 * 1024) {
    plan.rowsPerThread /= 2;
  }
  plan.sharedBytes = static_cast<int32_t>(bytes());
  plan.weightRowStride = plan.headsPerBlock * p.kernelSize;
  int32_t const items = lanes * plan.rowGroups;
  plan.threads = items < kMaxThreads ? (items + 31) / 32 * 32 : kMaxThreads;
  countBlocks(plan);
  return plan;
}

CONVBERT_HD SpanDynamicConvTile tileOf(SpanDynamicConvPlan const& plan, int64_t block) {
  SpanDynamicConvTile tile;
  int32_t const headBlock = static_cast<int32_t>(block % plan.headBlocks);
  int64_t const rest = block / plan.headBlocks;
  int32_t const tileRows = plan.rowsPerThread * plan.rowGroups;
  tile.batch = rest / plan.rowBlocks;
  tile.firstRow = rest % plan.rowBlocks * tileRows;
  int64_t const left = plan.params.seq - tile.firstRow;
  tile.rows = left < tileRows ? static_cast<int32_t>(left) : tileRows;
  tile.firstHead = headBlock * plan.headsPerBlock;
  int32_t const headsLeft = plan.params.numHeads - tile.firstHead;
  tile.heads = headsLeft < plan.headsPerBlock ? headsLeft : plan.headsPerBlock;
  return tile;
}

// Softmax of K logits.
template <int K>
CONVBERT_HD void softmax(float (&tap)[K]) {
  float top = tap[0];
#pragma unroll
  for (int k = 1; k < K; ++k) {
    top = tap[k] > top ? tap[k] : top;
  }
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    tap[k] = expf(tap[k] - top);
    sum += tap[k];
  }
  float const scale = 1.0f / sum;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    tap[k] *= scale;
  }
}

// weights[row * weightRowStride + head * K + k]
template <typename T, int K>
CONVBERT_HD void stageWeights(SpanDynamicConvPlan const& plan, int64_t block, int32_t thread,
                              float* weights) {
  SpanDynamicConvTile const tile = tileOf(plan, block);
  SpanDynamicConvParams const& p = plan.params;
  T const* logits = static_cast<T const*>(p.kernelLogits) + tile.batch * p.logitsBatchStride +
                    tile.firstRow * p.logitsRowStride + int64_t(tile.firstHead) * K;
  for (int32_t i = thread; i < tile.rows * tile.heads; i += plan.threads) {
    int32_t const row = i / tile.heads;
    int32_t const head = i % tile.heads;
    T const* from = logits + row * p.logitsRowStride + head * K;
    float tap[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      tap[k] = toFloat(from[k]);
    }
    softmax(tap);
    float* to = weights + row * plan.weightRowStride + head * K;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      to[k] = tap[k];
    }
  }
}

template <typename T, int K, int kVec>
CONVBERT_HD void stageWindow(SpanDynamicConvPlan const& plan, int64_t block, int32_t thread,
                             float const* weights) {
  constexpr int kHalf = K / 2;
  SpanDynamicConvTile const tile = tileOf(plan, block);
  SpanDynamicConvParams const& p = plan.params;
  int32_t const lanes = tile.heads * plan.lanesPerHead;
  for (int32_t item = thread; item < lanes * plan.rowGroups; item += plan.threads) {
    int32_t const lane = item % lanes;
    int32_t const begin = item / lanes * plan.rowsPerThread;
    int32_t end = begin + plan.rowsPerThread;
    end = end < tile.rows ? end : tile.rows;
    if (begin >= end) {
      continue;
    }
    int32_t const head = lane / plan.lanesPerHead;
    int64_t const channel = int64_t(tile.firstHead + head) * p.headDim +
                            int64_t(lane % plan.lanesPerHead) * kVec;
    T const* value = static_cast<T const*>(p.value) + tile.batch * p.valueBatchStride + channel;
    T* output = static_cast<T*>(p.output) + tile.batch * p.outputBatchStride + channel;
    int64_t const* mask =
        p.mask == nullptr ? nullptr : p.mask + tile.batch * p.maskBatchStride;
    // Pads are not read: whatever they hold, even NaN, they count as zero.
    auto present = [&](int64_t row) {
      return row >= 0 && row < p.seq && (mask == nullptr || mask[row] != 0);
    };
    auto loadRow = [&](int64_t row, bool wanted) {
      Packed<T, kVec> packed{};
      if (wanted && present(row)) {
        packed = *reinterpret_cast<Packed<T, kVec> const*>(value + row * p.valueRowStride);
      }
      return packed;
    };
    float window[K][kVec];  // slot (row + kHalf - begin') % K, see below
    Packed<T, kVec> ahead[kAhead];
    int64_t const first = tile.firstRow + begin - kHalf;
#pragma unroll
    for (int k = 0; k < K - 1; ++k) unpack(loadRow(first + k, true), window[k]);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) ahead[a] = loadRow(first + K - 1 + a, begin + a < end);
    for (int32_t base = begin; base < end; base += K) {
      // Output row base + j reads slots j, j + 1, ..., j + K - 1 (mod K); its newest value goes
      // where the oldest of the row before lay.
#pragma unroll
      for (int j = 0; j < K; ++j) {
        int32_t const r = base + j;
        if (r < end) {
          unpack(ahead[0], window[(j + K - 1) % K]);
#pragma unroll
          for (int a = 0; a + 1 < kAhead; ++a) ahead[a] = ahead[a + 1];
          ahead[kAhead - 1] = loadRow(tile.firstRow + r + kHalf + kAhead, r + kAhead < end);
          float const* weight = weights + r * plan.weightRowStride + head * K;
          float sum[kVec] = {};
#pragma unroll
          for (int k = 0; k < K; ++k) {
            float const w = weight[k];
#pragma unroll
            for (int i = 0; i < kVec; ++i) sum[i] += w * window[(j + k) % K][i];
          }
          if (mask != nullptr && mask[tile.firstRow + r] == 0) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) sum[i] = 0.0f;
          }
          storeVector<T, kVec>(output + (tile.firstRow + r) * p.outputRowStride, sum);
        }
      }
    }
  }
}

}  // namespace
}  // namespace convbert
