"""fss::hypercorrelation_fwd and _bwd.

One call is one level of a pyramid: L layers whose grids agree, stacked in the output; a single layer is a level of
one. The mask is an input without a gradient: a cosine does not change with the length of a vector. No mask is the mask
of one pixel with the value 1. Dtypes are promoted by the public functions under autocast, before the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fss_kernels._layout import accumulate_dtype
from fss_kernels._op import Op
from fss_kernels.ops.hypercorrelation import reference


def _fake(call: Any) -> tuple[Tensor, ...]:
    query, layers = call.queries[0], len(call.queries)
    batch, dtype = query.shape[0], accumulate_dtype(query)
    (ha, wa), (hb, wb) = query.shape[2:], call.supports[0].shape[2:]
    return (
        query.new_empty((batch, layers, ha, wa, hb, wb)),
        query.new_empty((layers, batch, ha, wa), dtype=dtype),
        query.new_empty((layers, batch, hb, wb), dtype=dtype),
        query.new_empty((batch, hb, wb), dtype=dtype),
        query.new_empty((layers, batch, ha * wa, (hb * wb + 7) // 8 if call.clamp else 0), dtype=torch.uint8),
    )


def _formula(call: Any) -> Tensor:
    return reference.correlate_level(call.queries, call.supports, call.weights, call.eps, call.eps_mode, call.clamp)


op = Op(
    "hypercorrelation(Tensor[] queries, Tensor[] supports, Tensor mask, float eps, str eps_mode, bool clamp)"
    " -> (Tensor correlation, Tensor query_norms, Tensor support_norms, Tensor weights, Tensor signs)",
    saved=("query_norms", "support_norms", "weights", "signs"),
    differentiable=("queries", "supports"),
    # of the mask only the resized one, which is saved
    reads=dict.fromkeys(("queries", "supports"), ("queries", "supports")),
    maps=("queries", "supports"),
    batch_dims={"query_norms": 1, "support_norms": 1, "signs": 1},
    fake=_fake,
    formula=_formula,
)
op.add_formulas("reference", reference.hypercorrelation_fwd, reference.hypercorrelation_bwd)
op.add_compiled("cpp")
op.add_triton("fss_kernels.ops.hypercorrelation.triton_kernels")
call = op.call
