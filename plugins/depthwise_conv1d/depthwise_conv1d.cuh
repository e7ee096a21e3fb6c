// The CUDA kernel as a plain function of (block, thread), so that depthwise_conv1d_emulated.cpp can
// run the same index arithmetic on the host.
//
// A thread owns kVec adjacent channels of one batch item and slides down a run of rows with the last
// K input vectors and the K weight vectors in registers, as float: each input is loaded once a run
// plus K - 1 of halo, which the run of the next warp in the block brings into L1. The window is a
// ring indexed by compile-time constants, so sliding costs no moves. Inputs are loaded kAhead rows
// before they are used.
#pragma once

#include "../runtime/dispatch.h"
#include "../runtime/half.h"
#include "../runtime/packed.h"
#include "depthwise_conv1d.h"

namespace convbert {

struct DepthwiseConv1dPlan {
  DepthwiseConv1dParams params;
  int32_t lanes;          // vectors in a row
  int32_t lanesPerBlock;  // a power of two
  int32_t laneBlocks;
  int32_t rowsPerThread;
  int32_t runsPerBlock;
  int32_t runBlocks;
  int64_t blocks;
  bool vectorised;  // vectorChannels() of them a thread; otherwise single channels
};

namespace {

constexpr int kThreads = 128;
constexpr int kMaxRowsPerThread = 16;  // with the halo, a run has a bit for each row in 32
constexpr int kAhead = 2;
static_assert(kMaxRowsPerThread + kMaxKernelSize - 2 + kAhead < 32, "rows to ask for have a bit");

// 16 bytes where the window and the weights of that many channels leave room in the registers for
// four blocks a multiprocessor, 8 bytes beyond.
constexpr int vectorChannels(int elementBytes, int kernelSize) {
  return 16 / elementBytes * kernelSize * 2 <= 96 ? 16 / elementBytes : 8 / elementBytes;
}

inline bool canVectorise(DepthwiseConv1dParams const& p, int64_t vectorBytes) {
  int64_t const mixed = p.inputBatchStride | p.inputRowStride | p.outputBatchStride |
                        p.outputRowStride | p.channels;
  uintptr_t const pointers = reinterpret_cast<uintptr_t>(p.input) |
                             reinterpret_cast<uintptr_t>(p.weight) |
                             reinterpret_cast<uintptr_t>(p.output);
  return mixed * elementBytes(p.dtype) % vectorBytes == 0 && pointers % vectorBytes == 0;
}

inline DepthwiseConv1dPlan makePlan(DepthwiseConv1dParams const& p, int32_t multiprocessors) {
  DepthwiseConv1dPlan plan{};
  plan.params = p;
  int32_t const vec = vectorChannels(elementBytes(p.dtype), p.kernelSize);
  plan.vectorised = canVectorise(p, vec * elementBytes(p.dtype));
  plan.lanes = plan.vectorised ? p.channels / vec : p.channels;
  // A warp takes adjacent lanes of one row where the row has as many; its neighbours in the block
  // take the runs below, which share its halo.
  plan.lanesPerBlock = 1;
  while (plan.lanesPerBlock < 32 && plan.lanesPerBlock < plan.lanes) {
    plan.lanesPerBlock *= 2;
  }
  plan.laneBlocks = (plan.lanes + plan.lanesPerBlock - 1) / plan.lanesPerBlock;
  // Longer runs re-read less halo; shorter ones give more threads. Take the longest run that still
  // leaves every multiprocessor two blocks.
  plan.rowsPerThread = kMaxRowsPerThread;
  while (plan.rowsPerThread > 1 &&
         p.batch * ((p.seq + plan.rowsPerThread - 1) / plan.rowsPerThread) * plan.lanes <
             int64_t(multiprocessors) * 2 * kThreads) {
    plan.rowsPerThread /= 2;
  }
  plan.runsPerBlock = kThreads / plan.lanesPerBlock;
  int64_t const tileRows = int64_t(plan.rowsPerThread) * plan.runsPerBlock;
  plan.runBlocks = static_cast<int32_t>((p.seq + tileRows - 1) / tileRows);
  plan.blocks = p.batch * plan.runBlocks * plan.laneBlocks;
  return plan;
}

// A run of rows for one thread: bit t of `present` says that row firstRow - K / 2 + t is in the
// sequence and no pad.
template <typename T, int K, int kVec>
struct ThreadRun {
  T const* input;  // of row firstRow - K / 2
  int64_t inputRowStride;
  uint32_t present;

