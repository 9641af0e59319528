"""The backends of an op, and the choice of one: forced by `use_backend`, measured on this GPU, or the default."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fss_kernels import _loading, _tuning

GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the CUDA and Triton kernels

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("fss_kernels_backend", default=None)


@dataclass
class Backend:
    """One implementation of an op, on some device types and for some dtypes of the features (None: any). Both
    functions take the arguments of the torch op."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None


def why_not(
    op: str, backends: dict[str, Backend], name: str, device: str, dtype: torch.dtype | None = None
) -> str | None:
    """Why backend ``name`` cannot run an op on ``device`` (with features of ``dtype``), or None when it can."""
    if (reason := _loading.missing(name)) is not None:
        return reason
    backend = backends.get(name)
    if backend is None:
        return f"no {name} kernel for {op} in this version"
    if backend.devices is not None and device not in backend.devices:
        return f"runs on {', '.join(backend.devices)} tensors, not on {device}"
    if dtype is not None and backend.dtypes is not None and dtype not in backend.dtypes:
        return f"does not take {dtype}"
    return None


def default(op: str, backends: dict[str, Backend], device: str, features: torch.Tensor | None = None) -> str:
    """The fastest backend for these features: measured on this GPU (`_tuning`), C++ on a CPU, else the reference."""
    if device == "cpu":
        return "cpp" if why_not(op, backends, "cpp", device) is None else "reference"
    if device == "cuda" and features is not None:
        measured = _tuning.backend(op, torch.cuda.get_device_name(features.device), features.numel())
        if measured is not None and why_not(op, backends, measured, device, features.dtype) is None:
            return measured
    return "reference"


def choose(op: str, backends: dict[str, Backend], device: str, features: torch.Tensor) -> str:
    """The backend of a call: the forced one, which must be able to run it, or the default."""
    name = _forced.get()
    if name is None:
        return default(op, backends, device, features)
    if (reason := why_not(op, backends, name, device, features.dtype)) is not None:
        raise RuntimeError(f"{op}: backend {name!r} is not available: {reason}")
    return name


def forced() -> str | None:
    """The backend that `use_backend` forces in the current context, or None."""
    return _forced.get()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one backend (``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``) inside a ``with`` block.

    None restores the default choice. Backward passes of ops called inside the block use the same backend, except those
    of functions compiled by ``torch.compile``: they use what is in force where they run. Not for use inside one.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: the backend is not available on this machine; the message says why. A backend that is available
            but has no kernel for an op or a device raises when that op is called.

    Example:
        >>> import torch, fss_kernels
        >>> with fss_kernels.use_backend("reference"):
        ...     fss_kernels.masked_avg_pool(torch.ones(1, 2, 4, 4), torch.ones(1, 4, 4), eps=0.0)
        tensor([[1., 1.]])
    """
    if name is not None:
        if name not in _loading.BACKENDS:
            raise ValueError(f"use_backend: name must be one of {', '.join(_loading.BACKENDS)}, got {name!r}")
        if (reason := _loading.missing(name)) is not None:
            raise RuntimeError(f"use_backend: backend {name!r} is not available: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
