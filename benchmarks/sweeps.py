"""Sizes along one axis at a time, for plots of time and memory: ``python -m benchmarks run --sweep``.

Every op has a base; along an axis one number varies and the others stay. The mask has the size of the image that gives
such a grid at stride 8, and a disc of the wanted share of foreground.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BASE: dict[str, dict[str, Any]] = {
    "masked_avg_pool": {"batch": 4, "channels": 512, "grid": 60, "image": 473},
    "prototype_cosine": {"batch": 4, "channels": 512, "grid": 60, "prototypes": 2},
    "dense_cosine_max": {"batch": 1, "channels": 512, "grid": 60, "image": 473, "shots": 1},
    "dense_cosine_match": {"batch": 1, "channels": 512, "grid": 60},
    "hypercorrelation": {"batch": 1, "channels": 512, "grid": 50, "image": 393},
    "dynamic_conv2d": {"batch": 4, "channels": 256, "grid": 60},
}
GRIDS, CHANNELS, BATCHES, SHOTS = (30, 45, 60, 90, 128), (128, 256, 512, 1024, 2048), (1, 2, 4, 8), (1, 5, 10)
FOREGROUND = (0.02, 0.1, 0.2, 0.6, 1.0)
AXES: dict[str, dict[str, tuple[float, ...]]] = {
    "masked_avg_pool": {"grid": GRIDS, "channels": CHANNELS, "batch": (*BATCHES, 20), "foreground": FOREGROUND},
    "prototype_cosine": {"grid": GRIDS, "channels": CHANNELS, "batch": BATCHES, "prototypes": (1, 2, 5, 10)},
    "dense_cosine_max": {
        "grid": GRIDS,
        "channels": CHANNELS,
        "batch": BATCHES,
        "shots": SHOTS,
        "foreground": FOREGROUND,
    },
    "dense_cosine_match": {"grid": GRIDS[:-1], "channels": CHANNELS},
    "hypercorrelation": {"grid": (13, 25, 50, 90), "channels": CHANNELS, "batch": BATCHES, "foreground": FOREGROUND},
    "dynamic_conv2d": {"grid": GRIDS, "channels": CHANNELS[:-1], "batch": BATCHES},
}
# Released code, the best eager form and the fastest compiled one: what is compiled anew at every size takes minutes.
PEERS = {
    "masked_avg_pool": ("eager", "bmm", "compile(bmm)"),
    "prototype_cosine": ("cosine_similarity", "folded-bmm", "compile(folded-bmm)"),
    "dense_cosine_max": ("pfenet", "argmax-gather", "packed-foreground", "compile(argmax-gather)"),
    "dense_cosine_match": ("both-maxima", "compile(both-maxima)"),
    "hypercorrelation": ("hsnet", "cosine-bmm", "compile(hsnet)"),
    "dynamic_conv2d": ("grouped", "per-sample", "compile(shifted)"),
}


def label(axis: str, value: float) -> str:
    """The size label of a point."""
    return f"{axis}={value:g}"


def sizes(op: str) -> dict[str, dict[str, Any]]:
    """Label -> arguments of the spec's benchmark_sample, "modes", and "foreground" where that is the axis."""
    found = {}
    for axis, values in AXES[op].items():
        for value in values:
            arguments = {**BASE[op], axis: value, "modes": ("forward",)}
            if axis == "grid" and "image" in arguments:
                arguments["image"] = 8 * int(value) - 7
            found[label(axis, value)] = arguments
    return found


def disc(batch: int, size: int, share: float) -> Tensor:
    """Masks (batch, size, size): the pixels nearest to a centre that moves with the sample, exactly this share."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    i = torch.arange(batch).view(batch, 1, 1)
    distance = (y - 0.3 * torch.sin(1.0 + i)) ** 2 + (x - 0.3 * torch.cos(2.0 * i)) ** 2
    nearest = distance.flatten(1).argsort(1)[:, : max(1, round(share * size * size))]
    return torch.zeros(batch, size * size).scatter_(1, nearest, 1.0).view(batch, size, size)
