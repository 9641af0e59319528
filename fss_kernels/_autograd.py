"""The autograd pair of an op: first derivatives by its backward op, second derivatives by a plain PyTorch formula."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from fss_kernels import _library

_ANY_ARGUMENTS = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])


def _zeros_for_none(values: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(x) if v is None else v for v, x in zip(values, like, strict=True)]


def _values_read(op: _library.Op, tensors: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor]:
    """The inputs to keep for the backward: one whose values no wanted gradient reads is replaced by a stand-in with its
    shape, dtype and memory format, so that a feature map is neither held in memory nor protected from in-place use."""
    read = op.reads(needs)
    return [t if i in read else _library.stand_in(t) for i, t in enumerate(tensors)]


def _below_autograd(raw: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Calls a raw op past its own autograd rule, which would cost 6 us where nothing is to be recorded."""
    with torch._C._AutoDispatchBelowAutograd():
        return raw(*args)


def _transformed() -> bool:
    """Whether a functorch transform or a forward-mode level is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable(op: _library.Op, formula: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``call(*tensors, *options) -> results`` that records the op for autograd only when something needs it.
    The results are the outputs and the statistics that the op returns.

    ``formula(*tensors, *saved, *options)`` is the op's differentiable outputs (a tensor, or a tuple when there are
    several) in plain PyTorch. Its vector-Jacobian product, differentiated, is the backward of the backward.

    An autograd Function takes tensors, not lists of them: both Functions get the lengths of the lists (``sizes``) and
    then every tensor as an argument of its own. The raw ops, which take lists, share their rules.
    """
    n_in, n_out = op.tensors, op.outputs

    def keep_for_backward(
        ctx: Any, sizes: Any, tensors: Sequence[torch.Tensor], options: Any, needs: Sequence[bool], output: Any
    ) -> None:
        ctx.sizes, ctx.options, ctx.inputs = sizes, options, len(tensors)
        ctx.backend = None if torch.compiler.is_compiling() else _library.forced_backend()
        # the outputs only lend their shapes to missing gradients, of which there are none with one output
        kept = output[n_out:] if n_out == 1 else output
        ctx.save_for_backward(*_values_read(op, tensors, needs), *kept)
        ctx.mark_non_differentiable(*output[n_out:])
        ctx.set_materialize_grads(False)

    def first_derivatives(ctx: Any, needs: Sequence[bool], grads: Sequence[torch.Tensor | None]) -> list[Any]:
        """One gradient a tensor, None where it is not needed."""
        if all(g is None for g in grads[:n_out]):
            return [None] * ctx.inputs
        kept = ctx.saved_tensors  # once: unpacking may recompute (checkpointing)
        tensors, rest = kept[: ctx.inputs], kept[ctx.inputs :]
        if n_out > 1:
            grads, rest = tuple(_zeros_for_none(grads[:n_out], rest[:n_out])), rest[n_out:]
        arguments = (*grads[:n_out], *tensors, *rest, *ctx.options, *needs)
        # the autograd engine may run this in a thread that does not see the caller's use_backend
        with _library.use_backend(ctx.backend) if ctx.backend else contextlib.nullcontext():
            if torch.is_grad_enabled() or _transformed():  # differentiable again
                gradients = Backward.apply(ctx.sizes, *arguments)
            else:
                gradients = backward_op(ctx.sizes, *arguments)
        return [g if need else None for g, need in zip(gradients, needs, strict=True)]

    def backward_op(sizes: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        """The raw backward op on separate tensors."""
        if not op.lists:
            return _below_autograd(op.bwd, args)
        count = n_in + sum(sizes) - len(sizes)
        tensors, rest = args[n_out : n_out + count], args[n_out + count : len(args) - count]
        nested = (*args[:n_out], *op.nest(sizes, tensors), *rest, *op.nest(sizes, args[len(args) - count :]))
        return tuple(op.flatten(_below_autograd(op.bwd, nested))[1])

    def second_derivatives(
        sizes: Any,
        grads: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
        statistics: Sequence[torch.Tensor],
        options: Sequence[Any],
        needs: Sequence[bool],
        grad_grads: Sequence[torch.Tensor | None],
    ) -> tuple[Any, list[Any]]:
        """Gradients to ``grads`` and to ``tensors``."""
        wanted = [i for i, need in enumerate(needs) if need]
        free = [i for i, t in enumerate(tensors) if t.is_floating_point()]

        def gradients(*values: torch.Tensor) -> Any:
            given, differentiated = values[:n_out], list(tensors)
            for i, value in zip(free, values[n_out:], strict=True):
                differentiated[i] = value

            def outputs_of(*chosen: torch.Tensor) -> Any:
                arguments = list(differentiated)
                for i, value in zip(wanted, chosen, strict=True):
                    arguments[i] = value
                return formula(*op.nest(sizes, arguments), *statistics, *options)

            vjp: Callable[..., Any] = torch.func.vjp(outputs_of, *(differentiated[i] for i in wanted))[1]
            return vjp(given[0] if n_out == 1 else tuple(given))

        with torch.autocast(grads[0].device.type, enabled=False):  # would round the formula's products
            results, vjp = torch.func.vjp(gradients, *grads, *(tensors[i] for i in free))  # type: ignore[misc]
            second = vjp(tuple(_zeros_for_none([grad_grads[i] for i in wanted], results)))
        by_tensor = dict(zip(free, second[n_out:], strict=True))
        return second[:n_out], [by_tensor.get(i) for i in range(len(tensors))]

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(sizes: Any, *args: Any) -> Any:
            return backward_op(sizes, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = [a for a in inputs if isinstance(a, torch.Tensor)]
            ctx.sizes, ctx.rest, ctx.inputs = inputs[0], inputs[1 + len(tensors) :], len(output)
            ctx.save_for_backward(*tensors)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grad_grads: torch.Tensor | None) -> Any:
            saved, n = ctx.saved_tensors, ctx.inputs
            grads, tensors, statistics = saved[:n_out], saved[n_out : n_out + n], saved[n_out + n :]
            options, needs = ctx.rest[:-n], ctx.rest[-n:]
            to_grads, to_tensors = second_derivatives(ctx.sizes, grads, tensors, statistics, options, needs, grad_grads)
            return None, *to_grads, *to_tensors, *(None,) * (len(statistics) + len(ctx.rest))

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(sizes: Any, *args: Any) -> Any:
            count = n_in + sum(sizes) - len(sizes)
            return _below_autograd(op.fwd, (*op.nest(sizes, args[:count]), *args[count:]))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            sizes = inputs[0]
            count = n_in + sum(sizes) - len(sizes)
            tensors, options = inputs[1 : 1 + count], inputs[1 + count :]
            keep_for_backward(ctx, sizes, tensors, options, ctx.needs_input_grad[1 : 1 + count], output)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
            needs = tuple(ctx.needs_input_grad[1 : 1 + ctx.inputs])
            return None, *first_derivatives(ctx, needs, grads), *(None,) * len(ctx.options)

    for function in (Forward, Backward):
        function.__name__ = function.__qualname__ = f"{op.name}_{function.__name__}"
        # Function.apply binds the signature of `forward` on every call; a cached one saves 4 us.
        function.forward.__signature__ = _ANY_ARGUMENTS  # type: ignore[attr-defined]

    def raw_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        sizes, tensors = op.flatten(inputs[:n_in])
        keep_for_backward(ctx, sizes, tensors, inputs[n_in:], ctx.needs_input_grad[: len(tensors)], output)

    def raw_backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        needs = tuple(op.flatten(ctx.needs_input_grad[:n_in])[1])
        return *op.nest(ctx.sizes, first_derivatives(ctx, needs, grads)), *(None,) * len(ctx.options)

    def raw_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.sizes, tensors = op.flatten(inputs[n_out : n_out + n_in])
        statistics = [a for a in inputs[n_out + n_in :] if isinstance(a, torch.Tensor)]
        ctx.options, ctx.needs = inputs[n_out + n_in + len(statistics) : -n_in], op.flatten(inputs[-n_in:])[1]
        ctx.inputs = len(tensors)
        ctx.save_for_backward(*inputs[:n_out], *tensors, *statistics)
        ctx.set_materialize_grads(False)

    def raw_backward_backward(ctx: Any, *grad_grads: Any) -> Any:
        saved, n = ctx.saved_tensors, ctx.inputs
        grads, tensors, statistics = saved[:n_out], saved[n_out : n_out + n], saved[n_out + n :]
        to_grads, to_tensors = second_derivatives(
            ctx.sizes, grads, tensors, statistics, ctx.options, ctx.needs, op.flatten(grad_grads)[1]
        )
        nones = (None,) * (len(statistics) + len(ctx.options) + n_in)
        return *to_grads, *op.nest(ctx.sizes, to_tensors), *nones

    op.register_autograd("fwd", raw_setup_context, raw_backward)
    op.register_autograd("bwd", raw_backward_setup_context, raw_backward_backward)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():  # Dynamo traces the raw op, whose autograd rule is the same pair
            results = op.fwd(*args)
        else:
            sizes, tensors = op.flatten(args[:n_in])
            if _transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
                results = Forward.apply(sizes, *tensors, *args[n_in:])
            else:
                results = _below_autograd(op.fwd, args)
        return results[0] if n_out + op.returned == 1 else results[: n_out + op.returned]

    return call
