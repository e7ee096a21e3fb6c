// Element types of the operators' tensors, and what the operators have in common.
#pragma once

#include <cstdint>

namespace convbert {

enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline bool isKnown(DataType type) noexcept {
  return type == DataType::kFloat32 || type == DataType::kFloat16 || type == DataType::kBFloat16;
}

inline int32_t elementBytes(DataType type) noexcept {
  return type == DataType::kFloat32 ? 4 : 2;
}

// Windows are odd and centred; the CUDA kernels have one instantiation for each size up to this.
constexpr int32_t kMaxKernelSize = 15;

}  // namespace convbert
