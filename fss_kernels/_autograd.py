"""The derivatives of an op: the first by its backward op, the second by a plain PyTorch formula.

Two autograd Functions do the work: the backward of `Forward` applies `Backward`, whose own backward differentiates the
formula. Functions take tensors, not lists of them, so both get the lengths of the lists and then every tensor as an
argument of its own. The torch ops, which take lists, have the same rules for whoever calls them past the Functions:
``torch.compile``, ``torch.export`` and tests.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fss_kernels import _backends
from fss_kernels._layout import stand_in
from fss_kernels._signature import Signature

if TYPE_CHECKING:
    from fss_kernels._op import Op

_ANY_ARGUMENTS = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])


def _below_autograd(raw: Callable[..., Any], args: Iterable[Any]) -> Any:
    """Calls a torch op past its own autograd rule, which would cost 6 us where nothing is to be recorded."""
    with torch._C._AutoDispatchBelowAutograd():
        return raw(*args)


def _transformed() -> bool:
    """Whether a functorch transform or a forward-mode level is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Rules:
    """The derivatives of one op. ``call`` is the op for users. ``of_forward`` and ``of_backward`` are what the torch
    ops register, a ``setup_context`` and a ``backward`` each."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.inputs = Signature(f"{op.name}_inputs", op.inputs, {n: n for n in op.lists})
        self.Forward, self.Backward = _functions(self)
        self.of_forward = self._keep_forward, self._backward_of_forward
        self.of_backward = self._keep_backward, self._backward_of_backward

    def call(self, *args: Any) -> Any:
        """The results for the caller."""
        op = self.op
        if torch.compiler.is_compiling():  # Dynamo traces the torch op, whose autograd rule is the same pair
            results = op.fwd(*args)
        elif _transformed() or (torch.is_grad_enabled() and self._records(args)):
            call = op.forward_call.Call(*args)
            results = self.Forward.apply(self.lengths(call), *op.forward_call.flatten(call))
        else:
            results = _below_autograd(op.fwd, args)
        count = len(op.returned)
        return results[0] if count == 1 else results[:count]

    def _records(self, args: Sequence[Any]) -> bool:
        tensors = zip(self.op.inputs, args, strict=False)
        return any(any(t.requires_grad for t in x) if n in self.op.lists else x.requires_grad for n, x in tensors)

    def lengths(self, call: Any) -> dict[str, int]:
        """The lengths of the lists of a call."""
        return {name: len(getattr(call, name)) for name in self.op.lists}

    # ---- first derivatives ------------------------------------------------------------------------------------------

    def keep(self, ctx: Any, call: Any, flags: Sequence[bool], results: Sequence[Tensor]) -> None:
        """Keeps what the backward reads. An input whose values no wanted gradient reads is replaced by a stand-in with
        its shape, dtype and memory format, so that a feature map is neither held in memory nor protected from in-place
        use. Of the outputs only the shapes are kept, for gradients that nobody gives. ``flags`` say for every input
        tensor whether its gradient is wanted."""
        op, lengths = self.op, self.lengths(call)
        tensors = self.inputs.flatten(getattr(call, n) for n in op.inputs)
        needs = self.inputs.nest(flags[: len(tensors)], lengths)
        read, by_name = op.read_by(needs), op.forward_results.Call._make(results)
        inputs = self.inputs.map(
            lambda name, x: x if name in read else stand_in(x), (getattr(call, n) for n in op.inputs)
        )
        saved = [getattr(by_name, n) for n in op.saved]
        ctx.save_for_backward(*self.inputs.flatten(inputs), *saved)
        ctx.lengths, ctx.needs = lengths, needs
        ctx.options = [getattr(call, n) for n in op.options]
        ctx.shapes = [getattr(by_name, n).shape for n in op.outputs]
        ctx.backend = None if torch.compiler.is_compiling() else _backends.forced()
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)

    def first_derivatives(self, ctx: Any, grads: Sequence[Tensor | None]) -> Any:
        """The gradients to the inputs, None where one is not wanted; ``grads`` are those of the outputs."""
        op, of_outputs = self.op, grads[: len(self.op.outputs)]
        given = next((g for g in of_outputs if g is not None), None)
        wanted = [getattr(ctx.needs, n) for n in op.differentiable]
        found: dict[str, Any] = {}
        if given is not None:
            of_outputs = [given.new_zeros(s) if g is None else g for g, s in zip(of_outputs, ctx.shapes, strict=True)]
            flat = (*of_outputs, *ctx.saved_tensors, *ctx.options, *wanted)
            # the autograd engine may run this in a thread that does not see the caller's use_backend
            with _backends.use_backend(ctx.backend) if ctx.backend else contextlib.nullcontext():
                differentiable = torch.is_grad_enabled() or _transformed()
                run = self.Backward.apply if differentiable else self.backward
                results = run(ctx.lengths, *flat)
            nested = op.gradients.nest(results, ctx.lengths)
            nested = op.gradients.map(lambda _, g, need: g if need else None, nested, wanted)
            found = dict(zip(op.differentiable, nested, strict=True))
        return self.inputs.Call._make(
            found.get(n, [None] * ctx.lengths[n] if n in op.lists else None) for n in op.inputs
        )

    def backward(self, lengths: Mapping[str, int], *flat: Any) -> tuple[Tensor, ...]:
        """The backward op on separate tensors."""
        gradients = _below_autograd(self.op.bwd, self.op.backward_call.nest(flat, lengths))
        return tuple(self.op.gradients.flatten(gradients))

    def _keep_forward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.keep(ctx, self.op.forward_call.Call(*inputs), ctx.needs_input_grad, output)

    def _backward_of_forward(self, ctx: Any, *grads: Tensor | None) -> Any:
        return *self.first_derivatives(ctx, grads), *(None for _ in self.op.options)

    # ---- second derivatives -----------------------------------------------------------------------------------------

    def keep_backward(self, ctx: Any, call: Any) -> None:
        """Keeps all arguments of the backward op."""
        flat = self.op.backward_call.flatten(call)
        ctx.save_for_backward(*(x for x in flat if isinstance(x, Tensor)))
        ctx.others, ctx.lengths = [x for x in flat if not isinstance(x, Tensor)], self.lengths(call)
        ctx.set_materialize_grads(False)

    def second_derivatives(self, ctx: Any, grad_grads: Sequence[Tensor | None]) -> Any:
        """The gradients to the arguments of the backward op, None where there is none; ``grad_grads`` are flat.

        The backward op computes the vector-Jacobian product of the formula. That product is differentiated."""
        op = self.op
        of_inputs = Signature("differentiable", op.differentiable, {n: n for n in op.lists})
        call = op.backward_call.nest((*ctx.saved_tensors, *ctx.others), ctx.lengths)
        grads = [getattr(call, f"grad_{n}") for n in op.outputs]
        inputs = of_inputs.flatten(getattr(call, n) for n in op.differentiable)
        needs = of_inputs.flatten(getattr(call, f"need_{n}") for n in op.differentiable)
        wanted = [i for i, need in enumerate(needs) if need]
        free = [i for i, x in enumerate(inputs) if x.is_floating_point()]

        def outputs(values: Mapping[int, Tensor]) -> Any:
            given = of_inputs.nest([values.get(i, x) for i, x in enumerate(inputs)], ctx.lengths)
            return op.formula(call._replace(**given._asdict()))

        def gradients(of_outputs: list[Tensor], free_inputs: list[Tensor]) -> Any:
            values = dict(zip(free, free_inputs, strict=True))
            chosen = [values[i] for i in wanted]
            vjp = torch.func.vjp(lambda *x: outputs(values | dict(zip(wanted, x, strict=True))), *chosen)[1]
            return vjp(of_outputs[0] if len(of_outputs) == 1 else tuple(of_outputs))

        with torch.autocast(grads[0].device.type, enabled=False):  # would round the formula's products
            results, vjp = torch.func.vjp(gradients, grads, [inputs[i] for i in free])[:2]
            given = (grad_grads[i] for i in wanted)
            to_grads, to_free = vjp(
                tuple(torch.zeros_like(r) if g is None else g for g, r in zip(given, results, strict=True))
            )
        by_input = dict(zip(free, to_free, strict=True))
        to_inputs = of_inputs.nest([by_input.get(i) for i in range(len(inputs))], ctx.lengths)
        found = {f"grad_{n}": g for n, g in zip(op.outputs, to_grads, strict=True)} | to_inputs._asdict()
        absent = (found.get(n, [None] * ctx.lengths[n] if n in op.lists else None) for n in op.backward_call.names)
        return op.backward_call.Call._make(absent)

    def _keep_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.keep_backward(ctx, self.op.backward_call.Call(*inputs))

    def _backward_of_backward(self, ctx: Any, *grad_grads: Any) -> Any:
        return tuple(self.second_derivatives(ctx, self.op.gradients.flatten(grad_grads)))


def _functions(rules: Rules) -> tuple[Any, Any]:
    """The two autograd Functions of an op."""
    op = rules.op

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(lengths: Any, *flat: Any) -> Any:
            return _below_autograd(op.fwd, op.forward_call.nest(flat, lengths))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            lengths, *flat = inputs
            rules.keep(ctx, op.forward_call.nest(flat, lengths), ctx.needs_input_grad[1:], output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            gradients = rules.inputs.flatten(rules.first_derivatives(ctx, grads))
            return None, *gradients, *(None for _ in op.options)

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(lengths: Any, *flat: Any) -> Any:
            return rules.backward(lengths, *flat)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            lengths, *flat = inputs
            rules.keep_backward(ctx, op.backward_call.nest(flat, lengths))

        @staticmethod
        def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
            return None, *op.backward_call.flatten(rules.second_derivatives(ctx, grad_grads))

    for function in (Forward, Backward):
        function.__name__ = function.__qualname__ = f"{op.name}_{function.__name__}"
        # Function.apply binds the signature of `forward` on every call; a cached one saves 4 us.
        function.forward.__signature__ = _ANY_ARGUMENTS  # type: ignore[attr-defined]
    return Forward, Backward
