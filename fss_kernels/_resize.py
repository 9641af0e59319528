"""Mask resizing in plain PyTorch: linear interpolation whose weights come from exact integer positions."""

from __future__ import annotations

import torch
from torch import Tensor

from fss_kernels._library import accumulate_dtype


def interpolation_matrix(source: int, target: int, resize: str, align_corners: bool, like: Tensor) -> Tensor:
    """R (target, source) with ``resized = R @ signal``: at most two weights a row, from exact integer positions."""
    i = torch.arange(target, device=like.device)
    if resize == "nearest":
        numerator, denominator = i * source // target, 1
    elif align_corners:
        numerator, denominator = i * (source - 1), max(target - 1, 1)
    else:
        numerator, denominator = ((2 * i + 1) * source - target).clamp(min=0), 2 * target
    low = (numerator // denominator).clamp(max=source - 1)
    high_weight = torch.where(low == source - 1, 0.0, (numerator % denominator).double() / denominator)
    matrix = torch.zeros(target, source, dtype=torch.float64, device=like.device)
    matrix = matrix.scatter_add(1, (low + 1).clamp(max=source - 1)[:, None], high_weight[:, None])
    matrix = matrix.scatter_add(1, low[:, None], 1 - high_weight[:, None])
    return matrix.to(like.dtype)


def resize_mask(mask: Tensor, height: int, width: int, resize: str, align_corners: bool) -> Tensor:
    """mask (B, M, h, w) on the grid (H, W): R_h mask R_w^T, or its adjoint for ``"adjoint"``."""
    h, w = mask.shape[-2:]
    if resize == "adjoint":  # the transpose of upsampling (H, W) to (h, w)
        rows = interpolation_matrix(height, h, "bilinear", align_corners, mask).T
        columns = interpolation_matrix(width, w, "bilinear", align_corners, mask).T
    else:
        rows = interpolation_matrix(h, height, resize, align_corners, mask)
        columns = interpolation_matrix(w, width, resize, align_corners, mask)
    return rows @ mask @ columns.T


def weights_of(mask: Tensor, support: Tensor) -> Tensor:
    """mask (B, h, w) on the support's grid, bilinear with aligned corners, in the accumulation dtype."""
    mask = mask.to(accumulate_dtype(support))
    return resize_mask(mask[:, None], support.shape[-2], support.shape[-1], "bilinear", True)[:, 0]
