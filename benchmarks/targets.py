"""Compares a result file with the lines of targets.toml."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.measure import OURS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path(__file__).with_name("targets.toml")


@dataclass(frozen=True)
class Outcome:
    """One line compared with a result: ``state`` is "pass", "SHORT" or "MISSING"."""

    line: dict[str, Any]
    state: str
    measured: float | None = None
    roof: float | None = None
    fastest: str = ""


def load(path: Path = PATH) -> list[dict[str, Any]]:
    """The lines of a targets file."""
    return tomllib.loads(path.read_text())["line"]


def row_entries(results: dict[str, Any], key: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Provider -> entry of the row with the op, size, dtype and mode of ``key``."""
    names = ("op", "size", "dtype", "mode")
    return {r["provider"]: r for r in results["rows"] if all(r[n] == key[n] for n in names)}


def fastest_peer(entries: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The entry of the fastest peer that is correct and was timed."""
    timed = [e for e in entries.values() if e["ratio_to_ours"] is not None and e["provider"] != OURS and e["correct"]]
    return min(timed, key=lambda e: e["ratio_to_ours"], default=None)


def version_of(results: dict[str, Any], op: str, name: str) -> str:
    """The recorded version of a peer."""
    return next((p["version"] or "" for p in results["peers"] if (p["op"], p["name"]) == (op, name)), "")


def evaluate(line: dict[str, Any], results: dict[str, Any]) -> Outcome:
    """One line against one result file."""
    entries = row_entries(results, line)
    ours, fastest = entries.get(OURS), fastest_peer(entries)
    if ours is None or ours["seconds"] is None or not ours["correct"]:
        return Outcome(line, "MISSING")
    metric, measured = line["metric"], None
    if metric == "roof":
        measured = ours["roof_fraction"]
    elif metric == "extra_bytes":
        measured = ours["extra_bytes"] / ours["scratch_bytes"] if ours["extra_bytes"] is not None else None
    elif metric.startswith("memory:"):  # a peer's over ours
        entry = entries.get(metric.removeprefix("memory:"))
        if entry is not None and entry["correct"] and entry["extra_bytes"] is not None and ours["extra_bytes"]:
            measured = entry["extra_bytes"] / ours["extra_bytes"]
    elif metric.startswith("own:"):  # our time over that of another of our rows, "own:op/size"
        op, _, size = metric.removeprefix("own:").partition("/")
        other = row_entries(results, {**line, "op": op, "size": size}).get(OURS)
        if other is not None and other["seconds"] is not None and other["correct"]:
            measured = ours["seconds"]["median"] / other["seconds"]["median"]
    elif metric.startswith("peer:"):
        entry = fastest if metric == "peer:fastest" else entries.get(metric.removeprefix("peer:"))
        measured = entry["ratio_to_ours"] if entry is not None and entry["correct"] else None
    else:
        raise ValueError(f"targets: unknown metric {metric!r}")
    name = f"{fastest['provider']} ({version_of(results, line['op'], fastest['provider'])})" if fastest else ""
    if measured is None:
        return Outcome(line, "MISSING", None, ours["roof_fraction"], name)
    passed = measured >= line["at_least"] if "at_least" in line else measured <= line["at_most"]
    return Outcome(line, "pass" if passed else "SHORT", measured, ours["roof_fraction"], name)


def bound(line: dict[str, Any]) -> str:
    """What a line promises, for people."""
    return (
        f"{line['metric']} ≥ {line['at_least']:g}" if "at_least" in line else f"{line['metric']} ≤ {line['at_most']:g}"
    )


def exit_code(outcomes: list[Outcome], results: dict[str, Any], allow_short: bool) -> int:
    """1 for a line without a measurement, a run that failed, a missing peer, and a short line unless allowed."""
    states = {o.state for o in outcomes}
    missing_peer = any(p["error"] is not None and not p["optional"] for p in results["peers"])
    failed = not outcomes or "MISSING" in states or missing_peer or bool(results["failures"])
    return int(failed or ("SHORT" in states and not allow_short))


def table(outcomes: list[Outcome], title: str) -> Table:
    """The comparison for people."""
    result = Table("line", "row", "bound", "measured", "", "% of roof", "fastest peer", title=title)
    colours = {"pass": "green", "SHORT": "yellow", "MISSING": "red"}
    for o in outcomes:
        line = o.line
        result.add_row(
            line["issue"] + (f"\n{line['short']}" if o.state == "SHORT" and "short" in line else ""),
            f"{line['op']} {line['size']}\n{line['dtype']} {line['mode']}",
            bound(line),
            "-" if o.measured is None else f"{o.measured:.3g}",
            f"[{colours[o.state]}]{o.state}[/]",
            "-" if o.roof is None else f"{o.roof:.0%}",
            o.fastest,
        )
    return result
