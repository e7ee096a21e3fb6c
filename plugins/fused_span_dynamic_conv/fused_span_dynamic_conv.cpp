// Validation, choice of the kernel, and the portable CPU kernel.
#include "fused_span_dynamic_conv.h"

#include "fused_span_dynamic_conv_rows.h"

namespace convbert {

#ifdef CONVBERT_WITH_X86
void runRowsAvx2(FusedSpanDynamicConvParams const&, int64_t, int64_t) noexcept;
void runRowsAvx512(FusedSpanDynamicConvParams const&, int64_t, int64_t) noexcept;
#endif

void setOperands(FusedSpanDynamicConvParams& params, FusedSpanDynamicConvShape const& shape,
                 void const* keyConv, void const* projections, void const* weight,
                 void const* bias, void* output) noexcept {
  SpanDynamicConvParams& conv = params.conv;
  conv.batch = shape.batch;
  conv.seq = shape.seq;
  setContiguousStrides(conv);
  auto const* first = static_cast<unsigned char const*>(projections);
  int64_t const bytes = elementBytes(conv.dtype);
  conv.value = projections == nullptr ? nullptr : first + shape.valueOffset * bytes;
  conv.valueRowStride = params.queryRowStride = shape.projectionWidth;
  conv.valueBatchStride = params.queryBatchStride = shape.seq * shape.projectionWidth;
  conv.output = output;
  params.query = projections == nullptr ? nullptr : first + shape.queryOffset * bytes;
  params.keyConv = keyConv;
  params.keyConvRowStride = conv.outputRowStride;
  params.keyConvBatchStride = conv.outputBatchStride;
  params.weight = weight;
  params.bias = bias;
}

Status validate(FusedSpanDynamicConvParams const& p) noexcept {
  SpanDynamicConvParams conv = p.conv;
  conv.kernelLogits = p.weight;  // the logits are made here: neither pointer nor strides exist
  conv.logitsRowStride = int64_t(conv.numHeads) * conv.kernelSize;
  conv.logitsBatchStride = 0;
  Status const status = validate(conv);
  if (status != Status::kOk) {
    return status;
  }
  int64_t const width = int64_t(conv.numHeads) * conv.headDim;
  if (conv.seq > 1 && (p.queryRowStride < width || p.keyConvRowStride < width)) {
    return Status::kBadStride;
  }
  if (conv.batch > 1 && (p.queryBatchStride < 0 || p.keyConvBatchStride < 0)) {
    return Status::kBadStride;
  }
  if (conv.batch > 0 && conv.seq > 0 && (!p.query || !p.keyConv || !p.weight || !p.bias)) {
    return Status::kNullPointer;
  }
  return Status::kOk;
}

void runRowsOnCpu(FusedSpanDynamicConvParams const& params, int64_t firstRow, int64_t lastRow,
                  InstructionSet instructionSet) noexcept {
#ifdef CONVBERT_WITH_X86
  if (instructionSet >= InstructionSet::kAvx512) {
    return runRowsAvx512(params, firstRow, lastRow);
  }
  if (instructionSet == InstructionSet::kAvx2) {
    return runRowsAvx2(params, firstRow, lastRow);
  }
#else
  (void)instructionSet;
#endif
  runRowsOfType(params, firstRow, lastRow);
}

Status runOnCpu(FusedSpanDynamicConvParams const& params) noexcept {
  Status const status = validate(params);
  if (status == Status::kOk) {
    runRowsOnCpu(params, 0, params.conv.batch * params.conv.seq, bestInstructionSet());
  }
  return status;
}

}  // namespace convbert
