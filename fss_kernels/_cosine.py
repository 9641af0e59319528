"""Normalisation of the cosine ops in plain PyTorch: x / N(|x|), N = max(|x|, eps) ("clamp") or |x| + eps ("add").

The rule of norms, which every op and backend keeps: |x| is the root of a sum of squares in the accumulation dtype. A
vector whose squared norm is NaN or overflows has the cosine NaN. One whose squared norm underflows to 0 is a zero
vector: its cosine and its gradient are 0.

1 / (|x| N(|x|)) overflows for a vector that is still above 0. Derivatives are therefore those of a short vector times a
power of two (`magnification`), which changes no bit of any other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS_MODES = ("clamp", "add")
# dtype -> norms below this are short, and what magnifies such a vector
_SHORT = {torch.float32: (2.0**-32, 2.0**64), torch.float64: (2.0**-256, 2.0**512)}


def norm_of(x: Tensor, dim: int) -> Tensor:
    """|x| along a dimension; NaN where it is not finite."""
    norm = x.square().sum(dim).sqrt()
    return torch.where(norm.isfinite(), norm, math.nan)


def divisor(norm: Tensor, eps: float | Tensor, eps_mode: str) -> Tensor:
    """N(norm)."""
    return norm + eps if eps_mode == "add" else torch.where(norm > eps, norm, eps)


def inverse(norm: Tensor, eps: float | Tensor, eps_mode: str) -> Tensor:
    """1 / N(norm); 0 for a zero vector, NaN for a norm that is not finite."""
    zero = norm == 0
    result = torch.where(zero, 0.0, 1 / divisor(torch.where(zero, 1.0, norm), eps, eps_mode))
    return torch.where(norm.isfinite(), result, math.nan)


def slope(norm: Tensor, eps: float | Tensor, eps_mode: str) -> Tensor:
    """1 / (norm N(norm)), and 0 where eps alone divides or the vector is 0: the weight of the projection in
    d(x/N) = dx/N - x (x . dx) slope / N. The norm of a short vector is magnified, and eps with it."""
    constant = norm == 0 if eps_mode == "add" else norm <= eps
    safe = torch.where(constant, 1.0, norm)
    return torch.where(constant, 0.0, 1 / (safe * divisor(safe, eps, eps_mode)))


def magnification(norm: Tensor) -> Tensor:
    """The power of two that magnifies a short vector; 1 for any other."""
    short, factor = _SHORT[norm.dtype]
    return torch.ones_like(norm).masked_fill(norm < short, factor)


def normalised(x: Tensor, dim: int, eps: float | Tensor, eps_mode: str) -> Tensor:
    """x / N(|x|) along a dimension, differentiable any number of times."""
    norm = norm_of(x.detach(), dim).unsqueeze(dim)
    factor, zero = magnification(norm), norm == 0
    magnified = x * factor
    size = torch.where(zero, 1.0, magnified.square().sum(dim, keepdim=True)).sqrt()
    result = torch.where(zero, 0.0, magnified / divisor(size, eps * factor, eps_mode))
    return torch.where(norm.isfinite(), result, math.nan)


def gradient(toward: Tensor, x: Tensor, norm: Tensor, dim: int, eps: float | Tensor, eps_mode: str) -> Tensor:
    """The gradient at x from ``toward``, that at `normalised` x; ``norm`` is |x|."""
    norm = norm.unsqueeze(dim)
    factor = magnification(norm)
    size, scaled, magnified = norm * factor, eps * factor, x * factor
    along = (magnified * toward).sum(dim, keepdim=True) * inverse(size, scaled, eps_mode)
    along = along * slope(size, scaled, eps_mode) * factor
    return toward * inverse(norm, eps, eps_mode) - along * magnified
