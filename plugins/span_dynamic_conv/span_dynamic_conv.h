// SpanDynamicConv: softmax over the taps fused with the windowed sum. Contract: README.md.
#pragma once

#include <cstdint>

#include "../runtime/data_type.h"
#include "../runtime/instruction_set.h"
#include "../runtime/status.h"

#ifdef CONVBERT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace convbert {

// Plain data: mirrored field by field by ctypes (tests/kernels/conftest.py) and passed to the device
// by value. Strides count elements, not bytes; the last axis of every tensor is contiguous.
struct SpanDynamicConvParams {
  void const* value;         // (batch, seq, numHeads * headDim)
  void const* kernelLogits;  // (batch, seq, numHeads * kernelSize)
  int64_t const* mask;       // (batch, seq), 0 at pads; null: every row is a token
  void* output;              // (batch, seq, numHeads * headDim), overlaps no input
  int64_t batch;
  int64_t seq;
  int64_t valueBatchStride;
  int64_t valueRowStride;
  int64_t logitsBatchStride;
  int64_t logitsRowStride;
  int64_t maskBatchStride;
  int64_t outputBatchStride;
  int64_t outputRowStride;
  int32_t numHeads;
  int32_t headDim;
  int32_t kernelSize;  // odd, 1 to kMaxKernelSize
  DataType dtype;      // of value, kernelLogits and output; sums are float32
};

// Strides of contiguous tensors.
inline void setContiguousStrides(SpanDynamicConvParams& params) noexcept {
  int64_t const width = static_cast<int64_t>(params.numHeads) * params.headDim;
  int64_t const taps = static_cast<int64_t>(params.numHeads) * params.kernelSize;
  params.valueRowStride = params.outputRowStride = width;
  params.valueBatchStride = params.outputBatchStride = params.seq * width;
  params.logitsRowStride = taps;
  params.logitsBatchStride = params.seq * taps;
  params.maskBatchStride = params.seq;
}

// Sizes, strides, dtype and pointers; a batch or seq of 0 is valid and needs no pointers.
Status validate(SpanDynamicConvParams const& params) noexcept;

// Computes output rows [firstRow, lastRow) of the batch * seq rows, so that a caller can share the
// rows out over its own threads. Allocates nothing. `params` must have passed validate().
void runRowsOnCpu(SpanDynamicConvParams const& params, int64_t firstRow, int64_t lastRow,
                  InstructionSet instructionSet) noexcept;

// All rows on the calling thread.
Status runOnCpu(SpanDynamicConvParams const& params) noexcept;

// Runs every block and thread of the CUDA kernel on the host, with the launch plan the device would
// get. multiprocessors stands for the device's count.
Status runEmulated(SpanDynamicConvParams const& params, int32_t multiprocessors) noexcept;

#ifdef CONVBERT_WITH_CUDA
// Enqueues one kernel; allocates nothing, waits for nothing, may be captured in a graph.
// cudaErrorInvalidValue for whatever validate() refuses.
cudaError_t launchSpanDynamicConv(SpanDynamicConvParams const& params, cudaStream_t stream) noexcept;
#endif

}  // namespace convbert
