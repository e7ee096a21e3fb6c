// What the C ABI's adapters share. Each entry returns a convbert::Status as int32, those that launch
// a CUDA kernel its cudaError_t.
#pragma once

#include <cstdint>

#include "instruction_set.h"
#include "status.h"

#define CONVBERT_EXPORT extern "C" __attribute__((visibility("default")))

namespace convbert {

// Checks of an entry that runs rows [firstRow, lastRow) with one instruction set.
inline Status checkRows(int64_t firstRow, int64_t lastRow, int64_t rows,
                        int32_t instructionSet) noexcept {
  if (firstRow < 0 || lastRow > rows) {
    return Status::kBadSize;
  }
  if (instructionSet < 0 || instructionSet > static_cast<int32_t>(bestInstructionSet())) {
    return Status::kNoSuchInstructionSet;
  }
  return Status::kOk;
}

}  // namespace convbert
