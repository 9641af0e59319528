// Which instruction set the CPU kernels run on: chosen once per process from the processor, or forced by
// FSS_KERNELS_CPU_ISA=generic|avx2|avx512.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

// Several instruction sets in one binary need GCC's target pragmas on x86-64; elsewhere only `generic` is built.
#ifndef FSS_X86_VARIANTS
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FSS_X86_VARIANTS 1
#else
#define FSS_X86_VARIANTS 0
#endif
#endif

namespace fss {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };
constexpr int kIsaCount = 3;
constexpr const char* kIsaNames[kIsaCount] = {"generic", "avx2", "avx512"};

inline bool isa_supported(Isa isa) {
#if FSS_X86_VARIANTS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == Isa::generic || (isa == Isa::avx2 && avx2) || (isa == Isa::avx512 && avx512);
#else
  return isa == Isa::generic;
#endif
}

inline Isa choose_isa() {
  const char* forced = std::getenv("FSS_KERNELS_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    return isa_supported(Isa::avx512) ? Isa::avx512 : isa_supported(Isa::avx2) ? Isa::avx2 : Isa::generic;
  }
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(forced, kIsaNames[i]) == 0) {
      if (!isa_supported(Isa(i))) {
        throw std::runtime_error(std::string("FSS_KERNELS_CPU_ISA=") + forced +
                                 ": this processor or this build does not support it");
      }
      return Isa(i);
    }
  }
  throw std::runtime_error(std::string("FSS_KERNELS_CPU_ISA must be generic, avx2 or avx512, got ") + forced);
}

inline Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace fss
