"""Batching rules of the ops: a mapped dimension is merged into a dimension that the op has anyway."""

from __future__ import annotations

from torch import Tensor


def fold(tensor: Tensor, dim: int | None, size: int, into: int = 0) -> Tensor:
    """Merges the mapped dimension (expanded when there is none) into dimension ``into``."""
    tensor = tensor.unsqueeze(into) if dim is None else tensor.movedim(dim, into)
    return tensor.expand(*tensor.shape[:into], size, *tensor.shape[into + 1 :]).flatten(into, into + 1)


def unfold(tensor: Tensor, size: int, dim: int = 0) -> Tensor:
    """The inverse: (size, rest) in place of dimension ``dim``."""
    return tensor.unflatten(dim, (size, tensor.shape[dim] // size))
