"""The demo with everything cut down: what it writes, and when it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fss_models import demo as demo_module
from fss_models.demo import DemoConfig, demo
from fss_models.evaluate import Outcome


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_writes_pictures_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = DemoConfig(out=str(tmp_path), steps=1, batch=2, size=33, episodes=5, pictures=2, check=False)
    assert demo(small) == 0
    result = json.loads((tmp_path / "demo.json").read_text())
    assert set(result["scores"]) == {"DPCN, trained", "prototype cosine, untrained", "foreground everywhere"}
    assert result["pictures"] == ["episode-0.png", "episode-1.png"]
    for name in result["pictures"]:
        assert np.asarray(Image.open(tmp_path / name)).shape == (33, 4 * 33, 3)
    assert Image.open(tmp_path / "grid.png").size == (132, 14 + 66)
    assert "mIoU" in capsys.readouterr().out


@pytest.mark.parametrize("trained, untrained, code", [(30.0, 8.0, 0), (10.0, 8.0, 1), (10.5, 12.0, 1), (10.5, 10.0, 0)])
def test_fails_unless_both_baselines_are_beaten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: float, untrained: float, code: int
) -> None:
    real = demo_module.measure

    def measure(model: torch.nn.Module, *arguments: Any, label: str, **options: Any) -> Outcome:
        outcome = real(model, *arguments, label=label, **options)
        outcome.result["miou"] = {"DPCN": trained, "untrained": untrained, "all foreground": 10.0}[label]
        return outcome

    monkeypatch.setattr(demo_module, "measure", measure)
    config = DemoConfig(out=str(tmp_path), steps=1, batch=2, size=33, episodes=5, pictures=1)
    # a second call trains anew in the same folder
    assert [demo(config) for _ in range(2)] == [code] * 2
    assert json.loads((tmp_path / "demo.json").read_text())["better_than_baselines"] is (code == 0)
