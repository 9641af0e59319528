"""The ends of the dtypes: float16 at 65504, subnormal inputs, NaN and Inf, norms beyond the range."""

import inspect
import itertools

import pytest
import torch
from conftest import BACKENDS, SMALL, ids
from test_offsets import thorough

import fss_kernels
from fss_kernels import testing

# Triton only in a process of the interpreter, which takes minutes
EACH = [pytest.param(s, b, marks=pytest.mark.long if b == "triton" else ()) for s, b in BACKENDS]
LONG = [pytest.param("triton", marks=pytest.mark.long)] if "triton" in {b for _, b in BACKENDS} else []
BY_NAME = ["reference", "cpp", *LONG]
BAD = [float("nan"), float("inf"), float("-inf"), 1e30]
LARGEST = 65504.0
OVERFLOW = 65520.0  # rounds to infinity


def normalises(spec):
    """Whether the op divides features by norms: |x| + eps or max(|x|, eps)."""
    return "eps_mode" in inspect.signature(getattr(fss_kernels, spec.name)).parameters


def weighed(spec):
    """The first sample with floating tensors that are not features, or else the first."""
    samples = list(spec.samples())
    extra = (s for s in samples if any(t.is_floating_point() for n, t in s.tensors.items() if n not in spec.features))
    return next(extra, samples[0])


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
    overflows, expected = 0, 0
    for sample in (s for sp, s in SMALL if sp is spec):
        tensors = spec.cast(sample, torch.float64)
        for name in [n for n in spec.features if n in tensors][: None if normalises(spec) else 1]:
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
                    overflows, expected = (
                        overflows + int(a.isinf().sum()),
                        expected + int((want.abs() >= OVERFLOW).sum()),
                    )
    assert (overflows > 0) == (expected > 0) and not (overflows and normalises(spec))


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


# The least exponents at which squares of integers are exact.
SHORT = (torch.float32, -74), (torch.bfloat16, -74), (torch.float16, -24), (torch.float64, -536)
# Here squares underflow to 0 or overflow.
BEYOND = [
    (dtype, sign * exponent)
    for dtype, exponent in ((torch.float32, 80), (torch.bfloat16, 80), (torch.float64, 545))
    for sign in (-1, 1)
]
EPS_MODES = ("clamp", "add")


def each_backend(cases, interpreted):
    """The ops that normalise and their backends, with each case that they take; the first value of a case is its dtype.
    Triton's interpreter, where one case takes half a minute, gets those of ``interpreted``."""
    return [
        pytest.param(*each.values, *case, marks=each.marks)
        for each in EACH
        for case in (interpreted if each.values[1] == "triton" else cases)
        if normalises(each.values[0]) and each.values[0].op.why_not(each.values[1], "cpu", case[0]) is None
    ]


def integers(*shape, channels):
    """-8 ... 8, no vector along ``channels`` 0: every product and sum is exact, whatever the power of two beside it."""
    x = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(len(shape))).double()
    x.select(channels, 0).masked_fill_((x == 0).all(channels), 1)
    return x


def channels_of(x):
    """The dimension along which features (..., C, H, W) or prototypes (..., C) are normalised."""
    return x.ndim - (3 if x.ndim >= 4 else 1)


def of_integers(spec, sample, dtype):
    """The tensors of a sample, its features replaced by integers in float64, and their names."""
    tensors, names = spec.cast(sample, dtype), [n for n in spec.features if n in sample.tensors]
    for i, name in enumerate(names):
        channels = channels_of(tensors[name])
        tensors[name] = integers(*tensors[name].shape, channels=channels).roll(i, channels)
    return tensors, names


