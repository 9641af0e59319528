"""The README's picture: the time of the fastest peer, and of released code, divided by ours, in every measured case.

The SVG is written without a plotting library: the same results give the same text on every machine, so that
``readme --check`` can compare it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.report import tables, verdict

WIDTH, MARGIN = 480, 16
LANE, HEAD, GAP = 8, 19, 9  # heights of one machine's marks, of an op's heading, and between ops
PEER, RELEASED, LOSS, INK, GREY = "#1d4ed8", "#94a3b8", "#dc2626", "#0f172a", "#475569"
LINE, BAND = "#e2e8f0", "#f1f5f9"
SANS = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
SHAPES = (  # one for each machine, around the origin
    '<circle r="3.6"/>',
    '<rect x="-3.2" y="-3.2" width="6.4" height="6.4"/>',
    '<path d="M0 -4.2L4 3.2H-4Z"/>',
    '<path d="M0 -4.4L4.4 0L0 4.4L-4.4 0Z"/>',
)
LEGEND = ((20, PEER, "fastest peer"), (128, RELEASED, "released code"), (246, LOSS, "faster than we are"))
DESCRIPTION = "For every op, the time of the fastest peer and of released code divided by ours, on a logarithmic axis."


def _ticks(values: Iterable[float]) -> list[float]:
    """The ticks 1, 2 and 5 of every decade that enclose the values, at least 0.5 to 2."""
    found = [0.5, 2.0, *values]
    steps = [float(f"{m}e{e}") for e in range(-6, 7) for m in (1, 2, 5)]
    first, last = max(s for s in steps if s <= min(found)), min(s for s in steps if s >= max(found))
    return [s for s in steps if first <= s <= last]


def _text(x: float, y: float, text: str, **attributes: Any) -> str:
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(text)}</text>'


def _mark(x: float, y: float, machine: int, colour: str) -> str:
    return f'<g transform="translate({x:g} {y:g})" fill="{colour}">{SHAPES[machine % len(SHAPES)]}</g>'


def _cases(files: Iterable[dict[str, Any]], ops: list[str]) -> list[dict[str, Any]]:
    """The timed rows of these ops, each with its environment, in an order that does not depend on that of the files."""
    found = ({**row, "env": results["environment"]} for results in files for row in tables(results))
    timed = [row for row in found if row["op"] in ops and row["ours"]["seconds"] and row["fastest"]]
    return sorted(timed, key=lambda row: (row["env"]["cpu"], row["title"]))


def _span(values: Iterable[Any]) -> str:
    ordered = sorted({*values})
    return f"{ordered[0]}" if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def _block(
    op: str, rows: list[dict[str, Any]], machines: list[str], y: float, across: Callable[[float], float]
) -> list[str]:
    """The heading of an op at height ``y`` and its marks, a lane a machine: first of peers, then of released code."""
    lost = sum(verdict(row["fastest"]["ratio_to_ours"]) == "peer" for row in rows)
    says = f"a peer is faster in {lost} of {len(rows)}" if rows else "not measured"
    wide, end = WIDTH - 2 * MARGIN, WIDTH - MARGIN - 5
    parts = [
        f'<rect x="{MARGIN}" y="{y + 1}" width="{wide}" height="{HEAD - 3}" fill="{BAND}"/>',
        _text(MARGIN + 5, y + 13.5, op, font_family=MONO, font_weight=600),
        _text(end, y + 13.5, says, text_anchor="end", fill=LOSS if lost else INK),
    ]
    if rows and not any(row["released"] for row in rows):
        below = y + HEAD + LANE * 1.5 * len(machines) + 4
        parts.append(_text(end, below, "no released code to compare with", text_anchor="end", fill=GREY))
    for row in rows:
        machine = machines.index(row["env"]["cpu"])
        for kind, usual, first in (("released", RELEASED, len(machines)), ("fastest", PEER, 0)):
            if row[kind]:
                value = row[kind]["ratio_to_ours"]
                colour = LOSS if verdict(value) == "peer" else usual
                parts.append(_mark(across(value), y + HEAD + LANE * (first + machine + 0.5), machine, colour))
    return parts


def overview(files: Iterable[dict[str, Any]], ops: Iterable[str]) -> str:
    """The picture as SVG text.

    Args:
        files: results as `tables` reads them; results of networks are left out.
        ops: the ops in their order; one without a measured case is shown as "not measured".
    """
    ops = list(ops)
    rows = _cases(files, ops)
    machines = sorted({row["env"]["cpu"] for row in rows})
    ticks = _ticks(row[kind]["ratio_to_ours"] for row in rows for kind in ("fastest", "released") if row[kind])
    top = 90 + 17 * len(machines)
    height = HEAD + 2 * LANE * max(len(machines), 1) + GAP
    bottom = top + height * len(ops)

    def across(ratio: float) -> float:
        share = math.log(ratio / ticks[0]) / math.log(ticks[-1] / ticks[0])
        return round(MARGIN + share * (WIDTH - 2 * MARGIN), 1)

    parts = [_text(MARGIN, 24, "How many times as long the others take", font_size=15, font_weight=600)]
    parts.append(_text(MARGIN, 43, "One mark per measured size and mode. Right of 1 we are faster."))
    for x, colour, name in LEGEND:
        parts += [_mark(x, 58, 0, colour), _text(x + 9, 62, name)]
    for i, cpu in enumerate(machines):
        parts += [_mark(20, 75 + 17 * i, i, INK), _text(29, 79 + 17 * i, cpu.replace("(R)", ""))]
    for tick in ticks:
        strong = {"font_weight": 700} if tick == 1 else {}
        line = f'stroke="{INK if strong else LINE}" stroke-width="{1.5 if strong else 1}"'
        parts.append(f'<path d="M{across(tick):g} {top}V{bottom}" {line}/>')
        for y in (top - 6, bottom + 15):
            parts.append(_text(across(tick), y, f"{tick:g}", text_anchor="middle", **strong))
    for i, op in enumerate(ops):
        parts += _block(op, [row for row in rows if row["op"] == op], machines, top + height * i, across)
    if rows:
        threads, dates = _span(row["env"]["threads"] for row in rows), _span(row["env"]["date"][:10] for row in rows)
        dtypes = ", ".join(sorted({row["dtype"] for row in rows}))
        parts.append(_text(MARGIN, bottom + 35, f"On CPUs, {dtypes}, {threads} threads, {dates}"))
    size = f'viewBox="0 0 {WIDTH} {bottom + 46}" width="{WIDTH}" height="{bottom + 46}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{SANS}" font-size="12" fill="{INK}">',
        f"<title>{escape(DESCRIPTION)}</title>",
        f'<rect width="{WIDTH}" height="{bottom + 46}" fill="#fff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])
