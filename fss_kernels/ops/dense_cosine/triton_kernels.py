"""Dense cosine in Triton: dense_cosine_max and dense_cosine_match.

c[i,j] = v_i u_j sum_k s[k,i] q[k,j], u = 1 / N(|q_j|), v = 1 / N(|s_i|), 0 for a zero vector and a dropped support
pixel. score_j = max_i (1/d) sum_o c[i+o, j+o] for a window of d offsets o; a match is max_i c[i,j] and max_j c[i,j].
Gradients: D_j = sum over the winning pairs of g/d times the other side's normalised vector, then
u D - u slope (q_j . D) q_j (README.md).

Decomposition, forward: `norm_kernel` resizes the mask and sums squares, `compact_kernel` lists the kept support pixels
in order of the index, `candidates_kernel` finds what the edge rules need. Without windows a program of `best_kernel`
owns BLOCK_N query pixels and CHUNK listed support pixels: a matrix product of listed rows over channel blocks, whose
tiles are reduced to the running maximum and its lowest index (for a match along the other side as well). With windows
`ring_kernel` writes the cosines of the next band of support rows to a ring, and `window_kernel` adds up shifted
elements, a program one row of candidates and BLOCK_N query pixels. `finish_kernel` reduces the partial maxima in order
and applies the edge rules. Grids are for all pixels kept; only the device knows where the list ends, and a program past
it does nothing.
Backward: every program owns pixels of a gradient. `grad_query_kernel` gathers at the saved indices; for the support,
and both sides of a match, `pairs_kernel` writes down the winning pairs, they are sorted by the pixel they add to
(`torch.sort`, stable), and `grad_listed_kernel` walks the lists. Each of the two runs twice, to sum q . D and to write
the gradient: D is stored nowhere. No atomics; every sum and maximum has one order, whatever the batch.

Memory traffic: the query's tile once a support tile and the support once a query tile, from L2; with windows each
cosine is written once and read d times. Accumulation: float32; float32 operands are multiplied in full float32
("ieee"), in TF32 where torch.backends.cuda.matmul.fp32_precision says so, half ones as they are on the tensor cores.
Limits: float64 is left to other backends; 64-bit offsets; features whose pixels are not evenly spaced are copied.

Legend: B batch, S shots, N = B*S pairs of query and support, C channels, NQ = HQ*WQ and NS = HS*WS pixels, L windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fss_kernels._library import TRITON_INTERPRETED, empty_rows_like, is_channels_last
from fss_kernels._triton import inverse_norm, magnification, norm_slope, resized

TILES = {  # of a product; more spills
    "ieee": {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4},
    "tf32": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8},
    "half": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8},
}
CHUNK = 512  # listed support pixels of one partial maximum
RING = 32 << 20  # bytes of cosines that windows keep, unless fewer rows than a window's are left
BLOCK = 1024  # pixels of a step along a list
FINISH = 256  # pixels of a program that finishes scores
NORM_TILES = {False: {"BLOCK_C": 16, "BLOCK_N": 64}, True: {"BLOCK_C": 64, "BLOCK_N": 16}}  # by channels_last
GATHER_TILES = {
    False: {"BLOCK_C": 16, "BLOCK_N": 64, "num_warps": 8},
    True: {"BLOCK_C": 32, "BLOCK_N": 16, "num_warps": 8},
}
WINDOW_TILE = {"BLOCK_X": 8, "BLOCK_N": 128}
LIST_TILE = {"BLOCK_C": 32, "BLOCK_N": 4, "BLOCK_T": 8}
if TRITON_INTERPRETED:  # which pays per program and step
    LIST_TILE = {"BLOCK_C": 32, "BLOCK_N": 64, "BLOCK_T": 4}
WIDEN = TRITON_INTERPRETED  # whose products of half precision are wrong


@triton.jit
def norm_kernel(
    x_ptr, mask_ptr, norms_ptr, kept_ptr, stride_b, stride_c, stride_n, stride_mb, stride_mh, stride_mw,
    MH, MW, H, W, C, MASKED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Norms (B, H*W) and, MASKED, which pixels the resized mask keeps; the norm of the others is 0, whatever they hold.
    Program: BLOCK_N pixels of a sample, all channels."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    N = H * W
    here = n < N
    reads = here
    if MASKED:
        image = mask_ptr + b * stride_mb
        reads = here & (resized(image, n, here, stride_mh, stride_mw, MH, MW, H, W, False, True, tl.float32) > 0)
        tl.store(kept_ptr + b * N + n, reads.to(tl.int8), mask=here)
    squares = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    for c0 in range(0, tl.where(tl.max(reads.to(tl.int32), axis=0) != 0, C, 0), BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        at = x_ptr + b * stride_b + c[:, None] * stride_c + n[None, :] * stride_n
        x = tl.load(at, mask=(c < C)[:, None] & reads[None, :], other=0).to(tl.float32)
        squares += x * x
    tl.store(norms_ptr + b * N + n, tl.sqrt_rn(tl.sum(squares, axis=0)), mask=here)


@triton.jit
def compact_kernel(kept_ptr, before_ptr, list_ptr, N, BLOCK: tl.constexpr):
    """list (N): the kept pixels of a sample in order; before (N + 1): how many are lower. Program: one sample."""
    b = tl.program_id(0).to(tl.int64)
    count = tl.zeros([], dtype=tl.int32)
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        kept = tl.load(kept_ptr + b * N + n, mask=n < N, other=0).to(tl.int32)
        before = count + tl.cumsum(kept, axis=0) - kept
        tl.store(before_ptr + b * (N + 1) + n, before, mask=n < N)
        tl.store(list_ptr + b * N + before, n, mask=kept != 0)
        count += tl.sum(kept, axis=0)
    tl.store(before_ptr + b * (N + 1) + N, count)


@triton.jit
def candidates_kernel(
    norms_ptr, kept_ptr, facts_ptr, dh, dw, H, W, EVERY: tl.constexpr, EXCLUDE: tl.constexpr, BLOCK: tl.constexpr
):
    """facts (3) of a sample and a window: the lowest candidate, whether every pixel is one, the lowest candidate whose
    window holds a vector that is not finite; -1 where there is none. Candidates are the kept pixels (EXCLUDE) or those
    whose window holds one; EVERY: all pixels are kept. Program: a sample."""
    b = tl.program_id(0).to(tl.int64)
    N = H * W
    lowest = N + tl.zeros([], dtype=tl.int32)
    unknown = N + tl.zeros([], dtype=tl.int32)
    every = tl.full([], 1, dtype=tl.int32)
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        live = tl.zeros([BLOCK], dtype=tl.int32)
        bad = tl.zeros([BLOCK], dtype=tl.int32)
        for e in range(dh * dw):
            y, x = n // W + e // dw - dh // 2, n % W + e % dw - dw // 2
            inside = (n < N) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            norm = tl.load(norms_ptr + b * N + y * W + x, mask=inside, other=0)
            bad |= (norm - norm != 0).to(tl.int32)
            if EVERY:
                live |= inside.to(tl.int32)
            else:
                live |= tl.load(kept_ptr + b * N + y * W + x, mask=inside, other=0).to(tl.int32)
        if EXCLUDE:
            live = tl.load(kept_ptr + b * N + n, mask=n < N, other=0).to(tl.int32)
        lowest = tl.minimum(lowest, tl.min(tl.where(live != 0, n, N), axis=0))
        unknown = tl.minimum(unknown, tl.min(tl.where((live != 0) & (bad != 0), n, N), axis=0))
        every = tl.minimum(every, tl.min(tl.where(n < N, live, 1), axis=0))
    tl.store(facts_ptr + b * 3, tl.where(lowest == N, -1, lowest))
    tl.store(facts_ptr + b * 3 + 1, every)
    tl.store(facts_ptr + b * 3 + 2, tl.where(unknown == N, -1, unknown))


@triton.jit
def _products(
    support, query, i, rows, j, columns, stride_sc, stride_sn, stride_qc, stride_qn, C,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_k s[k,i] q[k,j]: (BLOCK_M, BLOCK_N)."""
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for c0 in range(0, C, BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K).to(tl.int64)
        at = support + i[:, None] * stride_sn + c[None, :] * stride_sc
        s = tl.load(at, mask=rows[:, None] & (c < C)[None, :], other=0)
        at = query + c[:, None] * stride_qc + j[None, :] * stride_qn
        q = tl.load(at, mask=(c < C)[:, None] & columns[None, :], other=0)
        if WIDEN:
            s, q = s.to(tl.float32), q.to(tl.float32)
        total = tl.dot(s, q, total, input_precision=PRECISION)
    return total


