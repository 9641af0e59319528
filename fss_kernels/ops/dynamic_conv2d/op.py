"""fss::dynamic_conv2d_fwd and _bwd: schema, fake, vmap, autograd, backends.

Autocast is settled by the public function, which promotes all tensors to one dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fss_kernels import _autograd, _library
from fss_kernels._batching import fold, unfold
from fss_kernels.ops.dynamic_conv2d import reference

op = _library.Op(
    name="dynamic_conv2d",
    tensors=2,
    outputs=1,
    forward_schema="(Tensor x, Tensor[] kernels, bool merge) -> (Tensor, Tensor)",
    backward_schema=(
        "(Tensor grad, Tensor x, Tensor[] kernels, Tensor taps, bool merge, bool need_x, bool[] need_kernels) "
        "-> (Tensor, Tensor[])"
    ),
    # the op is linear in x and in the kernels: the gradient to one reads the other
    reads=lambda needs: [i for i in range(len(needs)) if (any(needs[1:]) if i == 0 else needs[0])],
    lists=(1,),
)


def _outputs(kernels: Sequence[Tensor], merge: bool) -> int:
    return 1 if merge else len(kernels)


def _dense_forward(x: Tensor, kernels: Sequence[Tensor], merge: bool) -> tuple[Tensor, Tensor]:
    """The reference with its output in the memory format of x, as the kernels write it."""
    out, taps = reference.dynamic_conv2d_fwd(x, kernels, merge)
    return _library.empty_rows_like(x, out.shape[1]).copy_(out), taps.contiguous()


def _dense_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    grad_x, grad_kernels = reference.dynamic_conv2d_bwd(grad, x, *args)
    if grad_x.ndim == 4:
        grad_x = _library.empty_rows_like(x).copy_(grad_x)
    return grad_x, [g.contiguous() for g in grad_kernels]


op.backends["reference"] = _library.Backend(_dense_forward, _dense_backward)
op.add_compiled("cpp")
op.add_compiled("cuda")
op.add_triton("fss_kernels.ops.dynamic_conv2d.triton_kernels")


def _fwd_fake(x: Tensor, kernels: Sequence[Tensor], merge: bool) -> tuple[Tensor, Tensor]:
    sizes = [(int(k.shape[2]), int(k.shape[3])) for k in kernels]
    taps = sum(len(positions) for positions in reference.tap_positions(sizes, merge))
    return (
        _library.empty_rows_like(x, _outputs(kernels, merge) * x.shape[1]),
        x.new_empty((*x.shape[:2], taps), dtype=_library.accumulate_dtype(x)),
    )


def _bwd_fake(
    grad: Tensor,
    x: Tensor,
    kernels: Sequence[Tensor],
    taps: Tensor,
    merge: bool,
    need_x: bool,
    need_kernels: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    return (
        _library.empty_rows_like(x) if need_x else x.new_empty(0),
        [k.new_empty(k.shape if need else 0) for k, need in zip(kernels, need_kernels, strict=True)],
    )


op.register_fake(_fwd_fake, _bwd_fake)


def _fwd_vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, kernels: Sequence[Tensor], merge: bool) -> Any:
    size = info.batch_size
    folded = [fold(k, dim, size) for k, dim in zip(kernels, in_dims[1], strict=True)]
    out, taps = op.fwd(fold(x, in_dims[0], size), folded, merge)
    return (unfold(out, size), unfold(taps, size)), (0, 0)


def _bwd_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size = info.batch_size
    (grad, x, kernels, taps), rest = args[:4], args[4:]
    folded = [fold(k, dim, size) for k, dim in zip(kernels, in_dims[2], strict=True)]
    grad, x, taps = (fold(t, in_dims[i], size) for i, t in ((0, grad), (1, x), (3, taps)))
    grad_x, grad_kernels = op.bwd(grad, x, folded, taps, *rest)
    _, need_x, need_kernels = rest
    unfolded = [unfold(g, size) if need else g for g, need in zip(grad_kernels, need_kernels, strict=True)]
    dims = (0 if need_x else None, [0 if need else None for need in need_kernels])
    return (unfold(grad_x, size) if need_x else grad_x, unfolded), dims


op.register_vmap(_fwd_vmap, _bwd_vmap)


def _formula(x: Tensor, kernels: Sequence[Tensor], taps: Tensor, merge: bool) -> Tensor:
    return reference.dynamic_conv2d_reference(x, kernels, merge)


call = _autograd.differentiable(op, _formula)
