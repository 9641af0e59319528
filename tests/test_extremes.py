"""The ends of the dtypes: float16 at 65504, subnormal inputs, NaN and Inf."""

import itertools

import pytest
import torch
from conftest import BACKENDS, SMALL, ids
from test_offsets import thorough

import fss_kernels
from fss_kernels import testing

# Triton only in a process of the interpreter, which takes minutes
EACH = [pytest.param(s, b, marks=pytest.mark.slow if b == "triton" else ()) for s, b in BACKENDS]
SLOW = [pytest.param("triton", marks=pytest.mark.slow)] if "triton" in {b for _, b in BACKENDS} else []
BY_NAME = ["reference", "cpp", *SLOW]
BAD = [float("nan"), float("inf"), float("-inf"), 1e30]
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
@pytest.mark.parametrize("spec, backend", EACH, ids=ids)
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


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("spec, backend", EACH, ids=ids)
def test_not_finite_where_the_reference_is_not(spec, backend, bad):
    """One such value in each feature in turn: NaN and Inf where the reference has them, and no other result changes.
    Where a square of 1e30 leaves float32, the right result is as good as NaN."""
    sample = thorough(spec)
    clean = spec.cast(sample, torch.float32)
    reached = 0
    for name, position in itertools.product(spec.features, (0, -1)):
        tensors = clean | {name: clean[name].clone()}
        tensors[name].view(-1)[position] = bad
        wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
        wanted, exact = (testing.gradients(spec.reference, t, sample.options, [])[0] for t in (tensors, wide))
        with fss_kernels.use_backend(backend):
            outputs, _ = testing.gradients(spec.function, tensors, sample.options, [])
        for got, want, right in zip(outputs, wanted, exact, strict=True):
            alike = torch.where(want.isnan() & ~got.isnan(), right.float(), want)
            torch.testing.assert_close(got, alike, rtol=1e-5, atol=1e-5, equal_nan=True)
            reached += int((~want.isfinite()).sum())
    assert reached or bad == 1e30


# dtype and exponents: of the largest entries whose squares are subnormal, and of the least whose gradients are not lost
SHORT = [
    (torch.float32, -70, -60),
    (torch.bfloat16, -70, -60),
    (torch.float16, -24, -24),  # subnormal entries
    (torch.float64, -530, -500),
]
COSINES = [
    pytest.param(*each.values, *short, marks=each.marks)
    for each in EACH
    for short in SHORT
    if "cosine" in each.values[0].name or each.values[0].name == "hypercorrelation"
    if each.values[0].op.why_not(each.values[1], "cpu", short[0]) is None
]


def integers(*shape, channels):
    """-8 ... 8, no vector along ``channels`` 0: every product and sum is exact, whatever the power of two beside it."""
    x = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(len(shape))).double()
    x.select(channels, 0).masked_fill_((x == 0).all(channels), 1)
    return x


@pytest.mark.parametrize("eps_mode", ["clamp", "add"])
@pytest.mark.parametrize("spec, backend, dtype, of_values, of_gradients", COSINES, ids=ids)
def test_short_vectors_without_eps(spec, backend, dtype, of_values, of_gradients, eps_mode):
    """A cosine does not change with the length of vectors and its gradient is divided by it: nothing is flushed."""
    pixels = integers(2, 19, 5, 6, channels=1)
    other = integers(2, 3, 19, channels=2)
    if spec.name != "prototype_cosine":
        other = integers(2, 19, 4, 7, channels=1).flip(1)
    mask = (torch.arange(56).view(2, 4, 7) % 3 > 0,) if spec.name != "prototype_cosine" else ()

    def run(exponent):
        leaves = [(x * 2.0**exponent).to(dtype).requires_grad_() for x in (pixels, other)]
        with fss_kernels.use_backend(backend):
            out = spec.function(*leaves, *mask, eps=0.0, eps_mode=eps_mode)
        grads = torch.autograd.grad(out, leaves, torch.full_like(out, 2.0**-10))
        return out.detach(), [g.double() * 2.0**exponent for g in grads]

    wanted, grads = run(0)
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(run(of_values)[0], wanted)
    for g, w in zip(run(of_gradients)[1], grads, strict=True):
        assert w.abs().max() > 0
        tolerance = max(torch.finfo(dtype).eps, 2.0**-24 if dtype == torch.float16 else 0.0)
        torch.testing.assert_close(g, w, rtol=2 * tolerance, atol=2 * tolerance * w.abs().max().item())


@pytest.mark.parametrize("exponent", [-120, -126, -140, -146])
@pytest.mark.parametrize("backend", BY_NAME)
def test_pool_under_subnormal_weights(backend, exponent):
    """Without eps a mean does not change with the scale of the mask."""
    x = integers(2, 19, 5, 6, channels=1).float()
    mask = integers(2, 2, 5, 6, channels=1).abs().float()
    with fss_kernels.use_backend(backend):
        wanted, out = (fss_kernels.masked_avg_pool(x, m, eps=0.0) for m in (mask, mask * 2.0**exponent))
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=0)
    assert wanted.abs().max() > 1


@pytest.mark.parametrize("exponent", [-126, -140, -149])
@pytest.mark.parametrize("backend", BY_NAME)
def test_pool_of_subnormal_features(backend, exponent):
    """To the last subnormal bit but one."""
    x, mask = integers(2, 19, 5, 6, channels=1), integers(2, 2, 5, 6, channels=1).abs()
    wanted = torch.einsum("bchw,bmhw->bmc", x, mask) / mask.sum((2, 3))[..., None] * 2.0**exponent
    with fss_kernels.use_backend(backend):
        out = fss_kernels.masked_avg_pool((x * 2.0**exponent).float(), mask.float(), eps=0.0)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=2.0**-149)
    assert out.any()


@pytest.mark.parametrize("dtype, of_x, of_kernel", [(torch.float32, -140, 100), (torch.float16, -24, 10)], ids=ids)
@pytest.mark.parametrize("backend", BY_NAME)
def test_convolution_of_subnormal_values(backend, dtype, of_x, of_kernel):
    """Products that are normal again: exact, and so are the gradients."""
    x, kernel = integers(2, 19, 5, 6, channels=1), integers(2, 19, 3, 3, channels=1)

    def run(to, of_x, of_kernel):
        leaves = [(x * 2.0**of_x).to(to).requires_grad_(), (kernel * 2.0**of_kernel).to(to).requires_grad_()]
        with fss_kernels.use_backend(backend if to == dtype else "reference"):
            out = fss_kernels.dynamic_conv2d(*leaves)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    for got, wanted in zip(run(dtype, of_x, of_kernel), run(torch.float64, of_x, of_kernel), strict=True):
        assert torch.equal(got, wanted.to(dtype)) and got.any()