  // Pads are not read: whatever they hold, even NaN, they count as zero.
  CONVBERT_HD Packed<T, kVec> loadRow(int32_t t) const {
    Packed<T, kVec> packed{};
    if (present >> t & 1u) {
      packed = *reinterpret_cast<Packed<T, kVec> const*>(input + t * inputRowStride);
    }
    return packed;
  }
};

CONVBERT_HD uint32_t presentRows(DepthwiseConv1dParams const& p, int64_t batch, int64_t first,
                                 int32_t count) {
  int64_t const left = p.seq - first;
  int32_t const begin = first < 0 ? static_cast<int32_t>(-first) : 0;
  int32_t const end = left < count ? static_cast<int32_t>(left) : count;
  uint32_t present = ((1u << end) - 1u) & ~((1u << begin) - 1u);  // count is at most 30
  if (p.mask != nullptr) {
    int64_t const* mask = p.mask + batch * p.maskBatchStride + first;
    for (int32_t t = begin; t < end; ++t) {
      present &= ~(static_cast<uint32_t>(mask[t] == 0) << t);
    }
  }
  return present;
}

template <typename T, int K, int kVec>
CONVBERT_HD void convolveRun(DepthwiseConv1dPlan const& plan, int64_t block, int32_t thread) {
  DepthwiseConv1dParams const& p = plan.params;
  int32_t const lane = static_cast<int32_t>(block % plan.laneBlocks) * plan.lanesPerBlock +
                       thread % plan.lanesPerBlock;
  int64_t const rest = block / plan.laneBlocks;
  int64_t const batch = rest / plan.runBlocks;
  int64_t const firstRow =
      (rest % plan.runBlocks * plan.runsPerBlock + thread / plan.lanesPerBlock) *
      plan.rowsPerThread;
  if (lane >= plan.lanes || firstRow >= p.seq) {
    return;
  }
  int64_t const left = p.seq - firstRow;
  int32_t const rows = left < plan.rowsPerThread ? static_cast<int32_t>(left) : plan.rowsPerThread;
  int32_t const channel = lane * kVec;
  int64_t const first = firstRow - K / 2;
  ThreadRun<T, K, kVec> const run{static_cast<T const*>(p.input) + batch * p.inputBatchStride +
                                      first * p.inputRowStride + channel,
                                  p.inputRowStride,
                                  presentRows(p, batch, first, rows + K - 1)};
  T* output = static_cast<T*>(p.output) + batch * p.outputBatchStride +
              firstRow * p.outputRowStride + channel;
  float weight[K][kVec];
  float window[K][kVec];
  Packed<T, kVec> ahead[kAhead];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    loadVector<T, kVec>(static_cast<T const*>(p.weight) + int64_t(k) * p.channels + channel,
                        weight[k]);
  }
#pragma unroll
  for (int k = 0; k < K - 1; ++k) unpack(run.loadRow(k), window[k]);
  // Rows beyond the run have no bit: `ahead` then holds zeros that nothing reads.
#pragma unroll
  for (int a = 0; a < kAhead; ++a) ahead[a] = run.loadRow(K - 1 + a);
  for (int32_t base = 0; base < rows; base += K) {
    // Output row base + j reads slots j, j + 1, ..., j + K - 1 (mod K); its newest input goes where
    // the oldest of the row before lay.
#pragma unroll
    for (int j = 0; j < K; ++j) {
      int32_t const r = base + j;
      if (r < rows) {
        unpack(ahead[0], window[(j + K - 1) % K]);
#pragma unroll
        for (int a = 0; a < kAhead - 1; ++a) ahead[a] = ahead[a + 1];
        ahead[kAhead - 1] = run.loadRow(r + K - 1 + kAhead);
        bool const token = run.present >> (r + K / 2) & 1u;
        float sum[kVec] = {};
        if (token) {
#pragma unroll
          for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) sum[i] += weight[k][i] * window[(j + k) % K][i];
          }
        }
        storeVector<T, kVec>(output + r * p.outputRowStride, sum);
      }
    }
  }
}

}  // namespace
}  // namespace convbert
