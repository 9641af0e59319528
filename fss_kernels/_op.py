"""The declaration of an op, and the torch ops that follow from it.

Every op is defined twice from one schema: ``fss::<name>_fwd`` and ``_bwd`` are what programs call and trace,
``fss_cpp::<name>_fwd`` and ``_bwd`` what the compiled libraries implement. The first pick a backend at run time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fss_kernels import _autograd, _backends, _batching, _loading
from fss_kernels._backends import Backend
from fss_kernels._layout import empty_rows_like
from fss_kernels._signature import Signature

_fss = torch.library.Library("fss", "DEF")

ops: dict[str, Op] = {}


class Op:
    """An op declared once: its forward schema, and what cannot be read in it.

    The schema names every argument and result, tensors first: ``"name(Tensor x, Tensor[] kernels, bool merge) ->
    (Tensor out, Tensor taps)"``. Of it follow the backward's schema ``(grad_<output>, inputs, saved, options,
    need_<input>) -> (grad_<input>)``, one gradient per differentiable input and 0 elements where its flag is false, the
    fakes of the gradients, the batching rules, and the derivatives of both torch ops. An op has at least two
    differentiable inputs, and saves something.

    Args:
        schema: of the forward op.
        saved: results that are statistics for the backward. The others are outputs.
        returned: saved results that the caller gets as well, without a gradient (indices).
        differentiable: inputs with a gradient; without one a mask only selects.
        reads: differentiable input -> the inputs whose values its gradient depends on; by default all.
        maps: feature maps among inputs and results: each is read and written contiguous or channels_last. The first
            input is one: it decides the backend, and the format of results that are maps. Other results are contiguous.
        fake: ``fake(call)`` gives the results without data.
        formula: ``formula(call)`` gives the differentiable outputs in plain PyTorch, from the inputs, what is saved and
            the options; its vector-Jacobian product, differentiated, is the backward of the backward.
        batch_dims: dimension of the batch in saved results where it is not the first.
        vmap_forward, vmap_backward: batching rules of ops that do better than to fold the mapped dimension into the
            batch (`_batching`).
        folder: under ops/, where it is not the op's name.
    """

    def __init__(
        self,
        schema: str,
        *,
        saved: Sequence[str],
        differentiable: Sequence[str],
        fake: Callable[[Any], tuple[Any, ...]],
        formula: Callable[[Any], Any],
        returned: Sequence[str] = (),
        reads: Mapping[str, Sequence[str]] | None = None,
        maps: Sequence[str] = (),
        batch_dims: Mapping[str, int] | None = None,
        vmap_forward: Callable[..., Any] | None = None,
        vmap_backward: Callable[..., Any] | None = None,
        folder: str = "",
    ) -> None:
        parsed = torch._C.parse_schema(schema)
        types = {a.name: str(a.type) for a in (*parsed.arguments, *parsed.returns)}
        arguments, self.results = [a.name for a in parsed.arguments], tuple(r.name for r in parsed.returns)
        self.name, self.folder, self.formula = parsed.name, folder or parsed.name, formula
        self.inputs = tuple(n for n in arguments if "Tensor" in types[n])
        self.options = tuple(n for n in arguments if "Tensor" not in types[n])
        self.differentiable, self.saved, self.maps = tuple(differentiable), tuple(saved), tuple(maps)
        self.outputs = tuple(n for n in self.results if n not in saved)
        self.returned = tuple(n for n in self.results if n in self.outputs or n in returned)
        self.lists = tuple(n for n in self.inputs if types[n] == "List[Tensor]")
        self._list_positions = [self.inputs.index(n) for n in self.lists]
        self.batch_dims = dict(batch_dims or {})
        self._check(arguments, returned, reads or {})
        self._reads = {n: frozenset((reads or {}).get(n, self.inputs)) for n in self.differentiable}
        self.backends: dict[str, Backend] = {}

        lists = {f"{prefix}{n}": i for i, n in enumerate(self.lists) for prefix in ("", "grad_")}
        grads, needs = [f"grad_{n}" for n in self.outputs], [f"need_{n}" for n in self.differentiable]
        backward = (*grads, *self.inputs, *self.saved, *self.options, *needs)
        self.forward_call = Signature(f"{self.name}_forward", arguments, lists)
        self.backward_call = Signature(f"{self.name}_backward", backward, lists)
        self.input_tensors = Signature(f"{self.name}_inputs", self.inputs, lists)
        self.gradients = Signature(f"{self.name}_gradients", [f"grad_{n}" for n in self.differentiable], lists)

        self.forward_schema = schema.removeprefix(self.name)
        self.backward_schema = self._backward_schema(types)
        self._fake = fake
        self._register(vmap_forward, vmap_backward)
        ops[self.name] = self

    def _check(self, arguments: Sequence[str], returned: Sequence[str], reads: Mapping[str, Sequence[str]]) -> None:
        """Refuses what would be misread: results and gradients rely on these orders, and on names of the schema."""
        tensors, read = {*self.inputs}, {name for names in reads.values() for name in names}
        rules = {
            "the schema must have tensors before options": [*arguments] == [*self.inputs, *self.options],
            "the schema must have outputs before saved results, in the order of saved": self.results
            == (*self.outputs, *self.saved),
            "returned must be the first of saved": tuple(returned) == self.saved[: len(returned)],
            "differentiable must be inputs in their order, two at least": len(self.differentiable) > 1
            and self.differentiable == tuple(n for n in self.inputs if n in self.differentiable),
            "saved must hold a result": len(self.saved) > 0,
            "reads must map differentiable inputs to inputs": {*reads} <= {*self.differentiable} and read <= tensors,
            "maps must be tensors, the first input among them": {*self.maps} <= tensors | {*self.results}
            and self.inputs[0] in self.maps,
            "batch_dims must be of saved results": {*self.batch_dims} <= {*self.saved},
        }
        for rule, kept in rules.items():
            if not kept:
                raise ValueError(f"{self.name}: {rule}")

    def _backward_schema(self, types: Mapping[str, str]) -> str:
        written = {"List[Tensor]": "Tensor[]", "List[int]": "int[]", "List[float]": "float[]"}
        given = {n: written.get(types[n], types[n]) for n in (*self.inputs, *self.saved, *self.options)}
        given = {f"grad_{n}": "Tensor" for n in self.outputs} | given
        given |= {f"need_{n}": "bool[]" if n in self.lists else "bool" for n in self.differentiable}
        results = ("Tensor[]" if n in self.lists else "Tensor" for n in self.differentiable)
        return f"({', '.join(f'{t} {n}' for n, t in given.items())}) -> ({', '.join(results)})"

    def _register(self, vmap_forward: Callable[..., Any] | None, vmap_backward: Callable[..., Any] | None) -> None:
        for suffix, schema in (("fwd", self.forward_schema), ("bwd", self.backward_schema)):
            for library in (_fss, _loading.fss_cpp):
                library.define(f"{self.name}_{suffix}{schema}")
        self.fwd: Any = getattr(torch.ops.fss, f"{self.name}_fwd").default
        self.bwd: Any = getattr(torch.ops.fss, f"{self.name}_bwd").default
        rules = _autograd.Rules(self)
        for suffix, fake, vmap, context, derivatives in (
            ("fwd", self._forward_fake, vmap_forward or _batching.forward_rule(self), *rules.of_forward),
            ("bwd", self._backward_fake, vmap_backward or _batching.backward_rule(self), *rules.of_backward),
        ):
            name = f"{self.name}_{suffix}"
            for key, device in (("CPU", "cpu"), ("CUDA", "cuda"), ("CompositeExplicitAutograd", "other")):
                _fss.impl(name, self._dispatcher(suffix, device), key)
            torch.library.register_fake(f"fss::{name}", fake, lib=_fss)
            torch.library.register_vmap(f"fss::{name}", vmap, lib=_fss)
            torch.library.register_autograd(f"fss::{name}", derivatives, setup_context=context, lib=_fss)
        self.call: Callable[..., Any] = rules.call  # the op for users: recorded for autograd where something needs it

    # ---- backends ---------------------------------------------------------------------------------------------------

    def add(
        self,
        backend: str,
        forward: Callable[[Any], Iterable[Any]],
        backward: Callable[[Any], Iterable[Any]],
        devices: tuple[str, ...] | None = None,
        dtypes: tuple[torch.dtype, ...] | None = None,
    ) -> None:
        """Declares a backend in Python: ``forward(call)`` and ``backward(call)`` get the arguments by name."""
        of_forward, of_backward = self.forward_call.Call, self.backward_call.Call
        self.backends[backend] = Backend(
            lambda *args: tuple(forward(of_forward(*args))),
            lambda *args: tuple(backward(of_backward(*args))),
            devices,
            dtypes,
        )

    def add_formulas(
        self, backend: str, forward: Callable[[Any], Iterable[Any]], backward: Callable[[Any], Iterable[Any]]
    ) -> None:
        """Declares a backend of plain PyTorch formulas, whose results come in any strides: they are laid out as the
        kernels write them."""

        def of_forward(call: Any) -> Iterable[Any]:
            first = getattr(call, self.inputs[0])
            like = first[0] if self.inputs[0] in self.lists else first
            return (
                _written(empty_rows_like(like, r.shape[1]), r) if n in self.maps else r.contiguous()
                for n, r in zip(self.results, forward(call), strict=True)
            )

        def of_backward(call: Any) -> Iterable[Any]:
            inputs = self.gradients.Call._make(getattr(call, n) for n in self.differentiable)

            def laid_out(name: str, grad: Tensor, x: Tensor) -> Tensor:
                if name.removeprefix("grad_") in self.maps and grad.ndim == x.ndim:
                    return _written(empty_rows_like(x), grad)
                return grad.contiguous()

            return self.gradients.map(laid_out, backward(call), inputs)

        self.add(backend, of_forward, of_backward)

    def add_compiled(self, backend: str) -> None:
        """Declares that ``_fss_cpu.so`` or ``_fss_cuda.so`` implements this op."""
        fwd, bwd = (getattr(torch.ops.fss_cpp, f"{self.name}_{suffix}").default for suffix in ("fwd", "bwd"))
        device = _loading.COMPILED[backend][1]
        self.backends[backend] = Backend(fwd, bwd, (device,), _backends.GPU_DTYPES if device == "cuda" else None)

    def add_triton(self, module: str) -> None:
        """Declares Triton launchers ``<name>_fwd`` and ``<name>_bwd`` in a module that is imported on first use."""

        def launcher(suffix: str) -> Callable[..., Any]:
            return lambda call: getattr(importlib.import_module(module), f"{self.name}_{suffix}")(call)

        devices = ("cpu", "cuda") if _loading.TRITON_INTERPRETED else ("cuda",)
        self.add("triton", launcher("fwd"), launcher("bwd"), devices, _backends.GPU_DTYPES)

    def why_not(self, backend: str, device: str, dtype: torch.dtype | None = None) -> str | None:
        """Why ``backend`` cannot run this op on ``device`` (with features of ``dtype``), or None when it can."""
        return _backends.why_not(self.name, self.backends, backend, device, dtype)

    def default_backend(self, device: str, features: Tensor | None = None) -> str:
        """The backend that runs where none is forced."""
        return _backends.default(self.name, self.backends, device, features)

    def _dispatcher(self, suffix: str, device: str) -> Callable[..., Any]:
        signature, direction = (self.forward_call, "forward") if suffix == "fwd" else (self.backward_call, "backward")
        position = signature.names.index(self.inputs[0])
        is_list = self.inputs[0] in self.lists

        def run(*args: Any) -> Any:
            features = args[position][0] if is_list else args[position]
            name = _backends.choose(self.name, self.backends, device, features)
            implementation = getattr(self.backends[name], direction)
            if name == "reference" and torch.is_autocast_enabled(features.device.type):
                # its products would be rounded to autocast's dtype; those of kernels are not
                with torch.autocast(features.device.type, enabled=False):
                    return implementation(*args)
            return implementation(*args)

        return run

    # ---- what follows from the declaration --------------------------------------------------------------------------

    def lengths(self, arguments: Sequence[Any]) -> tuple[int, ...]:
        """The lengths of the lists in a forward call."""
        if not self.lists:
            return ()
        return tuple([len(arguments[i]) for i in self._list_positions])

    def tensors(self, lengths: Sequence[int]) -> int:
        """How many tensors are the inputs of a call."""
        return len(self.inputs) + sum(lengths) - len(lengths)

    def read_by(self, needs: Any) -> set[str]:
        """The inputs whose values the wanted gradients depend on. ``needs`` has a flag or a list of flags per input."""
        read: set[str] = set()
        for name in self.differentiable:
            need = getattr(needs, name)
            if any(need) if name in self.lists else need:
                read |= self._reads[name]
        return read

    def _forward_fake(self, *args: Any) -> tuple[Any, ...]:
        return tuple(self._fake(self.forward_call.Call(*args)))

    def _backward_fake(self, *args: Any) -> tuple[Any, ...]:
        """Gradients like their inputs; those of feature maps in their memory format."""
        call = self.backward_call.Call(*args)

        def like(name: str, x: Tensor, need: bool) -> Tensor:
            if not need:
                return x.new_empty(0)
            return empty_rows_like(x) if name.removeprefix("grad_") in self.maps else x.new_empty(x.shape)

        inputs = [getattr(call, n) for n in self.differentiable]
        needs = [getattr(call, f"need_{n}") for n in self.differentiable]
        return tuple(self.gradients.map(like, inputs, needs))


def _written(empty: Tensor, values: Tensor) -> Tensor:
    assert empty.shape == values.shape
    return values if values.stride() == empty.stride() else empty.copy_(values)
