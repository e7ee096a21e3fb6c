// The part of the C ABI that belongs to no operator.
#include "c_entry.h"

CONVBERT_EXPORT char const* convbert_status_message(int32_t status) {
  return convbert::statusMessage(static_cast<convbert::Status>(status));
}

CONVBERT_EXPORT int32_t convbert_best_instruction_set() {
  return static_cast<int32_t>(convbert::bestInstructionSet());
}

CONVBERT_EXPORT int32_t convbert_built_with_cuda() {
#ifdef CONVBERT_WITH_CUDA
  return 1;
#else
  return 0;
#endif
}
