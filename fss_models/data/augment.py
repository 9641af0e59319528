"""Random change of an image together with its mask, by kornia: one resampling, whatever is combined."""

from __future__ import annotations

import dataclasses

import kornia
import numpy as np
import torch
from torch import Tensor

from fss_models.data.episodes import MEAN
from fss_models.data.files import Array


@dataclasses.dataclass(frozen=True)
class Augment:
    """PFENet's training augmentation: scale, rotation (p = 1/2), flip (p = 1/2), crop, Gaussian blur (p = 1/2).

    What lies outside of the image gets the ImageNet mean and the label 255. The crop is drawn up to ``tries`` times
    until it keeps 85 % of the foreground, then the best one is taken.

    Attributes:
        size: side of the crop.
        scale: range of the scale.
        degrees: largest rotation, either way.
        blur: side of the blur's kernel, 0 for none; sigma as OpenCV chooses it.
        tries: of the crop.
        keep: share of the foreground that a crop must keep.

    Example:
        >>> image, label = np.zeros((20, 30, 3), np.uint8), np.ones((20, 30), np.uint8)
        >>> pixels, target = Augment(17)(image, label, np.random.default_rng(0))
        >>> tuple(pixels.shape), tuple(target.shape)
        ((3, 17, 17), (17, 17))
    """

    size: int
    scale: tuple[float, float] = (0.9, 1.1)
    degrees: float = 10.0
    blur: int = 5
    tries: int = 31
    keep: float = 0.85

    def matrix(self, label: Array, rng: np.random.Generator) -> np.ndarray:
        """The 2x3 map from pixels (x, y) of the image to pixels of the crop."""
        h, w = label.shape
        scale = rng.uniform(*self.scale)
        angle = np.deg2rad(rng.uniform(-self.degrees, self.degrees)) if rng.random() < 0.5 else 0.0
        flip = -1.0 if rng.random() < 0.5 else 1.0
        turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        turn = np.diag([flip, 1.0]) @ turn
        centre = np.array([(w - 1) / 2, (h - 1) / 2])
        points = np.argwhere(label == 1)[:, ::-1]  # the foreground's (x, y), at most some thousands of it
        points = points[:: max(1, len(points) // 4096)]
        best, best_kept = None, -1.0
        for _ in range(self.tries):
            # where the crop's corner lies in the scaled image; a smaller image is placed anywhere in the crop
            slack = np.array([w, h]) * scale - self.size
            corner = np.array([rng.uniform(min(0.0, s), max(0.0, s)) for s in slack])
            shift = centre * scale - corner - turn @ centre
            moved = points @ turn.T + shift
            kept = float(np.mean((moved > -0.5).all(1) & (moved < self.size - 0.5).all(1))) if len(points) else 1.0
            if kept > best_kept:
                best, best_kept = np.column_stack([turn, shift]), kept
            if kept >= self.keep:
                break
        assert best is not None
        return best

    def __call__(self, image: Array, label: Array, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(3, size, size) of 0 ... 1 and (size, size) int64 of 0, 1, 255 from uint8 (H, W, 3) and (H, W)."""
        transform = torch.from_numpy(self.matrix(label, rng)).float()[None]
        square = (self.size, self.size)
        warp = kornia.geometry.transform.warp_affine
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        shown = warp(pixels - MEAN, transform, square, mode="bilinear") + MEAN
        known = torch.from_numpy(label.astype(np.float32))[None, None]
        target = warp(known + 1, transform, square, mode="nearest") - 1  # zeros outside of the image become -1
        if self.blur and rng.random() < 0.5:
            sigma = 0.3 * ((self.blur - 1) * 0.5 - 1) + 0.8
            shown = kornia.filters.gaussian_blur2d(shown, (self.blur, self.blur), (sigma, sigma))
        return shown[0].clamp(0, 1), torch.where(target < 0, 255, target)[0, 0].round().long()
