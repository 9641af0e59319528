"""What a stage of ``benchmarks.gpu`` measures, in a process of its own: calibration, the three clocks, one row a point.

Clocks of a row: *graph*, replays of a CUDA graph of at least 30 calls over inputs and results that rotate through at
least four times the L2 cache; *do_bench*, single calls between events after a flush of the cache, as Triton times;
*wall*, the host's time a call. Networks have *events*, single calls between events, and *wall*. Providers take turns in
random order. With ``dry`` everything runs on the CPU with tiny shapes, plain loops in place of graphs and events.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, measure, models, peers
from benchmarks.gpu import append, lines
from fss_kernels import _backends, _loading, testing
from fss_kernels.testing import Cost, Spec

Record = Callable[..., None]
CALLS = 30  # least number of calls in a graph
ROTATION = 256 << 20  # least bytes of rotating inputs
ROUNDS = 8
DTYPES = ("float32", "bfloat16")
NETWORK_BATCH = 8  # DPCN's on PASCAL-5i


class Clock:
    """Times device work: events and graphs on a GPU, the host's clock on a CPU."""

    def __init__(self, dry: bool) -> None:
        self.device = "cpu" if dry else "cuda"
        self.cuda = not dry
        self.rounds = ROUNDS if self.cuda else 1
        properties = torch.cuda.get_device_properties(0) if self.cuda else None
        self.name = properties.name if properties else f"{environment.cpu()} (dry run)"
        self.rotation = max(ROTATION, 4 * properties.L2_cache_size) if properties else 1 << 17
        self.cache = torch.empty(ROTATION if self.cuda else 1 << 10, dtype=torch.uint8, device=self.device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def copies(self, size: int) -> int:
        """Distinct buffers of ``size`` bytes that together are never in the cache when their turn comes."""
        return max(2, math.ceil(self.rotation / max(1, size)))

    def repeated(self, run: Callable[[], Any], repeats: int, before: Callable[[], Any] | None = None) -> list[float]:
        """Seconds of each run between two events; the work queued before them hides the host's launch time."""
        (before or run)()
        if not self.cuda:
            return [self.wall(run, 1) for _ in range(repeats)]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            if before is not None:
                before()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def wall(self, run: Callable[[], Any], calls: int) -> float:
        """The host's seconds a call, calls queued one after the other."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        self.synchronize()
        return (time.perf_counter() - start) / calls

    def replay(self, call: Callable[[], Any], calls: int, keep: int) -> Callable[[], None]:
        """A CUDA graph of ``calls`` calls; the last ``keep`` results stay alive, so that results rotate as well."""

        def sequence() -> None:
            kept: deque[Any] = deque(maxlen=keep)
            for _ in range(calls):
                kept.append(call())

        if not self.cuda:
            return sequence
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            sequence()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sequence()
        return graph.replay


# ---- calibration ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _fp32(precision: str):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _empty_triton_launch(device: str) -> Callable[[], Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def empty_kernel(pointer, N: tl.constexpr):
        pass

    data = torch.zeros(1, device=device)
    return lambda: empty_kernel[(1,)](data, N=1)


def calibrate(clock: Clock, launches: bool = False) -> dict[str, Any]:
    """What this device does at most, measured now; what cannot run here is named with the reason."""
    size, n = (4 << 30, 8192) if clock.cuda else (1 << 20, 64)
    source = torch.empty(size // 4, device=clock.device).normal_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=clock.device) for _ in range(2))

    def rate(amount: int, run: Callable[[], Any]) -> float:
        run()
        return amount / statistics.median(clock.repeated(run, 10)) * 1e-9

    def gemm(precision: str, dtype: torch.dtype = torch.float32) -> float:
        x, y = a.to(dtype), b.to(dtype)
        with _fp32(precision):
            return rate(2 * n**3, lambda: x @ y)

    def fp8() -> float:
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=clock.device)
        return rate(2 * n**3, lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))

    probes: dict[str, Callable[[], Any]] = {
        "copy_gbps": lambda: rate(2 * size, lambda: target.copy_(source)),
        "write_gbps": lambda: rate(size, lambda: target.fill_(1.5)),
        "read_gbps": lambda: rate(size, source.sum),
        "gemm_bf16_gflops": lambda: gemm("ieee", torch.bfloat16),
        "gemm_tf32_gflops": lambda: gemm("tf32"),
        "gemm_fp32_gflops": lambda: gemm("ieee"),
        "gemm_fp8_gflops": fp8,
    }
    if launches:
        tiny = torch.ones(1, device=clock.device)

        def launch(call: Callable[[], Any]) -> dict[str, float]:
            call()
            run = clock.replay(call, 100, 1)
            return {"host_us": clock.wall(call, 1000) * 1e6, "graph_us": min(clock.repeated(run, 5)) * 1e4}

        probes["launch_cpp"] = lambda: launch(tiny.neg_)
        probes["launch_triton"] = lambda: launch(_empty_triton_launch(clock.device))
    values: dict[str, Any] = {"device": clock.name, "unavailable": {}}
    for name, probe in probes.items():
        try:
            values[name] = probe()
        except Exception as error:
            values["unavailable"][name] = _text(error)
    return values


def floor_seconds(cost: Cost, written: int, dtype: torch.dtype, ceilings: Mapping[str, Any]) -> float:
    """Least time of a call. A copy may outrun the read and the write probe: the faster one counts."""
    read, write = (max(ceilings[kind], ceilings["copy_gbps"]) * 1e9 for kind in ("read_gbps", "write_gbps"))
    flops = ceilings["gemm_fp32_gflops" if dtype.itemsize >= 4 else "gemm_bf16_gflops"] * 1e9
    return max((cost.bytes - written) / read + written / write, cost.flops / flops)


# ---- rows ----------------------------------------------------------------------------------------------------------


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


def _forced(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    def call(*tensors: Tensor, **options: Any) -> Any:
        with _backends.use_backend(backend):
            return function(*tensors, **options)

    return call


def providers(
    row: measure.Row, spec: Spec, stage: str, device: str
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Functions by name, and why others are missing: our backends and, for ``core``, the usual code, eager and
    compiled; for ``peers`` all of the op's, and their eager code under max-autotune."""
    found, missing = {}, {}
    for backend in ("triton", "cuda", "reference") if device == "cuda" else _loading.BACKENDS:
        reason = spec.op.why_not(backend, device, getattr(torch, row.dtype))
        if reason is None:
            found[f"{measure.OURS}:{backend}"] = _forced(spec.function, backend)
        else:
            missing[f"{measure.OURS}:{backend}"] = reason
    usable, records = peers.resolve(row.op)
    usable = [p for p in usable if p.takes(row.arguments, row.mode)]
    names = {p.name for p in usable}
    eager = [p.name for p in usable if f"compile({p.name})" in names]
    if stage == "core":
        usable = [p for p in usable if p.name in (*eager[:1], *(f"compile({n})" for n in eager[:1]))]
    else:
        missing |= {r["name"]: r["error"] for r in records if r["error"] is not None}
    for p in usable:
        try:
            found[p.name] = peers.build(p)
        except Exception as error:
            missing[p.name] = _text(error)
    for name in eager if stage == "peers" else ():
        if name in found:
            found.setdefault(f"max-autotune({name})", peers.autotuned(found[name]))
    return found, missing


def _extra_bytes(call: Callable[[], Any], clock: Clock) -> int:
    """Peak of the memory that a call allocates, without its result."""
    if not clock.cuda:
        return measure.extra_bytes(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = measure.flat(call())
    return torch.cuda.max_memory_allocated() - before - measure.nbytes(results)


class Group:
    """All providers of one row: checked, timed in turns, written as one entry each."""

    def __init__(self, row: measure.Row, stage: str, clock: Clock, ceilings: Mapping[str, Any]) -> None:
        self.row, self.stage, self.clock, self.ceilings = row, stage, clock, ceilings
        self.spec, self.dtype = testing.specs()[row.op], getattr(torch, row.dtype)
        torch._dynamo.reset()
        sample = self.spec.benchmark_sample(**row.arguments)
        self.options = sample.options
        first = self.spec.cast(sample, self.dtype, clock.device)
        self.wanted = self.spec.gradients_of(row.mode, first)
        self.cost = self.spec.cost(sample, self.dtype, row.mode)
        self.scratch_bytes = self.spec.scratch_bytes(sample, self.dtype)
        self.functions, self.missing = providers(row, self.spec, stage, clock.device)
        ours = [n for n in self.functions if n.startswith(f"{measure.OURS}:")]
        self.verdicts = measure.gate(self.spec, self.dtype, sample, first, self.wanted, self.functions, ours)
        copies = clock.copies(measure.nbytes(first[n] for n in self.spec.features if n in first))
        self.inputs = [first, *({k: t.clone() for k, t in first.items()} for _ in range(copies - 1))]
        results = measure.flat(self.spec.reference(*first.values(), **self.options))
        self.seeds = [torch.randn_like(r) for r in results if r.is_floating_point()]
        self.turn = 0

    def call(self, name: str) -> Callable[[], Any]:
        """One call of a provider on the next inputs."""
        function = self.functions[name]

        def run() -> Any:
            self.turn += 1
            tensors = self.inputs[self.turn % len(self.inputs)]
            if not self.wanted:
                with torch.no_grad():
                    return function(*tensors.values(), **self.options)
            tensors = {n: t.detach().requires_grad_() if n in self.wanted else t for n, t in tensors.items()}
            outputs = [r for r in measure.flat(function(*tensors.values(), **self.options)) if r.is_floating_point()]
            return torch.autograd.grad(outputs, [tensors[n] for n in self.wanted], self.seeds)

        return run

    def entries(self) -> list[dict[str, Any]]:
        """One entry a provider: its times, or why it has none."""
        self.refused = {**self.missing, **{n: v.message for n, v in self.verdicts.items() if v.message}}
        calls = {n: self.call(n) for n in self.functions if n not in self.refused}
        count, keep = max(CALLS, len(self.inputs)), len(self.inputs)
        replays: dict[str, Callable[[], None]] = {}
        extra: dict[str, int] = {}
        notes: dict[str, str] = {}
        for name, call in list(calls.items()):
            try:
                extra[name] = _extra_bytes(call, self.clock)
                self.clock.synchronize()
            except Exception as error:
                self.refused[name] = _text(error)
                del calls[name]
                continue
            try:
                replays[name] = self.clock.replay(call, count, keep)
            except Exception as error:  # a call that synchronises cannot be captured: do_bench is its clock
                notes[name] = f"no graph: {_text(error)}"
        samples: dict[str, dict[str, list[list[float]]]] = {n: {"graph": [], "do_bench": [], "wall": []} for n in calls}
        order = random.Random(0)
        for _ in range(self.clock.rounds):
            for name in order.sample(list(calls), len(calls)):
                clocks = samples[name]
                try:
                    if name in replays:
                        clocks["graph"].append([s / count for s in self.clock.repeated(replays[name], 3)])
                    clocks["do_bench"].append(self.clock.repeated(calls[name], 10, self.clock.cache.zero_))
                    clocks["wall"].append([self.clock.wall(calls[name], 10) for _ in range(3)])
                except Exception as error:
                    self.refused[name] = _text(error)
        return self._summarise(samples, replays, extra, notes)

    def _summarise(
        self,
        samples: Mapping[str, Mapping[str, list[list[float]]]],
        replays: Mapping[str, Any],
        extra: Mapping[str, int],
        notes: Mapping[str, str],
    ) -> list[dict[str, Any]]:
        floor = floor_seconds(self.cost, self.cost.written, self.dtype, self.ceilings)
        entries = []
        for name in [*self.functions, *(n for n in self.missing if n not in self.functions)]:
            verdict = self.verdicts.get(name)
            entry = self._blank(name)
            if verdict is not None:
                entry["correct"] = not verdict.message
                entry["max_error"] = verdict.max_error if math.isfinite(verdict.max_error) else None
            entry |= {"refused": self.refused.get(name), "note": notes.get(name), "extra_bytes": extra.get(name)}
            if entry["refused"] is None and verdict is None:
                entry["refused"] = "its numbers were not checked"
            if entry["refused"] is None:
                entry["clock"] = "graph" if name in replays else "do_bench"
                clocks = {k: measure.quantiles(s for r in v for s in r) for k, v in samples[name].items() if v}
                rounds = [statistics.median(r) for r in samples[name][entry["clock"]]]
                seconds = clocks[entry["clock"]]["median"]
                fraction = floor / seconds
                if fraction > measure.ROOF_SLACK:
                    entry["refused"] = (
                        f"{fraction:.0%} of the roof measured in this process (up to {measure.ROOF_SLACK:.0%} is "
                        "noise): bytes are miscounted or inputs were in a cache"
                    )
                else:
                    count = sum(len(r) for r in samples[name][entry["clock"]])
                    entry |= {
                        "seconds": {**clocks[entry["clock"]], "samples": count},
                        "spread": (max(rounds) - min(rounds)) / seconds,
                        "clocks": clocks,
                        "gbps": self.cost.bytes / seconds * 1e-9,
                        "gflops": self.cost.flops / seconds * 1e-9,
                        "roof_fraction": fraction,
                    }
            entries.append(entry)
        kernels = [e for e in entries if e["seconds"] and e["provider"].startswith(f"{measure.OURS}:")]
        kernels = [e for e in kernels if not e["provider"].endswith(":reference")]
        ours = min((e["seconds"]["median"] for e in kernels), default=None)
        for e in entries if ours is not None else ():
            e["ratio_to_ours"] = e["seconds"]["median"] / ours if e["seconds"] else None
        return entries

    def _blank(self, provider: str) -> dict[str, Any]:
        empty = ("correct", "max_error", "refused", "note", "clock", "seconds", "spread", "clocks", "gbps", "gflops")
        return {
            "stage": self.stage,
            "device": self.clock.name,
            **{key: getattr(self.row, key) for key in ("op", "size", "dtype", "mode")},
            "provider": provider,
            **dict.fromkeys((*empty, "roof_fraction", "ratio_to_ours", "extra_bytes")),
            "bytes": self.cost.bytes,
            "flops": self.cost.flops,
            "scratch_bytes": self.scratch_bytes,
            "buffers": len(self.inputs),
        }


# ---- networks ------------------------------------------------------------------------------------------------------


def network_plan(clock: Clock) -> models.Plan:
    """ResNet-50 at 473 x 473; a dry run has the tiny backbone."""
    if not clock.cuda:
        return models.QUICK
    return models.Plan(batch=NETWORK_BATCH, device=clock.device)


@contextlib.contextmanager
def _full_precision():
    """Convolutions without TF32, which would round away what providers differ by, and without atomic additions."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision, torch.backends.cudnn.deterministic
    convolutions.fp32_precision, torch.backends.cudnn.deterministic = "ieee", True
    try:
        yield
    finally:
        convolutions.fp32_precision, torch.backends.cudnn.deterministic = before


def network_entries(task: models.Task, clock: Clock, missing: Mapping[str, str]) -> list[dict[str, Any]]:
    """One entry a provider of a network: checked against the reference, then timed in turns."""
    with _full_precision():
        verdicts = models.verdicts(task)
    refused = {**missing, **{n: v.message for n, v in verdicts.items() if v.message}}
    calls = {n: call for n, call in task.calls.items() if n not in refused}
    memory: dict[str, dict[str, int | None]] = {}
    for name, call in calls.items():
        call()  # the first step makes the optimizer's buffers
        memory[name] = {"extra_bytes": _extra_bytes(call, clock)}
        memory[name]["peak_bytes"] = torch.cuda.max_memory_allocated() if clock.cuda else None
    samples: dict[str, dict[str, list[list[float]]]] = {n: {"events": [], "wall": []} for n in calls}
    order = random.Random(0)
    for _ in range(clock.rounds):
        for name in order.sample(list(calls), len(calls)):
            samples[name]["events"].append(clock.repeated(calls[name], 3))
            samples[name]["wall"].append([clock.wall(calls[name], 3)])
    entries = []
    empty = ("clock", "seconds", "spread", "clocks", "roof_fraction", "ratio_to_ours", "throughput")
    for name in [*task.calls, *missing]:
        verdict = verdicts.get(name)
        entry: dict[str, Any] = {
            "provider": name,
            "correct": not verdict.message if verdict else None,
            "max_error": verdict.max_error if verdict and math.isfinite(verdict.max_error) else None,
            "refused": refused.get(name),
            "batch": task.batch,
            **dict.fromkeys((*empty, "extra_bytes", "peak_bytes")),
            **memory.get(name, {}),
        }
        if name in calls:
            clocks = {k: measure.quantiles(s for r in v for s in r) for k, v in samples[name].items()}
            rounds = [statistics.median(r) for r in samples[name]["events"]]
            seconds = clocks["events"]["median"]
            entry |= {
                "clock": "events",
                "seconds": {**clocks["events"], "samples": sum(map(len, samples[name]["events"]))},
                "spread": (max(rounds) - min(rounds)) / seconds,
                "clocks": clocks,
                "throughput": task.batch / seconds,  # episodes a second
            }
        entries.append(entry)
    default = next((e["seconds"] for e in entries if e["provider"] == f"{measure.OURS}:default"), None)
    for e in entries if default else ():
        e["ratio_to_ours"] = e["seconds"]["median"] / default["median"] if e["seconds"] else None
    return entries


# ---- stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One row of a stage: what makes its id, and what measures it."""

    op: str
    size: str
    dtype: str
    mode: str
    entries: Callable[[], list[dict[str, Any]]]

    @property
    def id(self) -> str:
        return f"{self.op}[{self.size}, {self.dtype}, {self.mode}]"


def network_points(clock: Clock) -> list[Point]:
    """Every network, dtype and mode, on the default backends, forced Triton and the reference."""
    plan = network_plan(clock)
    providers = {"default": None, "triton": "triton", "reference": "reference"}
    named = {f"{measure.OURS}:{name}": backend for name, backend in providers.items()}
    missing = {n: reason for n, b in named.items() if b and (reason := _loading.missing(b)) is not None}
    usable = {n: b for n, b in named.items() if n not in missing}

    def point(name: str, dtype: str, mode: str) -> Point:
        def entries() -> list[dict[str, Any]]:
            tasks = models.network_tasks(plan, name, usable, dtype)
            return network_entries(tasks[models.MODES.index(mode)], clock, missing)

        return Point(name, plan.label, dtype, mode, entries)

    return [point(n, dtype, mode) for dtype in DTYPES for n in models.NETWORKS for mode in models.MODES]


def op_points(stage: str, clock: Clock, ceilings: Mapping[str, Any]) -> list[Point]:
    """The rows of all ops; the last one of every op in a dry run."""
    rows = measure.rows(measure.Plan(tuple(testing.specs()), DTYPES, tiny=not clock.cuda))
    if not clock.cuda:
        rows = list({row.op: row for row in rows}.values())
        peers.COMPILE |= {"backend": "aot_eager", "mode": None}

    def point(row: measure.Row) -> Point:
        return Point(row.op, row.size, row.dtype, row.mode, lambda: Group(row, stage, clock, ceilings).entries())

    return [point(row) for row in rows]


def measure_points(
    stage: str, record: Record, clock: Clock, points: Sequence[Point], done: set[str], deadline: float
) -> str:
    """Measures every row that is not done; returns how the stage ended."""
    points = [point for point in points if point.id not in done]
    for i, point in enumerate(points):
        if time.monotonic() > deadline:
            return f"out of time: {len(points) - i} of {len(points)} rows left, run again with --resume"
        record(kind="begin", group=point.id)
        keys = {key: getattr(point, key) for key in ("op", "size", "dtype", "mode")}
        try:
            entries = point.entries()
        except Exception as error:
            entries = [{"provider": "all", "correct": None, "seconds": None, "refused": _text(error)}]
        for entry in entries:
            record(kind="row", **{"stage": stage, "device": clock.name, **keys, **entry})
            text = f"refused: {entry['refused']}"
            if entry["seconds"]:
                text = f"{entry['seconds']['median'] * 1e6:10.1f} us"
                text += f" {entry['roof_fraction']:5.0%} of the roof" if entry["roof_fraction"] else ""
            print(f"{point.id} {entry['provider']:28} {text}"[:240], flush=True)
        gc.collect()
        if clock.cuda:
            torch.cuda.synchronize()  # raises when a kernel broke the context: the supervisor starts a new process
            torch.cuda.empty_cache()
    return "complete"


def measure_rows(stage: str, record: Record, clock: Clock, done: set[str], deadline: float) -> str:
    """Calibrates, measures every row of the ops that is not done, calibrates again; returns how the stage ended."""
    ceilings = calibrate(clock)
    record(kind="calibration", when="before", **ceilings)
    status = measure_points(stage, record, clock, op_points(stage, clock, ceilings), done, deadline)
    record(kind="calibration", when="after", **calibrate(clock))
    return status


def device_environment(clock: Clock) -> dict[str, Any]:
    """The environment block with the GPU's part."""
    env = environment.environment()["environment"]
    gpu: dict[str, Any] = {"name": clock.name, "fp32_precision": torch.backends.cuda.matmul.fp32_precision}
    if clock.cuda:
        p = torch.cuda.get_device_properties(0)
        gpu |= {"capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
        gpu |= {"memory": p.total_memory, "l2": p.L2_cache_size, "cuda": torch.version.cuda}
        gpu["driver"] = environment.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    with contextlib.suppress(ImportError):
        gpu["triton"] = __import__("triton").__version__
    return {**env, "dry": not clock.cuda, "gpu": gpu, "unavailable": _loading.unavailable}


def run(stage: str, path: Path, dry: bool, seconds: float) -> int:
    """Appends what a stage measures to its file of lines; every line is on the disk before the next measurement."""
    deadline = time.monotonic() + seconds
    if not dry and not torch.cuda.is_available():
        print("no GPU: use --dry", flush=True)
        return 2
    done = {line["group"] for line in lines(path) if line["kind"] == "begin"} if path.exists() else set()
    clock = Clock(dry)
    torch.backends.cudnn.benchmark = True  # convolutions among the peers are cuDNN's fastest
    if dry:
        torch.set_num_threads(1)  # shapes are too small for more
    record = partial(append, path)
    record(kind="environment", environment=device_environment(clock))
    status = "complete"
    if stage == "build-test":
        record(kind="calibration", when="before", **calibrate(clock, launches=True))
    elif stage == "models":
        status = measure_points(stage, record, clock, network_points(clock), done, deadline)
    else:
        status = measure_rows(stage, record, clock, done, deadline)
    record(kind="end", status=status)
    return 0
