"""Peers of hypercorrelation: HSNet's layers, and the fewest passes in eager code."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels.testing import Peer


def _on_grid(mask: Tensor, support: Tensor) -> Tensor:
    return F.interpolate(mask[:, None].to(support.dtype), support.shape[-2:], mode="bilinear", align_corners=True)


def _under(mask: Tensor | None, support: Tensor) -> Tensor:
    return support if mask is None else support * _on_grid(mask, support)


def _hsnet(query: Tensor, support: Tensor, mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """HSNet's layer: mask, divide each side by norm + eps, one product, clamp."""
    q, s = query.flatten(2), _under(mask, support).flatten(2)
    q = q / (q.norm(dim=1, p=2, keepdim=True) + eps)
    s = s / (s.norm(dim=1, p=2, keepdim=True) + eps)
    product = torch.bmm(q.transpose(1, 2), s).clamp(min=0)
    return product.view(*query.shape[:1], *query.shape[2:], *support.shape[2:])


def _cosine_bmm(query: Tensor, support: Tensor, mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The fewest passes in eager code: norms without a copy, one factor a side, one product, clamped in place."""
    q, s = query.flatten(2), support.flatten(2)
    u = 1 / (torch.linalg.vector_norm(q, dim=1, keepdim=True) + eps)
    v = torch.linalg.vector_norm(s, dim=1, keepdim=True)
    if mask is None:
        v = 1 / (v + eps)
    else:
        m = _on_grid(mask, support).flatten(2)
        v = m / (v * m + eps)
    product = torch.bmm((q * u).transpose(1, 2), s * v).relu_()
    return product.view(*query.shape[:1], *query.shape[2:], *support.shape[2:])


def _stacked(layer: Callable[..., Tensor]) -> Callable[..., Any]:
    """Of a layer's correlation: the same call as the op's, for one layer or, with ``levels``, stacked as HSNet does."""

    def run(*tensors: Tensor, levels: tuple[int, ...] | None = None) -> Any:
        if levels is None:
            return layer(*tensors)
        n = sum(levels)
        layers = [layer(q, s, *tensors[2 * n :]) for q, s in zip(tensors[:n], tensors[n : 2 * n], strict=True)]
        starts = itertools.pairwise(itertools.accumulate(levels, initial=0))
        return [torch.stack(layers[i:j]).transpose(0, 1).contiguous() for i, j in starts]

    return run


_HSNET = Peer(
    "hsnet",
    _stacked(_hsnet),
    "passes over the output several times and multiplies masked-out pixels",
    released=True,
    runs=("quick", "sweep"),
)
_COSINE_BMM = Peer(
    "cosine-bmm",
    _stacked(_cosine_bmm),
    "copies both operands, keeps the output for the gradient, no zero or NaN rule",
    runs=("quick", "sweep"),
)
PEERS = {
    "hypercorrelation": (
        _HSNET,
        _HSNET.compiled(runs=("sweep",)),
        _COSINE_BMM,
        _COSINE_BMM.compiled(),
        _COSINE_BMM.autotuned(),
    )
}
