"""Applies every planted fault to a copy of the project and runs the tests on it: each must be caught.

    python tests/mutants/run.py [name or op ...]        (make mutants)

A mutant is an entry of tests/mutants/<op>.toml (faults.py). Prints the test that caught it; exits non-zero when one
survives.
The committed score keeps that test of every fault, as each is done. The next run tries it first, then those of other
faults of the op: only a fault that none of them catches costs the whole suite. In unchanged sources a fault that was
caught is not planted again: delete the score to plant them all.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.contrib.concurrent import thread_map

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import faults  # noqa: E402

from benchmarks import environment, reliability  # noqa: E402
from fss_kernels import _loading  # noqa: E402

Fault = faults.Fault

# What a compiled or Python fault should hit first; compile and installation tests do not look at values.
TESTS = ("tests/ops", "tests/test_numerics.py", "tests/test_determinism.py", "tests/test_gradients.py")
LATER = ("tests/test_offsets.py", "tests/test_transforms.py")
LIKELY = 12  # tests that caught other faults of an op, to try before all of them
NETWORKS = "models"  # faults of fss_models: Python only, with tests of their own
# Where there is no GPU these alone run the kernels of Triton (in its interpreter) and of CUDA (on a CPU).
INTERPRETED, EMULATED = "tests/interpreted", "tests/test_cores.py::test_cuda_kernels_on_a_cpu"
SECONDS = 3600  # of the tests of one fault, or it loops forever
PROGRAM = ("tests/mutants/run.py", "tests/mutants/faults.py")
ALL = faults.load()


def prepare(directory: str, compiled: bool) -> Path:
    """A copy of the project with its compiled library: a fault then rebuilds only the sources it touches. Without
    ``compiled`` it keeps the library of the project."""
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "report", "__pycache__", ".*_cache")
    copy = Path(directory, "project")
    shutil.copytree(ROOT, copy, ignore=ignored)
    if compiled:
        # a fault is one at every level of optimisation; this one compiles in half the time
        setup = copy / "setup.py"
        before, found, after = setup.read_text().partition('"-O2", "-fpeel-loops"')
        assert found, "setup.py: no -O2 to replace"
        setup.write_text(f'{before}"-O1"{after}')
        # of an op's variants the one that this processor runs
        header = copy / "csrc" / "common" / "each_isa.h"
        own = f"::fss::{(_loading.cpu_isa() or 'generic').partition('_')[0]}::__VA_ARGS__"
        header.write_text(re.sub(r"::fss::\w+::__VA_ARGS__", own, header.read_text()))
        build(copy)
    return copy


def variables(copy: Path) -> dict[str, str]:
    """For a process that uses the copy, one of as many as there are processors."""
    own = {"PYTHONPATH": str(copy), "FSS_KERNELS_BUILD": "cpu", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | own


def build(copy: Path) -> None:
    """The CPU library of the copy."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=copy, env=variables(copy), check=True, capture_output=True)


def catch(fault: Fault, copy: Path, likely: Sequence[str] = ()) -> str | None:
    """The id of the first test that fails on the mutant, or None; tests that are ``likely`` to catch it go first."""
    before = {path: path.read_bytes() for path in (copy / fault.file, *copy.glob("fss_kernels/*.so"))}
    fault.plant(copy)
    try:
        only = only_tests(fault)
        if fault.file.startswith("csrc/") and only != EMULATED:
            build(copy)
        others = {f.op for f in ALL} - {fault.op}
        interpreted = [*every(INTERPRETED), "-k", f"not ({' or '.join(sorted(others))})"]
        calls = [{INTERPRETED: interpreted, EMULATED: [f"{EMULATED}[{fault.op}]"], "": suites({fault.op})[0]}[only]]
        own = Path("tests", "models", f"test_{Path(fault.file).name}")
        if fault.op == NETWORKS and (copy / own).is_file():
            calls.insert(0, [str(own)])
        if likely:
            calls.insert(0, [*likely])
        return next((found for call in calls if (found := failure(copy, call))), None)
    finally:
        for path, content in before.items():  # or faults in Python would run on the last one's kernels
            path.write_bytes(content)


def only_tests(fault: Fault) -> str:
    """The tests that alone run the faulty code, "" for faults in what the others run."""
    return INTERPRETED if "triton" in fault.file else EMULATED if fault.file.endswith((".cu", ".cuh")) else ""


def every(only: str) -> list[str]:
    """All of these tests; of the interpreter's those that run on every change."""
    return [only, "-m", "not long"] if only == INTERPRETED else [only]


def suites(ops: set[str]) -> list[list[str]]:
    """What to run for faults in these ops, a call of pytest each."""
    own = ops - {NETWORKS}
    return [[*TESTS, *LATER, "-k", selection(own)]] * bool(own) + [["tests/models"]] * (NETWORKS in ops)


def selection(ops: set[str]) -> str:
    """Other ops' cases are not about a fault; two files have tests without an op's name."""
    return " or ".join([*sorted(ops), "test_gradients", "test_offsets"])


