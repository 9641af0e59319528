"""Peers of dense_cosine_max and dense_cosine_match: PFENet's prior, DPCN's windows as its paper writes them, libraries
that search or score by maximum, and rewrites. DPCN has no public code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from fss_kernels.testing import Peer


def _on_grid(mask: Tensor, support: Tensor) -> Tensor:
    return F.interpolate(mask.to(support.dtype), support.shape[-2:], mode="bilinear", align_corners=True)


def _by_shot(query: Tensor, support: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query once a shot, support (N, C, Hs, Ws), and the pixels the mask keeps (N, 1, Hs, Ws)."""
    query = query[:, None].expand(-1, support.shape[1], -1, -1, -1).flatten(0, 1)
    support = support.flatten(0, 1)
    return query, support, None if mask is None else _on_grid(mask.flatten(0, 1)[:, None], support) > 0


def _cosine_matrix(query: Tensor, support: Tensor) -> Tensor:
    """PFENet's similarity: one product, divided by the product of the norms."""
    q, s = query.flatten(2), support.flatten(2).transpose(1, 2)
    norms = torch.bmm(s.norm(dim=2, keepdim=True), q.norm(dim=1, keepdim=True))
    return torch.bmm(s, q) / (norms + 1e-7)


def _normalised_matrix(query: Tensor, support: Tensor) -> Tensor:
    return torch.bmm(F.normalize(support.flatten(2), dim=1).transpose(1, 2), F.normalize(query.flatten(2), dim=1))


def _like_scores(best: Tensor, query: Tensor, support: Tensor) -> Tensor:
    """Maps (N, L, Nq) as (B, S, L, Hq, Wq)."""
    return best.view(*support.shape[:2], -1, *query.shape[2:])


