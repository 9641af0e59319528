"""The arguments of a torch op by name, nested as the op takes them or flat as an autograd Function does."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def _named_tuple(title: str, names: tuple[str, ...]) -> Any:
    return namedtuple(title, names)


class Signature:
    """Named values, some of which are lists of tensors. ``lists`` maps each of these to the input that has its length:
    ``{"grad_kernels": "kernels"}``.

    ``Call`` is the named tuple of the values. ``lengths`` maps every input that is a list to its length in one call.
    """

    def __init__(self, title: str, names: Iterable[str], lists: Mapping[str, str]) -> None:
        self.names = tuple(names)
        self.lists = {name: lists[name] for name in self.names if name in lists}
        self.Call = _named_tuple(title, self.names)

    def flatten(self, call: Iterable[Any]) -> list[Any]:
        """The values one by one."""
        if not self.lists:
            return list(call)
        flat: list[Any] = []
        for name, value in zip(self.names, call, strict=True):
            if name in self.lists:
                flat += value
            else:
                flat.append(value)
        return flat

    def nest(self, flat: Iterable[Any], lengths: Mapping[str, int]) -> Any:
        """The inverse of `flatten`."""
        if not self.lists:
            return self.Call._make(flat)
        rest = iter(flat)
        values = (
            [next(rest) for _ in range(lengths[self.lists[name]])] if name in self.lists else next(rest)
            for name in self.names
        )
        return self.Call._make(values)

    def map(self, function: Callable[..., Any], call: Iterable[Any], *others: Iterable[Any]) -> Any:
        """A call whose values are ``function(name, value, *other values)``, in lists for every element."""
        return self.Call._make(
            [function(name, *each) for each in zip(*values, strict=True)]
            if name in self.lists
            else function(name, *values)
            for name, *values in zip(self.names, call, *others, strict=True)
        )
