"""What all models share: the backbone and what of it trains, arguments and their checks, the way to image size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fss_models.backbones import Backbone, Features, Tiny
from fss_models.interpolation import resized
from fss_models.losses import IGNORE


def check_option(model: str, name: str, value: Any, choices: Iterable[Any]) -> None:
    """An option that has one of a few values."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{model}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flags(model: str, **flags: Any) -> None:
    """True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{model}: {name} must be True or False, got {value!r}")


def check_count(model: str, name: str, value: Any) -> None:
    """A positive int."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{model}: {name} must be a positive int, got {value!r}")


def check_odd(model: str, name: str, value: Any, lowest: int = 1, highest: int = 9) -> None:
    """An odd size lowest ... highest."""
    if type(value) is not int or not lowest <= value <= highest or value % 2 == 0:
        raise ValueError(f"{model}: {name} must be an odd int {lowest} ... {highest}, got {value!r}")


def check_windows(model: str, value: Any) -> None:
    """Pairs of odd sizes."""
    pairs = isinstance(value, (tuple, list)) and all(isinstance(w, (tuple, list)) and len(w) == 2 for w in value)
    if not pairs or not value or not all(type(n) is int and n > 0 and n % 2 for w in value for n in w):
        raise ValueError(f"{model}: windows must be pairs (dh, dw) of odd int, got {value!r}")


