#include "instruction_set.h"

namespace convbert {

InstructionSet bestInstructionSet() noexcept {
#ifdef CONVBERT_WITH_X86
  static InstructionSet const kBest = [] {
    // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      return InstructionSet::kAvx512;
    }
    // Every CPU with AVX2 and FMA converts halves too (F16C came a generation earlier).
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return InstructionSet::kAvx2;
    }
    return InstructionSet::kPortable;
  }();
  return kBest;
#else
  return InstructionSet::kPortable;
#endif
}

}  // namespace convbert
