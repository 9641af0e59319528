"""The arguments of a torch op by name, nested as the op takes them or flat as an autograd Function does."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def _named_tuple(title: str, names: tuple[str, ...]) -> Any:
    return namedtuple(title, names)


class Signature:
    """Named values, some of which are lists of tensors.

    ``lists`` maps each of these to its place in the lengths of a call: ``{"grad_kernels": 0}`` where the first list
    among the op's inputs has as many elements. ``Call`` is the named tuple of the values.
    """

    def __init__(self, title: str, names: Iterable[str], lists: Mapping[str, int]) -> None:
        self.names = tuple(names)
        self.lists = {name: lists[name] for name in self.names if name in lists}
        self.Call = _named_tuple(title, self.names)

    def flatten(self, values: Sequence[Any]) -> Sequence[Any]:
        """The values one by one."""
        if not self.lists:
            return values
        flat: list[Any] = []
        for name, value in zip(self.names, values, strict=True):
            if name in self.lists:
                flat += value
            else:
                flat.append(value)
        return flat

    def nest(self, flat: Sequence[Any], lengths: Sequence[int]) -> Sequence[Any]:
        """The inverse, given the lengths of the lists."""
        if not self.lists:
            return flat
        rest = iter(flat)
        values = [
            [next(rest) for _ in range(lengths[self.lists[name]])] if name in self.lists else next(rest)
            for name in self.names
        ]
        assert next(rest, None) is None
        return values

    def map(self, function: Callable[..., Any], *calls: Iterable[Any]) -> Any:
        """A call whose values are ``function(name, *values)`` of the given calls, in lists for every element."""
        return self.Call._make(
            [function(name, *each) for each in zip(*values, strict=True)]
            if name in self.lists
            else function(name, *values)
            for name, *values in zip(self.names, *calls, strict=True)
        )
