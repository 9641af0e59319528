"""Dense cosine in plain PyTorch: the contract, written to be read. It holds every pair of pixels; the kernels do not.

The ops work on N = B*S pairs of a query and one of its S supports: query (B, C, Hq, Wq), support (N, C, Hs, Ws), mask
(N, h, w). A pixel's index is row * width + column.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels import _cosine
from fss_kernels._library import accumulate_dtype
from fss_kernels._resize import weights_of


def per_shot(x: Tensor, support: Tensor) -> Tensor:
    """x (B, ...) repeated for every shot: (N, ...)."""
    return x.repeat_interleave(support.shape[0] // max(x.shape[0], 1), 0)


def kept_pixels(mask: Tensor, support: Tensor) -> Tensor:
    """The support pixels (N, Hs, Ws) that the mask keeps: those where it is > 0 on their grid."""
    return weights_of(mask, support) > 0


def norms_of(query: Tensor, support: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of query (B, Hq, Wq) and kept support (N, Hs, Ws); 0 for a dropped pixel, whatever it holds."""
    dtype = accumulate_dtype(query)
    support = torch.where(kept[:, None], support.to(dtype), 0.0)
    return _cosine.norm_of(query.to(dtype), 1), _cosine.norm_of(support, 1)


def units_of(query: Tensor, support: Tensor, kept: Tensor, eps: float, eps_mode: str) -> tuple[Tensor, Tensor]:
    """Normalised query, once a shot, and normalised kept support; 0 for a dropped pixel."""
    dtype = accumulate_dtype(query)
    q = _cosine.normalised(query.to(dtype), 1, eps, eps_mode)
    s = _cosine.normalised(torch.where(kept[:, None], support.to(dtype), 0.0), 1, eps, eps_mode)
    return per_shot(q, support), s


