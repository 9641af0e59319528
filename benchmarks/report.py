"""Turns result files into an HTML page and into plots; `pages` writes the documents."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from benchmarks import peers, targets
from benchmarks.measure import OURS
from benchmarks.targets import fastest_peer, row_entries, version_of
from fss_kernels import ops, testing

TIE = 0.03  # two runs differ by as much
# What a kernel of a backend has run on, where an op has one. No GPU has run one yet.
BACKEND_STATES = {
    "reference": "✓",
    "cpp": "✓ default on CPU",
    "triton": "compiled, run in the interpreter",
    "cuda": "compiled, never run",
}


def templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=jinja2.select_autoescape(), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals.update(ratio=ratio, verdict=verdict, missing=missing, crashed=crashed, span=span,
                               bound=targets.bound)  # fmt: skip
    return environment


def verdict(value: float) -> str:
    """Who wins where a peer's time over ours is this: "ours", "tie" or "peer"."""
    shown = round(value, 2)
    return "peer" if shown < 1 - TIE else "tie" if shown <= 1 + TIE else "ours"


def ratio(value: float) -> str:
    """A peer's time over ours in Markdown: bold where the peer is faster, a tie named."""
    text = f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
    return {"peer": f"**{text}**", "tie": f"{text} (tie)", "ours": text}[verdict(value)]


def missing(results: dict[str, Any]) -> list[str]:
    """Peers that a run did not have."""
    found = {p["name"]: "GPU" in p["error"].upper() for p in results["peers"] if p["error"] is not None}
    return [f"{name} (GPU only)" if gpu else name for name, gpu in found.items()]


def crashed(results: dict[str, Any]) -> list[str]:
    """Rows and peers on which PyTorch's compiler crashed in a run, of the ops that the results hold."""
    notes = (note.partition(": raised ") for note in results.get("notes", ()))
    ops = {row["op"] for row in results["rows"]}
    return [where for where, raised, _ in notes if raised and where.partition("[")[0] in ops]


def released(results: dict[str, Any], op: str) -> set[str]:
    """Names of an op's peers that are code as it was released; older files leave it to the peers of now."""
    records = [p for p in results["peers"] if p["op"] == op]
    if any("released" in p for p in records):
        return {p["name"] for p in records if p.get("released")}
    return {p.name for p in peers.of(op) if p.released}


def _rate(entry: dict[str, Any]) -> str:
    """The rate of a ceiling, for people."""
    if entry.get("gflops"):
        return f"{entry['gflops']:.0f} GFLOP/s"
    return f"{entry['gbps']:.1f} GB/s" if entry["gbps"] else "none"


def tables(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a result file in order, each with its entries sorted by time and its floor in seconds."""
    names = ("op", "size", "dtype", "mode")
    keys = list(dict.fromkeys(tuple(r[n] for n in names) for r in results["rows"]))
    result = []
    for key in keys:
        entries = row_entries(results, dict(zip(names, key, strict=True)))
        providers = [e for e in entries.values() if not e["provider"].startswith("ceiling:")]
        ours, fastest = entries[OURS], fastest_peer(entries)
        timed = ours["seconds"] is not None and ours["roof_fraction"] is not None
        result.append(
            {
                **dict(zip(names, key, strict=True)),
                "title": " · ".join(key),
                "entries": sorted(providers, key=lambda e: e["seconds"]["median"] if e["seconds"] else float("inf")),
                "ceilings": {
                    p.removeprefix("ceiling:"): _rate(e) for p, e in entries.items() if p.startswith("ceiling:")
                },
                "ours": ours,
                "fastest": fastest,
                "released": fastest_peer({p: e for p, e in entries.items() if p in released(results, key[0])}),
                "fastest_version": version_of(results, key[0], fastest["provider"]) if fastest else "",
                "floor": ours["roof_fraction"] * ours["seconds"]["median"] if timed else None,
            }
        )
    return result


def _label(*axes: Any) -> None:
    """Plain numbers on logarithmic axes, between the powers of ten too where these are at most two: as powers of ten
    the labels take a fifth of the drawing."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
            return f"{x:g}"

    for axis in axes:
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.4)))


