"""Networks on the kernels against the same networks on the reference, and DPCN's SAM against the literal window code.

``python -m benchmarks networks`` measures DPCN and DPNet with ResNet-50 at 473 x 473, the PASCAL settings, batch 1. A
quick run has a tiny backbone at 65 x 65, to test this program. A provider is timed when its logits, or its loss and
gradients, are those of the reference. The providers take turns, in an order drawn anew every round. Besides times a row
holds the share of them spent in each op, the throughput, the peak of what PyTorch allocates in a call, and the peak
resident size of a process that makes one such call. ``benchmarks.gpu_timing`` times the same calls on a GPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fss_kernels
import fss_models
from benchmarks import environment, storage
from benchmarks.measure import HOPELESS, OURS, Verdict, extra_bytes, flat
from fss_kernels import _op

NETWORKS: dict[str, dict[str, Any]] = {"dpcn": fss_models.dpcn.PASCAL, "dpnet": {}}  # options of the PASCAL settings
SMALL: dict[str, dict[str, Any]] = {"dpcn": {"channels": 32}, "dpnet": {"channels": 32, "bins": (6, 3)}}  # with tiny
OPS = ("support_activation", *NETWORKS)  # what the rows call themselves
MODES = ("evaluate", "train")
PROVIDERS: dict[str, str | None] = {OURS: None, "reference": "reference"}  # with the backend that is forced
# relative to the largest element: another network would differ by far more
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
SLOW_ROUNDS = 2  # after these a provider HOPELESS times slower than ours sits out


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often."""

    backbone: str = "resnet50"
    size: int = 473
    batch: int = 1
    rounds: int = 20  # of what takes a second
    network_rounds: int = 8
    seed: int = 0
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.backbone}-{self.size}" + (f"-b{self.batch}" if self.batch > 1 else "")


QUICK = Plan("tiny", 65, rounds=3, network_rounds=3)


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
    """One row: what every provider calls, and ``checks``, whose results must be those of the reference.

    The checks are the calls themselves, unless those change something.
    """

    def __init__(
        self,
        op: str,
        plan: Plan,
        mode: str,
        calls: Mapping[str, Callable[[], Any]],
        checks: Mapping[str, Callable[[], Any]] | None = None,
        dtype: str = "float32",
    ) -> None:
        self.op, self.size, self.mode, self.dtype, self.batch = op, plan.label, mode, dtype, plan.batch
        self.calls = dict(calls)
        self.checks = dict(calls if checks is None else checks)
        self.rounds = plan.network_rounds if op in NETWORKS else plan.rounds
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self.inside: dict[str, list[dict[str, float]]] = {name: [] for name in calls}

    @property
    def id(self) -> str:
        return f"{self.op}[{self.size}, {self.dtype}, {self.mode}]"


