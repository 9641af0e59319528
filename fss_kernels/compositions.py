"""What the networks make of the dense cosines, in plain PyTorch on top of the ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels import _checks
from fss_kernels._resize import weights_of
from fss_kernels.ops.dense_cosine import checked_inputs, dense_cosine_match, dense_cosine_max

_RANGE_EPS = 1e-7  # of the released min-max


def _stretched(maps: Tensor, flat_eps: float) -> Tensor:
    """Every map (..., H, W) brought to 0 ... 1 by (a - min) / (max - min + 1e-7); 0 where max - min <= flat_eps.

    The gradient goes to one minimum and one maximum, the first of each: `amin` and `amax` would spread it. Half
    precision is widened to float32, in which 1e-7 counts.
    """
    flat = maps.to(torch.promote_types(maps.dtype, torch.float32)).flatten(-2)
    low, high = flat.min(-1, keepdim=True).values, flat.max(-1, keepdim=True).values
    stretched = (flat - low) / (high - low + _RANGE_EPS)
    return torch.where(high - low <= flat_eps, 0.0, stretched).view(maps.shape)


def _mean_of_shots(name: str, maps: Tensor) -> Tensor:
    if maps.shape[1] == 0:
        raise ValueError(f"{name}: support has no shots")
    return maps.mean(1)


def prior_mask(
    query: Tensor,
    support: Tensor,
    mask: Tensor | None,
    *,
    masked: str = "zero",
    eps: float = 1e-7,
    flat_eps: float = 1e-6,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """PFENet's prior: how much every query pixel looks like some foreground pixel, 0 ... 1.

    The best cosine of every query pixel (`dense_cosine_max`), stretched to 0 ... 1 for every sample and shot by
    ``(a - min) / (max - min + 1e-7)``, averaged over the shots, resized bilinearly with aligned corners.

    Args:
        query: (B, C, Hq, Wq), query and support as for `dense_cosine_max`.
        support: (B, S, C, Hs, Ws) or (B, C, Hs, Ws).
        mask: (B, S, h, w), or (B, h, w) with a 4-D support; None: all pixels are kept.
        masked: as for `dense_cosine_max`.
        eps: >= 0, at the norms. PFENet adds 1e-7 to the product of the norms instead: a relative difference of 1e-7
            over that product.
        flat_eps: a map whose values differ by no more is 0, and so is its gradient, which the formula would multiply by
            up to 1e7. 0: the released formula.
        size: (H, W) of the result; None: that of the query.

    Returns:
        (B, 1, H, W) in the dtype of the features. Differentiable in query and support.

    Raises:
        TypeError, ValueError: as `dense_cosine_max`; negative ``flat_eps``, ``size`` that is no pair of positive int,
            no shots.

    Source: PFENet (Tian et al. 2020).

    Example:
        >>> import torch
        >>> query, support = torch.eye(3).view(1, 3, 1, 3), torch.ones(1, 3, 1, 2)
        >>> support[:, 2] = 0
        >>> prior_mask(query, support, torch.ones(1, 1, 2))
        tensor([[[[1.0000, 1.0000, 0.0000]]]])
    """
    name = "prior_mask"
    flat_eps = _checks.non_negative(name, "flat_eps", flat_eps)
    if size is not None and not (
        isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    ):
        raise ValueError(f"{name}: size must be None or a pair of positive int, got {size!r}")
    scores, _ = dense_cosine_max(query, support, mask, masked=masked, eps=eps)
    prior = _mean_of_shots(name, _stretched(scores, flat_eps))
    if size is not None:
        prior = F.interpolate(prior, tuple(size), mode="bilinear", align_corners=True)
    return prior.to(scores.dtype)


def support_activation(
    query: Tensor,
    support: Tensor,
    mask: Tensor | None,
    *,
    windows: Sequence[tuple[int, int]] = ((5, 1), (3, 3), (1, 5)),
    eps: float = 1e-7,
    flat_eps: float = 1e-6,
) -> Tensor:
    """DPCN's support activation: one map of best window cosines for every window, 0 ... 1.

    The scores of `dense_cosine_max`, stretched to 0 ... 1 for every sample, shot and window by
    ``(a - min) / (max - min + 1e-7)``, averaged over the shots.

    Args:
        query: (B, C, Hq, Wq), query and support as for `dense_cosine_max`.
        support: (B, S, C, Hs, Ws) or (B, C, Hs, Ws).
        mask: (B, S, h, w), or (B, h, w) with a 4-D support; None: all pixels are kept.
        windows: (dh, dw), odd, one map each.
        eps: >= 0, at the norms.
        flat_eps: as for `prior_mask`.

    Returns:
        (B, L, Hq, Wq) in the dtype of the features. Differentiable in query and support.

    Raises:
        TypeError, ValueError: as `dense_cosine_max`; negative ``flat_eps``, no shots.

    Source: DPCN (Liu et al. 2022).

    Example:
        >>> import torch
        >>> support_activation(torch.rand(1, 4, 6, 5), torch.rand(1, 4, 7, 5), torch.ones(1, 7, 5)).shape
        torch.Size([1, 3, 6, 5])
    """
    name = "support_activation"
    flat_eps = _checks.non_negative(name, "flat_eps", flat_eps)
    scores, _ = dense_cosine_max(query, support, mask, windows=windows, eps=eps)
    return _mean_of_shots(name, _stretched(scores, flat_eps)).to(scores.dtype)


def cycle_consistent_foreground(
    query: Tensor, support: Tensor, mask: Tensor | None, *, threshold: float = 0.5, eps: float = 1e-7
) -> Tensor:
    """The query pixels that a foreground pixel of the support finds, and that find the foreground back.

    Query pixel j is chosen by a shot if it is the best match of some support pixel of the foreground and its own best
    match, among all support pixels, lies in the foreground: where the mask, resized bilinearly with aligned corners to
    the support's grid, is >= threshold. The result is the union over the shots.

    Args:
        query: (B, C, Hq, Wq), query and support as for `dense_cosine_match`. The support is not masked, or no pixel
            could find the background back.
        support: (B, S, C, Hs, Ws) or (B, C, Hs, Ws).
        mask: (B, S, h, w), or (B, h, w) with a 4-D support; None: all is foreground.
        threshold: of the resized mask, finite.
        eps: >= 0, at the norms.

    Returns:
        (B, Hq, Wq), bool; no gradient. False everywhere where nothing agrees.

    Raises:
        TypeError, ValueError: as `dense_cosine_match`; ``threshold`` that is no finite number.

    Sources: DPNet (Mao et al. 2022), CyCTR (Zhang et al. 2021).

    Example:
        >>> import torch
        >>> query = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> cycle_consistent_foreground(query, query, torch.tensor([[[1.0, 0.0]]]))
        tensor([[[ True, False]]])
    """
    name = "cycle_consistent_foreground"
    _, folded, folded_mask, shots, eps = checked_inputs(name, query, support, mask, eps, "clamp")
    threshold = _checks.finite(name, "threshold", threshold)
    _, to_support, _, to_query = dense_cosine_match(query.detach(), support.detach(), eps=eps)
    foreground = (weights_of(folded_mask, folded) >= threshold).flatten(1).unflatten(0, (query.shape[0], shots))
    found = torch.zeros_like(to_support.flatten(2)).scatter_add(2, to_query.flatten(2), foreground.long()) > 0
    returns = foreground.gather(2, to_support.flatten(2))
    return (found & returns).any(1).unflatten(1, query.shape[2:])
