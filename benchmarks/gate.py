"""The regression gate: the time of an op over that of a stand-in bound by the same resource, against a committed ratio.

The stand-in is ``x.sum()`` over as many bytes for what moves memory and ``torch.mm`` for what multiplies. Both take
turns on inputs that are in no cache, for at least `ROUNDS` rounds and `SECONDS`; the minimum counts: a busy neighbour
moves it least. Ratios are those of one kind of machine (`BASELINE`); on another kind they are shown and not judged.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, measure

BASELINE = Path(__file__).with_name("gate.json")
ROUNDS, SECONDS, ATTEMPTS = 20, 1.0, 3
THRESHOLD = 1.5
INTENSITY = 8.0  # operations a byte from which multiplying is the bound: what machines have of both, roughly
_SIZE = 1024  # of the stand-in's square matrices


@dataclass
class Outcome:
    """One op and mode: its ratio now and the committed one."""

    row: str
    stand_in: str
    ratio: float
    baseline: float | None

    @property
    def failed(self) -> bool:
        return self.baseline is not None and self.ratio > THRESHOLD * self.baseline

    def __str__(self) -> str:
        if self.baseline is None:
            verdict = "no baseline of this machine"
        else:
            verdict = f"baseline {self.baseline:.3f}, {self.ratio / self.baseline:.2f}x: "
            verdict += f"SLOWER than {THRESHOLD}x" if self.failed else "pass"
        return f"{self.row}: {self.ratio:.3f} of {self.stand_in}; {verdict}"


def rows(ops: tuple[str, ...]) -> list[measure.Row]:
    """One size of every op, in the smallest class; rather whole maps than the foreground ("-fg") alone, whose few rows
    lie far apart: that is the machine's page tables as much as the kernel."""
    found = []
    for op in ops:
        mine = measure.rows(measure.Plan((op,), sizes=("S",))) or measure.rows(measure.Plan((op,)))
        size = min(mine, key=lambda row: "-fg" in row.size).size
        found += [row for row in mine if row.mode in measure.MODES and row.size == size]
    return found


def stand_in(prepared: measure.Prepared) -> tuple[str, Callable[[], Any]]:
    """Name and call of what is bound by the same resource as the row."""
    if prepared.cost.flops < INTENSITY * prepared.cost.bytes:
        return "x.sum()", lambda: prepared.next_buffer().sum()
    a, b = (torch.randn(_SIZE, _SIZE, generator=torch.Generator().manual_seed(i)) for i in range(2))
    return "torch.mm", lambda: torch.mm(a, b)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_row(row: measure.Row, baseline: float | None, slowed: int = 1, rounds: int = ROUNDS) -> Outcome:
    """Rounds of the op and its stand-in; a slow outcome is measured again, all its rounds count.

    Args:
        row: op, size and mode.
        baseline: the ratio to compare with.
        slowed: how often the op is called in place of once, to see the gate fail.
        rounds: in which both have a turn, at least.
    """
    prepared = measure.Prepared(row, [])
    if prepared.refused:
        raise RuntimeError(f"{row.id}: {prepared.refused}")
    name, other = stand_in(prepared)

    def op() -> None:
        with torch.set_grad_enabled(bool(prepared.wanted)):
            for tensors in inputs:
                prepared.calls[measure.OURS](tensors)

    order, best = random.Random(0), {"op": float("inf"), "stand-in": float("inf")}
    for _ in range(ATTEMPTS):
        start, n = time.perf_counter(), 0
        while n <= rounds or time.perf_counter() - start < SECONDS:
            for provider in order.sample([*best], 2):
                inputs = [prepared.next_input() for _ in range(slowed)]
                seconds = _seconds(op if provider == "op" else other)
                if n:  # the first one warms up
                    best[provider] = min(best[provider], seconds)
            n += 1
        outcome = Outcome(row.id, name, best["op"] / best["stand-in"], baseline)
        if not outcome.failed:
            break
    return outcome


def run(ops: tuple[str, ...], slowed: int = 1, judge: bool = True) -> list[Outcome]:
    """Every op and mode against the baseline of this machine, or none unless ``judge``."""
    torch.set_num_threads(environment.cores())
    mine = _machines().get(environment.machine_slug(), {})
    return [measure_row(row, mine.get(row.id) if judge else None, slowed) for row in rows(ops)]


def update(outcomes: Iterable[Outcome]) -> None:
    """Writes the median ratio of each row as the baseline of this machine: one run may have had a busy neighbour."""
    ratios: dict[str, list[float]] = {}
    for outcome in outcomes:
        ratios.setdefault(outcome.row, []).append(outcome.ratio)
    machines = _machines()
    machines.setdefault(environment.machine_slug(), {}).update(
        {row: round(statistics.median(r), 4) for row, r in ratios.items()}
    )
    environment.write_json(BASELINE, machines)


def _machines() -> dict[str, dict[str, float]]:
    machines: dict[str, dict[str, float]] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    return machines
