"""Masked average pooling: a class prototype from features and a mask."""

from __future__ import annotations

from torch import Tensor

from fss_kernels import _checks
from fss_kernels.ops.masked_avg_pool.op import call

_NAME = "masked_avg_pool"
_FEATURES = {4: "(B, C, H, W)"}
_MASK = {4: "(B, M, h, w)", 3: "(B, h, w)"}


def masked_avg_pool(
    features: Tensor,
    mask: Tensor,
    *,
    eps: float = 5e-4,
    resize: str = "bilinear",
    align_corners: bool = True,
) -> Tensor:
    """Average of the features under each mask, the prototype of few-shot segmentation.

    ``out[b,m,c] = sum_n r[b,m,n] * features[b,c,n] / (sum_n r[b,m,n] + eps)``, with ``r`` the mask resized to the
    feature grid and n running over its H*W pixels.

    Args:
        features: (B, C, H, W), float32, bfloat16, float16 or float64 (CPU). Contiguous and channels_last are read in
            place, and so are slices of either; other strides are copied.
        mask: (B, M, h, w), or (B, h, w) for one mask a sample; bool, uint8 or floating, usually 0 ... 1, any size.
            Used in float32 (float64 with float64 features).
        eps: added to the mask's area in pixels of the feature grid, >= 0. 5e-4 in PFENet and its descendants, 1e-5 in
            SSP and PANet.
        resize: ``"bilinear"`` (no antialias), ``"nearest"`` (the pixel floor(i*h/H), as PyTorch's ``"nearest"``), or
            ``"adjoint"``: the pooling that upsampling the features bilinearly to (h, w) and pooling there would give
            (PANet; with ``align_corners=False, eps=1e-5``), without the upsampled tensor; area is then that of the
            mask, in its own pixels.
        align_corners: of the bilinear resize, as in ``torch.nn.functional.interpolate``. Ignored by ``"nearest"``.

    Returns:
        (B, M, C), or (B, C) for a (B, h, w) mask, in the dtype of the features.

    Differentiable in features and mask (floating masks), twice. All-zero mask: 0 and gradient 0 to the features; the
    gradient to the mask is the formula's. With ``eps=0`` it is 0 as well. NaN or Inf in the features where the
    resized mask is 0 does not count. B = 0 or M = 0 gives an empty result. Deterministic.

    Cost: B*C*H*W elements read once for all masks, 2*B*M*C*H*W flops; extra memory B*M*H*W floats. Where no mask has
    weight, features are not read.

    Raises:
        TypeError: ``features`` or ``mask`` is no tensor or has an unsupported dtype; ``eps`` is no number,
            ``resize`` no string, ``align_corners`` no bool.
        ValueError: wrong rank, different batch sizes or devices, no channels or pixels, negative or infinite ``eps``,
            unknown ``resize``.

    Sources: SG-One (Zhang et al. 2018); PFENet, "Weighted GAP" (Tian et al. 2020); PANet (Wang et al. 2019), the
    adjoint form.

    Example:
        >>> import torch
        >>> features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> foreground = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
        >>> masked_avg_pool(features, foreground, eps=0.0)
        tensor([[3.5000]])
    """
    _checks.tensor(_NAME, "features", features, _FEATURES, _checks.FEATURE_DTYPES)
    _checks.tensor(_NAME, "mask", mask, _MASK, _checks.MASK_DTYPES)
    _checks.same_device(_NAME, "mask", mask, "features", features)
    _checks.same_batch(_NAME, "mask", mask, "features", features)
    _checks.not_empty(_NAME, "features", features, slice(1, 4), "channels or pixels")
    _checks.not_empty(_NAME, "mask", mask, slice(-2, None), "pixels")
    eps = _checks.non_negative(_NAME, "eps", eps)
    _checks.one_of(_NAME, "resize", resize, ("bilinear", "nearest", "adjoint"))
    _checks.boolean(_NAME, "align_corners", align_corners)
    if mask.ndim == 3:
        return call(features, mask.unsqueeze(1), eps, resize, align_corners).squeeze(1)
    return call(features, mask, eps, resize, align_corners)
