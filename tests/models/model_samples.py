"""Small episodes and models for the tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

import fss_models
from fss_models.backbones import Features, Tiny

SMALL: dict[str, dict[str, Any]] = {
    "dpcn": {"channels": 8, "dilations": (1, 2)},
    "dpnet": {"channels": 8, "bins": (6, 3)},
    "panet": {},
}


class Episode(NamedTuple):
    query: torch.Tensor
    support: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor

    def to(self, dtype: torch.dtype) -> Episode:
        return self._replace(query=self.query.to(dtype), support=self.support.to(dtype))


def blob(batch: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """A rectangle of 1 with a rim of 255 in 0, another one every sample."""
    labels = torch.zeros(batch, height, width, dtype=torch.int64)
    for b in range(batch):
        top, left = (int(torch.randint(2, n // 3, (), generator=generator)) for n in (height, width))
        bottom, right = top + height // 2, left + width // 2
        labels[b, top - 1 : bottom + 1, left - 1 : right + 1] = 255
        labels[b, top:bottom, left:right] = 1
    return labels


def episode(batch: int = 2, shots: int = 1, size: tuple[int, int] = (33, 41), seed: int = 0) -> Episode:
    """An object of another colour before noise; all in float32."""
    generator = torch.Generator().manual_seed(seed)
    target = blob(batch, *size, generator)
    mask = blob(batch * shots, *size, generator).view(batch, shots, *size)
    colour = torch.randn(batch, 3, 1, 1, generator=generator)
    query = torch.randn(batch, 3, *size, generator=generator) + 2 * colour * (target == 1)[:, None]
    support = torch.randn(batch, shots, 3, *size, generator=generator)
    support = support + 2 * colour[:, None] * (mask == 1)[:, :, None]
    return Episode(query, support, mask, target)


def small(name: str, dtype: torch.dtype = torch.float32, backbone: nn.Module | None = None, **options: Any):
    """A small model without dropout, always with the same weights."""
    torch.manual_seed(1)
    options = SMALL[name] | options
    if name != "panet":
        options = {"mid_dropout": 0.0, "cls_dropout": 0.0} | options
    return fss_models.build(name, Tiny(8) if backbone is None else backbone, **options).to(dtype)


def stages(batch: int, shots: int, channels=(6, 10, 12), grid=(7, 9), dtype=torch.float64, signed: bool = True):
    """Features of query and support, as a backbone would give them."""
    generator = torch.Generator().manual_seed(batch + shots)

    def features(n: int) -> Features:
        maps = [torch.randn(n, c, *grid, generator=generator, dtype=torch.float64) for c in channels]
        return Features(*((x if signed else x.relu()).to(dtype).requires_grad_() for x in maps))

    return features(batch), features(batch * shots)


def soft_mask(batch: int, shots: int, size=(25, 33)) -> torch.Tensor:
    """Masks (B, S, H, W) of 0 and 1 in float64; on the grid of `stages` they have weights between."""
    labels = blob(batch * shots, *size, torch.Generator().manual_seed(7))
    return (labels == 1).double().view(batch, shots, *size)


@torch.no_grad()
def balanced(model, e: Episode):
    """The model with its last bias moved so that it predicts foreground for half of the pixels of every episode."""
    logits = model(*e[:3])
    classifier = model.head.decoder[2] if hasattr(model.head, "decoder") else model.head.fusion.classify
    classifier[2].bias[0] += (logits[:, 1] - logits[:, 0]).median()
    return model
