"""What a call costs the host: inputs of a few elements, so that time is dispatch, checks and autograd, not the kernel.

Columns: the forward without a gradient, the forward that keeps what a gradient needs, with the backward, and the
compiled forward; beside them the usual PyTorch code, the first of the op's peers, forward and with the backward.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, measure, peers, report, storage
from fss_kernels import testing

ROUNDS, CALLS = 20, 100
COLUMNS = ("forward", "forward, keeping", "forward+backward", "compiled", "PyTorch forward", "PyTorch forward+backward")


def _calls(op: str) -> dict[str, Callable[[], Any]]:
    """Column -> a call on tiny inputs."""
    spec = testing.specs()[op]
    arguments = {k: v for k, v in next(iter(spec.sizes.values())).items() if k != "modes"}
    sample = spec.benchmark_sample(**{k: math.isqrt(v) + 1 if type(v) is int else v for k, v in arguments.items()})
    plain = spec.cast(sample, torch.float32)
    wanted = spec.gradients_of("forward+backward", plain)
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in plain.items()}
    usual = next((peers.build(p) for p in peers.resolve(op)[0] if p.applies(arguments)), None)
    compiled = torch.compile(spec.function, dynamic=False)

    def forward(function: Callable[..., Any], tensors: dict[str, Any]) -> Callable[[], Any]:
        return lambda: measure.flat(function(*tensors.values(), **sample.options))

    def both(function: Callable[..., Any]) -> Callable[[], Any]:
        call = forward(function, leaves)
        seeds = [torch.ones_like(r) for r in call() if r.is_floating_point()]

        def run() -> Any:
            scores = [r for r in call() if r.is_floating_point()]
            return torch.autograd.grad(scores, [leaves[n] for n in wanted], seeds)

        return run

    calls = [forward(spec.function, plain), forward(spec.function, leaves), both(spec.function)]
    calls += [forward(compiled, plain), *([forward(usual, plain), both(usual)] if usual else [])]
    return dict(zip(COLUMNS, calls, strict=False))


def run(ops: tuple[str, ...], path: Path, rounds: int = ROUNDS, count: int = CALLS) -> dict[str, Any]:
    """Measures and writes microseconds per call, the median of rounds in which every column has a turn."""
    order, rows = random.Random(0), []
    torch.set_num_threads(environment.cores())
    for op in ops:
        torch._dynamo.reset()
        calls = _calls(op)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for n in range(rounds + 1):  # the first one warms up and compiles
            for name in order.sample([*calls], len(calls)):
                start = time.perf_counter()
                for _ in range(count if n else 3):
                    calls[name]()
                if n:
                    samples[name].append((time.perf_counter() - start) / count * 1e6)
        rows.append({"op": op, "microseconds": {name: measure.quantiles(s) for name, s in samples.items()}})
    results = {**environment.environment(), "plan": {"ops": list(ops)}, "rounds": rounds, "calls": count, "rows": rows}
    storage.write(path, "overhead", results)
    return results


def header() -> list[str]:
    """The columns of the table."""
    return ["op", *COLUMNS]


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The rows of the table: medians in microseconds; an op without peers has none of PyTorch's."""
    medians = [(r["op"], {c: f"{m['median']:.0f}" for c, m in r["microseconds"].items()}) for r in results["rows"]]
    return [[op, *(of.get(c, "not measured") for c in COLUMNS)] for op, of in medians]


def markdown(results: dict[str, Any]) -> str:
    """The table in Markdown, with PyTorch's time in bold where it is the shorter one."""
    lines = [header(), ["---", *["---:"] * len(COLUMNS)], *cells(results)]
    for line, row in zip(lines[2:], results["rows"], strict=True):
        for ours, usual in (("forward", "PyTorch forward"), ("forward+backward", "PyTorch forward+backward")):
            median = {name: m["median"] for name, m in row["microseconds"].items()}
            if usual in median and report.verdict(median[usual] / median[ours]) == "peer":
                line[header().index(usual)] = f"**{line[header().index(usual)]}**"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
