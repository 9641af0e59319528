"""Hypercorrelation in Triton.

out[b,i,j] = max(u[b,i] v[b,j] sum_c q[b,c,i] s[b,c,j], 0), with u = 1 / (|q_i| + eps) and v = m_j / (|m_j s_j| + eps);
gradients: D = sum of the output's gradient (where the output is not below 0) times the other normalised operand, then
u D - u^2 / |q_i| (q_i . D) q_i, for the support with v and m (csrc/hypercorrelation/hypercorrelation.h).

Decomposition: `scale_kernel` finds norms and scales, a program BLOCK pixels; `correlate_kernel` is a matrix product
whose epilogue scales, clamps, stores and packs the signs, a program one tile of the output; `product_kernel` is the
gradient's matrix product, a program one tile of channels x pixels; `finish_kernel` goes through the normalisation.
No atomics, one order of summation. Memory traffic: operands from L2 once a tile, the output once; D (B, C, N) in
float32 is written and read once. Accumulation: float32; float32 operands are multiplied in full float32 ("ieee"),
half ones as they are on the tensor cores. Limits: float64 is left to other backends; 64-bit offsets; any strides of the
features.

Legend: B batch, C channels, N pixels (NA of the query, NB of the support), W width of a grid, SB bytes of a row of
signs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fss_kernels._library import TRITON_INTERPRETED, empty_rows_like
from fss_kernels.ops.masked_avg_pool.triton_kernels import _resize

TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}  # float32: more depth spills
HALF_TILE = {**TILE, "BLOCK_K": 32}
WIDEN = TRITON_INTERPRETED  # whose products of half precision are wrong


@triton.jit
def _scale(norm, weight, eps, ADD: tl.constexpr):
    """What multiplies a vector of this norm (weight included) and weight; 0 for a zero vector."""
    denominator = norm + eps if ADD else tl.where(norm <= eps, eps, norm)
    return tl.where(norm == 0, 0.0, weight / tl.where(norm == 0, 1.0, denominator))


@triton.jit
def _product(a, b, total, WIDEN: tl.constexpr):
    """total + a b."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def scale_kernel(
    x_ptr, weights_ptr, norms_ptr, scales_ptr, stride_b, stride_c, stride_h, stride_w, eps, C, N, W,
    HAS_NORMS: tl.constexpr, ADD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """norms (B, N) = |weight| |x|, NaN where not finite, and scales (B, N). HAS_NORMS: norms are given."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    here = n < N
    weight = tl.load(weights_ptr + b * N + n, mask=here, other=0)
    if HAS_NORMS:
        norm = tl.load(norms_ptr + b * N + n, mask=here, other=0)
    else:
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
            offsets = b * stride_b + c[:, None] * stride_c + (n // W * stride_h + n % W * stride_w)[None, :]
            inside = (c < C)[:, None] & (here & (weight != 0))[None, :]
            x = tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32)
            total += tl.sum(x * x, axis=0)
        norm = tl.abs(weight) * tl.sqrt(total)
        norm = tl.where(norm - norm == 0, norm, float("nan"))
        tl.store(norms_ptr + b * N + n, norm, mask=here)
    tl.store(scales_ptr + b * N + n, _scale(norm, weight, eps, ADD), mask=here)


@triton.jit
def correlate_kernel(
    query_ptr, support_ptr, u_ptr, v_ptr, out_ptr, signs_ptr,
    stride_qb, stride_qc, stride_qh, stride_qw, stride_sb, stride_sc, stride_sh, stride_sw, stride_ob,
    C, NA, NB, WA, WB, SB,
    CLAMP: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the output of a sample; sample b is written at out + b * stride_ob. A tile whose support pixels all
    have scale 0 multiplies nothing."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(2).to(tl.int64)
    kept = tl.load(v_ptr + b * NB + j, mask=j < NB, other=0) != 0
    left = query_ptr + b * stride_qb + (i // WA * stride_qh + i % WA * stride_qw)[:, None]
    right = support_ptr + b * stride_sb + (j // WB * stride_sh + j % WB * stride_sw)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    depth = tl.where(tl.max(kept.to(tl.int32), axis=0) != 0, C, 0)
    for c0 in range(0, depth, BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K).to(tl.int64)
        q = tl.load(left + c[None, :] * stride_qc, mask=(i < NA)[:, None] & (c < C)[None, :], other=0)
        # what a support pixel of weight 0 holds does not count
        s = tl.load(right + c[:, None] * stride_sc, mask=kept[None, :] & (c < C)[:, None], other=0)
        total = _product(q, s, total, WIDEN)
    u = tl.load(u_ptr + b * NA + i, mask=i < NA, other=0)
    v = tl.load(v_ptr + b * NB + j, mask=j < NB, other=0)
    out = total * u[:, None] * v[None, :]
    if CLAMP:
        live = (i < NA)[:, None] & (j < NB)[None, :] & ((out > 0) | (out != out))
        powers = (1 << (tl.arange(0, BLOCK_N) % 8)).to(tl.int32)
        bits = tl.where(live, powers[None, :], 0)
        packed = tl.sum(tl.reshape(bits, [BLOCK_M, BLOCK_N // 8, 8]), axis=2)
        byte = tl.program_id(1).to(tl.int64) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        at = signs_ptr + (b * NA + i)[:, None] * SB + byte[None, :]
        tl.store(at, packed.to(tl.uint8), mask=(i < NA)[:, None] & (byte < SB)[None, :])
        out = tl.where(out <= 0, 0.0, out)
    to = out_ptr + b * stride_ob + i[:, None] * NB + j[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=(i < NA)[:, None] & (j < NB)[None, :])


@triton.jit
def product_kernel(
    x_ptr, scales_ptr, grad_ptr, signs_ptr, sums_ptr, stride_b, stride_c, stride_h, stride_w, stride_gb, stride_gn,
    stride_gk, C, N, K, W, NA, SB,
    OF_QUERY: tl.constexpr, CLAMP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums (B, C, N) = D, the gradient of the normalised operand: sum_k scale_k x[c,k] g[n,k] with x the other operand.
    n is a query pixel and k a support pixel (OF_QUERY) or the other way round. In float32 throughout: the gradient is
    rounded once."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        scale = tl.load(scales_ptr + b * K + k, mask=k < K, other=0)
        at = x_ptr + b * stride_b + c[:, None] * stride_c + (k // W * stride_h + k % W * stride_w)[None, :]
        x = tl.load(at, mask=(c < C)[:, None] & (scale != 0)[None, :], other=0).to(tl.float32) * scale[None, :]
        here = (k < K)[:, None] & (n < N)[None, :]
        if CLAMP:
            if OF_QUERY:
                bits = tl.load(signs_ptr + (b * NA + n)[None, :] * SB + (k // 8)[:, None], mask=here, other=0)
                here = here & (((bits.to(tl.int32) >> (k % 8).to(tl.int32)[:, None]) & 1) != 0)
            else:
                bits = tl.load(signs_ptr + (b * NA + k)[:, None] * SB + (n // 8)[None, :], mask=here, other=0)
                here = here & (((bits.to(tl.int32) >> (n % 8).to(tl.int32)[None, :]) & 1) != 0)
        g = tl.load(grad_ptr + b * stride_gb + k[:, None] * stride_gk + n[None, :] * stride_gn, mask=here, other=0)
        total = _product(x, g.to(tl.float32), total, False)
    tl.store(sums_ptr + (b * C + c)[:, None] * N + n[None, :], total, mask=(c < C)[:, None] & (n < N)[None, :])


@triton.jit
def finish_kernel(
    x_ptr, weights_ptr, norms_ptr, scales_ptr, sums_ptr, out_ptr,
    stride_b, stride_c, stride_h, stride_w, stride_ob, stride_oc, stride_on, eps, C, N, W,
    ADD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = scale D - curvature (x . D) x, the gradient to x. Program: BLOCK_N pixels of a sample, all channels."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    here = n < N
    weight = tl.load(weights_ptr + b * N + n, mask=here, other=0)
    norm = tl.load(norms_ptr + b * N + n, mask=here, other=0)
    scale = tl.load(scales_ptr + b * N + n, mask=here, other=0)
    live = here & (scale != 0)
    curvature = scale * scale * (weight / tl.where(norm == 0, 1.0, norm))
    if not ADD:
        curvature = tl.where(norm <= eps, 0.0, curvature)
    pixels = b * stride_b + n // W * stride_h + n % W * stride_w
    along = tl.zeros([BLOCK_N], dtype=tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = (c < C)[:, None] & live[None, :]
        x = tl.load(x_ptr + pixels[None, :] + c[:, None] * stride_c, mask=inside, other=0).to(tl.float32)
        along += tl.sum(x * tl.load(sums_ptr + (b * C + c)[:, None] * N + n[None, :], mask=inside, other=0), axis=0)
    slope = curvature * along
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = (c < C)[:, None] & live[None, :]
        x = tl.load(x_ptr + pixels[None, :] + c[:, None] * stride_c, mask=inside, other=0).to(tl.float32)
        d = tl.load(sums_ptr + (b * C + c)[:, None] * N + n[None, :], mask=inside, other=0)
        result = tl.where(live[None, :], scale[None, :] * d - slope[None, :] * x, 0.0)
        to = out_ptr + b * stride_ob + c[:, None] * stride_oc + n[None, :] * stride_on
        tl.store(to, result.to(out_ptr.dtype.element_ty), mask=(c < C)[:, None] & here[None, :])


def _scales(x: Tensor, weights: Tensor, norms: Tensor, eps: float, eps_mode: str, known: bool) -> Tensor:
    """Scales (B, N); fills norms unless they are known."""
    batch, channels, _, width = x.shape
    pixels = x.shape[2:].numel()
    scales = torch.empty_like(norms)
    scale_kernel[(triton.cdiv(pixels, 64), batch)](
        x, weights, norms, scales, *x.stride(), eps, channels, pixels, width,
        HAS_NORMS=known, ADD=eps_mode == "add", BLOCK_C=32, BLOCK_N=64,
    )  # fmt: skip
    return scales


def hypercorrelation_fwd(
    query: Tensor, support: Tensor, mask: Tensor, eps: float, eps_mode: str, clamp: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op: the correlation, both norms, the resized mask, the signs."""
    (batch, channels, ha, wa), (hb, wb) = query.shape, support.shape[2:]
    rows, columns = ha * wa, hb * wb
    out = query.new_empty((batch, ha, wa, hb, wb))
    query_norm = query.new_empty((batch, ha, wa), dtype=torch.float32)
    support_norm, weights = (query.new_empty((batch, hb, wb), dtype=torch.float32) for _ in range(2))
    row_bytes = (columns + 7) // 8
    signs = query.new_empty((batch, rows, row_bytes if clamp else 0), dtype=torch.uint8)
    if batch == 0:
        return out, query_norm, support_norm, weights, signs
    _resize(mask[:, None], weights[:, None], False, True, False)
    u = _scales(query, torch.ones_like(query_norm), query_norm, eps, eps_mode, False)
    v = _scales(support, weights, support_norm, eps, eps_mode, False)
    grid = (triton.cdiv(rows, TILE["BLOCK_M"]), triton.cdiv(columns, TILE["BLOCK_N"]), batch)
    correlate_kernel[grid](
        query, support, u, v, out, signs, *query.stride(), *support.stride(), rows * columns,
        channels, rows, columns, wa, wb, row_bytes,
        CLAMP=clamp, WIDEN=WIDEN, **(TILE if query.dtype == torch.float32 else HALF_TILE),
    )  # fmt: skip
    return out, query_norm, support_norm, weights, signs