def window_mean(c: Tensor, window: Sequence[int]) -> Tensor:
    """(1 / (dh dw)) sum_o c[i + o, j + o] for c (N, Hs, Ws, Hq, Wq); terms outside of a grid are 0."""
    (dh, dw), (hs, ws, hq, wq) = window, c.shape[1:]
    padded = F.pad(c, (*(dw // 2,) * 2, *(dh // 2,) * 2) * 2)
    total = torch.zeros_like(c)
    for y, x in itertools.product(range(dh), range(dw)):
        total = total + padded[:, y : y + hs, x : x + ws, y : y + hq, x : x + wq]
    return total / (dh * dw)


def in_window(flags: Tensor, window: Sequence[int]) -> Tensor:
    """Whether a pixel's window holds a pixel whose flag (N, H, W) is set."""
    dh, dw = window
    return F.max_pool2d(flags.float()[:, None], (dh, dw), 1, (dh // 2, dw // 2))[:, 0] > 0


def first(flags: Tensor, dim: int) -> Tensor:
    """The lowest index along ``dim`` whose flag is set; -1 if there is none."""
    size = flags.shape[dim]
    positions = torch.arange(size, device=flags.device).view(-1, *(1,) * (flags.ndim - dim - 1))
    lowest = torch.where(flags, positions, size).amin(dim)
    return torch.where(lowest == size, -1, lowest)


def best(scores: Tensor, live: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum over the live candidates along ``dim`` and its lowest index; 0 and -1 if there are none."""
    top = scores.detach().masked_fill(~live, -math.inf).amax(dim, keepdim=True)
    index = first(live & (scores == top), dim)
    values = scores.gather(dim, index.clamp(min=0).unsqueeze(dim)).squeeze(dim)
    return torch.where(index >= 0, values, 0.0), index


class Sides(NamedTuple):
    """What both ops start from: pixels are flat."""

    cosines: Tensor  # (N, Hs, Ws, Hq, Wq); pairs with a vector that is not finite have 0
    kept: Tensor  # (N, Hs, Ws)
    bad_query: Tensor  # (N, Hq, Wq), vectors that are not finite
    bad_support: Tensor  # (N, Hs, Ws), kept ones


def _sides(query: Tensor, support: Tensor, mask: Tensor, eps: float, eps_mode: str) -> Sides:
    kept = kept_pixels(mask, support)
    bad_query, bad_support = (n.isnan() for n in norms_of(query.detach(), support.detach(), kept))
    finite_query = torch.where(bad_query[:, None], 0.0, query)
    q, s = units_of(finite_query, support, kept & ~bad_support, eps, eps_mode)
    return Sides(torch.einsum("nchw,ncyx->nyxhw", q, s), kept, per_shot(bad_query, support), bad_support)


def dense_cosine_max_reference(
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    windows: Sequence[int],
    masked: str,
    eps: float,
    eps_mode: str,
) -> tuple[Tensor, Tensor]:
    """Scores and indices (N, L, Hq, Wq); ``windows`` is dh, dw of every window, one after the other."""
    c, kept, bad_query, bad_support = _sides(query, support, mask, eps, eps_mode)
    results = []
    for window in zip(windows[::2], windows[1::2], strict=True):
        scores = window_mean(c, window).flatten(3).flatten(1, 2)  # (N, Ns, Nq)
        live = (kept if masked == "exclude" else in_window(kept, window)).flatten(1)[..., None]
        values, index = best(scores, live.expand(scores.shape), 1)
        if masked == "zero":  # the other pixels score 0
            lost = ~live.all(1) & ~(values > 0)
            values, index = torch.where(lost, 0.0, values), torch.where(lost, -1, index)
        unknown = in_window(bad_query, window).flatten(1) & live.any(1)
        values, index = torch.where(unknown, math.nan, values), torch.where(unknown, first(live, 1), index)
        bad = first(live & in_window(bad_support, window).flatten(1)[..., None], 1)
        results.append((torch.where(bad >= 0, math.nan, values), torch.where(bad >= 0, bad, index)))
    values, index = (torch.stack(r, 1).unflatten(2, query.shape[2:]) for r in zip(*results, strict=True))
    return values.to(query.dtype), index


def dense_cosine_match_reference(
    query: Tensor, support: Tensor, mask: Tensor, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores (N, Hq, Wq) and (N, Hs, Ws), then indices in the same shapes."""
    c, *flags = _sides(query, support, mask, eps, eps_mode)
    scores = c.flatten(3).flatten(1, 2)  # (N, Ns, Nq)
    kept, bad_query, bad_support = (f.flatten(1) for f in flags)
    results = []
    for dim, candidates, own, other in (
        (1, kept, bad_query, bad_support),
        (2, torch.ones_like(bad_query), bad_support, bad_query),
    ):
        values, index = best(scores, kept[..., None].expand(scores.shape), dim)
        bad = first(other, 1)[:, None]
        for unknown, lowest in ((own, first(candidates, 1)[:, None]), (bad >= 0, bad)):
            unknown = unknown & (index >= 0)
            values, index = torch.where(unknown, math.nan, values), torch.where(unknown, lowest, index)
        results.append((values.to(query.dtype), index))
    (query_scores, query_index), (support_scores, support_index) = results
    query_grid, support_grid = query.shape[2:], support.shape[2:]
    return (
        query_scores.unflatten(1, query_grid),
        support_scores.unflatten(1, support_grid),
        query_index.unflatten(1, query_grid),
        support_index.unflatten(1, support_grid),
    )


# ---- the same scores at saved indices, and their gradients ----------------------------------------------------------


class Pairs(NamedTuple):
    """K pairs of pixels whose cosines, divided by ``elements``, are terms of one map of scores, each of its own."""

    output: int  # which map
    elements: int
    query: Tensor  # (N, K)
    support: Tensor  # (N, K)
    counts: Tensor  # (N, K), whether there is such a pair


def pairs_of_max(index: Tensor, windows: Sequence[int], support_grid: Sequence[int]) -> list[Pairs]:
    """One for every window and element of it; the maps are those of the windows."""
    (hq, wq), (hs, ws) = index.shape[2:], support_grid
    y, x = (
        t.flatten() for t in torch.meshgrid(*(torch.arange(n, device=index.device) for n in (hq, wq)), indexing="ij")
    )
    result = []
    for output, (dh, dw) in enumerate(zip(windows[::2], windows[1::2], strict=True)):
        i = index[:, output].flatten(1)
        for oy, ox in itertools.product(range(-(dh // 2), dh // 2 + 1), range(-(dw // 2), dw // 2 + 1)):
            qy, qx, sy, sx = y + oy, x + ox, i // ws + oy, i % ws + ox
            inside = (qy >= 0) & (qy < hq) & (qx >= 0) & (qx < wq) & (sy >= 0) & (sy < hs) & (sx >= 0) & (sx < ws)
            counts = inside & (i >= 0)
            q, s = (qy * wq + qx).expand(i.shape), sy * ws + sx
            result.append(Pairs(output, dh * dw, torch.where(counts, q, 0), torch.where(counts, s, 0), counts))
    return result


def pairs_of_match(query_index: Tensor, support_index: Tensor) -> list[Pairs]:
    """Every query pixel with its support pixel, and every support pixel with its query pixel."""
    to_support, to_query = query_index.flatten(1), support_index.flatten(1)
    own = [torch.arange(i.shape[1], device=i.device).expand(i.shape) for i in (to_support, to_query)]
    return [
        Pairs(0, 1, own[0], to_support.clamp(min=0), to_support >= 0),
        Pairs(1, 1, to_query.clamp(min=0), own[1], to_query >= 0),
    ]


def _gathered(x: Tensor, pixels: Tensor) -> Tensor:
    """x (N, C, H, W) at pixels (N, K): (N, C, K)."""
    return x.flatten(2).gather(2, pixels[:, None].expand(-1, x.shape[1], -1))


def scores_at(
    query: Tensor, support: Tensor, support_norm: Tensor, pairs: Sequence[Pairs], eps: float, eps_mode: str
) -> list[Tensor]:
    """The maps of scores (N, K), differentiable any number of times, from O(K C) products."""
    q, s = units_of(query, support, support_norm != 0, eps, eps_mode)
    maps: dict[int, Tensor] = {}
    for p in pairs:
        cosines = (_gathered(q, p.query) * _gathered(s, p.support)).sum(1)
        terms = torch.where(p.counts, cosines, 0.0) / p.elements
        maps[p.output] = maps[p.output] + terms if p.output in maps else terms
    return [maps[output].to(query.dtype) for output in sorted(maps)]


def grads_at(
    grads: Sequence[Tensor],
    query: Tensor,
    support: Tensor,
    query_norm: Tensor,
    support_norm: Tensor,
    pairs: Sequence[Pairs],
    eps: float,
    eps_mode: str,
    need_query: bool,
    need_support: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to query and support from those of the maps (N, K): every pair adds each unit vector to the other."""
    grad_query, grad_support, dtype = query.new_empty(0), support.new_empty(0), query_norm.dtype
    q, s = units_of(query, support, support_norm != 0, eps, eps_mode)
    to_q, to_s = torch.zeros_like(q.flatten(2)), torch.zeros_like(s.flatten(2))
    for p in pairs:
        weight = (grads[p.output].to(dtype) / p.elements)[:, None]
        for total, at, units, other in ((to_q, p.query, s, p.support), (to_s, p.support, q, p.query)):
            terms = torch.where(p.counts[:, None], weight * _gathered(units, other), 0.0)
            total.scatter_add_(2, at[:, None].expand_as(terms), terms)
    if need_query:
        shots = to_q.shape[0] // max(query.shape[0], 1)
        toward = to_q.view(query.shape[0], shots, *query.shape[1:]).sum(1)
        grad_query = _cosine.gradient(toward, query.to(dtype), query_norm, 1, eps, eps_mode).to(query.dtype)
    if need_support:
        kept = torch.where((support_norm != 0)[:, None], support.to(dtype), 0.0)
        grad_support = _cosine.gradient(to_s.view_as(s), kept, support_norm, 1, eps, eps_mode).to(support.dtype)
    return grad_query, grad_support


def dense_cosine_max_fwd(
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    windows: Sequence[int],
    masked: str,
    eps: float,
    eps_mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward op: scores, indices, norms of query (B, Hq, Wq) and of kept support (N, Hs, Ws), 0 where dropped."""
    scores, index = dense_cosine_max_reference(query, support, mask, windows, masked, eps, eps_mode)
    return scores, index, *norms_of(query, support, kept_pixels(mask, support))


def dense_cosine_max_bwd(
    grad: Tensor,
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    index: Tensor,
    query_norm: Tensor,
    support_norm: Tensor,
    windows: Sequence[int],
    masked: str,
    eps: float,
    eps_mode: str,
    need_query: bool,
    need_support: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op, from the saved indices (README.md). The mask has no gradient."""
    pairs = pairs_of_max(index, windows, support.shape[2:])
    grads = grad.flatten(2).unbind(1)
    norms = query_norm, support_norm
    return *grads_at(grads, query, support, *norms, pairs, eps, eps_mode, need_query, need_support), mask.new_empty(0)


def dense_cosine_match_fwd(
    query: Tensor, support: Tensor, mask: Tensor, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op: scores and indices of query and support, norms as in `dense_cosine_max_fwd`."""
    results = dense_cosine_match_reference(query, support, mask, eps, eps_mode)
    return *results, *norms_of(query, support, kept_pixels(mask, support))


def dense_cosine_match_bwd(
    grad_query_scores: Tensor,
    grad_support_scores: Tensor,
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    query_index: Tensor,
    support_index: Tensor,
    query_norm: Tensor,
    support_norm: Tensor,
    eps: float,
    eps_mode: str,
    need_query: bool,
    need_support: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op, from the saved indices. The mask has no gradient."""
    pairs = pairs_of_match(query_index, support_index)
    grads = grad_query_scores.flatten(1), grad_support_scores.flatten(1)
    norms = query_norm, support_norm
    return *grads_at(grads, query, support, *norms, pairs, eps, eps_mode, need_query, need_support), mask.new_empty(0)
