"""The compiled libraries, and why a backend cannot run on this machine."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

BACKENDS = ("reference", "cpp", "cuda", "triton")
# backend -> its library and the device type of its tensors
COMPILED = {"cpp": ("_fss_cpu.so", "cpu"), "cuda": ("_fss_cuda.so", "cuda")}

# What the libraries implement. It is there before they load, and every op defines itself in it.
fss_cpp = torch.library.Library("fss_cpp", "FRAGMENT")


def build_info() -> dict[str, Any]:
    """What the installation recorded of its build: a message for each compiled library that was left out."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _load(library: str) -> str | None:
    """Loads a compiled library; returns why it is missing, or None."""
    path = Path(__file__).with_name(library)
    if not path.exists():
        return build_info().get(library, f"{library} was not built (reinstall with a compiler)")
    try:
        torch.ops.load_library(path)
        if library == "_fss_cpu.so":
            torch.ops.fss_cpp.cpu_isa()  # raises when FSS_KERNELS_CPU_ISA asks for what is not there
    except OSError as error:
        return f"{library} does not load: {error.__cause__ or error}"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"fss_kernels: the CPU kernels are off: {reason}", stacklevel=2)
        return reason
    return None


# backend -> why it cannot run here; absent when it can.
unavailable: dict[str, str] = {}
for _backend, (_file, _) in COMPILED.items():
    if (_reason := _load(_file)) is not None:
        unavailable[_backend] = _reason
if "cuda" not in unavailable and not torch.cuda.is_available():
    unavailable["cuda"] = "compiled, but PyTorch sees no CUDA device"
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton reads it when a kernel is decorated
if importlib.util.find_spec("triton") is None:
    unavailable["triton"] = "Triton is not installed"
elif not TRITON_INTERPRETED and not torch.cuda.is_available():
    unavailable["triton"] = "PyTorch sees no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU, very slowly"


def missing(backend: str) -> str | None:
    """Why a backend cannot run here, or None. Triton's driver is asked for when something first wants Triton."""
    if backend == "triton" and backend not in unavailable and (reason := _triton_fault()) is not None:
        unavailable[backend] = reason
    return unavailable.get(backend)


def interpreter_fault(triton: str) -> str | None:
    """Why the interpreter of this version of Triton cannot run kernels here, or None."""
    if tuple(int(part) for part in triton.split(".")[:2]) >= (3, 7):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            int(np.zeros(1))  # so it reads the bounds of a loop
        except TypeError:
            return f"the interpreter of Triton {triton} does not run loops with NumPy {np.__version__}"
    return None


@functools.cache
def _triton_fault() -> str | None:
    try:
        triton = importlib.import_module("triton")
        if not TRITON_INTERPRETED:
            triton.runtime.driver.active.get_current_target()
        elif (fault := interpreter_fault(triton.__version__)) is not None:
            return fault
    except Exception as error:  # no libcuda, no compiler, another version of something: whatever the driver raises
        lines = str(error).splitlines() or [""]
        return f"Triton does not work here: {type(error).__name__}: {lines[0]}"
    return None


def cpu_isa() -> str | None:
    """Instruction set of the CPU kernels: ``generic``, ``avx2``, ``avx512`` or ``avx512_bf16``; None without them."""
    return None if "cpp" in unavailable else torch.ops.fss_cpp.cpu_isa()


def supported_isas() -> list[str]:
    """Instruction sets of this build that this processor can run; FSS_KERNELS_CPU_ISA forces one."""
    return [] if "cpp" in unavailable else torch.ops.fss_cpp.supported_isas().split()
