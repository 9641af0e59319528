"""What the long reliability runs tried: `make fuzz`, `sanitize`, `mutants` and `dist-check`."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import environment, storage

# What each run lists, and the name of the list in its content.
LISTS = {"fuzz": "rounds", "sanitize": "cases", "mutants": "faults", "wheel": "runs"}


def _stored(name: str, content: dict[str, Any]) -> dict[str, Any]:
    """A record as a result file holds it: planted faults have a row each."""
    rest = {key: value for key, value in content.items() if key not in (LISTS[name], "not_run")}
    if name != "mutants":
        return {**rest, "rows": content[LISTS[name]]}
    rows = [{"fault": fault, "planted": True, "caught_by": test} for fault, test in content["faults"].items()]
    return {**rest, "rows": rows + [{"fault": fault, "planted": False} for fault in content["not_run"]]}


def _content(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """What `_stored` got."""
    content = {key: value for key, value in results.items() if key not in ("rows", "file", "machine", "name")}
    if name != "mutants":
        return {**content, LISTS[name]: results["rows"]}
    faults = {row["fault"]: row["caught_by"] for row in results["rows"] if row["planted"]}
    return {**content, "faults": faults, "not_run": [row["fault"] for row in results["rows"] if not row["planted"]]}


def read(name: str) -> dict[str, Any] | None:
    """What a run recorded last, on whichever machine; None if it never did."""
    found = [results for results in storage.committed("reliability") if results["name"] == name]
    return _content(name, found[-1]) if found else None


def record(name: str, content: dict[str, Any]) -> None:
    """Writes a run's figures beside the machine and the commit."""
    storage.write(storage.here("reliability"), name, _stored(name, environment.environment() | content))


def wheel_log(platform: str) -> dict[str, Any] | None:
    """The log of the newest wheel of a platform."""
    results = storage.run(storage.RESULTS / "wheel" / f"{platform}.csv", "wheel")
    return results and _content("wheel", results)


def record_wheel(platform: str, content: dict[str, Any]) -> Path:
    """Writes the log of a wheel; returns the file."""
    path = storage.RESULTS / "wheel" / f"{platform}.csv"
    storage.write(path, "wheel", _stored("wheel", content))
    return path


def record_file(kind: str, file: Path) -> None:
    """Adds what a long run wrote. The runs themselves write plain files and know nothing of results.

    Raises:
        ValueError: unknown kind.
    """
    text = file.read_text()
    if kind == "fuzz":
        rounds = [json.loads(line) for line in text.splitlines()]
        for r in rounds:
            add_round(str(rounds[0]["start"]), r["seed"], r["examples"], r["failed"])
    elif kind == "sanitize":
        record("sanitize", json.loads(text))
    elif kind == "wheel":
        _add_to_log(json.loads(text))
    else:
        raise ValueError(f"kind must be fuzz, sanitize or wheel, got {kind!r}")


def _add_to_log(content: dict[str, Any]) -> None:
    """Adds runs to the log of their wheel; a new wheel starts a new log."""
    platform = Path(content["wheel"]["file"]).stem.rpartition("-")[2]
    before = wheel_log(platform) or {}
    kept = before["runs"] if before.get("wheel") == content["wheel"] else []
    new = {(r["torch"], r["python"]) for r in content["runs"]}
    kept = [r for r in kept if (r["torch"], r["python"]) not in new]
    record_wheel(platform, environment.environment() | {**content, "runs": [*kept, *content["runs"]]})


def add_round(run: str, seed: str, examples: dict[str, int], failed: int) -> None:
    """Adds a round of `make fuzz`; rounds of another ``run`` are forgotten."""
    before = read("fuzz") or {}
    rounds = before["rounds"] if before.get("run") == run else []
    record("fuzz", {"run": run, "rounds": [*rounds, {"seed": seed, "examples": examples, "failed": failed}]})


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


def markdown() -> str:
    """The table for docs/reliability.md; a run that was never recorded says so."""
    found: list[tuple[str, dict[str, Any] | None, Any]] = [(c, read(n), f) for c, (n, f) in ROWS.items()]
    found += [("make dist-check", _content("wheel", log), _wheels) for log in storage.committed("wheel")]
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
