// The CPU kernel compiled for AVX512; called only where bestInstructionSet() found it.
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own AVX-512 header

#include "depthwise_conv1d_rows.h"

namespace convbert {

void runRowsAvx512(DepthwiseConv1dParams const& params, int64_t firstRow, int64_t lastRow) noexcept {
  runRowsOfType(params, firstRow, lastRow);
}

}  // namespace convbert
