"""Masked average pooling in plain PyTorch: the contract, written to be read."""

from __future__ import annotations

import torch
from torch import Tensor

from fss_kernels._library import accumulate_dtype
from fss_kernels._resize import interpolation_matrix, resize_mask


def masked_avg_pool_reference(features: Tensor, mask: Tensor, eps: float, resize: str, align_corners: bool) -> Tensor:
    """(B, C, H, W), (B, M, h, w) -> (B, M, C)."""
    return masked_avg_pool_fwd(features, mask, eps, resize, align_corners)[0]


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 (value and gradient) where the denominator is 0."""
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator) / torch.where(empty, 1.0, denominator)


def _counted(features: Tensor, resized: Tensor) -> Tensor:
    """features (B, C, H, W) with 0 in place of NaN and Inf wherever one resized mask (B, H, W) is 0."""
    return torch.where((resized == 0)[:, None] & ~features.isfinite(), 0.0, features)


def masked_avg_pool_fwd(
    features: Tensor, mask: Tensor, eps: float, resize: str, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op: pooled (B, M, C), resized mask (B, M, H, W), its area (B, M)."""
    dtype = accumulate_dtype(features)
    x = features.to(dtype)
    resized = resize_mask(mask.to(dtype), features.shape[-2], features.shape[-1], resize, align_corners)
    area = resized.sum((2, 3))
    sums = [(_counted(x, r) * r[:, None]).sum((2, 3)) for r in resized.unbind(1)]
    pooled = _divide(torch.stack(sums, 1) if sums else x.new_empty(x.shape[0], 0, x.shape[1]), area[..., None] + eps)
    return pooled.to(features.dtype), resized, area


def masked_avg_pool_bwd(
    grad: Tensor,
    features: Tensor,
    mask: Tensor,
    resized: Tensor,
    area: Tensor,
    eps: float,
    resize: str,
    align_corners: bool,
    need_features: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor]:
    """The backward op: dL/dx = sum_m g_m r_m / d_m and dL/dr = (t - sum(r t) / d) / d with t = sum_c g_c x_c."""
    grad_features, grad_mask = features.new_empty(0), mask.new_empty(0)
    denominator = area[..., None] + eps
    g = _divide(grad.to(resized.dtype), denominator)
    if need_features:
        grad_features = torch.einsum("bmc,bmhw->bchw", g, resized).to(features.dtype)
    if need_mask:
        x = features.to(resized.dtype)
        moments = [(_counted(x, r) * g[:, m, :, None, None]).sum(1) for m, r in enumerate(resized.unbind(1))]  # t / d
        t = torch.stack(moments, 1) if moments else torch.zeros_like(resized)
        grad_resized = t - _divide((resized * t).sum((2, 3)), denominator[..., 0])[..., None, None]
        h, w = mask.shape[-2:]
        height, width = resized.shape[-2:]
        if resize == "adjoint":
            rows = interpolation_matrix(height, h, "bilinear", align_corners, resized)
            columns = interpolation_matrix(width, w, "bilinear", align_corners, resized)
        else:
            rows = interpolation_matrix(h, height, resize, align_corners, resized).T
            columns = interpolation_matrix(w, width, resize, align_corners, resized).T
        grad_mask = (rows @ grad_resized @ columns.T).to(mask.dtype)
    return grad_features, grad_mask
