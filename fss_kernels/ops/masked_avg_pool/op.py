"""fss::masked_avg_pool_fwd and _bwd.

Autocast needs no rule: there is one feature tensor, the mask keeps its dtype and sums are float32 anyway.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fss_kernels._batching import fold, forward_rule, unfold
from fss_kernels._layout import accumulate_dtype
from fss_kernels._op import Op
from fss_kernels.ops.masked_avg_pool import reference


def _fake(call: Any) -> tuple[Tensor, ...]:
    features, (batch, masks) = call.features, call.mask.shape[:2]
    dtype = accumulate_dtype(features)
    return (
        features.new_empty(batch, masks, features.shape[1]),
        features.new_empty((batch, masks, *features.shape[2:]), dtype=dtype),
        features.new_empty((batch, masks), dtype=dtype),
    )


def _formula(call: Any) -> Tensor:
    return reference.masked_avg_pool_reference(call.features, call.mask, call.eps, call.resize, call.align_corners)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    of_features, of_mask = in_dims[:2]
    if of_features is not None:
        return forward_rule(op)(info, in_dims, *args)
    features, mask, *options = args  # one feature map, many masks: still one read of the features
    results = op.fwd(features, fold(mask, of_mask, info.batch_size, 1), *options)
    return tuple(unfold(r, info.batch_size, 1) for r in results), (1, 1, 1)


op = Op(
    "masked_avg_pool(Tensor features, Tensor mask, float eps, str resize, bool align_corners)"
    " -> (Tensor prototypes, Tensor resized, Tensor area)",
    saved=("resized", "area"),
    differentiable=("features", "mask"),
    # pooling is linear in the features: only the gradient to the mask reads them
    reads={"features": ("mask",), "mask": ("features", "mask")},
    maps=("features",),
    fake=_fake,
    formula=_formula,
    vmap_forward=_vmap,
)
op.add_formulas("reference", reference.masked_avg_pool_fwd, reference.masked_avg_pool_bwd)
op.add_compiled("cpp")
op.add_compiled("cuda")
op.add_triton("fss_kernels.ops.masked_avg_pool.triton_kernels")
call = op.call
