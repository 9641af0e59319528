"""Properties of the ops on random calls: they equal the float64 reference, and what the formulas promise holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import OPS, assume_same_resize, assume_settled, cases

from fss_kernels import testing


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_equals_float64(op, backend, data):
    case = data.draw(cases(op, (backend,)))
    assume_settled(case)
    if backend == "reference" and case.dtype == torch.float64:
        assume_same_resize(case)
    arguments = case.spec, case.tensors, case.options, case.wanted, case.backend, case.dtype
    for _, comparison in testing.judge(*arguments, layout=case.grad_layout):
        assert comparison.passed, comparison.message
