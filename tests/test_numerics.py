"""Every spec x backend x dtype x layout x sample against float64, forward and gradients, on NaN-poisoned memory."""

import pytest
import torch
from conftest import SPECS, ids

from fss_kernels import testing

# Compiled kernels see every layout in float32; elsewhere a third layout changes from sample to sample.
FEW = ("contiguous", "channels_last")
REST = tuple(layout for layout in testing.LAYOUTS if layout not in FEW)


def layouts(backend, dtype, index, sample):
    """The layouts in which to run the sample of this index."""
    if sample.large:
        return testing.LARGE_LAYOUTS if dtype == torch.float32 else FEW
    if dtype == torch.float32 and backend != "reference":
        return tuple(testing.LAYOUTS)
    return (*FEW, REST[(index + testing.DTYPES.index(dtype)) % len(REST)])


# All cases of a sample side by side: they share what they are compared with.
CASES = [
    pytest.param(spec, backend, dtype, layout, sample, id=f"{spec.name}-{backend}-{ids(dtype)}-{layout}-{sample.id}")
    for spec in SPECS
    for index, sample in enumerate(spec.samples())
    for dtype in testing.DTYPES
    for backend in testing.backends(spec.op)
    if not sample.large or backend != "reference" or dtype == torch.float32
    for layout in layouts(backend, dtype, index, sample)
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("spec, backend, dtype, layout, sample", CASES)
def test_matches_float64(spec, backend, dtype, layout, sample):
    results = testing.evaluate(spec, sample, backend, dtype, layout)
    assert results
    for _, comparison in results:
        assert comparison.passed, comparison.message


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=ids)
def test_dtypes_and_memory_format(spec, dtype):
    """Outputs and gradients have the dtype of what they belong to; a feature gradient keeps its memory format."""
    sample = next(iter(spec.samples()))
    for layout in ("contiguous", "channels_last"):
        tensors = {k: testing.LAYOUTS[layout](t) for k, t in spec.cast(sample, dtype).items()}
        names = testing.differentiable_names(spec, tensors)
        outputs, grads = testing.gradients(spec.function, tensors, sample.options, names)
        assert {o.dtype for o in outputs} == {dtype}
        for name, grad in zip(names, grads, strict=True):
            assert grad.dtype == tensors[name].dtype and grad.shape == tensors[name].shape
            if name in spec.features and name not in spec.static:
                assert grad.stride() == tensors[name].stride()


def test_rule_catches_what_it_is_for():
    """The comparison rule itself: a bf16 accumulator, one outlier, a bias, a NaN and a wrong shape all fail."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 4096, generator=generator, dtype=torch.float64).to(torch.bfloat16).double()
    oracle = x.mean(1)
    exact = oracle.to(torch.bfloat16)
    plain, plain32 = x.to(torch.bfloat16).mean(1), x.float().mean(1)

    def passed(actual: torch.Tensor) -> bool:
        return testing.compare(actual, oracle, plain, "forward", plain32).passed

    assert passed(exact)
    low_precision = torch.zeros(64, dtype=torch.bfloat16)
    for column in x.to(torch.bfloat16).unbind(1):
        low_precision = low_precision + column / 4096
    assert not passed(low_precision)
    assert not passed(exact * 1.02)
    assert not passed(torch.where(torch.arange(64) == 3, exact * 1.1, exact))
    assert not passed(torch.where(torch.arange(64) == 3, torch.nan, exact))
    assert not passed(exact[:-1])
    assert not testing.compare(oracle.float() * (1 + 1e-5), oracle, plain32, "forward").passed
    for lost in (torch.inf, torch.nan):  # a plain formula that overflows buys as much as one that is far off, no more
        assert testing.compare(exact, oracle, torch.full_like(plain, lost), "forward", plain32).passed
        assert not testing.compare(exact * 1.2, oracle, torch.full_like(plain, lost), "forward").passed
    with pytest.raises(AssertionError, match=r"worst at \(3,\)"):
        testing.check(torch.where(torch.arange(64) == 3, 2.0, exact), oracle, plain, "forward", plain32, "label")
