// A linear layer's weight as the kernel reads it. Layout and writer:
// convbert_deploy/operators/packed_weight.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../runtime/status.h"

namespace convbert {

enum class WeightType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

constexpr int64_t kBlockColumns = 64;
constexpr int64_t kPanelColumns = 16;

// A view of a blob, which must outlive it.
struct PackedWeight {
  WeightType type;
  int32_t groups;
  int64_t inputs;           // of one group
  int64_t outputs;          // of one group
  float activationScale;    // int8: the step of the quantized input; 0: one for each row
  float const* scales;      // int8: (groups * outputs)
  float const* multiplier;  // (groups * inputs) on the input, or null
  unsigned char const* blocks;
};

// Internal linkage: see ../runtime/half.h.
namespace {

// Weights in a unit of 4 bytes.
constexpr int64_t elementsOf(WeightType type) noexcept {
  return type == WeightType::kFloat32 ? 1 : type == WeightType::kBFloat16 ? 2 : 4;
}

constexpr int64_t ceilDivide(int64_t value, int64_t by) noexcept { return (value + by - 1) / by; }
constexpr int64_t roundUp(int64_t value, int64_t to) noexcept { return ceilDivide(value, to) * to; }

inline int64_t unitsOf(PackedWeight const& w) noexcept {
  return ceilDivide(w.inputs, elementsOf(w.type));
}

inline int64_t allInputs(PackedWeight const& w) noexcept { return w.groups * w.inputs; }
inline int64_t allOutputs(PackedWeight const& w) noexcept { return w.groups * w.outputs; }

inline int64_t groupBytes(PackedWeight const& w) noexcept {
  int64_t const full = w.outputs / kBlockColumns;
  int64_t const rest = roundUp(w.outputs % kBlockColumns, kPanelColumns);
  // every block ends at a multiple of 64 bytes: 16 columns of 4
  return (full * kBlockColumns + rest) * unitsOf(w) * 4;
}

// Reads the header and checks it against `bytes`, the length of the blob.
inline Status parsePackedWeight(void const* blob, int64_t bytes, PackedWeight& weight) noexcept {
  struct Header {
    char magic[8];
    int32_t type;
    int32_t groups;
    int64_t inputs;
    int64_t outputs;
    float activationScale;
    int32_t hasMultiplier;
  } header;
  constexpr int64_t kAligned = 64;
  constexpr int64_t kMost = int64_t(1) << 24;      // of all groups: byte counts stay below 2^63
  constexpr int64_t kMostInt8 = int64_t(1) << 16;  // 65536 * 255 * 127 is below 2^31
  if (blob == nullptr) {
    return Status::kNullPointer;
  }
  if (bytes < kAligned) {
    return Status::kBadWeight;
  }
  memcpy(&header, blob, sizeof(header));
  bool const sound = memcmp(header.magic, "CVBTPKW1", sizeof(header.magic)) == 0 &&
                     header.type >= 0 && header.type <= 2 && header.groups >= 1 &&
                     header.groups <= 65536 && header.inputs >= 1 &&
                     header.inputs <= (header.type == 2 ? kMostInt8 : kMost) &&
                     header.inputs * header.groups <= kMost && header.outputs >= 1 &&
                     header.outputs <= kMost && header.outputs * header.groups <= kMost &&
                     header.activationScale >= 0 && header.activationScale < __builtin_inff();
  if (!sound) {
    return Status::kBadWeight;
  }
  weight = {};
  weight.type = static_cast<WeightType>(header.type);
  weight.groups = header.groups;
  weight.inputs = header.inputs;
  weight.outputs = header.outputs;
  weight.activationScale = header.activationScale;
  auto const* at = static_cast<unsigned char const*>(blob) + kAligned;
  if (weight.type == WeightType::kInt8) {
    weight.scales = reinterpret_cast<float const*>(at);
    at += roundUp(allOutputs(weight) * 4, kAligned);
  }
  if (header.hasMultiplier != 0) {
    weight.multiplier = reinterpret_cast<float const*>(at);
    at += roundUp(allInputs(weight) * 4, kAligned);
  }
  weight.blocks = at;
  int64_t const used =
      at - static_cast<unsigned char const*>(blob) + weight.groups * groupBytes(weight);
  return used == bytes ? Status::kOk : Status::kBadWeight;
}

}  // namespace
}  // namespace convbert
