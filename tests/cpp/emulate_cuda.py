"""Runs the CUDA kernels on a CPU, thread by thread, against float64: their numerics where there is no GPU.

    python tests/cpp/emulate_cuda.py [op ...]        (make emulate-cuda)

Builds csrc/<op>/<op>_cuda.cu with the C++ compiler and the headers of cuda_emulator/, registers it as a backend of this
process and evaluates the op's samples. Every case runs in three orders of the threads and has to give the same bits.
Then what tests/ asks of every backend at the ends: values that are not finite, float16 at 65504, strides past 2^31.
With --few a sample runs in one dtype and layout, in turn, up to the first failure: a minute an op.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths
from tqdm.auto import tqdm

from fss_kernels import _library, testing

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import test_extremes  # noqa: E402
import test_offsets  # noqa: E402

EMULATOR = Path(__file__).with_name("cuda_emulator")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "offset", "sliced", "channels_last_sliced")
OPS = sorted(path.parent.name for path in ROOT.glob("csrc/*/*_cuda.cu"))


def build(op: str, directory: Path) -> Path:
    """The shared library of one op's CUDA kernels for the CPU, registered under fss_emulated."""
    text = (ROOT / "csrc" / op / f"{op}_cuda.cu").read_text()
    text = text.replace("STABLE_TORCH_LIBRARY_IMPL(fss_cpp, CUDA", "STABLE_TORCH_LIBRARY_IMPL(fss_emulated, CPU")
    text = re.sub(r"const torch::stable::accelerator::DeviceGuard guard\(.*\);", "", text)
    source, library = directory / f"{op}.cpp", directory / f"{op}.so"
    source.write_text(text)
    torch_libraries = Path(torch.__file__).parent / "lib"
    command = ["c++", "-std=c++20", "-O1", "-g", "-w", "-mf16c", "-fPIC", "-shared", source, "-o", library]
    command += [
        "-include",
        EMULATOR / "cuda_runtime.h",
        f"-I{EMULATOR}",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc/common'}",
    ]
    command += [argument for path in include_paths() for argument in ("-isystem", path)]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    command += [f"-L{torch_libraries}", "-ltorch_cpu", "-ltorch", "-lc10", f"-Wl,-rpath,{torch_libraries}"]
    subprocess.run([*map(str, command)], check=True)
    return library


def ends(spec: testing.Spec, few: bool) -> list[str]:
    """The failures of the "cuda" backend in tests that are there for every one."""
    distant = [far for far in test_offsets.FAR if far[0] is spec]
    norms = [
        *((test_extremes.test_short_vectors_without_eps, spec, "cuda", *case) for case in test_extremes.SHORT),
        *((test_extremes.test_norms_beyond_their_dtype, spec, "cuda", *case, 0.0) for case in test_extremes.BEYOND),
    ]
    calls = [
        *(
            (*call, mode)
            for call in norms
            for mode in ("clamp", "add")
            if test_extremes.normalises(spec) and call[3] in DTYPES
        ),
        *((test_extremes.test_not_finite_where_the_reference_is_not, spec, "cuda", bad) for bad in test_extremes.BAD),
        *((test_extremes.test_float16_at_65504, spec, "cuda", layout) for layout in LAYOUTS[:2]),
        *((test_offsets.test_strides_past_2_31_of_every_op, *far) for far in distant[:: 4 if few else 1]),
    ]
    failures = []
    for test, *arguments in tqdm(calls, desc=f"{spec.name}, ends"):
        try:
            with _library.use_backend("cuda"):
                test(*arguments)
        except AssertionError as error:
            failures.append(f"{test.__name__}{arguments[1:]}: {error}")
    return failures


def emulate(spec: testing.Spec, library: Path, few: bool = False) -> list[str]:
    """The failures of one op; its "cuda" backend in this process is the emulator."""
    definitions = torch.library.Library("fss_emulated", "FRAGMENT")
    definitions.define(f"{spec.op.name}_fwd{spec.op.forward_schema}")
    definitions.define(f"{spec.op.name}_bwd{spec.op.backward_schema}")
    torch.ops.load_library(library)
    order = ctypes.CDLL(str(library)).emulated_order
    fwd, bwd = (getattr(torch.ops.fss_emulated, f"{spec.op.name}_{s}").default for s in ("fwd", "bwd"))
    spec.op.backends["cuda"] = _library.Backend(fwd, bwd, ("cpu",))
    _library.unavailable.pop("cuda", None)

    def results(sample: testing.Sample, dtype: torch.dtype, layout: str) -> list[torch.Tensor]:
        tensors = {name: testing.LAYOUTS[layout](t) for name, t in spec.cast(sample, dtype).items()}
        wanted = testing.differentiable_names(spec, tensors)
        with _library.use_backend("cuda"):
            outputs, grads = testing.gradients(spec.function, tensors, sample.options, wanted)
        return [*outputs, *grads]

    samples = [s for s in spec.samples() if sum(t.numel() for t in s.tensors.values()) <= 40_000]
    ways = [*itertools.product(DTYPES, LAYOUTS)]
    cases = [(s, *way) for s, way in (zip(samples, itertools.cycle(ways)) if few else itertools.product(samples, ways))]
    failures = []
    for sample, dtype, layout in tqdm(cases, desc=spec.name):
        if few and failures:
            break
        order(0)
        failures += [c.message for _, c in testing.evaluate(spec, sample, "cuda", dtype, layout) if not c.passed]
        first = results(sample, dtype, layout)
        for other in (1, 2):
            order(other)
            if not all(torch.equal(a, b) for a, b in zip(first, results(sample, dtype, layout), strict=True)):
                failures.append(f"{spec.name}[{sample.id}] {dtype} {layout}: depends on the order of the threads")
    order(0)
    failures += ends(spec, few)
    print(f"{spec.name}: {len(cases)} cases and the ends, {len(failures)} failures")
    return failures


def main(names: list[str], few: bool) -> int:
    """Emulates the named ops, or every op with CUDA kernels."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    failures = []
    for name, spec in testing.specs().items():
        if name in (names or OPS):
            with tempfile.TemporaryDirectory() as directory:
                failures += emulate(spec, build(name, Path(directory)), few)
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--few", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.ops, arguments.few))
