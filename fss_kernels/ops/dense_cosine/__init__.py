"""Dense cosine: every query pixel against every support pixel, reduced at once. The matrix is never stored."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fss_kernels import _checks
from fss_kernels._cosine import EPS_MODES
from fss_kernels._library import accumulate_dtype
from fss_kernels.ops.dense_cosine.op import call_match, call_max

_QUERY = {4: "(B, C, Hq, Wq)"}
_SUPPORT = {5: "(B, S, C, Hs, Ws)", 4: "(B, C, Hs, Ws)"}
_MASKS = {5: {4: "(B, S, h, w)"}, 4: {3: "(B, h, w)"}}
MASKED = ("zero", "exclude")


def checked_inputs(
    name: str, query: Tensor, support: Tensor, mask: Tensor | None, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor, Tensor, int, float]:
    """Checked tensors with the shots folded into the first dimension of support and mask; how many shots; eps."""
    for argument, value, shapes in (("query", query, _QUERY), ("support", support, _SUPPORT)):
        _checks.tensor(name, argument, value, shapes, _checks.FEATURE_DTYPES)
        _checks.not_empty(name, argument, value, slice(-3, None), "channels or pixels")
    query, support = _checks.one_dtype(name, {"query": query, "support": support})
    _checks.same_device(name, "support", support, "query", query)
    _checks.same_batch(name, "support", support, "query", query)
    if mask is not None:
        _checks.tensor(name, "mask", mask, _MASKS[support.ndim], _checks.MASK_DTYPES)
        _checks.same_device(name, "mask", mask, "query", query)
        _checks.same_batch(name, "mask", mask, "query", query)
        _checks.not_empty(name, "mask", mask, slice(-2, None), "pixels")
        if mask.shape[1:-2] != support.shape[1:-3]:
            raise ValueError(f"{name}: mask must have the shots of support, {support.shape[1]}, got {mask.shape[1]}")
    shots = support.shape[1] if support.ndim == 5 else 1
    support = support.flatten(0, 1) if support.ndim == 5 else support
    _checks.same_channels(name, "support", support, "query", query)
    if mask is None:
        mask = query.new_ones((1, 1, 1), dtype=accumulate_dtype(query)).expand(support.shape[0], 1, 1)
    elif mask.ndim == 4:
        mask = mask.flatten(0, 1)
    eps = _checks.non_negative(name, "eps", eps)
    _checks.one_of(name, "eps_mode", eps_mode, EPS_MODES)
    return query, support, mask.detach(), shots, eps


def dense_cosine_max(
    query: Tensor,
    support: Tensor,
    mask: Tensor | None = None,
    *,
    windows: Sequence[tuple[int, int]] = ((1, 1),),
    masked: str = "zero",
    eps: float = 1e-7,
    eps_mode: str = "clamp",
) -> tuple[Tensor, Tensor]:
    """Best cosine of every query pixel with the pixels of each masked support, and where it is.

    ``scores[b,s,l,j] = max_i (1 / (dh*dw)) * sum_o c[i+o, j+o]``, o running over the dh*dw offsets of window l around
    0 and ``c[i,j] = q[b,:,j] . s[b,s,:,i] / (N(|q_j|) * N(|s_i|))``; ``N(t) = max(t, eps)`` for ``eps_mode="clamp"``,
    ``t + eps`` for ``"add"``. Support pixels that the mask drops are zero vectors, pixels outside of a grid too. The
    window (1, 1) is PFENet's prior before its min-max, ((5, 1), (3, 3), (1, 5)) is DPCN's support activation.

    Args:
        query: (B, C, Hq, Wq), float32, bfloat16, float16 or float64 (CPU). Contiguous and channels_last are read in
            place, and so are slices of either; other strides are copied.
        support: (B, S, C, Hs, Ws), S shots, or (B, C, Hs, Ws) for one; the dtype of query (under autocast both take the
            wider one). Layouts as for query; shots that are not evenly spaced in memory are copied.
        mask: (B, S, h, w), or (B, h, w) with a 4-D support; bool, uint8 or floating, >= 0, any size. Resized
            bilinearly with aligned corners unless it has the support's grid (for another rule resize it before). A
            support pixel is kept where the result is > 0. None: all are.
        windows: (dh, dw), odd, one map of scores each. All share one product.
        masked: ``"zero"``: every support pixel is a candidate, and those whose whole window holds no kept pixel score 0
            for every query pixel (the released code). If there are such pixels and no other one scores above 0, the
            score is 0 and the index -1. ``"exclude"``: the kept pixels are the candidates.
        eps: >= 0, at the norms.
        eps_mode: ``"clamp"`` (as ``torch.nn.functional.cosine_similarity``) or ``"add"``.

    Returns:
        Scores (B, S, L, Hq, Wq) in the dtype of the features, and the candidate that has each, row * Ws + column,
        int64, the lowest among equals; without candidates score 0 and index -1. S and L are kept when they are 1.

    Differentiable in query and support, twice, at the saved index: the cosines of the winning window get 1/(dh*dw) of
    the gradient each; index -1 gets none. The mask is a constant. A zero vector has the cosine 0 and the gradient 0.
    NaN and Inf in dropped pixels do not count. A query vector that holds one gives NaN at the pixels whose window holds
    it (index: the lowest candidate with a kept pixel in its window); a kept support vector gives NaN at all query
    pixels of its b and s (index: the lowest candidate whose window holds such a vector). A vector whose squared norm
    leaves the range of float32 (float64 for float64) counts as infinite or zero. B = 0 or S = 0 gives an empty result.
    Deterministic.

    Cost: B*C*(Hq*Wq + S*Hs*Ws) elements read, 2*C flops a pair of a query and a kept support pixel. Extra memory:
    C*Hq*Wq floats for one packed sample and a few MB, never the matrix of cosines; norms and indices for the backward,
    whose cost is that of the winning pairs.

    Raises:
        TypeError: ``query``, ``support`` or ``mask`` is no tensor or has an unsupported dtype; the features differ in
            dtype outside autocast; ``windows`` is no sequence of pairs of int, ``masked`` or ``eps_mode`` no string,
            ``eps`` no number.
        ValueError: wrong rank, different batch sizes, shots, channels or devices, no channels or pixels, no window or
            an even one, unknown ``masked`` or ``eps_mode``, negative or infinite ``eps``.

    Sources: PFENet (Tian et al. 2020), DPCN (Liu et al. 2022).

    Example:
        >>> import torch
        >>> query = torch.tensor([[[[3.0]], [[4.0]]]])
        >>> support = torch.tensor([[[[1.0, -1.0, 0.0]], [[0.0, 0.0, 2.0]]]])
        >>> dense_cosine_max(query, support)
        (tensor([[[[[0.8000]]]]]), tensor([[[[[2]]]]]))
        >>> dense_cosine_max(query, support, torch.tensor([[[1, 1, 0]]], dtype=torch.uint8))
        (tensor([[[[[0.6000]]]]]), tensor([[[[[0]]]]]))
    """
    name = "dense_cosine_max"
    query, support, mask, shots, eps = checked_inputs(name, query, support, mask, eps, eps_mode)
    _checks.windows(name, "windows", windows)
    _checks.one_of(name, "masked", masked, MASKED)
    sizes = [size for window in windows for size in window]
    results = call_max(query, support, mask, sizes, masked, eps, eps_mode)
    scores, index = (r.unflatten(0, (query.shape[0], shots)) for r in results)
    return scores, index


def dense_cosine_match(
    query: Tensor,
    support: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-7,
    eps_mode: str = "clamp",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best cosine of every query pixel with the kept support pixels, and of every kept support pixel with the query.

    ``query_scores[b,s,j] = max_i c[i,j]`` over the kept support pixels i and ``support_scores[b,s,i] = max_j c[i,j]``
    over all query pixels j, with c and its eps as in `dense_cosine_max`: both directions of the cycle test of DPNet and
    CyCTR from one product.

    Args:
        query: (B, C, Hq, Wq), as for `dense_cosine_max`.
        support: (B, S, C, Hs, Ws), or (B, C, Hs, Ws) for one shot.
        mask: (B, S, h, w), or (B, h, w) with a 4-D support, as for `dense_cosine_max`. A dropped support pixel is no
            candidate, and its own score is 0.
        eps: >= 0, at the norms.
        eps_mode: ``"clamp"`` or ``"add"``.

    Returns:
        ``(query_scores, query_index, support_scores, support_index)``: (B, S, Hq, Wq) twice, then (B, S, Hs, Ws) twice.
        Scores in the dtype of the features; indices row * width + column in the other grid, int64, the lowest among
        equals. Score 0 and index -1 where there is no candidate, and at dropped support pixels.

    Differentiable in query and support, twice, at the saved indices. The mask is a constant. A zero vector has the
    cosine 0 and the gradient 0; NaN and Inf in dropped pixels do not count. A vector that holds one gives NaN at its
    own pixel, and at every pixel of the other side that has candidates, there with the index of the lowest such vector.
    A vector whose squared norm leaves the range of float32 (float64 for float64) counts as infinite or zero. B = 0 or
    S = 0 gives empty results. Deterministic.

    Cost: as `dense_cosine_max` without windows.

    Raises:
        TypeError: ``query``, ``support`` or ``mask`` is no tensor or has an unsupported dtype; the features differ in
            dtype outside autocast; ``eps`` is no number, ``eps_mode`` no string.
        ValueError: wrong rank, different batch sizes, shots, channels or devices, no channels or pixels, unknown
            ``eps_mode``, negative or infinite ``eps``.

    Sources: DPNet (Mao et al. 2022), CyCTR (Zhang et al. 2021).

    Example:
        >>> import torch
        >>> query = torch.tensor([[[[3.0, 0.0]], [[4.0, 1.0]]]])
        >>> support = torch.tensor([[[[1.0, 0.0, 0.0]], [[0.0, 0.0, 2.0]]]])
        >>> scores, index, support_scores, support_index = dense_cosine_match(query, support)
        >>> scores, index
        (tensor([[[[0.8000, 1.0000]]]]), tensor([[[[2, 2]]]]))
        >>> support_scores, support_index
        (tensor([[[[0.6000, 0.0000, 1.0000]]]]), tensor([[[[0, 0, 1]]]]))
    """
    query, support, mask, shots, eps = checked_inputs("dense_cosine_match", query, support, mask, eps, eps_mode)
    results = call_match(query, support, mask, eps, eps_mode)
    query_scores, support_scores, query_index, support_index = (
        r.unflatten(0, (query.shape[0], shots)) for r in results
    )
    return query_scores, query_index, support_scores, support_index
