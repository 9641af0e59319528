"""Evaluation as a protocol says, in one process or many, and pictures of what was predicted."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fss_models import checkpoints
from fss_models.config import Config, DataConfig, ModelConfig
from fss_models.data.build import class_names, eval_episodes, left_out, protocol_of
from fss_models.data.episodes import Geometry, batches, denormalise, to_batch
from fss_models.data.files import Array, write_bytes, write_png
from fss_models.data.protocols import Protocol
from fss_models.errors import ConfigError
from fss_models.interpolation import resized
from fss_models.metrics import EpisodeIoU
from fss_models.model import FewShotModel
from fss_models.processes import Processes, processes
from fss_models.train import BadFiles

_log = logging.getLogger(__name__)
_COLOUR = np.array([255, 60, 20], np.float32)


@dataclasses.dataclass
class EvalConfig:
    """An evaluation.

    Attributes:
        checkpoint: file, checkpoint folder or run folder. Empty: the untrained network of ``model``.
        model: network if there is no checkpoint.
        data: episodes. None: the checkpoint's, which is what it was trained for, but for its ``cache``. On the command
            line and in its file a field that is given changes that of the checkpoint's, and the others stay.
        cache: folder for areas of classes. Empty: that of ``data``; a checkpoint names no place to write to.
        shots: None: those of ``data``.
        episodes: test episodes a seed. None: the protocol's.
        seeds: None: the protocol's; for the training classes shifted past the seed of the training, which would draw
            the training's own episodes again.
        part: ``test``, or ``train``: the training classes.
        scales: the inputs are resized by these factors (to 8n + 1) and the probabilities averaged.
        batch: episodes at once in a process.
        out: folder for result.json and grid.png. Empty: nothing is written.
        grid: how many episodes the picture shows.
        save: keep every predicted mask as a PNG in out/predictions.
        device: ``auto``: CUDA if there is one.
        seed: of the weights of an untrained network.
    """

    checkpoint: str = ""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig | None = None
    cache: str = ""
    shots: int | None = None
    episodes: int | None = None
    seeds: list[int] | None = None
    part: Literal["test", "train"] = "test"
    scales: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    batch: int = 1
    out: str = ""
    grid: int = 8
    save: bool = False
    device: str = "auto"
    seed: int = 0


def probabilities(
    model: nn.Module, query: Tensor, support: Tensor, mask: Tensor, scales: Sequence[float] = (1.0,)
) -> Tensor:
    """Foreground probabilities (B, H, W), averaged over input scales.

    Args:
        model: query, support, mask to logits (B, 2, H, W).
        query: (B, 3, H, W).
        support: (B, S, 3, H, W).
        mask: (B, S, H, W).
        scales: factors of H and W, rounded to 8n + 1.
    """
    h, w = query.shape[-2:]
    total = query.new_zeros(query.shape[0], h, w)
    for scale in scales:
        size = torch.Size(max(1, round((n - 1) * scale / 8)) * 8 + 1 for n in (h, w))
        if size == (h, w) or scale == 1.0:
            logits = model(query, support, mask)
        else:
            s = resized(support.flatten(0, 1), size).unflatten(0, support.shape[:2])
            logits = model(resized(query, size), s, F.interpolate(mask, size, mode="nearest"))
        total += resized(logits.float().softmax(1)[:, 1:], (h, w))[:, 0]
    return total / len(scales)


def at_truth(chances: Tensor, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    """Probabilities (H, W) of the square input at the size (h, w) of the truth: cut to the image, then resized."""
    h, w = geometry.filled
    part = chances[None, None, :h, :w] if size == geometry.original else chances[None, None]
    return resized(part, size)[0, 0]


def overlay(image: Array, mask: Array) -> Array:
    """The image with a coloured foreground and its outline, (H, W, 3) uint8; mask (H, W), 0 is background."""
    inside = mask > 0
    shown = image.astype(np.float32)
    shown[inside] = 0.5 * shown[inside] + 0.5 * _COLOUR
    padded = np.pad(inside, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    shown[inside & ~inner] = _COLOUR
    return shown.round().astype(np.uint8)


def _picture(image: Tensor) -> Array:
    return (denormalise(image.cpu()).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def row_of(episode: dict[str, Any], prediction: Tensor) -> Array:
    """Support with its mask, query, prediction, truth, side by side: (H, 4 W, 3) uint8. Pixels at the input's size."""
    query = _picture(episode["query"])
    truth = (episode["target"].cpu().numpy() == 1).astype(np.uint8)
    guess = prediction.cpu().numpy().astype(np.uint8)
    support = overlay(_picture(episode["support"][0]), episode["mask"][0].cpu().numpy())
    return np.concatenate([support, query, overlay(query, guess), overlay(query, truth)], 1)


