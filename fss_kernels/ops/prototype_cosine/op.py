"""fss::prototype_cosine_fwd and _bwd.

The op takes prototypes (B, P, C), or (1, P, C) for all samples: their gradient is then summed over the batch before it
is rounded, which an expanded tensor would not allow. Autocast needs no rule here: the function has promoted dtypes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fss_kernels._batching import backward_rule, fold, forward_rule, unfold
from fss_kernels._layout import accumulate_dtype
from fss_kernels._op import Op
from fss_kernels.ops.prototype_cosine import reference


def _fake(call: Any) -> tuple[Tensor, ...]:
    features = call.features
    batch, _, height, width = features.shape
    shape, dtype = (batch, call.prototypes.shape[1], height, width), accumulate_dtype(features)
    return (
        features.new_empty(shape),
        features.new_empty(shape, dtype=dtype),
        features.new_empty((batch, height, width), dtype=dtype),
    )


def _formula(call: Any) -> Tensor:
    return reference.prototype_cosine_reference(call.features, call.prototypes, call.scale, call.eps, call.eps_mode)


def _one_set_each(call: Any, dims: Any) -> tuple[Any, bool]:
    """The call with a set of prototypes for every sample, and whether there was one for all."""
    batch = call.features.shape[1 if dims.features == 0 else 0]
    first = 1 if dims.prototypes == 0 else 0
    sizes = [batch if d == first else -1 for d in range(call.prototypes.ndim)]
    return call._replace(prototypes=call.prototypes.expand(sizes)), call.prototypes.shape[first] != batch


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    call, dims, size = op.forward_call.Call(*args), op.forward_call.Call(*in_dims), info.batch_size
    if dims.features is not None:
        return forward_rule(op)(info, in_dims, *_one_set_each(call, dims)[0])
    # one feature map, many prototypes: still one read of the features
    scores, cosines, norms = op.fwd(*call._replace(prototypes=fold(call.prototypes, dims.prototypes, size, 1)))
    return (unfold(scores, size, 1), unfold(cosines, size, 1), norms), (1, 1, None)


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    call, shared = _one_set_each(op.backward_call.Call(*args), op.backward_call.Call(*in_dims))
    (grad_features, grad_prototypes), dims = backward_rule(op)(info, in_dims, *call)
    if shared and call.need_prototypes:
        grad_prototypes = grad_prototypes.sum(1, keepdim=True)
    return (grad_features, grad_prototypes), dims


op = Op(
    "prototype_cosine(Tensor features, Tensor prototypes, float scale, float eps, str eps_mode)"
    " -> (Tensor scores, Tensor cosines, Tensor norms)",
    saved=("cosines", "norms"),
    differentiable=("features", "prototypes"),
    maps=("features",),
    fake=_fake,
    formula=_formula,
    vmap_forward=_forward_vmap,
    vmap_backward=_backward_vmap,
)
op.add_formulas("reference", reference.prototype_cosine_fwd, reference.prototype_cosine_bwd)
op.add_compiled("cpp")
op.add_compiled("cuda")
op.add_triton("fss_kernels.ops.prototype_cosine.triton_kernels")
call = op.call
