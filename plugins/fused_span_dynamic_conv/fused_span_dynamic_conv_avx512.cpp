// The CPU kernel compiled for AVX-512; called only where bestInstructionSet() found it.
#include "fused_span_dynamic_conv_rows.h"

namespace convbert {

void runRowsAvx512(FusedSpanDynamicConvParams const& params, int64_t firstRow,
               int64_t lastRow) noexcept {
  runRowsOfType(params, firstRow, lastRow);
}

}  // namespace convbert
