"""fss::dense_cosine_max and fss::dense_cosine_match, _fwd and _bwd.

Shots are folded into the first dimension: query (B, C, Hq, Wq), support (N, C, Hs, Ws) and mask (N, h, w) with N = B*S.
The mask only selects, so it is an input without a gradient; no mask is the mask of one pixel with the value 1. Autocast
is settled by the public functions, which promote both features to one dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fss_kernels._layout import accumulate_dtype
from fss_kernels._op import Op
from fss_kernels.ops.dense_cosine import reference

_FEATURES = ("query", "support")
# of the mask only which pixels it keeps: the norms of the others are 0
_READS = dict.fromkeys(_FEATURES, _FEATURES)


def _norms_fake(query: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(query)
    return (
        query.new_empty((query.shape[0], *query.shape[2:]), dtype=dtype),
        query.new_empty((support.shape[0], *support.shape[2:]), dtype=dtype),
    )


def _max_fake(call: Any) -> tuple[Tensor, ...]:
    query, support = call.query, call.support
    shape = (support.shape[0], len(call.windows) // 2, *query.shape[2:])
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64), *_norms_fake(query, support)


def _match_fake(call: Any) -> tuple[Tensor, ...]:
    query, support = call.query, call.support
    shapes = [(support.shape[0], *x.shape[2:]) for x in (query, support)]
    scores, index = ([query.new_empty(s, dtype=dtype) for s in shapes] for dtype in (query.dtype, torch.int64))
    return *scores, *index, *_norms_fake(query, support)


def _max_formula(call: Any) -> Tensor:
    pairs = reference.pairs_of_max(call.index, call.windows, call.support.shape[2:])
    return torch.stack(_scores_at(call, pairs), 1).view(call.index.shape)


def _match_formula(call: Any) -> tuple[Tensor, Tensor]:
    of_query, of_support = _scores_at(call, reference.pairs_of_match(call.query_index, call.support_index))
    return of_query.view(call.query_index.shape), of_support.view(call.support_index.shape)


def _scores_at(call: Any, pairs: Any) -> list[Tensor]:
    return reference.scores_at(call.query, call.support, call.support_norm, pairs, call.eps, call.eps_mode)


max_op = Op(
    "dense_cosine_max(Tensor query, Tensor support, Tensor mask, int[] windows, str masked, float eps, str eps_mode)"
    " -> (Tensor scores, Tensor index, Tensor query_norm, Tensor support_norm)",
    saved=("index", "query_norm", "support_norm"),
    returned=("index",),
    differentiable=_FEATURES,
    reads=_READS,
    maps=_FEATURES,
    fake=_max_fake,
    formula=_max_formula,
    folder="dense_cosine",
)
match_op = Op(
    "dense_cosine_match(Tensor query, Tensor support, Tensor mask, float eps, str eps_mode) -> (Tensor query_scores, "
    "Tensor support_scores, Tensor query_index, Tensor support_index, Tensor query_norm, Tensor support_norm)",
    saved=("query_index", "support_index", "query_norm", "support_norm"),
    returned=("query_index", "support_index"),
    differentiable=_FEATURES,
    reads=_READS,
    maps=_FEATURES,
    fake=_match_fake,
    formula=_match_formula,
    folder="dense_cosine",
)
max_op.add_formulas("reference", reference.dense_cosine_max_fwd, reference.dense_cosine_max_bwd)
match_op.add_formulas("reference", reference.dense_cosine_match_fwd, reference.dense_cosine_match_bwd)
for _op in (max_op, match_op):
    _op.add_compiled("cpp")
    _op.add_triton("fss_kernels.ops.dense_cosine.triton_kernels")
call_max, call_match = max_op.call, match_op.call
