"""Masked average pooling in Triton.

pooled[b,m,c] = sum_n w[b,m,n] x[b,c,n] / (area[b,m] + eps), with w the mask resized to the grid (N = H*W pixels).

Decomposition: a program owns a tile of the output and loops over what is summed, so there are no atomics; pixels are
split into pieces of PIECE whose partial sums a second kernel adds in order. The split depends on N alone: a sample has
the same bits in every batch. Memory traffic: x once for every MASKS masks, its gradient once; w comes from L2.
Accumulation: float32. Limits: float64 is left to other backends; 64-bit offsets; any strides of features and mask.

Legend: B batch, M masks, C channels, N pixels, (SH, SW) source grid, (TH, TW) target grid of a resize.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fss_kernels._library import TRITON_INTERPRETED, accumulate_dtype, empty_rows_like
from fss_kernels._triton import resized, tap_at

MASKS = 4  # masks that share one read of the features
PIECE = 1024  # pixels of one partial sum
BLOCK = 4096 if TRITON_INTERPRETED else 256  # elements of a program that has no tile: the interpreter pays per program


@triton.jit
def resize_kernel(
    source_ptr, target_ptr, stride_b, stride_m, stride_h, stride_w, M, SH, SW, TH, TW,
    NEAREST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """target (B, M, TH, TW) = R_h source R_w^T. Program: one image, BLOCK target pixels."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < TH * TW
    source = source_ptr + image // M * stride_b + image % M * stride_m
    value = resized(source, n, inside, stride_h, stride_w, SH, SW, TH, TW, NEAREST, ALIGN, ACC)
    tl.store(target_ptr + image * TH * TW + n, value.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def transposed_axis_kernel(
    source_ptr, target_ptr, stride_b, stride_m, stride_s, stride_i, M, S, T, INNER, size, taps,
    NEAREST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R(T -> S)^T along one axis: target (outer, T, INNER) gathers the `taps` source positions that may interpolate
    from each of its own, in order. size = outer * T * INNER; outer index o is image (o // M, o % M)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    outer, t, inner = i // (T * INNER), i // INNER % T, i % INNER
    if NEAREST:
        first = t * S // T
    elif ALIGN:
        first = tl.maximum(t - 1, 0) * (S - 1) // tl.maximum(T - 1, 1)
    else:
        first = tl.maximum((2 * t - 1) * S - T, 0) // (2 * T)
    base = source_ptr + outer // M * stride_b + outer % M * stride_m + inner * stride_i
    total = tl.zeros([BLOCK], dtype=ACC)
    for tap in range(taps):
        s = first + tap
        low, high_weight = tap_at(s, T, S, NEAREST, ALIGN, ACC)
        weight = tl.where(low == t, 1 - high_weight, tl.where(low + 1 == t, high_weight, 0.0)).to(ACC)
        value = tl.load(base + s * stride_s, mask=inside & (s < S) & (weight != 0), other=0).to(ACC)
        total += weight * value
    tl.store(target_ptr + i, total.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def area_kernel(weights_ptr, area_ptr, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """area (B*M) = sum_n w. Program: one image."""
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=ACC)
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        total += tl.load(weights_ptr + image * N + n, mask=n < N, other=0)
    tl.store(area_ptr + image, tl.sum(total, axis=0))


@triton.jit
def pool_kernel(
    x_ptr, weights_ptr, partial_ptr, stride_b, stride_c, stride_h, stride_w, M, C, N, W,
    ACC: tl.constexpr, MASKS: tl.constexpr, PIECE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial (pieces, B, M, C): sums over one piece of pixels. Program: BLOCK_C channels x MASKS masks of a sample."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    groups = tl.cdiv(M, MASKS)
    b = tl.program_id(1).to(tl.int64) // groups
    m = tl.program_id(1).to(tl.int64) % groups * MASKS + tl.arange(0, MASKS)
    piece = tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(1).to(tl.int64) // groups
    total = tl.zeros([MASKS, BLOCK_C, BLOCK_N], dtype=ACC)
    for n0 in range(0, PIECE, BLOCK_N):
        n = piece * PIECE + n0 + tl.arange(0, BLOCK_N)
        offsets = b * stride_b + c[:, None] * stride_c + (n // W * stride_h + n % W * stride_w)[None, :]
        x = tl.load(x_ptr + offsets, mask=(c < C)[:, None] & (n < N)[None, :], other=0).to(ACC)
        w = tl.load(
            weights_ptr + (b * M + m)[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0
        )
        # a NaN or infinite x where the mask is 0 does not count
        total += tl.where(w[:, None, :] != 0, x[None, :, :] * w[:, None, :], 0.0)
    out = partial_ptr + ((piece * batch + b) * M + m)[:, None] * C + c[None, :]
    tl.store(out, tl.sum(total, axis=2), mask=(m < M)[:, None] & (c < C)[None, :])


@triton.jit
def finish_pool_kernel(partial_ptr, area_ptr, pooled_ptr, eps, size, C, pieces, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """pooled = (sum of the pieces, in order) / (area + eps); 0 where that is 0. size = B*M*C."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros([BLOCK], dtype=ACC)
    for piece in range(pieces):
        total += tl.load(partial_ptr + piece * tl.cast(size, tl.int64) + i, mask=inside, other=0)
    d = tl.load(area_ptr + i // C, mask=inside, other=1) + tl.cast(eps, ACC)
    pooled = tl.where(d == 0, 0.0, total / tl.where(d == 0, 1.0, d))
    tl.store(pooled_ptr + i, pooled.to(pooled_ptr.dtype.element_ty), mask=inside)


@triton.jit
def grad_features_kernel(
    grad_ptr, weights_ptr, area_ptr, out_ptr, stride_c, stride_n, eps, M, C, N,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_x[b,c,n] = sum_m grad[b,m,c] / (area[b,m] + eps) w[b,m,n]. Program: one tile, written once."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BLOCK_C, BLOCK_N], dtype=ACC)
    for m in range(M):
        d = tl.load(area_ptr + b * M + m) + tl.cast(eps, ACC)
        g = tl.load(grad_ptr + (b * M + m) * C + c, mask=c < C, other=0).to(ACC)
        k = tl.where(d == 0, 0.0, g / tl.where(d == 0, 1.0, d))
        w = tl.load(weights_ptr + (b * M + m) * N + n, mask=n < N, other=0)
        total += k[:, None] * w[None, :]
    out = out_ptr + b * C * N + c[:, None] * stride_c + n[None, :] * stride_n
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(c < C)[:, None] & (n < N)[None, :])


@triton.jit
def moments_kernel(
    grad_ptr, x_ptr, weights_ptr, moments_ptr, stride_b, stride_c, stride_h, stride_w, M, C, N, W,
    ACC: tl.constexpr, MASKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """moments[b,m,n] = sum_c grad[b,m,c] x[b,c,n]. Program: BLOCK_N pixels x MASKS masks of a sample, all channels."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = tl.cdiv(M, MASKS)
    b = tl.program_id(1).to(tl.int64) // groups
    m = tl.program_id(1).to(tl.int64) % groups * MASKS + tl.arange(0, MASKS)
    here = (m < M)[:, None] & (n < N)[None, :]
    w = tl.load(weights_ptr + (b * M + m)[:, None] * N + n[None, :], mask=here, other=0)
    total = tl.zeros([MASKS, BLOCK_N], dtype=ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        offsets = b * stride_b + c[:, None] * stride_c + (n // W * stride_h + n % W * stride_w)[None, :]
        x = tl.load(x_ptr + offsets, mask=(c < C)[:, None] & (n < N)[None, :], other=0).to(ACC)
        g = tl.load(grad_ptr + (b * M + m)[:, None] * C + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0)
        finite = (x - x) == 0
        counted = (w != 0)[:, None, :] | finite[None, :, :]
        total += tl.sum(tl.where(counted, g.to(ACC)[:, :, None] * x[None, :, :], 0.0), axis=1)
    tl.store(moments_ptr + (b * M + m)[:, None] * N + n[None, :], total, mask=here)


@triton.jit
def grad_weights_kernel(moments_ptr, weights_ptr, area_ptr, eps, N, BLOCK: tl.constexpr):
    """moments -> (t - sum(w t) / d) / d in place, in float64: with few pixels the two terms nearly cancel."""
    image = tl.program_id(0).to(tl.int64)
    d = tl.load(area_ptr + image).to(tl.float64) + tl.cast(eps, tl.float64)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        w = tl.load(weights_ptr + image * N + n, mask=n < N, other=0).to(tl.float64)
        total += w * tl.load(moments_ptr + image * N + n, mask=n < N, other=0).to(tl.float64)
    safe = tl.where(d == 0, 1.0, d)
    mean = tl.sum(total, axis=0) / safe
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        t = tl.load(moments_ptr + image * N + n, mask=n < N, other=0).to(tl.float64)
        result = tl.where(d == 0, 0.0, (t - mean) / safe)
        tl.store(moments_ptr + image * N + n, result.to(moments_ptr.dtype.element_ty), mask=n < N)


_TORCH = {tl.float32: torch.float32, tl.float64: torch.float64}
_ACC = {torch_dtype: dtype for dtype, torch_dtype in _TORCH.items()}


def _taps(source: int, target: int, nearest: bool, align_corners: bool) -> int:
    """At most how many rows s of R(target -> source), from `first` on, reach one target position."""
    if nearest:
        most = source // target + 2
    elif align_corners:
        most = 2 * (source - 1) // (target - 1) + 3 if target > 1 else source
    else:
        most = 2 * source // target + 3
    return min(most, source)


def _resize(source: Tensor, target: Tensor, nearest: bool, align_corners: bool, transposed: bool) -> None:
    """target (B, M, ., .) from source (B, M, ., .) by R(source -> target), or by R(target -> source)^T."""
    batch, masks, height, width = target.shape
    source_height, source_width = source.shape[2:]
    source = source.view(torch.uint8) if source.dtype == torch.bool else source
    acc = tl.float64 if torch.float64 in (source.dtype, target.dtype) else tl.float32
    options = {"NEAREST": nearest, "ALIGN": align_corners, "ACC": acc, "BLOCK": BLOCK}
    if not transposed:
        images = (batch * masks, triton.cdiv(height * width, BLOCK))
        sizes = (masks, source_height, source_width, height, width)
        resize_kernel[images](source, target, *source.stride(), *sizes, **options)
        return
    # rows first: of the two orders the one with the smaller intermediate when the target is the smaller grid
    rows = target.new_empty((batch, masks, height, source_width), dtype=_TORCH[acc])
    b, m, h, w = source.stride()
    size, taps = rows.numel(), _taps(source_height, height, nearest, align_corners)
    arguments = (b, m, h, w, masks, source_height, height, source_width, size, taps)
    transposed_axis_kernel[(triton.cdiv(size, BLOCK),)](source, rows, *arguments, **options)
    size, taps = target.numel(), _taps(source_width, width, nearest, align_corners)
    arguments = (source_width, 0, 1, 0, 1, source_width, width, 1, size, taps)
    transposed_axis_kernel[(triton.cdiv(size, BLOCK),)](rows, target, *arguments, **options)


def masked_avg_pool_fwd(
    features: Tensor, mask: Tensor, eps: float, resize: str, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op: pooled (B, M, C), resized mask (B, M, H, W), its area (B, M)."""
    batch, channels, height, width = features.shape
    masks, pixels = mask.shape[1], height * width
    dtype = accumulate_dtype(features)
    acc = _ACC[dtype]
    pooled = features.new_empty(batch, masks, channels)
    resized = features.new_empty((batch, masks, height, width), dtype=dtype)
    area = features.new_empty((batch, masks), dtype=dtype)
    if pooled.numel() == 0:
        return pooled, resized, area
    _resize(mask, resized, resize == "nearest", align_corners, resize == "adjoint")
    area_kernel[(batch * masks,)](resized, area, pixels, ACC=acc, BLOCK=1024)
    pieces = triton.cdiv(pixels, PIECE)
    partial = features.new_empty((pieces, batch, masks, channels), dtype=dtype)
    shared = min(MASKS, triton.next_power_of_2(masks))
    block_c = 16 if shared == 1 else 8
    grid = (triton.cdiv(channels, block_c), batch * triton.cdiv(masks, shared), pieces)
    pool_kernel[grid](
        features, resized, partial, *features.stride(), masks, channels, pixels, width,
        ACC=acc, MASKS=shared, PIECE=PIECE, BLOCK_C=block_c, BLOCK_N=128,
    )  # fmt: skip
    size = pooled.numel()
    finish_pool_kernel[(triton.cdiv(size, 256),)](
        partial, area, pooled, eps, size, channels, pieces, ACC=acc, BLOCK=256
    )
    return pooled, resized, area


def masked_avg_pool_bwd(
    grad: Tensor,
    features: Tensor,
    mask: Tensor,
    resized: Tensor,
    area: Tensor,
    eps: float,
    resize: str,
    align_corners: bool,
    need_features: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor]:
    """The backward op: gradients to features and mask, empty where not needed."""
    batch, channels, height, width = features.shape
    masks, pixels = mask.shape[1], height * width
    acc = _ACC[accumulate_dtype(features)]
    grad, resized, area = grad.contiguous(), resized.contiguous(), area.contiguous()
    grad_features = empty_rows_like(features) if need_features else features.new_empty(0)
    grad_mask = mask.new_empty(mask.shape) if need_mask else mask.new_empty(0)
    if batch * masks == 0:
        return grad_features.zero_(), grad_mask
    if need_features:
        stride_n = grad_features.stride(3) if width > 1 else grad_features.stride(2)
        by_channel = grad_features.stride(1) == 1 and channels > 1
        block_c, block_n = (128, 16) if by_channel else (8, 256)
        tiles = (triton.cdiv(channels, block_c), triton.cdiv(pixels, block_n), batch)
        grad_features_kernel[tiles](
            grad, resized, area, grad_features, grad_features.stride(1), stride_n, eps, masks, channels, pixels,
            ACC=acc, BLOCK_C=block_c, BLOCK_N=block_n,
        )  # fmt: skip
    if need_mask:
        moments = torch.empty_like(resized)
        shared = min(MASKS, triton.next_power_of_2(masks))
        grid = (triton.cdiv(pixels, 64), batch * triton.cdiv(masks, shared))
        moments_kernel[grid](
            grad, features, resized, moments, *features.stride(), masks, channels, pixels, width,
            ACC=acc, MASKS=shared, BLOCK_C=16, BLOCK_N=64,
        )  # fmt: skip
        grad_weights_kernel[(batch * masks,)](moments, resized, area, eps, pixels, BLOCK=1024)
        _resize(moments, grad_mask, resize == "nearest", align_corners, resize != "adjoint")
    return grad_features, grad_mask
