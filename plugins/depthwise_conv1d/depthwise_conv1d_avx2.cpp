// The CPU kernel compiled for AVX2; called only where bestInstructionSet() found it.
#include "depthwise_conv1d_rows.h"

namespace convbert {

void runRowsAvx2(DepthwiseConv1dParams const& params, int64_t firstRow, int64_t lastRow) noexcept {
  runRowsOfType(params, firstRow, lastRow);
}

}  // namespace convbert
