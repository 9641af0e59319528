"""Layers that several networks of the PFENet family share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fss_kernels import masked_avg_pool
from fss_models.backbones import Features
from fss_models.interpolation import resized


def convolution(inputs: int, outputs: int, size: int, *, bias: bool = False, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the grid, and ReLU."""
    padding = dilation * (size // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, 1, padding, dilation, bias=bias), nn.ReLU())


def pair(channels: int) -> nn.Sequential:
    """Two 3x3 convolutions with ReLU."""
    return nn.Sequential(convolution(channels, channels, 3), convolution(channels, channels, 3))


def classifier(channels: int, dropout: float) -> nn.Sequential:
    """3x3 convolution, ReLU, dropout, two logits."""
    return nn.Sequential(convolution(channels, channels, 3), nn.Dropout2d(dropout), nn.Conv2d(channels, 2, 1))


class Reduction(nn.Module):
    """Mid-level features: stages 3 and 2 on the grid of stage 3, reduced by a 1x1 convolution (PFENet)."""

    def __init__(self, stages: Sequence[int], channels: int, dropout: float) -> None:
        super().__init__()
        self.reduce = nn.Sequential(convolution(stages[1] + stages[0], channels, 1), nn.Dropout2d(dropout))

    def forward(self, features: Features) -> Tensor:
        """Features to (B, channels, h, w)."""
        stage2 = resized(features.stage2, features.stage3.shape[-2:])
        return self.reduce(torch.cat([features.stage3, stage2], 1))


def mean_prototype(features: Tensor, mask: Tensor) -> Tensor:
    """Masked average of every shot, averaged: features (B*S, C, h, w), mask (B, S, H, W) to (B, C)."""
    return masked_avg_pool(features, mask.flatten(0, 1)).unflatten(0, mask.shape[:2]).mean(1)


def expanded(prototype: Tensor, like: Tensor) -> Tensor:
    """A prototype (B, C) at every pixel of the grid of (B, C', h, w), without a copy."""
    return prototype[..., None, None].expand(-1, -1, *like.shape[-2:])


class ASPP(nn.Module):
    """Five views of a map, one of the whole image and four of growing neighbourhoods, joined, then a residual pair."""

    def __init__(self, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.image = convolution(channels, channels, 1, bias=True)
        self.views = nn.ModuleList([convolution(channels, channels, 1, bias=True)])
        self.views.extend(convolution(channels, channels, 3, bias=True, dilation=d) for d in dilations)
        self.join = convolution((len(self.views) + 1) * channels, channels, 1)
        self.refine = pair(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        image = self.image(x.mean((2, 3), keepdim=True)).expand_as(x)
        joined = self.join(torch.cat([image, *(view(x) for view in self.views)], 1))
        return joined + self.refine(joined)


class FeatureEnrichment(nn.Module):
    """PFENet's feature enrichment module: comparison at several bins, refined from one bin to the next.

    Args:
        channels: of the query and of everything inside.
        others: channels of all maps compared with the query.
        bins: sizes of the grids: int rows and columns, or float parts of the query's grid.
        dropout: of the classifiers.
    """

    def __init__(self, channels: int, others: int, bins: Sequence[int | float], dropout: float) -> None:
        super().__init__()
        self.bins = tuple(bins)
        count = len(self.bins)
        self.merge = nn.ModuleList(convolution(channels + others, channels, 1) for _ in range(count))
        self.alpha = nn.ModuleList(convolution(2 * channels, channels, 1) for _ in range(count - 1))
        self.beta = nn.ModuleList(pair(channels) for _ in range(count))
        self.inner = nn.ModuleList(classifier(channels, dropout) for _ in range(count))
        self.join = convolution(count * channels, channels, 1)
        self.refine = pair(channels)
        self.classify = classifier(channels, dropout)

    def forward(self, query: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Query (B, C, h, w) and maps (B, C', h', w') to logits (B, 2, h, w) and the inner logits of every bin.

        A map of one pixel is a prototype, repeated at every bin.
        """
        grid = query.shape[-2:]
        pyramid: list[Tensor] = []
        for i, size in enumerate(self.grids(grid)):
            pooled = F.adaptive_avg_pool2d(query, size)
            merged = self.merge[i](torch.cat([pooled, *(self.at(m, size) for m in maps)], 1))
            if i > 0:
                merged = merged + self.alpha[i - 1](torch.cat([merged, resized(pyramid[-1], size)], 1))
            pyramid.append(merged + self.beta[i](merged))
        joined = self.join(torch.cat([resized(p, grid) for p in pyramid], 1))
        logits = self.classify(joined + self.refine(joined))
        return logits, [classify(p) for classify, p in zip(self.inner, pyramid, strict=True)]

    def grids(self, grid: Sequence[int]) -> list[tuple[int, int]]:
        """The size of every bin for a query of this size."""
        height, width = grid
        return [(b, b) if isinstance(b, int) else (max(1, int(b * height)), max(1, int(b * width))) for b in self.bins]

    @staticmethod
    def at(maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps at a bin: a prototype (B, C, 1, 1) repeated, anything else resized."""
        return maps.expand(-1, -1, *size) if maps.shape[-2:] == (1, 1) else resized(maps, size)