@triton.jit
def best_kernel(
    query_ptr, support_ptr, query_norms_ptr, support_norms_ptr, before_ptr, list_ptr, best_ptr, index_ptr,
    across_ptr, across_index_ptr, stride_qb, stride_qc, stride_qn, stride_sb, stride_sc, stride_sn, eps, S, C, NQ, NS,
    MATCH: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """best, index (N, chunks, NQ): maximum over CHUNK listed support pixels and the lowest that has it, -inf and -1
    past the list's end. MATCH: across, across_index (N, tiles, NS): for each listed pixel over BLOCK_N query pixels."""
    j = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    columns = j < NQ
    query, support = query_ptr + n // S * stride_qb, support_ptr + n * stride_sb
    u = inverse_norm(tl.load(query_norms_ptr + n // S * NQ + j, mask=columns, other=0), eps, ADD)
    end = tl.minimum(tl.load(before_ptr + n * (NS + 1) + NS), (chunk + 1) * CHUNK)
    best = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    index = tl.full([BLOCK_N], -1, dtype=tl.int32)
    for p0 in range(chunk * CHUNK, end, BLOCK_M):
        p = p0 + tl.arange(0, BLOCK_M)
        rows = p < end
        i = tl.load(list_ptr + n * NS + p, mask=rows, other=0)
        c = _products(
            support, query, i.to(tl.int64), rows, j, columns, stride_sc, stride_sn, stride_qc, stride_qn, C,
            PRECISION, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        v = inverse_norm(tl.load(support_norms_ptr + n * NS + i, mask=rows, other=0), eps, ADD)
        c *= v[:, None]
        if MATCH:  # both directions see the same bits
            c *= u[None, :]
            across = tl.where(columns[None, :], c, float("-inf"))
            top = tl.max(across, axis=1)
            lowest = tl.min(tl.where(across == top[:, None], j[None, :].to(tl.int32), NQ), axis=1)
            to = (n * tl.num_programs(0) + tl.program_id(0)) * NS + p
            tl.store(across_ptr + to, top, mask=rows)
            tl.store(across_index_ptr + to, lowest, mask=rows)
        c = tl.where(rows[:, None], c, float("-inf"))
        top = tl.max(c, axis=0)
        lowest = tl.min(tl.where(c == top[None, :], i[:, None], NS), axis=0)
        better = top > best
        best = tl.where(better, top, best)
        index = tl.where(better, lowest, index)
    if not MATCH:
        best = tl.where(index >= 0, best * u, best)
    to = (n * tl.num_programs(1) + chunk) * NQ + j
    tl.store(best_ptr + to, best, mask=columns)
    tl.store(index_ptr + to, index, mask=columns)


@triton.jit(do_not_specialize=["first", "row", "end_row"])
def ring_kernel(
    query_ptr, support_ptr, query_norms_ptr, support_norms_ptr, before_ptr, list_ptr, ring_ptr,
    stride_qb, stride_qc, stride_qn, stride_sb, stride_sc, stride_sn, eps, first, row, end_row, S, C, NQ, NS, WS, SLOTS,
    ADD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ring (samples, SLOTS, NQ): the cosines of the kept pixels of support rows row to end_row, that at place p of the
    list in slot p % SLOTS. Samples count from `first`."""
    j = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = first + tl.program_id(2).to(tl.int64)
    columns = j < NQ
    begin = tl.load(before_ptr + n * (NS + 1) + row * WS) + tl.program_id(1) * BLOCK_M
    end = tl.load(before_ptr + n * (NS + 1) + end_row * WS)
    if begin < end:
        p = begin + tl.arange(0, BLOCK_M)
        rows = p < end
        i = tl.load(list_ptr + n * NS + p, mask=rows, other=0).to(tl.int64)
        c = _products(
            support_ptr + n * stride_sb, query_ptr + n // S * stride_qb, i, rows, j, columns,
            stride_sc, stride_sn, stride_qc, stride_qn, C, PRECISION, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        v = inverse_norm(tl.load(support_norms_ptr + n * NS + i, mask=rows, other=0), eps, ADD)
        u = inverse_norm(tl.load(query_norms_ptr + n // S * NQ + j, mask=columns, other=0), eps, ADD)
        to = ring_ptr + (tl.program_id(2).to(tl.int64) * SLOTS + p % SLOTS)[:, None] * NQ + j[None, :]
        tl.store(to, c * v[:, None] * u[None, :], mask=rows[:, None] & columns[None, :])


@triton.jit(do_not_specialize=["first", "row"])
def window_kernel(
    ring_ptr, before_ptr, best_ptr, index_ptr, first, row, dh, dw, HQ, WQ, HS, WS, SLOTS,
    EXCLUDE: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """best, index (samples, HS, NQ): maximum of (1/d) sum_o c[i+o, j+o] over the candidates i of one support row, -inf
    and -1 without any. Program: the row `row + program_id(1)`, BLOCK_N query pixels, a sample, counted from `first`."""
    NQ, NS = HQ * WQ, HS * WS
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = j < NQ
    sample = tl.program_id(2).to(tl.int64)
    before = before_ptr + (first + sample) * (NS + 1)
    ring = ring_ptr + sample * SLOTS * NQ
    row += tl.program_id(1)
    best = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    index = tl.full([BLOCK_N], -1, dtype=tl.int32)
    for x0 in range(0, WS, BLOCK_X):
        x = x0 + tl.arange(0, BLOCK_X)
        total = tl.zeros([BLOCK_X, BLOCK_N], dtype=tl.float32)
        live = tl.zeros([BLOCK_X], dtype=tl.int32)
        for e in range(dh * dw):
            oy, ox = e // dw - dh // 2, e % dw - dw // 2
            inside = (row + oy >= 0) & (row + oy < HS) & (x < WS) & (x + ox >= 0) & (x + ox < WS)
            place = tl.load(before + (row + oy) * WS + x + ox, mask=inside, other=0)
            kept = inside & (tl.load(before + (row + oy) * WS + x + ox + 1, mask=inside, other=0) > place)
            live |= kept.to(tl.int32)
            y, z = j // WQ + oy, j % WQ + ox
            shifted = columns & (y >= 0) & (y < HQ) & (z >= 0) & (z < WQ)
            at = ring + (place % SLOTS).to(tl.int64)[:, None] * NQ + (y * WQ + z)[None, :]
            total += tl.load(at, mask=kept[:, None] & shifted[None, :], other=0)
        i = row * WS + x
        if EXCLUDE:
            live = tl.load(before + i + 1, mask=x < WS, other=0) - tl.load(before + i, mask=x < WS, other=0)
        mean = tl.where((live != 0)[:, None], total / (dh * dw), float("-inf"))
        top = tl.max(mean, axis=0)
        lowest = tl.min(tl.where(mean == top[None, :], i[:, None], NS), axis=0)
        better = top > best
        best = tl.where(better, top, best)
        index = tl.where(better, lowest, index)
    to = (sample * HS + row) * NQ + j
    tl.store(best_ptr + to, best, mask=columns)
    tl.store(index_ptr + to, index, mask=columns)


@triton.jit(do_not_specialize=["first", "output"])
def finish_kernel(
    best_ptr, best_index_ptr, facts_ptr, norms_ptr, before_ptr, scores_ptr, index_ptr,
    first, output, outputs, pieces, per_facts, per_norms, dh, dw, H, W,
    LISTED: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scores, index (N, outputs, H*W) at one output: partial maxima (samples, pieces, H*W) in order, then the edge
    rules. LISTED: of support pixels, partial maxima by place in the list. ZERO: pixels that are no candidates score 0.
    Facts and norms are those of sample n // per_facts and n // per_norms. Program: BLOCK pixels of a sample."""
    N = H * W
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    n = first + sample
    inside = j < N
    facts = facts_ptr + n // per_facts * 3
    lowest, every, unknown = tl.load(facts), tl.load(facts + 1), tl.load(facts + 2)
    at, live = j, inside & (lowest >= 0)
    if LISTED:
        at = tl.load(before_ptr + n * (N + 1) + j, mask=inside, other=0)
        live = inside & (tl.load(before_ptr + n * (N + 1) + j + 1, mask=inside, other=0) > at)
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    index = tl.full([BLOCK], -1, dtype=tl.int32)
    for piece in range(pieces):
        from_ = (sample * pieces + piece) * N + at
        value = tl.load(best_ptr + from_, mask=live, other=float("-inf"))
        better = value > best
        index = tl.where(better, tl.load(best_index_ptr + from_, mask=live, other=-1), index)
        best = tl.where(better, value, best)
    lost = index < 0
    if ZERO:
        lost = lost | ((every == 0) & (best <= 0))
    best = tl.where(lost, 0.0, best)
    index = tl.where(lost, -1, index)
    bad = tl.zeros([BLOCK], dtype=tl.int32)
    for e in range(dh * dw):
        y, x = j // W + e // dw - dh // 2, j % W + e % dw - dw // 2
        reads = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        norm = tl.load(norms_ptr + n // per_norms * N + y * W + x, mask=reads, other=0)
        bad |= (norm - norm != 0).to(tl.int32)
    index = tl.where(live & (bad != 0), lowest, index)
    index = tl.where(live & (unknown >= 0), unknown, index)
    best = tl.where(live & ((bad != 0) | (unknown >= 0)), float("nan"), best)
    to = (n * outputs + output) * N + j
    tl.store(scores_ptr + to, best.to(scores_ptr.dtype.element_ty), mask=inside)
    tl.store(index_ptr + to, index.to(tl.int64), mask=inside)


@triton.jit
def _finish_gradient(
    x, along, out, toward, norm, channels, here, N, eps, WRITE: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The part of x . toward that this tile of channels has, x magnified, or, WRITE, the gradient at x from `toward`,
    that at the normalised x; 0 for a zero vector, whatever a dropped one holds. The tiles' parts of `along` are N
    apart."""
    live = here & (norm != 0)
    factor = magnification(norm)
    value = tl.load(x, mask=channels[:, None] & live[None, :], other=0).to(tl.float32) * factor[None, :]
    if WRITE:
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for _ in range(tl.num_programs(1)):
            total += tl.load(along, mask=here, other=0)
            along += N
        size, scaled = norm * factor, eps * factor
        total = total * inverse_norm(size, scaled, ADD) * norm_slope(size, scaled, ADD) * factor
        result = toward * inverse_norm(norm, eps, ADD)[None, :] - total[None, :] * value
        result = tl.where(live[None, :], result, 0.0)
        tl.store(out, result.to(out.dtype.element_ty), mask=channels[:, None] & here[None, :])
    else:
        tl.store(along + tl.program_id(1).to(tl.int64) * N, tl.sum(value * toward, axis=0), mask=here)


@triton.jit
def grad_query_kernel(
    grad_ptr, index_ptr, query_ptr, support_ptr, query_norms_ptr, support_norms_ptr, along_ptr, out_ptr,
    stride_qb, stride_qc, stride_qn, stride_sb, stride_sc, stride_sn, stride_ob, stride_oc, stride_on,
    windows, eps, S, C, HQ, WQ, HS, WS,
    L: tl.constexpr, WRITE: tl.constexpr, ADD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a tile of channels x query pixels: along (B, tiles, NQ), its part of q . D, or, WRITE, the gradient."""
    NQ, NS = HQ * WQ, HS * WS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    here = n < NQ
    toward = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    for s in range(S):
        of = b * S + s
        for k in tl.static_range(L):
            dh, dw = windows[2 * k], windows[2 * k + 1]
            for e in range(dh * dw):
                oy, ox = e // dw - dh // 2, e % dw - dw // 2
                y, x = n // WQ - oy, n % WQ - ox  # the score whose window holds n at this offset
                inside = here & (y >= 0) & (y < HQ) & (x >= 0) & (x < WQ)
                at = (of * L + k) * NQ + y * WQ + x
                i = tl.load(index_ptr + at, mask=inside, other=-1).to(tl.int32)
                sy, sx = i // WS + oy, i % WS + ox
                inside = inside & (i >= 0) & (sy >= 0) & (sy < HS) & (sx >= 0) & (sx < WS)
                v = inverse_norm(tl.load(support_norms_ptr + of * NS + sy * WS + sx, mask=inside, other=0), eps, ADD)
                weight = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32) / (dh * dw) * v
                pixel = (sy * WS + sx).to(tl.int64)
                other = support_ptr + of * stride_sb + c[:, None] * stride_sc + pixel[None, :] * stride_sn
                # what a dropped pixel holds does not count
                value = tl.load(other, mask=(c < C)[:, None] & (inside & (v != 0))[None, :], other=0).to(tl.float32)
                toward += weight[None, :] * value
    norm = tl.load(query_norms_ptr + b * NQ + n, mask=here, other=0)
    _finish_gradient(
        query_ptr + b * stride_qb + c[:, None] * stride_qc + n.to(tl.int64)[None, :] * stride_qn,
        along_ptr + b * tl.num_programs(1) * NQ + n,
        out_ptr + b * stride_ob + c[:, None] * stride_oc + n.to(tl.int64)[None, :] * stride_on,
        toward, norm, c < C, here, NQ, eps, WRITE, ADD, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start"])
def pairs_kernel(
    grad_ptr, index_ptr, norms_ptr, to_ptr, other_ptr, weight_ptr, stride_gm, stride_im, start, total, eps, per, dh, dw,
    H, W, HT, WT, OWN: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairs (N, total) at start + e * count + j: what score j and offset e of a window add to a gradient on (H, W),
    `weight` times vector `other` of grid (HT, WT) to pixel `to`, -1 for nothing. Scores of the other grid choose pixels
    of this one, or, OWN, the other way round. Norms are those of the other's sample m // per."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.program_id(1)
    m = tl.program_id(2).to(tl.int64)
    sample = (tl.program_id(2) // per).to(tl.int64)
    count = H * W if OWN else HT * WT
    here = j < count
    i = tl.load(index_ptr + m * stride_im + j, mask=here, other=-1).to(tl.int32)
    from_, chosen = (i, j) if OWN else (j, i)
    oy, ox = e // dw - dh // 2, e % dw - dw // 2
    y, x, ty, tx = chosen // W + oy, chosen % W + ox, from_ // WT + oy, from_ % WT + ox
    inside = here & (i >= 0) & (y >= 0) & (y < H) & (x >= 0) & (x < W) & (ty >= 0) & (ty < HT) & (tx >= 0) & (tx < WT)
    other = tl.where(inside, ty * WT + tx, 0)
    v = inverse_norm(tl.load(norms_ptr + sample * HT * WT + other, mask=inside, other=0), eps, ADD)
    g = tl.load(grad_ptr + m * stride_gm + j, mask=here, other=0).to(tl.float32)
    at = m * total + start + e * count + j
    tl.store(to_ptr + at, tl.where(v == 0, -1, y * W + x), mask=here)
    tl.store(other_ptr + at, other, mask=here)
    tl.store(weight_ptr + at, g / (dh * dw) * v, mask=here)


@triton.jit
def grad_listed_kernel(
    order_ptr, starts_ptr, others_ptr, weights_ptr, x_ptr, other_ptr, norms_ptr, along_ptr, out_ptr,
    stride_xb, stride_xc, stride_xn, stride_tb, stride_tc, stride_tn, stride_ob, stride_oc, stride_on,
    eps, shots, per, total, C, N,
    WRITE: tl.constexpr, ADD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """`grad_query_kernel` for either side, from pairs (N, total), of pixel i those at order[starts[i] : starts[i + 1]].
    Sample b is in the rows b * shots + s of pairs; the other side of row m is sample m // per. The lists of a tile's
    pixels are walked together."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    here, channels = n < N, c < C
    toward = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    for s in range(shots):
        m = tl.program_id(2) * shots + s
        other = other_ptr + (m // per).to(tl.int64) * stride_tb
        row = m.to(tl.int64)
        begin = tl.load(starts_ptr + row * (N + 1) + n, mask=here, other=0)
        end = tl.load(starts_ptr + row * (N + 1) + n + 1, mask=here, other=0)
        for t0 in range(0, tl.max(end - begin, axis=0), BLOCK_T):
            t = begin[:, None] + t0 + tl.arange(0, BLOCK_T)[None, :]
            listed = t < end[:, None]
            pair = row * total + tl.load(order_ptr + row * total + t, mask=listed, other=0)
            pixel = tl.load(others_ptr + pair, mask=listed, other=0).to(tl.int64)
            weight = tl.load(weights_ptr + pair, mask=listed, other=0)
            at = other + c[:, None, None] * stride_tc + pixel[None, :, :] * stride_tn
            value = tl.load(at, mask=channels[:, None, None] & listed[None, :, :], other=0).to(tl.float32)
            toward += tl.sum(weight[None, :, :] * value, axis=2)
    norm = tl.load(norms_ptr + b * N + n, mask=here, other=0)
    _finish_gradient(
        x_ptr + b * stride_xb + c[:, None] * stride_xc + n.to(tl.int64)[None, :] * stride_xn,
        along_ptr + b * tl.num_programs(1) * N + n,
        out_ptr + b * stride_ob + c[:, None] * stride_oc + n.to(tl.int64)[None, :] * stride_on,
        toward, norm, channels, here, N, eps, WRITE, ADD, BLOCK_N,
    )  # fmt: skip


class _Features(NamedTuple):
    """Features (B, C, H, W) whose pixels are evenly spaced in memory, and the strides of samples, channels, pixels."""

    data: Tensor
    strides: tuple[int, int, int]


def _even(x: Tensor) -> _Features:
    """The features themselves where their pixels are evenly spaced, else a dense copy in their memory format."""
    height, width = x.shape[2:]
    if height > 1 and width > 1 and x.stride(2) != width * x.stride(3):
        memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        x = x.contiguous(memory_format=memory_format)
    return _Features(x, (x.stride(0), x.stride(1), x.stride(3) if width > 1 else x.stride(2)))


class _Prepared(NamedTuple):
    """What every forward starts from."""

    query: _Features
    support: _Features
    query_norm: Tensor  # (B, Hq, Wq)
    support_norm: Tensor  # (N, Hs, Ws), 0 where dropped
    kept: Tensor  # (N, Ns)
    before: Tensor  # (N, Ns + 1)
    listed: Tensor  # (N, Ns)

    @property
    def shots(self) -> int:
        return self.support.data.shape[0] // self.query.data.shape[0]

    def operands(self) -> tuple[Tensor, ...]:
        tensors = self.query.data, self.support.data, self.query_norm, self.support_norm
        return *tensors, self.before, self.listed

    def strides(self) -> tuple[int, ...]:
        return *self.query.strides, *self.support.strides


def _prepare(query: Tensor, support: Tensor, mask: Tensor) -> _Prepared:
    even = _even(query), _even(support)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    count, pixels = support.shape[0], support.shape[2:].numel()
    kept = mask.new_empty((count, pixels), dtype=torch.int8)
    before = mask.new_empty((count, pixels + 1), dtype=torch.int32)
    listed = mask.new_empty((count, pixels), dtype=torch.int32)
    norms = [x.data.new_empty((x.data.shape[0], *x.data.shape[2:]), dtype=torch.float32) for x in even]
    for (x, strides), norm, masked in zip(even, norms, (False, True), strict=True):
        if x.shape[0] == 0:
            continue
        tile = NORM_TILES[strides[1] == 1 and x.shape[1] > 1]
        norm_kernel[(triton.cdiv(x.shape[2:].numel(), tile["BLOCK_N"]), x.shape[0])](
            x, mask, norm, kept, *strides, *mask.stride(), *mask.shape[1:], *x.shape[2:], x.shape[1],
            MASKED=masked, **tile,
        )  # fmt: skip
    if count:
        compact_kernel[(count,)](kept, before, listed, pixels, BLOCK=BLOCK)
    return _Prepared(even[0], even[1], norms[0], norms[1], kept, before, listed)


def _product_options(query: Tensor) -> dict[str, Any]:
    """How operands are multiplied: tile and precision."""
    tf32 = query.is_cuda and torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision = "tf32" if tf32 and query.dtype == torch.float32 else "ieee"
    tile = TILES[precision if query.dtype == torch.float32 else "half"]
    return {"PRECISION": precision, "WIDEN": WIDEN, **tile}


def _facts(norm: Tensor, kept: Tensor, window: Sequence[int], every: bool, exclude: bool) -> Tensor:
    facts = norm.new_empty((norm.shape[0], 3), dtype=torch.int32)
    candidates_kernel[(norm.shape[0],)](
        norm, kept, facts, *window, *norm.shape[1:], EVERY=every, EXCLUDE=exclude, BLOCK=BLOCK
    )
    return facts


def _best(prepared: _Prepared, match: bool, eps: float, add: bool) -> tuple[Tensor, ...]:
    """Partial maxima and their indices of query (N, chunks, Nq) and, for a match, of listed support (N, tiles, Ns)."""
    query, norm = prepared.query.data, prepared.query_norm
    (count, pixels), columns, options = prepared.listed.shape, norm.shape[1:].numel(), _product_options(query)
    tiles, chunks = triton.cdiv(columns, options["BLOCK_N"]), triton.cdiv(pixels, CHUNK)
    shapes = (count, chunks, columns), (count, tiles if match else 0, pixels)
    partial = [norm.new_empty(shape, dtype=dtype) for shape in shapes for dtype in (torch.float32, torch.int32)]
    best_kernel[(tiles, chunks, count)](
        *prepared.operands(), *partial, *prepared.strides(), eps, prepared.shots, query.shape[1], columns, pixels,
        MATCH=match, ADD=add, CHUNK=CHUNK, **options,
    )  # fmt: skip
    return tuple(partial)


def _finish(
    partial: Sequence[Tensor],
    facts: Tensor,
    norm: Tensor,
    before: Tensor,
    results: tuple[Tensor, Tensor],
    per: tuple[int, int],
    first: int = 0,
    output: int = 0,
    window: Sequence[int] = (1, 1),
    listed: bool = False,
    zero: bool = False,
) -> None:
    """Scores and indices (N, ..., H, W) of one output from its partial maxima, which start at sample `first`."""
    samples, pieces = partial[0].shape[:2]
    grid = triton.cdiv(norm.shape[1:].numel(), FINISH), samples
    outputs = results[0].shape[1] if results[0].ndim == 4 else 1
    finish_kernel[grid](
        *partial, facts, norm, before, *results, first, output, outputs, pieces, *per, *window, *norm.shape[1:],
        LISTED=listed, ZERO=zero, BLOCK=FINISH,
    )  # fmt: skip


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
    count, (hq, wq), (hs, ws) = support.shape[0], query.shape[2:], support.shape[2:]
    pairs = list(zip(windows[::2], windows[1::2], strict=True))
    scores = query.new_empty((count, len(pairs), hq, wq))
    results = scores, scores.new_empty(scores.shape, dtype=torch.int64)
    prepared = _prepare(query, support, mask)
    norms = prepared.query_norm, prepared.support_norm
    if count == 0:
        return *results, *norms
    add, exclude = eps_mode == "add", masked == "exclude"
    facts = [_facts(prepared.support_norm, prepared.kept, window, False, exclude) for window in pairs]
    per = 1, prepared.shots
    if pairs == [(1, 1)]:
        partial = _best(prepared, False, eps, add)
        _finish(partial[:2], facts[0], prepared.query_norm, prepared.before, results, per, zero=not exclude)
        return *results, *norms
    reach = max(dh for dh, _ in pairs) // 2
    band = max(1, RING // (4 * ws * hq * wq) - 2 * reach)  # rows of candidates between two products
    slots = min(hs, band + 2 * reach) * ws
    group = max(1, min(count, RING // (4 * slots * hq * wq)))
    ring = scores.new_empty((group, slots, hq * wq), dtype=torch.float32)
    shape = len(pairs), group, hs, hq * wq
    best, index = (scores.new_empty(shape, dtype=dtype) for dtype in (torch.float32, torch.int32))
    options = _product_options(query)
    columns = triton.cdiv(hq * wq, options["BLOCK_N"])
    for first, row in itertools.product(range(0, count, group), range(0, hs, band)):
        samples, end_row = min(group, count - first), min(hs, row + band)
        begin = row + reach if row else 0
        reached = min(hs, end_row + reach)
        if begin < reached:
            ring_kernel[(columns, triton.cdiv((reached - begin) * ws, options["BLOCK_M"]), samples)](
                *prepared.operands(), ring, *prepared.strides(), eps, first, begin, reached, prepared.shots,
                query.shape[1], hq * wq, hs * ws, ws, slots,
                ADD=add, **options,
            )  # fmt: skip
        for k, window in enumerate(pairs):
            window_kernel[(triton.cdiv(hq * wq, WINDOW_TILE["BLOCK_N"]), end_row - row, samples)](
                ring, prepared.before, best[k], index[k], first, row, *window, hq, wq, hs, ws, slots,
                EXCLUDE=exclude, **WINDOW_TILE,
            )  # fmt: skip
            if end_row == hs:
                _finish(
                    (best[k, :samples], index[k, :samples]), facts[k], prepared.query_norm, prepared.before, results,
                    per, first, k, window, zero=not exclude,
                )  # fmt: skip
    return *results, *norms


def dense_cosine_match_fwd(
    query: Tensor, support: Tensor, mask: Tensor, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op: scores and indices of query and support, norms as in `dense_cosine_max_fwd`."""
    count, shots = support.shape[0], support.shape[0] // max(query.shape[0], 1)
    shapes = [(count, *x.shape[2:]) for x in (query, support)]
    scores = [query.new_empty(shape) for shape in shapes]
    index = [query.new_empty(shape, dtype=torch.int64) for shape in shapes]
    prepared = _prepare(query, support, mask)
    query_norm, support_norm = prepared.query_norm, prepared.support_norm
    if count:
        best, best_index, across, across_index = _best(prepared, True, eps, eps_mode == "add")
        of_support = _facts(support_norm, prepared.kept, (1, 1), False, True)
        of_query = _facts(query_norm, prepared.kept, (1, 1), True, False)
        before = prepared.before
        _finish((best, best_index), of_support, query_norm, before, (scores[0], index[0]), (1, shots))
        partial = across, across_index
        _finish(partial, of_query, support_norm, before, (scores[1], index[1]), (shots, 1), listed=True)
    return scores[0], scores[1], index[0], index[1], query_norm, support_norm


def _grad_listed(
    x: Tensor,
    norm: Tensor,
    other: Tensor,
    other_norm: Tensor,
    scores: Sequence[tuple[Tensor, Tensor, Sequence[int], bool]],
    eps: float,
    add: bool,
) -> Tensor:
    """The gradient to x from maps of scores: the gradient at one (N, K), its index, its window, whether it is of x's
    grid and chose pixels of the other, or the other way round."""
    (batch, channels, *grid), other_grid, count = x.shape, other.shape[2:], scores[0][0].shape[0]
    pixels, shots, per = norm.shape[1:].numel(), count // batch, count // other.shape[0]
    total = sum(grad.shape[1] * dh * dw for grad, _, (dh, dw), _ in scores)
    to, others = (norm.new_empty((count, total), dtype=torch.int32) for _ in range(2))
    weights, start = norm.new_empty((count, total)), 0
    for grad, index, (dh, dw), own in scores:
        pairs_kernel[(triton.cdiv(grad.shape[1], BLOCK), dh * dw, count)](
            grad, index, other_norm, to, others, weights, grad.stride(0), index.stride(0), start, total, eps, per,
            dh, dw, *grid, *other_grid, OWN=own, ADD=add, BLOCK=BLOCK,
        )  # fmt: skip
        start += grad.shape[1] * dh * dw
    sorted_to, order = to.sort(dim=1, stable=True)
    bounds = torch.arange(pixels + 1, dtype=torch.int32, device=to.device).repeat(count, 1)
    starts = torch.searchsorted(sorted_to, bounds, out_int32=True)
    out, even, others_even = empty_rows_like(x), _even(x), _even(other)
    tiles = triton.cdiv(channels, LIST_TILE["BLOCK_C"])
    along = norm.new_empty((batch, tiles, pixels))
    for write in (False, True):
        grad_listed_kernel[(triton.cdiv(pixels, LIST_TILE["BLOCK_N"]), tiles, batch)](
            order, starts, others, weights, even.data, others_even.data, norm, along, out,
            *even.strides, *others_even.strides, *_even(out).strides, eps, shots, per, total, channels, pixels,
            WRITE=write, ADD=add, **LIST_TILE,
        )  # fmt: skip
    return out


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
    """The backward op, from the saved indices. The mask has no gradient."""
    (batch, channels, *query_grid), count = query.shape, support.shape[0]
    grad_query = empty_rows_like(query) if need_query else query.new_empty(0)
    grad_support, grad_mask = support.new_empty(0), mask.new_empty(0)
    if count == 0:
        return grad_query.zero_(), empty_rows_like(support) if need_support else grad_support, grad_mask
    grad, index, query_norm, support_norm = (t.contiguous() for t in (grad, index, query_norm, support_norm))
    shots, outputs, add = count // batch, len(windows) // 2, eps_mode == "add"
    if need_query:
        own, other = _even(query), _even(support)
        tile = GATHER_TILES[other.strides[1] == 1 and channels > 1]
        pixels = query_norm.shape[1:].numel()
        grid = triton.cdiv(pixels, tile["BLOCK_N"]), triton.cdiv(channels, tile["BLOCK_C"]), batch
        along = query_norm.new_empty((batch, grid[1], pixels))
        for write in (False, True):
            grad_query_kernel[grid](
                grad, index, own.data, other.data, query_norm, support_norm, along, grad_query,
                *own.strides, *other.strides, *_even(grad_query).strides, tuple(windows), eps, shots, channels,
                *query_grid, *support.shape[2:], L=outputs, WRITE=write, ADD=add, **tile,
            )  # fmt: skip
    if need_support:
        maps = grad.flatten(2).unbind(1), index.flatten(2).unbind(1), zip(windows[::2], windows[1::2], strict=True)
        scores = [(*of_window, False) for of_window in zip(*maps, strict=True)]
        grad_support = _grad_listed(support, support_norm, query, query_norm, scores, eps, add)
    return grad_query, grad_support, grad_mask


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
    grad_query, grad_support, grad_mask = query.new_empty(0), support.new_empty(0), mask.new_empty(0)
    if support.shape[0] == 0:
        grad_query = empty_rows_like(query).zero_() if need_query else grad_query
        return grad_query, empty_rows_like(support) if need_support else grad_support, grad_mask
    query_norm, support_norm, add = query_norm.contiguous(), support_norm.contiguous(), eps_mode == "add"
    of_query, of_support = (
        (grad.contiguous().flatten(1), index.contiguous().flatten(1), (1, 1))
        for grad, index in ((grad_query_scores, query_index), (grad_support_scores, support_index))
    )
    if need_query:
        scores = [(*of_query, True), (*of_support, False)]
        grad_query = _grad_listed(query, query_norm, support, support_norm, scores, eps, add)
    if need_support:
        scores = [(*of_query, False), (*of_support, True)]
        grad_support = _grad_listed(support, support_norm, query, query_norm, scores, eps, add)
    return grad_query, grad_support, grad_mask
