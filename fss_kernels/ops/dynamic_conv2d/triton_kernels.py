"""Per-sample depthwise convolution in Triton.

out[b,o,c,n] = sum_t k[b,c,t] x[b,c,n + t] over the taps t of output o (a kernel, or the union of merged kernels), with
zeros outside x. grad_x[n] = sum_o sum_t k_t g_o[n - t]; grad_k_t = sum_n g_o[n] x[n + t].

Decomposition: a program owns a tile of channels x pixels and up to BRANCHES outputs, and its loops over taps are
unrolled: which taps an output has is a mask of 9 x 9 bits, known when a kernel is compiled. The kernels are packed
into taps (B, C, T) first. Kernel gradients are summed over one tile of pixels by one program and over the tiles, in
order, by a second kernel: no atomics, and a split that depends on H*W alone, so a sample has the same bits in every
batch. Memory traffic: x is read once (once a tap from L1) for up to BRANCHES outputs; outputs and grad_x are written
once; the gradients to x and to the kernels each read g once. Accumulation: float32. Limits: float64 is left to other
backends; any strides of x, kernels and gradients; 64-bit offsets.

Legend: B batch, C channels, (H, W) grid, T taps of all outputs, (dy, dx) offset of a tap in [-4, 4].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fss_kernels._layout import empty_rows_like, is_channels_last
from fss_kernels._loading import TRITON_INTERPRETED
from fss_kernels.ops.dynamic_conv2d.reference import tap_positions

BRANCHES = 3  # kernels, or outputs, that one launch takes
MOST_TAPS = 90  # of one launch with several of them: unrolled, more take minutes to compile
# (channels, pixels) of a program; the interpreter pays per program.
TILES = {"planes": (4, 128), "channels_last": (32, 16)}
SUM_TILES = {"planes": (1, 1024), "channels_last": (16, 128)}  # of the kernel gradients
ROWS = 64  # (b, c) of a program that packs taps
if TRITON_INTERPRETED:
    TILES = {"planes": (8, 2048), "channels_last": (8, 1024)}
    SUM_TILES = {"planes": (8, 1024), "channels_last": (8, 512)}


@triton.jit
def _pixels(tile, W, BLOCK: tl.constexpr):
    """Rows and columns of BLOCK pixels from tile * BLOCK on, with one 64-bit division for all of them."""
    first = tile.to(tl.int64) * BLOCK
    local = (first % W).to(tl.int32) + tl.arange(0, BLOCK)
    return first // W + local // W, local % W


@triton.jit
def _steps(count, stride):
    """So many strides, in 64 bits: Triton passes a stride below 2^31 in 32."""
    return tl.cast(stride, tl.int64) * count


@triton.jit
def pack_kernel(
    k0_ptr, k1_ptr, k2_ptr, taps_ptr, stride0_b, stride0_c, stride0_h, stride0_w, stride1_b, stride1_c, stride1_h,
    stride1_w, stride2_b, stride2_c, stride2_h, stride2_w, size, C, T, first0, first1, first2, UNION: tl.constexpr,
    MASK0: tl.constexpr, MASK1: tl.constexpr, MASK2: tl.constexpr, MERGE: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """taps (B, C, T) from up to three kernels, given by their centres; with MERGE their sum over the taps of UNION.
    Program: BLOCK of the size = B*C rows. ADD: to what earlier kernels left."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < size
    b, c = row // C, row % C
    from0 = k0_ptr + b * stride0_b + c * stride0_c
    from1 = k1_ptr + b * stride1_b + c * stride1_c
    from2 = k2_ptr + b * stride2_b + c * stride2_c
    to = taps_ptr + row * T
    t, t0, t1, t2 = 0, 0, 0, 0
    for i in tl.static_range(9):
        for j in tl.static_range(9):
            if (UNION >> (i * 9 + j)) & 1:
                total = tl.zeros([BLOCK], dtype=tl.float32)
                if MERGE and ADD:
                    total = tl.load(to + t, mask=inside, other=0)
                if (MASK0 >> (i * 9 + j)) & 1:
                    value = tl.load(from0 + _steps(i - 4, stride0_h) + _steps(j - 4, stride0_w), mask=inside).to(
                        tl.float32
                    )
                    total += value
                    if not MERGE:
                        tl.store(to + first0 + t0, value, mask=inside)
                        t0 += 1
                if (MASK1 >> (i * 9 + j)) & 1:
                    value = tl.load(from1 + _steps(i - 4, stride1_h) + _steps(j - 4, stride1_w), mask=inside).to(
                        tl.float32
                    )
                    total += value
                    if not MERGE:
                        tl.store(to + first1 + t1, value, mask=inside)
                        t1 += 1
                if (MASK2 >> (i * 9 + j)) & 1:
                    value = tl.load(from2 + _steps(i - 4, stride2_h) + _steps(j - 4, stride2_w), mask=inside).to(
                        tl.float32
                    )
                    total += value
                    if not MERGE:
                        tl.store(to + first2 + t2, value, mask=inside)
                        t2 += 1
                if MERGE:
                    tl.store(to + t, total, mask=inside)
                    t += 1


