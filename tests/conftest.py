"""Shared by the batteries: every spec, every case, and memory that is NaN until it is written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from fss_kernels import _loading, testing

# What a machine, or a copy of the tree, may lack; a skip for any other reason is a failure.
MISSING = (
    "no GPU",
    "no second GPU",
    "no GPU with 40 GB of free memory",
    "no 8 GB of free memory",
    "no nvcc",
    "no AVX512-BF16",
    "no git history back to the results in JSON",
    "no committed results",
)
FUZZ_MINIMUM = 500  # examples of every op in one round of `make fuzz`
STARTED = int(time.time())
# Two kinds of process: the interpreter's tests run under TRITON_INTERPRET=1, everything else without it.
collect_ignore = ["toy"] if _loading.TRITON_INTERPRETED else ["interpreted", "toy"]  # toy: of test_new_op.py
SPECS = list(testing.specs().values())
# Inductor's cache does not know the schemas of ops: after a change it would run graphs that call the op as it was.
SCHEMAS = "".join(f"{raw._schema}" for spec in SPECS for raw in (spec.op.fwd, spec.op.bwd))
CACHE = f"fss_kernels-{os.getuid()}-{hashlib.sha256(SCHEMAS.encode()).hexdigest()[:12]}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), CACHE))
SAMPLES = [(spec, sample) for spec in SPECS for sample in spec.samples()]
SMALL = [(spec, s) for spec, s in SAMPLES if sum(t.numel() for t in s.tensors.values()) <= 4000]
BACKENDS = [(spec, backend) for spec in SPECS for backend in testing.backends(spec.op)]


def ids(value: object) -> str | None:
    """Test ids from specs, samples and dtypes."""
    if isinstance(value, testing.Spec):
        return value.name
    if isinstance(value, (testing.Sample, testing.BadInput)):
        return value.id
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def sample_of(spec: testing.Spec, id: str) -> testing.Sample:
    """The sample of a spec with this id."""
    return next(s for s in spec.samples() if s.id == id)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every allocation of PyTorch, in Python and in C++, starts as NaN: an element never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def recorded_ops() -> Callable[[], list[tuple[str, tuple]]]:
    """A context manager factory that records every fss op called: (name, arguments)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[str, tuple]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "fss":
                self.calls.append((func.name(), args))
            return func(*args, **(kwargs or {}))

    return Recorder


def fuzzed(terminalreporter) -> Counter[str]:  # type: ignore[no-untyped-def]
    """Examples that tests/fuzz tried, by op."""
    total: Counter[str] = Counter()
    for report in terminalreporter.getreports(""):
        total.update(dict(getattr(report, "user_properties", ())).get("examples", {}))
    return total


def pytest_terminal_summary(terminalreporter) -> None:  # type: ignore[no-untyped-def]
    """Skips by reason: only missing hardware or nvcc may skip a test."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        reasons[reason] = reasons.get(reason, 0) + 1
    terminalreporter.write_line(f"skips: {reasons or 'none'}")
    if total := fuzzed(terminalreporter):
        seed = terminalreporter.config.getoption("--hypothesis-seed")
        counts = ", ".join(f"{op} {count}" for op, count in sorted(total.items()))
        terminalreporter.write_line(f"examples (--hypothesis-seed={seed}): {counts}")


def pytest_sessionfinish(session, exitstatus) -> None:  # type: ignore[no-untyped-def]
    """A skip for another reason than missing hardware is a failure; so is `make fuzz` with few examples of an op.

    FUZZ_OUT names the file to which a round of `make fuzz` adds a line of JSON: what it tried.
    """
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for report in reporter.stats.get("skipped", []) if reporter else []:
        if report.longrepr[2].removeprefix("Skipped: ") not in MISSING:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if reporter and "FUZZ_EXAMPLES" in os.environ and not hasattr(session.config, "workerinput"):
        total = fuzzed(reporter)
        few = [spec.name for spec in SPECS if total[spec.name] < FUZZ_MINIMUM]
        if few:
            reporter.write_line(f"fewer than {FUZZ_MINIMUM} examples: {', '.join(few)}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if "FUZZ_OUT" in os.environ:
            seed, failed = session.config.getoption("--hypothesis-seed"), len([*reporter.stats.get("failed", []), *few])
            tried = {"start": STARTED, "seed": seed, "examples": dict(sorted(total.items())), "failed": failed}
            with open(os.environ["FUZZ_OUT"], "a") as file:
                file.write(json.dumps(tried) + "\n")
