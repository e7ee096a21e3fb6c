// FusedSpanDynamicConv in the C ABI.
#include "../runtime/c_entry.h"
#include "fused_span_dynamic_conv.h"

using convbert::FusedSpanDynamicConvParams;
using convbert::Status;

CONVBERT_EXPORT int32_t
convbert_fused_span_dynamic_conv_cpu(FusedSpanDynamicConvParams const* params) {
  return static_cast<int32_t>(params ? convbert::runOnCpu(*params) : Status::kNullPointer);
}

// Rows [firstRow, lastRow) with one instruction set: 0 portable, 1 AVX2, 2 AVX-512.
CONVBERT_EXPORT int32_t convbert_fused_span_dynamic_conv_cpu_rows(
    FusedSpanDynamicConvParams const* params, int64_t firstRow, int64_t lastRow,
    int32_t instructionSet) {
  Status status = params ? convbert::validate(*params) : Status::kNullPointer;
  if (status == Status::kOk) {
    status = convbert::checkRows(firstRow, lastRow, params->conv.batch * params->conv.seq,
                                 instructionSet);
  }
  if (status == Status::kOk) {
    convbert::runRowsOnCpu(*params, firstRow, lastRow,
                           static_cast<convbert::InstructionSet>(instructionSet));
  }
  return static_cast<int32_t>(status);
}

CONVBERT_EXPORT int32_t convbert_fused_span_dynamic_conv_emulated(
    FusedSpanDynamicConvParams const* params, int32_t multiprocessors) {
  return static_cast<int32_t>(params ? convbert::runEmulated(*params, multiprocessors)
                                     : Status::kNullPointer);
}

#ifdef CONVBERT_WITH_CUDA
// Device pointers.
CONVBERT_EXPORT int32_t convbert_fused_span_dynamic_conv_cuda(
    FusedSpanDynamicConvParams const* params, void* stream) {
  return static_cast<int32_t>(params ? convbert::launchFusedSpanDynamicConv(
                                           *params, static_cast<cudaStream_t>(stream))
                                     : cudaErrorInvalidValue);
}
#endif