@triton.jit
def _sum(pointers, step, pieces, inside):
    """The pieces, added in order."""
    total = tl.load(pointers, mask=inside, other=0)
    for piece in range(1, pieces):
        total += tl.load(pointers + piece * step, mask=inside, other=0)
    return total


@triton.jit
def unpack_kernel(
    partial_ptr, k0_ptr, k1_ptr, k2_ptr, size, T, pieces, first0, first1, first2, size0, size1, size2,
    UNION: tl.constexpr, MASK0: tl.constexpr, MASK1: tl.constexpr, MASK2: tl.constexpr, MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients (B, C, kh, kw) of up to three kernels from partial (pieces, B, C, T). Program: BLOCK of B*C rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < size
    step = tl.cast(size, tl.int64) * T
    source = partial_ptr + row * T
    t, t0, t1, t2 = 0, 0, 0, 0
    for i in tl.static_range(9):
        for j in tl.static_range(9):
            if (UNION >> (i * 9 + j)) & 1:
                if (MASK0 >> (i * 9 + j)) & 1:
                    total = _sum(source + (t if MERGE else first0 + t0), step, pieces, inside)
                    tl.store(k0_ptr + row * size0 + t0, total.to(k0_ptr.dtype.element_ty), mask=inside)
                    t0 += 1
                if (MASK1 >> (i * 9 + j)) & 1:
                    total = _sum(source + (t if MERGE else first1 + t1), step, pieces, inside)
                    tl.store(k1_ptr + row * size1 + t1, total.to(k1_ptr.dtype.element_ty), mask=inside)
                    t1 += 1
                if (MASK2 >> (i * 9 + j)) & 1:
                    total = _sum(source + (t if MERGE else first2 + t2), step, pieces, inside)
                    tl.store(k2_ptr + row * size2 + t2, total.to(k2_ptr.dtype.element_ty), mask=inside)
                    t2 += 1
                t += 1


@triton.jit
def conv_kernel(
    x_ptr, taps_ptr, out_ptr, stride_b, stride_c, stride_h, stride_w, stride_out_b, stride_out_c, stride_out_n, C, H, W,
    T, first0, first1, first2, MASK0: tl.constexpr, MASK1: tl.constexpr, MASK2: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Up to three outputs next to each other. Program: one tile of channels x pixels, every tap of x read once."""
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    y, z = _pixels(tl.program_id(0), W, BLOCK_N)
    at = x_ptr + b * stride_b + c[:, None] * stride_c + (y * stride_h + _steps(z, stride_w))[None, :]
    k = taps_ptr + (b * C + c) * T
    total0 = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    total1 = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    total2 = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    t0, t1, t2 = 0, 0, 0
    for i in tl.static_range(9):
        for j in tl.static_range(9):
            if ((MASK0 | MASK1 | MASK2) >> (i * 9 + j)) & 1:
                here = (y + (i - 4) >= 0) & (y + (i - 4) < H) & (z + (j - 4) >= 0) & (z + (j - 4) < W)
                value = tl.load(
                    at + _steps(i - 4, stride_h) + _steps(j - 4, stride_w),
                    mask=(c < C)[:, None] & here[None, :],
                    other=0,
                ).to(tl.float32)
                if (MASK0 >> (i * 9 + j)) & 1:
                    total0 += tl.load(k + first0 + t0, mask=c < C, other=0)[:, None] * value
                    t0 += 1
                if (MASK1 >> (i * 9 + j)) & 1:
                    total1 += tl.load(k + first1 + t1, mask=c < C, other=0)[:, None] * value
                    t1 += 1
                if (MASK2 >> (i * 9 + j)) & 1:
                    total2 += tl.load(k + first2 + t2, mask=c < C, other=0)[:, None] * value
                    t2 += 1
    n = y * W + z
    to = out_ptr + b * stride_out_b + c[:, None] * stride_out_c + n[None, :] * stride_out_n
    whole = (c < C)[:, None] & (y < H)[None, :]
    tl.store(to, total0.to(out_ptr.dtype.element_ty), mask=whole)
    if MASK1 != 0:
        tl.store(to + _steps(C, stride_out_c), total1.to(out_ptr.dtype.element_ty), mask=whole)
    if MASK2 != 0:
        tl.store(to + 2 * _steps(C, stride_out_c), total2.to(out_ptr.dtype.element_ty), mask=whole)


@triton.jit
def _gather_gradient(
    total, at, k, c, y, z, stride_h, stride_w, C, H, W, MASK: tl.constexpr
):  # fmt: skip
    """total + sum_t k_t g[n - t] of one output."""
    t = 0
    for i in tl.static_range(9):
        for j in tl.static_range(9):
            if (MASK >> (i * 9 + j)) & 1:
                here = (y - (i - 4) >= 0) & (y - (i - 4) < H) & (z - (j - 4) >= 0) & (z - (j - 4) < W)
                g = tl.load(
                    at - _steps(i - 4, stride_h) - _steps(j - 4, stride_w),
                    mask=(c < C)[:, None] & here[None, :],
                    other=0,
                ).to(tl.float32)
                total += tl.load(k + t, mask=c < C, other=0)[:, None] * g
                t += 1
    return total


@triton.jit
def grad_x_kernel(
    grad_ptr, taps_ptr, previous_ptr, out_ptr, stride_b, stride_c, stride_h, stride_w, stride_out_b, stride_out_c,
    stride_out_n, C, H, W, T, first0, first1, first2, output0, output1, output2, MASK0: tl.constexpr,
    MASK1: tl.constexpr, MASK2: tl.constexpr, ADD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_x from up to three outputs. Program: one tile, written once. ADD: to what earlier outputs left."""
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    y, z = _pixels(tl.program_id(0), W, BLOCK_N)
    at = grad_ptr + b * stride_b + c[:, None] * stride_c + (y * stride_h + _steps(z, stride_w))[None, :]
    k = taps_ptr + (b * C + c) * T
    step = _steps(C, stride_c)
    n = y * W + z
    to = b * stride_out_b + c[:, None] * stride_out_c + n[None, :] * stride_out_n
    whole = (c < C)[:, None] & (y < H)[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    if ADD:
        total = tl.load(previous_ptr + to, mask=whole, other=0)
    total = _gather_gradient(total, at + output0 * step, k + first0, c, y, z, stride_h, stride_w, C, H, W, MASK0)
    if MASK1 != 0:
        total = _gather_gradient(total, at + output1 * step, k + first1, c, y, z, stride_h, stride_w, C, H, W, MASK1)
    if MASK2 != 0:
        total = _gather_gradient(total, at + output2 * step, k + first2, c, y, z, stride_h, stride_w, C, H, W, MASK2)
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), mask=whole)


@triton.jit
def grad_taps_kernel(
    grad_ptr, x_ptr, partial_ptr, stride_b, stride_c, stride_h, stride_w, stride_x_b, stride_x_c, stride_x_h,
    stride_x_w, C, H, W, T, first0, first1, first2, output0, output1, output2, MASK0: tl.constexpr,
    MASK1: tl.constexpr, MASK2: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial (pieces, B, C, T): sums of g[n] x[n + t] over one tile of pixels. Program: up to three outputs of it."""
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    y, z = _pixels(tl.program_id(0), W, BLOCK_N)
    whole = (c < C)[:, None] & (y < H)[None, :]
    g = grad_ptr + b * stride_b + c[:, None] * stride_c + (y * stride_h + _steps(z, stride_w))[None, :]
    step = _steps(C, stride_c)
    g0 = tl.load(g + output0 * step, mask=whole, other=0).to(tl.float32)
    g1 = g0
    g2 = g0
    if MASK1 != 0:
        g1 = tl.load(g + output1 * step, mask=whole, other=0).to(tl.float32)
    if MASK2 != 0:
        g2 = tl.load(g + output2 * step, mask=whole, other=0).to(tl.float32)
    at = x_ptr + b * stride_x_b + c[:, None] * stride_x_c + (y * stride_x_h + _steps(z, stride_x_w))[None, :]
    images = tl.num_programs(2).to(tl.int64) * tl.program_id(0) + b
    to = partial_ptr + (images * C + c) * T
    t0, t1, t2 = 0, 0, 0
    for i in tl.static_range(9):
        for j in tl.static_range(9):
            if ((MASK0 | MASK1 | MASK2) >> (i * 9 + j)) & 1:
                here = (y + (i - 4) >= 0) & (y + (i - 4) < H) & (z + (j - 4) >= 0) & (z + (j - 4) < W) & (y < H)
                value = tl.load(
                    at + _steps(i - 4, stride_x_h) + _steps(j - 4, stride_x_w),
                    mask=(c < C)[:, None] & here[None, :],
                    other=0,
                ).to(tl.float32)
                if (MASK0 >> (i * 9 + j)) & 1:
                    tl.store(to + first0 + t0, tl.sum(g0 * value, axis=1), mask=c < C)
                    t0 += 1
                if (MASK1 >> (i * 9 + j)) & 1:
                    tl.store(to + first1 + t1, tl.sum(g1 * value, axis=1), mask=c < C)
                    t1 += 1
                if (MASK2 >> (i * 9 + j)) & 1:
                    tl.store(to + first2 + t2, tl.sum(g2 * value, axis=1), mask=c < C)
                    t2 += 1


def mask_of(positions: Sequence[tuple[int, int]]) -> int:
    """Bit (dy + 4) * 9 + dx + 4 of every tap."""
    return sum(1 << ((row + 4) * 9 + column + 4) for row, column in positions)


class _Plan:
    """The taps of one call, and the groups of BRANCHES outputs or kernels that share a launch."""

    def __init__(self, kernels: Sequence[Tensor], merge: bool) -> None:
        sizes = [(k.shape[2], k.shape[3]) for k in kernels]
        self.merge = merge
        positions = tap_positions(sizes, merge)
        self.outputs = [mask_of(p) for p in positions]
        self.kernels = [mask_of(p) for p in tap_positions(sizes, False)]
        self.first = [sum(len(p) for p in positions[:o]) for o in range(len(positions))]
        self.taps = sum(len(p) for p in positions)

    def groups(self, wanted: Sequence[int]) -> Iterator[tuple[list[int], list[int], dict[str, int]]]:
        """(first taps, outputs, masks) of the wanted outputs."""
        for chosen, masks in _launches(wanted, self.outputs):
            yield [self.first[o] for o in chosen], chosen, _named(masks)

    def branches(self, wanted: Sequence[int]) -> Iterator[tuple[list[int], list[int], dict[str, int]]]:
        """(first taps, kernels, options of `pack_kernel`) of the wanted kernels."""
        for chosen, masks in _launches(wanted, self.kernels):
            union = self.outputs[0] if self.merge else masks[0] | masks[1] | masks[2]
            first = [0 if self.merge else self.first[k] for k in chosen]
            yield first, chosen, {**_named(masks), "UNION": union, "MERGE": self.merge}


def _launches(wanted: Sequence[int], masks: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """(numbers, masks) of BRANCHES at a time, in order; where there are fewer, number 0 with a mask of no taps."""
    rest = list(wanted)
    while rest:
        count = 1
        while count < min(BRANCHES, len(rest)) and sum(masks[i].bit_count() for i in rest[: count + 1]) <= MOST_TAPS:
            count += 1
        chosen, rest = rest[:count], rest[count:]
        padding = [0] * (BRANCHES - count)
        yield chosen + padding, [masks[i] for i in chosen] + padding


def _named(masks: Sequence[int]) -> dict[str, int]:
    return {f"MASK{i}": mask for i, mask in enumerate(masks)}


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, channels and pixels of a dense tensor."""
    return x.stride(0), x.stride(1), x.stride(3) if x.shape[3] > 1 else x.stride(2)


def _tiles(table: dict[str, tuple[int, int]], x: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid of programs over a tensor like x, and the tile of one."""
    batch, channels, height, width = x.shape
    block_c, block_n = table["channels_last" if is_channels_last(x) else "planes"]
    grid = (triton.cdiv(height * width, block_n), triton.cdiv(channels, block_c), batch)
    return grid, {"BLOCK_C": block_c, "BLOCK_N": block_n}


def dynamic_conv2d_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """The forward op: outputs (B, L*C, H, W) in the memory format of x, and the kernels as taps (B, C, T)."""
    x, kernels = call.x, call.kernels
    batch, channels, height, width = x.shape
    plan = _Plan(kernels, call.merge)
    out = empty_rows_like(x, len(plan.outputs) * channels)
    taps = x.new_empty((batch, channels, plan.taps), dtype=torch.float32)
    if batch == 0:
        return out, taps
    rows = batch * channels
    for i, (first, chosen, options) in enumerate(plan.branches(range(len(kernels)))):
        centres = [kernels[k][:, :, kernels[k].shape[2] // 2 :, kernels[k].shape[3] // 2 :] for k in chosen]
        strides = [s for k in centres for s in k.stride()]
        pack_kernel[(triton.cdiv(rows, ROWS),)](
            *centres, taps, *strides, rows, channels, plan.taps, *first, **options, ADD=i > 0, BLOCK=ROWS
        )
    grid, tile = _tiles(TILES, x)
    for first, chosen, masks in plan.groups(range(len(plan.outputs))):
        part = out[:, chosen[0] * channels :]
        conv_kernel[grid](
            x, taps, part, *x.stride(), *_strides(out), channels, height, width, plan.taps, *first, **masks, **tile
        )
    return out, taps


def dynamic_conv2d_bwd(call: Any) -> tuple[Tensor, list[Tensor]]:
    """The backward op: gradients to x and every kernel, empty where not needed."""
    grad, x, kernels, taps, merge = call.grad_out, call.x, call.kernels, call.taps, call.merge
    batch, channels, height, width = x.shape
    plan = _Plan(kernels, merge)
    rows, sizes = batch * channels, (channels, height, width, plan.taps)
    grad_x = empty_rows_like(x) if call.need_x else x.new_empty(0)
    grad_kernels = [k.new_empty(k.shape if need else 0) for k, need in zip(kernels, call.need_kernels, strict=True)]
    wanted = [i for i, need in enumerate(call.need_kernels) if need]
    if batch == 0:
        return grad_x, grad_kernels
    if call.need_x:
        taps = taps.contiguous()
        groups = list(plan.groups(range(len(plan.outputs))))
        partial = torch.empty_like(grad_x, dtype=torch.float32) if len(groups) > 1 else grad_x
        grid, tile = _tiles(TILES, grad_x)
        for i, (first, chosen, masks) in enumerate(groups):
            target = grad_x if i == len(groups) - 1 else partial
            grad_x_kernel[grid](
                grad, taps, partial, target, *grad.stride(), *_strides(grad_x), *sizes, *first, *chosen, **masks,
                ADD=i > 0, **tile,
            )  # fmt: skip
    if wanted:
        grid, tile = _tiles(SUM_TILES, x)
        pieces = grid[0]
        partial = x.new_empty((pieces, batch, channels, plan.taps), dtype=torch.float32)
        for first, chosen, masks in plan.groups([0] if merge else wanted):
            grad_taps_kernel[grid](
                grad, x, partial, *grad.stride(), *x.stride(), *sizes, *first, *chosen, **masks, **tile
            )
        for first, chosen, options in plan.branches(wanted):
            targets, numels = [grad_kernels[k] for k in chosen], [k.shape[2] * k.shape[3] for k in kernels]
            unpack_kernel[(triton.cdiv(rows, ROWS),)](
                partial, *targets, rows, plan.taps, pieces, *first, *(numels[k] for k in chosen), **options, BLOCK=ROWS
            )
    return grad_x, grad_kernels
