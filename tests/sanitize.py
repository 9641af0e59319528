"""``python tests/sanitize.py``: the GPU kernels under compute-sanitizer: memcheck, racecheck, initcheck, synccheck.

One process a tool runs a few samples of every spec forward and backward, without PyTorch's caching allocator, so that
every tensor has bounds of its own. Exit code 0: clean, or not run because there is no tool, no GPU or no kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fss_kernels import _backends, testing

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
KERNELS = ("triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "offset")
SAMPLES, ELEMENTS = 6, 20_000  # of each spec, small: a sanitizer slows kernels down a hundredfold
SECONDS = 600  # for one tool
FOUND = 9  # exit code of compute-sanitizer for an error in a kernel


def cases() -> Iterator[tuple[testing.Spec, str, testing.Sample, torch.dtype, str]]:
    """What one tool looks at."""
    for spec in testing.specs().values():
        small = [s for s in spec.samples() if sum(t.numel() for t in s.tensors.values()) <= ELEMENTS][:SAMPLES]
        for backend in KERNELS:
            for dtype in DTYPES:
                if spec.op.why_not(backend, "cuda", dtype) is None:
                    yield from ((spec, backend, sample, dtype, layout) for sample in small for layout in LAYOUTS)


def work() -> int:
    """Runs every case and reads every result; what the sanitizer looks at. The number of cases."""
    count = 0
    for spec, backend, sample, dtype, layout in cases():
        tensors = {k: testing.LAYOUTS[layout](t).detach() for k, t in spec.cast(sample, dtype, "cuda").items()}
        names = testing.differentiable_names(spec, tensors)
        with _backends.use_backend(backend):
            outputs, grads = testing.gradients(spec.function, tensors, sample.options, names)
        for result in (*outputs, *grads):
            result.cpu()
        count += 1
    torch.cuda.synchronize()
    return count


def program() -> str | None:
    """The path of compute-sanitizer."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def why_not() -> str | None:
    """Why nothing can be checked here."""
    if program() is None:
        return "compute-sanitizer is not installed"
    if not torch.cuda.is_available():
        return "no GPU"
    return None if next(cases(), None) else "no GPU kernel is available"


def main(arguments: list[str]) -> int:
    """Runs the tools, or with ``--work`` the cases."""
    if arguments == ["--work"]:
        print(f"{work()} cases")
        return 0
    if (reason := why_not()) is not None:
        print(f"sanitize: not run: {reason}")
        return 0
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    failed = False
    print(f"{'tool':10} {'result':10} {'seconds':>8}  summary", flush=True)
    for tool in TOOLS:
        command = [str(program()), "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*command, sys.executable, str(Path(__file__).resolve()), "--work"],
                cwd=root, env=env, timeout=SECONDS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            lines, code = done.stdout.splitlines(), done.returncode
        except subprocess.TimeoutExpired:
            lines, code = [f"no end after {SECONDS} s"], None
        clean = code == 0 and any(line.endswith(" cases") for line in lines)
        result = "clean" if clean else "ERRORS" if code == FOUND else "FAILED"
        counts = [line.removeprefix("=========").strip() for line in lines if "SUMMARY" in line or " cases" in line]
        summary = "; ".join(counts) or (lines[-1] if lines else f"code {code}")
        print(f"{tool:10} {result:10} {time.monotonic() - start:8.1f}  {summary}", flush=True)
        if not clean:
            failed = True
            print("\n".join(lines[:60]), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