def grid(rows: Sequence[Array], path: Path) -> None:
    """Writes rows of `row_of` below a line of titles."""
    height = 14
    picture = Image.new("RGB", (rows[0].shape[1], height + sum(r.shape[0] for r in rows)), "white")
    draw = ImageDraw.Draw(picture)
    for i, title in enumerate(("support", "query", "prediction", "truth")):
        draw.text((i * rows[0].shape[1] // 4 + 2, 1), title, fill="black")
    top = height
    for row in rows:
        picture.paste(Image.fromarray(row), (0, top))
        top += row.shape[0]
    write_png(path, np.asarray(picture))


class AllForeground(nn.Module):
    """Says foreground everywhere: what a result must beat."""

    def forward(self, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, 2, H, W)."""
        zeros = torch.zeros_like(query[:, :1])
        return torch.cat([zeros, zeros + 1], 1)


@dataclasses.dataclass
class Outcome:
    """What `measure` found.

    Attributes:
        result: of `EpisodeIoU.compute`.
        bad: messages of files that could not be used.
        rows: pictures of the first episodes.
    """

    result: dict[str, Any]
    bad: list[str]
    rows: list[Array]


@torch.inference_mode()
def measure(
    model: nn.Module,
    episodes: Dataset,
    group: Processes | None = None,
    *,
    batch: int = 1,
    scales: Sequence[float] = (1.0,),
    workers: int = 0,
    bad_limit: int = 10,
    pictures: int = 0,
    save: Path | None = None,
    label: str = "evaluate",
) -> Outcome:
    """Predicts every episode and sums up the metric; process r of n takes the episodes r, r + n, ...

    Args:
        model: in evaluation mode, on the group's device.
        episodes: of `eval_episodes`.
        group: None: this process alone, on the CPU.
        batch: episodes at once.
        scales: see `probabilities`.
        workers: processes that load data.
        bad_limit: so many unusable files may be replaced by others.
        pictures: so many episodes are drawn, in the first process.
        save: folder for every predicted mask, <index>.png of 0 and 255.
        label: of the progress bar.

    Raises:
        DataError: too many unusable files.
    """
    group = group or Processes(0, 1, torch.device("cpu"))
    names = class_names(episodes)
    metric = EpisodeIoU(list(names), names).to(group.device)
    total: int = len(episodes)  # type: ignore[arg-type]
    indices = list(range(group.rank, total, group.count))
    loaded = batches(episodes, [indices[i : i + batch] for i in range(0, len(indices), batch)], workers=workers)
    bad = BadFiles(bad_limit)
    bad.add([left_out(episodes)], "left out")
    rows: list[Array] = []
    rounds = range(0, total, group.count * batch)  # some processes may have nothing in the last one
    for _ in tqdm(rounds, desc=label, unit="batch", disable=None if group.first else True):
        with group.together():
            items = next(loaded, None)
            bad.add(items["bad"] if items else [])
        if items is None:
            break
        query, support, mask, _ = to_batch(items, group.device)
        chances = probabilities(model, query, support, mask, scales)
        for i, truth in enumerate(items["truth"]):
            judged = at_truth(chances[i], items["geometry"][i], tuple(truth.shape)) > 0.5
            truth = truth.to(group.device)
            metric.update(judged[None].long(), truth[None], items["class_id"][i : i + 1])
            if save is not None:
                write_png(save / f"{int(items['index'][i])}.png", judged.cpu().numpy().astype(np.uint8) * 255)
            if group.first and len(rows) < pictures:
                rows.append(row_of({k: items[k][i] for k in ("query", "support", "mask", "target")}, chances[i] > 0.5))
    return Outcome(metric.compute(), bad.share(group), rows)


def environment(device: torch.device | str) -> dict[str, Any]:
    """What a result depends on besides the code."""
    import fss_kernels

    kind = torch.device(device)
    return {
        "fss_kernels": fss_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "device": torch.cuda.get_device_name(kind) if kind.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Runs a protocol's episodes for each seed; the result, which is also written to ``out``.

    Returns:
        ``protocol``, ``data``, ``trained_on``, ``model``, ``checkpoint``, ``step``, ``seeds`` (a result of `EpisodeIoU`
        each), ``miou`` and ``fb_iou`` (mean and standard deviation over the seeds, in percent), ``bad_files``,
        ``environment``.

    Raises:
        UserError: in one line, anything the user can put right.
    """
    with processes(config.device) as group:
        with group.together():
            model, trained, step = _model(config)
            data = config.data or (dataclasses.replace(trained.data, cache="") if trained else DataConfig())
            if config.cache:
                data = dataclasses.replace(data, cache=config.cache)
            if config.shots is not None:
                data = dataclasses.replace(data, shots=config.shots)
            if data.shots < 1:
                raise ConfigError(f"shots must be at least 1, got {data.shots}")
            chosen = protocol_of(data)
            count = chosen.episodes if config.episodes is None else config.episodes
            seeds = _seeds(config, chosen, trained)
            if count < 1 or config.batch < 1 or not seeds or not config.scales:
                raise ConfigError("episodes and batch must be at least 1, seeds and scales must not be empty")
        if trained and (data.protocol, data.fold) != (trained.data.protocol, trained.data.fold):
            _log.warning("trained on %s fold %d, evaluated on %s fold %d: classes may not be unseen",
                         trained.data.protocol, trained.data.fold, data.protocol, data.fold)  # fmt: skip
        model.to(group.device)
        out = Path(config.out) if config.out else None
        outcomes = {}
        for i, seed in enumerate(seeds):
            with group.together():
                episodes = eval_episodes(data, seed, count, config.part)
            outcomes[seed] = measure(
                model,
                episodes,
                group,
                batch=config.batch,
                scales=config.scales,
                workers=data.workers,
                bad_limit=data.bad_limit,
                pictures=config.grid if i == 0 and out else 0,
                save=out / "predictions" / str(seed) if out and config.save else None,
                label=f"seed {seed}",
            )
        result = {
            "protocol": {"name": data.protocol, **dataclasses.asdict(chosen), "episodes": count, "seeds": seeds,
                         "scales": list(config.scales), "part": config.part},
            "data": dataclasses.asdict(data),
            "trained_on": dataclasses.asdict(trained.data) if trained else None,
            "model": dataclasses.asdict(trained.model if trained else config.model),
            "checkpoint": config.checkpoint,
            "step": step,
            "seeds": {str(seed): o.result for seed, o in outcomes.items()},
            **{name: _spread([o.result[name] for o in outcomes.values()]) for name in ("miou", "fb_iou")},
            "bad_files": sorted({message for o in outcomes.values() for message in o.bad}),
            "environment": {**environment(group.device), "processes": group.count},
        }  # fmt: skip
        if out and group.first:
            write_bytes(out / "result.json", (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
            rows = next(iter(outcomes.values())).rows
            if rows:
                grid(rows, out / "grid.png")
    return result


def _model(config: EvalConfig) -> tuple[FewShotModel, Config | None, int]:
    """The network in evaluation mode, the configuration of its training and its step; None, 0: it is untrained."""
    if config.checkpoint:
        return checkpoints.load_model(config.checkpoint)
    torch.manual_seed(config.seed)
    return checkpoints.build_model(config.model).eval(), None, 0


def _seeds(config: EvalConfig, chosen: Protocol, trained: Config | None) -> list[int]:
    own = trained.seed if trained and config.part == "train" else None
    if config.seeds is None:
        return [seed if own is None else own + 1 + seed for seed in chosen.seeds]
    if own in config.seeds:
        _log.warning("seed %d is that of the training: it draws the episodes that were trained on", own)
    return config.seeds


def _spread(values: list[float]) -> dict[str, float]:
    array = np.array(values)
    return {"mean": float(array.mean()), "std": float(array.std(ddof=1)) if len(values) > 1 else 0.0}
