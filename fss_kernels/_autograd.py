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
    """Returns ``call(*tensors, *options) -> outputs`` that records the op for autograd only when something needs it.

    ``formula(*tensors, *saved, *options)`` is the op's differentiable outputs (a tensor, or a tuple when there are
    several) in plain PyTorch. Its vector-Jacobian product, differentiated, is the backward of the backward.
    """
    n_in, n_out = op.tensors, op.outputs

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return _below_autograd(op.bwd, args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = [a for a in inputs if isinstance(a, torch.Tensor)]
            ctx.rest = inputs[len(tensors) :]
            ctx.save_for_backward(*tensors)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grad_grads: torch.Tensor | None) -> Any:
            saved = ctx.saved_tensors
            grads, tensors, statistics = saved[:n_out], saved[n_out : n_out + n_in], saved[n_out + n_in :]
            options, needs = ctx.rest[:-n_in], ctx.rest[-n_in:]
            wanted = [i for i in range(n_in) if needs[i]]
            free = [i for i in range(n_in) if tensors[i].is_floating_point()]

            def gradients(*values: torch.Tensor) -> Any:
                given, differentiated = values[:n_out], list(tensors)
                for i, value in zip(free, values[n_out:], strict=True):
                    differentiated[i] = value

                def outputs_of(*chosen: torch.Tensor) -> Any:
                    arguments = list(differentiated)
                    for i, value in zip(wanted, chosen, strict=True):
                        arguments[i] = value
                    return formula(*arguments, *statistics, *options)

                vjp: Callable[..., Any] = torch.func.vjp(outputs_of, *(differentiated[i] for i in wanted))[1]
                return vjp(given[0] if n_out == 1 else tuple(given))

            results, vjp = torch.func.vjp(gradients, *grads, *(tensors[i] for i in free))  # type: ignore[misc]
            second = vjp(tuple(_zeros_for_none([grad_grads[i] for i in wanted], results)))
            by_tensor = dict(zip(free, second[n_out:], strict=True))
            return (
                *second[:n_out],
                *(by_tensor.get(i) for i in range(n_in)),
                *(None for _ in range(len(statistics) + len(ctx.rest))),
            )

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return _below_autograd(op.fwd, args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.options = inputs[n_in:]
            needs = ctx.needs_input_grad[:n_in]
            ctx.backend = None if torch.compiler.is_compiling() else _library.forced_backend()
            # the outputs only lend their shapes to missing gradients, of which there are none with one output
            kept = output[n_out:] if n_out == 1 else output
            ctx.save_for_backward(*_values_read(op, inputs[:n_in], needs), *kept)
            ctx.mark_non_differentiable(*output[n_out:])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
            if all(g is None for g in grads[:n_out]):
                return (None,) * (n_in + len(ctx.options))
            kept = ctx.saved_tensors  # once: unpacking may recompute (checkpointing)
            tensors, rest = kept[:n_in], kept[n_in:]
            if n_out > 1:
                grads, rest = tuple(_zeros_for_none(grads[:n_out], rest[:n_out])), rest[n_out:]
            needs = tuple(ctx.needs_input_grad[:n_in])
            arguments = (*grads[:n_out], *tensors, *rest, *ctx.options, *needs)
            differentiable_again = torch.is_grad_enabled() or _transformed()
            # the autograd engine may run this in a thread that does not see the caller's use_backend
            with _library.use_backend(ctx.backend) if ctx.backend else contextlib.nullcontext():
                gradients = Backward.apply(*arguments) if differentiable_again else _below_autograd(op.bwd, arguments)
            return (
                *(g if need else None for g, need in zip(gradients, needs, strict=True)),
                *(None for _ in ctx.options),
            )

    for function in (Forward, Backward):
        function.__name__ = function.__qualname__ = f"{op.name}_{function.__name__}"
        # Function.apply binds the signature of `forward` on every call; a cached one saves 4 us.
        function.forward.__signature__ = _ANY_ARGUMENTS  # type: ignore[attr-defined]
    op.register_autograd(Forward, Backward)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():  # Dynamo traces the raw op, whose autograd rule is the same pair
            results = op.fwd(*args)
        elif _transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in args[:n_in])):
            results = Forward.apply(*args)
        else:
            results = _below_autograd(op.fwd, args)
        return results[0] if n_out == 1 else results[:n_out]

    return call
