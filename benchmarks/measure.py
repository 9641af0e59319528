"""One measurement session: rows, providers, the correctness gate, exact peak memory and the statistics.

The timing itself is pytest-benchmark's (``suite/``); nothing here depends on pytest.
"""

from __future__ import annotations

import fnmatch
import gc
import json
import math
import random
import timeit
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import ceilings, peers, sweeps
from fss_kernels import testing
from fss_kernels._memory import extra_bytes, flat, nbytes
from fss_kernels.testing import Sample, Spec

OURS = "fss_kernels"
MODES = ("forward", "forward+backward")
# Classes of sizes: the bytes that a forward call moves, and its operations, at most; a quick run has one "S" an op.
CLASSES = {"S": (64 << 20, 4e9), "M": (256 << 20, 40e9), "L": (math.inf, math.inf)}
# A peer further from float64 than this, relative to the largest element, does not compute the same thing.
SANITY = {torch.float32: 1e-3, torch.float64: 1e-8, torch.bfloat16: 0.1, torch.float16: 0.02}
# A peer this many times slower than the fastest one sits out after the first rounds: it decides nothing. Where a bound
# names it, the median of those rounds is what the bound is compared with.
SLOW_PEER, FIRST_ROUNDS = 2.0, 3
# One this many times slower sits out after a single round, unless a bound names it.
HOPELESS = 20.0
# A call of more seconds is timed once a visit: it needs neither warming up nor repeats, and rounds differ by more.
LONG = 0.3
# Measurement noise: a ceiling and an op are timed milliseconds apart, not at once.
ROOF_SLACK = 1.03


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often."""

    ops: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)
    sizes: tuple[str, ...] = ()  # shell patterns of labels, and classes S, M, L; empty: all
    exclude: tuple[str, ...] = ()  # shell patterns of peers to leave out
    quick: bool = False
    sweep: bool = False  # the sizes of `sweeps`, and the peers that have a part in them
    tiny: bool = False  # every number of a size becomes its square root
    named: tuple[str, ...] = ()  # peers that a bound names: they have the first rounds, however slow
    rounds: int = 10  # interleaved visits of every provider
    repeats: int = 3  # timed calls a visit
    seed: int = 0
    threads: int = 1

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(Path(path).read_text()).items()})

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Row:
    """One point of the table: op, size, dtype and mode. ``arguments`` make the sample.

    ``same_as``: an earlier size with the same arguments, whose measurement is this row's too: every axis of a sweep
    contains the base.
    """

    op: str
    size: str
    dtype: str
    mode: str
    arguments: Mapping[str, Any] = field(hash=False, compare=False)
    same_as: str = field(default="", hash=False, compare=False)

    @property
    def id(self) -> str:
        return f"{self.op}[{self.size}, {self.dtype}, {self.mode}]"


@dataclass(frozen=True)
class Visit:
    """One provider's turn in one round of one row."""

    row: Row
    round: int
    provider: str

    def __str__(self) -> str:
        return f"{self.row.id} round {self.round} {self.provider}"


