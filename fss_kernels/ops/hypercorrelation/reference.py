"""Hypercorrelation in plain PyTorch: the contract, written to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fss_kernels import _cosine
from fss_kernels._library import accumulate_dtype
from fss_kernels._resize import weights_of


class Weighed(NamedTuple):
    """Support vectors under a mask: w x / N(|w x|) is sign(w) x / N(|x|) with eps / |w| for eps."""

    x: Tensor  # (B, C, H, W), 0 where w x counts as zero, whatever the support holds
    norm: Tensor  # (B, H, W), |w| |x|
    eps: Tensor  # (B, 1, H, W)
    sign: Tensor  # (B, 1, H, W)


def weigh(support: Tensor, weights: Tensor, eps: float, norm: Tensor | None = None) -> Weighed:
    """support (B, C, H, W) under weights (B, H, W), of which |w| |x| may be known."""
    size = weights.abs()
    x = torch.where((size == 0)[:, None], 0.0, support)
    norm = size * _cosine.norm_of(x.detach(), 1) if norm is None else norm
    x = torch.where((norm == 0)[:, None], 0.0, torch.where(norm.isfinite()[:, None], x, torch.nan))
    return Weighed(x, norm, eps / torch.where(size == 0, 1.0, size)[:, None], weights.sign()[:, None])


def normalised(support: Weighed, eps_mode: str) -> Tensor:
    """w x / N(|w x|)."""
    return support.sign * _cosine.normalised(support.x, 1, support.eps, eps_mode)


def correlate(query: Tensor, support: Tensor, weights: Tensor, eps: float, eps_mode: str, clamp: bool) -> Tensor:
    """Hypercorrelation for a mask that is on the support's grid already."""
    dtype = accumulate_dtype(query)
    q = _cosine.normalised(query.to(dtype), 1, eps, eps_mode)
    s = normalised(weigh(support.to(dtype), weights.to(dtype), eps), eps_mode)
    cosine = torch.einsum("bchw,bcyx->bhwyx", q, s)
    if clamp:
        cosine = torch.where(cosine <= 0, 0.0, cosine)  # NaN stays; no gradient where the cosine is not above 0
    return cosine.to(query.dtype)


def correlate_level(
    queries: Sequence[Tensor], supports: Sequence[Tensor], weights: Tensor, eps: float, eps_mode: str, clamp: bool
) -> Tensor:
    """`correlate` of every layer, stacked: (B, L, Ha, Wa, Hb, Wb)."""
    pairs = zip(queries, supports, strict=True)
    return torch.stack([correlate(q, s, weights, eps, eps_mode, clamp) for q, s in pairs], 1)


def hypercorrelation_reference(
    queries: Sequence[Tensor], supports: Sequence[Tensor], mask: Tensor, eps: float, eps_mode: str, clamp: bool
) -> Tensor:
    """L x (B, C, Ha, Wa), L x (B, C, Hb, Wb), (B, h, w) -> (B, L, Ha, Wa, Hb, Wb)."""
    return correlate_level(queries, supports, weights_of(mask, supports[0]), eps, eps_mode, clamp)


def pack_bits(flags: Tensor) -> Tensor:
    """flags (B, N, M), M padded to whole bytes, as bits (B, N, ceil(M / 8)): flag j is bit j % 8 of byte j // 8."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """The first ``size`` flags of every row of `pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :size].bool()


def hypercorrelation_fwd(
    queries: Sequence[Tensor], supports: Sequence[Tensor], mask: Tensor, eps: float, eps_mode: str, clamp: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op: the correlation (B, L, Ha, Wa, Hb, Wb), norms of queries (L, B, Ha, Wa) and weighted supports
    (L, B, Hb, Wb), the resized mask (B, Hb, Wb), and where the correlation is above 0 or NaN as bits
    (L, B, Ha*Wa, ceil(Hb*Wb / 8))."""
    dtype = accumulate_dtype(queries[0])
    wide_queries, wide_supports = ([x.to(dtype) for x in xs] for xs in (queries, supports))
    weights = weights_of(mask, supports[0])
    correlation = correlate_level(wide_queries, wide_supports, weights, eps, eps_mode, clamp)
    signs = mask.new_empty((len(queries), *queries[0].shape[:1], queries[0].shape[2:].numel(), 0), dtype=torch.uint8)
    if clamp:
        flags = ~(correlation.flatten(4).flatten(2, 3) <= 0)
        signs = torch.stack([pack_bits(layer) for layer in flags.unbind(1)])
    query_norms = torch.stack([_cosine.norm_of(q, 1) for q in wide_queries])
    support_norms = torch.stack([weigh(s, weights, eps).norm for s in wide_supports])
    return correlation.to(queries[0].dtype), query_norms, support_norms, weights, signs


def hypercorrelation_bwd(
    grad: Tensor,
    queries: Sequence[Tensor],
    supports: Sequence[Tensor],
    mask: Tensor,
    query_norms: Tensor,
    support_norms: Tensor,
    weights: Tensor,
    signs: Tensor,
    eps: float,
    eps_mode: str,
    clamp: bool,
    need_queries: Sequence[bool],
    need_supports: Sequence[bool],
    need_mask: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The backward op: two products with the output's gradient, through the normalisation. The mask has no gradient."""
    dtype = accumulate_dtype(queries[0])
    grad_queries, grad_supports = [], []
    for layer, (query, support) in enumerate(zip(queries, supports, strict=True)):
        grad_query, grad_support = query.new_empty(0), support.new_empty(0)
        q, g = query.to(dtype), grad[:, layer].to(dtype)
        s = weigh(support.to(dtype), weights, eps, support_norms[layer])
        if clamp:
            live = unpack_bits(signs[layer], support.shape[2:].numel()).view(g.shape)
            g = torch.where(live, g, 0.0)
        if need_queries[layer]:
            d = torch.einsum("bhwyx,bcyx->bchw", g, normalised(s, eps_mode))
            grad_query = _cosine.gradient(d, q, query_norms[layer], 1, eps, eps_mode).to(query.dtype)
        if need_supports[layer]:
            d = torch.einsum("bhwyx,bchw->bcyx", g, _cosine.normalised(q, 1, eps, eps_mode))
            d = _cosine.gradient(s.sign * d, s.x, _cosine.norm_of(s.x, 1), 1, s.eps, eps_mode)
            grad_support = d.to(support.dtype)
        grad_queries.append(grad_query)
        grad_supports.append(grad_support)
    return grad_queries, grad_supports, mask.new_empty(0)
