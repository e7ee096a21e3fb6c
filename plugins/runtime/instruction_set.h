// Which build of a CPU kernel this machine can run.
#pragma once

#include <cstdint>

namespace convbert {

enum class InstructionSet : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The widest instruction set this CPU has and this library was built with.
InstructionSet bestInstructionSet() noexcept;

}  // namespace convbert
