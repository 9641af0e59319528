"""Hypercorrelation in Triton.

out[b,i,j] = max(u[b,i] v[b,j] sum_c q[b,c,i] s[b,c,j], 0), with u = 1 / (|q_i| + eps) and v = m_j / (|m_j s_j| + eps);
gradients: D = sum of the output's gradient (where the output is not below 0) times the other normalised operand, then
u D - u^2 / |q_i| (q_i . D) q_i, for the support with v and m (csrc/hypercorrelation/hypercorrelation.h).

Decomposition: `level_kernel` makes one level of the pyramid in one launch, a program one tile of the output of a layer
and a sample: a matrix product that sums the squares of its rows and columns on the way, resizes the mask at its
columns, and scales, clamps, stores and packs the signs. Programs at the edges store norms and weights.
`product_kernel` is the gradient's matrix product, a program one tile of channels x pixels; `finish_kernel` goes through
the normalisation. No atomics, one order of summation. Memory traffic: operands from L2 once a tile, the output once; D
(B, C, N) in float32 is written and read once. Accumulation: float32; float32 operands are multiplied in full float32
("ieee"), half ones as they are on the tensor cores. Limits: float64 is left to other backends; 64-bit offsets; features
that are neither contiguous nor channels_last are copied, and so are layers of a level that differ in format.

Legend: B batch, C channels, N pixels (NA of the query, NB of the support), SB bytes of a row of signs. LAST: stored
as (B, N, C), else (B, C, N).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fss_kernels._library import TRITON_INTERPRETED, empty_rows_like, is_channels_last
from fss_kernels._triton import magnification, norm_divisor, resized

TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}  # float32: more depth spills
HALF_TILE = {**TILE, "BLOCK_K": 32}
PRODUCT_TILE = {**TILE, "BLOCK_N": 32}
WIDEN = TRITON_INTERPRETED  # whose products of half precision are wrong


@triton.jit
def _scale(norm, weight, eps, ADD: tl.constexpr):
    """What multiplies a vector of this norm (weight included) and weight; 0 for a zero vector."""
    return tl.where(norm == 0, 0.0, weight / tl.where(norm == 0, 1.0, norm_divisor(norm, eps, ADD)))


@triton.jit
def _norm(squares, weight):
    """|weight| times the root of a sum of squares; NaN where not finite."""
    norm = tl.abs(weight) * tl.sqrt_rn(squares)
    return tl.where(norm - norm == 0, norm, float("nan"))


@triton.jit
def _product(a, b, total, WIDEN: tl.constexpr):
    """total + a b."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _at(base, b, c, n, C, N, LAST: tl.constexpr):
    """Addresses of channels c and pixels n, which broadcast, of sample b."""
    return base + b * C * N + (n * C + c if LAST else c * N + n)


