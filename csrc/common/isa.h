// Which instruction set the CPU kernels run on: chosen once per process from the processor, or forced by
// FSS_KERNELS_CPU_ISA=generic|avx2|avx512|avx512_bf16. The last is the kernels of avx512, some of which then screen
// with bfloat16 products; it is chosen where these are twice as fast as float32's.
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

// Products of bfloat16 pairs need GCC 10.
#define FSS_BFLOAT16_PRODUCTS (FSS_X86_VARIANTS && __GNUC__ >= 10)

namespace fss {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int kIsaCount = 4;
constexpr const char* kIsaNames[kIsaCount] = {"generic", "avx2", "avx512", "avx512_bf16"};

inline bool isa_supported(Isa isa) {
#if FSS_X86_VARIANTS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if FSS_BFLOAT16_PRODUCTS
  if (isa == Isa::avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == Isa::generic || (isa == Isa::avx2 && avx2) || (isa == Isa::avx512 && avx512);
#else
  return isa == Isa::generic;
#endif
}

// Whether one unit takes two float32 or four bfloat16 operands a lane and cycle: AMD's, not Intel's.
inline bool bfloat16_is_faster() {
#if FSS_BFLOAT16_PRODUCTS
  return isa_supported(Isa::avx512_bf16) && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

inline Isa choose_isa() {
  const char* forced = std::getenv("FSS_KERNELS_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    if (bfloat16_is_faster()) return Isa::avx512_bf16;
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
  throw std::runtime_error(std::string("FSS_KERNELS_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, got ") +
                           forced);
}

inline Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace fss