def _plot(row: dict[str, Any]) -> str:
    """Median times with their p20 to p80 as a bar plot, the roof as a line; inline SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [e for e in row["entries"] if e["seconds"]][::-1]
    if not entries:
        return ""
    medians = [e["seconds"]["median"] * 1e3 for e in entries]
    spread = [[m - e["seconds"]["p20"] * 1e3 for m, e in zip(medians, entries, strict=True)],
              [e["seconds"]["p80"] * 1e3 - m for m, e in zip(medians, entries, strict=True)]]  # fmt: skip
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": row["title"], "font.size": 9}):
        figure, axes = plt.subplots(figsize=(4.4, 1.0 + 0.27 * len(entries)), layout="constrained")
        colours = ["#c2410c" if e["provider"] == OURS else "#94a3b8" for e in entries]
        axes.barh([e["provider"] for e in entries], medians, xerr=spread, color=colours, ecolor="#334155", capsize=2)
        axes.axvline(row["floor"] * 1e3, color="#15803d", linestyle="--", label="roof of this machine")
        if max(medians) > 30 * min(medians):
            axes.set_xscale("log")
            _label(axes.xaxis)
        axes.set_xlabel("ms (median, p20 to p80)")
        figure.legend(loc="outside upper right", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _scaling(rows: list[dict[str, Any]]) -> str:
    """Time against bytes of the rows of one op and mode, both logarithmic, every provider and the roof; inline SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for e in row["entries"]:
            if e["seconds"]:
                points.setdefault(e["provider"], []).append((row["ours"]["bytes"] / 1e6, e["seconds"]["median"] * 1e3))
        if row["floor"]:
            points.setdefault("roof", []).append((row["ours"]["bytes"] / 1e6, row["floor"] * 1e3))
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": rows[0]["title"], "font.size": 9}):
        figure, axes = plt.subplots(figsize=(4.4, 4.2), layout="constrained")
        for name, values in sorted(points.items()):
            style = {OURS: {"color": "#c2410c", "linewidth": 2.5}, "roof": {"color": "#15803d", "ls": "--"}}
            axes.plot(*zip(*sorted(values), strict=True), marker="o", markersize=4, label=name, **style.get(name, {}))
        axes.set(xscale="log", yscale="log", xlabel="MB that must move", ylabel="ms")
        _label(axes.xaxis, axes.yaxis)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _sweep(rows: list[dict[str, Any]], axis: str) -> str:
    """Time, and peak extra memory, along an axis, both logarithmic, every provider and the roof; inline SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[float, float | None, float | None]]] = {}
    for row in rows:
        value = float(row["size"].removeprefix(f"{axis}="))
        for e in row["entries"]:
            if e["seconds"]:
                megabytes = (e["extra_bytes"] or 0) / 1e6 or None
                points.setdefault(e["provider"], []).append((value, e["seconds"]["median"] * 1e3, megabytes))
        if row["floor"]:
            points.setdefault("roof", []).append((value, row["floor"] * 1e3, None))
    style = {OURS: {"color": "#c2410c", "linewidth": 2.5}, "roof": {"color": "#15803d", "ls": "--"}}
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": rows[0]["title"] + axis, "font.size": 9}):
        figure, panels = plt.subplots(2, 1, figsize=(4.4, 6.4), layout="constrained", sharex=True)
        for part, (axes, unit) in enumerate(zip(panels, ("ms", "extra MB"), strict=True), 1):
            for name, values in sorted(points.items()):
                xy = [(v[0], v[part]) for v in sorted(values) if v[part] is not None]
                if xy:
                    label = name if part == 1 else None
                    axes.plot(*zip(*xy, strict=True), marker="o", markersize=4, label=label, **style.get(name, {}))
            axes.set(xscale="log", yscale="log", ylabel=unit)
            _label(axes.yaxis)
            axes.spines[["top", "right"]].set_visible(False)
        ticks = sorted({v[0] for values in points.values() for v in values})
        panels[1].set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
        panels[1].xaxis.minorticks_off()
        panels[1].set_xlabel(axis_title(rows[0]["op"], axis))
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def axis_title(op: str, axis: str) -> str:
    """An axis of a sweep with its unit, if it has one."""
    spec = testing.specs().get(op)
    unit = spec.units.get(axis) if spec else None
    return f"{axis}, {unit}" if unit else axis


def by_axis(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The timed rows of a sweep by op and axis."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["ours"]["seconds"]:
            groups.setdefault((row["op"], row["size"].partition("=")[0]), []).append(row)
    return groups


def sweep_plots(results: dict[str, Any]) -> dict[str, str]:
    """Title -> SVG for every op and axis of a sweep."""
    return {f"{op} against {axis}": _sweep(rows, axis) for (op, axis), rows in by_axis(tables(results)).items()}


def span(values: Iterable[Any]) -> str:
    """The least and the largest of some values, for people."""
    values = [*values]
    least, most = min(values), max(values)
    return f"{least}" if least == most else f"{least} to {most}"


def _groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of one op, dtype and mode, by title, where their bytes differ: one point shows no growth."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["ours"]["seconds"]:
            groups.setdefault(f"{row['op']}, {row['dtype']}, {row['mode']}", []).append(row)
    return {title: members for title, members in groups.items() if len({m["ours"]["bytes"] for m in members}) > 1}


def plots(results: dict[str, Any]) -> dict[str, str]:
    """File name without suffix -> SVG, of every row and of time against size."""
    rows = tables(results)
    if results["plan"].get("sweep"):
        return {title.replace(" ", "-"): svg for title, svg in sweep_plots(results).items()}
    named = {row["title"]: _plot(row) for row in rows}
    named |= {f"scaling {title}": _scaling(members) for title, members in _groups(rows).items()}
    return {re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"): svg for title, svg in named.items() if svg}


def render(
    results: dict[str, Any],
    demo: Path | None = None,
    overhead: dict[str, Any] | None = None,
    sweeps: Iterable[dict[str, Any]] = (),
) -> str:
    """One self-contained HTML page.

    Args:
        results: a result file.
        demo: the folder that `fss-models demo` wrote, for its scores and pictures.
        overhead: ``header`` and ``rows`` of what a call costs the host.
        sweeps: result files of sweeps, whose plots come with the time against size.
    """
    rows = [{**row, "plot": _plot(row)} for row in tables(results)]
    scaling = {title: _scaling(members) for title, members in _groups(rows).items()}
    trained, pictures = None, ""
    if demo is not None:
        trained = json.loads((demo / "demo.json").read_text())
        pictures = base64.b64encode((demo / "grid.png").read_bytes()).decode()
    template = templates().get_template("report.html.j2")
    return template.render(results=results, rows=rows, scaling=scaling, ours=OURS, demo=trained, pictures=pictures,
                           overhead=overhead,
                           sweeps={k: v for s in sweeps for k, v in sweep_plots(s).items()})  # fmt: skip


def op_table() -> str:
    """The README's table of ops, from their specs: a row a folder, with what its kernels have run on."""
    exported = vars(ops).values()
    folders: dict[str, list[testing.Spec]] = {}
    for spec in testing.specs().values():
        folders.setdefault(spec.op.folder, []).append(spec)
    lines = [
        "| op | what it computes | replaces | reference | C++ (CPU) | Triton | CUDA |",
        "|---|---|---|---|---|---|---|",
    ]
    for folder, members in sorted(folders.items()):
        package = f"fss_kernels.ops.{folder}"
        public = [f.__name__ for f in exported if getattr(f, "__module__", None) == package]
        names = dict.fromkeys([*(spec.name for spec in members), *public])
        page = f"fss_kernels/ops/{folder}/README.md"
        cells = [f"[{', '.join(f'`{name}`' for name in names)}]({page})"]
        cells += ["; ".join(dict.fromkeys(getattr(s, text) for s in members)) for text in ("computes", "replaces")]
        cells += [s if all(b in m.op.backends for m in members) else "none" for b, s in BACKEND_STATES.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
