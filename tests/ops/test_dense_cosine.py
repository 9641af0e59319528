"""dense_cosine against independent definitions: loops, the literal window code, exact ties, its edge rules."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fss_kernels
from fss_kernels import _memory, dense_cosine_match, dense_cosine_max, testing
from fss_kernels.ops.dense_cosine import reference

BACKENDS = ["reference", "cpp"]
MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]
MODES = ["clamp", "add"]
DPCN = ((5, 1), (3, 3), (1, 5))
GRIDS = [((5, 4), (4, 6)), ((3, 3), (5, 5)), ((4, 4), (2, 3)), ((1, 1), (3, 2)), ((2, 7), (1, 5)), ((1, 6), (6, 1))]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fss_kernels.use_backend(request.param):
        yield request.param


def randn(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def signs(*shape, dtype=torch.float32):
    """Vectors (C = 256) of entries +-1/16: norm 1, and every sum of products is exact."""
    generator = torch.Generator().manual_seed(sum(shape))
    return ((2 * torch.randint(0, 2, shape, generator=generator) - 1) / 16).to(dtype)


def foreground(kind, batch, shots, height, width):
    mask = torch.zeros(batch, shots, height, width)
    if kind == "one":
        mask[:, :, height // 2, width // 3] = 1
    elif kind == "fifth":
        mask[:, :, height // 3 : height // 3 + -(-height // 2), : -(-2 * width // 5)] = 0.5
        mask[0] = mask[0].flip(-1)
    elif kind == "all":
        mask += 1
    return mask


# ---- loops in float64 -----------------------------------------------------------------------------------------------


def cosines_by_loops(query, support, kept, eps, eps_mode):
    """c[i, j] of one sample: query (C, Hq, Wq), support (C, Hs, Ws), kept (Hs, Ws)."""
    (hq, wq), (hs, ws) = query.shape[1:], support.shape[1:]
    c = np.zeros((hs, ws, hq, wq))
    for iy, ix, jy, jx in itertools.product(range(hs), range(ws), range(hq), range(wq)):
        q, s = query[:, jy, jx], support[:, iy, ix]
        nq, ns = math.sqrt(sum(float(v) ** 2 for v in q)), math.sqrt(sum(float(v) ** 2 for v in s))
        if kept[iy, ix] and nq > 0 and ns > 0:
            dq, ds = (n + eps if eps_mode == "add" else max(n, eps) for n in (nq, ns))
            c[iy, ix, jy, jx] = sum(float(a) * float(b) for a, b in zip(q, s, strict=True)) / dq / ds
    return c


def max_by_loops(c, kept, window, masked):
    """Scores and indices (Hq, Wq) of one sample and window."""
    (dh, dw), (hs, ws, hq, wq) = window, c.shape
    offsets = [(y, x) for y in range(-(dh // 2), dh // 2 + 1) for x in range(-(dw // 2), dw // 2 + 1)]
    scores, index = np.zeros((hq, wq)), np.full((hq, wq), -1)

    def in_support(y, x):
        return 0 <= y < hs and 0 <= x < ws

    for jy, jx in itertools.product(range(hq), range(wq)):
        best, dead = -math.inf, False
        for iy, ix in itertools.product(range(hs), range(ws)):
            live = any(in_support(iy + y, ix + x) and kept[iy + y, ix + x] for y, x in offsets)
            if not (kept[iy, ix] if masked == "exclude" else live):
                dead = dead or masked == "zero"
                continue
            terms = [
                c[iy + y, ix + x, jy + y, jx + x]
                for y, x in offsets
                if in_support(iy + y, ix + x) and 0 <= jy + y < hq and 0 <= jx + x < wq
            ]
            score = sum(terms) / (dh * dw)
            if score > best:
                best, scores[jy, jx], index[jy, jx] = score, score, iy * ws + ix
        if dead and best <= 0:
            scores[jy, jx], index[jy, jx] = 0, -1
    return scores, index


def gradient_by_loops(x, d, eps, eps_mode):
    """The gradient to one vector x from d, that to the normalised vector, as the contract writes it."""
    n = math.sqrt(float(x @ x))
    if n == 0:
        return np.zeros_like(x)
    if eps_mode == "clamp":
        return (d - x / n * (x / n @ d)) / n if n > eps else d / eps
    return d / (n + eps) - x * (x @ d) / (n * (n + eps) ** 2)


@pytest.mark.parametrize("kind", ["none", "one", "fifth", "all"])
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_max_equals_loops(backend, grids, kind):
    """Odd, even, non-square, smaller-than-window grids; 0, 1 pixel, a fifth and all of foreground; 1 and 5 shots."""
    (query_grid, support_grid), windows = grids, ((1, 1), *DPCN, (7, 3))
    for shots, masked in itertools.product((1, 5), ("zero", "exclude")):
        query, support = randn(2, 3, *query_grid), randn(2, shots, 3, *support_grid)
        kept = foreground(kind, 2, shots, *support_grid)
        scores, index = dense_cosine_max(query, support, kept, windows=windows, masked=masked)
        alone = dense_cosine_max(query, support, kept, masked=masked)  # the path without windows
        assert scores.shape == index.shape == (2, shots, len(windows), *query_grid) and index.dtype == torch.int64
        for b, s in itertools.product(range(2), range(shots)):
            c = cosines_by_loops(query[b].numpy(), support[b, s].numpy(), kept[b, s].numpy() > 0, 1e-7, "clamp")
            for k, window in enumerate(windows):
                wanted, at = max_by_loops(c, kept[b, s].numpy() > 0, window, masked)
                results = [(scores[b, s, k], index[b, s, k])]
                if k == 0:
                    results.append((alone[0][b, s, 0], alone[1][b, s, 0]))
                for got, got_at in results:
                    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-11, atol=1e-14)
                    np.testing.assert_array_equal(got_at.numpy(), at)


@pytest.mark.parametrize("kind", ["none", "one", "fifth", "all"])
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_match_equals_loops(backend, grids, kind):
    query_grid, support_grid = grids
    for shots in (1, 5):
        query, support = randn(2, 3, *query_grid), randn(2, shots, 3, *support_grid)
        mask = foreground(kind, 2, shots, *support_grid)
        results = dense_cosine_match(query, support, mask, eps=0.4, eps_mode="add")
        for b, s in itertools.product(range(2), range(shots)):
            kept = mask[b, s].numpy() > 0
            c = cosines_by_loops(query[b].numpy(), support[b, s].numpy(), kept, 0.4, "add")
            wanted, at = max_by_loops(c, kept, (1, 1), "exclude")
            np.testing.assert_allclose(results[0][b, s].numpy(), wanted, rtol=1e-11, atol=1e-14)
            np.testing.assert_array_equal(results[1][b, s].numpy(), at)
            flat = c.reshape(*support_grid, -1)
            np.testing.assert_allclose(
                results[2][b, s].numpy(), np.where(kept, flat.max(-1), 0), rtol=1e-11, atol=1e-14
            )
            np.testing.assert_array_equal(results[3][b, s].numpy(), np.where(kept, flat.argmax(-1), -1))


@pytest.mark.parametrize("eps", [0.0, 0.05, 1.5, 5.0])
@pytest.mark.parametrize("eps_mode", MODES)
def test_gradients_equal_loops(backend, eps_mode, eps):
    """The sparse rule, one pair after the other; 1.5 lies among the norms."""
    query, support = randn(2, 4, 4, 5), randn(2, 2, 4, 5, 3)
    mask = foreground("fifth", 2, 2, 5, 3)
    leaves = query.requires_grad_(), support.requires_grad_()
    scores, index = dense_cosine_max(*leaves, mask, windows=((1, 1), *DPCN), eps=eps, eps_mode=eps_mode)
    g = randn(*scores.shape)
    ours = torch.autograd.grad(scores, leaves, g)
    q, s, g, index = query.detach().numpy(), support.detach().numpy(), g.numpy(), index.numpy()

    def unit(x):
        n = math.sqrt(float(x @ x))
        return x / (n + eps if eps_mode == "add" else max(n, eps))

    to_q, to_s = np.zeros_like(q), np.zeros_like(s)
    for b, shot, (k, (dh, dw)) in itertools.product(range(2), range(2), enumerate(((1, 1), *DPCN))):
        for jy, jx in itertools.product(range(4), range(5)):
            if (i := index[b, shot, k, jy, jx]) < 0:
                continue
            for y, x in itertools.product(range(-(dh // 2), dh // 2 + 1), range(-(dw // 2), dw // 2 + 1)):
                iy, ix, qy, qx = i // 3 + y, i % 3 + x, jy + y, jx + x
                if 0 <= iy < 5 and 0 <= ix < 3 and 0 <= qy < 4 and 0 <= qx < 5 and mask[b, shot, iy, ix] > 0:
                    w = g[b, shot, k, jy, jx] / (dh * dw)
                    to_q[b, :, qy, qx] += w * unit(s[b, shot, :, iy, ix])
                    to_s[b, shot, :, iy, ix] += w * unit(q[b, :, qy, qx])
    for x, d, grad in ((q, to_q, ours[0].numpy()), (s, to_s, ours[1].numpy())):
        x, d, grad = (np.moveaxis(t, -3, -1).reshape(-1, 4) for t in (x, d, grad))
        for vector, toward, got in zip(x, d, grad, strict=True):
            np.testing.assert_allclose(got, gradient_by_loops(vector, toward, eps, eps_mode), rtol=1e-9, atol=1e-12)


def test_match_gradients_are_those_of_two_directions(backend):
    """The kept pixels one way; the other way round, every kept support pixel as a query."""
    leaves = randn(2, 5, 4, 5).requires_grad_(), randn(2, 3, 5, 5, 3).requires_grad_()
    mask = foreground("fifth", 2, 3, 5, 3)
    results = dense_cosine_match(*leaves, mask)
    g_query, g_support = randn(*results[0].shape), randn(*results[2].shape)
    ours = torch.autograd.grad((results[0], results[2]), leaves, (g_query, g_support))
    one_way, _ = dense_cosine_max(*leaves, mask, masked="exclude")
    wanted = list(torch.autograd.grad(one_way[:, :, 0], leaves, g_query))
    for shot in range(3):
        other_way, _ = dense_cosine_max(leaves[1][:, shot], leaves[0])
        g = torch.where(mask[:, shot] > 0, g_support[:, shot], 0.0)
        for total, grad in zip(wanted, torch.autograd.grad(other_way[:, 0, 0], leaves, g), strict=True):
            total += grad
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


# ---- the formulas of the papers -------------------------------------------------------------------------------------


def literal_windows(query, support, mask, window):
    """DPCN as written: every window element has its own matrix of cosines."""
    dh, dw = window

    def unfolded(x):
        return F.unfold(x, window, padding=(dh // 2, dw // 2)).unflatten(1, (x.shape[1], -1))  # (B, C, d, N)

    q, s = F.normalize(unfolded(query), dim=1, eps=1e-7), F.normalize(unfolded(support * mask), dim=1, eps=1e-7)
    return torch.einsum("bcoi,bcoj->bij", s, q) / (dh * dw)


@pytest.mark.parametrize("channels, grid", [(3, (5, 6)), (16, (9, 8)), (40, (7, 13))])
def test_equals_literal_window_code(backend, channels, grid):
    """Values, indices and both gradients, where no background pixel wins."""
    leaves = randn(2, channels, *grid).requires_grad_(), randn(2, channels, *grid).requires_grad_()
    mask = (torch.rand(2, 1, *grid, generator=torch.Generator().manual_seed(0)) > 0.7).double()
    scores, index = dense_cosine_max(*leaves, mask[:, 0], windows=DPCN)
    literal = [literal_windows(*leaves, mask, window).max(1) for window in DPCN]
    wanted = torch.stack([values for values, _ in literal], 1).view_as(scores)
    at = torch.stack([i for _, i in literal], 1).view_as(index)
    torch.testing.assert_close(scores, wanted, rtol=1e-11, atol=1e-13)
    assert torch.equal(torch.where(wanted > 0, at, -1), index)
    g = randn(*scores.shape)
    for ours, theirs in zip(
        torch.autograd.grad(scores, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_equals_pfenet(backend):
    """PFENet's prior before its min-max: one product divided by the product of the norms."""
    query, support = randn(2, 30, 9, 8), randn(2, 30, 7, 10)
    mask = F.interpolate(torch.rand(2, 1, 40, 50).double().round(), (7, 10), mode="bilinear", align_corners=True)
    s = (support * mask).flatten(2).transpose(1, 2)
    q = query.flatten(2)
    similarity = torch.bmm(s, q) / (s.norm(dim=2, keepdim=True) @ q.norm(dim=1, keepdim=True) + 1e-7)
    scores, _ = dense_cosine_max(query, support, mask[:, 0])
    torch.testing.assert_close(scores.flatten(1), similarity.amax(1), rtol=1e-6, atol=1e-7)


