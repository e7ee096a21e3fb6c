#include "instruction_set.h"

#ifdef CONVBERT_WITH_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace convbert {

#ifdef CONVBERT_WITH_X86
namespace {

// Whether the CPU has AMX with bfloat16 and int8 and the kernel lets this process use its tiles,
// which it must be asked for (arch_prctl ARCH_REQ_XCOMP_PERM, since Linux 5.16).
bool hasAmx() noexcept {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) {
    return false;
  }
  unsigned const needed = kBf16 | kTile | kInt8;
  return (edx & needed) == needed && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

InstructionSet bestAvx512() noexcept {
  if (!__builtin_cpu_supports("avx512vnni")) {
    return InstructionSet::kAvx512;
  }
  if (!__builtin_cpu_supports("avx512bf16")) {
    return InstructionSet::kAvx512Vnni;
  }
  return hasAmx() ? InstructionSet::kAmx : InstructionSet::kAvx512Bf16;
}

}  // namespace
#endif

InstructionSet bestInstructionSet() noexcept {
#ifdef CONVBERT_WITH_X86
  static InstructionSet const kBest = [] {
    // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      return bestAvx512();
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
