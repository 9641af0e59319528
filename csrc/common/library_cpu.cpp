// What _fss_cpu.so says of itself.
#include <torch/csrc/stable/library.h>

#include <string>

#include "isa.h"

namespace fss {
namespace {

std::string build_info() {
  return std::string("compiler ") +
#if defined(__clang__)
         "clang "
#elif defined(__GNUC__)
         "gcc "
#endif
         __VERSION__ +
         ", instruction sets " + (FSS_X86_VARIANTS ? "generic avx2 avx512" : "generic");
}

std::string cpu_isa_name() { return kIsaNames[int(cpu_isa())]; }

std::string supported_isas() {
  std::string names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_supported(Isa(i))) names += (names.empty() ? "" : " ") + std::string(kIsaNames[i]);
  }
  return names;
}

}  // namespace
}  // namespace fss

STABLE_TORCH_LIBRARY_FRAGMENT(fss_cpp, m) {
  m.def("build_info() -> str");
  m.def("cpu_isa() -> str");
  m.def("supported_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&fss::build_info));
  m.impl("cpu_isa", TORCH_BOX(&fss::cpu_isa_name));
  m.impl("supported_isas", TORCH_BOX(&fss::supported_isas));
}
