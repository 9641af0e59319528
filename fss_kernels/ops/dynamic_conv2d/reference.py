"""The contract of dynamic_conv2d in plain PyTorch: sums of shifted planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels._layout import accumulate_dtype


def _branch(x: Tensor, kernel: Tensor) -> Tensor:
    """x (B, C, H, W), kernel (B, C, kh, kw): cross-correlation with zeros outside x."""
    height, width = x.shape[2:]
    kh, kw = kernel.shape[2:]
    padded = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2))
    out = torch.zeros_like(x)
    for i in range(kh):
        for j in range(kw):
            out = out + kernel[:, :, i, j, None, None] * padded[:, :, i : i + height, j : j + width]
    return out


def dynamic_conv2d_reference(x: Tensor, kernels: Sequence[Tensor], merge: bool) -> Tensor:
    """(B, C, H, W) and (B, C, kh, kw) each -> (B, L*C, H, W), or their sum (B, C, H, W)."""
    dtype = accumulate_dtype(x)
    branches = [_branch(x.to(dtype), k.to(dtype)) for k in kernels]
    return (sum(branches[1:], branches[0]) if merge else torch.cat(branches, 1)).to(x.dtype)


def tap_positions(sizes: Sequence[tuple[int, int]], merge: bool) -> list[list[tuple[int, int]]]:
    """For every output the offsets (row, column) of x that it reads, row after row.

    Without ``merge`` an output is a kernel. Merged, there is one, and it reads what any of the kernels covers.
    """
    covered = [{(i - h // 2, j - w // 2) for i in range(h) for j in range(w)} for h, w in sizes]
    return [sorted(set().union(*covered))] if merge else [sorted(c) for c in covered]


def gather_taps(kernels: Sequence[Tensor], merge: bool) -> Tensor:
    """The kernels as (B, C, T), one value a tap of `tap_positions`, added where merged kernels overlap."""
    flat = [k.to(accumulate_dtype(k)).flatten(2) for k in kernels]
    if not merge:
        return torch.cat(flat, 2)
    sizes = [(k.shape[2], k.shape[3]) for k in kernels]
    (positions,) = tap_positions(sizes, True)
    taps = flat[0].new_zeros(*flat[0].shape[:2], len(positions))
    for (height, width), kernel in zip(sizes, flat, strict=True):
        (own,) = tap_positions([(height, width)], True)
        taps[:, :, [positions.index(p) for p in own]] += kernel
    return taps


def scatter_taps(taps: Tensor, kernels: Sequence[Tensor], merge: bool) -> list[Tensor]:
    """The transpose of `gather_taps`: gradients of the kernels from those of the taps."""
    sizes = [(k.shape[2], k.shape[3]) for k in kernels]
    if not merge:
        parts = taps.split([h * w for h, w in sizes], 2)
    else:
        (positions,) = tap_positions(sizes, True)
        parts = tuple(taps[:, :, [positions.index(p) for p in tap_positions([s], True)[0]]] for s in sizes)
    return [p.reshape(k.shape).to(k.dtype) for p, k in zip(parts, kernels, strict=True)]


def dynamic_conv2d_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """The forward op: outputs, and the kernels as taps (B, C, T) in the accumulation dtype."""
    kernels, merge = call.kernels, call.merge
    return dynamic_conv2d_reference(call.x, kernels, merge), gather_taps(kernels, merge)


def dynamic_conv2d_bwd(call: Any) -> tuple[Tensor, list[Tensor]]:
    """The backward op: grad_x[n] = sum_t k_t g[n - t] over all outputs, grad_k_t = sum_n g[n] x[n + t]."""
    x, kernels, taps, merge = call.x, call.kernels, call.taps, call.merge
    height, width = x.shape[2:]
    outputs = tap_positions([(k.shape[2], k.shape[3]) for k in kernels], merge)
    reach = 4
    halo = (reach,) * 4
    grads = F.pad(call.grad_out.to(taps.dtype), halo).chunk(len(outputs), 1)
    values = F.pad(x.to(taps.dtype), halo) if any(call.need_kernels) else x
    grad_x, grad_taps, t = torch.zeros_like(x, dtype=taps.dtype), torch.zeros_like(taps), 0

    def shifted(padded: Tensor, row: int, column: int) -> Tensor:
        top, left = reach + row, reach + column
        return padded[:, :, top : top + height, left : left + width]

    for positions, g in zip(outputs, grads, strict=True):
        for row, column in positions:
            if call.need_x:
                grad_x += taps[:, :, t, None, None] * shifted(g, -row, -column)
            if any(call.need_kernels):
                grad_taps[:, :, t] = (shifted(g, 0, 0) * shifted(values, row, column)).sum((2, 3))
            t += 1
    grad_kernels = scatter_taps(grad_taps, kernels, merge)
    return (
        grad_x.to(x.dtype) if call.need_x else x.new_empty(0),
        [g if need else g.new_empty(0) for g, need in zip(grad_kernels, call.need_kernels, strict=True)],
    )
