"""Hypercorrelation: the cosine of every query pixel with every support pixel, kept as a 4-D correlation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from fss_kernels import _checks
from fss_kernels._library import accumulate_dtype
from fss_kernels.ops.hypercorrelation.op import call

_FEATURES = {4: "(B, C, H, W)"}
_MASK = {3: "(B, h, w)"}


def _checked(
    op: str, queries: dict[str, Tensor], supports: dict[str, Tensor], mask: Tensor | None, **options: object
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Queries and supports, by name, in one dtype, and the mask, all valid."""
    first_name, first = next(iter(queries.items()))
    pairs = list(zip(queries.items(), supports.items(), strict=True))
    for name, value in (argument for pair in pairs for argument in pair):
        _checks.tensor(op, name, value, _FEATURES, _checks.FEATURE_DTYPES)
        _checks.not_empty(op, name, value, slice(1, 4), "channels or pixels")
    features = _checks.one_dtype(op, {**queries, **supports})
    for (name, query), (support_name, support) in pairs:
        if query is not first:
            _checks.same_device(op, name, query, first_name, first)
            _checks.same_batch(op, name, query, first_name, first)
        _checks.same_device(op, support_name, support, name, query)
        _checks.same_batch(op, support_name, support, name, query)
        _checks.same_channels(op, support_name, support, name, query)
    if mask is None:
        mask = first.new_ones((1, 1, 1), dtype=accumulate_dtype(first)).expand(first.shape[0], 1, 1)
    else:
        _checks.tensor(op, "mask", mask, _MASK, _checks.MASK_DTYPES)
        _checks.same_device(op, "mask", mask, first_name, first)
        _checks.same_batch(op, "mask", mask, first_name, first)
        _checks.not_empty(op, "mask", mask, slice(1, 3), "pixels")
    _checks.one_of(op, "eps_mode", options["eps_mode"], ("add", "clamp"))
    _checks.boolean(op, "clamp", options["clamp"])
    return features[: len(queries)], features[len(queries) :], mask.detach()


def hypercorrelation(
    query: Tensor,
    support: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-5,
    eps_mode: str = "add",
    clamp: bool = True,
) -> Tensor:
    """Cosines of every query pixel with every pixel of the masked support, the negative ones set to 0.

    ``out[b,i,j] = max(q[b,:,i] . s[b,:,j] / ((|q_i| + eps) (|s_j| + eps)), 0)``, with ``s`` the support times the mask
    resized to its grid, i over the Ha*Wa query pixels and j over the Hb*Wb support pixels.

    Args:
        query: (B, C, Ha, Wa), float32, bfloat16, float16 or float64 (CPU). Contiguous and channels_last are read in
            place, and so are slices of either; other strides are copied.
        support: (B, C, Hb, Wb), the dtype of query (under autocast both take the wider one). Layouts as for query.
        mask: (B, h, w), bool, uint8 or floating, usually 0 ... 1, any size; resized bilinearly with aligned corners.
            Used in float32 (float64 with float64 features). None: no mask.
        eps: >= 0, at the norms.
        eps_mode: ``"add"``: a vector is divided by its norm + eps (HSNet, VAT); ``"clamp"``: by max(norm, eps), as in
            ``torch.nn.functional.cosine_similarity``.
        clamp: whether negative cosines become 0.

    Returns:
        (B, Ha, Wa, Hb, Wb), contiguous, in the dtype of the features.

    Differentiable in query and support, twice. The mask is a constant: a cosine does not change with the length of a
    vector. Where the output is 0 by the clamp there is no gradient. A zero vector, such as one under mask 0, has cosine
    0 and gradient 0. NaN or Inf where the resized mask is 0 does not count; elsewhere a query or support vector that
    holds one gives NaN at all its pairs. A feature vector whose squared norm leaves the range of float32 (float64 for
    float64) counts as infinite or zero. B = 0 gives an empty result. Deterministic.

    Cost: B*C*(Ha*Wa + Hb*Wb) elements read, B*Ha*Wa*Hb*Wb written, 2*C flops an output; support pixels of mask 0 that
    lie together cost nothing. Extra memory: the packed support in float32 (of as many samples as fit 16 MB, at least
    one), and 1 bit an output for the gradients.

    Raises:
        TypeError: ``query``, ``support`` or ``mask`` is no tensor or has an unsupported dtype; the features differ in
            dtype outside autocast; ``eps`` is no number, ``eps_mode`` no string, ``clamp`` no bool.
        ValueError: wrong rank, different batch sizes, channels or devices, no channels or pixels, negative or infinite
            ``eps``, unknown ``eps_mode``.

    Sources: HSNet, "Hypercorrelation Squeeze" (Min et al. 2021); VAT (Hong et al. 2022).

    Example:
        >>> import torch
        >>> query = torch.tensor([[[[3.0]], [[4.0]]]])
        >>> support = torch.tensor([[[[1.0, -1.0, 0.0]], [[0.0, 0.0, 2.0]]]])
        >>> hypercorrelation(query, support, eps=0.0)
        tensor([[[[[0.6000, 0.0000, 0.8000]]]]])
    """
    op = "hypercorrelation"
    queries, supports, mask = _checked(op, {"query": query}, {"support": support}, mask, eps_mode=eps_mode, clamp=clamp)
    eps = _checks.non_negative(op, "eps", eps)
    return call(queries, supports, mask, eps, eps_mode, clamp).squeeze(1)


