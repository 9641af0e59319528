"""The one way in which the networks resize maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resized(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Maps (B, C, h, w) at (H, W), bilinearly with aligned corners; the maps themselves when they have that size."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=True)
