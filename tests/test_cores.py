"""The torch-free cores fuzzed under sanitizers, the CUDA kernels on a CPU: a few cases of each op; `make sanitize` and
`make emulate-cuda` run them at full length."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fss_kernels import _loading, testing

sys.path.insert(0, str(Path(__file__).parent / "cpp"))
sys.path.insert(0, str(Path(__file__).parent / "mutants"))
import emulate_cuda
import faults
import sanitize_cores

pytestmark = pytest.mark.slow

ISA = "avx2" if "avx2" in _loading.supported_isas() else "generic"


@pytest.mark.parametrize("sanitizer", sanitize_cores.CASES)
@pytest.mark.parametrize("op", sanitize_cores.OPS)
def test_core_under_sanitizers(op, sanitizer, tmp_path):
    """Bounds, undefined behaviour, unwritten results, values, data races; bfloat16 takes every path but float64's."""
    program = sanitize_cores.build(op, ISA, sanitizer, tmp_path, types="bfloat16")
    failure = sanitize_cores.fuzz(program, seed=0, first=0, count=60)
    assert failure is None, failure


def test_the_fuzzer_finds_a_planted_fault(tmp_path):
    shutil.copytree(sanitize_cores.ROOT / "csrc", tmp_path / "csrc")
    faults.find("dynamic_conv2d/channels-past-the-end-written").plant(tmp_path)
    program = sanitize_cores.build("dynamic_conv2d", ISA, "address,undefined", tmp_path, "bfloat16", tmp_path)
    assert sanitize_cores.fuzz(program, seed=0, first=0, count=60) is not None


def test_every_core_is_fuzzed():
    cores = sorted(p for p in sanitize_cores.ROOT.glob("csrc/*/*.h") if p.stem == p.parent.name)
    missing = [str(p.with_name(f"{p.stem}_fuzz.cpp").relative_to(sanitize_cores.ROOT)) for p in cores]
    missing = [name for name in missing if not (sanitize_cores.ROOT / name).exists()]
    assert cores and not missing, f"no random cases of a core for `make sanitize`: {missing}"


@pytest.mark.long  # minutes an op; `make emulate-cuda` does the same for every sample
@pytest.mark.parametrize("op", emulate_cuda.OPS)
def test_cuda_kernels_on_a_cpu(op):
    """Values, unwritten results, races; a barrier that threads have left or a misaligned access ends the process."""
    command = [sys.executable, emulate_cuda.__file__, "--few", op]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_every_cuda_kernel_is_emulated():
    assert emulate_cuda.OPS == sorted(op for op, spec in testing.specs().items() if "cuda" in spec.op.backends)
