"""Per-sample depthwise convolution: every episode brings its own kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fss_kernels import _checks
from fss_kernels.ops.dynamic_conv2d.op import call

_NAME = "dynamic_conv2d"
_LARGEST = 9


def dynamic_conv2d(x: Tensor, kernels: Tensor | Sequence[Tensor], *, merge: bool = False) -> Tensor:
    """Depthwise convolution of every sample with kernels of its own, several branches in one read of the features.

    ``out[b, l*C + c, y, z] = sum_ij kernels[l][b,c,i,j] * x[b, c, y + i - kh//2, z + j - kw//2]`` with zeros outside x:
    cross-correlation, stride 1, "same" padding.

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 or float64 (CPU). Contiguous and channels_last are read in place,
            and so are slices of either; other strides are copied.
        kernels: (B, C, kh, kw), or a sequence of L of them with sizes of their own; kh and kw odd, 1 ... 9; the dtype
            of x (under autocast all are promoted to the widest). Any strides.
        merge: return the sum of the branches. The kernels are added first, so it costs one branch, not L.

    Returns:
        (B, L*C, H, W), branch after branch, or (B, C, H, W) with ``merge``, in the dtype and memory format of x.

    Differentiable in x and every kernel, twice. B = 0 gives an empty result. A NaN or Inf in x reaches the outputs
    whose window holds it, also under a weight of 0, as in a convolution. Deterministic.

    Cost: B*C*H*W elements read once and L times as many written; 2*B*C*H*W*sum(kh*kw) flops (the union of the kernels
    with ``merge``); extra memory: the kernels once more, in float32. The backward reads x and the gradient once for
    all gradients.

    Raises:
        TypeError: ``x`` or a kernel is no tensor or has an unsupported or another dtype, ``kernels`` is no sequence,
            ``merge`` no bool.
        ValueError: wrong rank, another batch size, channel count or device, even sizes or sizes above 9, no kernels,
            no channels or pixels.

    Source: DPCN (Liu et al. 2022), dynamic convolution module, with 5x1, 1x5 and 5x5 kernels.

    Example:
        >>> import torch
        >>> x = torch.arange(5.0).view(1, 1, 1, 5)
        >>> dynamic_conv2d(x, torch.tensor([[[[1.0, 0.0, -1.0]]]]))
        tensor([[[[-1., -2., -2., -2.,  3.]]]])
    """
    if isinstance(kernels, Tensor):
        kernels = (kernels,)
    _checks.tensor(_NAME, "x", x, {4: "(B, C, H, W)"}, _checks.FEATURE_DTYPES)
    _checks.not_empty(_NAME, "x", x, slice(1, 4), "channels or pixels")
    _checks.sequence(_NAME, "kernels", kernels, "kernel", "a torch.Tensor or a sequence of them")
    names = [f"kernels[{i}]" for i in range(len(kernels))] if len(kernels) > 1 else ["kernels"]
    for name, kernel in zip(names, kernels, strict=True):
        _checks.tensor(_NAME, name, kernel, {4: "(B, C, kh, kw)"}, _checks.FEATURE_DTYPES)
        _checks.same_device(_NAME, name, kernel, "x", x)
        _checks.same_batch(_NAME, name, kernel, "x", x)
        _checks.same_channels(_NAME, name, kernel, "x", x)
        _checks.odd(_NAME, name, kernel.shape[2:], _LARGEST)
    _checks.boolean(_NAME, "merge", merge)
    x, *kernels = _checks.one_dtype(_NAME, {"x": x, **dict(zip(names, kernels, strict=True))})
    return call(x, kernels, merge)