def episode(size: int, batch: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, support, mask and target: an object of another colour that covers a fifth of the image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2 * batch, size, size, dtype=torch.int64)
    for label in labels:
        top, left = (int(torch.randint(0, size // 2, (), generator=generator)) for _ in range(2))
        label[top : top + size * 9 // 20, left : left + size * 9 // 20] = 1
    images = torch.randn(2 * batch, 3, size, size, generator=generator) + 2 * labels[:, None]
    images, labels = images.to(device), labels.to(device)
    return images[:batch], images[batch:, None], labels[batch:, None], labels[:batch]


def forced(backend: str | None, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call on one backend."""

    def run() -> Any:
        with fss_kernels.use_backend(backend) if backend else contextlib.nullcontext():
            return call()

    return run


def network(plan: Plan, name: str = "dpcn") -> fss_models.FewShotModel:
    """A network in its PASCAL setting, always with the same weights; a narrow one on the tiny backbone."""
    torch.manual_seed(0)
    options = NETWORKS[name] | (SMALL[name] if plan.backbone == QUICK.backbone else {})
    return fss_models.build(name, plan.backbone, **options).to(plan.device)


def activation_task(plan: Plan) -> Task:
    """DPCN's SAM with its gradients."""
    model, data = network(plan), episode(plan.size, plan.batch, plan.device)
    with torch.no_grad():
        query, support = model.encode(data[0], data[1])
    high = [f.stage4.clone().requires_grad_() for f in (query, support)]
    foreground = data[2] == 1

    def activation(sam: nn.Module) -> Callable[[], Any]:
        def call() -> Any:
            maps = sam(*high, foreground)
            weights = torch.linspace(0, 1, maps.numel(), device=maps.device).view_as(maps)
            return maps.detach(), *torch.autograd.grad((maps * weights).sum(), high)

        return call

    sam = activation(model.get_submodule("head.sam"))
    calls = {OURS: sam, "literal": activation(LiteralActivation()), "reference": forced("reference", sam)}
    return Task("support_activation", plan, "forward+backward", calls)


def network_tasks(
    plan: Plan, name: str, providers: Mapping[str, str | None] = PROVIDERS, dtype: str = "float32"
) -> list[Task]:
    """Evaluation and training step of a network, under autocast unless dtype is float32; both share the weights.

    A training step is checked by its loss and its gradients, of the backbone and of the head: it would move the weights
    between two providers.
    """
    model, data = network(plan, name), episode(plan.size, plan.batch, plan.device)
    optimizer = torch.optim.SGD(fss_models.parameter_groups(model, 1e-4), momentum=0.9, weight_decay=1e-4)

    def autocast() -> torch.autocast:
        return torch.autocast(plan.device, torch.bfloat16, enabled=dtype == "bfloat16")

    def evaluate() -> Tensor:
        model.eval()
        with torch.inference_mode(), autocast():
            return model(*data[:3])

    def gradients() -> list[Tensor]:
        model.train()
        torch.manual_seed(0)  # dropout
        optimizer.zero_grad()
        with autocast():
            loss = model.loss(*data)
        loss.backward()
        parts: dict[str, list[Tensor]] = {}
        for parameter, value in model.named_parameters():
            if value.grad is not None:
                parts.setdefault(parameter.partition(".")[0], []).append(value.grad.flatten())
        return [loss.detach(), *(torch.cat(p) for p in parts.values())]

    def step() -> Tensor:
        model.train()
        torch.manual_seed(0)
        optimizer.zero_grad()
        with autocast():
            loss = model.loss(*data)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def everyone(call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        return {provider: forced(backend, call) for provider, backend in providers.items()}

    return [
        Task(name, plan, "evaluate", everyone(evaluate), dtype=dtype),
        Task(name, plan, "train", everyone(step), everyone(gradients), dtype),
    ]


def tasks(plan: Plan, ops: Iterable[str] = OPS) -> Iterator[Task]:
    """The rows, one network in memory at a time."""
    for op in ops:
        yield from network_tasks(plan, op) if op in NETWORKS else [activation_task(plan)]


def distance(expected: Any, got: Any) -> float:
    """The largest difference of two results, relative to the largest element of each tensor; inf for NaN."""
    errors = [
        ((e.float() - g.float()).abs().max() / e.float().abs().max().clamp(min=1e-12)).item()
        for e, g in zip(flat(expected), flat(got), strict=True)
    ]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def verdicts(task: Task) -> dict[str, Verdict]:
    """Every provider against the reference: an empty message lets it be timed."""
    reference = next(name for name in task.checks if name.endswith("reference"))
    expected = task.checks[reference]()
    found = {}
    for name, check in task.checks.items():
        try:
            got = expected if name == reference else check()  # NaN differs from itself
            error, reason = distance(expected, got), "differs from the reference by {:.1e}"
        except Exception as problem:
            error, reason = math.inf, f"raised {type(problem).__name__}: {str(problem)[:500]}"
        message = "" if error <= TOLERANCE[task.dtype] else f"{task.id} {name}: {reason.format(error)}"
        found[name] = Verdict(error, message)
    return found


@contextlib.contextmanager
def time_in_ops() -> Iterator[dict[str, float]]:
    """Adds up the seconds that the implementations of each op take; on a CPU a call returns when it is done."""
    total: dict[str, float] = {}
    kept = []

    def timed(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                total[op] = total.get(op, 0.0) + time.perf_counter() - start

        return call

    for name, op in _op.ops.items():
        for implementation in op.backends.values():
            kept.append((implementation, implementation.forward, implementation.backward))
            implementation.forward, implementation.backward = (timed(name, f) for f in kept[-1][1:])
    try:
        yield total
    finally:
        for implementation, forward, backward in kept:
            implementation.forward, implementation.backward = forward, backward


def sits_out(task: Task, name: str, done: int) -> bool:
    """Whether a provider is so slow that the rounds done are enough of it."""
    if done < SLOW_ROUNDS or OURS not in task.calls:
        return False
    return statistics.median(task.seconds[name]) > HOPELESS * statistics.median(task.seconds[OURS])


def measure_task(task: Task, plan: Plan) -> dict[str, str]:
    """The correctness gate, which warms up, then rounds in which every provider has a turn; why others have no time."""
    wrong = {name: v.message for name, v in verdicts(task).items() if v.message}
    for name in wrong:
        del task.calls[name]
    order = random.Random(plan.seed)
    for done in range(task.rounds):
        for name in order.sample([*task.calls], len(task.calls)):
            if sits_out(task, name, done):
                continue
            with time_in_ops() as inside:
                start = time.perf_counter()
                task.calls[name]()
                task.seconds[name].append(time.perf_counter() - start)
            task.inside[name].append(inside)
    return wrong


def peak_of_a_process(plan: Plan, task: Task, provider: str) -> int:
    """Largest resident size of a process that builds the network and makes one call, in bytes."""
    call = f"peak({plan!r}, {f'{task.op}:{task.mode}:{provider}'!r})"
    command = [sys.executable, "-c", f"from benchmarks.models import Plan, peak; print({call})"]
    # an allocator that keeps everything would count what is free again
    env = {k: v for k, v in os.environ.items() if k not in environment.ALLOCATOR}
    done = subprocess.run(command, cwd=environment.ROOT, env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


def peak(plan: Plan, which: str) -> int:
    """What the process of `peak_of_a_process` does."""
    op, mode, provider = which.split(":")
    next(t for t in tasks(plan, [op]) if t.mode == mode).calls[provider]()
    # not getrusage: what it says of a child that was started by fork and exec includes the parent
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def rows(task: Task, plan: Plan, wrong: Mapping[str, str]) -> list[dict[str, Any]]:
    """The entries of a result file, one a provider; what is wrong has no numbers."""
    medians = {name: statistics.median(s) for name, s in task.seconds.items() if s}
    entries = []
    for name, seconds in task.seconds.items():
        entry: dict[str, Any] = {
            "op": task.op,
            "size": task.size,
            "dtype": task.dtype,
            "mode": task.mode,
            "provider": name,
            "correct": name not in wrong,
            "seconds": None,
            **dict.fromkeys(("ratio_to_ours", "throughput", "share_in_ops", "shares", "extra_bytes")),
            **dict.fromkeys(("peak_resident_bytes", "scratch_bytes", "roof_fraction")),
        }
        if name not in wrong:
            inside = {op: sum(i.get(op, 0.0) for i in task.inside[name]) for op in sorted(_op.ops)}
            entry |= {
                "seconds": {"median": medians[name], "min": min(seconds), "max": max(seconds), "all": seconds},
                "ratio_to_ours": medians[name] / medians[OURS] if OURS in medians else None,
                "throughput": task.batch / medians[name],  # episodes a second
                "share_in_ops": sum(inside.values()) / sum(seconds),
                "shares": {op: spent / sum(seconds) for op, spent in inside.items() if spent},
                "extra_bytes": extra_bytes(task.calls[name], warm=True),  # its rounds came before
                "peak_resident_bytes": peak_of_a_process(plan, task, name),
            }
        entries.append(entry)
    return entries


def line(e: Mapping[str, Any]) -> str:
    """An entry for people."""
    text = f"{e['op']:20} {e['size']} {e['mode']:17} {e['provider']:12} "
    if e["seconds"] is None:
        return f"{text} wrong"
    parts = ", ".join(f"{op} {share:.1%}" for op, share in e["shares"].items())
    return (
        f"{text}{e['seconds']['median'] * 1e3:10.1f} ms of {len(e['seconds']['all'])}, {e['ratio_to_ours'] or 0:7.2f}x"
        f" ours, {e['throughput']:.3g} episodes/s, {e['share_in_ops']:4.0%} in ops ({parts}),"
        f" {e['extra_bytes'] / 1e6:8.1f} MB extra, {e['peak_resident_bytes'] / 1e6:8.0f} MB resident"
    )


def run(plan: Plan, out: Path) -> int:
    """Measures everything and writes the file."""
    torch.set_num_threads(environment.cores())
    entries: list[dict[str, Any]] = []
    failures: list[str] = []
    for task in tasks(plan):
        wrong = measure_task(task, plan)
        failures += wrong.values()
        for entry in rows(task, plan, wrong):
            entries.append(entry)
            print(line(entry), flush=True)
    peers = [
        {"op": op, "name": name, "version": None, "error": None, "optional": False}
        for op, name in sorted({(e["op"], e["provider"]) for e in entries if e["provider"] != OURS})
    ]
    results = {"plan": {**asdict(plan), "ops": OPS}, "peers": peers, "rows": entries, "failures": failures, "notes": []}
    out = storage.write_checked(out, "networks", environment.environment() | results)
    print(f"{len(entries)} entries -> {out}")
    return 1 if failures else 0
