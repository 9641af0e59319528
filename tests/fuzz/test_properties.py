"""Properties of the ops on random calls: they equal the float64 reference, and what the formulas promise holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import COSINES, EXAMPLES, NUDGE, OPS, WIDE, assume_plain, assume_settled, cases, counted

import fss_kernels
from fss_kernels import testing

BACKENDS = ("cpp", "reference")
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


@pytest.fixture(autouse=True)
def examples(record_property):
    """Reports how many examples a test tried of every op; conftest.py adds them up."""
    EXAMPLES.clear()
    yield
    record_property("examples", dict(EXAMPLES))


# of a sum: products with the least numbers have no relative accuracy
FACTORS = st.integers(-4000, 4000).map(lambda thousandths: thousandths / 1000)


def close(actual, wanted, among=None, dtype=None):
    """Equal up to what sums of a few hundred terms round in ``dtype``, relative to the largest element of ``among``."""
    among = wanted if among is None else among
    scale = among.abs().max().item() if among.numel() else 0.0
    torch.testing.assert_close(actual, wanted, rtol=0, atol=scale * 128 * torch.finfo(dtype or wanted.dtype).eps)


def gradients(case, **changed):
    tensors = {**case.tensors, **changed}
    with fss_kernels.use_backend(case.backend):
        return testing.gradients(case.spec.function, tensors, case.options, case.wanted)


def shuffled(x, generator):
    """x with its pixels (the last two dimensions) in another order: the same for the same state of the generator."""
    order = torch.randperm(x.shape[-2:].numel(), generator=generator)
    return x.flatten(-2)[..., order].unflatten(-1, x.shape[-2:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@counted
def test_equals_float64(op, backend, data):
    case = data.draw(cases(op, (backend,)))
    assume_settled(case)
    if backend == "reference" and case.dtype == torch.float64:
        assume_plain(case)
    arguments = case.spec, case.tensors, case.options, case.wanted, case.backend, case.dtype
    for _, comparison in testing.judge(*arguments, layout=case.grad_layout):
        assert comparison.passed, comparison.message


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@counted
def test_adjoint(op, data):
    """<J v, y> = <v, J^T y>: the backward is the transpose of the forward's derivative, from central differences."""
    case = data.draw(cases(op, BACKENDS, (torch.float64,), plain=True))
    assume_settled(case)
    assume(case.wanted)
    generator = torch.Generator().manual_seed(5)
    base = gradients(case)[1]
    h, v = NUDGE, {n: torch.randn(case.tensors[n].shape, generator=generator, dtype=torch.float64) for n in case.wanted}
    sides = [
        gradients(case, **{n: (case.tensors[n] + sign * h * v[n]).to(case.tensors[n].dtype) for n in case.wanted})
        for sign in (1, -1)
    ]
    size = max((g.abs().max() for g in base if g.numel()), default=0.0)
    for sided in sides:  # no jump within the step
        assume(all(bool(((g - b).abs() <= 1e-3 * size).all()) for g, b in zip(sided[1], base, strict=True)))
    seeds = torch.Generator().manual_seed(7)
    wanted = sum((g * v[n]).sum() for g, n in zip(base, case.wanted, strict=True))
    actual = magnitude = 0.0
    for up, down in zip(*(s[0] for s in sides), strict=True):
        y = torch.randn(up.shape, generator=seeds, dtype=torch.float64).bfloat16().double()
        terms = (up - down) / (2 * h) * y
        actual, magnitude = actual + terms.sum(), magnitude + terms.abs().sum()
    assert abs(actual - wanted) <= 1e-6 * magnitude + 1e-9 * size


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@counted
def test_batch_is_a_loop(op, data):
    """Every sample alone has the result and the gradients that it has in the batch, bit for bit on cpp."""
    case = data.draw(cases(op, BACKENDS, plain=True))
    batch = next(iter(case.tensors.values())).shape[0]
    wanted = [n for n in case.wanted if n not in case.shared]

    def run(tensors):
        leaves = {n: tensors[n].detach().requires_grad_() for n in wanted}
        with fss_kernels.use_backend(case.backend):
            out = case.spec.function(*{**tensors, **leaves}.values(), **case.options)
        outs = out if isinstance(out, (list, tuple)) else [out]
        outs[0].square().sum().backward()
        return [*(o.detach() for o in outs), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]

    together = run(case.tensors)
    for i in range(batch):
        alone = run({n: t if n in case.shared else t[i : i + 1] for n, t in case.tensors.items()})
        for a, t in zip(alone, together, strict=True):
            if case.backend == "cpp":
                assert torch.equal(a[0], t[i])
            else:
                # a float64 mask beside float32 features has gradients that were computed in float32
                computed = torch.promote_types(case.dtype, torch.float32)
                close(a[0], t[i], dtype=max(computed, t.dtype, key=lambda d: torch.finfo(d).eps))


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@counted
def test_values_that_are_not_finite(op, data):
    """cpp has NaN and Inf exactly where the reference has them, and the same index beside a score that is NaN."""
    case = data.draw(cases(op, ("cpp",)))
    changed = {}
    for name in (n for n in case.tensors if n in case.spec.features and case.tensors[n].numel()):
        x = changed[name] = case.tensors[name].clone()
        for _ in range(data.draw(st.integers(0, 2))):
            x[tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)] = data.draw(st.sampled_from(NOT_FINITE))
    tensors = {**case.tensors, **changed}
    results = []
    for backend in BACKENDS:
        with fss_kernels.use_backend(backend):
            if case.spec.indexed:
                results.append(case.spec.public(*tensors.values(), **case.options))
            else:
                out = case.run(**tensors)
                results.append(out if isinstance(out, (list, tuple)) else (out,))
    for got, wanted in zip(*results, strict=True):
        if wanted.is_floating_point():
            assert torch.equal(got.isfinite(), wanted.isfinite())
            if not case.options.get("merge"):  # which adds kernels first: (a + b) Inf is no NaN where a Inf + b Inf is
                for sign in (1, -1):
                    assert torch.equal(got == sign * torch.inf, wanted == sign * torch.inf)
            close(*(torch.where(wanted.isfinite(), r, 0) for r in (got, wanted)))
    for side in range(0, len(results[0]) if case.spec.indexed else 0, 2):  # scores and their index
        unknown = results[1][side].isnan()
        assert torch.equal(*(r[side + 1][unknown] for r in results))


