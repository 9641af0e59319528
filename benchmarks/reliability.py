"""What the long reliability runs tried, for the README: `make fuzz`, `sanitize`, `mutants` and `dist-check`."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import environment

FOLDER = environment.RESULTS / "reliability"
WHEELS = environment.RESULTS / "wheel"


def read(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """What a run recorded, if it ever did."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def record(name: str, content: dict[str, Any], folder: Path = FOLDER) -> None:
    """Writes a run's figures beside the machine and the commit."""
    environment.write_json(folder / f"{name}.json", environment.environment() | content)


def add_round(run: str, seed: str, examples: dict[str, int], failed: int, folder: Path = FOLDER) -> None:
    """Adds a round of `make fuzz`; rounds of another ``run`` are forgotten."""
    before = read("fuzz", folder) or {}
    rounds = before["rounds"] if before.get("run") == run else []
    record("fuzz", {"run": run, "rounds": [*rounds, {"seed": seed, "examples": examples, "failed": failed}]}, folder)


def _fuzz(content: dict[str, Any]) -> tuple[str, str]:
    rounds = content["rounds"]
    totals: Counter[str] = Counter()
    for r in rounds:
        totals.update(r["examples"])
    minutes = (datetime.fromisoformat(content["environment"]["date"]).timestamp() - int(content["run"])) / 60
    tried = f"{len(rounds)} rounds in {minutes:.0f} minutes, {totals.total():,} random calls: "
    tried += ", ".join(f"{op} {count:,}" for op, count in sorted(totals.items()))
    return tried, f"{sum(r['failed'] for r in rounds)} tests failed"


def _sanitize(content: dict[str, Any]) -> tuple[str, str]:
    cases: Counter[str] = Counter()
    for case in content["cases"]:
        cases[case["sanitizer"]] += case["count"]
    tried = ", ".join(f"{count:,} calls under {sanitizer}" for sanitizer, count in cases.items())
    return f"{tried}: {', '.join(sorted({c['op'] for c in content['cases']}))}", f"{len(content['failures'])} failed"


def _mutants(content: dict[str, Any]) -> tuple[str, str]:
    ops = Counter(fault.partition("/")[0] for fault in content["faults"])
    tried = f"{content['planted']} planted faults: " + ", ".join(f"{op} {n}" for op, n in ops.items())
    if content["not_run"]:
        tried += f"; {len(content['not_run'])} more, of code that needs AVX512-BF16, not on this machine"
    return tried, f"{content['caught']} caught"


def _wheels(content: dict[str, Any]) -> tuple[str, str]:
    releases = ", ".join(sorted(r["torch"] for r in content["runs"]))
    return f"{content['wheel']['file']} beside PyTorch {releases}", "`fss-kernels verify` within bounds on each"


ROWS = {"make fuzz": ("fuzz", _fuzz), "make sanitize": ("sanitize", _sanitize), "make mutants": ("mutants", _mutants)}


def markdown(folder: Path = FOLDER, wheels: Path = WHEELS) -> str:
    """The table for the README; a run that was never recorded says so."""
    found: list[tuple[str, dict[str, Any] | None, Any]] = [(c, read(n, folder), f) for c, (n, f) in ROWS.items()]
    found += [("make dist-check", read(path.stem, wheels), _wheels) for path in sorted(wheels.glob("*.json"))]
    lines = ["| command | tried | outcome | when |", "|---|---|---|---|"]
    for command, content, cells in found:
        tried = content and content.get("planted", 0) + len(content.get("not_run", ()))
        if content is None or tried < content.get("whole", 0):
            lines.append(f"| `{command}` | no whole run is recorded yet | | |")
            continue
        env = content["environment"]
        changed = "" if env["clean"] else " (with local changes)"
        when = f"{env['date'][:10]}, commit {(env['commit'] or 'unknown')[:10]}{changed}, {env['cpu']}"
        lines.append(f"| `{command}` | {' | '.join(cells(content))} | {when} |")
    return "\n".join(lines)
