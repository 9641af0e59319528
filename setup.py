"""Builds the compiled libraries. FSS_KERNELS_BUILD=auto|none|cpu|cuda; see docs/installing.md.

FSS_KERNELS_BUILD=native builds the developer's module `_native` instead.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "fss_kernels"

# Only what every PyTorch >= 2.10 offers. No -std: PyTorch's build adds the one its headers need. No -ffast-math.
MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
# -g0: Python's own flags ask for debug information, nine tenths of the library.
# Of -O3 the kernels need whole unrolled loops and vectors: the rest makes them no faster and compiling slower.
COMMON = ["-O2", "-fpeel-loops", "-fvect-cost-model=dynamic"]
COMMON += ["-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"]
CXX_FLAGS = [*COMMON, *MACROS]
NVCC_FLAGS = ["-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", *MACROS]


def sources(suffix: str) -> list[str]:
    """Sources of one library: every op is found by its file name."""
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"csrc/*/*_{suffix}"))


def arguments() -> dict:
    """Extension arguments for setup(); without PyTorch or with FSS_KERNELS_BUILD=none, pure Python."""
    request = os.environ.get("FSS_KERNELS_BUILD", "auto")
    if request not in ("auto", "none", "cpu", "cuda", "native"):
        raise SystemExit(f"FSS_KERNELS_BUILD must be auto, none, cpu, cuda or native, got {request!r}")
    if request == "native":
        return {"ext_modules": [native()]}
    skipped = {}
    if request == "none":
        skipped = dict.fromkeys(("_fss_cpu.so", "_fss_cuda.so"), "left out by FSS_KERNELS_BUILD=none")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if request in ("cpu", "cuda"):
            raise
        record(dict.fromkeys(("_fss_cpu.so", "_fss_cuda.so"), f"PyTorch was missing at build time: {error}"))
        return {}

    if not skipped and not sources("cuda.cu"):
        skipped["_fss_cuda.so"] = "no CUDA kernels in this version"
    elif not skipped and torch.version.cuda is None:
        skipped["_fss_cuda.so"] = "built with a PyTorch without CUDA"
    elif request == "cpu":
        skipped["_fss_cuda.so"] = "left out by FSS_KERNELS_BUILD=cpu"
    if request == "cuda" and "_fss_cuda.so" in skipped:
        raise SystemExit(f"FSS_KERNELS_BUILD=cuda: {skipped['_fss_cuda.so']}")

    include_dirs = [str(ROOT / "csrc"), str(ROOT / "csrc" / "common")]
    flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
    # before PyTorch's libraries: they export pieces of it, other ones in every release
    libraries = ["stdc++"] if sys.platform == "linux" else []
    extensions = []
    if "_fss_cpu.so" not in skipped:
        extensions.append(
            CppExtension(
                "fss_kernels._fss_cpu",
                sources("cpu.cpp"),
                include_dirs=include_dirs,
                libraries=libraries.copy(),
                extra_compile_args=flags,
                py_limited_api=True,  # links no Python library
            )
        )
    if "_fss_cuda.so" not in skipped:
        extensions.append(
            CUDAExtension(
                "fss_kernels._fss_cuda",
                sources("cuda.cu"),
                include_dirs=include_dirs,
                libraries=libraries.copy(),
                extra_compile_args=flags,
                py_limited_api=True,
            )
        )

    class Build(BuildExtension):
        """Builds each library on its own; one that fails is recorded and left out unless it was asked for by name."""

        def build_extensions(self) -> None:
            reasons = dict(skipped)
            wanted = self.extensions
            built = []
            for extension in wanted:
                library = extension.name.rpartition(".")[2] + ".so"
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except (Exception, SystemExit) as error:
                    if request in ("cpu", "cuda"):
                        raise
                    reasons[library] = f"{library} did not compile: {' '.join(str(error).split())[:300]}"
                    print(f"fss_kernels: {reasons[library]}; its ops use the reference")
            self.extensions = built
            in_tree = self.inplace or getattr(self, "editable_mode", False)
            record(reasons, PACKAGE if in_tree else Path(self.build_lib) / "fss_kernels")

        def get_ext_filename(self, fullname: str) -> str:
            return fullname.replace(".", os.sep) + ".so"  # no Python in them: no Python version in their names

        def get_export_symbols(self, extension) -> list[str]:
            return []

    if not extensions:
        record(skipped)
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}


def native() -> Extension:
    """The machine's ceilings as a Python module. Never part of a wheel."""
    import pybind11

    return Extension(
        "fss_kernels._native",
        ["csrc/native.cpp"],
        depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/common/*.h")],
        include_dirs=["csrc", "csrc/common", pybind11.get_include()],
        extra_compile_args=[*COMMON, "-std=c++17", "-pthread"],
        extra_link_args=["-pthread"],
        language="c++",
    )


def record(reasons: dict[str, str], directory: Path = PACKAGE) -> None:
    """Writes why libraries are missing to _build_info.json, for `fss-kernels info`."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / "_build_info.json.tmp"
    temporary.write_text(json.dumps(reasons, indent=1))
    temporary.replace(directory / "_build_info.json")


class Wheel(bdist_wheel):
    """py3-none-<platform>: the libraries hold no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(**arguments())
