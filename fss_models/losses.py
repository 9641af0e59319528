"""Losses of segmentation with two classes and pixels to ignore."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_models.interpolation import resized

IGNORE = 255


def sample_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Every sample's mean cross entropy over its valid pixels.

    Args:
        logits: (B, 2, h, w), resized bilinearly with aligned corners to the target's size; half precision is widened to
            float32.
        target: (B, H, W) int64, 0 background, 1 foreground, 255 ignored.

    Returns:
        (B,); 0, with gradient 0, for a sample without valid pixels.
    """
    logits = resized(logits if logits.dtype == torch.float64 else logits.float(), target.shape[-2:])
    losses = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    valid = (target != IGNORE).sum((1, 2)).clamp(min=1)
    return losses.sum((1, 2)) / valid


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over samples of `sample_losses`: every sample weighs the same, however many pixels it ignores.

    Example:
        >>> logits = torch.zeros(2, 2, 1, 2)
        >>> segmentation_loss(logits, torch.tensor([[[1, 255]], [[255, 255]]]))  # (log 2 + 0) / 2
        tensor(0.3466)
    """
    return sample_losses(logits, target).mean()
