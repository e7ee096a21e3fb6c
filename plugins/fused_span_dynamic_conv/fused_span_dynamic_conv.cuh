// The CUDA kernel: SpanDynamicConv's, with the logits of a block's rows computed on the spot.
//
// logits = (query * key_conv) @ weight + bias is a product of a few dozen rows and at most
// kMaxColumns columns. It is cut into 16 x 16 tiles, kMaxTilesPerWarp to a warp; the channels pass
// through shared memory kStep at a time. Half types multiply on the tensor cores (their product
// query * key_conv is rounded to the type, as the unfused graph does); float32 multiplies in float32:
// TF32 would cost three decimal digits. As in span_dynamic_conv.cuh every stage is a plain function
// of (block, thread), so that the host can run the same index arithmetic.
#pragma once

#include "../span_dynamic_conv/span_dynamic_conv.cuh"
#include "fused_span_dynamic_conv.h"

#ifdef __CUDACC__
#include <mma.h>
#endif

namespace convbert {

struct FusedSpanDynamicConvPlan {
  SpanDynamicConvPlan conv;
  void const* query;
  void const* keyConv;
  void const* weight;
  void const* bias;
  int64_t queryBatchStride;
  int64_t queryRowStride;
  int64_t keyConvBatchStride;
  int64_t keyConvRowStride;
  int32_t rowTiles;     // of 16 rows
  int32_t columnTiles;  // of 16 columns
  int32_t productsOffset;  // bytes into shared memory, after the logits
  int32_t weightsOffset;
  int32_t sharedBytes;
  bool vectorised;  // query and key_conv in 16-byte vectors
};

namespace {

constexpr int kTile = 16;
constexpr int kMaxTilesPerWarp = 4;
constexpr int kMaxColumns = 128;
constexpr int kStepBytes = 128;  // of one row: 32 floats or 64 halves
constexpr int kPadBytes = 16;    // keeps the rows of a tile in different banks

template <typename T>
constexpr int kStepChannels = kStepBytes / static_cast<int>(sizeof(T));

template <typename T>
constexpr int kPadElements = kPadBytes / static_cast<int>(sizeof(T));

inline void layOutSharedMemory(FusedSpanDynamicConvPlan& plan) {
  SpanDynamicConvPlan& conv = plan.conv;
  int32_t const element = elementBytes(conv.params.dtype);
  int32_t const rows = conv.rowsPerThread * conv.rowGroups;
  plan.rowTiles = (rows + kTile - 1) / kTile;
  plan.columnTiles = (conv.headsPerBlock * conv.params.kernelSize + kTile - 1) / kTile;
  conv.weightRowStride = plan.columnTiles * kTile + kPadBytes / 4;
  plan.productsOffset = plan.rowTiles * kTile * conv.weightRowStride * 4;
  plan.weightsOffset = plan.productsOffset + plan.rowTiles * kTile * (kStepBytes + kPadBytes);
  plan.sharedBytes = plan.weightsOffset + (kStepBytes / element) *
                                              (plan.columnTiles * kTile * element + kPadBytes);
}

inline FusedSpanDynamicConvPlan makePlan(FusedSpanDynamicConvParams const& p,
                                         int32_t multiprocessors) {
  FusedSpanDynamicConvPlan plan{};
  plan.conv = makePlan(p.conv, multiprocessors, kMaxColumns / p.conv.kernelSize);
  plan.query = p.query;
  plan.keyConv = p.keyConv;
  plan.weight = p.weight;
  plan.bias = p.bias;
  plan.queryBatchStride = p.queryBatchStride;
  plan.queryRowStride = p.queryRowStride;
  plan.keyConvBatchStride = p.keyConvBatchStride;
  plan.keyConvRowStride = p.keyConvRowStride;
  int64_t const channels = int64_t(p.conv.numHeads) * p.conv.headDim;
  int64_t const mixed = p.queryBatchStride | p.queryRowStride | p.keyConvBatchStride |
                        p.keyConvRowStride | channels;
  uintptr_t const pointers =
      reinterpret_cast<uintptr_t>(p.query) | reinterpret_cast<uintptr_t>(p.keyConv);
  plan.vectorised = mixed * elementBytes(p.conv.dtype) % 16 == 0 && pointers % 16 == 0;
  // Every thread takes part in the product, whatever the window needs.
  plan.conv.threads = kMaxThreads;
  auto fits = [&] {
    layOutSharedMemory(plan);
    return plan.sharedBytes <= 48 * 1024 &&
           plan.rowTiles * plan.columnTiles <= kMaxTilesPerWarp * kMaxThreads / 32;
  };
  while (plan.conv.rowGroups > 1 && !fits()) {
    --plan.conv.rowGroups;
  }
  while (plan.conv.rowsPerThread > 1 && !fits()) {
    plan.conv.rowsPerThread /= 2;
  }
  layOutSharedMemory(plan);
  countBlocks(plan.conv);
  return plan;
}

// The block's part of query * key_conv and of the weights for channels [channel, channel + step).
// Rows and columns beyond the block, and channels beyond the last, are zero.
template <typename T>
CONVBERT_HD void stageOperands(FusedSpanDynamicConvPlan const& plan, int64_t block, int32_t thread,
                               int64_t channel, unsigned char* shared) {
  constexpr int kStep = kStepChannels<T>;
  constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  SpanDynamicConvParams const& p = plan.conv.params;
  SpanDynamicConvTile const tile = tileOf(plan.conv, block);
  int64_t const channels = int64_t(p.numHeads) * p.headDim;
  T* products = reinterpret_cast<T*>(shared + plan.productsOffset);
  T const* query = static_cast<T const*>(plan.query) + tile.batch * plan.queryBatchStride +
                   tile.firstRow * plan.queryRowStride + channel;
  T const* keyConv = static_cast<T const*>(plan.keyConv) + tile.batch * plan.keyConvBatchStride +
                     tile.firstRow * plan.keyConvRowStride + channel;
  constexpr int kVectors = kStep / kVec;
  for (int32_t i = thread; i < plan.rowTiles * kTile * kVectors; i += plan.conv.threads) {
    int32_t const row = i / kVectors;
    int32_t const c = i % kVectors * kVec;
    float product[kVec] = {};
    if (row < tile.rows) {
      T const* q = query + row * plan.queryRowStride + c;
      T const* k = keyConv + row * plan.keyConvRowStride + c;
      if (plan.vectorised && channel + c < channels) {
        float other[kVec];
        loadVector<T, kVec>(q, product);
        loadVector<T, kVec>(k, other);
#pragma unroll
        for (int j = 0; j < kVec; ++j) product[j] *= other[j];
      } else {
        for (int j = 0; j < kVec && channel + c + j < channels; ++j) {
          product[j] = toFloat(q[j]) * toFloat(k[j]);
        }
      }
    }
    storeVector<T, kVec>(products + row * (kStep + kPadElements<T>) + c, product);
  }
  int32_t const width = plan.columnTiles * kTile;
  int32_t const columns = tile.heads * p.kernelSize;
  int64_t const allColumns = int64_t(p.numHeads) * p.kernelSize;
  T* weights = reinterpret_cast<T*>(shared + plan.weightsOffset);
  T const* weight = static_cast<T const*>(plan.weight) + channel * allColumns +
                    int64_t(tile.firstHead) * p.kernelSize;
  for (int32_t i = thread; i < kStep * width; i += plan.conv.threads) {
    int32_t const c = i / width;
    int32_t const n = i % width;
    bool const inside = n < columns && channel + c < channels;
    weights[c * (width + kPadElements<T>) + n] =
        inside ? weight[c * allColumns + n] : fromFloat<T>(0.0f);
  }
}

// A 16 x 16 tile of sums. In plain code lane l of the warp holds row l / 2, columns l % 2 * 8 + 0..7.
struct LaneTile {
  static constexpr int kColumns = kTile * kTile / 32;
  float sum[kColumns];
};

CONVBERT_HD void clear(LaneTile& tile) {
#pragma unroll
  for (int i = 0; i < LaneTile::kColumns; ++i) tile.sum[i] = 0.0f;
}

template <typename T>
CONVBERT_HD void multiply(LaneTile& tile, T const* a, int lda, T const* b, int ldb, int depth,
                          int lane) {
  a += lane / 2 * lda;
  b += lane % 2 * LaneTile::kColumns;
  for (int c = 0; c < depth; ++c) {
    float const product = toFloat(a[c]);
#pragma unroll
    for (int i = 0; i < LaneTile::kColumns; ++i) {
      tile.sum[i] += product * toFloat(b[c * ldb + i]);
    }
  }
}

CONVBERT_HD void store(LaneTile const& tile, float* to, int ld, int lane) {
  to += lane / 2 * ld + lane % 2 * LaneTile::kColumns;
#pragma unroll
  for (int i = 0; i < LaneTile::kColumns; ++i) to[i] = tile.sum[i];
}

template <typename T>
struct TileOf {
  using Type = LaneTile;
};

#ifdef __CUDACC__

// The same tile on the tensor cores; who holds what is the hardware's business.
template <typename Native>
struct TensorCoreTile {
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kTile, kTile, kTile, float> sum;
};

template <>
struct TileOf<Float16> {
  using Type = TensorCoreTile<__half>;
};

template <>
struct TileOf<BFloat16> {
  using Type = TensorCoreTile<__nv_bfloat16>;
};

template <typename Native>
__device__ __forceinline__ void clear(TensorCoreTile<Native>& tile) {
  nvcuda::wmma::fill_fragment(tile.sum, 0.0f);
}

template <typename T, typename Native>
__device__ __forceinline__ void multiply(TensorCoreTile<Native>& tile, T const* a, int lda,
                                         T const* b, int ldb, int depth, int) {
  namespace wmma = nvcuda::wmma;
  for (int c = 0; c < depth; c += kTile) {
    wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, Native, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, Native, wmma::row_major> right;
    wmma::load_matrix_sync(left, reinterpret_cast<Native const*>(a + c), lda);
    wmma::load_matrix_sync(right, reinterpret_cast<Native const*>(b + c * ldb), ldb);
    wmma::mma_sync(tile.sum, left, right, tile.sum);
  }
}

template <typename Native>
__device__ __forceinline__ void store(TensorCoreTile<Native> const& tile, float* to, int ld, int) {
  nvcuda::wmma::store_matrix_sync(to, tile.sum, ld, nvcuda::wmma::mem_row_major);
}

#endif

// Tile t of a warp is number warp + t * warps, row-major; one past the end is left alone.
template <typename T, typename Tile>
CONVBERT_HD void stageMultiply(FusedSpanDynamicConvPlan const& plan, int32_t thread,
                               unsigned char const* shared, Tile (&tiles)[kMaxTilesPerWarp]) {
  constexpr int kProductStride = kStepChannels<T> + kPadElements<T>;
  int32_t const weightStride = plan.columnTiles * kTile + kPadElements<T>;
  T const* products = reinterpret_cast<T const*>(shared + plan.productsOffset);
  T const* weights = reinterpret_cast<T const*>(shared + plan.weightsOffset);
#pragma unroll
  for (int t = 0; t < kMaxTilesPerWarp; ++t) {
    int32_t const number = thread / 32 + t * (plan.conv.threads / 32);
    if (number < plan.rowTiles * plan.columnTiles) {
      multiply(tiles[t], products + number / plan.columnTiles * kTile * kProductStride,
               kProductStride, weights + number % plan.columnTiles * kTile, weightStride,
               kStepChannels<T>, thread % 32);
    }
  }
}

template <typename Tile>
CONVBERT_HD void stageLogits(FusedSpanDynamicConvPlan const& plan, int32_t thread,
                             unsigned char* shared, Tile const (&tiles)[kMaxTilesPerWarp]) {
  float* logits = reinterpret_cast<float*>(shared);
  int32_t const stride = plan.conv.weightRowStride;
#pragma unroll
  for (int t = 0; t < kMaxTilesPerWarp; ++t) {
    int32_t const number = thread / 32 + t * (plan.conv.threads / 32);
    if (number < plan.rowTiles * plan.columnTiles) {
      store(tiles[t],
            logits + number / plan.columnTiles * kTile * stride + number % plan.columnTiles * kTile,
            stride, thread % 32);
    }
  }
}

// Bias and softmax, in place: what SpanDynamicConv's second stage reads.
template <typename T, int K>
CONVBERT_HD void stageSoftmax(FusedSpanDynamicConvPlan const& plan, int64_t block, int32_t thread,
                              unsigned char* shared) {
  SpanDynamicConvTile const tile = tileOf(plan.conv, block);
  T const* bias = static_cast<T const*>(plan.bias) + int64_t(tile.firstHead) * K;
  float* logits = reinterpret_cast<float*>(shared);
  for (int32_t i = thread; i < tile.rows * tile.heads; i += plan.conv.threads) {
    int32_t const head = i % tile.heads;
    float* at = logits + i / tile.heads * plan.conv.weightRowStride + head * K;
    float tap[K];
#pragma unroll
    for (int k = 0; k < K; ++k) tap[k] = at[k] + toFloat(bias[head * K + k]);
    softmax(tap);
#pragma unroll
    for (int k = 0; k < K; ++k) at[k] = tap[k];
  }
}

}  // namespace
}  // namespace convbert
