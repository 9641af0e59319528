"""Every CUDA kernel compiled by nvcc with the flags of setup.py: no spills, no stack, nothing of libtorch's C++ ABI."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "100")
SOURCES = sorted(ROOT.glob("csrc/*/*_cuda.cu"))

sys.path.insert(0, str(ROOT))
from setup import NVCC_FLAGS  # noqa: E402

pytestmark = pytest.mark.slow

# The axis of a resize against its definition: rows as matrices, walked and direct; the reach of the transpose.
AXIS_TEST = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "common/cuda/interpolation.cuh"
using namespace fss;

int main() {
  const long sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 30, 31, 53, 60, 61, 97, 119, 128, 417, 473, 641};
  long compared = 0;
  for (long source : sizes) for (long target : sizes) for (int mode = 0; mode < 3; ++mode) {
    const bool nearest = mode == 2, corners = mode == 1;
    const Axis axis = make_axis(source, target, nearest, corners);
    Position walked = position(axis, 0);
    std::vector<std::vector<long>> reached(source);
    for (long i = 0; i < target; ++i, walked.advance(axis)) {
      long numerator = i * source / target, denominator = 1;
      if (!nearest && corners) numerator = i * (source - 1), denominator = target > 1 ? target - 1 : 1;
      if (!nearest && !corners) numerator = (2 * i + 1) * source - target, denominator = 2 * target;
      if (numerator < 0) numerator = 0;
      long low = numerator / denominator;
      double high = double(numerator % denominator) / double(denominator);
      if (low >= source - 1) low = source - 1, high = 0;
      const Tap<double> taps[2] = {walked.tap<double>(axis), position(axis, i).tap<double>(axis)};
      for (const Tap<double>& t : taps) {
        if (t.low != low || t.high_weight != high || t.low_weight != 1 - high) {
          std::printf("tap %ld of %ld -> %ld, mode %d\n", i, source, target, mode);
          return 1;
        }
      }
      if (1 - high != 0) reached[low].push_back(i);
      if (high != 0) reached[low + 1].push_back(i);
      ++compared;
    }
    for (long at = 0; at < source; ++at) {
      const long begin = reach_begin(axis, at), end = reach_end(axis, at);
      std::vector<long> found;
      Position p = position(axis, begin);
      for (long i = begin; i < end; ++i, p.advance(axis)) {
        if (p.weight<double>(axis, at) != 0) found.push_back(i);
      }
      // all of them, and no long walk to find them
      if (found != reached[at] || end - begin > long(found.size()) + 4) {
        std::printf("reach of %ld in %ld -> %ld, mode %d\n", at, source, target, mode);
        return 1;
      }
    }
  }
  std::printf("%ld", compared);
}
"""


def nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip("no nvcc")
    return path


def compile_source(source: Path, target: Path) -> str:
    """Compiles one source for all architectures; the report of ptxas."""
    command = [nvcc(), "-c", source, "-o", target, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'common'}"]
    command += [argument for path in include_paths() for argument in ("-isystem", path)]
    command += [*NVCC_FLAGS, "-std=c++20", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-t", "2"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr


def spilled(report: str) -> dict[str, dict[str, int]]:
    """sm_XX -> kernel -> bytes of stack and spills."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads"
    )
    found = re.findall(pattern, report, re.DOTALL)
    names = "\n".join(name for name, *_ in found)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    table: dict[str, dict[str, int]] = {}
    for name, (_, architecture, *counts) in zip(plain, found, strict=True):
        table.setdefault(architecture, {})[short(name)] = sum(map(int, counts))
    return table


def short(name: str) -> str:
    """void fss::(anonymous namespace)::k<fss::bfloat16, (int)2>(...) -> k<bfloat16, 2>."""
    name = re.sub(r"\(anonymous namespace\)::|fss::|^void |\(int\)|\(bool\)", "", name)
    return name.partition("(")[0]


@pytest.fixture(scope="module", params=SOURCES, ids=lambda p: p.stem)
def compiled(request, tmp_path_factory):
    """The object, and what its kernels spill."""
    target = tmp_path_factory.mktemp("cuda") / f"{request.param.stem}.o"
    return target, spilled(compile_source(request.param, target))


def test_compiles_without_spills(compiled):
    _, table = compiled
    assert set(table) == {f"sm_{a}" for a in ARCHITECTURES} and all(table.values())
    assert all(set(kernels) == set(table["sm_90"]) for kernels in table.values())
    assert not {(a, k): spills for a, kernels in table.items() for k, spills in kernels.items() if spills}


def test_no_symbols_of_the_unstable_abi(compiled):
    symbols = subprocess.run(["nm", "-u", compiled[0]], capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True).stdout
    unstable = [n for n in names.splitlines() if re.search(r"\b(c10|at|caffe2)::|\bU _?Py", n)]
    assert "aoti_torch" in names and not unstable


def test_axis_of_a_resize(tmp_path):
    """The kernels' index arithmetic, run on the host."""
    source, program = tmp_path / "axis.cpp", tmp_path / "axis"
    source.write_text(AXIS_TEST)
    qualifiers = ["-D__host__=", "-D__device__="]
    subprocess.run(["c++", "-O1", *qualifiers, f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert int(result.stdout) > 100_000
