// Messages of the TensorRT adapters: to the logger TensorRT gave us, else to stderr.
#pragma once

#include <NvInferRuntime.h>

namespace convbert::trt {

void logError(char const* message) noexcept;

}  // namespace convbert::trt
