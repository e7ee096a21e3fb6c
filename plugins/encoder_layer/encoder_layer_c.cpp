// EncoderLayer in the C ABI, for ctypes and for programs in other languages.
#include "../runtime/c_entry.h"
#include "encoder_layer.h"

using convbert::EncoderLayer;
using convbert::EncoderLayerParams;
using convbert::InstructionSet;
using convbert::Status;

namespace {

bool runInTurn(void*, size_t count, void (*task)(void*, size_t), void* data) {
  for (size_t i = 0; i < count; ++i) {
    task(data, i);
  }
  return true;
}

}  // namespace

// On the calling thread, cut into tasks as for `threads`. instructionSet: 0 portable, 1 AVX2,
// 2 AVX-512, 3 with VNNI, 4 with BF16, 5 AMX, 6 AMX with emulated tiles (needs 4); -1 the best.
CONVBERT_EXPORT int32_t convbert_encoder_layer_cpu(EncoderLayerParams const* params,
                                                   int32_t threads, int32_t instructionSet) {
  if (params == nullptr) {
    return static_cast<int32_t>(Status::kNullPointer);
  }
  if (threads < 1) {
    return static_cast<int32_t>(Status::kBadSize);
  }
  auto const best = convbert::bestInstructionSet();
  auto chosen = static_cast<InstructionSet>(instructionSet);
  if (instructionSet == -1) {
    chosen = best;
  }
  bool const emulated =
      chosen == InstructionSet::kAmxEmulated && best >= InstructionSet::kAvx512Bf16;
  if (instructionSet < -1 || (chosen > best && !emulated)) {
    return static_cast<int32_t>(Status::kNoSuchInstructionSet);
  }
  EncoderLayer layer;
  Status status = convbert::prepare(*params, layer);
  if (status == Status::kOk) {
    status = convbert::runOnCpu(layer, {runInTurn, nullptr, threads}, chosen);
  }
  return static_cast<int32_t>(status);
}
