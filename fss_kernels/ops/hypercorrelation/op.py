"""fss::hypercorrelation_fwd and _bwd: schema, fake, vmap, autograd, backends.

One call is one level of a pyramid: L layers whose grids agree, stacked in the output; a single layer is a level of
one. The mask is an input without a gradient: a cosine does not change with the length of a vector. No mask is the mask
of one pixel with the value 1. Dtypes are promoted by the public functions under autocast, before the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fss_kernels import _autograd, _library
from fss_kernels._batching import fold, unfold
from fss_kernels.ops.hypercorrelation import reference

_OPTIONS = "float eps, str eps_mode, bool clamp"

op = _library.Op(
    name="hypercorrelation",
    tensors=3,
    outputs=1,
    forward_schema=(
        f"(Tensor[] queries, Tensor[] supports, Tensor mask, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    backward_schema=(
        "(Tensor grad, Tensor[] queries, Tensor[] supports, Tensor mask, Tensor query_norms, Tensor support_norms, "
        f"Tensor weights, Tensor signs, {_OPTIONS}, bool[] need_queries, bool[] need_supports, bool need_mask) "
        "-> (Tensor[], Tensor[], Tensor)"
    ),
    reads=lambda needs: range(len(needs) - 1),  # of the mask only the resized one, which is saved
    lists=(0, 1),
)


def _dense_forward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(result.contiguous() for result in reference.hypercorrelation_fwd(*args))


def _dense_backward(*args: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The reference with its gradients in the memory format of their features, as the kernels write them."""
    grads = reference.hypercorrelation_bwd(*args)
    queries, supports = (
        [_library.empty_rows_like(x).copy_(g) if g.ndim == 4 else g for g, x in zip(gs, xs, strict=True)]
        for gs, xs in zip(grads[:2], args[1:3], strict=True)
    )
    return queries, supports, grads[2]


op.backends["reference"] = _library.Backend(_dense_forward, _dense_backward)
op.add_compiled("cpp")
op.add_triton("fss_kernels.ops.hypercorrelation.triton_kernels")


def _fwd_fake(
    queries: Sequence[Tensor], supports: Sequence[Tensor], mask: Tensor, eps: float, eps_mode: str, clamp: bool
) -> tuple[Tensor, ...]:
    query, layers = queries[0], len(queries)
    batch, dtype = query.shape[0], _library.accumulate_dtype(query)
    (ha, wa), (hb, wb) = query.shape[2:], supports[0].shape[2:]
    return (
        query.new_empty((batch, layers, ha, wa, hb, wb)),
        query.new_empty((layers, batch, ha, wa), dtype=dtype),
        query.new_empty((layers, batch, hb, wb), dtype=dtype),
        query.new_empty((batch, hb, wb), dtype=dtype),
        query.new_empty((layers, batch, ha * wa, (hb * wb + 7) // 8 if clamp else 0), dtype=torch.uint8),
    )


def _bwd_fake(
    grad: Tensor, queries: Sequence[Tensor], supports: Sequence[Tensor], mask: Tensor, *rest: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    *_, need_queries, need_supports, _ = rest
    to_queries, to_supports = (
        [_library.empty_rows_like(x) if need else x.new_empty(0) for x, need in zip(xs, needs, strict=True)]
        for xs, needs in ((queries, need_queries), (supports, need_supports))
    )
    return to_queries, to_supports, mask.new_empty(0)


op.register_fake(_fwd_fake, _bwd_fake)


def _fold_lists(size: int, lists: Sequence[Any], dims: Sequence[Any]) -> list[list[Tensor]]:
    return [
        [fold(t, d, size) for t, d in zip(tensors, of, strict=True)] for tensors, of in zip(lists, dims, strict=True)
    ]


def _fwd_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size = info.batch_size
    queries, supports = _fold_lists(size, args[:2], in_dims[:2])
    results = op.fwd(queries, supports, fold(args[2], in_dims[2], size), *args[3:])
    dims = 0, 1, 1, 0, 1  # of the batch
    return tuple(unfold(r, size, d) for r, d in zip(results, dims, strict=True)), dims


def _bwd_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size = info.batch_size
    queries, supports = _fold_lists(size, args[1:3], in_dims[1:3])
    grad, mask, weights = (fold(args[i], in_dims[i], size) for i in (0, 3, 6))
    query_norms, support_norms, signs = (fold(args[i], in_dims[i], size, 1) for i in (4, 5, 7))
    *grads, grad_mask = op.bwd(grad, queries, supports, mask, query_norms, support_norms, weights, signs, *args[8:])
    results, dims = [], []
    for gs, needs in zip(grads, args[-3:-1], strict=True):
        results.append([unfold(g, size) if need else g for g, need in zip(gs, needs, strict=True)])
        dims.append([0 if need else None for need in needs])
    return (*results, grad_mask), (*dims, None)


op.register_vmap(_fwd_vmap, _bwd_vmap)


def _formula(
    queries: Sequence[Tensor],
    supports: Sequence[Tensor],
    mask: Tensor,
    query_norms: Tensor,
    support_norms: Tensor,
    weights: Tensor,
    signs: Tensor,
    *options: Any,
) -> Tensor:
    return reference.correlate_level(queries, supports, weights, *options)


call = _autograd.differentiable(op, _formula)