def check_number(model: str, name: str, value: Any, lowest: float = 0.0, highest: float = float("inf")) -> None:
    """A number of a range."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not lowest <= value <= highest:
        raise ValueError(f"{model}: {name} must be a number {lowest:g} ... {highest:g}, got {value!r}")


def default_stages(backbone: nn.Module, stages: bool | tuple[int, ...]) -> bool | tuple[int, ...]:
    """What trains of a backbone when nothing is said: ``stages`` of a pretrained kind, all of any other module."""
    return stages if isinstance(backbone, Backbone) and not isinstance(backbone, Tiny) else True


def check_episode(model: str, query: Tensor, support: Tensor, mask: Tensor, target: Tensor | None = None) -> None:
    """Shapes, dtypes and devices of an episode, before anything is computed."""
    given = {"query": query, "support": support, "mask": mask} | ({} if target is None else {"target": target})
    ranks = {"query": "(B, 3, H, W)", "support": "(B, S, 3, H, W)", "mask": "(B, S, H, W)", "target": "(B, H, W)"}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{model}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.ndim != ranks[name].count(",") + 1:
            raise ValueError(f"{model}: {name} must have shape {ranks[name]}, got {tuple(value.shape)}")
        if 0 in value.shape:
            raise ValueError(f"{model}: {name} is empty, got shape {tuple(value.shape)}")
        if value.device != query.device:
            raise ValueError(f"{model}: {name} must be on the device of query, {query.device}, got {value.device}")
    for name, value in (("query", query), ("support", support)):
        if not value.is_floating_point():
            raise TypeError(f"{model}: {name} must be floating, got {str(value.dtype).removeprefix('torch.')}")
    if mask.is_complex():
        raise TypeError(f"{model}: mask must be bool, integer or floating, got {mask.dtype}")
    batch, shots, size = query.shape[0], support.shape[1], query.shape[2:]
    expected = {"query": (batch, 3, *size), "support": (batch, shots, 3, *size), "mask": (batch, shots, *size)}
    expected["target"] = (batch, *size)
    for name, value in given.items():
        if tuple(value.shape) != expected[name]:
            raise ValueError(f"{model}: {name} must have shape {expected[name]}, got {tuple(value.shape)}")
    if target is not None and target.dtype != torch.int64:
        raise TypeError(f"{model}: target must have dtype int64, got {str(target.dtype).removeprefix('torch.')}")


def labels_of(mask: Tensor) -> Tensor:
    """A label map of any dtype as int64: 1 foreground, 255 ignored, 0 everything else."""
    mask = mask if mask.is_floating_point() else mask.long()
    return torch.where(mask == 1, 1, torch.where(mask == IGNORE, IGNORE, 0))


def weights_of(flags: Tensor, features: Tensor) -> Tensor:
    """Flags as weights 0 and 1, in the dtype that sums of the features have."""
    return flags.to(torch.float64 if features.dtype == torch.float64 else torch.float32)


def precise(features: Tensor) -> Tensor:
    """Half precision widened to float32: the range of a score map may be smaller than its steps."""
    return features if features.dtype == torch.float64 else features.float()


class FewShotModel(nn.Module, ABC):
    """A backbone, ``segment`` (features to logits) and ``episode_loss`` (features to the training loss).

    Args:
        backbone: see `fss_models.backbones`.
        trainable_backbone: stages that train, of 1 ... 4, or True (all) or False (none). Stages that do not train get
            ``requires_grad=False``. A module without ``layer1`` ... ``layer4`` trains whole or not at all.
        frozen_bn: every BatchNorm of the backbone uses its running statistics in training, too.
    """

    def __init__(self, backbone: nn.Module, trainable_backbone: bool | Sequence[int], frozen_bn: bool) -> None:
        super().__init__()
        self.name = type(self).__name__
        if not isinstance(backbone, nn.Module):
            raise ValueError(f"{self.name}: backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        channels = getattr(backbone, "channels", None)
        if not isinstance(channels, (tuple, list)) or len(channels) != 3 or not all(type(c) is int for c in channels):
            raise ValueError(f"{self.name}: backbone.channels must be three int, those of stages 2 ... 4")
        self.channels_of_stages = tuple(channels)
        self.backbone = backbone
        self.frozen_bn = frozen_bn
        self._freeze(trainable_backbone)
        self.train()

    def _freeze(self, trainable: bool | Sequence[int]) -> None:
        if isinstance(trainable, bool):
            self.backbone.requires_grad_(trainable)
            return
        if not isinstance(trainable, (tuple, list)) or not all(s in (1, 2, 3, 4) for s in trainable):
            raise ValueError(
                f"{self.name}: trainable_backbone must be True, False or stages of 1 ... 4, got {trainable!r}"
            )
        if trainable and not all(isinstance(getattr(self.backbone, f"layer{i}", None), nn.Module) for i in range(1, 5)):
            raise ValueError(
                f"{self.name}: trainable_backbone must be True or False for a backbone without layer1 ... layer4"
            )
        self.backbone.requires_grad_(False)
        for stage in trainable:
            getattr(self.backbone, f"layer{stage}").requires_grad_(True)
            if stage == 1 and isinstance(stem := getattr(self.backbone, "layer0", None), nn.Module):
                stem.requires_grad_(True)

    def train(self, mode: bool = True) -> FewShotModel:
        """Training or evaluation; a frozen BatchNorm of the backbone always evaluates."""
        super().train(mode)
        if self.frozen_bn:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def encode(self, query: Tensor, support: Tensor) -> tuple[Features, Features]:
        """Features of query (B, 3, H, W) and support (B, S, 3, H, W), from one call of the backbone."""
        stages = self.backbone(torch.cat([query, support.flatten(0, 1)]))
        if not isinstance(stages, (tuple, list)) or [f.shape[1] for f in stages] != list(self.channels_of_stages):
            raise ValueError(
                f"{self.name}: backbone must return features of stages 2 ... 4 with {self.channels_of_stages} channels"
            )
        batch = query.shape[0]
        return Features(*(f[:batch] for f in stages)), Features(*(f[batch:] for f in stages))

    def with_masked_stage4(self, support: Features, mask: Tensor) -> Features:
        """Stage 4 of support computed from masked stage 3, as PFENet does."""
        backbone: Any = self.backbone
        weights = resized(mask.flatten(0, 1).unsqueeze(1), support.stage3.shape[-2:])
        return support._replace(stage4=backbone.stage4(support.stage3 * weights.to(support.stage3.dtype)))

    @abstractmethod
    def segment(self, query: Features, support: Features, labels: Tensor) -> Tensor:
        """Query (B, C, h, w), support (B*S, C, h, w) and labels (B, S, H, W) of support to logits (B, 2, h, w)."""

    @abstractmethod
    def episode_loss(self, query: Features, support: Features, labels: Tensor, target: Tensor) -> Tensor:
        """The training loss from features, support labels (B, S, H, W) and query labels (B, H, W)."""

    def forward(self, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, 2, H, W), background and foreground, at image size.

        Args:
            query: (B, 3, H, W), normalised images.
            support: (B, S, 3, H, W), S shots.
            mask: (B, S, H, W), bool, integer or floating labels of support: 1 is foreground, 0 background, 255 ignored
                (not foreground).

        Raises:
            TypeError, ValueError: an argument of another dtype, shape or device; the message names it.
        """
        check_episode(self.name, query, support, mask)
        return resized(self.segment(*self.encode(query, support), labels_of(mask)), query.shape[-2:])

    def loss(self, query: Tensor, support: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        """The training loss, a scalar. Arguments as `forward`; target (B, H, W) int64 with the labels of query.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        check_episode(self.name, query, support, mask, target)
        return self.episode_loss(*self.encode(query, support), labels_of(mask), target)
