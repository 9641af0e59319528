"""Cosine with prototypes in Triton.

cosine[b,p,n] = x[b,:,n] . u[p] / N(|x[b,:,n]|), u[p] = w[p] / N(|w[p]|), N(t) = max(t, eps) or t + eps; formulas of the
gradients in the op's README (n runs over the H*W pixels).

Decomposition: a program owns a tile of the output and loops over what is summed, so there are no atomics; for the
gradient to the prototypes pixels are split into pieces of PIECE whose partial sums a last kernel adds in order. The
split depends on N alone: a sample has the same bits in every batch. Memory traffic: the forward reads x once for every
PROTOTYPES prototypes; the backward reads it once for each gradient and writes the feature gradient once. Accumulation:
float32. Limits: float64 is left to other backends; 64-bit offsets; any strides of the features.

Legend: B batch, G sets of prototypes (B, or 1 for all samples), P prototypes, C channels, N pixels, W columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fss_kernels._library import accumulate_dtype, empty_rows_like
from fss_kernels._triton import inverse_norm, magnification, norm_slope

PROTOTYPES = 4  # prototypes that share one read of the features
PIECE = 1024  # pixels of one partial sum
BLOCK = 256  # channels of a step along one prototype


@triton.jit
def unit_kernel(w_ptr, unit_ptr, eps, C, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """unit (G*P, C) = w / N(|w|). Program: one prototype."""
    row = tl.program_id(0).to(tl.int64) * C
    squares = tl.zeros([BLOCK], dtype=ACC)
    for c0 in range(0, C, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + row + c, mask=c < C, other=0).to(ACC)
        squares += w * w
    inverse = inverse_norm(tl.sqrt_rn(tl.sum(squares, axis=0)), eps, ADD)
    for c0 in range(0, C, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + row + c, mask=c < C, other=0).to(ACC)
        tl.store(unit_ptr + row + c, w * inverse, mask=c < C)


@triton.jit
def scores_kernel(
    x_ptr, unit_ptr, scores_ptr, cosines_ptr, norms_ptr, stride_b, stride_c, stride_h, stride_w, stride_set, scale, eps,
    P, C, N, W, ADD: tl.constexpr, ACC: tl.constexpr, PROTOTYPES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """scores, cosines (B, P, N) and norms (B, N). Program: BLOCK_N pixels x PROTOTYPES of a sample, all channels."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = tl.cdiv(P, PROTOTYPES)
    b = tl.program_id(1).to(tl.int64) // groups
    group = tl.program_id(1).to(tl.int64) % groups
    p = group * PROTOTYPES + tl.arange(0, PROTOTYPES)
    pixels = b * stride_b + n // W * stride_h + n % W * stride_w
    dots = tl.zeros([PROTOTYPES, BLOCK_N], dtype=ACC)
    squares = tl.zeros([BLOCK_N], dtype=ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        x = tl.load(
            x_ptr + c[:, None] * stride_c + pixels[None, :], mask=(c < C)[:, None] & (n < N)[None, :], other=0
        ).to(ACC)
        u = tl.load(
            unit_ptr + b * stride_set + p[:, None] * C + c[None, :], mask=(p < P)[:, None] & (c < C)[None, :], other=0
        )
        squares += tl.sum(x * x, axis=0)
        dots += tl.sum(u[:, :, None] * x[None, :, :], axis=1)
    norm = tl.sqrt_rn(squares)
    cosines = dots * inverse_norm(norm, eps, ADD)[None, :]
    here = (p < P)[:, None] & (n < N)[None, :]
    at = (b * P + p)[:, None] * N + n[None, :]
    tl.store(cosines_ptr + at, cosines, mask=here)
    tl.store(scores_ptr + at, (cosines * scale).to(scores_ptr.dtype.element_ty), mask=here)
    tl.store(norms_ptr + b * N + n, norm, mask=(n < N) & (group == 0))


@triton.jit
def grad_features_kernel(
    grad_ptr, x_ptr, unit_ptr, cosines_ptr, norms_ptr, out_ptr, stride_b, stride_c, stride_h, stride_w, stride_set,
    stride_out_c, stride_out_n, scale, eps, P, C, N, W, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_x[c,n] = sum_p k[p,n] u[p,c] - s[n] x[c,n]. Program: one tile, written once."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(2).to(tl.int64)
    norm = tl.load(norms_ptr + b * N + n, mask=n < N, other=0)
    inverse = inverse_norm(norm, eps, ADD) * scale
    total = tl.zeros([BLOCK_C, BLOCK_N], dtype=ACC)
    along = tl.zeros([BLOCK_N], dtype=ACC)
    for p in range(P):
        g = tl.load(grad_ptr + (b * P + p) * N + n, mask=n < N, other=0).to(ACC)
        along += g * tl.load(cosines_ptr + (b * P + p) * N + n, mask=n < N, other=0)
        u = tl.load(unit_ptr + b * stride_set + p * C + c, mask=c < C, other=0)
        total += u[:, None] * (g * inverse)[None, :]
    here = (c < C)[:, None] & (n < N)[None, :]
    pixels = b * stride_b + n // W * stride_h + n % W * stride_w
    x = tl.load(x_ptr + c[:, None] * stride_c + pixels[None, :], mask=here, other=0).to(ACC)
    factor = magnification(norm)
    along = along * scale * norm_slope(norm * factor, eps * factor, ADD) * factor
    total -= along[None, :] * (x * factor[None, :])
    out = out_ptr + b * C * N + c[:, None] * stride_out_c + n[None, :] * stride_out_n
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def sums_kernel(
    grad_ptr, x_ptr, norms_ptr, partial_ptr, stride_b, stride_c, stride_h, stride_w, scale, eps, P, C, N, W,
    ADD: tl.constexpr, ACC: tl.constexpr, PROTOTYPES: tl.constexpr, PIECE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial (B, pieces, P, C): sum_n k[p,n] x[c,n] of one piece. Program: BLOCK_C channels x PROTOTYPES."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    groups = tl.cdiv(P, PROTOTYPES)
    b = tl.program_id(1).to(tl.int64) // groups
    p = tl.program_id(1).to(tl.int64) % groups * PROTOTYPES + tl.arange(0, PROTOTYPES)
    piece = tl.program_id(2).to(tl.int64)
    total = tl.zeros([PROTOTYPES, BLOCK_C, BLOCK_N], dtype=ACC)
    for n0 in range(0, PIECE, BLOCK_N):
        n = piece * PIECE + n0 + tl.arange(0, BLOCK_N)
        inverse = inverse_norm(tl.load(norms_ptr + b * N + n, mask=n < N, other=0), eps, ADD) * scale
        g = tl.load(
            grad_ptr + (b * P + p)[:, None] * N + n[None, :], mask=(p < P)[:, None] & (n < N)[None, :], other=0
        ).to(ACC)
        pixels = b * stride_b + n // W * stride_h + n % W * stride_w
        x = tl.load(
            x_ptr + c[:, None] * stride_c + pixels[None, :], mask=(c < C)[:, None] & (n < N)[None, :], other=0
        ).to(ACC)
        total += (g * inverse[None, :])[:, None, :] * x[None, :, :]
    out = partial_ptr + ((b * tl.num_programs(2) + piece) * P + p)[:, None] * C + c[None, :]
    tl.store(out, tl.sum(total, axis=2), mask=(p < P)[:, None] & (c < C)[None, :])


@triton.jit
def _summed(partial_ptr, first, count, P, C, c, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The partial sums of one prototype, `count` of them, in order."""
    total = tl.zeros([BLOCK], dtype=ACC)
    for i in range(count):
        total += tl.load(partial_ptr + first + i * tl.cast(P * C, tl.int64) + c, mask=c < C, other=0)
    return total


@triton.jit
def grad_prototypes_kernel(
    partial_ptr, w_ptr, out_ptr, eps, per_set, P, C, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """grad_w = v / N - w (w . v) / (|w| N^2), v summed over the pieces of all samples. Program: one prototype."""
    row = tl.program_id(0).to(tl.int64)
    first = (row // P * per_set * P + row % P) * C
    squares = tl.zeros([BLOCK], dtype=ACC)
    dots = tl.zeros([BLOCK], dtype=ACC)
    for c0 in range(0, C, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + row * C + c, mask=c < C, other=0).to(ACC)
        squares += w * w
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    inverse = inverse_norm(norm, eps, ADD)
    factor = magnification(norm)
    for c0 in range(0, C, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + row * C + c, mask=c < C, other=0).to(ACC) * factor
        dots += w * _summed(partial_ptr, first, per_set, P, C, c, ACC, BLOCK)
    size, scaled = norm * factor, eps * factor
    along = tl.sum(dots, axis=0) * inverse_norm(size, scaled, ADD) * norm_slope(size, scaled, ADD) * factor
    for c0 in range(0, C, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + row * C + c, mask=c < C, other=0).to(ACC) * factor
        result = _summed(partial_ptr, first, per_set, P, C, c, ACC, BLOCK) * inverse - along * w
        tl.store(out_ptr + row * C + c, result.to(out_ptr.dtype.element_ty), mask=c < C)


_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


def _units(prototypes: Tensor, eps: float, add: bool) -> tuple[Tensor, int]:
    """The normalised prototypes and the distance between the sets of two samples."""
    sets, count, channels = prototypes.shape
    dtype = accumulate_dtype(prototypes)
    units = prototypes.new_empty(prototypes.shape, dtype=dtype)
    unit_kernel[(sets * count,)](prototypes, units, eps, channels, ADD=add, ACC=_ACC[dtype], BLOCK=BLOCK)
    return units, count * channels if sets > 1 else 0


def _shared(prototypes: int) -> int:
    return min(PROTOTYPES, triton.next_power_of_2(prototypes))


def prototype_cosine_fwd(
    features: Tensor, prototypes: Tensor, scale: float, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op: scores (B, P, H, W), cosines (B, P, H, W), norms (B, H, W)."""
    batch, channels, height, width = features.shape
    count, pixels, add = prototypes.shape[1], height * width, eps_mode == "add"
    dtype = accumulate_dtype(features)
    scores = features.new_empty(batch, count, height, width)
    cosines = features.new_empty((batch, count, height, width), dtype=dtype)
    norms = features.new_empty((batch, height, width), dtype=dtype)
    if scores.numel() == 0:
        return scores, cosines, norms.zero_()
    units, stride_set = _units(prototypes.contiguous(), eps, add)
    shared = _shared(count)
    by_channel = features.stride(1) == 1 and channels > 1
    block_c, block_n = (64, 16) if by_channel else (16, 64)
    grid = (triton.cdiv(pixels, block_n), batch * triton.cdiv(count, shared))
    scores_kernel[grid](
        features, units, scores, cosines, norms, *features.stride(), stride_set, scale, eps,
        count, channels, pixels, width,
        ADD=add, ACC=_ACC[dtype], PROTOTYPES=shared, BLOCK_C=block_c, BLOCK_N=block_n,
    )  # fmt: skip
    return scores, cosines, norms


def prototype_cosine_bwd(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    cosines: Tensor,
    norms: Tensor,
    scale: float,
    eps: float,
    eps_mode: str,
    need_features: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    """The backward op: gradients to features and prototypes, empty where not needed."""
    batch, channels, height, width = features.shape
    sets, count, _ = prototypes.shape
    pixels, add = height * width, eps_mode == "add"
    dtype = accumulate_dtype(features)
    acc = _ACC[dtype]
    grad_features = empty_rows_like(features) if need_features else features.new_empty(0)
    grad_prototypes = prototypes.new_empty(prototypes.shape) if need_prototypes else prototypes.new_empty(0)
    if batch * count == 0:
        return grad_features.zero_(), grad_prototypes.zero_()
    grad, cosines, norms, prototypes = (t.contiguous() for t in (grad, cosines, norms, prototypes))
    if need_features:
        units, stride_set = _units(prototypes, eps, add)
        stride_n = grad_features.stride(3) if width > 1 else grad_features.stride(2)
        by_channel = grad_features.stride(1) == 1 and channels > 1
        block_c, block_n = (128, 16) if by_channel else (8, 128)
        tiles = (triton.cdiv(channels, block_c), triton.cdiv(pixels, block_n), batch)
        grad_features_kernel[tiles](
            grad, features, units, cosines, norms, grad_features, *features.stride(), stride_set,
            grad_features.stride(1), stride_n, scale, eps, count, channels, pixels, width,
            ADD=add, ACC=acc, BLOCK_C=block_c, BLOCK_N=block_n,
        )  # fmt: skip
    if need_prototypes:
        pieces = triton.cdiv(pixels, PIECE)
        partial = features.new_empty((batch, pieces, count, channels), dtype=dtype)
        shared = _shared(count)
        block_c = 16 if shared == 1 else 8
        grid = (triton.cdiv(channels, block_c), batch * triton.cdiv(count, shared), pieces)
        sums_kernel[grid](
            grad, features, norms, partial, *features.stride(), scale, eps, count, channels, pixels, width,
            ADD=add, ACC=acc, PROTOTYPES=shared, PIECE=PIECE, BLOCK_C=block_c, BLOCK_N=128,
        )  # fmt: skip
        grad_prototypes_kernel[(sets * count,)](
            partial, prototypes, grad_prototypes, eps, batch // sets * pieces, count, channels,
            ADD=add, ACC=acc, BLOCK=BLOCK,
        )  # fmt: skip
    return grad_features, grad_prototypes
