"""The derivatives of an op: the first by its backward op, the second by a plain PyTorch formula.

Two autograd Functions do the work: the backward of `Forward` applies `Backward`, whose own backward differentiates the
formula. Functions take tensors, not lists of them, so both get the lengths of the lists and then every tensor as an
argument of its own. The torch ops, which take lists, have the same rules for whoever calls them past the Functions:
``torch.compile``, ``torch.export`` and tests.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fss_kernels import _backends
from fss_kernels._layout import stand_in

if TYPE_CHECKING:
    from fss_kernels._op import Op

_ANY_ARGUMENTS = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])


def _below_autograd(raw: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Calls a torch op past its own autograd rule, which would cost 6 us where nothing is to be recorded."""
    with torch._C._AutoDispatchBelowAutograd():
        return raw(*args)


def _transformed() -> bool:
    """Whether a functorch transform or a forward-mode level is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Wanted(NamedTuple):
    """What the flags of the input tensors mean for a backward."""

    read: tuple[bool, ...]  # for every tensor, whether the wanted gradients depend on its values
    needs: tuple[Any, ...]  # the flags of the backward op
    places: tuple[int | None, ...]  # for every tensor, which gradient of the backward op is its own, if it is wanted
    refused: tuple[str, ...]  # inputs without a gradient of which one is wanted


class Rules:
    """The derivatives of one op. ``call`` is the op for users. ``of_forward`` and ``of_backward`` are what the torch
    ops register, a ``setup_context`` and a ``backward`` each."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self._wanted: dict[Any, _Wanted] = {}
        self.Forward, self.Backward = _functions(self)
        self.call = self._caller()
        self.of_forward = self._keep_forward, self._backward_of_forward
        self.of_backward = self._keep_backward, self._backward_of_backward

    def _caller(self) -> Callable[..., Any]:
        op, count, inputs = self.op, len(self.op.returned), len(self.op.inputs)

        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():  # Dynamo traces the torch op, whose autograd rule is the same pair
                results = op.fwd(*args)
            else:
                lengths: tuple[int, ...] = ()
                flat: Sequence[Any] = args
                tensors: Sequence[Any] = args[:inputs]
                if op.lists:
                    lengths, flat = op.lengths(args), op.forward_call.flatten(args)
                    tensors = flat[: op.tensors(lengths)]
                if _transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
                    results = self.Forward.apply(lengths, *flat)
                else:
                    results = _below_autograd(op.fwd, args)
            return results[0] if count == 1 else results[:count]

        return call

    # ---- first derivatives ------------------------------------------------------------------------------------------

    def wanted(self, flags: Sequence[bool], lengths: tuple[int, ...]) -> _Wanted:
        """The meaning of flags, one per input tensor."""
        key = tuple(flags[: self.op.tensors(lengths)]), lengths
        if key not in self._wanted:
            self._wanted[key] = self._meaning(*key)
        return self._wanted[key]

    def _meaning(self, flags: tuple[bool, ...], lengths: tuple[int, ...]) -> _Wanted:
        op = self.op
        needs = op.input_tensors.Call._make(op.input_tensors.nest(flags, lengths))
        read = op.read_by(needs)
        gradient, places = 0, []
        for name, need in zip(op.inputs, needs, strict=True):
            for each in need if name in op.lists else (need,):
                places.append(gradient if each and name in op.differentiable else None)
                gradient += name in op.differentiable
        constants = (n for n in op.inputs if n not in op.differentiable)
        return _Wanted(
            tuple(op.input_tensors.flatten(op.input_tensors.map(lambda name, _: name in read, needs))),
            tuple(getattr(needs, name) for name in op.differentiable),
            tuple(places),
            tuple(n for n in constants if getattr(needs, n) and (n not in op.lists or any(getattr(needs, n)))),
        )

    def keep(
        self, ctx: Any, lengths: tuple[int, ...], flat: Sequence[Any], flags: Sequence[bool], results: Sequence[Tensor]
    ) -> None:
        """Keeps what the backward reads. An input whose values no wanted gradient reads is replaced by a stand-in with
        its shape, dtype and memory format, so that a feature map is neither held in memory nor protected from in-place
        use. Of several outputs the shapes are kept, for gradients that nobody gives."""
        count, outputs = self.op.tensors(lengths), len(self.op.outputs)
        ctx.wanted, ctx.lengths = self.wanted(flags, lengths), lengths
        inputs = [t if read else stand_in(t) for t, read in zip(flat[:count], ctx.wanted.read, strict=True)]
        ctx.save_for_backward(*inputs, *results[outputs:])
        ctx.options = flat[count:]
        ctx.shapes = [(r.shape, r.dtype) for r in results[:outputs]] if outputs > 1 else None
        ctx.backend = None if torch.compiler.is_compiling() else _backends.forced()
        ctx.mark_non_differentiable(*results[outputs:])
        ctx.set_materialize_grads(False)

    def first_derivatives(self, ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients to the input tensors, None where one is not wanted; ``grads`` are those of the outputs."""
        of_outputs, places = grads[: len(self.op.outputs)], ctx.wanted.places
        given = next((g for g in of_outputs if g is not None), None)
        if given is None:
            return [None] * len(places)
        if ctx.wanted.refused:  # never a silent zero
            raise RuntimeError(f"{self.op.name}: no gradient to {', '.join(ctx.wanted.refused)}: pass it detached")
        if ctx.shapes:
            known = zip(of_outputs, ctx.shapes, strict=True)
            of_outputs = [given.new_zeros(s, dtype=d) if g is None else g for g, (s, d) in known]
        flat = (*of_outputs, *ctx.saved_tensors, *ctx.options, *ctx.wanted.needs)
        run = self.Backward.apply if torch.is_grad_enabled() or _transformed() else self.backward
        # the autograd engine may run this in a thread that does not see the caller's use_backend
        with _backends.use_backend(ctx.backend) if ctx.backend else contextlib.nullcontext():
            results = run(ctx.lengths, *flat)
        return [None if i is None else results[i] for i in places]

    def backward(self, lengths: tuple[int, ...], *flat: Any) -> tuple[Tensor, ...]:
        """The backward op on separate tensors."""
        gradients = _below_autograd(self.op.bwd, self.op.backward_call.nest(flat, lengths))
        return tuple(self.op.gradients.flatten(gradients))

    def _keep_forward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        flat = self.op.forward_call.flatten(inputs)
        self.keep(ctx, self.op.lengths(inputs), flat, ctx.needs_input_grad, output)

    def _backward_of_forward(self, ctx: Any, *grads: Tensor | None) -> Any:
        gradients = self.op.input_tensors.nest(self.first_derivatives(ctx, grads), ctx.lengths)
        return *gradients, *(None for _ in self.op.options)

    # ---- second derivatives -----------------------------------------------------------------------------------------

    def keep_backward(self, ctx: Any, lengths: tuple[int, ...], flat: Sequence[Any]) -> None:
        """Keeps all arguments of the backward op."""
        ctx.save_for_backward(*(x for x in flat if isinstance(x, Tensor)))
        ctx.others, ctx.lengths = [x for x in flat if not isinstance(x, Tensor)], lengths
        ctx.set_materialize_grads(False)

    def second_derivatives(self, ctx: Any, grad_grads: Sequence[Tensor | None]) -> Any:
        """The gradients to the arguments of the backward op, None where there is none; ``grad_grads`` are flat.

        The backward op computes the vector-Jacobian product of the formula. That product is differentiated."""
        op, lengths = self.op, ctx.lengths
        call = op.backward_call.Call._make(op.backward_call.nest((*ctx.saved_tensors, *ctx.others), lengths))
        grads = [getattr(call, f"grad_{n}") for n in op.outputs]
        inputs = op.gradients.flatten([getattr(call, n) for n in op.differentiable])
        needs = op.gradients.flatten([getattr(call, f"need_{n}") for n in op.differentiable])
        wanted = [i for i, need in enumerate(needs) if need]
        free = [i for i, x in enumerate(inputs) if x.is_floating_point()]

        def outputs(values: Mapping[int, Tensor]) -> Any:
            given = op.gradients.nest([values.get(i, x) for i, x in enumerate(inputs)], lengths)
            return op.formula(call._replace(**dict(zip(op.differentiable, given, strict=True))))

        def gradients(of_outputs: list[Tensor], of_free: list[Tensor]) -> Any:
            values = dict(zip(free, of_free, strict=True))
            chosen = [values[i] for i in wanted]
            vjp = torch.func.vjp(lambda *x: outputs(values | dict(zip(wanted, x, strict=True))), *chosen)[1]
            return vjp(of_outputs[0] if len(of_outputs) == 1 else tuple(of_outputs))

        with torch.autocast(grads[0].device.type, enabled=False):  # would round the formula's products
            results, vjp = torch.func.vjp(gradients, grads, [inputs[i] for i in free])[:2]
            given = zip((grad_grads[i] for i in wanted), results, strict=True)
            to_grads, to_free = vjp(tuple(torch.zeros_like(r) if g is None else g for g, r in given))
        by_input = dict(zip(free, to_free, strict=True))
        to_inputs = op.gradients.nest([by_input.get(i) for i in range(len(inputs))], lengths)
        found = {f"grad_{n}": g for n, g in zip(op.outputs, to_grads, strict=True)}
        found |= zip(op.differentiable, to_inputs, strict=True)
        nothing = op.backward_call.map(lambda *_: None, call)
        return nothing._replace(**found)

    def _keep_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call = self.op.backward_call.Call(*inputs)
        lengths = tuple(len(getattr(call, name)) for name in self.op.lists)
        self.keep_backward(ctx, lengths, self.op.backward_call.flatten(call))

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
            rules.keep(ctx, inputs[0], inputs[1:], ctx.needs_input_grad[1:], output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return None, *rules.first_derivatives(ctx, grads), *(None for _ in op.options)

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(lengths: Any, *flat: Any) -> Any:
            return rules.backward(lengths, *flat)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            rules.keep_backward(ctx, inputs[0], inputs[1:])

        @staticmethod
        def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
            return None, *op.backward_call.flatten(rules.second_derivatives(ctx, grad_grads))

    for function in (Forward, Backward):
        function.__name__ = function.__qualname__ = f"{op.name}_{function.__name__}"
        # Function.apply binds the signature of `forward` on every call; a cached one saves 4 us.
        function.forward.__signature__ = _ANY_ARGUMENTS  # type: ignore[attr-defined]
    return Forward, Backward
