// DepthwiseConv1D in the C ABI, for ctypes and for programs in other languages.
#include "../runtime/c_entry.h"
#include "depthwise_conv1d.h"

using convbert::DepthwiseConv1dParams;
using convbert::Status;

CONVBERT_EXPORT int32_t convbert_depthwise_conv1d_cpu(DepthwiseConv1dParams const* params) {
  return static_cast<int32_t>(params ? convbert::runOnCpu(*params) : Status::kNullPointer);
}

// Rows [firstRow, lastRow) with one instruction set: 0 portable, 1 AVX2, 2 AVX-512.
CONVBERT_EXPORT int32_t convbert_depthwise_conv1d_cpu_rows(DepthwiseConv1dParams const* params,
                                                           int64_t firstRow, int64_t lastRow,
                                                           int32_t instructionSet) {
  Status status = params ? convbert::validate(*params) : Status::kNullPointer;
  if (status == Status::kOk) {
    status = convbert::checkRows(firstRow, lastRow, params->batch * params->seq, instructionSet);
  }
  if (status == Status::kOk) {
    convbert::runRowsOnCpu(*params, firstRow, lastRow,
                           static_cast<convbert::InstructionSet>(instructionSet));
  }
  return static_cast<int32_t>(status);
}

CONVBERT_EXPORT int32_t convbert_depthwise_conv1d_emulated(DepthwiseConv1dParams const* params,
                                                           int32_t multiprocessors) {
  return static_cast<int32_t>(params ? convbert::runEmulated(*params, multiprocessors)
                                     : Status::kNullPointer);
}

#ifdef CONVBERT_WITH_CUDA
// Device pointers.
CONVBERT_EXPORT int32_t convbert_depthwise_conv1d_cuda(DepthwiseConv1dParams const* params,
                                                       void* stream) {
  return static_cast<int32_t>(params ? convbert::launchDepthwiseConv1d(
                                           *params, static_cast<cudaStream_t>(stream))
                                     : cudaErrorInvalidValue);
}
#endif