# ---- masked_avg_pool -------------------------------------------------------------------------------------------------


@given(cases("masked_avg_pool", BACKENDS, WIDE))
@counted
def test_pool_under_ones_is_the_mean(case):
    x, mask = case.tensors["features"], case.tensors["mask"]
    resize = "bilinear" if case.options["resize"] == "adjoint" else case.options["resize"]
    with fss_kernels.use_backend(case.backend):
        out = case.run(mask=torch.ones_like(mask), eps=0.0, resize=resize)
    mean = x.mean((2, 3)) if mask.ndim == 3 else x.mean((2, 3))[:, None].expand(out.shape)
    close(out, mean.contiguous(), x)


@given(cases("masked_avg_pool", BACKENDS, WIDE), st.floats(0.01, 100))
@counted
def test_pool_ignores_the_scale_of_the_mask(case, factor):
    mask = case.tensors["mask"].to(case.dtype)
    with fss_kernels.use_backend(case.backend):
        out, scaled = (case.run(mask=m, eps=0.0) for m in (mask, mask * factor))
    close(scaled, out, case.tensors["features"])


@given(cases("masked_avg_pool", BACKENDS, WIDE))
@counted
def test_pool_ignores_the_order_of_pixels(case):
    """A mask on the grid of the features, both with their pixels in another order."""
    x, mask = case.tensors["features"], case.tensors["mask"]
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(*mask.shape[:-2], *x.shape[-2:], generator=generator, dtype=x.dtype) - 0.1
    mask = mask.clamp(min=0)
    state = generator.get_state()
    with fss_kernels.use_backend(case.backend):
        out = case.run(mask=mask)
        moved = case.run(features=shuffled(x, generator), mask=shuffled(mask, generator.set_state(state)))
    close(moved, out, x)


@given(cases("masked_avg_pool", BACKENDS, WIDE), FACTORS, FACTORS)
@counted
def test_pool_is_linear(case, a, b):
    x = case.tensors["features"]
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    with fss_kernels.use_backend(case.backend):
        of_x, of_y, of_both = (case.run(features=f) for f in (x, y, a * x + b * y))
    close(of_both, a * of_x + b * of_y, torch.stack([a * x, b * y]))


