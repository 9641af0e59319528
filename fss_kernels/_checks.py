"""Argument validation shared by the ops: errors name the op, the argument, what came and what was expected."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

FEATURE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MASK_DTYPES = (*FEATURE_DTYPES, torch.bool, torch.uint8)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(op: str, name: str, value: Any, shapes: dict[int, str], dtypes: Sequence[torch.dtype]) -> None:
    """A tensor of one of ``dtypes`` and of a rank in ``shapes`` (rank -> what to print)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must have dtype {_names(dtypes)}, got {_names([value.dtype])}")
    if value.ndim not in shapes:
        raise ValueError(f"{op}: {name} must have shape {' or '.join(shapes.values())}, got {tuple(value.shape)}")


def not_empty(op: str, name: str, value: torch.Tensor, dims: slice, what: str) -> None:
    """The given dimensions have at least one element."""
    if 0 in value.shape[dims]:
        raise ValueError(f"{op}: {name} has no {what}, got shape {tuple(value.shape)}")


def same_batch(op: str, name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both tensors have the same first dimension."""
    if value.shape[0] != other.shape[0]:
        raise ValueError(
            f"{op}: {name} must have the batch size of {other_name}, {other.shape[0]}, got {value.shape[0]}"
        )


def same_device(op: str, name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both tensors are on one device."""
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name}, {other.device}, got {value.device}")


def non_negative(op: str, name: str, value: Any) -> float:
    """A finite number >= 0, as float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{op}: {name} must be finite and >= 0, got {value}")
    return float(value)


def finite(op: str, name: str, value: Any) -> float:
    """A finite number, as float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # a comparison is what a compiler can trace
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def fraction(op: str, name: str, value: Any) -> float:
    """A number 0 ... 1, as float."""
    if not 0 <= finite(op, name, value) <= 1:
        raise ValueError(f"{op}: {name} must be 0 ... 1, got {value}")
    return float(value)


def integer(op: str, name: str, value: Any, lowest: int, highest: int | None = None) -> None:
    """An int lowest ... highest; None: any that is at least ``lowest``."""
    if type(value) is not int:
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < lowest or (highest is not None and value > highest):
        wanted = f">= {lowest}" if highest is None else f"{lowest} ... {highest}"
        raise ValueError(f"{op}: {name} must be {wanted}, got {value}")


def one_dtype(op: str, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The named tensors in one dtype: under autocast the widest of theirs, otherwise that of the first or an error."""
    (first_name, first), *rest = tensors.items()
    if all(t.dtype == first.dtype for _, t in rest):
        return list(tensors.values())
    if torch.is_autocast_enabled(first.device.type):
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors.values()))
        return [t.to(dtype) for t in tensors.values()]
    name, other = next((n, t) for n, t in rest if t.dtype != first.dtype)
    raise TypeError(
        f"{op}: {name} must have the dtype of {first_name}, {_names([first.dtype])}, got {_names([other.dtype])}; "
        f"pass {name}.to({first.dtype})"
    )


def one_of(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """One of the strings in ``choices``."""
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be a string, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def same_channels(op: str, name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both tensors have the same second dimension."""
    if value.shape[1] != other.shape[1]:
        raise ValueError(f"{op}: {name} must have the channels of {other_name}, {other.shape[1]}, got {value.shape[1]}")


def sequence(op: str, name: str, value: Any, what: str, expected: str = "a sequence of torch.Tensor") -> None:
    """A list or tuple with at least one element."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: {name} must be {expected}, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{op}: {name} must hold at least one {what}, got none")


def partition(op: str, name: str, value: Any, of: str, total: int) -> None:
    """A sequence of counts >= 1 that add up to the length of another argument."""
    sequence(op, name, value, "count", "a sequence of int")
    if any(isinstance(n, bool) or not isinstance(n, int) for n in value):
        raise TypeError(f"{op}: {name} must be a sequence of int, got {value!r}")
    if min(value) < 1 or sum(value) != total:
        raise ValueError(f"{op}: {name} must be counts >= 1 that add up to {total}, the length of {of}, got {value!r}")


def same_grid(op: str, name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both feature tensors have the same height and width."""
    if value.shape[2:] != other.shape[2:]:
        raise ValueError(
            f"{op}: {name} must have the grid of {other_name}, {tuple(other.shape[2:])}, got {tuple(value.shape[2:])}"
        )


def odd(op: str, name: str, sizes: Sequence[int], largest: int) -> None:
    """Odd sizes 1 ... largest."""
    if any(n % 2 == 0 or not 1 <= n <= largest for n in sizes):
        raise ValueError(f"{op}: {name} must have odd sizes 1 ... {largest}, got {' x '.join(str(n) for n in sizes)}")


def windows(op: str, name: str, value: Any) -> None:
    """A non-empty sequence of pairs of odd sizes."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a sequence of pairs (dh, dw), got {type(value).__name__}")
    if not value:
        raise ValueError(f"{op}: {name} must hold at least one pair (dh, dw), got none")
    for pair in value:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(n) is int for n in pair):
            raise TypeError(f"{op}: {name} must hold pairs (dh, dw) of int, got {pair!r}")
        if any(n < 1 or n % 2 == 0 for n in pair):
            raise ValueError(f"{op}: {name} must have odd sizes >= 1, got {pair[0]} x {pair[1]}")


def boolean(op: str, name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
