"""The ends of the dtypes: float16 at 65504, subnormal inputs, NaN and Inf."""

import pytest
import torch
from conftest import BACKENDS, SMALL, ids

import fss_kernels
from fss_kernels import testing

COSINES = [p for p in BACKENDS if "cosine" in p[0].name or p[0].name == "hypercorrelation"]
each_backend = pytest.mark.parametrize("spec, backend", BACKENDS, ids=ids)
LARGEST = 65504.0
OVERFLOW = 65520.0  # rounds to infinity


def check_half(actual, want, plain32, direction, label):
    """The comparison rule where the oracle is in float16's range, infinities where it rounds to one."""
    over, near = want.abs() >= OVERFLOW, (want.abs() - OVERFLOW).abs() < 1e-4 * OVERFLOW
    assert torch.equal(actual.isinf() | near, over | near), label
    assert torch.equal((actual.sign() == want.sign()) | ~over | near, torch.ones_like(over)), label
    result, oracle, plain = (torch.where(over | near, 0.0, x) for x in (actual, want, plain32))
    testing.check(result, oracle, plain.half(), direction, plain, label)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_backend
def test_float16_at_65504(spec, backend, layout):
    """Features up to the largest number: sums and norms are those of float32, only the last rounding overflows."""
    overflows = 0
    for sample in (s for sp, s in SMALL if sp is spec):
        tensors = spec.cast(sample, torch.float64)
        largest = "query", "support", "features", "prototypes", "x"
        for name in (n for n in tensors if n.rstrip("0123456789") in largest):
            tensors[name] = tensors[name] * (LARGEST / tensors[name].abs().max())
        tensors = {
            n: testing.LAYOUTS[layout](t.half() if n in spec.features else t.float() if t.is_floating_point() else t)
            for n, t in tensors.items()
        }
        names = testing.differentiable_names(spec, tensors)
        with fss_kernels.use_backend(backend):
            actual = testing.gradients(spec.function, tensors, sample.options, names)
        wide = [
            testing.gradients(
                function, {n: t.to(to) if n in names else t for n, t in tensors.items()}, sample.options, names
            )
            for function, to in ((spec.reference, torch.float64), (spec.plain, torch.float32))
        ]
        for part, direction in enumerate(("forward", "backward")):
            for a, want, plain in zip(actual[part], *(w[part] for w in wide), strict=True):
                if a.dtype == torch.float16:
                    check_half(a, want, plain, direction, f"{spec.name}[{sample.id}] {direction}")
                    overflows += int(a.isinf().sum())
    assert (overflows > 0) == (spec.name == "dynamic_conv2d")
