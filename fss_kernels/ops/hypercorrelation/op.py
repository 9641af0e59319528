"""fss::hypercorrelation_fwd and _bwd: schema, fake, vmap, autograd, backends.

The mask is an input without a gradient: a cosine does not change with the length of a vector. No mask is the mask of
one pixel with the value 1. Two feature dtypes are promoted by the public function under autocast, before the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fss_kernels import _autograd, _library
from fss_kernels.ops.hypercorrelation import reference

_OPTIONS = "float eps, str eps_mode, bool clamp"

op = _library.Op(
    name="hypercorrelation",
    tensors=3,
    outputs=1,
    forward_schema=(
        f"(Tensor query, Tensor support, Tensor mask, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    backward_schema=(
        "(Tensor grad, Tensor query, Tensor support, Tensor mask, Tensor query_norm, Tensor support_norm, "
        f"Tensor weights, Tensor signs, {_OPTIONS}, bool need_query, bool need_support, bool need_mask) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    reads=lambda needs: (0, 1),  # of the mask only the resized one, which is saved
)


def _dense_forward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(result.contiguous() for result in reference.hypercorrelation_fwd(*args))


def _dense_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The reference with its gradients in the memory format of their features, as the kernels write them."""
    *gradients, grad_mask = reference.hypercorrelation_bwd(*args)
    dense = [
        _library.empty_rows_like(x).copy_(g) if g.ndim == 4 else g for g, x in zip(gradients, args[1:3], strict=True)
    ]
    return dense[0], dense[1], grad_mask


op.backends["reference"] = _library.Backend(_dense_forward, _dense_backward)
op.add_compiled("cpp")
op.add_triton("fss_kernels.ops.hypercorrelation.triton_kernels")


def _fwd_fake(
    query: Tensor, support: Tensor, mask: Tensor, eps: float, eps_mode: str, clamp: bool
) -> tuple[Tensor, ...]:
    batch, dtype = query.shape[0], _library.accumulate_dtype(query)
    (ha, wa), (hb, wb) = query.shape[2:], support.shape[2:]
    return (
        query.new_empty((batch, ha, wa, hb, wb)),
        query.new_empty((batch, ha, wa), dtype=dtype),
        query.new_empty((batch, hb, wb), dtype=dtype),
        query.new_empty((batch, hb, wb), dtype=dtype),
        query.new_empty((batch, ha * wa, (hb * wb + 7) // 8 if clamp else 0), dtype=torch.uint8),
    )


def _bwd_fake(grad: Tensor, query: Tensor, support: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_query, need_support, _ = rest[-3:]
    return (
        _library.empty_rows_like(query) if need_query else query.new_empty(0),
        _library.empty_rows_like(support) if need_support else support.new_empty(0),
        mask.new_empty(0),
    )


op.register_fake(_fwd_fake, _bwd_fake)


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Merges the mapped dimension (expanded when there is none) into the batch."""
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    return tensor.unflatten(0, (size, tensor.shape[0] // size))


def _fwd_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size = info.batch_size
    folded = [_fold(t, dim, size) for t, dim in zip(args[:3], in_dims[:3], strict=True)]
    results = op.fwd(*folded, *args[3:])
    return tuple(_unfold(r, size) for r in results), (0,) * len(results)


def _bwd_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size = info.batch_size
    folded = [_fold(t, dim, size) for t, dim in zip(args[:8], in_dims[:8], strict=True)]
    *gradients, grad_mask = op.bwd(*folded, *args[8:])
    needs = args[-3:-1]
    unfolded = [_unfold(g, size) if need else g for g, need in zip(gradients, needs, strict=True)]
    return (*unfolded, grad_mask), (*(0 if need else None for need in needs), None)


op.register_vmap(_fwd_vmap, _bwd_vmap)


def _formula(
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    query_norm: Tensor,
    support_norm: Tensor,
    weights: Tensor,
    signs: Tensor,
    eps: float,
    eps_mode: str,
    clamp: bool,
) -> Tensor:
    return reference.correlate(query, support, weights, eps, eps_mode, clamp)


call = _autograd.differentiable(op, _formula)
