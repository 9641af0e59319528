"""Hypercorrelation: the cosine of every query pixel with every support pixel, kept as a 4-D correlation."""

from __future__ import annotations

from torch import Tensor

from fss_kernels import _checks
from fss_kernels._library import accumulate_dtype
from fss_kernels.ops.hypercorrelation.op import call

_NAME = "hypercorrelation"
_FEATURES = {4: "(B, C, H, W)"}
_MASK = {3: "(B, h, w)"}


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
    holds one, or whose norm overflows, gives NaN at all its pairs. B = 0 gives an empty result. Deterministic.

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
    for name, value in (("query", query), ("support", support)):
        _checks.tensor(_NAME, name, value, _FEATURES, _checks.FEATURE_DTYPES)
        _checks.not_empty(_NAME, name, value, slice(1, 4), "channels or pixels")
    query, support = _checks.one_dtype(_NAME, {"query": query, "support": support})
    _checks.same_device(_NAME, "support", support, "query", query)
    _checks.same_batch(_NAME, "support", support, "query", query)
    if query.shape[1] != support.shape[1]:
        raise ValueError(f"{_NAME}: support must have the channels of query, {query.shape[1]}, got {support.shape[1]}")
    if mask is None:
        mask = query.new_ones((1, 1, 1), dtype=accumulate_dtype(query)).expand(query.shape[0], 1, 1)
    else:
        _checks.tensor(_NAME, "mask", mask, _MASK, _checks.MASK_DTYPES)
        _checks.same_device(_NAME, "mask", mask, "query", query)
        _checks.same_batch(_NAME, "mask", mask, "query", query)
        _checks.not_empty(_NAME, "mask", mask, slice(1, 3), "pixels")
    eps = _checks.non_negative(_NAME, "eps", eps)
    _checks.one_of(_NAME, "eps_mode", eps_mode, ("add", "clamp"))
    _checks.boolean(_NAME, "clamp", clamp)
    return call(query, support, mask.detach(), eps, eps_mode, clamp)
