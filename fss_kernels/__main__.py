"""``fss-kernels info | verify``: what runs on this machine, and whether it is right."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fss_kernels
from fss_kernels import _loading, _op, testing


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def info(console: Console) -> int:
    """Prints versions, the op x backend table and the reason for every backend that cannot run."""
    console.print(
        f"fss_kernels {fss_kernels.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    )
    console.print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", end="")
    console.print(f", CPU kernels for {_loading.cpu_isa()}" if _loading.cpu_isa() else "")
    table = Table("op", "device", "default", *_loading.BACKENDS)
    for op in _op.ops.values():
        for device in _devices():
            marks = ["yes" if op.why_not(b, device) is None else "no" for b in _loading.BACKENDS]
            table.add_row(op.name, device, op.default_backend(device), *marks)
    console.print(table)
    for op in _op.ops.values():
        for device in _devices():
            for backend in _loading.BACKENDS:
                if (reason := op.why_not(backend, device)) is not None:
                    console.print(f"{op.name} on {device}, {backend}: {reason}", soft_wrap=True)
    return 0


def _dtypes(backend: str, device: str) -> list[torch.dtype]:
    if backend == "triton" and device == "cpu":
        return [torch.float32, torch.float16]  # the interpreter's bfloat16 stores truncate: checked on a GPU
    return [d for d in testing.DTYPES if device == "cpu" or d != torch.float64]


def _layouts(backend: str, device: str, dtype: torch.dtype) -> list[str]:
    """All in float32, in which a kernel's way through memory shows; else, and where it is only PyTorch's, a few."""
    if backend == "triton" and device == "cpu":
        return ["contiguous", "channels_last"] if dtype == torch.float32 else ["contiguous"]
    few = set(testing.LAYOUTS)
    if dtype != torch.float32 or backend == "reference":
        few = few & {"contiguous", "channels_last", "sliced"}
    return [layout for layout in testing.LAYOUTS if layout in few]


def _takes(sample: testing.Sample, backend: str, device: str) -> bool:
    """Large samples are there for the ways of a kernel; the reference is PyTorch's own operations."""
    elements = max(t.numel() for t in sample.tensors.values())
    if backend == "triton" and device == "cpu":
        return elements <= 360  # interpreted: milliseconds a program
    return elements <= 30_000 or backend != "reference"


