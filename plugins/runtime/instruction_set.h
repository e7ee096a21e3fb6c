// Which build of a CPU kernel this machine can run.
#pragma once

#include <cstdint>

namespace convbert {

// Each has all of those before it. From kAvx512Vnni on they differ for matrix products alone.
enum class InstructionSet : int32_t {
  kPortable = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAvx512Vnni = 3,
  kAvx512Bf16 = 4,
  kAmx = 5,          // tiles of bfloat16 and int8
  kAmxEmulated = 6,  // for tests, on any CPU with kAvx512Bf16; never the best
};

// The widest instruction set this CPU has and this library was built with.
InstructionSet bestInstructionSet() noexcept;

}  // namespace convbert
