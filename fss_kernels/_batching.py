"""Batching rules of the ops: a mapped dimension is merged into a dimension that the op has anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from fss_kernels._op import Op


def fold(tensor: Tensor, dim: int | None, size: int, into: int = 0) -> Tensor:
    """Merges the mapped dimension (expanded when there is none) into dimension ``into``."""
    tensor = tensor.unsqueeze(into) if dim is None else tensor.movedim(dim, into)
    return tensor.expand(*tensor.shape[:into], size, *tensor.shape[into + 1 :]).flatten(into, into + 1)


def unfold(tensor: Tensor, size: int, dim: int = 0) -> Tensor:
    """The inverse: (size, rest) in place of dimension ``dim``."""
    return tensor.unflatten(dim, (size, tensor.shape[dim] // size))


def forward_rule(op: Op) -> Callable[..., Any]:
    """Every input is folded into its batch, every result unfolded."""
    dims = tuple(op.batch_dims.get(name, 0) for name in op.results)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        results = op.fwd(*_folded(op.forward_call, op, info.batch_size, args, in_dims))
        return tuple(unfold(r, info.batch_size, d) for r, d in zip(results, dims, strict=True)), dims

    return rule


def backward_rule(op: Op) -> Callable[..., Any]:
    """The same for gradients; one that nobody wants has no batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        gradients = op.bwd(*_folded(op.backward_call, op, info.batch_size, args, in_dims))
        call = op.backward_call.Call(*args)
        needs = [getattr(call, f"need_{name}") for name in op.differentiable]
        results = op.gradients.map(lambda _, g, need: unfold(g, info.batch_size) if need else g, gradients, needs)
        return tuple(results), tuple(op.gradients.map(lambda _, need: 0 if need else None, needs))

    return rule


def _folded(signature: Any, op: Op, size: int, args: tuple[Any, ...], in_dims: tuple[Any, ...]) -> Any:
    def folded(name: str, value: Any, dim: int | None) -> Any:
        return fold(value, dim, size, op.batch_dims.get(name, 0)) if isinstance(value, Tensor) else value

    return signature.map(folded, args, in_dims)
