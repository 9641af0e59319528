"""Features divided by the root of their mean square in plain PyTorch: the contract, written to be read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fss_kernels._layout import accumulate_dtype


def toy_norm_reference(features: Tensor, gain: Tensor, eps: float) -> Tensor:
    """(B, C, H, W), (B, C) -> (B, C, H, W)."""
    x, k = (t.to(accumulate_dtype(features)) for t in (features, gain))
    return (k[..., None, None] * x * (x.square().mean(1, keepdim=True) + eps).rsqrt()).to(features.dtype)


def toy_norm_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """The forward op: the result, and the factor of every pixel (B, H, W)."""
    x, k = (t.to(accumulate_dtype(call.features)) for t in (call.features, call.gain))
    factor = (x.square().mean(1) + call.eps).rsqrt()
    return (k[..., None, None] * x * factor[:, None]).to(call.features.dtype), factor


def toy_norm_bwd(call: Any) -> tuple[Tensor, Tensor]:
    """The backward op: the gradient at a normalised vector, minus its part along the vector (README.md)."""
    grad_features, grad_gain = call.features.new_empty(0), call.gain.new_empty(0)
    x, k, g = (t.to(call.factor.dtype) for t in (call.features, call.gain[..., None, None], call.grad_out))
    factor = call.factor[:, None]
    if call.need_features:
        along = (k * g * x).mean(1, keepdim=True) * factor**3
        grad_features = (k * g * factor - along * x).to(call.features.dtype)
    if call.need_gain:
        grad_gain = (g * x * factor).sum((2, 3)).to(call.gain.dtype)
    return grad_features, grad_gain
