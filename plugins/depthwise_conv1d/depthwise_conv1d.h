// DepthwiseConv1D: a filter for each channel of a channels-last tensor. Contract: README.md.
#pragma once

#include <cstdint>

#include "../runtime/data_type.h"
#include "../runtime/instruction_set.h"
#include "../runtime/status.h"

#ifdef CONVBERT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace convbert {

// Plain data: mirrored field by field by ctypes (tests/kernels/test_depthwise_conv1d.py) and passed
// to the device by value. Strides count elements, not bytes; the last axis of every tensor is
// contiguous.
struct DepthwiseConv1dParams {
  void const* input;    // (batch, seq, channels)
  void const* weight;   // (kernelSize, channels), contiguous
  int64_t const* mask;  // (batch, seq), 0 at pads; null: every row is a token
  void* output;         // (batch, seq, channels), overlaps no input
  int64_t batch;
  int64_t seq;
  int64_t inputBatchStride;
  int64_t inputRowStride;
  int64_t maskBatchStride;
  int64_t outputBatchStride;
  int64_t outputRowStride;
  int32_t channels;
  int32_t kernelSize;  // odd, 1 to kMaxKernelSize
  DataType dtype;      // of input, weight and output; sums are float32
};

// Strides of contiguous tensors.
inline void setContiguousStrides(DepthwiseConv1dParams& params) noexcept {
  params.inputRowStride = params.outputRowStride = params.channels;
  params.inputBatchStride = params.outputBatchStride = params.seq * params.channels;
  params.maskBatchStride = params.seq;
}

// Sizes, strides, dtype and pointers; a batch or seq of 0 is valid and needs no pointers.
Status validate(DepthwiseConv1dParams const& params) noexcept;

// Computes output rows [firstRow, lastRow) of the batch * seq rows, so that a caller can share the
// rows out over its own threads. Allocates nothing. `params` must have passed validate().
void runRowsOnCpu(DepthwiseConv1dParams const& params, int64_t firstRow, int64_t lastRow,
                  InstructionSet instructionSet) noexcept;

// All rows on the calling thread.
Status runOnCpu(DepthwiseConv1dParams const& params) noexcept;

// Runs every block and thread of the CUDA kernel on the host, with the launch plan the device would
// get. multiprocessors stands for the device's count.
Status runEmulated(DepthwiseConv1dParams const& params, int32_t multiprocessors) noexcept;

#ifdef CONVBERT_WITH_CUDA
// Enqueues one kernel; allocates nothing, waits for nothing, may be captured in a graph.
// cudaErrorInvalidValue for whatever validate() refuses.
cudaError_t launchDepthwiseConv1d(DepthwiseConv1dParams const& params,
                                  cudaStream_t stream) noexcept;
#endif

}  // namespace convbert
