"""Hypercorrelation in plain PyTorch: the contract, written to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fss_kernels._layout import accumulate_dtype
from fss_kernels.ops.masked_avg_pool.reference import resize_mask


def norm(x: Tensor) -> Tensor:
    """Norms of the vectors x (B, C, H, W) over C, (B, H, W); NaN where one is not finite."""
    squares = (x * x).sum(1)
    zero = squares == 0
    n = torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
    return torch.where(n.isfinite(), n, torch.nan)


def normalise(x: Tensor, eps: float, eps_mode: str) -> Tensor:
    """x / (n + eps) or x / max(n, eps) with n the norm; 0, value and gradient, for a zero vector."""
    n = norm(x)
    zero = n == 0
    n = torch.where(zero, 1.0, n)
    denominator = n + eps if eps_mode == "add" else torch.where(n <= eps, eps, n)
    return torch.where(zero[:, None], 0.0, x / denominator[:, None])


def weigh(support: Tensor, weights: Tensor) -> Tensor:
    """support (B, C, H, W) times weights (B, H, W); 0 where the weight is 0, whatever the support holds."""
    return torch.where((weights == 0)[:, None], 0.0, support) * weights[:, None]


def correlate(query: Tensor, support: Tensor, weights: Tensor, eps: float, eps_mode: str, clamp: bool) -> Tensor:
    """Hypercorrelation for a mask that is on the support's grid already."""
    dtype = accumulate_dtype(query)
    q = normalise(query.to(dtype), eps, eps_mode)
    s = normalise(weigh(support.to(dtype), weights.to(dtype)), eps, eps_mode)
    cosine = torch.einsum("bchw,bcyx->bhwyx", q, s)
    if clamp:
        cosine = torch.where(cosine <= 0, 0.0, cosine)  # NaN stays; no gradient where the cosine is not above 0
    return cosine.to(query.dtype)


def weights_of(mask: Tensor, support: Tensor) -> Tensor:
    """mask (B, h, w) on the support's grid, bilinear with aligned corners, in the accumulation dtype."""
    mask = mask.to(accumulate_dtype(support))
    return resize_mask(mask[:, None], support.shape[-2], support.shape[-1], "bilinear", True)[:, 0]


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


def hypercorrelation_fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op: the correlation (B, L, Ha, Wa, Hb, Wb), norms of queries (L, B, Ha, Wa) and weighted supports
    (L, B, Hb, Wb), the resized mask (B, Hb, Wb), and where the correlation is above 0 or NaN as bits
    (L, B, Ha*Wa, ceil(Hb*Wb / 8))."""
    queries, supports, mask, clamp = call.queries, call.supports, call.mask, call.clamp
    dtype = accumulate_dtype(queries[0])
    wide_queries, wide_supports = ([x.to(dtype) for x in xs] for xs in (queries, supports))
    weights = weights_of(mask, supports[0])
    correlation = correlate_level(wide_queries, wide_supports, weights, call.eps, call.eps_mode, clamp)
    signs = mask.new_empty((len(queries), *queries[0].shape[:1], queries[0].shape[2:].numel(), 0), dtype=torch.uint8)
    if clamp:
        flags = ~(correlation.flatten(4).flatten(2, 3) <= 0)
        signs = torch.stack([pack_bits(layer) for layer in flags.unbind(1)])
    query_norms = torch.stack([norm(q) for q in wide_queries])
    support_norms = torch.stack([norm(weigh(s, weights)) for s in wide_supports])
    return correlation.to(queries[0].dtype), query_norms, support_norms, weights, signs


def _grad_normalised(g: Tensor, x: Tensor, n: Tensor, eps: float, eps_mode: str) -> Tensor:
    """Gradient to x of `normalise`, from g, that to its result, and the norms n."""
    n = n[:, None]
    safe = torch.where(n == 0, 1.0, n)
    denominator = n + eps if eps_mode == "add" else torch.where(n <= eps, eps, n)
    denominator = torch.where(n == 0, 1.0, denominator)
    along = x / safe * ((x / denominator * g).sum(1, keepdim=True) / denominator)  # no product of norms: it may be 0
    if eps_mode == "clamp":
        along = torch.where(n <= eps, 0.0, along)
    return torch.where(n == 0, 0.0, g / denominator - along)


def hypercorrelation_bwd(call: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The backward op: two products with the output's gradient, through the normalisation."""
    queries, weights, eps, eps_mode = call.queries, call.weights, call.eps, call.eps_mode
    dtype = accumulate_dtype(queries[0])
    grad_queries, grad_supports = [], []
    for layer, (query, support) in enumerate(zip(queries, call.supports, strict=True)):
        grad_query, grad_support = query.new_empty(0), support.new_empty(0)
        q, s, g = query.to(dtype), weigh(support.to(dtype), weights), call.grad_correlation[:, layer].to(dtype)
        if call.clamp:
            live = unpack_bits(call.signs[layer], support.shape[2:].numel()).view(g.shape)
            g = torch.where(live, g, 0.0)
        if call.need_queries[layer]:
            d = torch.einsum("bhwyx,bcyx->bchw", g, normalise(s, eps, eps_mode))
            grad_query = _grad_normalised(d, q, call.query_norms[layer], eps, eps_mode).to(query.dtype)
        if call.need_supports[layer]:
            d = torch.einsum("bhwyx,bchw->bcyx", g, normalise(q, eps, eps_mode))
            d = _grad_normalised(d, s, call.support_norms[layer], eps, eps_mode)
            grad_support = weigh(d, weights).to(support.dtype)
        grad_queries.append(grad_query)
        grad_supports.append(grad_support)
    return grad_queries, grad_supports
