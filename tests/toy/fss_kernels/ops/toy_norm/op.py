"""fss::toy_norm_fwd and _bwd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fss_kernels._layout import accumulate_dtype, empty_rows_like
from fss_kernels._op import Op
from fss_kernels.ops.toy_norm import reference


def _fake(call: Any) -> tuple[Tensor, Tensor]:
    x = call.features
    return empty_rows_like(x), x.new_empty((x.shape[0], *x.shape[2:]), dtype=accumulate_dtype(x))


def _formula(call: Any) -> Tensor:
    return reference.toy_norm_reference(call.features, call.gain, call.eps)


op = Op(
    "toy_norm(Tensor features, Tensor gain, float eps) -> (Tensor out, Tensor factor)",
    saved=("factor",),
    differentiable=("features", "gain"),
    reads={"features": ("features", "gain"), "gain": ("features",)},
    maps=("features", "out"),
    fake=_fake,
    formula=_formula,
)
op.add_formulas("reference", reference.toy_norm_fwd, reference.toy_norm_bwd)
op.add_compiled("cpp")
call = op.call