def twice(function, leaves):
    """The outputs and the first and second gradients of a function of (values, power of two beside them, dtype), times
    what makes them independent of these powers; the outputs' gradients are 2^-10."""
    tensors = [(x * power).to(dtype).requires_grad_() for x, power, dtype in leaves]
    powers = [power for _, power, _ in leaves]
    outputs = function(*tensors)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [o for o in outputs if o.is_floating_point()]
    seeds = [torch.full_like(o, 2.0**-10, requires_grad=True) for o in outputs]
    grads = torch.autograd.grad(outputs, tensors, seeds, create_graph=True)
    first = [g.double() * power for g, power in zip(grads, powers, strict=True)]
    mixed = sum((g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in first)
    half = leaves[0][2] == torch.float16  # which has no room for what comes back from lengths
    second = [] if half else torch.autograd.grad(mixed, [*seeds, *tensors])
    second = [g.double() * p for g, p in zip(second, [1.0] * len(seeds) + powers, strict=not half)]
    return [o.detach().double() for o in outputs], [g.detach() for g in first], second


@pytest.mark.parametrize(
    "spec, backend, dtype, exponent, eps_mode",
    each_backend([(*case, mode) for case in SHORT for mode in EPS_MODES], [(*SHORT[0], "clamp")]),
    ids=ids,
)
def test_short_vectors_without_eps(spec, backend, dtype, exponent, eps_mode):
    """A cosine does not change with the length of vectors, its derivatives are divided by it: nothing is flushed, and
    nothing overflows on the way."""
    sample = thorough(spec)
    tensors, names = of_integers(spec, sample, dtype)
    others = {n: t for n, t in tensors.items() if n not in names}

    def run(short):
        def function(*features):
            given = {n: dict(zip(names, features, strict=True)).get(n, others.get(n)) for n in tensors}
            return spec.function(*given.values(), **{**sample.options, "eps": 0.0, "eps_mode": eps_mode})

        with fss_kernels.use_backend(backend):
            return twice(function, [(tensors[n], 2.0**exponent if n in short else 1.0, dtype) for n in names])

    wanted = run([])
    tolerance = 4 * max(torch.finfo(dtype).eps, 2.0**-24 if dtype == torch.float16 else 0.0)
    for short in [*([n] for n in names), names]:
        for got, want in zip(itertools.chain(*run(short)), itertools.chain(*wanted), strict=True):
            assert want.abs().max() > 0
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize(
    "spec, backend, dtype, exponent, eps, eps_mode",
    each_backend(
        [(*case, eps, mode) for case in BEYOND for eps in (0.0, 1e-6) for mode in EPS_MODES],
        [(*BEYOND[0], 0.0, "add"), (*BEYOND[1], 0.0, "clamp")],
    ),
    ids=ids,
)
def test_norms_beyond_their_dtype(spec, backend, dtype, exponent, eps, eps_mode):
    """Every other vector of each feature tensor in turn: with a squared norm that underflows it is a zero vector, with
    one that overflows as good as NaN, in every output and gradient."""
    sample = thorough(spec)
    tensors, names = of_integers(spec, sample, dtype)
    options = {**sample.options, "eps": eps, "eps_mode": eps_mode}
    stand_in = 0.0 if exponent < 0 else float("nan")
    for name in names:
        x = tensors[name]
        one = x.select(channels_of(x), 0)
        chosen = (torch.arange(one.numel()).view(one.shape) % 2 > 0).unsqueeze(channels_of(x))
        results = []
        for value in (x * 2.0**exponent, torch.full_like(x, stand_in)):
            given = {**tensors, name: torch.where(chosen, value, x)}
            given = {n: t.to(dtype) if n in names else t for n, t in given.items()}
            with fss_kernels.use_backend(backend):
                results.append(testing.gradients(spec.function, given, options, names))
        for part, (got, wanted) in enumerate(zip(*results, strict=True)):
            assert part or any(o.isnan().any() for o in wanted) == (exponent > 0)
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "spec, backend, dtype, exponent, eps_mode",
    [
        each
        for each in each_backend(
            [(torch.float32, exponent, mode) for exponent in (-80, 80) for mode in EPS_MODES],
            [(torch.float32, -80, "clamp"), (torch.float32, 80, "add")],
        )
        if set(weighed(each.values[0]).tensors) - {*each.values[0].features}
    ],
    ids=ids,
)
def test_weights_beyond_the_squares(spec, backend, dtype, exponent, eps_mode):
    """A cosine does not change with the scale of a mask: its square is nowhere."""
    sample = weighed(spec)
    names = testing.differentiable_names(spec, sample.tensors)
    options = {**sample.options, "eps": 0.0, "eps_mode": eps_mode}
    results = []
    for power in (1.0, 2.0**exponent):
        tensors = spec.cast(sample, dtype)
        tensors |= {n: t * power for n, t in tensors.items() if n not in spec.features and t.is_floating_point()}
        with fss_kernels.use_backend(backend):
            results.append(testing.gradients(spec.function, tensors, options, names))
    for wanted, got in zip(*results, strict=True):
        for w, g in zip(wanted, got, strict=True):
            assert w.any()
            torch.testing.assert_close(g, w)


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