# ---- the cosines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", COSINES)
@given(data=st.data())
@counted
def test_cosines_are_within_1(op, data):
    """Also of a vector with three times itself, which both sides hold."""
    case = data.draw(cases(op, BACKENDS))
    names = [n for n in case.tensors if n in case.spec.features]
    changed = {}
    for ours, theirs in zip(names[: len(names) // 2], names[len(names) // 2 :], strict=True):
        vector, changed[theirs] = case.tensors[ours][0, :, 0, 0], case.tensors[theirs].clone()
        vectors = changed[theirs].movedim(case.spec.channel_dim.get(theirs, -3), -1)
        if vectors.numel():
            vectors[(0,) * (vectors.ndim - 1)] = 3 * vector
    with fss_kernels.use_backend(case.backend):
        out = case.run(**changed, eps=0.0, **case.spec.cosines(case.options))
    for o in out if isinstance(out, (list, tuple)) else [out]:
        assert bool((o.abs() <= 1 + 8 * torch.finfo(torch.float32).eps).all())  # exactly 1 in half precision


@pytest.mark.parametrize("op", COSINES)
@given(data=st.data())
@counted
def test_cosines_ignore_the_length_of_vectors(op, data):
    """Every vector times a power of two of its own: the same bits."""
    case = data.draw(cases(op, BACKENDS, WIDE))
    generator = torch.Generator().manual_seed(9)
    changed = {}
    for name in case.spec.features:
        if name in case.tensors:
            x = case.tensors[name]
            shape = list(x.shape)
            shape[case.spec.channel_dim.get(name, -3)] = 1
            changed[name] = x * 2.0 ** torch.randint(-6, 7, shape, generator=generator)
    with fss_kernels.use_backend(case.backend):
        out, scaled = (case.run(eps=0.0, **c) for c in ({}, changed))
    for a, b in zip(*(r if isinstance(r, (list, tuple)) else [r] for r in (out, scaled)), strict=True):
        close(b, a, torch.ones(1, dtype=a.dtype))


@given(cases("prototype_cosine", BACKENDS, WIDE))
@counted
def test_prototype_cosine_moves_with_the_pixels(case):
    x, generator = case.tensors["features"], torch.Generator().manual_seed(3)
    state = generator.get_state()
    with fss_kernels.use_backend(case.backend):
        out, moved = case.run(), case.run(features=shuffled(x, generator))
    close(moved, shuffled(out, generator.set_state(state)))


def cosines_by_hand(query, support):
    """(B, S, Ns, Nq), normalised by F.normalize."""
    q, s = F.normalize(query.flatten(2), dim=1, eps=0.0), F.normalize(support.flatten(3), dim=2, eps=0.0)
    return torch.einsum("bscn,bcm->bsnm", s, q)


def with_shots(case):
    """Query, support (B, S, ...), mask on the support's grid (kept or not), anew at random; at least one kept."""
    query, support = case.tensors["query"], case.tensors["support"]
    support = support if support.ndim == 5 else support[:, None]
    kept = torch.rand(*support.shape[:2], *support.shape[3:], generator=torch.Generator().manual_seed(8)) > 0.5
    kept[..., 0, -1] = True
    return query, support, kept


@given(cases("dense_cosine_max", BACKENDS, WIDE))
@counted
def test_a_window_of_one_pixel_is_the_maximum(case):
    """Alone and next to other windows; the index is where the maximum is."""
    query, support, kept = with_shots(case)
    windows = (*case.options["windows"], (1, 1))
    with fss_kernels.use_backend(case.backend):
        results = [
            fss_kernels.dense_cosine_max(query, support, kept, windows=w, masked="exclude", eps=0.0)
            for w in (windows, ((1, 1),))
        ]
    cosines = cosines_by_hand(query, support)
    wanted = cosines.masked_fill(~kept.flatten(2)[..., None], -2).amax(2)
    for scores, index in results:
        scores, index = scores[:, :, -1].flatten(2), index[:, :, -1].flatten(2)
        close(scores, wanted, torch.ones(1, dtype=wanted.dtype))
        close(cosines.gather(2, index[:, :, None])[:, :, 0], wanted, torch.ones(1, dtype=wanted.dtype))
        assert bool(kept.flatten(2).gather(2, index).all())


@given(cases("dense_cosine_max", BACKENDS, WIDE))
@counted
def test_dense_cosine_ignores_the_order_of_support_pixels(case):
    query, support, kept = with_shots(case)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    moved = shuffled(support, generator), shuffled(kept, generator.set_state(state))
    with fss_kernels.use_backend(case.backend):
        (out, _), (again, _) = (
            fss_kernels.dense_cosine_max(query, *pair, masked=case.options["masked"], eps=0.0)
            for pair in ((support, kept), moved)
        )
    close(again, out, torch.ones(1, dtype=out.dtype))


@given(cases("dense_cosine_match", BACKENDS, WIDE))
@counted
def test_both_sides_of_a_match_are_maxima(case):
    """The query's side is dense_cosine_max; without a mask the support's side is the query's of the swapped call."""
    query, support, kept = with_shots(case)
    with fss_kernels.use_backend(case.backend):
        for_query, at, _, _ = fss_kernels.dense_cosine_match(query, support, kept)
        scores, index = fss_kernels.dense_cosine_max(query, support, kept, masked="exclude", eps=1e-7)
        first = support[:, 0].contiguous()
        there, back = (fss_kernels.dense_cosine_match(*pair) for pair in ((query, first), (first, query)))
    close(for_query, scores[:, :, 0], torch.ones(1, dtype=scores.dtype))
    if case.dtype == torch.float64 and case.values.startswith("normal"):  # no two scores within rounding of each other
        assume(case.tensors["query"].shape[1] > 1)
        assert torch.equal(at, index[:, :, 0])
    close(there[2], back[0], torch.ones(1, dtype=scores.dtype))
    close(there[0], back[2], torch.ones(1, dtype=scores.dtype))


@given(cases("hypercorrelation", BACKENDS, WIDE))
@counted
def test_hypercorrelation_by_hand(case):
    """Against F.normalize and einsum, the mask an indicator; and with the sides exchanged."""
    query, support = case.tensors["query"], case.tensors["support"]
    kept = torch.rand(support.shape[0], *support.shape[2:], generator=torch.Generator().manual_seed(8)) > 0.4
    clamp = case.options["clamp"]
    with fss_kernels.use_backend(case.backend):
        out = fss_kernels.hypercorrelation(query, support, kept, eps=0.0, clamp=clamp)
        there = fss_kernels.hypercorrelation(query, support, clamp=clamp)
        back = fss_kernels.hypercorrelation(support, query, clamp=clamp)
    wanted = cosines_by_hand(query, support[:, None])[:, 0] * kept.flatten(1)[..., None]
    wanted = wanted.clamp(min=0) if clamp else wanted
    close(out.flatten(3).flatten(1, 2), wanted.mT, torch.ones(1, dtype=out.dtype))
    close(back, there.permute(0, 3, 4, 1, 2), torch.ones(1, dtype=out.dtype))


# ---- dynamic_conv2d --------------------------------------------------------------------------------------------------


@given(cases("dynamic_conv2d", BACKENDS, WIDE))
@counted
def test_convolution_is_a_grouped_one(case):
    """In float64, where PyTorch does not compile a convolution for every shape."""
    x, *kernels = case.tensors.values()
    groups = x.shape[0] * x.shape[1]
    outputs = []
    for k in kernels:
        kh, kw = k.shape[2:]
        folded, weight = x.double().reshape(1, groups, *x.shape[2:]), k.double().reshape(groups, 1, kh, kw)
        outputs.append(F.conv2d(folded, weight, padding=(kh // 2, kw // 2), groups=groups).view(x.shape))
    with fss_kernels.use_backend(case.backend):
        out = case.run()
        merged, apart = (case.run(merge=m) for m in (True, False))
    size = sum(k.abs().sum((2, 3)).max() for k in kernels) * x.abs().max()
    close(out, (sum(outputs) if case.options["merge"] else torch.cat(outputs, 1)).to(x.dtype), size)
    close(merged, sum(apart.chunk(len(kernels), 1)), size)


@given(cases("dynamic_conv2d", BACKENDS, WIDE), FACTORS, FACTORS)
@counted
def test_convolution_is_linear(case, a, b):
    """In x, and in the kernels."""
    generator = torch.Generator().manual_seed(4)
    names = list(case.tensors)
    for chosen in (names[:1], names[1:]):
        one = {n: case.tensors[n] for n in chosen}
        two = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in one.items()}
        both = {n: a * one[n] + b * two[n] for n in chosen}
        with fss_kernels.use_backend(case.backend):
            of_one, of_two, of_both = (case.run(**c) for c in (one, two, both))
        size = torch.stack([a * of_one, b * of_two]).abs().max() * 81
        close(of_both, a * of_one + b * of_two, size)
