// What a kernel entry point answers. No operator throws, aborts or prints.
#pragma once

#include <cstdint>

namespace convbert {

enum class Status : int32_t {
  kOk = 0,
  kNullPointer = 1,
  kBadSize = 2,         // a negative size, or no heads, no head_dim, no taps
  kEvenKernelSize = 3,  // the window has no centre
  kKernelTooLarge = 4,
  kBadStride = 5,  // rows of the output overlap, or a row is shorter than its contents
  kBadDataType = 6,
  kNoSuchInstructionSet = 7,
  kCudaError = 8,
  kOutOfMemory = 9,
  kBadWeight = 10,
  kBadMask = 11,
};

inline char const* statusMessage(Status status) noexcept {
  switch (status) {
    case Status::kOk: return "ok";
    case Status::kNullPointer: return "a tensor pointer is null";
    case Status::kBadSize: return "a size is negative, or num_heads, head_dim or kernel_size is 0";
    case Status::kEvenKernelSize: return "kernel_size is even: the window has no centre";
    case Status::kKernelTooLarge: return "kernel_size is above 15";
    case Status::kBadStride: return "a row stride is smaller than the row";
    case Status::kBadDataType: return "dtype is not float32, float16 or bfloat16";
    case Status::kNoSuchInstructionSet: return "this CPU lacks the instruction set asked for";
    case Status::kCudaError: return "CUDA refused the launch";
    case Status::kOutOfMemory: return "out of memory";
    case Status::kBadMask: return "a token follows a pad: pads must be at the end of a row";
    case Status::kBadWeight: return "a packed weight is damaged or has another shape than expected";
  }
  return "unknown status";
}

}  // namespace convbert

// For functions that return cudaError_t: pass the first failure up, drop none.
#define CONVBERT_RETURN_IF_CUDA_ERROR(expression)             \
  do {                                                        \
    cudaError_t const convbertCudaStatus_ = (expression);     \
    if (convbertCudaStatus_ != cudaSuccess) {                 \
      return convbertCudaStatus_;                             \
    }                                                         \
  } while (false)
