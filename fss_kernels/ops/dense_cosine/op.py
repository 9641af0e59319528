"""fss::dense_cosine_max and fss::dense_cosine_match, _fwd and _bwd: schemas, fakes, vmap, autograd, backends.

Shots are folded into the first dimension: query (B, C, Hq, Wq), support (N, C, Hs, Ws) and mask (N, h, w) with N = B*S.
The mask only selects, so it is an input without a gradient; no mask is the mask of one pixel with the value 1. Autocast
is settled by the public functions, which promote both features to one dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fss_kernels import _autograd, _library
from fss_kernels._batching import fold, unfold
from fss_kernels.ops.dense_cosine import reference

_TENSORS = "Tensor query, Tensor support, Tensor mask"
_NORMS = "Tensor query_norm, Tensor support_norm"
_MAX_OPTIONS = "int[] windows, str masked, float eps, str eps_mode"
_MATCH_OPTIONS = "float eps, str eps_mode"
_NEEDS = "bool need_query, bool need_support, bool need_mask"

max_op = _library.Op(
    name="dense_cosine_max",
    tensors=3,
    outputs=1,
    forward_schema=f"({_TENSORS}, {_MAX_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema=(
        f"(Tensor grad, {_TENSORS}, Tensor index, {_NORMS}, {_MAX_OPTIONS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)"
    ),
    reads=lambda needs: (0, 1),  # of the mask only which pixels it keeps: the norms of the others are 0
    returned=1,
    folder="dense_cosine",
)
match_op = _library.Op(
    name="dense_cosine_match",
    tensors=3,
    outputs=2,
    forward_schema=f"({_TENSORS}, {_MATCH_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_schema=(
        f"(Tensor grad_query_scores, Tensor grad_support_scores, {_TENSORS}, Tensor query_index, "
        f"Tensor support_index, {_NORMS}, {_MATCH_OPTIONS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)"
    ),
    reads=lambda needs: (0, 1),
    returned=2,
    folder="dense_cosine",
)


def _dense(forward: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *args: tuple(result.contiguous() for result in forward(*args))


def _dense_gradients(op: _library.Op, backward: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The reference with its gradients in the memory format of their features, as the kernels write them."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        *gradients, grad_mask = backward(*args)
        features = args[op.outputs : op.outputs + 2]
        dense = [
            _library.empty_rows_like(x).copy_(g) if g.ndim == 4 else g for g, x in zip(gradients, features, strict=True)
        ]
        return *dense, grad_mask

    return run


def _norms_fake(query: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _library.accumulate_dtype(query)
    return (
        query.new_empty((query.shape[0], *query.shape[2:]), dtype=dtype),
        query.new_empty((support.shape[0], *support.shape[2:]), dtype=dtype),
    )


def _max_fake(
    query: Tensor, support: Tensor, mask: Tensor, windows: Sequence[int], *options: Any
) -> tuple[Tensor, ...]:
    shape = (support.shape[0], len(windows) // 2, *query.shape[2:])
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64), *_norms_fake(query, support)


def _match_fake(query: Tensor, support: Tensor, mask: Tensor, *options: Any) -> tuple[Tensor, ...]:
    shapes = [(support.shape[0], *x.shape[2:]) for x in (query, support)]
    scores = [query.new_empty(shape) for shape in shapes]
    return *scores, *(query.new_empty(shape, dtype=torch.int64) for shape in shapes), *_norms_fake(query, support)


def _backward_fake(op: _library.Op) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, support, mask = args[op.outputs : op.outputs + 3]
        need_query, need_support, _ = args[-3:]
        return (
            _library.empty_rows_like(query) if need_query else query.new_empty(0),
            _library.empty_rows_like(support) if need_support else support.new_empty(0),
            mask.new_empty(0),
        )

    return fake


def _forward_vmap(op: _library.Op) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        folded = [fold(t, dim, info.batch_size) for t, dim in zip(args[:3], in_dims[:3], strict=True)]
        results = op.fwd(*folded, *args[3:])
        return tuple(unfold(r, info.batch_size) for r in results), (0,) * len(results)

    return rule


def _backward_vmap(op: _library.Op) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        count = sum(isinstance(a, Tensor) for a in args)
        folded = [fold(t, dim, info.batch_size) for t, dim in zip(args[:count], in_dims[:count], strict=True)]
        *gradients, grad_mask = op.bwd(*folded, *args[count:])
        needs = args[-3:-1]
        unfolded = [unfold(g, info.batch_size) if need else g for g, need in zip(gradients, needs, strict=True)]
        return (*unfolded, grad_mask), (*(0 if need else None for need in needs), None)

    return rule


for _op, _forward, _backward, _fake in (
    (max_op, reference.dense_cosine_max_fwd, reference.dense_cosine_max_bwd, _max_fake),
    (match_op, reference.dense_cosine_match_fwd, reference.dense_cosine_match_bwd, _match_fake),
):
    _op.backends["reference"] = _library.Backend(_dense(_forward), _dense_gradients(_op, _backward))
    _op.add_compiled("cpp")
    _op.add_triton("fss_kernels.ops.dense_cosine.triton_kernels")
    _op.register_fake(_fake, _backward_fake(_op))
    _op.register_vmap(_forward_vmap(_op), _backward_vmap(_op))


def _max_formula(
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    index: Tensor,
    query_norm: Tensor,
    support_norm: Tensor,
    windows: Sequence[int],
    masked: str,
    eps: float,
    eps_mode: str,
) -> Tensor:
    pairs = reference.pairs_of_max(index, windows, support.shape[2:])
    return torch.stack(reference.scores_at(query, support, support_norm, pairs, eps, eps_mode), 1).view(index.shape)


def _match_formula(
    query: Tensor,
    support: Tensor,
    mask: Tensor,
    query_index: Tensor,
    support_index: Tensor,
    query_norm: Tensor,
    support_norm: Tensor,
    eps: float,
    eps_mode: str,
) -> tuple[Tensor, Tensor]:
    pairs = reference.pairs_of_match(query_index, support_index)
    of_query, of_support = reference.scores_at(query, support, support_norm, pairs, eps, eps_mode)
    return of_query.view(query_index.shape), of_support.view(support_index.shape)


call_max = _autograd.differentiable(max_op, _max_formula)
call_match = _autograd.differentiable(match_op, _match_formula)
