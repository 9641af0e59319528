"""fss::prototype_cosine_fwd and _bwd: schema, fake, vmap, autograd, backends.

The op takes prototypes (B, P, C), or (1, P, C) for all samples: their gradient is then summed over the batch before it
is rounded, which an expanded tensor would not allow. Autocast needs no rule here: the function has promoted dtypes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fss_kernels import _autograd, _library
from fss_kernels._batching import fold, unfold
from fss_kernels.ops.prototype_cosine import reference

_OPTIONS = "float scale, float eps, str eps_mode"

op = _library.Op(
    name="prototype_cosine",
    tensors=2,
    outputs=1,
    forward_schema=f"(Tensor features, Tensor prototypes, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    backward_schema=(
        f"(Tensor grad, Tensor features, Tensor prototypes, Tensor cosines, Tensor norms, {_OPTIONS}, "
        "bool need_features, bool need_prototypes) -> (Tensor, Tensor)"
    ),
)


def _dense_backward(*args: Any) -> tuple[Tensor, Tensor]:
    """The reference with its feature gradient in the features' memory format, as the kernels write it."""
    grad_features, grad_prototypes = reference.prototype_cosine_bwd(*args)
    if grad_features.ndim == 4:
        grad_features = _library.empty_rows_like(args[1]).copy_(grad_features)
    return grad_features, grad_prototypes.contiguous()


op.backends["reference"] = _library.Backend(reference.prototype_cosine_fwd, _dense_backward)
op.add_compiled("cpp")
op.add_compiled("cuda")
op.add_triton("fss_kernels.ops.prototype_cosine.triton_kernels")


def _fwd_fake(features: Tensor, prototypes: Tensor, scale: float, eps: float, eps_mode: str) -> tuple[Tensor, ...]:
    batch, _, height, width = features.shape
    dtype = _library.accumulate_dtype(features)
    return (
        features.new_empty(batch, prototypes.shape[1], height, width),
        features.new_empty((batch, prototypes.shape[1], height, width), dtype=dtype),
        features.new_empty((batch, height, width), dtype=dtype),
    )


def _bwd_fake(grad: Tensor, features: Tensor, prototypes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_features, need_prototypes = rest[-2:]
    return (
        _library.empty_rows_like(features) if need_features else features.new_empty(0),
        prototypes.new_empty(prototypes.shape) if need_prototypes else prototypes.new_empty(0),
    )


op.register_fake(_fwd_fake, _bwd_fake)


def _sets(prototypes: Tensor, dim: int | None, batch: int) -> Tensor:
    """Prototypes, mapped or not, with one set a sample."""
    first = 1 if dim == 0 else 0
    sizes = [-1] * prototypes.ndim
    sizes[first] = batch
    return prototypes.expand(sizes)


def _fwd_vmap(info: Any, in_dims: tuple[Any, ...], features: Tensor, prototypes: Tensor, *options: Any) -> Any:
    size = info.batch_size
    if in_dims[0] is None:  # one feature map, many prototypes: still one read of the features
        scores, cosines, norms = op.fwd(features, fold(prototypes, in_dims[1], size, 1), *options)
        return (unfold(scores, size, 1), unfold(cosines, size, 1), norms), (1, 1, None)
    folded = fold(features, in_dims[0], size, 0)
    sets = fold(_sets(prototypes, in_dims[1], folded.shape[0] // size), in_dims[1], size, 0)
    return tuple(unfold(r, size, 0) for r in op.fwd(folded, sets, *options)), (0, 0, 0)


def _bwd_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    size = info.batch_size
    tensors = list(args[:5])
    batch = tensors[1].shape[1 if in_dims[1] == 0 else 0]
    shared = tensors[2].shape[1 if in_dims[2] == 0 else 0] != batch
    tensors[2] = _sets(tensors[2], in_dims[2], batch)
    folded = [fold(t, dim, size, 0) for t, dim in zip(tensors, in_dims[:5], strict=True)]
    grad_features, grad_prototypes = op.bwd(*folded, *args[5:])
    need_features, need_prototypes = args[-2:]
    if need_features:
        grad_features = unfold(grad_features, size, 0)
    if need_prototypes:
        grad_prototypes = unfold(grad_prototypes, size, 0)
        grad_prototypes = grad_prototypes.sum(1, keepdim=True) if shared else grad_prototypes
    return (grad_features, grad_prototypes), (0 if need_features else None, 0 if need_prototypes else None)


op.register_vmap(_fwd_vmap, _bwd_vmap)


def _formula(
    features: Tensor, prototypes: Tensor, cosines: Tensor, norms: Tensor, scale: float, eps: float, eps_mode: str
) -> Tensor:
    return reference.prototype_cosine_reference(features, prototypes, scale, eps, eps_mode)


call = _autograd.differentiable(op, _formula)