def _pfenet_prior(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    q, s, kept = _by_shot(query, support, mask)
    return _like_scores(_cosine_matrix(q, s if kept is None else s * kept).max(1).values, query, support)


def _winners(query: Tensor, support: Tensor, index: Tensor) -> Tensor:
    """Cosines (N, 1, Nq) of every query pixel with its winner, differentiable."""
    chosen = support.flatten(2).gather(2, index[:, None].expand(-1, support.shape[1], -1))
    return (F.normalize(query.flatten(2), dim=1) * F.normalize(chosen, dim=1)).sum(1, keepdim=True)


def _argmax_gather(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    """The rewrite that avoids autograd through the matrix: argmax without gradient, then the winners' cosines."""
    q, s, kept = _by_shot(query, support, mask)
    s = s if kept is None else s * kept
    with torch.no_grad():
        best, index = _normalised_matrix(q, s).max(1)
    return _like_scores(_winners(q, s, index) if torch.is_grad_enabled() else best, query, support)


def _packed_foreground(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sample by sample, only the foreground pixels of a mask."""
    q, s, kept = _by_shot(query, support, mask)
    assert kept is not None
    results = []
    for x, y, k in zip(q.flatten(2), s.flatten(2), kept.flatten(1), strict=True):
        chosen = F.normalize(y[:, k], dim=0).T
        best = (chosen @ F.normalize(x, dim=0)).max(0).values
        results.append(best if bool(k.all()) else best.clamp(min=0))
    return _like_scores(torch.stack(results), query, support)


def _faiss_search(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    """faiss' exact inner-product index on normalised, transposed foreground pixels; the winners' cosines with a
    gradient."""
    import faiss

    q, s, kept = _by_shot(query, support, mask)
    results = []
    for x, y, k in zip(q.flatten(2), s.flatten(2), [None] * len(q) if kept is None else kept.flatten(1), strict=True):
        y = y if k is None else y[:, k]
        rows, columns = (F.normalize(t.detach(), dim=0).T.contiguous().numpy() for t in (y, x))
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        scores, at = (torch.from_numpy(r)[:, 0] for r in index.search(columns, 1))
        best = _winners(x[None], y[None], at[None])[0, 0] if torch.is_grad_enabled() else scores
        results.append(best if k is None or bool(k.all()) else best.clamp(min=0))
    return _like_scores(torch.stack(results), query, support)


def _literal_windows(query: Tensor, support: Tensor, mask: Tensor | None = None, windows: Any = ()) -> Tensor:
    """DPCN as written: windows unfolded on both sides, one product for every element of every window."""
    q, s, kept = _by_shot(query, support, mask)
    s, maps = s if kept is None else s * kept, []
    for dh, dw in windows:
        x, y = (
            F.normalize(F.unfold(t, (dh, dw), padding=(dh // 2, dw // 2)).unflatten(1, (t.shape[1], -1)), dim=1)
            for t in (q, s)
        )
        cosines = torch.einsum("ncoi,ncoj->noij", y, x)
        maps.append(cosines.mean(1).max(1).values)
    return _like_scores(torch.stack(maps, 1), query, support)


def _one_matrix_windows(query: Tensor, support: Tensor, mask: Tensor | None = None, windows: Any = ()) -> Tensor:
    """The same from one matrix, by adding shifted copies of it."""
    q, s, kept = _by_shot(query, support, mask)
    (hs, ws), (hq, wq) = s.shape[2:], q.shape[2:]
    cosines = _normalised_matrix(q, s if kept is None else s * kept).view(-1, hs, ws, hq, wq)
    maps = []
    for dh, dw in windows:
        padded = F.pad(cosines, (dw // 2, dw // 2, dh // 2, dh // 2) * 2)
        sums = sum(padded[:, y : y + hs, x : x + ws, y : y + hq, x : x + wq] for y in range(dh) for x in range(dw))
        maps.append((sums / (dh * dw)).flatten(3).flatten(1, 2).max(1).values)
    return _like_scores(torch.stack(maps, 1), query, support)


def _both_maxima(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    q, s, _ = _by_shot(query, support, None)
    cosines = _normalised_matrix(q, s)
    return torch.cat([cosines.max(1).values, cosines.max(2).values], 1).unflatten(0, support.shape[:2])


def _both_argmax_gather(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    q, s, _ = _by_shot(query, support, None)
    with torch.no_grad():
        cosines = _normalised_matrix(q, s)
        (best, index), (other_best, other) = cosines.max(1), cosines.max(2)
    if torch.is_grad_enabled():
        best, other_best = _winners(q, s, index)[:, 0], _winners(s, q, other)[:, 0]
    return torch.cat([best, other_best], 1).unflatten(0, support.shape[:2])


def _keops_argmax(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    """KeOps' symbolic matrix: normalised vectors, the index of the largest product, then the winners' cosines."""
    import pykeops

    pykeops.set_verbose(False)
    from pykeops.torch import LazyTensor

    q, s, kept = _by_shot(query, support, mask)
    s = s if kept is None else s * kept
    rows, columns = (F.normalize(x.detach().flatten(2), dim=1).mT.contiguous() for x in (q, s))
    index = (LazyTensor(rows[:, :, None]) | LazyTensor(columns[:, None])).argmax(dim=2)[..., 0]
    return _like_scores(_winners(q, s, index), query, support)


def _unit_rows(query: Tensor, support: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normalised pixels (N, Nq, C) and (N, Ns, C); those of the background are 0."""
    q, s, kept = _by_shot(query, support, mask)
    s = s if kept is None else s * kept
    return F.normalize(q.flatten(2), dim=1).mT.contiguous(), F.normalize(s.flatten(2), dim=1).mT.contiguous()


def _flex_attention(
    attention: Callable[..., Any], query: Tensor, support: Tensor, mask: Tensor | None = None
) -> Tensor:
    """FlexAttention's largest scores, over values that are as narrow as it takes."""
    q, s = _unit_rows(query, support, mask)
    values = s.new_zeros(len(s), 1, s.shape[1], 16)
    _, found = attention(q[:, None], s[:, None], values, scale=1.0, return_aux=AuxRequest(max_scores=True))
    return _like_scores(found.max_scores, query, support)


def maxsim_map(maxsim: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The op from sums over a query's tokens of their best scores: tokens (n, l, C), others (1, m, C) -> (n, 1).

    Without gradient, queries have 128 pixels, and the gradient of the sum to a pixel is its winner. With gradient every
    pixel is a query of its own: within a query all pixels would share one factor.
    """

    def best(pixels: Tensor, others: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return maxsim(pixels[:, None], others)[:, 0]
        tokens = F.pad(pixels, (0, 0, 0, -len(pixels) % 128)).unflatten(0, (-1, 128)).detach()
        with torch.enable_grad():
            (winners,) = torch.autograd.grad(maxsim(tokens.requires_grad_(), others).sum(), tokens)
        return (pixels * winners.flatten(0, 1)[: len(pixels)]).sum(1)

    def run(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
        q, s = _unit_rows(query, support, mask)
        return _like_scores(torch.stack([best(x, y[None]) for x, y in zip(q, s, strict=True)]), query, support)

    return run


def _flash_maxsim(*tensors: Tensor) -> Tensor:
    from flash_maxsim import flash_maxsim_batched_train

    return maxsim_map(flash_maxsim_batched_train)(*tensors)


def _late_interaction(*tensors: Tensor) -> Tensor:
    from late_interaction_kernels import maxsim

    return maxsim_map(maxsim)(*tensors)


def _pixels(size: Mapping[str, Any]) -> bool:
    return not size.get("dpcn")


def _masked_pixels(size: Mapping[str, Any]) -> bool:
    return _pixels(size) and bool(size.get("image"))


def _windowed(size: Mapping[str, Any]) -> bool:
    return bool(size.get("dpcn"))


def _small_pixels(size: Mapping[str, Any]) -> bool:  # its sums over channels are plain loops: seconds at C = 512
    return _pixels(size) and not size.get("image") and size["channels"] <= 512


_PFENET = Peer(
    "pfenet",
    _pfenet_prior,
    "holds the matrix and the product of the norms, for the gradient too",
    _pixels,
    released=True,
    runs=("quick", "sweep"),
)
# In a sweep it is slower than its compiled form in every row measured so far, by 1.4 times at least.
_ARGMAX_GATHER = Peer(
    "argmax-gather", _argmax_gather, "holds the matrix and multiplies the background", _pixels, runs=("quick",)
)
_ONE_MATRIX = Peer(
    "one-matrix",
    _one_matrix_windows,
    "holds the matrix several times and multiplies the background",
    _windowed,
)
_BOTH_MAXIMA = Peer("both-maxima", _both_maxima, "holds the matrix, for the gradient too", runs=("quick", "sweep"))
_BOTH_ARGMAX_GATHER = Peer("argmax-gather", _both_argmax_gather, "holds the matrix")
_SUMS_ONLY = "returns only the sum over a query: pixels come from its gradient, or from one query a pixel"
# Shapes of packed-foreground depend on the data, and literal takes gigabytes in either form: neither is compiled.
# FlexAttention returns no maxima on a CPU. No GPU has run it yet, nor the two peers after it.
PEERS = {
    "dense_cosine_max": (
        _PFENET,
        _PFENET.compiled(),
        _ARGMAX_GATHER,
        _ARGMAX_GATHER.compiled(runs=("sweep",)),
        _ARGMAX_GATHER.autotuned(),
        Peer(
            "packed-foreground",
            _packed_foreground,
            "goes sample by sample and waits for every count",
            _masked_pixels,
            runs=("quick", "sweep"),
        ),
        Peer("literal", _literal_windows, "holds a matrix for every window element", _windowed),
        _ONE_MATRIX,
        _ONE_MATRIX.compiled(),
        _ONE_MATRIX.autotuned(),
        Peer(
            "faiss",
            _faiss_search,
            "takes one normalised, transposed sample at a time",
            _pixels,
            module="faiss",
            extra="peers",
            optional=True,
        ),
        Peer(
            "keops",
            _keops_argmax,
            "recomputes the winner's cosine, slow for many channels",
            _small_pixels,
            module="pykeops",
            extra="peers",
            optional=True,
        ),
        Peer(
            "flex-attention",
            _flex_attention,
            "copies both sides, goes on to a softmax, has no index and no gradient",
            _pixels,
            part=flex_attention,
            backward=False,
            gpu_only=True,
            optional=True,
        ),
        Peer(
            "flash-maxsim",
            _flash_maxsim,
            _SUMS_ONLY,
            _pixels,
            module="flash_maxsim",
            extra="gpu-peers",
            gpu_only=True,
            optional=True,
        ),
        Peer(
            "late-interaction-kernels",
            _late_interaction,
            _SUMS_ONLY,
            _pixels,
            module="late_interaction_kernels",
            extra="gpu-peers",
            gpu_only=True,
            optional=True,
        ),
    ),
    "dense_cosine_match": (
        _BOTH_MAXIMA,
        _BOTH_MAXIMA.compiled(runs=("sweep",)),
        _BOTH_MAXIMA.autotuned(),
        _BOTH_ARGMAX_GATHER,
        _BOTH_ARGMAX_GATHER.compiled(),
    ),
}
