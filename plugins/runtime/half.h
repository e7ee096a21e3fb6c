// Storage types of the operators and their conversion to and from float.
//
// Kernels load a storage type, compute in float and round once on the way out. The bit-level code
// below is what the portable CPU kernel and the host emulation of the CUDA kernel run; on the device
// the same functions are the hardware's conversion instructions.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define CONVBERT_HD __host__ __device__ __forceinline__
#else
#define CONVBERT_HD inline
#endif

namespace convbert {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Everything here has internal linkage: translation units built for different instruction sets
// must not share one copy, or the linker may pick the AVX-512 one for every CPU.
namespace {

CONVBERT_HD float floatFromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

CONVBERT_HD uint32_t bitsFromFloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

CONVBERT_HD float toFloat(float value) { return value; }

CONVBERT_HD float toFloat(BFloat16 value) {
  return floatFromBits(static_cast<uint32_t>(value.bits) << 16);
}

CONVBERT_HD float toFloat(Float16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  // Shift the exponent and mantissa into place and let a float multiply by 2^112 rebias the
  // exponent: this turns subnormal halves into normal floats without a branch.
  uint32_t const sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  uint32_t const magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) {  // infinity or NaN: the exponent is all ones in both formats
    return floatFromBits(sign | magnitude | 0x7f800000u);
  }
  return floatFromBits(sign | bitsFromFloat(floatFromBits(magnitude) * 5.192296858534828e+33f));
#endif
}

template <typename T>
CONVBERT_HD T fromFloat(float value);

template <>
CONVBERT_HD float fromFloat<float>(float value) {
  return value;
}

template <>
CONVBERT_HD BFloat16 fromFloat<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  uint32_t const bits = bitsFromFloat(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40u)};  // keep it a NaN
  }
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
CONVBERT_HD Float16 fromFloat<Float16>(float value) {
#ifdef __CUDA_ARCH__
  return Float16{__half_as_ushort(__float2half_rn(value))};
#else
  uint32_t const bits = bitsFromFloat(value);
  uint16_t const sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t const magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return Float16{static_cast<uint16_t>(sign | 0x7e00u)};
  }
  if (magnitude >= 0x477ff000u) {  // rounds to 65520 or more: infinity
    return Float16{static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 makes the float adder round it
    uint32_t const rounded = bitsFromFloat(floatFromBits(magnitude) + 0.5f) - 0x3f000000u;
    return Float16{static_cast<uint16_t>(sign | rounded)};
  }
  uint32_t const rebased = magnitude - 0x38000000u;  // 112 << 23
  uint32_t const rounded = (rebased + 0x0fffu + ((rebased >> 13) & 1u)) >> 13;
  return Float16{static_cast<uint16_t>(sign | rounded)};
#endif
}

}  // namespace
}  // namespace convbert
