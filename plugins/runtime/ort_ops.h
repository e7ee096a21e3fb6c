// The operators that ort_entry.cpp registers: one function for each folder of plugins/.
#pragma once

#include "ort_op.h"

namespace convbert::ort {

OpSet const& spanDynamicConvOps() noexcept;
OpSet const& depthwiseConv1dOps() noexcept;
OpSet const& fusedSpanDynamicConvOps() noexcept;

}  // namespace convbert::ort