@triton.jit
def level_kernel(
    queries_ptr, supports_ptr, channels, mask_ptr, out_ptr, query_norms_ptr, support_norms_ptr, weights_ptr, signs_ptr,
    stride_mb, stride_mh, stride_mw, eps, B, MH, MW, HB, WB, NA, NB, SB,
    LAYERS: tl.constexpr, QUERY_LAST: tl.constexpr, SUPPORT_LAST: tl.constexpr, ADD: tl.constexpr, CLAMP: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out (B, LAYERS, NA, NB). Queries, supports and channels are tuples of LAYERS. A tile whose support
    pixels all have weight 0 multiplies nothing, but its rows may be NaN."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    layer = tl.program_id(2) // B
    b = (tl.program_id(2) % B).to(tl.int64)
    query, support, C = queries_ptr[0], supports_ptr[0], tl.zeros([], tl.int64)
    for of in tl.static_range(LAYERS):
        C += tl.where(layer == of, channels[of], 0)
        if layer == of:
            query = queries_ptr[of]
            support = supports_ptr[of]
    rows, columns = i < NA, j < NB
    mask = mask_ptr + b * stride_mb
    weight = resized(mask, j, columns, stride_mh, stride_mw, MH, MW, HB, WB, False, True, tl.float32)
    weight = tl.where(columns, weight, 0.0)
    kept = weight != 0
    any_kept = tl.max(kept.to(tl.int32), axis=0) != 0
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    query_squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    support_squares = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    for c0 in range(0, tl.where(any_kept, C, 0), BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K).to(tl.int64)
        at = _at(query, b, c[None, :], i[:, None], C, NA, QUERY_LAST)
        q = tl.load(at, mask=rows[:, None] & (c < C)[None, :], other=0)
        # what a support pixel of weight 0 holds does not count
        at = _at(support, b, c[:, None], j[None, :], C, NB, SUPPORT_LAST)
        s = tl.load(at, mask=kept[None, :] & (c < C)[:, None], other=0)
        query_squares += q.to(tl.float32) * q.to(tl.float32)
        support_squares += s.to(tl.float32) * s.to(tl.float32)
        total = _product(q, s, total, WIDEN)
    for c0 in range(0, tl.where(any_kept, 0, C), BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K).to(tl.int64)
        at = _at(query, b, c[None, :], i[:, None], C, NA, QUERY_LAST)
        q = tl.load(at, mask=rows[:, None] & (c < C)[None, :], other=0).to(tl.float32)
        query_squares += q * q
    query_norm = _norm(tl.sum(query_squares, axis=1), 1.0)
    support_norm = _norm(tl.sum(support_squares, axis=0), weight)
    of_layer = layer.to(tl.int64) * B + b
    if tl.program_id(1) == 0:
        tl.store(query_norms_ptr + of_layer * NA + i, query_norm, mask=rows)
    if tl.program_id(0) == 0:
        tl.store(support_norms_ptr + of_layer * NB + j, support_norm, mask=columns)
        tl.store(weights_ptr + b * NB + j, weight, mask=columns & (layer == 0))
    out = total * _scale(query_norm, 1.0, eps, ADD)[:, None] * _scale(support_norm, weight, eps, ADD)[None, :]
    if CLAMP:
        live = rows[:, None] & columns[None, :] & ((out > 0) | (out != out))
        powers = (1 << (tl.arange(0, BLOCK_N) % 8)).to(tl.int32)
        bits = tl.where(live, powers[None, :], 0)
        packed = tl.sum(tl.reshape(bits, [BLOCK_M, BLOCK_N // 8, 8]), axis=2)
        byte = tl.program_id(1).to(tl.int64) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        at = signs_ptr + (of_layer * NA + i)[:, None] * SB + byte[None, :]
        tl.store(at, packed.to(tl.uint8), mask=rows[:, None] & (byte < SB)[None, :])
        out = tl.where(out <= 0, 0.0, out)
    to = out_ptr + ((b * LAYERS + layer) * NA + i)[:, None] * NB + j[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=rows[:, None] & columns[None, :])


@triton.jit
def product_kernel(
    x_ptr, norms_ptr, weights_ptr, grad_ptr, signs_ptr, sums_ptr, stride_gb, eps, C, N, K, SB,
    OF_QUERY: tl.constexpr, LAST: tl.constexpr, ADD: tl.constexpr, CLAMP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums (B, C, N) = D, the gradient of the normalised operand: sum_k scale_k x[c,k] g[n,k] with x the other operand.
    n is a query pixel and k a support pixel, which has a weight (OF_QUERY), or the other way round. In float32
    throughout: the gradient is rounded once."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        weight = tl.load(weights_ptr + b * K + k, mask=k < K, other=0) if OF_QUERY else 1.0
        scale = _scale(tl.load(norms_ptr + b * K + k, mask=k < K, other=0), weight, eps, ADD)
        at = _at(x_ptr, b, c[:, None], k[None, :], C, K, LAST)
        x = tl.load(at, mask=(c < C)[:, None] & (scale != 0)[None, :], other=0).to(tl.float32) * scale[None, :]
        here = (k < K)[:, None] & (n < N)[None, :]
        row, column = (n[None, :], k[:, None]) if OF_QUERY else (k[:, None], n[None, :])
        rows, columns = (N, K) if OF_QUERY else (K, N)
        if CLAMP:
            bits = tl.load(signs_ptr + (b * rows + row) * SB + column // 8, mask=here, other=0)
            here = here & (((bits.to(tl.int32) >> (column % 8).to(tl.int32)) & 1) != 0)
        g = tl.load(grad_ptr + b * stride_gb + row * columns + column, mask=here, other=0)
        total = _product(x, g.to(tl.float32), total, False)
    tl.store(sums_ptr + (b * C + c)[:, None] * N + n[None, :], total, mask=(c < C)[:, None] & (n < N)[None, :])


@triton.jit
def finish_kernel(
    x_ptr, norms_ptr, weights_ptr, sums_ptr, out_ptr, eps, C, N,
    WEIGHTED: tl.constexpr, LAST: tl.constexpr, ADD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = scale D - curvature scale (x . D) x, the gradient to x. Program: BLOCK_N pixels of a sample."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    here = n < N
    weight = tl.load(weights_ptr + b * N + n, mask=here, other=0) if WEIGHTED else 1.0
    norm = tl.load(norms_ptr + b * N + n, mask=here, other=0)
    scale = _scale(norm, weight, eps, ADD)
    live = here & (scale != 0)
    factor = magnification(norm / tl.where(norm == 0, 1.0, tl.abs(weight))) if WEIGHTED else magnification(norm)
    scaled = scale / factor
    curvature = scaled * (weight / tl.where(norm == 0, 1.0, norm * factor))
    if not ADD:
        curvature = tl.where(norm <= eps, 0.0, curvature)
    along = tl.zeros([BLOCK_N], dtype=tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = (c < C)[:, None] & live[None, :]
        x = tl.load(_at(x_ptr, b, c[:, None], n[None, :], C, N, LAST), mask=inside, other=0).to(tl.float32)
        x *= factor[None, :]
        along += tl.sum(x * tl.load(sums_ptr + (b * C + c)[:, None] * N + n[None, :], mask=inside, other=0), axis=0)
    slope = curvature * (scaled * along) * factor
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = (c < C)[:, None] & live[None, :]
        x = tl.load(_at(x_ptr, b, c[:, None], n[None, :], C, N, LAST), mask=inside, other=0).to(tl.float32)
        d = tl.load(sums_ptr + (b * C + c)[:, None] * N + n[None, :], mask=inside, other=0)
        result = tl.where(live[None, :], scale[None, :] * d - slope[None, :] * (x * factor[None, :]), 0.0)
        to = _at(out_ptr, b, c[:, None], n[None, :], C, N, LAST)
        tl.store(to, result.to(out_ptr.dtype.element_ty), mask=(c < C)[:, None] & here[None, :])


def _stored_alike(tensors: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """The features dense, channels_last if all of them are, and whether they are."""
    last = all(is_channels_last(t) for t in tensors)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return [t.contiguous(memory_format=memory_format) for t in tensors], last


def hypercorrelation_fwd(
    queries: Sequence[Tensor], supports: Sequence[Tensor], mask: Tensor, eps: float, eps_mode: str, clamp: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op: the correlation of a level, norms, the resized mask, the signs. One launch."""
    query, layers = queries[0], len(queries)
    batch, (ha, wa), (hb, wb) = query.shape[0], query.shape[2:], supports[0].shape[2:]
    rows, columns = ha * wa, hb * wb
    out = query.new_empty((batch, layers, ha, wa, hb, wb))
    query_norms = query.new_empty((layers, batch, ha, wa), dtype=torch.float32)
    support_norms = query.new_empty((layers, batch, hb, wb), dtype=torch.float32)
    weights = query.new_empty((batch, hb, wb), dtype=torch.float32)
    row_bytes = (columns + 7) // 8
    signs = query.new_empty((layers, batch, rows, row_bytes if clamp else 0), dtype=torch.uint8)
    if batch == 0:
        return out, query_norms, support_norms, weights, signs
    (dense_queries, query_last), (dense_supports, support_last) = _stored_alike(queries), _stored_alike(supports)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    tile = TILE if query.dtype == torch.float32 else HALF_TILE
    grid = (triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(columns, tile["BLOCK_N"]), batch * layers)
    level_kernel[grid](
        tuple(dense_queries), tuple(dense_supports), tuple(q.shape[1] for q in queries),
        mask, out, query_norms, support_norms, weights, signs, *mask.stride(),
        eps, batch, *mask.shape[1:], hb, wb, rows, columns, row_bytes,
        LAYERS=layers, QUERY_LAST=query_last, SUPPORT_LAST=support_last, ADD=eps_mode == "add", CLAMP=clamp,
        WIDEN=WIDEN, **tile,
    )  # fmt: skip
    return out, query_norms, support_norms, weights, signs


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
    """The backward op: gradients to queries and supports, empty where not needed; the mask has none."""
    grads = [
        [empty_rows_like(x) if need else x.new_empty(0) for x, need in zip(xs, needs, strict=True)]
        for xs, needs in ((queries, need_queries), (supports, need_supports))
    ]
    batch, columns = queries[0].shape[0], supports[0].shape[2:].numel()
    if batch == 0:
        return grads[0], grads[1], mask.new_empty(0)
    grad, signs, weights = grad.contiguous(), signs.contiguous(), weights.contiguous()
    query_norms, support_norms = query_norms.contiguous(), support_norms.contiguous()
    add = eps_mode == "add"
    for layer, (query, support) in enumerate(zip(queries, supports, strict=True)):
        sides = (
            (True, grads[0][layer], query, query_norms[layer], support, support_norms[layer]),
            (False, grads[1][layer], support, support_norms[layer], query, query_norms[layer]),
        )
        for of_query, out, x, norms, other, other_norms in sides:
            if out.ndim != 4:
                continue
            channels, pixels, depth = x.shape[1], x.shape[2:].numel(), other.shape[2:].numel()
            ((dense,), last), ((dense_other,), other_last) = _stored_alike([x]), _stored_alike([other])
            sums = x.new_empty((batch, channels, pixels), dtype=torch.float32)
            grid = triton.cdiv(channels, PRODUCT_TILE["BLOCK_M"]), triton.cdiv(pixels, PRODUCT_TILE["BLOCK_N"]), batch
            product_kernel[grid](
                dense_other, other_norms, weights, grad[:, layer], signs[layer], sums, grad.stride(0), eps,
                channels, pixels, depth, (columns + 7) // 8,
                OF_QUERY=of_query, LAST=other_last, ADD=add, CLAMP=clamp, **PRODUCT_TILE,
            )  # fmt: skip
            finish_kernel[(triton.cdiv(pixels, 32), batch)](
                dense, norms, weights, sums, out, eps, channels, pixels,
                WEIGHTED=not of_query, LAST=last, ADD=add, BLOCK_C=32, BLOCK_N=32,
            )  # fmt: skip
    return grads[0], grads[1], mask.new_empty(0)
