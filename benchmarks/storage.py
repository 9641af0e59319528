"""Result files: a CSV with one line per row, a CSV of curves and a small JSON header, ``X.csv`` with its companions.

    X.csv          run, then the row's values; nested values have names with dots: ``seconds.p20``
    X.curves.csv   run, row, name, index, value: whatever is a list in a row, one line per value; only if there is any
    X.json         for every run its name, environment, plan, peers, ceilings, failures and notes

A file holds several runs, each with the rows that were measured together: those of one op, say. In memory a run is a
nested dict with a list ``rows``. A cell is JSON, except that text that is not JSON itself stands as it is. ``null`` is
None, and an empty cell means that the row has no such value.

The header decides which runs exist. A new run is added to the tables first, then the header replaces the old run by it,
then the old rows go: whoever stops in between leaves the old run or the new one, never a mixture.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import environment

SCHEMA = 2
RESULTS = environment.RESULTS
CURVE = ("run", "row", "name", "index", "value")
Lines = list[dict[str, str]]


def encoded(value: Any) -> str:
    """One value as the text of a cell."""
    if not isinstance(value, str):
        return json.dumps(value)
    return value if value and value.isprintable() and decoded(value) == value else json.dumps(value)


def decoded(cell: str) -> Any:
    """The value of a cell that is not empty."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def flattened(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names with dots and values that are no dicts, unless empty ones."""
    for key, value in row.items():
        if not key or "." in key or (not prefix and key == "run"):
            raise ValueError(f"storage: a row cannot have the key {key!r}")
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nested(flat: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """What `flattened` took apart."""
    row: dict[str, Any] = {}
    for name, value in flat:
        *outer, key = name.split(".")
        at = row
        for part in outer:
            at = at.setdefault(part, {})
        at[key] = value
    return row


def _lines(run: str, rows: Iterable[dict[str, Any]]) -> tuple[Lines, Lines]:
    """The lines of a run in both tables."""
    table, curves = [], []
    for n, row in enumerate(rows):
        line = {"run": run}
        for name, value in flattened(row):
            if isinstance(value, (list, tuple)) and value:
                if any(isinstance(v, (list, tuple, dict)) for v in value):
                    raise ValueError(f"storage: {name} of a row must be a list of plain values")
                for i, v in enumerate(value):
                    curves.append(dict(zip(CURVE, (run, str(n), name, str(i), encoded(v)), strict=True)))
            else:
                line[name] = encoded(value)
        table.append(line)
    return table, curves


def _rows(table: Lines, curves: Lines) -> list[dict[str, Any]]:
    """The rows of a run from its lines."""
    lists: dict[int, dict[str, list[Any]]] = {}
    for line in sorted(curves, key=lambda line: int(line["index"])):
        values = lists.setdefault(int(line["row"]), {}).setdefault(line["name"], [])
        values.append(decoded(line["value"]))
    found = []
    for n, line in enumerate(table):
        cells = {name: decoded(cell) for name, cell in line.items() if name != "run" and cell}
        found.append(_nested({**cells, **lists.get(n, {})}.items()))
    return found


def _companions(path: Path) -> tuple[Path, Path]:
    """Header and curves of a result file."""
    if path.suffix != ".csv":
        raise ValueError(f"storage: a result file must end in .csv, got {path}")
    return path.with_suffix(".json"), path.with_suffix(".curves.csv")


def _read_table(path: Path, runs: Iterable[str]) -> Lines:
    """The lines of a table that belong to these runs."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [line for line in csv.DictReader(file) if line["run"] in runs]


def _write_table(path: Path, lines: Lines, first: Iterable[str] = ("run",)) -> None:
    columns = dict.fromkeys([*first, *(name for line in lines for name in line)])
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    environment.write_text(path, text.getvalue())


def _text(value: Any, levels: int, indent: str = "") -> str:
    """JSON with one line per entry of the outer levels."""
    if not isinstance(value, (dict, list)) or not value or not levels:
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _text(v, levels - 1, inner) for v in value) + f"\n{indent}]"
    parts = (f"{inner}{json.dumps(k)}: {_text(v, levels - 1, inner)}" for k, v in value.items())
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """The runs of a result file without their rows; none where there is no header."""
    header = _companions(path)[0]
    if not header.exists():
        return {}
    content = json.loads(header.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"storage: {header} has schema {content.get('schema')}, this program reads {SCHEMA}")
    return content["runs"]


def write(path: str | Path, name: str, results: dict[str, Any]) -> None:
    """Puts a run into a result file, in place of an older one of the same name.

    Args:
        path: the file, which ends in .csv.
        name: of the run; the others of the file stay.
        results: a nested dict; ``rows`` is the list of its rows.
    """
    path = Path(path)
    header, curves_path = _companions(path)
    runs = _header(path)
    tables = _read_table(path, runs), _read_table(curves_path, runs)
    old = next((key for key in runs if key.rpartition("-")[0] == name), f"{name}-0")
    new = f"{name}-{int(old.rpartition('-')[2]) + 1}"
    table, curves = (lines + added for lines, added in zip(tables, _lines(new, results["rows"]), strict=True))
    _write_table(path, table)
    if curves:
        _write_table(curves_path, curves, CURVE)
    runs = {key: run for key, run in runs.items() if key != old} | {new: {**results, "rows": len(results["rows"])}}
    runs = json.loads(json.dumps(dict(sorted(runs.items()))))  # tuples are lists there
    environment.write_text(header, _text({"schema": SCHEMA, "runs": runs}, 4) + "\n")
    table, curves = (
        sorted((line for line in lines if line["run"] in runs), key=lambda line: line["run"])
        for lines in (table, curves)
    )
    _write_table(path, table)
    if curves:
        _write_table(curves_path, curves, CURVE)
    else:
        curves_path.unlink(missing_ok=True)


def write_checked(path: str | Path, name: str, results: dict[str, Any]) -> Path:
    """Writes a run; one with failures goes into a file beside it, X.failed.csv, and replaces no good one."""
    path = Path(path).with_suffix(".failed.csv") if results["failures"] else Path(path)
    write(path, name, results)
    return path


def read(path: str | Path) -> dict[str, dict[str, Any]]:
    """The runs of a result file by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file or its header does not hold what the other one says.
    """
    path = Path(path)
    runs = _header(path)
    for needed in (path, *_companions(path)[:1]):
        if not needed.exists():
            raise FileNotFoundError(f"storage: there is no {needed}")
    tables = [_read_table(p, runs) for p in (path, _companions(path)[1])]
    found = {}
    for key, run in runs.items():
        table, curves = ([line for line in lines if line["run"] == key] for lines in tables)
        if len(table) != run["rows"]:
            raise ValueError(f"storage: {path} has {len(table)} rows of {key}, its header says {run['rows']}")
        found[key.rpartition("-")[0]] = {**run, "rows": _rows(table, curves)}
    return found


def run(path: str | Path, name: str) -> dict[str, Any] | None:
    """One run of a result file; None where there is none of that name."""
    return read(path).get(name) if _companions(Path(path))[0].exists() else None


def load(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """All runs of result files, each with its ``file``, ``machine`` and ``name``."""
    found = []
    for path in map(Path, paths):
        about = {"file": str(path), "machine": path.stem}
        found += [{**results, **about, "name": name} for name, results in read(path).items()]
    return found


def files(kind: str) -> list[Path]:
    """The committed files of a kind of measurement, one per machine."""
    return [p.with_suffix(".csv") for p in sorted((RESULTS / kind).glob("*.json")) if "." not in p.stem]


def committed(kind: str) -> list[dict[str, Any]]:
    """The committed runs of a kind of measurement, oldest first."""
    return sorted(load(files(kind)), key=lambda results: str(results["environment"]["date"]))


def newest(*kinds: str) -> list[dict[str, Any]]:
    """The committed runs that hold a machine's newest results of some op or network, each with those alone."""
    runs = sorted((r for kind in kinds for r in committed(kind)), key=lambda r: str(r["environment"]["date"]))
    latest = {(r["machine"], op): r for r in runs for op in r["plan"]["ops"]}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for (_, op), results in latest.items():
        mine = found.setdefault((results["file"], results["name"]), {**results, "rows": [], "peers": []})
        for part in ("rows", "peers"):
            mine[part] += [entry for entry in results[part] if entry["op"] == op]
    return list(found.values())


def here(kind: str) -> Path:
    """The file of this machine."""
    return RESULTS / kind / f"{environment.machine_slug()}.csv"
