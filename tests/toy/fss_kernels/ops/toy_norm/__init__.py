"""Features divided by the root of their mean square: an op for the test of how an op is added."""

from __future__ import annotations

from torch import Tensor

from fss_kernels import _checks
from fss_kernels.ops.toy_norm.op import call

_NAME = "toy_norm"


def toy_norm(features: Tensor, gain: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Every pixel's vector divided by the root of its mean square, times a gain per channel.

    ``out[b,c,n] = gain[b,c] x[b,c,n] / sqrt(sum_k x[b,k,n]^2 / C + eps)``, ``x = features``, n over the H*W pixels.

    Args:
        features: (B, C, H, W), float32, bfloat16, float16 or float64 (CPU). Contiguous and channels_last are read in
            place, and so are slices of either; other strides are copied.
        gain: (B, C), the dtype of the features. Under autocast two dtypes are promoted to the wider one.
        eps: added to the mean square, >= 0.

    Returns:
        (B, C, H, W), in the dtype and the memory format of the features.

    Differentiable in features and gain, twice. A zero vector stays zero where eps > 0. B = 0 gives an empty result.

    Cost: 2*B*C*H*W elements moved; extra memory B*H*W floats, which the backward uses.

    Raises:
        TypeError: ``features`` or ``gain`` is no tensor or has an unsupported dtype; their dtypes differ; ``eps`` is no
            number.
        ValueError: wrong rank, different batch sizes, channels or devices, no channels or pixels, negative or infinite
            ``eps``.

    Source: RMSNorm (Zhang and Sennrich 2019).

    Example:
        >>> import torch
        >>> toy_norm(torch.tensor([[[[3.0]], [[4.0]]]]), torch.ones(1, 2), eps=0.0).flatten()
        tensor([0.8485, 1.1314])
    """
    _checks.tensor(_NAME, "features", features, {4: "(B, C, H, W)"}, _checks.FEATURE_DTYPES)
    _checks.tensor(_NAME, "gain", gain, {2: "(B, C)"}, _checks.FEATURE_DTYPES)
    _checks.same_device(_NAME, "gain", gain, "features", features)
    features, gain = _checks.one_dtype(_NAME, {"features": features, "gain": gain})
    _checks.same_batch(_NAME, "gain", gain, "features", features)
    _checks.not_empty(_NAME, "features", features, slice(1, 4), "channels or pixels")
    _checks.same_channels(_NAME, "gain", gain, "features", features)
    return call(features, gain, _checks.non_negative(_NAME, "eps", eps))
