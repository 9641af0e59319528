"""The driver of the glyph experiment, with the size of everything cut down: what it picks, skips and prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import glyphs, report


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(glyphs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(glyphs, "RUNS", tmp_path / "runs")
    for name, value in {"SIZE": 33, "BATCH": 2, "STEPS": 2, "EPISODES": 4}.items():
        monkeypatch.setattr(glyphs, name, value)
    return tmp_path / "results"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stored(folder: Path, method: str, rate: float, seed: int, score: float, test: float = 10.0) -> None:
    shots = {str(s): {"miou": test + s, "fb_iou": 50.0} for s in glyphs.SHOTS}
    content = {"training_classes": {"miou": score}, "shots": shots, "curve": [[1, 0.5]], "parameters": 7}
    env = {"cpu": "a machine", "threads": 1, "torch": "2.13", "date": f"2026-01-0{1 + seed}T10:00:00+00:00"}
    content["environment"] = env | {"commit": "0123456789abcdef", "clean": seed == 0}
    content["config"] = glyphs._settings(glyphs._config(method, rate, seed))
    glyphs.environment.write_json(folder / f"{glyphs._name(method, rate, seed)}.json", content)


def test_rate_is_chosen_on_training_classes(small: Path) -> None:
    low, middle, high = glyphs.RATES
    assert glyphs.chosen_rate("dpcn") is None
    assert glyphs.pending(["dpcn"], [0, 1, 2]) == [("dpcn", r, 0) for r in glyphs.RATES]
    for rate, score, test in ((low, 20.0, 90.0), (middle, 30.0, 10.0), (high, 25.0, 50.0)):
        stored(small, "dpcn", rate, 0, score, test)
    assert glyphs.chosen_rate("dpcn") == middle
    assert glyphs.pending(["dpcn"], [0, 1, 2]) == [("dpcn", middle, 1), ("dpcn", middle, 2)]
    stored(small, "dpcn", middle, 1, 0.0, 14.0)
    (row,) = glyphs.rows()
    assert row["values"][1, "miou"] == [11.0, 15.0]
    assert "| DPCN | 13.0 ± 2.8 | 50.0 ± 0.0 | 17.0 ± 2.8 | 50.0 ± 0.0 | 0.002 | 7 | 2 |" in glyphs.markdown()
    where = "a machine, threads 1, PyTorch 2.13: 2026-01-01, commit 0123456789; 2026-01-02, commit 0123456789 (with"
    assert glyphs.markdown().startswith(f"{where} local changes).\n\n| method |")
    assert glyphs.svg().startswith("<svg")
    assert "13.0 ± 2.8" in report.readme_section([], glyphs.markdown())


def test_runs_and_does_not_repeat(small: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert glyphs.run(["panet-untrained", "panet"], [0], limit=2) == 0
    files = sorted(small.iterdir())
    assert [f.name for f in files] == ["panet-lr0.001-seed0.json", "panet-untrained-seed0.json"]
    trained, untrained = (json.loads(f.read_text()) for f in files)
    assert [step for step, _ in trained["curve"]] == [2] and untrained["curve"] == []
    assert set(trained["shots"]) == {"1", "5"} and trained["shots"]["1"]["episodes"] == 4
    assert "2 runs done, 2 can be done next" in capsys.readouterr().out
    assert glyphs.run(["unet"]) == 2
    # other settings: results do not count, and a run that is there is not gone on with
    monkeypatch.setattr(glyphs, "STEPS", 3)
    assert glyphs.pending(["panet"], [0])[0] == ("panet", glyphs.RATES[0], 0)
    assert glyphs.run(["panet"], [0], limit=1) == 0
    assert [step for step, _ in json.loads(files[0].read_text())["curve"]] == [3]