def _verify_interpreted(ops: Sequence[str] = ()) -> tuple[int, str]:
    """Verifies the Triton kernels on the CPU: the interpreter has to be chosen when a process starts. Exit code and
    output."""
    command = [sys.executable, "-m", "fss_kernels", "verify", *ops, "--backend", "triton"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def _compare(console: Console, ops: Sequence[str], only: str | None) -> int:
    """What `verify` does in this process."""
    table = Table("op", "backend", "dtype", "layout", "cases", "observed / allowed error", "")
    failures: list[str] = []
    cases = 0
    rows = [
        (spec, device, backend, dtype, layout)
        for name, spec in testing.specs().items()
        if not ops or name in ops
        for device in _devices()
        for backend in testing.backends(spec.op, device)
        if only is None or backend == only
        for dtype in _dtypes(backend, device)
        for layout in _layouts(backend, device, dtype)
    ]
    found: dict[Any, list[tuple[str, testing.Comparison]]] = {row: [] for row in rows}
    with Progress(console=console, transient=True) as progress:
        for spec in progress.track(dict.fromkeys(row[0] for row in rows), description="verify"):
            # sample by sample and dtype by dtype: what the others are compared with is computed once
            own = sorted(
                (row for row in rows if row[0] is spec), key=lambda row: (row[1], testing.DTYPES.index(row[3]))
            )
            for sample in spec.samples():
                for _, device, backend, dtype, layout in own:
                    if _takes(sample, backend, device) and testing.takes(sample, layout):
                        outcome = testing.evaluate(spec, sample, backend, dtype, layout, device)
                        found[spec, device, backend, dtype, layout] += outcome
    for (spec, _, backend, dtype, layout), results in found.items():
        cases += len(results)
        wrong = [c.message for _, c in results if not c.passed]
        names = dict.fromkeys("output" if n.startswith("output") else n for n, _ in results)
        parts = {n: [c for name, c in results if name.startswith(n)] for n in names}
        where = f"{spec.name} {backend} {dtype} {layout}"
        # a part without cases, or one that never differs from the oracle, tests nothing
        wrong += [f"{where} {n}: only exact zeros" for n, part in parts.items() if all(c.exact for c in part)]
        expected = {"output", *(f"grad_{name}" for name in spec.differentiable)}
        wrong += [f"{where} {n}: 0 cases" for n in expected - set(parts)]
        ratios = ", ".join(f"{n} {max(c.ratio for c in part):.2f}" for n, part in parts.items())
        state = "[red]FAILED[/red]" if wrong else "ok"
        table.add_row(spec.name, backend, str(dtype).removeprefix("torch."), layout, str(len(results)), ratios, state)
        failures += wrong
    console.print(table)
    for message in failures:
        console.print(message, markup=False, soft_wrap=True)
    verdict = f"{len(failures)} failures" if failures else "all within bounds"
    console.print(f"verify: {len(rows)} rows, {cases} cases, {verdict}")
    code = 1 if failures or not rows else 0
    return code


def verify(console: Console, ops: Sequence[str] = (), only: str | None = None, interpreter: bool = True) -> int:
    """Compares ops (all of them when none is named) on every backend, or one, with float64; 1 when anything fails.

    Without a GPU the Triton kernels are interpreted, unless ``interpreter`` is False.
    """
    interpret = (
        interpreter
        and only is None
        and not torch.cuda.is_available()
        and importlib.util.find_spec("triton") is not None
    )
    interpret = interpret and not _loading.TRITON_INTERPRETED
    fault = _loading.interpreter_fault(importlib.metadata.version("triton")) if interpret else None
    with ThreadPoolExecutor(1) as pool:  # interpreting takes minutes on one processor
        interpreted = pool.submit(_verify_interpreted, ops) if interpret and fault is None else None
        code = _compare(console, ops, only)
        if interpreted is not None:
            console.print("triton on the CPU, interpreted, in a process of its own:")
            own_code, text = interpreted.result()
            console.print(text, markup=False, highlight=False, soft_wrap=True, end="")
            code = max(code, own_code)
    if fault is not None:
        console.print(f"triton on the CPU: not run here ({fault})", soft_wrap=True)
    for op in _op.ops.values() if only is None else ():
        if ops and op.name not in ops:
            continue
        if "cuda" in op.backends and not torch.cuda.is_available():
            reason = op.why_not("cuda", "cuda")
            console.print(
                f"{op.name} cuda: compiled, not run here ({reason}; the tests compile it where nvcc is)", soft_wrap=True
            )
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``fss-kernels`` command."""
    parser = argparse.ArgumentParser(prog="fss-kernels", description=__doc__)
    parser.add_argument("command", choices=["info", "verify"], help="show backends, or check numerics on this machine")
    parser.add_argument("ops", nargs="*", metavar="op", help="verify only these ops")
    parser.add_argument("--backend", choices=_loading.BACKENDS, help="verify only this backend")
    parser.add_argument("--no-interpreter", action="store_true", help="verify no Triton kernels without a GPU")
    chosen = parser.parse_args(arguments)
    if unknown := sorted(set(chosen.ops) - set(_op.ops)):
        parser.error(f"unknown op {', '.join(unknown)}; there are {', '.join(_op.ops)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    return (
        info(console)
        if chosen.command == "info"
        else verify(console, chosen.ops, chosen.backend, not chosen.no_interpreter)
    )


if __name__ == "__main__":
    sys.exit(main())
