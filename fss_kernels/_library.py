"""The op namespaces, the compiled libraries and the choice of a backend.

Every op is defined here twice from one schema: ``fss::<name>`` is what programs call and trace, ``fss_cpp::<name>`` is
what the compiled libraries implement. The implementation of ``fss::<name>`` picks a backend at run time.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fss_kernels import _tuning

BACKENDS = ("reference", "cpp", "cuda", "triton")
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMPILED = {"cpp": ("_fss_cpu.so", "cpu"), "cuda": ("_fss_cuda.so", "cuda")}

_fss = torch.library.Library("fss", "DEF")
_fss_cpp = torch.library.Library("fss_cpp", "FRAGMENT")

ops: dict[str, Op] = {}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("fss_kernels_backend", default=None)


def build_info() -> dict[str, Any]:
    """What the installation recorded of its build: a message for each compiled library that was left out."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _load(library: str) -> str | None:
    """Loads a compiled library; returns why it is missing, or None."""
    path = Path(__file__).with_name(library)
    if not path.exists():
        return build_info().get(library, f"{library} was not built (reinstall with a compiler)")
    try:
        torch.ops.load_library(path)
        if library == "_fss_cpu.so":
            torch.ops.fss_cpp.cpu_isa()  # raises when FSS_KERNELS_CPU_ISA asks for what is not there
    except OSError as error:
        return f"{library} does not load: {error.__cause__ or error}"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"fss_kernels: the CPU kernels are off: {reason}", stacklevel=2)
        return reason
    return None


# backend -> why it cannot run here; absent when it can.
unavailable: dict[str, str] = {}
for _backend, (_file, _) in _COMPILED.items():
    if (_reason := _load(_file)) is not None:
        unavailable[_backend] = _reason
if "cuda" not in unavailable and not torch.cuda.is_available():
    unavailable["cuda"] = "compiled, but PyTorch sees no CUDA device"
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton reads it when a kernel is decorated
if importlib.util.find_spec("triton") is None:
    unavailable["triton"] = "Triton is not installed"
elif not TRITON_INTERPRETED and not torch.cuda.is_available():
    unavailable["triton"] = "PyTorch sees no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU, very slowly"


def missing(backend: str) -> str | None:
    """Why a backend cannot run here, or None. Triton's driver is asked for when something first wants Triton."""
    if backend == "triton" and backend not in unavailable and (reason := _triton_fault()) is not None:
        unavailable[backend] = reason
    return unavailable.get(backend)


def interpreter_fault(triton: str) -> str | None:
    """Why the interpreter of this version of Triton cannot run kernels here, or None."""
    if tuple(int(part) for part in triton.split(".")[:2]) >= (3, 7):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            int(np.zeros(1))  # so it reads the bounds of a loop
        except TypeError:
            return f"the interpreter of Triton {triton} does not run loops with NumPy {np.__version__}"
    return None


@functools.cache
def _triton_fault() -> str | None:
    try:
        triton = importlib.import_module("triton")
        if not TRITON_INTERPRETED:
            triton.runtime.driver.active.get_current_target()
        elif (fault := interpreter_fault(triton.__version__)) is not None:
            return fault
    except Exception as error:  # no libcuda, no compiler, another version of something: whatever the driver raises
        lines = str(error).splitlines() or [""]
        return f"Triton does not work here: {type(error).__name__}: {lines[0]}"
    return None


