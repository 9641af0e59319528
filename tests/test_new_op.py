"""An op is added by its own folders and three lines: tests/toy is one, laid over a copy of the project.

Nothing else of the copy is edited, but for what `benchmarks readme` generates. Everything that is done with an op is
then done with this one: the generic tests, random calls, `verify`, a benchmark, ahead-of-time compilation and lint.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TOY, OP = Path(__file__).with_name("toy"), "toy_norm"
# The places for an op's files.
PLACES = (f"fss_kernels/ops/{OP}/", f"csrc/{OP}/", f"tests/ops/test_{OP}.py", f"tests/mutants/{OP}.toml")
# File -> a line of it, and what stands before the new op's own line there. The public module names an op twice.
LINES = (
    ("fss_kernels/ops/__init__.py", f"from fss_kernels.ops.{OP} import {OP} as {OP}\n", "\\Z"),
    ("fss_kernels/__init__.py", f"    {OP},\n", r"^\)$"),
    ("fss_kernels/__init__.py", f'    "{OP}",\n', r'^    "use_backend",$'),
    ("CHANGELOG.md", f"- `{OP}` on `reference` and `cpp`.\n", r"(?<=^### Added\n\n)"),
)
LEFT_OUT = (".git", ".venv", "build", "dist", "report", "gpu-wheels", "__pycache__", ".pytest_cache", ".hypothesis")
FEWEST = 300  # generic tests of an op


def files() -> list[str]:
    """Those of the new op, as paths in the project."""
    own = (path.relative_to(TOY).as_posix() for path in TOY.rglob("*") if path.is_file())
    return sorted(path for path in own if "__pycache__" not in path)


def run(copy: Path, *command: str | Path, **variables: str) -> str:
    """What a Python command prints in the copy; it must succeed."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("FSS_KERNELS_", "PYTEST_", "FUZZ_", "TRITON_"))}
    own |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *command], cwd=copy, env=own, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def add_the_op(copy: Path) -> None:
    """New files, and the lines."""
    for path in files():
        assert not (copy / path).exists()
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOY / path, copy / path)
    for name, line, before in LINES:
        text = (copy / name).read_text()
        place = re.search(before, text, re.MULTILINE)
        assert place, name
        (copy / name).write_text(text[: place.start()] + line + text[place.start() :])


def build(copy: Path, scratch: Path) -> None:
    """A library of the new op alone, which the copy gets in place of the one of all ops: those take minutes."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fss_kernels"):
        shutil.copytree(copy / name, scratch / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(copy / name, scratch / name)
    for source in scratch.glob("csrc/*/*_cpu.cpp"):
        if source.parent.name not in ("common", OP):
            source.unlink()
    run(scratch, "setup.py", "-q", "build_ext", "--inplace", FSS_KERNELS_BUILD="cpu")
    shutil.copy(scratch / "fss_kernels" / "_fss_cpu.so", copy / "fss_kernels")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the new op. A repository of its own: some tools ask git for the project's files."""
    folder = tmp_path_factory.mktemp("project") / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.rmtree(folder / TOY.relative_to(ROOT))
    add_the_op(folder)
    build(folder, tmp_path_factory.mktemp("build"))
    return folder


def passed(copy: Path, *arguments: str) -> tuple[list[str], str]:
    """Names of the tests that ran, all of which passed, and the output. Only for missing hardware a test is skipped."""
    report = copy / "tests.xml"
    output = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments)
    cases = ElementTree.parse(report).iter("testcase")
    return [str(case.get("name")) for case in cases if case.find("skipped") is None], output


def test_the_op_has_no_other_files():
    assert not [path for path in files() if not path.startswith(PLACES)]
    assert len({name for name, *_ in LINES}) == 3


def test_generic_tests_and_random_calls(copy):
    """All that are fast and not about documents of results, networks or the tests themselves."""
    left_out = [f"--ignore=tests/{name}" for name in ("models", "test_benchmarks.py", "test_new_op.py")]
    names, output = passed(copy, "-m", "not slow", "-k", OP, "tests", *left_out)
    assert len(names) >= FEWEST
    for test in ("test_matches_float64", "test_opcheck", "test_gradgradcheck", "test_public_signature", "test_loops"):
        assert any(name.startswith(test) for name in names), test
    examples = re.search(rf"examples .*\b{OP} (\d+)", output)
    assert examples and int(examples[1]) > 0


def test_verify(copy):
    output = run(copy, "-m", "fss_kernels", "verify", OP, "--no-interpreter")
    assert OP in output and "all within bounds" in output


def test_benchmark(copy):
    run(copy, "-m", "benchmarks", "run", "--quick", "--tiny", "--ops", OP, "--out", copy / "report" / "toy.csv")
    assert OP in (copy / "report" / "toy.csv").read_text()


def test_ahead_of_time(copy):
    """What is compiled is read from the ops' folders; this one has no Triton kernels."""
    names, _ = passed(copy, "-m", "slow", "-k", "not compiles", "tests/test_triton_aot.py")
    assert names


def test_planted_faults(copy):
    names, _ = passed(copy, "tests/mutants")
    assert f"test_every_op_has_faults[{OP}]" in names


def test_lint(copy):
    run(copy, "-m", "benchmarks", "readme")
    run(copy, "-m", "benchmarks", "readme", "--check")
    run(copy, "-m", "ruff", "check", "--no-cache", ".")
    run(copy, "-m", "ruff", "format", "--no-cache", "--check", ".")
    run(copy, "-m", "mypy")
    sources = (str(path) for path in (copy / "csrc" / OP).iterdir())
    formatter = Path(sys.executable).with_name("clang-format")
    assert subprocess.run([formatter, "--dry-run", "--Werror", *sources], cwd=copy).returncode == 0
