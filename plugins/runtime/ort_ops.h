// The operators that ort_entry.cpp registers: one function for each folder of plugins/.
#pragma once

#include "ort_op.h"

namespace convbert::ort {

OpSet const& spanDynamicConvOps() noexcept;
OpSet const& depthwiseConv1dOps() noexcept;
OpSet const& fusedSpanDynamicConvOps() noexcept;
CustomOp const& packRowsOp() noexcept;
CustomOp const& unpackRowsOp() noexcept;
// Of its own for each session: it knows the session's threads. Null where memory ran out; the
// session's for as long as it lives, so it is left to the process as the domain is.
CustomOp const* encoderLayerOp(SessionOptions const* options) noexcept;

}  // namespace convbert::ort
