// The CPU kernel compiled for AVX-512; called only where bestInstructionSet() found it.
#include "depthwise_conv1d_rows.h"

namespace convbert {

void runRowsAvx512(DepthwiseConv1dParams const& params, int64_t firstRow,
                   int64_t lastRow) noexcept {
  runRowsOfType(params, firstRow, lastRow);
}

}  // namespace convbert
