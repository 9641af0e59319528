"""Applies every planted fault to a copy of the project and runs the tests on it: each must be caught.

    python tests/mutants/run.py [name or op ...]        (make mutants)

A mutant is a patch under tests/mutants/<op>/. Prints the test that caught it; exits non-zero when one survives.
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
from benchmarks import environment, reliability  # noqa: E402
from fss_kernels import _loading  # noqa: E402

# What a compiled or Python fault should hit first; compile and installation tests do not look at values.
TESTS = ("tests/ops", "tests/test_numerics.py", "tests/test_determinism.py", "tests/test_gradients.py")
LATER = ("tests/test_offsets.py", "tests/test_transforms.py")
LIKELY = 12  # tests that caught other faults of an op, to try before all of them
NETWORKS = "models"  # faults of fss_models: Python only, with tests of their own
# Where there is no GPU these alone run the kernels of Triton (in its interpreter) and of CUDA (on a CPU).
INTERPRETED, EMULATED = "tests/interpreted", "tests/test_cores.py::test_cuda_kernels_on_a_cpu"
SECONDS = 3600  # of the tests of one fault, or it loops forever


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


def catch(patch: Path, copy: Path, likely: Sequence[str] = ()) -> str | None:
    """The id of the first test that fails on the mutant, or None; tests that are ``likely`` to catch it go first."""
    faulty = copy / first_line(patch).removeprefix("--- a/")
    source = faulty.read_bytes()  # taken back, a patch may find another place to undo
    libraries = {path: path.read_bytes() for path in copy.glob("fss_kernels/*.so")}
    subprocess.run(["patch", "-p1", "-s", "-F0", "-i", patch], cwd=copy, check=True)
    try:
        op, only = patch.parent.name, only_tests(patch)
        if "csrc/" in first_line(patch) and only != EMULATED:
            build(copy)
        others = {p.parent.name for p in ROOT.glob("tests/mutants/*/*.patch")} - {op}
        interpreted = [INTERPRETED, "-k", f"not ({' or '.join(sorted(others))})"]
        calls = [{INTERPRETED: interpreted, EMULATED: [f"{EMULATED}[{op}]"], "": suites({op})[0]}[only]]
        own = Path("tests", "models", f"test_{Path(first_line(patch)).name}")
        if op == NETWORKS and (copy / own).is_file():
            calls.insert(0, [str(own)])
        if likely:
            calls.insert(0, [*likely])
        return next((found for call in calls if (found := failure(copy, call))), None)
    finally:
        faulty.write_bytes(source)
        for path, library in libraries.items():  # or faults in Python would run on the last one's kernels
            path.write_bytes(library)


def first_line(patch: Path) -> str:
    """Names the file that the patch changes."""
    return patch.read_text().partition("\n")[0]


def only_tests(patch: Path) -> str:
    """The tests that alone run the faulty code, "" for faults in what the others run."""
    line = first_line(patch)
    return INTERPRETED if "triton_kernels" in line else EMULATED if "_cuda.cu" in line else ""


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


def runs_here(patch: Path) -> bool:
    """Whether this processor can run the faulty code: the screen of dense_cosine needs AVX512-BF16."""
    return not patch.stem.startswith("screen-") or _loading.cpu_isa() == "avx512_bf16"


def name(patch: Path) -> str:
    """Of a fault in the score: op/fault."""
    return f"{patch.parent.name}/{patch.stem}"


def sources(op: str) -> list[str]:
    """What the faults of an op, or of the networks, depend on."""
    return [*environment.sources(), "fss_models"] if op == NETWORKS else environment.sources(op)


class Score:
    """The committed outcome of every fault, written as each is done.

    A run that was interrupted goes on: a fault that was caught in the very same sources is not planted again.
    """

    def __init__(self) -> None:
        known: dict[str, Any] = reliability.read("mutants") or {"faults": {}}
        patches = [*ROOT.glob("tests/mutants/*/*.patch")]
        planted = {name(p) for p in patches}
        self.whole = len(planted)
        self.known: dict[str, str | None] = {k: v for k, v in known["faults"].items() if k in planted}
        run: dict[str, Any] = known.get("environment", {})
        known_good = run.get("clean") and environment.unchanged(run["commit"], "tests/mutants/run.py")
        ops = {p.parent.name for p in patches} if known_good else set()
        ops = {op for op in ops if environment.unchanged(run["commit"], *sources(op))}
        same = {name(p) for p in patches if p.parent.name in ops and environment.unchanged(run["commit"], str(p))}
        self.faults: dict[str, str | None] = {k: v for k, v in self.known.items() if v and k in same}
        # the first of them was recorded after every test had passed without a fault
        self.tests_pass = bool(self.faults) and environment.unchanged(run["commit"], "tests", ":(exclude)tests/mutants")
        self.not_run = sorted({name(p) for p in patches if not runs_here(p)} - self.faults.keys())

    def likely(self, patch: Path) -> list[str]:
        """The test that caught a fault, then those of its op that caught others, the most frequent first."""
        known = self.known | self.faults
        own = known.get(name(patch))
        found = Counter(t for k, t in known.items() if t and k.startswith(f"{patch.parent.name}/"))
        tests = [own] * bool(own) + [test for test, _ in found.most_common(LIKELY) if test != own]
        there = (t for t in tests if Path(ROOT, t.partition("::")[0]).is_file())  # a crash or timeout has no test
        only = only_tests(patch)
        return [t for t in there if t.startswith(only or TESTS + LATER + (f"tests/{NETWORKS}",))]

    def record(self, patch: Path, caught: str | None) -> None:
        """Adds an outcome."""
        self.faults[name(patch)] = caught
        counts = {"whole": self.whole, "planted": len(self.faults), "caught": sum(map(bool, self.faults.values()))}
        faults = {"faults": dict(sorted(self.faults.items())), "not_run": self.not_run}
        reliability.record("mutants", counts | faults)


def main(names: list[str]) -> int:
    """Runs the mutants of those names or ops, or all."""
    patches = sorted(p for p in ROOT.glob("tests/mutants/*/*.patch") if not names or {p.stem, p.parent.name} & {*names})
    score, lock = Score(), threading.Lock()
    outcomes = {} if names else score.faults.copy()
    left = [p for p in patches if name(p) not in outcomes and runs_here(p)]
    with contextlib.ExitStack() as stack:
        workers = min(os.cpu_count() or 1, max(1, len(left)))
        directories = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(workers)]
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        ops = {p.parent.name for p in left}
        compiled = [bool(ops - {NETWORKS})] * workers
        for copy in thread_map(prepare, directories, compiled, max_workers=workers, desc="copies"):
            copies.put(copy)
        # no fault at all: everything must pass, or every fault would be "caught"
        copy, failed = copies.get(), None
        if not score.tests_pass:
            failed = next((f for suite in suites(ops) if (f := failure(copy, suite, processes=workers))), None)
        for only in sorted({only_tests(p) for p in left} - {""}):
            if not score.tests_pass and failed is None:
                failed = failure(copy, [only], processes=workers)
        if failed is not None:
            print(f"mutants: the tests fail without any fault: {failed}")
            return 1
        copies.put(copy)

        def run(patch: Path) -> str | None:
            copy = copies.get()
            try:
                with lock:
                    likely = score.likely(patch)
                caught = catch(patch, copy, likely)
                with lock:
                    if not names:  # a few faults are no score
                        score.record(patch, caught)
                return caught
            finally:
                copies.put(copy)

        outcomes |= zip(map(name, left), thread_map(run, left, max_workers=workers, desc="mutants"), strict=True)
    table = Table("op", "planted fault", "caught by")
    for patch in patches:
        caught = outcomes.get(name(patch), "not run: this processor has no AVX512-BF16")
        table.add_row(patch.parent.name, patch.stem, escape(caught) if caught else "[red]SURVIVED[/red]")
    Console(width=180).print(table)
    survived = [*outcomes.values()].count(None)
    print(f"mutants: {len(outcomes)} planted, {len(outcomes) - survived} caught, {survived} survived")
    return 1 if survived or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
