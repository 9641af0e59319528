"""The README's picture against results that are written down here."""

import math
import re
from xml.etree import ElementTree

import pytest

from benchmarks import measure, picture

SVG = "{http://www.w3.org/2000/svg}"


def entry(op: str, provider: str, ratio: float, size: str = "a") -> dict:
    seconds = {"median": 1e-3 * ratio, "p20": 1e-3 * ratio, "p80": 1e-3 * ratio, "samples": 6}
    row = {"op": op, "size": size, "dtype": "float32", "mode": "forward", "provider": provider, "correct": True}
    return {**row, "seconds": seconds, "ratio_to_ours": ratio, "roof_fraction": 0.5, "bytes": 1, "gflops": 1.0}


def results(cpu: str, date: str, **ratios: dict[str, dict[str, float]]) -> dict:
    """A result file of one size of every op given: provider -> its time over ours; "old" is released code."""
    rows = [entry(op, p, r) for op, found in ratios.items() for p, r in {measure.OURS: 1.0, **found}.items()]
    peers = [{"op": op, "name": p, "released": p == "old", "version": "", "error": None, "optional": False}
             for op, found in ratios.items() for p in found]  # fmt: skip
    env = {"cpu": cpu, "date": f"{date}T00:00:00", "threads": 2, "torch": "2.13.0"}
    return {"environment": env, "plan": {"ops": [*ratios]}, "rows": rows, "peers": peers}


FILES = [
    results("A <1>", "2026-01-02", pool={"new": 0.5, "old": 8.0}, match={"new": 2.0}),
    results("B", "2026-03-04", pool={"new": 1.01, "old": 4.0}),
]


def marks(text: str) -> list[tuple[float, float, str]]:
    found = re.findall(r'<g transform="translate\(([\d.]+) ([\d.]+)\)" fill="(#\w+)">', text)
    return sorted((float(x), float(y), colour) for x, y, colour in found if float(y) > 124)  # below the legend


def test_marks_stand_at_their_ratios():
    text = picture.overview(FILES, ["pool", "match"])
    ticks = {float(t): float(x) for x, t in re.findall(r'<text x="([\d.]+)" y="118" .*?>([\d.]+)</text>', text)}
    assert sorted(ticks) == [0.5, 1, 2, 5, 10]
    scale = (ticks[10] - ticks[1]) / math.log(10)
    expected = [
        (0.5, picture.LOSS),
        (1.01, picture.PEER),
        (2, picture.PEER),
        (4, picture.RELEASED),
        (8, picture.RELEASED),
    ]
    assert len(marks(text)) == len(expected)
    for (x, _, colour), (ratio, wanted) in zip(marks(text), expected, strict=True):
        assert x == pytest.approx(ticks[1] + scale * math.log(ratio), abs=0.2) and colour == wanted
    assert ">a peer is faster in 1 of 2<" in text and ">a peer is faster in 0 of 1<" in text
    assert "2026-01-02 to 2026-03-04" in text and ">no released code to compare with<" in text


def test_well_formed_and_the_same_in_any_order():
    text = picture.overview(FILES, ["pool", "match"])
    root = ElementTree.fromstring(text)
    assert root.find(f"{SVG}title").text == picture.DESCRIPTION
    assert {"A <1>", "B", "pool", "match"} <= {t.text for t in root.iter(f"{SVG}text")}
    assert picture.overview(FILES[::-1], ["pool", "match"]) == text


def test_an_op_without_results_is_not_measured():
    text = picture.overview(FILES[1:], ["pool", "match"])
    assert text.count(">not measured<") == 1 and "NaN" not in text
    assert picture.overview([], ["pool"]).count(">not measured<") == 1


def test_networks_are_left_out():
    network = results("C", "2026-05-06", dpcn={"reference": 3.0})
    text = picture.overview([*FILES, network], ["pool", "match"])
    assert text == picture.overview(FILES, ["pool", "match"])