def test_mask_is_resized(backend):
    query, support = randn(2, 5, 4, 5), randn(2, 5, 6, 7)
    mask = (torch.rand(2, 31, 23, generator=torch.Generator().manual_seed(1)) > 0.8).float()
    grid = F.interpolate(mask[:, None].double(), (6, 7), mode="bilinear", align_corners=True)[:, 0]
    assert 0 < (grid > 0).sum() < grid.numel()
    for options in ({}, {"masked": "exclude"}, {"windows": DPCN}):
        wanted = dense_cosine_max(query, support, (grid > 1e-12).float(), **options)
        for dtype in (torch.float32, torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64):
            for got, want in zip(dense_cosine_max(query, support, mask.to(dtype), **options), wanted, strict=True):
                assert torch.equal(got, want)


# ---- ties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("masked", ["zero", "exclude"])
def test_ties_take_the_lowest_index(backend, masked, dtype):
    """Repeated vectors with exact arithmetic, in every position of a tile and beyond one task (384 KiB of a query)."""
    few = signs(1, 256, 1, 4, dtype=dtype)
    query = few[..., torch.arange(870) % 4].view(1, 256, 29, 30)
    support = few[..., torch.arange(91) % 3].view(1, 256, 7, 13)
    mask = torch.ones(1, 7, 13)
    mask[0, 0, :5] = 0
    scores, index = dense_cosine_max(query, support, mask, masked=masked)
    matches = dense_cosine_match(query, support, mask)
    c = torch.einsum("chw,cyx->yxhw", query[0].double(), support[0].double()).flatten(2).flatten(0, 1)
    candidates = torch.where(mask.flatten() > 0, torch.arange(91), -1)
    for j, (score, i) in enumerate(zip(scores.flatten().tolist(), index.flatten().tolist(), strict=True)):
        best = c[5:, j].max().item()
        if masked == "zero" and best <= 0:
            assert (score, i) == (0, -1)
        else:
            assert score == best and i == candidates[5:][c[5:, j] == best][0]
    assert torch.equal(
        matches[1].flatten(), torch.where(c[5:].amax(0) == c[5:], torch.arange(5, 91)[:, None], 99).amin(0)
    )
    of_support = torch.where(c.amax(1, True) == c, torch.arange(870), 870).amin(1)
    assert torch.equal(matches[3].flatten(), torch.where(candidates >= 0, of_support, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_of_windows(backend, dtype):
    """The same everywhere: the lowest candidate of all whose window lies as the query pixel's does."""
    query, support = (signs(1, 256, 1, 1, dtype=dtype).expand(1, 256, 6, 7).contiguous() for _ in range(2))
    scores, index = dense_cosine_max(query, support, windows=((3, 3), (1, 5), (1, 1)))
    c = torch.ones(6, 7, 6, 7, dtype=torch.float64).numpy()
    for k, window in enumerate(((3, 3), (1, 5), (1, 1))):
        wanted, at = max_by_loops(c, np.ones((6, 7), dtype=bool), window, "zero")
        np.testing.assert_allclose(scores[0, 0, k].numpy(), wanted, rtol=1e-6)
        np.testing.assert_array_equal(index[0, 0, k].numpy(), at)


def test_zero_beats_an_equal_score(backend):
    """A live candidate with the score 0 loses against the background, and wins where there is none."""
    query = torch.tensor([[1.0, 0.0, -1.0, 1.0], [0.0, 1.0, 0.0, 1.0]]).view(1, 2, 1, 4)
    support = torch.tensor([[1.0, 9.0], [0.0, 9.0]]).view(1, 2, 1, 2)
    mask = torch.tensor([[[1.0, 0.0]]])
    scores, index = dense_cosine_max(query, support, mask)
    assert index.flatten().tolist() == [0, -1, -1, 0]
    torch.testing.assert_close(scores.flatten(), torch.tensor([1.0, 0.0, 0.0, 0.5**0.5]))
    scores, index = dense_cosine_max(query, support, mask, masked="exclude")
    assert index.flatten().tolist() == [0] * 4
    torch.testing.assert_close(scores.flatten(), torch.tensor([1.0, 0.0, -1.0, 0.5**0.5]))
    scores, index = dense_cosine_max(query, support[..., :1])
    assert index.flatten().tolist() == [0] * 4 and scores.flatten()[2] == -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_windows_of_one_pixel_twice(backend, dtype):
    """Each is the plain maximum; the gradient adds up."""
    leaves = [randn(2, 70, 9, 8, dtype=dtype).requires_grad_(), randn(2, 70, 7, 10, dtype=dtype).requires_grad_()]
    mask = torch.rand(2, 7, 10, generator=torch.Generator().manual_seed(1)) > 0.5
    plain, at = dense_cosine_max(*leaves, mask)
    scores, index = dense_cosine_max(*leaves, mask, windows=((1, 1), (1, 1)))
    assert torch.equal(scores, plain.expand_as(scores)) and torch.equal(index, at.expand_as(index)) and (at > 0).any()
    one, two = (torch.autograd.grad(s.sum(), leaves) for s in (plain, scores))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(2 * a, b)


# ---- zeros, NaN, empties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("eps_mode", MODES)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_zero_vectors(backend, eps, eps_mode, memory_format):
    """Cosine 0 and gradient 0; a zero kept vector is an ordinary candidate."""
    query, support = randn(3, 20, 5, 6), randn(3, 20, 7, 8)
    support[0] = -support[0].abs()
    query[0] = query[0].abs()
    query[0, :, 2, 3] = 0
    query[1] = 0
    support[0, :, 4, 5] = 0
    leaves = [x.contiguous(memory_format=memory_format).requires_grad_() for x in (query, support)]
    scores, index = dense_cosine_max(*leaves, eps=eps, eps_mode=eps_mode)
    assert not scores[0].any()  # all others are negative
    assert (index[0, 0, 0].flatten() == 37).sum() == 29 and index[0, 0, 0, 2, 3] == 0
    assert not scores[1].any() and not index[1].any()
    match = dense_cosine_match(*leaves, eps=eps, eps_mode=eps_mode)
    (scores.sum() + match[0].sum() + match[2].sum()).backward()
    assert not leaves[0].grad[0, :, 2, 3].any() and not leaves[0].grad[1].any()
    assert not leaves[1].grad[0, :, 4, 5].any()
    assert all(x.grad.isfinite().all() and x.grad[2].any() for x in leaves)


@pytest.mark.parametrize("options", [{}, {"masked": "exclude"}, {"windows": DPCN}], ids=str)
def test_all_zero_mask(backend, options):
    query, support = randn(2, 5, 5, 6).requires_grad_(), randn(2, 5, 7, 8).requires_grad_()
    query.data[0, 0, 0, 0] = math.nan  # nothing to compare it with
    support.data[:, 1] = math.inf
    scores, index = dense_cosine_max(query, support, torch.zeros(2, 20, 20), **options)
    match = dense_cosine_match(query, support, torch.zeros(2, 20, 20))
    for score, at in ((scores, index), match[:2], match[2:]):
        assert not score.any() and (at == -1).all()
    (scores.sum() + match[0].sum() + match[2].sum()).backward()
    assert not query.grad[1].any() and not support.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
def test_nan_outside_the_mask_does_not_leak(backend, memory_format, dtype, bad):
    query, support = randn(2, 20, 9, 8, dtype=dtype), randn(2, 20, 10, 13, dtype=dtype)
    mask = torch.zeros(2, 10, 13)
    mask[0, 2:5, 3:9], mask[1, :, 12] = 1, 0.5
    results = []
    for fill in (bad, 0.0):
        poisoned = torch.where((mask == 0)[:, None], torch.tensor(fill, dtype=dtype), support)
        leaves = [x.contiguous(memory_format=memory_format).requires_grad_() for x in (query.clone(), poisoned)]
        scores, index = dense_cosine_max(*leaves, mask, windows=((1, 1), *DPCN))
        match = dense_cosine_match(*leaves, mask)
        (scores.sum() + match[0].sum() + match[2].sum()).backward()
        results.append([scores.detach(), index, *(m.detach() for m in match), *(x.grad for x in leaves)])
    for got, wanted in zip(*results, strict=True):
        assert wanted.isfinite().all() and wanted.any()
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_nan_query_vector(backend, dtype, bad):
    """NaN at the pixels whose window holds it, with the lowest candidate."""
    query, support = randn(1, 20, 9, 8, dtype=dtype), randn(1, 20, 10, 13, dtype=dtype)
    mask = torch.zeros(1, 10, 13)
    mask[0, 3:6, 2:9] = 1
    query[0, 7, 4, 5] = bad
    flags = torch.zeros(1, 9, 8, dtype=torch.bool)
    flags[0, 4, 5] = True
    for masked in ("zero", "exclude"):
        scores, index = dense_cosine_max(query, support, mask, windows=((1, 1), *DPCN), masked=masked)
        lowest = [3 * 13 + 2] * 4 if masked == "exclude" else [3 * 13 + 2, 13 + 2, 2 * 13 + 1, 3 * 13]
        for k, window in enumerate(((1, 1), *DPCN)):
            reached = reference.in_window(flags, window)
            assert torch.equal(scores[:, 0, k].isnan(), reached)
            assert (index[:, 0, k][reached] == lowest[k]).all()
    alone, at = dense_cosine_max(query, support, mask)
    assert torch.equal(alone[0, 0].isnan(), flags) and at[0, 0, 0, 4, 5] == 3 * 13 + 2
    query_scores, query_index, support_scores, support_index = dense_cosine_match(query, support, mask)
    assert torch.equal(query_scores[0].isnan(), flags) and query_index[0, 0, 4, 5] == 3 * 13 + 2
    assert torch.equal(support_scores[0].isnan(), mask > 0)
    assert torch.equal(support_index[0], torch.where(mask > 0, 4 * 8 + 5, -1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_nan_kept_support_vector(backend, dtype, bad):
    """NaN for the whole (b, s), with the lowest candidate whose window holds such a vector; the other shot is fine."""
    query, support = randn(1, 20, 9, 8, dtype=dtype), randn(1, 2, 20, 10, 13, dtype=dtype)
    mask = torch.zeros(1, 2, 10, 13)
    mask[..., 3:6, 2:9] = 1
    support[0, 1, 3, 4, 6] = support[0, 1, 0, 5, 8] = bad
    for masked in ("zero", "exclude"):
        scores, index = dense_cosine_max(query, support, mask, windows=((1, 1), *DPCN), masked=masked)
        assert scores[:, 0].isfinite().all() and scores[:, 1].isnan().all()
        lowest = [4 * 13 + 6, 2 * 13 + 6, 3 * 13 + 5, 4 * 13 + 4]
        if masked == "exclude":
            lowest[1] = 3 * 13 + 6 if mask[0, 1, 2, 6] == 0 else lowest[1]
        for k, wanted in enumerate(lowest):
            assert (index[0, 1, k] == wanted).all()
    alone, at = dense_cosine_max(query, support, mask)
    assert alone[:, 0].isfinite().all() and alone[:, 1].isnan().all() and (at[:, 1] == 4 * 13 + 6).all()
    query_scores, query_index, support_scores, support_index = dense_cosine_match(query, support, mask)
    assert query_scores[:, 1].isnan().all() and (query_index[:, 1] == 4 * 13 + 6).all()
    flags = torch.zeros(10, 13, dtype=torch.bool)
    flags[4, 6] = flags[5, 8] = True
    assert torch.equal(support_scores[0, 1].isnan(), flags) and not support_index[0, 1][flags].any()
    assert all(x[:, 0].isfinite().all() for x in (query_scores, support_scores))


def test_overflowing_norm_is_nan(backend):
    query = torch.full((1, 3, 1, 2), 1e30)
    query[..., 1] = 1.0
    scores, index = dense_cosine_max(query, torch.ones(1, 3, 1, 1))
    assert scores[..., 0].isnan().all() and scores[..., 1].isfinite().all() and not index.any()


@pytest.mark.parametrize("batch, shots", [(0, 2), (2, 0), (0, 1)])
def test_empties(backend, batch, shots):
    leaves = randn(batch, 3, 4, 5).requires_grad_(), randn(batch, shots, 3, 2, 3).requires_grad_()
    scores, index = dense_cosine_max(*leaves, torch.ones(batch, shots, 2, 2), windows=DPCN)
    assert scores.shape == index.shape == (batch, shots, 3, 4, 5)
    match = dense_cosine_match(*leaves)
    assert [m.shape for m in match] == [(batch, shots, 4, 5)] * 2 + [(batch, shots, 2, 3)] * 2
    (scores.sum() + match[0].sum() + match[2].sum()).backward()
    assert not leaves[0].grad.any() and [x.grad.shape for x in leaves] == [x.shape for x in leaves]


def test_no_shots(backend):
    """The gradient to the support alone has no element."""
    query, support = randn(2, 3, 4, 5), randn(2, 0, 3, 2, 3).requires_grad_()
    for scores in (dense_cosine_max(query, support)[0], dense_cosine_match(query, support)[0]):
        (gradient,) = torch.autograd.grad(scores.sum(), support)
        assert gradient.shape == support.shape


# ---- layouts, results, saved state ----------------------------------------------------------------------------------


def test_one_shot_is_a_shot(backend):
    query, support, mask = randn(2, 7, 5, 6), randn(2, 7, 4, 3), torch.rand(2, 9, 9) > 0.4
    for function in (dense_cosine_max, dense_cosine_match):
        for a, b in zip(function(query, support, mask), function(query, support[:, None], mask[:, None]), strict=True):
            assert torch.equal(a, b)


def test_channels_last_shots_are_not_copied(backend):
    """The same memory as without strides, and the same values."""
    query, support = randn(2, 9, 20, 20, dtype=torch.float32), randn(2, 3, 9, 20, 21, dtype=torch.float32)
    leaf = testing.LAYOUTS["channels_last"](support).requires_grad_()
    assert leaf.stride(2) == 1
    plain = support.requires_grad_()
    leaves = leaf, plain
    scores = [dense_cosine_max(query, shots)[0] for shots in leaves]
    for score in scores:
        score.sum().backward(retain_graph=True)
    assert leaf.grad.stride() == leaf.stride()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-5, atol=1e-6)
    pairs = list(zip(leaves, scores, strict=True))
    for strided, dense in (
        [lambda x=x: dense_cosine_max(query, x) for x in leaves],
        [lambda x=x, y=y: torch.autograd.grad(y.sum(), x, retain_graph=True) for x, y in pairs],
    ):
        assert _memory.extra_bytes(strided) == _memory.extra_bytes(dense)


def test_indices_have_no_gradient(backend):
    query, support = randn(1, 3, 4, 5).requires_grad_(), randn(1, 3, 4, 5)
    scores, index = dense_cosine_max(query, support)
    assert scores.requires_grad and not index.requires_grad
    query_scores, query_index, support_scores, support_index = dense_cosine_match(query, support)
    assert query_scores.requires_grad and support_scores.requires_grad
    assert not query_index.requires_grad and not support_index.requires_grad
    (one,) = torch.autograd.grad(query_scores.sum(), query, retain_graph=True)
    (other,) = torch.autograd.grad(support_scores.sum(), query, retain_graph=True)
    (both,) = torch.autograd.grad(query_scores.sum() + support_scores.sum(), query)
    torch.testing.assert_close(one + other, both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("windows", [((1, 1),), DPCN], ids=["pixels", "windows"])
def test_value_regret_of_indices(windows, dtype):
    """The float64 score at the chosen index is within the tolerance of scores from the float64 maximum."""
    query, support = randn(1, 257, 13, 15, dtype=dtype), randn(1, 257, 12, 17, dtype=dtype)
    _, index = dense_cosine_max(query, support, windows=windows)
    best, _ = dense_cosine_max(query.double(), support.double(), windows=windows)
    flat = [n for w in windows for n in w]
    pairs = reference.pairs_of_max(index[0], flat, (12, 17))
    at = reference.scores_at(query.double(), support.double(), support.double().norm(dim=1), pairs, 1e-7, "clamp")
    regret = best.flatten() - torch.stack(at, 1).flatten()
    assert regret.min() > -1e-12 and regret.max() <= testing.FLOOR[torch.float32]


@pytest.mark.parametrize("windows", [((1, 1),), DPCN], ids=["pixels", "windows"])
@pytest.mark.parametrize("channels", [512, 1100, 2048, 8192])
def test_many_channels(channels, windows):
    """Every size of a task, and more than one chunk of the support, against float64."""
    query, support = randn(1, channels, 9, 15, dtype=torch.float32), randn(1, channels, 10, 11, dtype=torch.float32)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (query, support)]
        with fss_kernels.use_backend("cpp" if dtype == torch.float32 else "reference"):
            scores, index = dense_cosine_max(*leaves, windows=windows)
            match = dense_cosine_match(*leaves)
            loss = (scores * scores.detach().cos()).sum() + match[0].square().sum() + match[2].square().sum()
            results.append([scores, index, *match, *torch.autograd.grad(loss, leaves)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), wanted.double(), rtol=0, atol=2e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("channels", [16, 600])
@pytest.mark.parametrize("name", ["max", "windows", "match"])
def test_extra_memory(name, channels):
    """What the spec states, from the allocator's own record; never a matrix of cosines."""
    query, support = torch.randn(1, channels, 40, 41), torch.randn(1, channels, 42, 40)
    options = {"windows": DPCN} if name == "windows" else {}
    spec = testing.specs()["dense_cosine_match" if name == "match" else "dense_cosine_max"]
    spec.public(query, support, **options)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results = spec.public(query, support, **options)
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    extra = peak - sum(r.nbytes for r in results)
    stated = spec.scratch_bytes(testing.Sample("memory", {"query": query, "support": support}, options), torch.float32)
    assert 0.9 * stated < extra <= stated + 64 * 20
    if channels < 500:
        assert extra < 40 * 41 * 42 * 40 * 4 / 1.2


def test_raw_ops_check_their_arguments():
    query, support, mask = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 2, 5), torch.ones(4, 1, 1)
    forward = torch.ops.fss_cpp.dense_cosine_max_fwd
    options = ([3, 1], "zero", 1e-7, "clamp")
    for arguments in (
        (query, support[:3], mask[:3], *options),
        (query, support.double(), mask, *options),
        (query, support, mask[:2], *options),
        (query, support, mask, [3], *options[1:]),
        (query, support, mask, [3, 2], *options[1:]),
        (query, support, mask, [3, 1], "drop", *options[2:]),
        (query, support, mask, *options[:3], "max"),
    ):
        with pytest.raises(RuntimeError, match="dense_cosine: "):
            forward(*arguments)
    scores, *saved = forward(query, support, mask, *options)
    for grad, statistics in (
        (scores.double(), saved),
        (scores[:, :, :1], saved),
        (scores, [saved[0].int(), *saved[1:]]),
        (scores, [saved[0], saved[1][:1], saved[2]]),
        (scores, [*saved[:2], saved[2].double()]),
        (scores, [saved[0] + 10, *saved[1:]]),
    ):
        with pytest.raises(RuntimeError, match="dense_cosine: "):
            torch.ops.fss_cpp.dense_cosine_max_bwd(grad, query, support, mask, *statistics, *options, True, True)
