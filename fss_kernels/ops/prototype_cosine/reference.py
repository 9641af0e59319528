"""Cosine with prototypes in plain PyTorch: the contract, written to be read."""

from __future__ import annotations

import torch
from torch import Tensor

from fss_kernels import _cosine
from fss_kernels._library import accumulate_dtype


def prototype_cosine_reference(features: Tensor, prototypes: Tensor, scale: float, eps: float, eps_mode: str) -> Tensor:
    """(B, C, H, W), (B, P, C) or (1, P, C) -> (B, P, H, W)."""
    dtype = accumulate_dtype(features)
    x = _cosine.normalised(features.to(dtype), 1, eps, eps_mode)
    w = _cosine.normalised(prototypes.to(dtype), 2, eps, eps_mode).expand(x.shape[0], -1, -1)
    return (scale * torch.einsum("bchw,bpc->bphw", x, w)).to(features.dtype)


def prototype_cosine_fwd(
    features: Tensor, prototypes: Tensor, scale: float, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op: scores (B, P, H, W), the cosines before scaling and rounding, norms of the pixels (B, H, W)."""
    dtype = accumulate_dtype(features)
    x, w = features.to(dtype), prototypes.to(dtype)
    norms = _cosine.norm_of(x, 1)
    units = w * _cosine.inverse(_cosine.norm_of(w, 2), eps, eps_mode)[..., None]
    dots = torch.einsum("bchw,bpc->bphw", x, units.expand(x.shape[0], -1, -1))
    cosines = dots * _cosine.inverse(norms, eps, eps_mode)[:, None]
    return (scale * cosines).to(features.dtype).contiguous(), cosines.contiguous(), norms


def prototype_cosine_bwd(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    cosines: Tensor,
    norms: Tensor,
    scale: float,
    eps: float,
    eps_mode: str,
    need_features: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    """The backward op: the gradient at a normalised vector, minus its part along the vector (README.md)."""
    grad_features, grad_prototypes = features.new_empty(0), prototypes.new_empty(0)
    x, w, g = (t.to(norms.dtype) for t in (features, prototypes, grad))
    w_norms = _cosine.norm_of(w, 2)
    k = scale * g * _cosine.inverse(norms, eps, eps_mode)[:, None]
    if need_features:
        units = w * _cosine.inverse(w_norms, eps, eps_mode)[..., None]
        toward = torch.einsum("bphw,bpc->bchw", k, units.expand(x.shape[0], -1, -1))
        factor = _cosine.magnification(norms)
        along = scale * (g * cosines).sum(1) * _cosine.slope(norms * factor, eps * factor, eps_mode) * factor
        grad_features = (toward - along[:, None] * (x * factor[:, None])).to(features.dtype)
    if need_prototypes:
        sums = [(x * k_p[:, None]).sum((2, 3)) for k_p in k.unbind(1)]  # pairwise: a matrix product loses digits
        toward = torch.stack(sums, 1) if sums else x.new_zeros(x.shape[0], 0, x.shape[1])
        if prototypes.shape[0] != features.shape[0]:  # shared by the batch
            toward = toward.sum(0, keepdim=True)
        grad_prototypes = _cosine.gradient(toward, w, w_norms, 2, eps, eps_mode).to(prototypes.dtype)
    return grad_features, grad_prototypes
