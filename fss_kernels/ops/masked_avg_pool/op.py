"""fss::masked_avg_pool_fwd and _bwd: schema, fake, vmap, autograd, backends.

Autocast needs no rule: there is one feature tensor, the mask keeps its dtype and sums are float32 anyway.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fss_kernels import _autograd, _library
from fss_kernels._batching import fold, unfold
from fss_kernels.ops.masked_avg_pool import reference

_OPTIONS = "float eps, str resize, bool align_corners"

op = _library.Op(
    name="masked_avg_pool",
    tensors=2,
    outputs=1,
    forward_schema=f"(Tensor features, Tensor mask, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    backward_schema=(
        f"(Tensor grad, Tensor features, Tensor mask, Tensor resized, Tensor area, {_OPTIONS}, "
        "bool need_features, bool need_mask) -> (Tensor, Tensor)"
    ),
    # pooling is linear in the features: only the gradient to the mask reads them
    reads=lambda needs: (0, 1) if needs[1] else (1,),
)


def _dense_backward(*args: Any) -> tuple[Tensor, Tensor]:
    """The reference with its feature gradient in the features' memory format, as the kernels write it."""
    grad_features, grad_mask = reference.masked_avg_pool_bwd(*args)
    if grad_features.ndim == 4:
        grad_features = _library.empty_rows_like(args[1]).copy_(grad_features)
    return grad_features, grad_mask.contiguous()


op.backends["reference"] = _library.Backend(reference.masked_avg_pool_fwd, _dense_backward)
op.add_compiled("cpp")
op.add_compiled("cuda")
op.add_triton("fss_kernels.ops.masked_avg_pool.triton_kernels")


def _fwd_fake(features: Tensor, mask: Tensor, eps: float, resize: str, align_corners: bool) -> tuple[Tensor, ...]:
    batch, masks = mask.shape[:2]
    dtype = _library.accumulate_dtype(features)
    return (
        features.new_empty(batch, masks, features.shape[1]),
        features.new_empty((batch, masks, *features.shape[2:]), dtype=dtype),
        features.new_empty((batch, masks), dtype=dtype),
    )


def _bwd_fake(grad: Tensor, features: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_features, need_mask = rest[-2:]
    return (
        _library.empty_rows_like(features) if need_features else features.new_empty(0),
        mask.new_empty(mask.shape) if need_mask else mask.new_empty(0),
    )


op.register_fake(_fwd_fake, _bwd_fake)


def _fwd_vmap(info: Any, in_dims: tuple[Any, ...], features: Tensor, mask: Tensor, *options: Any) -> Any:
    size = info.batch_size
    if in_dims[0] is None:  # one feature map, many masks: still one read of the features
        results = op.fwd(features, fold(mask, in_dims[1], size, 1), *options)
        return tuple(unfold(r, size, 1) for r in results), (1, 1, 1)
    results = op.fwd(fold(features, in_dims[0], size, 0), fold(mask, in_dims[1], size, 0), *options)
    return tuple(unfold(r, size, 0) for r in results), (0, 0, 0)


def _bwd_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size = info.batch_size
    tensors = [fold(t, dim, size, 0) for t, dim in zip(args[:5], in_dims[:5], strict=True)]
    gradients = op.bwd(*tensors, *args[5:])
    needs = args[-2:]
    folded = tuple(unfold(g, size, 0) if need else g for g, need in zip(gradients, needs, strict=True))
    return folded, tuple(0 if need else None for need in needs)


op.register_vmap(_fwd_vmap, _bwd_vmap)


def _formula(
    features: Tensor, mask: Tensor, resized: Tensor, area: Tensor, eps: float, resize: str, align_corners: bool
) -> Tensor:
    return reference.masked_avg_pool_reference(features, mask, eps, resize, align_corners)


call = _autograd.differentiable(op, _formula)
