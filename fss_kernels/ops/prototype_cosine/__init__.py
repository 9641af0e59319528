"""Cosine of every pixel with every prototype: the score maps of prototype networks."""

from __future__ import annotations

from torch import Tensor

from fss_kernels import _checks
from fss_kernels._cosine import EPS_MODES
from fss_kernels.ops.prototype_cosine.op import call

_NAME = "prototype_cosine"
_FEATURES = {4: "(B, C, H, W)"}
_PROTOTYPES = {3: "(B, P, C)", 2: "(P, C)"}


def prototype_cosine(
    features: Tensor,
    prototypes: Tensor,
    *,
    scale: float = 1.0,
    eps: float = 1e-8,
    eps_mode: str = "clamp",
) -> Tensor:
    """Cosine similarity of every pixel with every prototype, times a scale.

    ``out[b,p,n] = scale * sum_c x[c] * w[c] / (N(|x|) * N(|w|))`` with ``x = features[b,:,n]``,
    ``w = prototypes[b,p,:]`` and n running over the H*W pixels. ``N(t) = max(t, eps)`` for ``eps_mode="clamp"``,
    ``t + eps`` for ``"add"``.

    Args:
        features: (B, C, H, W), float32, bfloat16, float16 or float64 (CPU). Contiguous and channels_last are read in
            place, and so are slices of either; other strides are copied.
        prototypes: (B, P, C), or (P, C) for prototypes that all samples share; the dtype of the features. Under
            autocast two dtypes are promoted to the wider one.
        scale: factor of the cosines, finite. 20 in PANet, 10 in SSP.
        eps: smallest norm to divide by, or what is added to every norm, >= 0.
        eps_mode: ``"clamp"`` (as ``torch.nn.functional.cosine_similarity``) or ``"add"``.

    Returns:
        (B, P, H, W), contiguous, in the dtype of the features.

    Differentiable in features and prototypes, twice. A zero vector has the cosine 0 and the gradient 0, a pixel or a
    prototype whose norm is NaN or infinite the cosine NaN everywhere it takes part; a vector whose squared norm leaves
    the range of float32 (float64 for float64) counts as infinite or zero. B = 0 or P = 0 gives an empty result.
    Deterministic.

    Cost: B*C*H*W elements read once for all maps and the norms, 2*(P+1) flops each; extra memory B*(P+1)*H*W floats,
    which the backward uses (it reads the features once more, for both gradients). P*C floats for normalised prototypes.

    Raises:
        TypeError: ``features`` or ``prototypes`` is no tensor, has an unsupported dtype or another one than the other;
            ``scale`` or ``eps`` is no number, ``eps_mode`` no string.
        ValueError: wrong rank, different batch sizes, channels or devices, no channels or pixels, ``scale`` not
            finite, negative or infinite ``eps``, unknown ``eps_mode``.

    Sources: PANet (Wang et al. 2019), SSP (Fan et al. 2022).

    Example:
        >>> import torch
        >>> features = torch.tensor([[[[3.0, 0.0]], [[4.0, 2.0]]]])
        >>> prototype_cosine(features, torch.tensor([[0.0, 1.0]]), scale=10.0)
        tensor([[[[ 8., 10.]]]])
    """
    _checks.tensor(_NAME, "features", features, _FEATURES, _checks.FEATURE_DTYPES)
    _checks.tensor(_NAME, "prototypes", prototypes, _PROTOTYPES, _checks.FEATURE_DTYPES)
    _checks.same_device(_NAME, "prototypes", prototypes, "features", features)
    features, prototypes = _checks.one_dtype(_NAME, {"features": features, "prototypes": prototypes})
    if prototypes.ndim == 3:
        _checks.same_batch(_NAME, "prototypes", prototypes, "features", features)
    _checks.not_empty(_NAME, "features", features, slice(1, 4), "channels or pixels")
    if prototypes.shape[-1] != features.shape[1]:
        raise ValueError(
            f"{_NAME}: prototypes must have the channels of features, {features.shape[1]}, got {prototypes.shape[-1]}"
        )
    scale = _checks.finite(_NAME, "scale", scale)
    eps = _checks.non_negative(_NAME, "eps", eps)
    _checks.one_of(_NAME, "eps_mode", eps_mode, EPS_MODES)
    return call(features, prototypes if prototypes.ndim == 3 else prototypes.unsqueeze(0), scale, eps, eps_mode)