def selected(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that match any of the shell patterns; brackets stand for themselves."""
    patterns = [p.replace("[", "[[]") for p in patterns]
    return [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def size_class(cost: testing.Cost) -> str:
    """S, M or L."""
    return next(c for c, (size, flops) in CLASSES.items() if cost.bytes <= size and cost.flops <= flops)


def rows(plan: Plan) -> list[Row]:
    """The rows of a plan."""
    result = []
    classes = {"S"} if plan.quick else set(plan.sizes) & set(CLASSES)
    patterns = [p for p in plan.sizes if p not in CLASSES]
    for op in plan.ops:
        spec = testing.specs()[op]
        sizes = sweeps.sizes(spec) if plan.sweep else spec.sizes
        own: list[Row] = []
        chosen = selected(sizes, patterns or ("*",))
        for size in chosen:
            first = next(label for label in chosen if sizes[label] == sizes[size])
            arguments = dict(sizes[size])
            modes = arguments.pop("modes", MODES)
            if plan.tiny:
                arguments = {k: math.isqrt(v) + 1 if isinstance(v, int) else v for k, v in arguments.items()}
            for dtype in plan.dtypes:
                if classes:
                    cost = spec.cost(spec.benchmark_sample(**arguments), getattr(torch, dtype), "forward")
                    if size_class(cost) not in classes:
                        continue
                own += [Row(op, size, dtype, mode, arguments, "" if first == size else first) for mode in modes]
        result += [row for row in own if not plan.quick or row.size == own[0].size]
    return result


def schedule(plan: Plan, usable: Mapping[str, list[peers.Peer]]) -> list[Visit]:
    """Row after row; within a row A B C ... A B C ..., the order of the providers drawn anew each round."""
    order = random.Random(plan.seed)
    visits = []
    for row in (r for r in rows(plan) if not r.same_as):
        providers = [OURS, *(f"ceiling:{kind}" for kind in ceilings.KINDS)]
        providers += [p.name for p in usable[row.op] if p.takes(row.arguments, row.mode)]
        for n in range(plan.rounds):
            visits += [Visit(row, n, provider) for provider in order.sample(providers, len(providers))]
    return visits


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MB where the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.rstrip("KM")) * (1 << 20 if text.endswith("M") else 1 << 10)
    except (OSError, ValueError):
        return 32 << 20


def rotations(size: int) -> int:
    """How many buffers of ``size`` bytes make sure that none is still in a cache when its turn comes."""
    return max(2, math.ceil(4 * cache_bytes() / max(1, size)))


@dataclass(frozen=True)
class Verdict:
    """Outcome of the correctness gate: an empty message lets the provider be timed."""

    max_error: float
    message: str = ""


def gate(
    spec: Spec,
    dtype: torch.dtype,
    sample: Sample,
    tensors: Mapping[str, Tensor],
    wanted: Iterable[str],
    functions: Mapping[str, Callable[..., Any]],
    ours: Iterable[str] = (OURS,),
) -> dict[str, Verdict]:
    """Compares every provider with float64: ``ours`` by the project's rule, the others by a plain bound."""
    wanted, ours = list(wanted), set(ours)

    def run(function: Callable[..., Any], to: torch.dtype = dtype) -> tuple[list[Tensor], list[Tensor]]:
        rounded = {k: t.to(to) if t.is_floating_point() and to != dtype else t for k, t in tensors.items()}
        with torch.set_grad_enabled(bool(wanted)):
            return testing.gradients(function, rounded, sample.options, wanted)

    oracle, plain = run(spec.reference, torch.float64), run(spec.plain)
    plain32 = run(spec.plain, torch.float32) if dtype in (torch.bfloat16, torch.float16) else None

    def judge(name: str, function: Callable[..., Any]) -> Verdict:
        try:
            actual = run(function)
        except Exception as error:
            return Verdict(math.inf, f"{name}: raised {type(error).__name__}: {error}")
        worst, messages = 0.0, []
        for part, direction in enumerate(("forward", "backward")):
            for i, (out, want) in enumerate(zip(actual[part], oracle[part], strict=True)):
                label = f"{name}: {direction} {i}"
                if out.shape != want.shape or not bool(out.isfinite().all()):
                    return Verdict(math.inf, f"{label}: shape {tuple(out.shape)} or values that are not finite")
                error = ((out.double() - want).abs().max() / want.abs().max().clamp(min=1e-300)).item()
                worst = max(worst, error)
                if name in ours:
                    like = plain32[part][i] if plain32 else None
                    comparison = testing.compare(out, want, plain[part][i], direction, like, label)
                    messages += [] if comparison.passed else [comparison.message]
                elif error > SANITY[dtype]:
                    messages.append(f"{label}: relative error {error:.2g}, allowed {SANITY[dtype]:.0e}")
        return Verdict(worst, "; ".join(messages))

    return {name: judge(name, function) for name, function in functions.items()}


class Prepared:
    """A row ready to be timed: rotating inputs, callables, gate verdicts and peak memory."""

    def __init__(self, row: Row, usable: Iterable[peers.Peer], spec: Spec | None = None) -> None:
        self.row, self.spec = row, spec or testing.specs()[row.op]
        self.turn = 0
        spec, dtype = self.spec, getattr(torch, row.dtype)
        torch._dynamo.reset()
        sample = spec.benchmark_sample(**row.arguments)
        self.options = sample.options
        first = spec.cast(sample, dtype)
        self.wanted = spec.gradients_of(row.mode, first)
        self.cost = spec.cost(sample, dtype, row.mode)
        self.scratch_bytes = spec.scratch_bytes(sample, dtype)

        functions = {OURS: spec.function}
        functions |= {p.name: peers.build(p) for p in usable if p.takes(row.arguments, row.mode)}
        self.verdicts = gate(spec, dtype, sample, first, self.wanted, functions)
        self.refused = self.verdicts[OURS].message  # our own error refuses the row
        copies = rotations(nbytes(first[n] for n in spec.features if n in first))
        self.inputs = [first, *({k: t.clone() for k, t in first.items()} for _ in range(copies - 1))]
        results = flat(spec.function(*first.values(), **self.options))
        generator = torch.Generator().manual_seed(3)
        self.seeds = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results if r.is_floating_point()]
        del results
        self.calls = {name: self._call(f) for name, f in functions.items() if not self.verdicts[name].message}
        # Three calls a provider before the first round: that of the gate compiles and warms up, of the second the time
        # counts, of the third the memory.
        timed = [] if self.refused else [*self.calls]
        self.long = {name for name in timed if timeit.timeit(self._once(name), number=1) > LONG}
        self.extra = {name: extra_bytes(self._once(name), warm=True) for name in timed}
        self.buffers = [ceilings.buffer(self.cost.bytes) for _ in range(rotations(self.cost.bytes))]

    def _call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.wanted:

            def forward(tensors: dict[str, Tensor]) -> Any:
                return function(*tensors.values(), **self.options)

            return forward

        def forward_backward(tensors: dict[str, Tensor]) -> Any:
            outputs = [r for r in flat(function(*tensors.values(), **self.options)) if r.is_floating_point()]
            return torch.autograd.grad(outputs, [tensors[n] for n in self.wanted], self.seeds)

        return forward_backward

    def _once(self, name: str) -> Callable[[], Any]:
        def run() -> Any:
            with torch.set_grad_enabled(bool(self.wanted)):
                return self.calls[name](self.next_input())

        return run

    @property
    def roof(self) -> list[str]:
        """The ceilings that the roof is made of; those of products come last. No other has a turn in the rounds."""
        written = ["ceiling:write"] if self.cost.written else []
        return ["ceiling:read", *written, "ceiling:screen" if self.cost.screened else "ceiling:fma"]

    def next_input(self) -> dict[str, Tensor]:
        """The next buffer set; tensors whose gradient is wanted are fresh leaves."""
        self.turn += 1
        tensors = self.inputs[self.turn % len(self.inputs)]
        return {n: t.detach().requires_grad_() if n in self.wanted else t for n, t in tensors.items()}

    def next_buffer(self) -> Tensor:
        """The next buffer of a ceiling: as many bytes as the row moves."""
        self.turn += 1
        return self.buffers[self.turn % len(self.buffers)]


