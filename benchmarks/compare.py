"""Two results side by side, of files or of revisions that are built and measured in a worktree of their own.

Times of two runs are not comparable on a machine whose neighbours come and go; shares of the roof measured between the
same rounds are, and so are ratios to the fastest peer. The verdict is on the share of the roof.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import environment, storage
from benchmarks.measure import OURS
from benchmarks.targets import fastest_peer, row_entries

KEYS = ("op", "size", "dtype", "mode")


@dataclass(frozen=True)
class Change:
    """One row in both results; ``slowdown``: how much less of the roof the second one reaches."""

    row: str
    seconds: tuple[float, float]
    slowdown: float
    fastest: tuple[tuple[str, float] | None, tuple[str, float] | None]  # peer, its time over ours


def measured(source: str, arguments: list[str]) -> dict[str, Any]:
    """The rows of a result file, of all its runs, or what a git revision measures now.

    Args:
        source: path of a result file, or a revision.
        arguments: of `python -m benchmarks run`, for a revision.
    Raises:
        ValueError: neither a file nor a revision, or a revision that cannot be built or measured.
    """
    if Path(source).is_file():
        return _together(Path(source))
    if not environment.output("git", "rev-parse", "--verify", "--quiet", f"{source}^{{commit}}"):
        raise ValueError(f"compare: {source} is neither a result file nor a revision")
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder, "tree"), Path(folder, "results.csv")

        def step(*command: str, **env: str) -> None:
            done = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), **env})
            if done.returncode:
                raise ValueError(f"compare: {source}: `{' '.join(command)}` ended with code {done.returncode}")

        subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, source], cwd=environment.ROOT, check=True)
        try:
            if not (tree / "benchmarks" / "storage.py").exists():
                raise ValueError(f"compare: {source} writes results in JSON, which this program does not read")
            for library in ("cpu", "native"):
                step(sys.executable, "setup.py", "-q", "build_ext", "--inplace", FSS_KERNELS_BUILD=library)
            step(sys.executable, "-m", "benchmarks", "run", *arguments, "--out", str(out))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=environment.ROOT)
        return _together(out)


def _together(path: Path) -> dict[str, Any]:
    """The rows of all runs of a file."""
    return {"rows": [row for results in storage.read(path).values() for row in results["rows"]]}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The rows that were timed in both results."""
    found = []
    for key in dict.fromkeys(tuple(r[k] for k in KEYS) for r in before["rows"]):
        sides = [row_entries(results, dict(zip(KEYS, key, strict=True))) for results in (before, after)]
        ours = [side.get(OURS) for side in sides]
        if any(e is None or not e["seconds"] or not e["roof_fraction"] for e in ours):
            continue
        a, b = (e for e in ours if e is not None)
        peers = [fastest_peer(side) for side in sides]
        names = [(p["provider"], p["ratio_to_ours"]) if p else None for p in peers]
        seconds = (a["seconds"]["median"], b["seconds"]["median"])
        found.append(Change(" ".join(key), seconds, a["roof_fraction"] / b["roof_fraction"], (names[0], names[1])))
    return found


def table(found: list[Change], threshold: float, titles: tuple[str, str]) -> Table:
    """The comparison for people."""
    result = Table("row", "ms", "of the roof, before ÷ after", "", "fastest peer, its time ÷ ours",
                   title=f"{titles[0]} -> {titles[1]}")  # fmt: skip
    for c in found:
        verdict = (
            "[red]SLOWER[/]" if c.slowdown > threshold else "[green]faster[/]" if c.slowdown < 1 / threshold else ""
        )
        peers = " -> ".join(f"{p[0]} {p[1]:.2f}" if p else "-" for p in c.fastest)
        times = " -> ".join(f"{s * 1e3:.2f}" for s in c.seconds)
        result.add_row(c.row, times, f"{c.slowdown:.2f}", verdict, peers)
    return result
