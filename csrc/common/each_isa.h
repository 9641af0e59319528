// Compiles the core named by FSS_CORE once per instruction set, each in its own namespace fss::<isa>.
// Include every system header before this file: a header first seen inside a target region would be compiled for it.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "dtypes.h"
#include "isa.h"
#include "sizes.h"
#if FSS_X86_VARIANTS
#include <immintrin.h>
#endif

#define FSS_ISA generic
#define FSS_ISA_LEVEL 0
#define FSS_VECTOR_BYTES 16
#include "simd.h"
#include "panels.h"
#include "resize.h"
#include FSS_CORE
#undef FSS_ISA
#undef FSS_ISA_LEVEL
#undef FSS_VECTOR_BYTES

#if FSS_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FSS_ISA avx2
#define FSS_ISA_LEVEL 1
#define FSS_VECTOR_BYTES 32
#include "simd.h"
#include "panels.h"
#include "resize.h"
#include FSS_CORE
#undef FSS_ISA
#undef FSS_ISA_LEVEL
#undef FSS_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FSS_ISA avx512
#define FSS_ISA_LEVEL 2
#define FSS_VECTOR_BYTES 64
#include "simd.h"
#include "panels.h"
#include "resize.h"
#include FSS_CORE
#undef FSS_ISA
#undef FSS_ISA_LEVEL
#undef FSS_VECTOR_BYTES
#pragma GCC pop_options
#endif

// The function `...` of the core compiled for the running processor, as a pointer.
#if FSS_X86_VARIANTS
#define FSS_FOR_ISA(...)                                                \
  (::fss::cpu_isa() >= ::fss::Isa::avx512 ? &::fss::avx512::__VA_ARGS__ \
   : ::fss::cpu_isa() == ::fss::Isa::avx2 ? &::fss::avx2::__VA_ARGS__   \
                                          : &::fss::generic::__VA_ARGS__)
#else
#define FSS_FOR_ISA(...) (&::fss::generic::__VA_ARGS__)
#endif