def hypercorrelation_pyramid(
    queries: Sequence[Tensor],
    supports: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    levels: Sequence[int],
    eps: float = 1e-5,
    eps_mode: str = "add",
    clamp: bool = True,
) -> list[Tensor]:
    """`hypercorrelation` of every pair of layers, written straight into one stacked tensor per level.

    Args:
        queries: N layers (B, C, Ha, Wa), each with its own C; the layers of a level share their grid. Dtypes and
            layouts as in `hypercorrelation`, one dtype for all.
        supports: N layers (B, C, Hb, Wb), each with the channels of its query layer; grids as for queries.
        mask: (B, h, w) or None, as in `hypercorrelation`, for all layers.
        levels: how many layers, in the order of the lists, make a level; they add up to N. (4, 6, 3) for the last
            three stages of a ResNet-50.
        eps: as in `hypercorrelation`, and so are ``eps_mode`` and ``clamp``.

    Returns:
        One (B, L, Ha, Wa, Hb, Wb) a level, contiguous, in the dtype of the features, L the level's layers.

    Differentiable in all queries and supports, twice; everything else as in `hypercorrelation`.

    Cost: that of `hypercorrelation` for every layer; nothing is copied to be stacked. Extra memory: the largest packed
    support of a layer, and 1 bit an output for the gradients.

    Raises:
        TypeError: ``queries`` or ``supports`` is no sequence, ``levels`` no sequence of int; a layer, the mask or an
            option as in `hypercorrelation`; layers differ in dtype outside autocast.
        ValueError: no layers, not as many supports as queries, ``levels`` that do not add up to their number, layers of
            one level on different grids; otherwise as in `hypercorrelation`.

    Source: HSNet, "Hypercorrelation Squeeze" (Min et al. 2021), the pyramid of correlations of `Correlation`.

    Example:
        >>> import torch
        >>> layers = [torch.ones(1, 8, 4, 4), torch.ones(1, 8, 4, 4), torch.ones(1, 16, 2, 2)]
        >>> [tuple(level.shape) for level in hypercorrelation_pyramid(layers, layers, levels=(2, 1))]
        [(1, 2, 4, 4, 4, 4), (1, 1, 2, 2, 2, 2)]
    """
    op = "hypercorrelation_pyramid"
    for name, layers in (("queries", queries), ("supports", supports)):
        _checks.sequence(op, name, layers, "layer")
    if len(queries) != len(supports):
        raise ValueError(f"{op}: supports must be as many as queries, {len(queries)}, got {len(supports)}")
    _checks.partition(op, "levels", levels, "queries", len(queries))
    named = {n: {f"{n}[{i}]": x for i, x in enumerate(xs)} for n, xs in (("queries", queries), ("supports", supports))}
    queries, supports, mask = _checked(op, named["queries"], named["supports"], mask, eps_mode=eps_mode, clamp=clamp)
    eps = _checks.non_negative(op, "eps", eps)
    starts = list(itertools.accumulate(levels, initial=0))
    for start, end in itertools.pairwise(starts):
        for name, layers in (("queries", queries), ("supports", supports)):
            for i in range(start + 1, end):
                _checks.same_grid(op, f"{name}[{i}]", layers[i], f"{name}[{start}]", layers[start])
    return [call(queries[i:j], supports[i:j], mask, eps, eps_mode, clamp) for i, j in itertools.pairwise(starts)]
