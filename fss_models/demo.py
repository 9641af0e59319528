"""A minute of training on rendered characters, then evaluation and pictures on characters not trained on."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from fss_models import checkpoints
from fss_models.config import Config, DataConfig, ModelConfig, OptimConfig
from fss_models.data.build import eval_episodes
from fss_models.data.files import write_bytes, write_png
from fss_models.evaluate import AllForeground, environment, grid, measure
from fss_models.train import train

# The head as narrow as the tiny backbone, for grids of about 10 x 10.
SMALL: dict[str, dict[str, Any]] = {
    "dpcn": {"channels": 64, "dilations": [1, 2, 4], "mid_dropout": 0.0},
    "dpnet": {"channels": 64, "bins": [1.0, 0.5, 0.25], "mid_dropout": 0.0},
    "panet": {},
}


@dataclasses.dataclass
class DemoConfig:
    """DPCN (tiny) trained on fold 0 of the glyphs for a minute: a check that the pipeline runs, not that the network
    uses its support. The object asked for is usually the largest one.

    Attributes:
        out: folder for demo.json, grid.png, episode-<i>.png and the run.
        steps: optimizer steps.
        batch: episodes of a step.
        size: side of the images in pixels, 8n + 1.
        lr: learning rate.
        episodes: test episodes.
        seed: of the training.
        pictures: episodes in the pictures.
        check: end with code 1 unless the trained network beats both baselines.
    """

    out: str = "report/demo"
    steps: int = 400
    batch: int = 8
    size: int = 65
    lr: float = 3e-3
    episodes: int = 200
    seed: int = 0
    pictures: int = 6
    check: bool = True


def demo(config: DemoConfig) -> int:
    """Trains, evaluates, writes pictures and demo.json into ``out``; 0 if the network beats the baselines, else 1.

    The baselines: foreground everywhere, and cosines with mean prototypes of an untrained network of the same size.
    """
    started = time.perf_counter()
    out = Path(config.out)
    run = Config(
        data=DataConfig("glyphs", size=config.size),
        model=ModelConfig("dpcn", "tiny", options=SMALL["dpcn"]),
        optim=OptimConfig("adamw", steps=config.steps, batch=config.batch, lr=config.lr, warmup=30, clip=1.0),
        out=str(out / "run"),
        seed=config.seed,
        device="cpu",
        save_every=config.steps,
        tensorboard=False,
    )
    for old in checkpoints.complete(out / "run" / "checkpoints"):
        checkpoints.discard(old)
    checkpoint = train(run)
    trained_in = time.perf_counter() - started
    model, _, _ = checkpoints.load_model(checkpoint)
    torch.manual_seed(config.seed)
    untrained = checkpoints.build_model(ModelConfig("panet", "tiny")).eval()
    test = eval_episodes(run.data, 0, config.episodes)
    outcomes = {
        "DPCN, trained": measure(model, test, batch=8, pictures=config.pictures, label="DPCN"),
        "prototype cosine, untrained": measure(untrained, test, batch=8, label="untrained"),
        "foreground everywhere": measure(AllForeground(), test, batch=8, label="all foreground"),
    }
    scores = {name: {k: o.result[k] for k in ("miou", "fb_iou")} for name, o in outcomes.items()}
    rows = outcomes["DPCN, trained"].rows
    for i, row in enumerate(rows):
        write_png(out / f"episode-{i}.png", row)
    grid(rows, out / "grid.png")
    best = max(s["miou"] for name, s in scores.items() if name != "DPCN, trained")
    better = scores["DPCN, trained"]["miou"] > best
    result: dict[str, Any] = {
        "scores": scores,
        "better_than_baselines": better,
        "episodes": config.episodes,
        "steps": config.steps,
        "seconds": {"train": trained_in, "total": time.perf_counter() - started},
        "pictures": [f"episode-{i}.png" for i in range(len(rows))],
        "columns": ["support", "query", "prediction", "truth"],
        "environment": environment("cpu"),
    }
    write_bytes(out / "demo.json", (json.dumps(result, indent=1) + "\n").encode())
    for name, score in scores.items():
        print(
            f"{name:28} mIoU {score['miou']:5.1f}  FB-IoU {score['fb_iou']:5.1f}  ({config.episodes} unseen episodes)"
        )
    print("The object asked for is usually the largest one: this does not show that the network uses its support.")
    print(f"{out}/demo.json, {out}/grid.png after {result['seconds']['total']:.0f} s")
    if config.check and not better:
        print("demo: the trained network does not beat the baselines")
        return 1
    return 0