def hypercorrelation_bwd(
    grad: Tensor,
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    query_norm: Tensor,
    support_norm: Tensor,
    weights: Tensor,
    signs: Tensor,
    eps: float,
    eps_mode: str,
    clamp: bool,
    need_query: bool,
    need_support: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op: gradients to query and support, empty where not needed; the mask has none."""
    grad_query = empty_rows_like(query) if need_query else query.new_empty(0)
    grad_support = empty_rows_like(support) if need_support else support.new_empty(0)
    batch, rows, columns = query.shape[0], query.shape[2:].numel(), support.shape[2:].numel()
    if batch == 0:
        return grad_query, grad_support, mask.new_empty(0)
    grad, signs = grad.contiguous(), signs.contiguous()
    query_norm, support_norm, weights = query_norm.contiguous(), support_norm.contiguous(), weights.contiguous()
    ones = torch.ones_like(query_norm)
    u = _scales(query, ones, query_norm, eps, eps_mode, True)
    v = _scales(support, weights, support_norm, eps, eps_mode, True)
    sides = (
        (True, grad_query, query, ones, query_norm, u, support, v, (columns, 1)),
        (False, grad_support, support, weights, support_norm, v, query, u, (1, columns)),
    )
    for of_query, out, x, weight, norms, scales, other, other_scales, strides in sides:
        if out.ndim != 4:
            continue
        channels, pixels, depth = x.shape[1], x.shape[2:].numel(), other.shape[2:].numel()
        sums = x.new_empty((batch, channels, pixels), dtype=torch.float32)
        grid = (triton.cdiv(channels, TILE["BLOCK_M"]), triton.cdiv(pixels, TILE["BLOCK_N"]), batch)
        product_kernel[grid](
            other, other_scales, grad, signs, sums, *other.stride(), rows * columns, *strides,
            channels, pixels, depth, other.shape[3], rows, (columns + 7) // 8,
            OF_QUERY=of_query, CLAMP=clamp, **TILE,
        )  # fmt: skip
        stride_n = out.stride(3) if out.shape[3] > 1 else out.stride(2)
        finish_kernel[(triton.cdiv(pixels, 32), batch)](
            x, weight, norms, scales, sums, out, *x.stride(), out.stride(0), out.stride(1), stride_n,
            eps, channels, pixels, x.shape[3], ADD=eps_mode == "add", BLOCK_C=32, BLOCK_N=32,
        )  # fmt: skip
    return grad_query, grad_support, mask.new_empty(0)
