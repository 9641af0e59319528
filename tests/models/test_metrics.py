"""The metric against loops, whatever the batches and the number of processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fss_models.metrics import EpisodeIoU


def slow(predictions: np.ndarray, truths: np.ndarray, classes: np.ndarray) -> tuple[float, float, dict[int, float]]:
    """mIoU, FB-IoU and the IoU of every class in percent, pixel by pixel."""
    sums: dict[int, list[int]] = {}
    both = {0: [0, 0], 1: [0, 0]}
    for prediction, truth, c in zip(predictions, truths, classes, strict=True):
        for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
            if t == 255:
                continue
            for k in (0, 1):
                both[k][0] += p == k and t == k
                both[k][1] += p == k or t == k
            own = sums.setdefault(int(c), [0, 0])
            own[0] += p == 1 and t == 1
            own[1] += p == 1 or t == 1
    per_class = {c: 100 * i / u for c, (i, u) in sums.items()}
    return float(np.mean(list(per_class.values()))), float(np.mean([100 * i / u for i, u in both.values()])), per_class


def episodes(count: int = 23) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 255], (count, 9, 7), p=[0.6, 0.3, 0.1])
    return (
        torch.from_numpy(rng.integers(0, 2, (count, 9, 7))),
        torch.from_numpy(truth),
        torch.from_numpy(rng.choice([2, 5, 9], count)),
    )


@pytest.mark.parametrize("batch", [1, 4, 23])
def test_equals_loops(batch: int) -> None:
    prediction, truth, classes = episodes()
    metric = EpisodeIoU([2, 5, 9, 11], {2: "two", 5: "five"})
    for i in range(0, 23, batch):
        metric.update(prediction[i : i + batch], truth[i : i + batch], classes[i : i + batch])
    result = metric.compute()
    miou, fb, per_class = slow(prediction.numpy(), truth.numpy(), classes.numpy())
    assert result["miou"] == pytest.approx(miou, abs=1e-10) and result["fb_iou"] == pytest.approx(fb, abs=1e-10)
    names = {2: "two", 5: "five", 9: "9"}
    for c, iou in per_class.items():
        assert result["per_class"][names[c]]["iou"] == pytest.approx(iou, abs=1e-10)
    assert result["per_class"]["11"] == {"iou": None, "episodes": 0, "intersection": 0, "union": 0}
    assert result["episodes"] == 23 and result["classes"] == 3
    assert sum(p["episodes"] for p in result["per_class"].values()) == 23


def test_mean_over_classes_not_over_episodes() -> None:
    ones = torch.ones(1, 1, 2, dtype=torch.int64)
    metric = EpisodeIoU([1, 2])
    for _ in range(3):
        metric.update(ones, ones, torch.tensor([1]))
    metric.update(1 - ones, ones, torch.tensor([2]))
    assert metric.compute()["miou"] == 50.0


def test_nothing_and_wrong_arguments() -> None:
    metric = EpisodeIoU([1])
    assert np.isnan(metric.compute()["miou"]) and np.isnan(metric.compute()["fb_iou"])
    mask = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"no class \[7\]"):
        metric.update(mask, mask, torch.tensor([7]))
    with pytest.raises(ValueError, match=r"must be \(B, H, W\) with B classes"):
        metric.update(mask, mask[:, :1], torch.tensor([1]))


_SCRIPT = """
import json, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from test_metrics import episodes
from fss_models.metrics import EpisodeIoU
dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()
prediction, truth, classes = episodes()
metric = EpisodeIoU([2, 5, 9, 11])
for i in range(rank, 23, count):
    metric.update(prediction[i : i + 1], truth[i : i + 1], classes[i : i + 1])
result = metric.compute()
if rank == 0:
    open(sys.argv[1], "w").write(json.dumps(result))
dist.destroy_process_group()
"""


def test_same_for_two_processes(tmp_path: Path) -> None:
    import json

    (tmp_path / "run.py").write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"]
    subprocess.run([*command, "out.json", str(Path(__file__).parent)], cwd=tmp_path, check=True, timeout=240)
    metric = EpisodeIoU([2, 5, 9, 11])
    metric.update(*episodes())
    assert json.loads((tmp_path / "out.json").read_text()) == metric.compute()
