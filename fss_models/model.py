"""What all models share: the backbone and what of it trains, arguments and their checks, the way to image size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fss_kernels import _checks
from fss_models.backbones import Backbone, Features, Tiny
from fss_models.interpolation import resized
from fss_models.losses import IGNORE


def default_stages(backbone: nn.Module, stages: bool | tuple[int, ...]) -> bool | tuple[int, ...]:
    """The stages of a backbone that train by default: ``stages`` of a pretrained kind, all of any other module."""
    return stages if isinstance(backbone, Backbone) and not isinstance(backbone, Tiny) else True


_RANKS = {"query": "(B, 3, H, W)", "support": "(B, S, 3, H, W)", "mask": "(B, S, H, W)", "target": "(B, H, W)"}
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
_DTYPES = {"mask": (*_checks.MASK_DTYPES, *_INTEGERS), "target": (torch.int64,)}


def check_episode(model: str, query: Tensor, support: Tensor, mask: Tensor, target: Tensor | None = None) -> None:
    """Shapes, dtypes and devices of an episode, before anything is computed."""
    given = {"query": query, "support": support, "mask": mask} | ({} if target is None else {"target": target})
    for name, value in given.items():
        shape = _RANKS[name]
        _checks.tensor(model, name, value, {shape.count(",") + 1: shape}, _DTYPES.get(name, _checks.FEATURE_DTYPES))
        _checks.not_empty(model, name, value, slice(None), "elements")
        _checks.same_device(model, name, value, "query", query)
    batch, shots, size = query.shape[0], support.shape[1], query.shape[2:]
    expected = {"query": (batch, 3, *size), "support": (batch, shots, 3, *size), "mask": (batch, shots, *size)}
    expected["target"] = (batch, *size)
    for name, value in given.items():
        if tuple(value.shape) != expected[name]:
            raise ValueError(f"{model}: {name} must have shape {expected[name]}, got {tuple(value.shape)}")


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
        _checks.boolean(self.name, "frozen_bn", frozen_bn)
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