@dataclass
class Backend:
    """One implementation of an op, on some device types and for some dtypes of the features (None: any)."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None


@dataclass
class Op:
    """A forward and a backward torch op with one schema each, and the backends that implement them.

    ``forward(*tensors, *options) -> (*outputs, *saved)``: ``saved`` are small statistics for the backward; the first
    ``returned`` of them (indices) are results for the caller as well, without a gradient.
    ``backward(*grads, *tensors, *saved, *options, *needs) -> one gradient per tensor``; a gradient whose ``need`` flag
    is false comes back with 0 elements. The tensors at the positions ``lists`` are ``Tensor[]``, and so are their
    gradients; their flags are ``bool[]``. Elsewhere tensors are counted one by one (`flatten`): ``reads(needs)`` gives
    the positions of those whose values the wanted gradients depend on, and the gradients of those; the default is all.
    """

    name: str
    tensors: int
    outputs: int
    forward_schema: str
    backward_schema: str
    backends: dict[str, Backend] = field(default_factory=dict)
    reads: Callable[[Sequence[bool]], Container[int]] = lambda needs: range(len(needs))
    lists: tuple[int, ...] = ()
    returned: int = 0
    folder: str = ""  # under ops/, where it is not the op's name

    def __post_init__(self) -> None:
        for suffix, schema in (("fwd", self.forward_schema), ("bwd", self.backward_schema)):
            for library in (_fss, _fss_cpp):
                library.define(f"{self.name}_{suffix}{schema}")
        self.fwd = getattr(torch.ops.fss, f"{self.name}_fwd").default
        self.bwd = getattr(torch.ops.fss, f"{self.name}_bwd").default
        for suffix, direction in (("fwd", "forward"), ("bwd", "backward")):
            for key in ("CPU", "CUDA"):
                _fss.impl(f"{self.name}_{suffix}", self._dispatcher(direction, key.lower()), key)
            _fss.impl(f"{self.name}_{suffix}", self._dispatcher(direction, "other"), "CompositeExplicitAutograd")
        ops[self.name] = self

    def flatten(self, arguments: Sequence[Any]) -> tuple[tuple[int, ...], list[Any]]:
        """What stands for the tensors, one by one, and how long each list is."""
        if not self.lists:
            return (), list(arguments)
        sizes = tuple(len(arguments[i]) for i in self.lists)
        return sizes, [v for i, a in enumerate(arguments) for v in (a if i in self.lists else (a,))]

    def nest(self, sizes: Sequence[int], values: Sequence[Any]) -> list[Any]:
        """The inverse of `flatten`."""
        if not self.lists:
            return list(values)
        rest, lengths = iter(values), dict(zip(self.lists, sizes, strict=True))
        return [[next(rest) for _ in range(lengths[i])] if i in lengths else next(rest) for i in range(self.tensors)]

    def add_compiled(self, backend: str) -> None:
        """Declares that ``_fss_cpu.so`` or ``_fss_cuda.so`` implements this op."""
        fwd, bwd = (getattr(torch.ops.fss_cpp, f"{self.name}_{suffix}").default for suffix in ("fwd", "bwd"))
        device = _COMPILED[backend][1]
        self.backends[backend] = Backend(fwd, bwd, (device,), _GPU_DTYPES if device == "cuda" else None)

    def add_triton(self, module: str) -> None:
        """Declares Triton launchers ``<name>_fwd`` and ``<name>_bwd`` in a module that is imported on first use."""

        def launcher(suffix: str) -> Callable[..., Any]:
            return lambda *args: getattr(importlib.import_module(module), f"{self.name}_{suffix}")(*args)

        devices = ("cpu", "cuda") if TRITON_INTERPRETED else ("cuda",)
        self.backends["triton"] = Backend(launcher("fwd"), launcher("bwd"), devices, _GPU_DTYPES)

    def register_fake(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """Shapes, dtypes and strides of the results, without data."""
        torch.library.register_fake(f"fss::{self.name}_fwd", forward, lib=_fss)
        torch.library.register_fake(f"fss::{self.name}_bwd", backward, lib=_fss)

    def register_vmap(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """Batching rules: the mapped dimension folds into the batch."""
        torch.library.register_vmap(f"fss::{self.name}_fwd", forward, lib=_fss)
        torch.library.register_vmap(f"fss::{self.name}_bwd", backward, lib=_fss)

    def register_autograd(self, suffix: str, setup_context: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """Makes a raw op (``"fwd"`` or ``"bwd"``) differentiable: never a silent zero."""
        torch.library.register_autograd(f"fss::{self.name}_{suffix}", backward, setup_context=setup_context, lib=_fss)

    def why_not(self, backend: str, device: str, dtype: torch.dtype | None = None) -> str | None:
        """Why ``backend`` cannot run this op on ``device`` (with features of ``dtype``), or None when it can."""
        if (reason := missing(backend)) is not None:
            return reason
        implementation = self.backends.get(backend)
        if implementation is None:
            return f"no {backend} kernel for {self.name} in this version"
        if implementation.devices is not None and device not in implementation.devices:
            return f"runs on {', '.join(implementation.devices)} tensors, not on {device}"
        if dtype is not None and implementation.dtypes is not None and dtype not in implementation.dtypes:
            return f"does not take {dtype}"
        return None

    def default_backend(self, device: str, features: torch.Tensor | None = None) -> str:
        """The fastest backend for these features: measured on this GPU (`_tuning`), C++ on CPU, else the reference."""
        dtype = None if features is None else features.dtype
        if device == "cuda" and features is not None:
            measured = _tuning.backend(self.name, torch.cuda.get_device_name(features.device), features.numel())
            if measured is not None and self.why_not(measured, device, dtype) is None:
                return measured
        return "cpp" if device == "cpu" and self.why_not("cpp", device, dtype) is None else "reference"

    def _dispatcher(self, direction: str, device: str) -> Callable[..., Any]:
        position = 0 if direction == "forward" else self.outputs  # of the features

        def run(*args: Any) -> Any:
            backend, features = _forced.get(), args[position]
            if 0 in self.lists:
                features = features[0]
            if backend is None:
                backend = self.default_backend(device, features)
            elif (reason := self.why_not(backend, device, features.dtype)) is not None:
                raise RuntimeError(f"{self.name}: backend {backend!r} is not available: {reason}")
            if backend == "reference" and torch.is_autocast_enabled(features.device.type):
                # its products would be rounded to autocast's dtype; those of kernels are not
                with torch.autocast(features.device.type, enabled=False):
                    return getattr(self.backends[backend], direction)(*args)
            return getattr(self.backends[backend], direction)(*args)

        return run


def forced_backend() -> str | None:
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
        if name not in BACKENDS:
            raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
        if (reason := missing(name)) is not None:
            raise RuntimeError(f"use_backend: backend {name!r} is not available: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def cpu_isa() -> str | None:
    """Instruction set of the CPU kernels: ``generic``, ``avx2``, ``avx512`` or ``avx512_bf16``; None without them."""
    return None if "cpp" in unavailable else torch.ops.fss_cpp.cpu_isa()


def supported_isas() -> list[str]:
    """Instruction sets of this build that this processor can run; FSS_KERNELS_CPU_ISA forces one."""
    return [] if "cpp" in unavailable else torch.ops.fss_cpp.supported_isas().split()


def is_channels_last(features: torch.Tensor) -> bool:
    """Whether (B, C, H, W) features are stored with the channels innermost."""
    _, channels, height, width = features.shape
    return features.stride(1) == 1 and channels > 1 and height * width > 1


def empty_rows_like(features: torch.Tensor, channels: int | None = None) -> torch.Tensor:
    """An uninitialised dense tensor in the memory format of the features, with as many channels or another number."""
    memory_format = torch.channels_last if is_channels_last(features) else torch.contiguous_format
    batch, own, height, width = features.shape
    shape = (batch, own if channels is None else channels, height, width)
    return torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=memory_format)


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, dtype and memory format that holds at most one value a channel."""
    if tensor.ndim == 4 and is_channels_last(tensor):
        return tensor.new_zeros((1, tensor.shape[1], 1, 1)).expand(tensor.shape)
    return tensor.new_zeros((1,) * tensor.ndim).expand(tensor.shape)


def accumulate_dtype(features: torch.Tensor) -> torch.dtype:
    """The dtype of sums: float64 for float64 features, otherwise float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32
