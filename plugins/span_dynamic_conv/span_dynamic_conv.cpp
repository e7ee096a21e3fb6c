// Validation, choice of the kernel, and the portable CPU kernel.
#include "span_dynamic_conv.h"

#include "span_dynamic_conv_rows.h"

namespace convbert {

#ifdef CONVBERT_WITH_X86
void runRowsAvx2(SpanDynamicConvParams const&, int64_t, int64_t) noexcept;
void runRowsAvx512(SpanDynamicConvParams const&, int64_t, int64_t) noexcept;
#endif

Status validate(SpanDynamicConvParams const& p) noexcept {
  if (p.batch < 0 || p.seq < 0 || p.numHeads <= 0 || p.headDim <= 0 || p.kernelSize <= 0) {
    return Status::kBadSize;
  }
  if (p.kernelSize % 2 == 0) {
    return Status::kEvenKernelSize;
  }
  if (p.kernelSize > kMaxKernelSize) {
    return Status::kKernelTooLarge;
  }
  if (!isKnown(p.dtype)) {
    return Status::kBadDataType;
  }
  int64_t const width = static_cast<int64_t>(p.numHeads) * p.headDim;
  int64_t const taps = static_cast<int64_t>(p.numHeads) * p.kernelSize;
  if (p.seq > 1 && (p.valueRowStride < width || p.outputRowStride < width ||
                    p.logitsRowStride < taps)) {
    return Status::kBadStride;
  }
  if (p.batch > 1 && (p.valueBatchStride < 0 || p.logitsBatchStride < 0 || p.maskBatchStride < 0 ||
                      p.outputBatchStride < (p.seq - 1) * p.outputRowStride + width)) {
    return Status::kBadStride;
  }
  if (p.batch > 0 && p.seq > 0 && (!p.value || !p.kernelLogits || !p.output)) {
    return Status::kNullPointer;
  }
  return Status::kOk;
}

void runRowsOnCpu(SpanDynamicConvParams const& params, int64_t firstRow, int64_t lastRow,
                  InstructionSet instructionSet) noexcept {
#ifdef CONVBERT_WITH_X86
  // Heads of 8, 24, ... channels fill 8-lane vectors and would waste half of a 16-lane one.
  bool const narrow = params.headDim % 16 == 8 && params.headDim < 64;
  if (instructionSet >= InstructionSet::kAvx512 && !narrow) {
    return runRowsAvx512(params, firstRow, lastRow);
  }
  if (instructionSet != InstructionSet::kPortable) {
    return runRowsAvx2(params, firstRow, lastRow);
  }
#else
  (void)instructionSet;
#endif
  runRowsOfType(params, firstRow, lastRow);
}

Status runOnCpu(SpanDynamicConvParams const& params) noexcept {
  Status const status = validate(params);
  if (status == Status::kOk) {
    runRowsOnCpu(params, 0, params.batch * params.seq, bestInstructionSet());
  }
  return status;
}

}  // namespace convbert
