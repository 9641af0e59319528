"""fss::dynamic_conv2d_fwd and _bwd.

Autocast is settled by the public function, which promotes all tensors to one dtype.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fss_kernels._layout import accumulate_dtype, empty_rows_like
from fss_kernels._op import Op
from fss_kernels.ops.dynamic_conv2d import reference


def _fake(call: Any) -> tuple[Tensor, Tensor]:
    x, sizes = call.x, [(int(k.shape[2]), int(k.shape[3])) for k in call.kernels]
    taps = sum(len(positions) for positions in reference.tap_positions(sizes, call.merge))
    outputs = 1 if call.merge else len(sizes)
    return (
        empty_rows_like(x, outputs * x.shape[1]),
        x.new_empty((*x.shape[:2], taps), dtype=accumulate_dtype(x)),
    )


def _formula(call: Any) -> Tensor:
    return reference.dynamic_conv2d_reference(call.x, call.kernels, call.merge)


op = Op(
    "dynamic_conv2d(Tensor x, Tensor[] kernels, bool merge) -> (Tensor out, Tensor taps)",
    saved=("taps",),
    differentiable=("x", "kernels"),
    reads={"x": ("kernels",), "kernels": ("x",)},  # the op is linear in each
    maps=("x", "out"),
    fake=_fake,
    formula=_formula,
)
op.add_formulas("reference", reference.dynamic_conv2d_fwd, reference.dynamic_conv2d_bwd)
op.add_compiled("cpp")
op.add_compiled("cuda")
op.add_triton("fss_kernels.ops.dynamic_conv2d.triton_kernels")
call = op.call