def failure(copy: Path, tests: list[str], processes: int = 0) -> str | None:
    """The first test that fails in the copy, "timeout" where one process takes too long, or None."""
    own = variables(copy) | ({"TRITON_INTERPRET": "1"} if tests[0].startswith(INTERPRETED) else {})
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    pytest += ["-n", str(processes), "--dist", "worksteal"] * bool(processes)
    try:
        limit = None if processes else SECONDS
        result = subprocess.run(pytest, cwd=copy, env=own, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "timeout"
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if result.returncode not in (0, 1) or (result.returncode == 1 and not failed):
        crashed = -result.returncode in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
        return f"crash: pytest ended by {signal.Signals(-result.returncode).name}" if crashed else None
    return failed[0].split(" - ")[0].split(" ", 1)[1] if failed else None


def runs_here(fault: Fault) -> bool:
    """Whether this processor can run the faulty code."""
    return fault.isa in (None, _loading.cpu_isa())


def planted_at(commit: str, op: str) -> list[Fault]:
    """The faults of an op at a commit, none where it had no such file."""
    text = environment.output("git", "show", f"{commit}:tests/mutants/{op}.toml")
    return faults.parse(op, text) if text else []


def sources(op: str) -> list[str]:
    """What the faults of an op, or of the networks, depend on."""
    return [*environment.sources(), "fss_models"] if op == NETWORKS else environment.sources(op)


class Score:
    """The committed outcome of every fault, written as each is done.

    A run that was interrupted goes on: a fault that was caught in the very same sources is not planted again.
    """

    def __init__(self) -> None:
        known: dict[str, Any] = reliability.read("mutants") or {"faults": {}}
        planted = {fault.name for fault in ALL}
        self.whole = len(planted)
        self.known: dict[str, str | None] = {k: v for k, v in known["faults"].items() if k in planted}
        run: dict[str, Any] = known.get("environment", {})
        known_good = run.get("clean") and environment.unchanged(run["commit"], *PROGRAM)
        ops = {fault.op for fault in ALL} if known_good else set()
        ops = {op for op in ops if environment.unchanged(run["commit"], *sources(op))}
        same = {fault.name for op in ops for fault in planted_at(run["commit"], op) if fault in ALL}
        self.faults: dict[str, str | None] = {k: v for k, v in self.known.items() if v and k in same}
        # the first of them was recorded after every test had passed without a fault
        self.tests_pass = bool(self.faults) and environment.unchanged(run["commit"], "tests", ":(exclude)tests/mutants")
        self.not_run = sorted({f.name for f in ALL if not runs_here(f)} - self.faults.keys())

    def likely(self, fault: Fault) -> list[str]:
        """The test that caught a fault, then those of its op that caught others, the most frequent first."""
        known = self.known | self.faults
        own = known.get(fault.name)
        found = Counter(t for k, t in known.items() if t and k.startswith(f"{fault.op}/"))
        tests = [own] * bool(own) + [test for test, _ in found.most_common(LIKELY) if test != own]
        there = (t for t in tests if Path(ROOT, t.partition("::")[0]).is_file())  # a crash or timeout has no test
        only = only_tests(fault)
        return [t for t in there if t.startswith(only or TESTS + LATER + (f"tests/{NETWORKS}",))]

    def record(self, fault: Fault, caught: str | None) -> None:
        """Adds an outcome."""
        self.faults[fault.name] = caught
        counts = {"whole": self.whole, "planted": len(self.faults), "caught": sum(map(bool, self.faults.values()))}
        outcomes = {"faults": dict(sorted(self.faults.items())), "not_run": self.not_run}
        reliability.record("mutants", counts | outcomes)


def main(names: list[str]) -> int:
    """Runs the mutants of those names or ops, or all."""
    if messages := faults.unfit(ALL):
        print("mutants:", *messages, sep="\n")
        return 1
    chosen = [fault for fault in ALL if not names or {fault.id, fault.op, fault.name} & {*names}]
    score, lock = Score(), threading.Lock()
    outcomes = {} if names else score.faults.copy()
    left = [fault for fault in chosen if fault.name not in outcomes and runs_here(fault)]
    with contextlib.ExitStack() as stack:
        workers = min(os.cpu_count() or 1, max(1, len(left)))
        directories = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(workers)]
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        ops = {fault.op for fault in left}
        compiled = [bool(ops - {NETWORKS})] * workers
        for copy in thread_map(prepare, directories, compiled, max_workers=workers, desc="copies"):
            copies.put(copy)
        # no fault at all: everything must pass, or every fault would be "caught"
        copy, failed = copies.get(), None
        if not score.tests_pass:
            failed = next((f for suite in suites(ops) if (f := failure(copy, suite, processes=workers))), None)
        for only in sorted({only_tests(fault) for fault in left} - {""}):
            tried = sorted({test for fault in left if only_tests(fault) == only for test in score.likely(fault)})
            for call in (every(only), tried):
                if call and not score.tests_pass and failed is None:
                    failed = failure(copy, call, processes=workers)
        if failed is not None:
            print(f"mutants: the tests fail without any fault: {failed}")
            return 1
        copies.put(copy)

        def run(fault: Fault) -> str | None:
            copy = copies.get()
            try:
                with lock:
                    likely = score.likely(fault)
                caught = catch(fault, copy, likely)
                with lock:
                    if not names:  # a few faults are no score
                        score.record(fault, caught)
                return caught
            finally:
                copies.put(copy)

        caught = thread_map(run, left, max_workers=workers, desc="mutants")
        outcomes |= zip((fault.name for fault in left), caught, strict=True)
    table = Table("op", "planted fault", "caught by")
    for fault in chosen:
        found = outcomes.get(fault.name, f"not run: this processor has no {fault.isa}")
        table.add_row(fault.op, fault.id, escape(found) if found else "[red]SURVIVED[/red]")
    Console(width=180).print(table)
    survived = [*outcomes.values()].count(None)
    print(f"mutants: {len(outcomes)} planted, {len(outcomes) - survived} caught, {survived} survived")
    return 1 if survived or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
