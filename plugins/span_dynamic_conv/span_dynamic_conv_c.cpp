// C ABI of the kernels, for ctypes and for programs in other languages. Each entry returns a
// convbert::Status as int32.
#include "span_dynamic_conv.h"

#define CONVBERT_EXPORT extern "C" __attribute__((visibility("default")))

using convbert::InstructionSet;
using convbert::SpanDynamicConvParams;
using convbert::Status;

CONVBERT_EXPORT char const* convbert_status_message(int32_t status) {
  return convbert::statusMessage(static_cast<Status>(status));
}

CONVBERT_EXPORT int32_t convbert_best_instruction_set() {
  return static_cast<int32_t>(convbert::bestInstructionSet());
}

CONVBERT_EXPORT int32_t convbert_built_with_cuda() {
#ifdef CONVBERT_WITH_CUDA
  return 1;
#else
  return 0;
#endif
}

CONVBERT_EXPORT int32_t convbert_span_dynamic_conv_cpu(SpanDynamicConvParams const* params) {
  return static_cast<int32_t>(params ? convbert::runOnCpu(*params) : Status::kNullPointer);
}

// Rows [firstRow, lastRow) with one instruction set: 0 portable, 1 AVX2, 2 AVX-512.
CONVBERT_EXPORT int32_t convbert_span_dynamic_conv_cpu_rows(SpanDynamicConvParams const* params,
                                                            int64_t firstRow, int64_t lastRow,
                                                            int32_t instructionSet) {
  if (params == nullptr) {
    return static_cast<int32_t>(Status::kNullPointer);
  }
  Status const status = convbert::validate(*params);
  if (status != Status::kOk) {
    return static_cast<int32_t>(status);
  }
  if (firstRow < 0 || lastRow > params->batch * params->seq) {
    return static_cast<int32_t>(Status::kBadSize);
  }
  if (instructionSet < 0 || instructionSet > convbert_best_instruction_set()) {
    return static_cast<int32_t>(Status::kNoSuchInstructionSet);
  }
  convbert::runRowsOnCpu(*params, firstRow, lastRow, static_cast<InstructionSet>(instructionSet));
  return 0;
}

CONVBERT_EXPORT int32_t convbert_span_dynamic_conv_emulated(SpanDynamicConvParams const* params,
                                                            int32_t multiprocessors) {
  return static_cast<int32_t>(params ? convbert::runEmulated(*params, multiprocessors)
                                     : Status::kNullPointer);
}

#ifdef CONVBERT_WITH_CUDA
// Device pointers; returns the cudaError_t of the launch.
CONVBERT_EXPORT int32_t convbert_span_dynamic_conv_cuda(SpanDynamicConvParams const* params,
                                                        void* stream) {
  return static_cast<int32_t>(params ? convbert::launchSpanDynamicConv(
                                           *params, static_cast<cudaStream_t>(stream))
                                     : cudaErrorInvalidValue);
}
#endif
