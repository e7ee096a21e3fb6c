// FusedSpanDynamicConv: the kernel generator and SpanDynamicConv in one. Contract: README.md.
#pragma once

#include "../span_dynamic_conv/span_dynamic_conv.h"

namespace convbert {

// Plain data, as SpanDynamicConvParams. With channels = conv.numHeads * conv.headDim.
struct FusedSpanDynamicConvParams {
  SpanDynamicConvParams conv;  // kernelLogits and its strides are not read
  void const* query;           // (batch, seq, channels)
  void const* keyConv;         // (batch, seq, channels)
  void const* weight;          // (channels, conv.numHeads * conv.kernelSize), contiguous
  void const* bias;            // (conv.numHeads * conv.kernelSize)
  int64_t queryBatchStride;
  int64_t queryRowStride;
  int64_t keyConvBatchStride;
  int64_t keyConvRowStride;
};

// How the ONNX operator's tensors lie: query and value are channel ranges of one product.
struct FusedSpanDynamicConvShape {
  int64_t batch;
  int64_t seq;
  int64_t projectionWidth;  // channels of the merged query, key, value and convolution projections
  int32_t queryOffset;      // first channel of the query in it
  int32_t valueOffset;      // first channel of the convolution's value in it
};

// conv's numHeads, headDim, kernelSize, dtype and mask must be set; pointers and strides are.
void setOperands(FusedSpanDynamicConvParams& params, FusedSpanDynamicConvShape const& shape,
                 void const* keyConv, void const* projections, void const* weight,
                 void const* bias, void* output) noexcept;

Status validate(FusedSpanDynamicConvParams const& params) noexcept;

void runRowsOnCpu(FusedSpanDynamicConvParams const& params, int64_t firstRow, int64_t lastRow,
                  InstructionSet instructionSet) noexcept;

Status runOnCpu(FusedSpanDynamicConvParams const& params) noexcept;

Status runEmulated(FusedSpanDynamicConvParams const& params, int32_t multiprocessors) noexcept;

#ifdef CONVBERT_WITH_CUDA
// One kernel, as launchSpanDynamicConv.
cudaError_t launchFusedSpanDynamicConv(FusedSpanDynamicConvParams const& params,
                                       cudaStream_t stream) noexcept;
#endif

}  // namespace convbert
