"""The torch-free cores fuzzed under sanitizers: a few cases of each op; `make sanitize` runs them at full length."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fss_kernels import _library

sys.path.insert(0, str(Path(__file__).parent / "cpp"))
import sanitize_cores

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("op", sanitize_cores.OPS)
def test_core_under_sanitizers(op, tmp_path):
    """Bounds, undefined behaviour, unwritten results, values; bfloat16 takes every path but float64's."""
    isa = "avx2" if "avx2" in _library.supported_isas() else "generic"
    program = sanitize_cores.build(op, isa, "address,undefined", tmp_path, types="bfloat16")
    failure = sanitize_cores.fuzz(program, seed=0, first=0, count=60)
    assert failure is None, failure


def test_every_core_is_fuzzed():
    cores = sanitize_cores.ROOT.glob("csrc/*/*.h")
    assert sanitize_cores.OPS == sorted(path.stem for path in cores if path.stem == path.parent.name)
