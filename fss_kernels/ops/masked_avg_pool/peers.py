"""Peers of masked_avg_pool: the average of most repositories, PFENet's, PANet's at image size, and rewrites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels.testing import Peer


def _is_adjoint(size: Mapping[str, Any]) -> bool:
    return size.get("resize") == "adjoint"


def _is_bilinear(size: Mapping[str, Any]) -> bool:
    return not _is_adjoint(size)


def _on_grid(mask: Tensor, features: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(mask.to(features.dtype), features.shape[-2:], mode="bilinear", align_corners=align_corners)


def _masked_means(features: Tensor, masks: Tensor, eps: float) -> Tensor:
    """The average as most repositories write it: one mask after the other."""
    means = [(features * m[:, None]).sum((2, 3)) / (m.sum((1, 2))[:, None] + eps) for m in masks.unbind(1)]
    return torch.stack(means, 1)


def _eager(features: Tensor, mask: Tensor, eps: float = 5e-4, align_corners: bool = True) -> Tensor:
    return _masked_means(features, _on_grid(mask, features, align_corners), eps)


def _window_average(features: Tensor, mask: Tensor, eps: float = 5e-4, align_corners: bool = True) -> Tensor:
    """PFENet's weighted average: both sums are averages over the whole map, multiplied back by its size."""
    h, w = features.shape[-2:]
    means = []
    for m in _on_grid(mask, features, align_corners).split(1, 1):
        area = F.avg_pool2d(m, (h, w)) * h * w + eps
        means.append((F.avg_pool2d(features * m, (h, w)) * h * w / area).flatten(1))
    return torch.stack(means, 1)


def _matrix_product(features: Tensor, masks: Tensor, eps: float) -> Tensor:
    sums = torch.bmm(masks.flatten(2), features.flatten(2).transpose(1, 2))
    return sums / (masks.sum((2, 3))[..., None] + eps)


def _bmm(features: Tensor, mask: Tensor, eps: float = 5e-4, align_corners: bool = True) -> Tensor:
    return _matrix_product(features, _on_grid(mask, features, align_corners), eps)


def _panet(features: Tensor, mask: Tensor, eps: float, align_corners: bool, resize: str) -> Tensor:
    """PANet upsamples the features to the mask's size and averages there."""
    upsampled = F.interpolate(features, mask.shape[-2:], mode="bilinear", align_corners=align_corners)
    return _masked_means(upsampled, mask.to(features.dtype), eps)


def _resize_then_sums(
    sums: Callable[..., Tensor], features: Tensor, mask: Tensor, eps: float = 5e-4, align_corners: bool = True
) -> Tensor:
    return sums(features, _on_grid(mask, features, align_corners), eps)


def _adjoint_bmm(features: Tensor, mask: Tensor, eps: float, align_corners: bool, resize: str) -> Tensor:
    """The same sums by moving the transposed upsampling to the mask, as two small matrix products."""

    def upsampling(source: int, target: int) -> Tensor:
        eye = torch.eye(source, dtype=features.dtype, device=features.device)[None]
        return F.interpolate(eye, target, mode="linear", align_corners=align_corners)[0]  # (source, target)

    mask = mask.to(features.dtype)
    rows, columns = (upsampling(s, t) for s, t in zip(features.shape[-2:], mask.shape[-2:], strict=True))
    masks = rows @ mask @ columns.T
    sums = torch.bmm(masks.flatten(2), features.flatten(2).transpose(1, 2))
    return sums / (mask.sum((2, 3))[..., None] + eps)


_PRODUCTS = "writes features * mask for every mask and has no NaN rule"
_TRANSPOSED = "returns the gradient transposed in memory and has no NaN rule"
_NO_NAN_RULE = "has no NaN rule"
_EAGER = Peer("eager", _eager, _PRODUCTS, _is_bilinear, released=True, runs=("quick", "sweep"))
_BMM = Peer("bmm", _bmm, _TRANSPOSED, _is_bilinear, runs=("quick", "sweep"))
_PANET = Peer(
    "panet",
    _panet,
    "writes features of the mask's size and its gradient is non-deterministic on CUDA",
    _is_adjoint,
    released=True,
)
PEERS = {
    "masked_avg_pool": (
        _EAGER,
        _EAGER.compiled(cannot=_NO_NAN_RULE),
        Peer("pfenet", _window_average, _PRODUCTS, _is_bilinear, released=True),
        _BMM,
        _BMM.compiled(cannot=_NO_NAN_RULE, runs=("sweep",)),
        _BMM.autotuned(),
        Peer(
            "resize+compile(sums)",
            _resize_then_sums,
            "needs the resize kept out of the graph by hand, seconds of compilation per shape, and has no NaN rule",
            _is_bilinear,
            part=_masked_means,
        ),
        _PANET,
        _PANET.compiled(cannot=_NO_NAN_RULE),
        Peer("adjoint-bmm", _adjoint_bmm, _TRANSPOSED, _is_adjoint),
    )
}
