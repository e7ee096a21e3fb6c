// The operators that ort_entry.cpp registers, each one descriptor per dtype and provider.
#pragma once

#include "ort_abi.h"

namespace convbert::ort {

struct CustomOpList {
  CustomOp const* const* ops;
  size_t count;
};

// Set once by RegisterCustomOps before any kernel exists.
void setApi(Api const* api) noexcept;

CustomOpList spanDynamicConvOps() noexcept;

}  // namespace convbert::ort
