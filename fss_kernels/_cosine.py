"""Normalisation of the cosine ops in plain PyTorch: x / N(|x|), N = max(|x|, eps) ("clamp") or |x| + eps ("add").

A zero vector has the cosine 0 and the gradient 0, a vector whose norm is NaN or infinite the cosine NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS_MODES = ("clamp", "add")


def divisor(norm: Tensor, eps: float, eps_mode: str) -> Tensor:
    """N(norm)."""
    return norm + eps if eps_mode == "add" else torch.where(norm > eps, norm, eps)


def inverse(norm: Tensor, eps: float, eps_mode: str) -> Tensor:
    """1 / N(norm); 0 for a zero vector, NaN for a norm that is not finite."""
    zero = norm == 0
    result = torch.where(zero, 0.0, 1 / divisor(torch.where(zero, 1.0, norm), eps, eps_mode))
    return torch.where(norm.isfinite(), result, math.nan)


def slope(norm: Tensor, eps: float, eps_mode: str) -> Tensor:
    """1 / (norm N(norm)), and 0 where eps alone divides or the vector is 0: the weight of the projection in
    d(x/N) = dx/N - x (x . dx) slope / N."""
    constant = norm == 0 if eps_mode == "add" else norm <= eps
    safe = torch.where(constant, 1.0, norm)
    return torch.where(constant, 0.0, 1 / (safe * divisor(safe, eps, eps_mode)))


def normalised(x: Tensor, dim: int, eps: float, eps_mode: str) -> Tensor:
    """x / N(|x|) along a dimension, differentiable any number of times."""
    squared = x.square().sum(dim, keepdim=True)
    zero = squared == 0
    norm = torch.where(zero, 1.0, squared).sqrt()
    result = torch.where(zero, 0.0, x / divisor(norm, eps, eps_mode))
    return torch.where(norm.isfinite(), result, math.nan)
