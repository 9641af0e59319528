"""Random calls of dense_cosine_max and dense_cosine_match."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fss_kernels._fuzz import Draw
from fss_kernels.testing import Sample


def _call(d: Draw) -> tuple[dict[str, Tensor], dict[str, Any]]:
    batch, channels, grid, support_grid = d.size(2), d.channels(), d.grid(9), d.grid(9)
    shots = d.of((), (1,), (2,), (3,))
    tensors = {
        "query": d.features(batch, channels, *grid),
        "support": d.features(batch, *shots, channels, *support_grid, channels=1 + len(shots)),
    }
    if d.of(True, False):
        tensors["mask"] = d.mask(batch, *shots, *d.of(support_grid, d.grid(12)))
    return tensors, d.normalisation(tensors.get("mask"), channels)


def dense_cosine_max(d: Draw) -> Sample:
    """With and without shots, masks and windows."""
    tensors, options = _call(d)
    windows = d.odd_sizes(5, most=3)
    return Sample("random", tensors, {**options, "windows": tuple(windows), "masked": d.of("zero", "exclude")})


def dense_cosine_match(d: Draw) -> Sample:
    """With and without shots and masks."""
    return Sample("random", *_call(d))
