// Validation, choice of the kernel, and the portable CPU kernel.
#include "depthwise_conv1d.h"

#include "depthwise_conv1d_rows.h"

namespace convbert {

#ifdef CONVBERT_WITH_X86
void runRowsAvx2(DepthwiseConv1dParams const&, int64_t, int64_t) noexcept;
void runRowsAvx512(DepthwiseConv1dParams const&, int64_t, int64_t) noexcept;
#endif

Status validate(DepthwiseConv1dParams const& p) noexcept {
  if (p.batch < 0 || p.seq < 0 || p.channels <= 0 || p.kernelSize <= 0) {
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
  if (p.seq > 1 && (p.inputRowStride < p.channels || p.outputRowStride < p.channels)) {
    return Status::kBadStride;
  }
  if (p.batch > 1 && (p.inputBatchStride < 0 || p.maskBatchStride < 0 ||
                      p.outputBatchStride < (p.seq - 1) * p.outputRowStride + p.channels)) {
    return Status::kBadStride;
  }
  if (p.batch > 0 && p.seq > 0 && (!p.input || !p.weight || !p.output)) {
    return Status::kNullPointer;
  }
  return Status::kOk;
}

void runRowsOnCpu(DepthwiseConv1dParams const& params, int64_t firstRow, int64_t lastRow,
                  InstructionSet instructionSet) noexcept {
#ifdef CONVBERT_WITH_X86
  // Rows of 8 to 15 channels fill an 8-lane vector, but no 16-lane one.
  bool const narrow = params.channels >= 8 && params.channels < 16;
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

Status runOnCpu(DepthwiseConv1dParams const& params) noexcept {
  Status const status = validate(params);
  if (status == Status::kOk) {
    runRowsOnCpu(params, 0, params.batch * params.seq, bestInstructionSet());
  }
  return status;
}

}  // namespace convbert
