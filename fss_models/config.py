"""One typed configuration for everything; it travels inside every checkpoint."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from fss_models.errors import ConfigError


@dataclasses.dataclass
class DataConfig:
    """Which episodes.

    Attributes:
        protocol: a name of `fss_models.data.PROTOCOLS`; data set, fold rule, size, area, episodes, seeds.
        root: folder of the data set; glyphs need none.
        train_list: list file of the training images; ``{fold}`` becomes the fold. Empty: as HSNet's files are read, for
            PASCAL <root>/splits/pascal/trn/fold<f>.txt of the other folds, for COCO splits/coco/trn/fold{fold}.txt of
            the fold, for FSS-1000 splits/fss/trn.txt.
        test_list: the same for testing. Empty: val/fold{fold}.txt of the fold, test.txt.
        fold: 0 ... 3.
        shots: support images of an episode.
        size: side of the input in pixels, 8n + 1. None: the protocol's.
        min_area: None: the protocol's.
        fold_rule: ``contiguous`` or ``step``. None: the protocol's.
        augment: whether training images from files are changed at random.
        workers: processes that load data; 0: the training process itself.
        bad_limit: so many unusable files may be replaced by others before the run stops.
        cache: folder for areas of classes. Empty: none is kept.
    """

    protocol: str = "glyphs"
    root: str = ""
    train_list: str = ""
    test_list: str = ""
    fold: int = 0
    shots: int = 1
    size: int | None = None
    min_area: int | None = None
    fold_rule: str | None = None
    augment: bool = True
    workers: int = 0
    bad_limit: int = 10
    cache: str = ""


@dataclasses.dataclass
class ModelConfig:
    """Which network.

    Attributes:
        name: ``dpcn``, ``dpnet`` or ``panet``.
        backbone: a name of `fss_models.backbones.BACKBONES`.
        weights: file with pretrained weights of the backbone. Empty: random.
        options: keyword arguments of the model.
    """

    name: str = "dpcn"
    backbone: str = "tiny"
    weights: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class OptimConfig:
    """How it is trained: SGD, or Adam, with polynomial decay.

    Attributes:
        optimizer: ``sgd`` (momentum) or ``adamw``.
        lr: learning rate of everything but the backbone.
        backbone_lr: None: the models' own rule.
        momentum: of SGD.
        weight_decay: of both.
        power: the rate is multiplied by (1 - step / steps) ** power.
        warmup: so many steps rise linearly to the rate.
        clip: largest norm of all gradients. None: no clipping.
        steps: optimizer steps.
        batch: episodes of a step, over all processes.
        accumulate: a process takes its part of the batch in so many pieces.
        amp: ``no``, ``bf16`` or ``fp16`` (with a gradient scaler).
        non_finite_limit: so many steps in a row may be skipped for gradients that are not finite.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.05
    backbone_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    warmup: int = 0
    clip: float | None = None
    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    amp: Literal["no", "bf16", "fp16"] = "no"
    non_finite_limit: int = 20


@dataclasses.dataclass
class Config:
    """A training run.

    Attributes:
        data: episodes.
        model: network.
        optim: training.
        out: folder of the run: config.json, log.csv, checkpoints.
        seed: of everything random.
        device: ``auto``: CUDA if there is one. Under torchrun every process takes the GPU of its local rank.
        save_every: steps between checkpoints.
        keep: how many checkpoints stay; the last one always does.
        log_every: steps between lines of the log.
        tensorboard: write TensorBoard events as well, if it is installed.
        resume: go on from the newest checkpoint of ``out``; without one start anew.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    out: str = "runs/dpcn"
    seed: int = 0
    device: str = "auto"
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = True
    resume: bool = False

    def check(self, processes: int = 1) -> None:
        """ConfigError for values that no run can have, with the option's name."""
        for name, value in (
            ("data.shots", self.data.shots), ("optim.steps", self.optim.steps), ("optim.batch", self.optim.batch),
            ("optim.accumulate", self.optim.accumulate), ("save_every", self.save_every), ("keep", self.keep),
            ("log_every", self.log_every),
        ):  # fmt: skip
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        check_size(self.data.size)
        pieces = self.optim.accumulate * processes
        if self.optim.batch % pieces:
            raise ConfigError(
                f"optim.batch of {self.optim.batch} does not divide into {processes} processes x "
                f"{self.optim.accumulate} pieces"
            )
        for name, number in (("optim.lr", self.optim.lr), ("optim.clip", self.optim.clip)):
            if number is not None and not number > 0:
                raise ConfigError(f"{name} must be above 0, got {number}")
        for name, number in (
            ("optim.momentum", self.optim.momentum), ("optim.weight_decay", self.optim.weight_decay),
            ("optim.power", self.optim.power), ("optim.warmup", self.optim.warmup),
            ("optim.non_finite_limit", self.optim.non_finite_limit), ("data.workers", self.data.workers),
            ("data.bad_limit", self.data.bad_limit),
        ):  # fmt: skip
            if not number >= 0:
                raise ConfigError(f"{name} must not be negative, got {number}")


def check_size(size: int | None) -> None:
    """ConfigError for a side that is not 8n + 1: the grids of stride 8 would not align with the corners."""
    if size is not None and (size < 9 or (size - 1) % 8):
        below = max(9, (size - 1) // 8 * 8 + 1)
        raise ConfigError(f"data.size must be 8n + 1, got {size}; near it are {below} and {below + 8}")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """The inverse of `to_dict`; ConfigError for unknown names and values of another type. ``where`` names the file."""
    return _read(Config, values, where, "")


def _read(cls: Any, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {prefix or 'the configuration'} must be a mapping, got {type(values).__name__}")
    types = typing.get_type_hints(cls)
    unknown = [k for k in values if k not in types]
    if unknown:
        raise ConfigError(f"{where}: unknown option {prefix}{unknown[0]}")
    read = {}
    for name, value in values.items():
        kind = types[name]
        if dataclasses.is_dataclass(kind):
            read[name] = _read(kind, value, where, f"{prefix}{name}.")
        elif not _fits(value, kind):
            raise ConfigError(f"{where}: {prefix}{name} cannot be {value!r}")
        else:
            read[name] = value
    return cls(**read)


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is dict:
        return isinstance(value, dict)
    if arguments:  # a union
        return any(_fits(value, a) for a in arguments)
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else kind)
