"""DPCN on the kernels against the same network on the reference, and its SAM against the literal window code.

    python -m benchmarks.models [--out FILE] [--quick true]

ResNet-50 at 473 x 473, the PASCAL setting, batch 1; --quick has a tiny backbone at 65 x 65, to test this program. The
providers take turns, in an order drawn anew every round. Besides times a row holds the share of them spent in ops, the
peak of what PyTorch allocates in a call, and the peak resident size of a process that makes one such call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

import fss_kernels
import fss_models
from benchmarks import environment
from benchmarks.measure import OURS, extra_bytes
from fss_kernels import _library

OPS = ("support_activation", "dpcn")  # what the rows call themselves
CHILD = "FSS_KERNELS_BENCHMARK_CHILD"
TOLERANCE = 1e-3  # relative to the largest element: another network would differ by far more


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often."""

    backbone: str = "resnet50"
    size: int = 473
    rounds: int = 5
    seed: int = 0

    @property
    def label(self) -> str:
        return f"{self.backbone}-{self.size}"


QUICK = Plan("tiny", 65, 3)


class LiteralActivation(nn.Module):
    """SAM as the paper writes it: all windows extracted, one product an element of a window, mean, max, min-max."""

    windows = ((5, 1), (3, 3), (1, 5))

    def forward(self, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """High-level query (B, C, h, w), support (B, C, h, w) and mask (B, 1, H, W) to (B, 3, h, w)."""
        weights = F.interpolate(mask.to(query.dtype), query.shape[-2:], mode="bilinear", align_corners=True)
        maps = []
        for window in self.windows:
            q, s = (self.elements(x, window) for x in (query, support * weights))
            best = (s.mT @ q).mean(1).amax(1)  # (B, d, Ns, Nq), then the mean over d and the best of Ns
            low, high = best.amin(1, keepdim=True), best.amax(1, keepdim=True)
            maps.append(((best - low) / (high - low + 1e-7)).unflatten(1, query.shape[-2:]))
        return torch.stack(maps, 1)

    @staticmethod
    def elements(x: Tensor, window: tuple[int, int]) -> Tensor:
        """Normalised vectors of every element of the windows, (B, d, C, N)."""
        parts = F.unfold(x, window, padding=(window[0] // 2, window[1] // 2))
        parts = parts.unflatten(1, (x.shape[1], window[0] * window[1]))
        return (parts / parts.norm(dim=1, keepdim=True).clamp(min=1e-7)).transpose(1, 2)


class Task:
    """One row: what every provider calls, and what it must agree on."""

    def __init__(self, op: str, size: str, mode: str, calls: dict[str, Callable[[], Any]]) -> None:
        self.op, self.size, self.mode, self.calls = op, size, mode, calls
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self.inside: dict[str, list[float]] = {name: [] for name in calls}


def episode(size: int, shots: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, support, mask and target: an object of another colour that covers a fifth of the image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(1 + shots, size, size, dtype=torch.int64)
    for i in range(1 + shots):
        top, left = (int(torch.randint(0, size // 2, (), generator=generator)) for _ in range(2))
        labels[i, top : top + size * 9 // 20, left : left + size * 9 // 20] = 1
    images = torch.randn(1 + shots, 3, size, size, generator=generator) + 2 * labels[:, None]
    return images[:1], images[None, 1:], labels[None, 1:], labels[:1]


def forced(backend: str | None, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call on one backend."""

    def run() -> Any:
        with fss_kernels.use_backend(backend) if backend else contextlib.nullcontext():
            return call()

    return run


def network(plan: Plan) -> fss_models.FewShotModel:
    """DPCN in the PASCAL setting."""
    torch.manual_seed(0)
    return fss_models.build("dpcn", plan.backbone, **fss_models.dpcn.PASCAL)


def tasks(plan: Plan) -> list[Task]:
    """The rows; all share one network."""
    model, data = network(plan), episode(plan.size)
    with torch.no_grad():
        query, support = model.encode(data[0], data[1])
    high = [f.stage4.clone().requires_grad_() for f in (query, support)]
    foreground = data[2] == 1
    literal = LiteralActivation()

    def activation(sam: nn.Module) -> Callable[[], Any]:
        def call() -> Any:
            maps = sam(*high, foreground)
            weights = torch.linspace(0, 1, maps.numel()).view_as(maps)
            return maps.detach(), *torch.autograd.grad((maps * weights).sum(), high)

        return call

    optimizer = torch.optim.SGD(fss_models.parameter_groups(model, 1e-4), momentum=0.9, weight_decay=1e-4)

    def step() -> Tensor:
        model.train()
        torch.manual_seed(0)  # dropout
        optimizer.zero_grad()
        loss = model.loss(*data)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def evaluate() -> Tensor:
        model.eval()
        with torch.inference_mode():
            return model(*data[:3])

    sam = activation(model.get_submodule("head.sam"))
    return [
        Task(
            "support_activation",
            plan.label,
            "forward+backward",
            {OURS: sam, "literal": activation(literal), "reference": forced("reference", sam)},
        ),
        *(
            Task("dpcn", plan.label, mode, {OURS: call, "reference": forced("reference", call)})
            for mode, call in (("evaluate", evaluate), ("train", step))
        ),
    ]


def disagreement(task: Task, expected: Any, got: Any) -> str | None:
    """How far a provider's results are from ours, if that is too far."""
    for e, g in zip(*([r] if isinstance(r, Tensor) else r for r in (expected, got)), strict=True):
        error = ((e - g).abs().max() / e.abs().max().clamp(min=1e-12)).item()
        if not error <= TOLERANCE:
            return f"{task.op} {task.mode}: results differ by {error:.1e}"
    return None


@contextlib.contextmanager
def time_in_ops() -> Iterator[list[float]]:
    """Adds up the seconds that the implementations of ops take; on a CPU a call returns when it is done."""
    total, kept = [0.0], []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                total[0] += time.perf_counter() - start

        return call

    for op in _library.ops.values():
        for implementation in op.backends.values():
            kept.append((implementation, implementation.forward, implementation.backward))
            implementation.forward, implementation.backward = (timed(f) for f in kept[-1][1:])
    try:
        yield total
    finally:
        for implementation, forward, backward in kept:
            implementation.forward, implementation.backward = forward, backward


def measure_task(task: Task, plan: Plan, wrong: dict[str, str]) -> None:
    """Warm-up with the correctness gate, then rounds in which every provider has a turn."""
    results = {name: call() for name, call in task.calls.items()}
    for name, result in results.items():
        # training steps move the weights between two providers: what they compute is compared in evaluation
        if task.mode != "train" and (reason := disagreement(task, results[OURS], result)):
            wrong[name] = reason
    del results
    order = random.Random(plan.seed)
    for _ in range(plan.rounds):
        for name in order.sample([*task.calls], len(task.calls)):
            with time_in_ops() as inside:
                start = time.perf_counter()
                task.calls[name]()
                task.seconds[name].append(time.perf_counter() - start)
            task.inside[name].append(inside[0])


def peak_of_a_process(plan: Plan, task: Task, provider: str) -> int:
    """Largest resident size of a process that builds the network and makes one call, in bytes."""
    command = [sys.executable, "-m", "benchmarks.models", "--peak_of", f"{task.op}:{task.mode}:{provider}"]
    command += ["--quick=true"] if plan.backbone == QUICK.backbone else []
    # an allocator that keeps everything would count what is free again
    env = {k: v for k, v in os.environ.items() if k not in environment.ALLOCATOR}
    done = subprocess.run(command, cwd=environment.ROOT, env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


def peak(plan: Plan, which: str) -> int:
    """What the process of `peak_of_a_process` does."""
    op, mode, provider = which.split(":")
    next(t for t in tasks(plan) if (t.op, t.mode) == (op, mode)).calls[provider]()
    # not getrusage: what it says of a child that was started by fork and exec includes the parent
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def rows(task: Task, plan: Plan, wrong: dict[str, str]) -> list[dict[str, Any]]:
    """The entries of a result file, one a provider."""
    medians = {name: statistics.median(s) for name, s in task.seconds.items()}
    entries = []
    for name, seconds in task.seconds.items():
        entries.append(
            {
                "op": task.op,
                "size": task.size,
                "dtype": "float32",
                "mode": task.mode,
                "provider": name,
                "correct": name not in wrong,
                "seconds": {"median": medians[name], "min": min(seconds), "max": max(seconds), "all": seconds},
                "ratio_to_ours": medians[name] / medians[OURS],
                "share_in_ops": sum(task.inside[name]) / sum(seconds),
                "extra_bytes": extra_bytes(task.calls[name]),
                "peak_resident_bytes": peak_of_a_process(plan, task, name),
                "scratch_bytes": None,
                "roof_fraction": None,
            }
        )
    return entries


def run(plan: Plan, out: Path) -> int:
    """Measures everything and writes the file."""
    torch.set_num_threads(environment.cores())
    entries: list[dict[str, Any]] = []
    failures: list[str] = []
    for task in tasks(plan):
        wrong: dict[str, str] = {}
        measure_task(task, plan, wrong)
        entries += rows(task, plan, wrong)
        failures += wrong.values()
        for e in entries[-len(task.calls) :]:
            print(
                f"{e['op']:20} {e['size']} {e['mode']:17} {e['provider']:12} {e['seconds']['median'] * 1e3:10.1f} ms"
                f" {e['ratio_to_ours']:7.2f}x ours, {e['share_in_ops']:4.0%} in ops,"
                f" {e['extra_bytes'] / 1e6:8.1f} MB extra, {e['peak_resident_bytes'] / 1e6:8.0f} MB resident",
                flush=True,
            )
    peers = [
        {"op": op, "name": name, "version": None, "error": None, "optional": False}
        for op, name in sorted({(e["op"], e["provider"]) for e in entries if e["provider"] != OURS})
    ]
    results = {"plan": {**asdict(plan), "ops": OPS}, "peers": peers, "rows": entries, "failures": failures, "notes": []}
    out = out.with_name(f"{out.name}.failed") if failures else out  # does not replace a good file
    environment.write_json(out, environment.environment() | results)
    print(f"{len(entries)} entries -> {out}")
    return 1 if failures else 0


def main(out: str = "", quick: bool = False, rounds: int | None = None, peak_of: str = "") -> int:
    """Measures DPCN; the measuring process starts with the allocator and the threads fixed.

    Args:
        out: result file; benchmarks/results/<machine>-models.json.
        quick: a tiny network, to test this program.
        rounds: in which every provider has a turn.
        peak_of: op:mode:provider; makes that one call and prints the peak resident size.
    """
    plan = QUICK if quick else Plan()
    if peak_of:
        print(peak(plan, peak_of))
        return 0
    if CHILD not in os.environ:
        own = {**environment.ALLOCATOR, "OMP_NUM_THREADS": str(environment.cores()), CHILD: "1"}
        command = [sys.executable, "-m", "benchmarks.models", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | own).returncode
    slug = environment.machine_slug()
    file = Path(out) if out else environment.ROOT / "benchmarks" / "results" / f"{slug}-models.json"
    return run(dataclasses.replace(plan, rounds=rounds) if rounds else plan, file)


if __name__ == "__main__":
    sys.exit(auto_cli(main))