def quantiles(seconds: Iterable[float]) -> dict[str, float]:
    """Minimum, median and the 20th and 80th percentile."""
    low, p20, median, p80 = (float(q) for q in np.quantile(list(seconds), [0, 0.2, 0.5, 0.8]))
    return {"min": low, "p20": p20, "median": median, "p80": p80}


def summarise(
    prepared: Prepared, samples: Mapping[str, Mapping[int, list[float]]]
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Entries of the result file for one row, wrong numerics, and speeds above the roof.

    Ratios and fractions of the roof are medians over rounds of values of the same round, so that a machine that slows
    down for a while slows both sides.
    """
    row, cost = prepared.row, prepared.cost
    wrong = [f"{row.id} {v.message}" for v in prepared.verdicts.values() if v.message]
    impossible = []
    by_round = {p: {n: float(np.median(s)) for n, s in visits.items()} for p, visits in samples.items()}
    rates = {
        kind: {n: prepared.buffers[0].nbytes / s for n, s in by_round.get(f"ceiling:{kind}", {}).items()}
        for kind in ceilings.MEMORY
    }
    products = by_round.get(prepared.roof[-1], {})

    def paired(provider: str, value: Callable[[int, float], float]) -> float | None:
        values = [value(n, seconds) for n, seconds in by_round.get(provider, {}).items()]
        return float(np.median(values)) if values else None

    def moving(n: int) -> float:
        """Least time in a round to move memory: to read at the reading ceiling, to write at the writing one."""
        written = cost.written / rates["write"][n] if cost.written else 0.0
        return (cost.bytes - cost.written) / rates["read"][n] + written

    def floor(n: int) -> float:
        """The roofline: memory and products overlap at best."""
        return max(moving(n), products[n])

    entries = []
    for provider in [*prepared.verdicts, *prepared.roof]:
        verdict = prepared.verdicts.get(provider)
        does_flops = verdict is not None or provider.removeprefix("ceiling:") in ceilings.COMPUTE
        entry: dict[str, Any] = {
            **{key: getattr(row, key) for key in ("op", "size", "dtype", "mode")},
            "provider": provider,
            "correct": not verdict.message if verdict else None,
            "max_error": verdict.max_error if verdict and math.isfinite(verdict.max_error) else None,
            "seconds": None,
            "bytes": cost.bytes if verdict else prepared.buffers[0].nbytes,
            "flops": cost.flops if does_flops else 0,
            "extra_bytes": prepared.extra.get(provider),
            "scratch_bytes": prepared.scratch_bytes,
            **dict.fromkeys(("gbps", "gflops", "roof_fraction", "ratio_to_ours", "bound")),
        }
        if samples.get(provider) and not prepared.refused and not (verdict and verdict.message):
            seconds = [s for visit in samples[provider].values() for s in visit]
            entry["seconds"] = {**quantiles(seconds), "samples": len(seconds)}
            median = max(entry["seconds"]["median"], 1e-12)
            entry["gbps"] = entry["bytes"] / median * 1e-9 if verdict or not does_flops else None
            entry["gflops"] = entry["flops"] / median * 1e-9 if does_flops else None
            if verdict:
                entry["bound"] = "memory" if paired(provider, lambda n, s: moving(n) - products[n]) >= 0 else "products"
                entry["roof_fraction"] = paired(provider, lambda n, s: floor(n) / s)
                entry["ratio_to_ours"] = paired(provider, lambda n, s: s / by_round[OURS][n])
                if entry["roof_fraction"] > ROOF_SLACK:
                    impossible.append(
                        f"{row.id} {provider}: {entry['roof_fraction']:.0%} of the measured roof (up to "
                        f"{ROOF_SLACK:.0%} is measurement noise): bytes are miscounted, inputs were in a cache or the "
                        "machine was busy"
                    )
        entries.append(entry)
    return entries, wrong, impossible


class Session:
    """Keeps one prepared row at a time, collects samples and writes the results."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        resolved = {op: peers.resolve(op) for op in plan.ops}
        self.usable = {
            op: [p for p in peers.chosen(usable, plan.quick, plan.sweep) if not selected([p.name], plan.exclude)]
            for op, (usable, _) in resolved.items()
        }
        self.peers = [record for _, records in resolved.values() for record in records]
        self.visits = schedule(plan, self.usable)
        self.entries: dict[Row, list[dict[str, Any]]] = {}
        self.twice: set[Row] = set()
        self.failures = [
            f"peer {r['name']} of {r['op']} is missing: {r['error']}"
            for r in self.peers
            if r["error"] is not None and not r["optional"]
        ]
        self.notes: list[str] = []
        self.prepared: Prepared | None = None
        self.samples: dict[str, dict[int, list[float]]] = {}
        torch.set_num_threads(plan.threads)
        self.ceilings = ceilings.Ceilings(plan.threads, 4 << 20 if plan.tiny else 256 << 20)
        self.before = self.ceilings.measure()

    def prepare(self, row: Row) -> Prepared:
        """The prepared row; a new row closes the one before and frees its memory."""
        if self.prepared is None or self.prepared.row != row:
            self.close_row()
            self.prepared = Prepared(row, self.usable[row.op])
        return self.prepared

    def sits_out(self, visit: Visit) -> bool:
        """Whether a visit would decide nothing: of a ceiling that is no part of the row's roof, or of a peer so much
        slower than another one that three rounds of it, or one, are enough."""
        if visit.provider.startswith("ceiling:"):
            return self.prepared is not None and visit.provider not in self.prepared.roof
        if visit.round == 0 or visit.provider == OURS:
            return False
        peers = {n: np.median([*v.values()]) for n, v in self.samples.items() if n != OURS and ":" not in n}
        limit = SLOW_PEER
        if visit.round < FIRST_ROUNDS:
            limit = math.inf if visit.provider in self.plan.named else HOPELESS
        return bool(visit.provider in peers and peers[visit.provider] > limit * min(peers.values()))

    def times(self, provider: str) -> dict[str, int]:
        """How often pytest-benchmark calls a provider in a visit, and before it looks at the clock."""
        long = self.prepared is not None and provider in self.prepared.long
        return {"iterations": 1, "rounds": 1 if long else self.plan.repeats, "warmup_rounds": 0 if long else 1}

    def record(self, visit: Visit, seconds: list[float]) -> None:
        """Adds the timed calls of one visit."""
        self.samples.setdefault(visit.provider, {})[visit.round] = seconds

    def close_row(self) -> bool:
        """Summarises the current row. True when it has to be measured once more, and nothing of it is kept: something
        is above the roof for the first time, mostly beside a busy neighbour; the second time fails the run."""
        again = False
        if self.prepared is not None:
            row, light = self.prepared.row, self.plan.quick or self.plan.tiny
            entries, wrong, impossible = summarise(self.prepared, self.samples)
            again = bool(impossible) and not light and row not in self.twice
            if again:
                self.twice.add(row)
                self.notes += [f"{message}; its row was measured once more" for message in impossible]
            else:
                self.entries[row] = entries
                self.failures += wrong
                # a few calls beside a busy neighbour prove nothing: a quick run only says so
                (self.notes if light else self.failures).extend(impossible)
        self.prepared, self.samples = None, {}
        gc.collect()
        return again

    def entries_of(self, row: Row) -> list[dict[str, Any]]:
        """The entries of a row, or those of the row that it is the same as under its own label."""
        if not row.same_as:
            return self.entries.get(row, [])
        first = self.entries.get(replace(row, size=row.same_as), [])
        return [{**entry, "size": row.size, "same_as": row.same_as} for entry in first]

    def results(self) -> dict[str, Any]:
        """The content of the result file but the environment."""
        self.close_row()
        after = self.ceilings.measure()
        return {
            "plan": asdict(self.plan),
            "peers": self.peers,
            "ceilings": {"before": self.before, "after": after, "read_pattern": self.ceilings.pattern},
            "rows": [entry for row in rows(self.plan) for entry in self.entries_of(row)],
            "failures": self.failures,
            "notes": self.notes + ceilings.moved(self.before, after),
        }
