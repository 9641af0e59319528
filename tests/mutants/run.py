"""Applies every planted fault to a copy of the project and runs the tests on it: each must be caught.

    python tests/mutants/run.py [name ...]        (make mutants)

A mutant is a patch under tests/mutants/<op>/. Prints the test that caught it; exits non-zero when one survives.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.contrib.concurrent import thread_map

ROOT = Path(__file__).parents[2]
CONTROL = Path("control")  # no fault at all: everything must pass, or every fault would be "caught"
# What a compiled or Python fault should hit first; compile and installation tests do not look at values.
TESTS = ("tests/ops", "tests/test_numerics.py", "tests/test_determinism.py", "tests/test_gradients.py")
LATER = ("tests/test_offsets.py", "tests/test_transforms.py")


def catch(patch: Path) -> str | None:
    """The id of the first test that fails on the mutant, or None."""
    with tempfile.TemporaryDirectory() as directory:
        return _catch(patch, Path(directory))


def _catch(patch: Path, directory: Path) -> str | None:
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "report", "__pycache__", ".*_cache")
    copy = directory / "project"
    shutil.copytree(ROOT, copy, ignore=ignored)
    if patch != CONTROL:
        subprocess.run(["patch", "-p1", "-s", "-i", patch], cwd=copy, check=True)
    environment = os.environ | {"PYTHONPATH": str(copy), "FSS_KERNELS_BUILD": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    first_line = patch.read_text().partition("\n")[0] if patch != CONTROL else "csrc/"
    if "csrc/" in first_line:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=copy, env=environment, check=True, capture_output=True)
    tests = [*TESTS, *LATER]
    if patch != CONTROL:  # other ops' cases are not about this fault; these two files have tests without an op's name
        tests += ["-k", f"{patch.parent.name} or test_gradients or test_offsets"]
    if "triton_kernels" in first_line:
        environment["TRITON_INTERPRET"] = "1"
        tests = ["tests/interpreted"]
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(pytest, cwd=copy, env=environment, capture_output=True, text=True)
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if result.returncode not in (0, 1) or (result.returncode == 1 and not failed):
        crashed = -result.returncode in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
        return f"crash: pytest ended by {signal.Signals(-result.returncode).name}" if crashed else None
    return failed[0].split(" - ")[0].split(" ", 1)[1] if failed else None


def main(names: list[str]) -> int:
    """Runs the mutants of those names, or all."""
    patches = sorted(p for p in ROOT.glob("tests/mutants/*/*.patch") if not names or p.stem in names)
    if (failed := catch(CONTROL)) is not None:
        print(f"mutants: the tests fail without any fault: {failed}")
        return 1
    table = Table("op", "planted fault", "caught by")
    survived = 0
    for patch, caught in zip(
        patches, thread_map(catch, patches, max_workers=os.cpu_count(), desc="mutants"), strict=True
    ):
        survived += caught is None
        table.add_row(patch.parent.name, patch.stem, escape(caught) if caught else "[red]SURVIVED[/red]")
    Console(width=180).print(table)
    print(f"mutants: {len(patches)} planted, {len(patches) - survived} caught, {survived} survived")
    return 1 if survived or not patches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
