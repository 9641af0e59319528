"""What documents show of the results: a page per machine in docs/benchmarks, and blocks between markers.

`pages` and `blocks` list them all; a document that is not generated as a whole has markers for its blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import overhead, picture, reliability, report, storage, targets
from fss_kernels import testing

FOLDER = Path("docs", "benchmarks")
KINDS = ("ops", "networks", "sweeps", "overhead")
GENERATED = "`make readme` writes this page from `benchmarks/results`."  # in every page of a machine


def any_results() -> bool:
    """Whether there are result files at all."""
    return any(storage.files(kind) for kind in (*KINDS, "reliability", "wheel"))


def stale(root: Path) -> dict[Path, str | None]:
    """Documents that differ from the results, with what they should hold; None for a page without a machine.

    Raises:
        ValueError: a document lacks the markers of its block.
    """
    if not any_results():
        return {}
    wanted: dict[Path, str | None] = {root / path: text for path, text in pages().items()}
    old = (path for path in (root / FOLDER).glob("*.md") if path not in wanted)
    wanted |= {path: None for path in old if GENERATED in path.read_text()}
    for path, sections in blocks().items():
        file = root / path
        text = file.read_text() if file.exists() else ""
        for name, section in sections.items():
            try:
                text = replace_section(text, section, name)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
        wanted[file] = text
    return {path: text for path, text in wanted.items() if text is None or _text(path) != text}


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def blocks() -> dict[Path, dict[str, str]]:
    """Text between markers: file -> name of the markers -> text."""
    return {
        FOLDER / "index.md": {"machines": machine_table()},
        Path("docs", "reliability.md"): {"reliability": reliability.markdown()},
        Path("README.md"): {"ops": report.op_table()},
    }


def replace_section(text: str, section: str, name: str) -> str:
    """The text with what stands between the markers of that name replaced; ValueError without markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no {begin} ... {end}")
    return f"{head}{begin}\n{section.strip()}\n{end}{tail}"


def machines() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The committed results of every machine by kind; of ops and networks the newest."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for kind in KINDS:
        for results in storage.newest(kind) if kind in ("ops", "networks") else storage.committed(kind):
            found.setdefault(results["machine"], {kind: [] for kind in KINDS})[kind].append(results)
    return dict(sorted(found.items()))


def pages() -> dict[Path, str]:
    """The documents that are generated as a whole."""
    lines, ops = targets.load(), [*testing.specs()]
    documents = {FOLDER / f"{name}.md": machine_page(runs, ops, lines) for name, runs in machines().items()}
    return documents | {FOLDER / "overview.svg": picture.overview(storage.newest("ops"), testing.specs())}


def machine_table() -> str:
    """The machines with links to their pages."""
    lines = ["| machine | kernels | PyTorch | ops | dates |", "|---|---|---|---|---|"]
    ops = {*testing.specs()}
    for name, runs in machines().items():
        environments = [results["environment"] for kind in KINDS for results in runs[kind]]
        isas, versions = (", ".join(sorted({env[key] for env in environments})) for key in ("isa", "torch"))
        measured = ops & {row["op"] for results in runs["ops"] for row in results["rows"]}
        count = f"{len(measured)} of {len(ops)}" if measured else "not measured"
        dates = report.span(env["date"][:10] for env in environments)
        lines.append(f"| [{title(environments[0])}]({name}.md) | {isas} | {versions} | {count} | {dates} |")
    return "\n".join(lines) if len(lines) > 2 else "No machine has been measured yet."


def title(env: dict[str, Any]) -> str:
    """The name of a machine."""
    return f"{env['cpu']}, {env['cores']} cores"


def machine_page(runs: dict[str, list[dict[str, Any]]], ops: list[str], lines: list[dict[str, Any]]) -> str:
    """The page of one machine.

    Args:
        runs: its results by kind; ops share no op.
        ops: the ops to show; one without results is "not measured".
        lines: promises of targets.toml, of which the short ones are listed.
    """
    first = next(results for kind in KINDS for results in runs[kind])
    sections = []
    for name in dict.fromkeys([*ops, *(row["op"] for results in runs["ops"] for row in results["rows"])]):
        results = next((_of(r, name) for r in runs["ops"] if any(row["op"] == name for row in r["rows"])), None)
        sections.append({"name": name, "results": results, "rows": report.tables(results) if results else []})
    networks = [{**r, "tables": report.tables(r), "outcomes": _outcomes(r, lines)} for r in runs["networks"]]
    return _render(
        "machine.md.j2",
        generated=GENERATED,
        title=title(first["environment"]),
        ops=sections,
        outcomes=[outcome for results in runs["ops"] for outcome in _outcomes(results, lines)],
        networks=networks,
        sweeps=[swept for results in runs["sweeps"] if (swept := _sweep(results))["lines"]],
        overhead=[{**results, "table": overhead.markdown(results)} for results in runs["overhead"]],
    )


def _render(template: str, **values: Any) -> str:
    text = report.templates().get_template(template).render(**values)
    return text.strip() + "\n"


def _of(results: dict[str, Any], op: str) -> dict[str, Any]:
    """The part of results that is one op's."""
    return {**results, **{part: [e for e in results[part] if e["op"] == op] for part in ("rows", "peers")}}


def _outcomes(results: dict[str, Any], lines: list[dict[str, Any]]) -> list[targets.Outcome]:
    """The promises of the ops that were measured."""
    measured = {row["op"] for row in results["rows"]}
    return [targets.evaluate(line, results) for line in lines if line["op"] in measured]


def _sweep(results: dict[str, Any]) -> dict[str, Any]:
    """A sweep with the cells of its table: how many times as long the fastest peer takes along each axis."""
    lines, samples = [], set()
    for (op, axis), rows in report.by_axis(row for row in report.tables(results) if row["fastest"]).items():
        samples |= {row["ours"]["seconds"]["samples"] for row in rows}
        lines.append([
            op,
            report.axis_title(op, axis),
            ", ".join(row["size"].partition("=")[2] for row in rows),
            ", ".join(report.ratio(row["fastest"]["ratio_to_ours"]) for row in rows),
            ", ".join(f"{row['ours']['roof_fraction'] * 100:.0f}" for row in rows),
            ", ".join(dict.fromkeys(row["fastest"]["provider"] for row in rows)),
        ])  # fmt: skip
    return {**results, "lines": lines, "samples": samples}
