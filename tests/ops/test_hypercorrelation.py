"""hypercorrelation against independent definitions: loops, HSNet's formula, numbers done by hand, its edge rules."""

import inspect
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fss_kernels
from fss_kernels import hypercorrelation, hypercorrelation_pyramid, testing
from fss_kernels.ops.hypercorrelation import reference

BACKENDS = ["reference", "cpp"]
MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]
MODES = ["add", "clamp"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fss_kernels.use_backend(request.param):
        yield request.param


def lattice(*shape, dtype=torch.float64):
    """Entries in units of 1/4 whose products never add up to 0: channel 0 is odd, the others are even."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = 2 * torch.randint(-2, 3, shape, generator=generator)
    x[:, 0] = 2 * torch.randint(-1, 2, x[:, 0].shape, generator=generator) + 1
    return (x / 4).to(dtype)


def resized_by_loops(mask, height, width):
    """One pixel after the other between its four neighbours, corners on corners."""
    h, w = mask.shape
    out = np.zeros((height, width))
    for i, j in itertools.product(range(height), range(width)):
        y = i * (h - 1) / (height - 1) if height > 1 else 0.0
        x = j * (w - 1) / (width - 1) if width > 1 else 0.0
        y0, x0 = min(math.floor(y + 1e-12), h - 1), min(math.floor(x + 1e-12), w - 1)
        y1, x1, fy, fx = min(y0 + 1, h - 1), min(x0 + 1, w - 1), max(y - y0, 0), max(x - x0, 0)
        out[i, j] = (mask[y0, x0] * (1 - fx) + mask[y0, x1] * fx) * (1 - fy)
        out[i, j] += (mask[y1, x0] * (1 - fx) + mask[y1, x1] * fx) * fy
    return out


def length_by_loops(vector, eps, eps_mode):
    n = math.sqrt(sum(float(v) ** 2 for v in vector))
    if n == 0:
        return 0.0, math.inf
    return n, n + eps if eps_mode == "add" else max(n, eps)


def correlation_by_loops(query, support, mask, eps, eps_mode, clamp):
    batch, _, ha, wa = query.shape
    hb, wb = support.shape[2:]
    out = np.zeros((batch, ha, wa, hb, wb))
    for b in range(batch):
        weights = np.ones((hb, wb)) if mask is None else resized_by_loops(mask[b], hb, wb)
        for i, j, y, x in itertools.product(range(ha), range(wa), range(hb), range(wb)):
            q, s = query[b, :, i, j], support[b, :, y, x] * weights[y, x]
            _, dq = length_by_loops(q, eps, eps_mode)
            _, ds = length_by_loops(s, eps, eps_mode)
            cosine = sum(float(a) * float(c) for a, c in zip(q, s, strict=True)) / dq / ds
            out[b, i, j, y, x] = max(cosine, 0.0) if clamp else cosine
    return out


def gradient_by_loops(x, d, eps, eps_mode):
    """The gradient to one vector x from d, that to the normalised vector, as the contract writes it."""
    n, denominator = length_by_loops(x, eps, eps_mode)
    if n == 0:
        return np.zeros_like(x)
    if eps_mode == "clamp":
        if n <= eps:
            return d / eps
        unit = x / n
        return (d - unit * (unit @ d)) / n
    return d / denominator - x * (x @ d) / (n * denominator**2)


@pytest.mark.parametrize("mask_size", [None, (9, 7), (3, 2), (1, 1), (3, 4)])
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("eps_mode", MODES)
def test_equals_loops(backend, eps_mode, clamp, mask_size):
    query, support = lattice(2, 5, 2, 3), lattice(2, 5, 3, 4)
    mask = None if mask_size is None else torch.rand(2, *mask_size, dtype=torch.float64)
    out = hypercorrelation(query, support, mask, eps=0.01, eps_mode=eps_mode, clamp=clamp)
    wanted = correlation_by_loops(
        query.numpy(), support.numpy(), mask if mask is None else mask.numpy(), 0.01, eps_mode, clamp
    )
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.9, 3.0])
@pytest.mark.parametrize("eps_mode", MODES)
def test_gradients_equal_loops(backend, eps_mode, eps):
    """Both gradients from the contract's formulas, one vector at a time; 0.9 lies among the norms."""
    query, support = 0.4 * lattice(2, 4, 2, 3), 0.4 * lattice(2, 4, 3, 2)
    mask = torch.rand(2, 3, 2, dtype=torch.float64) + 0.2
    mask[1, 1, 0] = 0
    leaves = query.requires_grad_(), support.requires_grad_()
    out = hypercorrelation(*leaves, mask, eps=eps, eps_mode=eps_mode)
    g = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad(out, leaves, g)
    q, s = query.detach().flatten(2).numpy(), (support.detach() * mask[:, None]).flatten(2).numpy()
    g = (g * (out > 0)).flatten(3).flatten(1, 2).numpy()
    for b in range(2):
        units = [
            np.stack([v / length_by_loops(v, eps, eps_mode)[1] for v in x[b].T], 1) for x in (q, s)
        ]  # 0 / inf for a zero vector
        for i in range(q.shape[2]):
            wanted = gradient_by_loops(q[b, :, i], units[1] @ g[b, i], eps, eps_mode)
            np.testing.assert_allclose(ours[0].flatten(2)[b, :, i].numpy(), wanted, rtol=1e-10, atol=1e-13)
        for j in range(s.shape[2]):
            wanted = gradient_by_loops(s[b, :, j], units[0] @ g[b, :, j], eps, eps_mode) * mask.flatten(1)[b, j].item()
            np.testing.assert_allclose(ours[1].flatten(2)[b, :, j].numpy(), wanted, rtol=1e-10, atol=1e-13)


def hsnet(query, support, mask, eps=1e-5):
    """HSNet's layer: mask the support, divide both by norm + eps, one product, no negative value."""
    mask = F.interpolate(mask[:, None], support.shape[2:], mode="bilinear", align_corners=True)
    flat = [x.flatten(2) for x in (query, support * mask)]
    q, s = (x / (x.norm(dim=1, p=2, keepdim=True) + eps) for x in flat)
    product = torch.einsum("bci,bcj->bij", q, s)
    return product.clamp(min=0).view(query.shape[0], *query.shape[2:], *support.shape[2:])


@pytest.mark.parametrize(
    "channels, ha, wa, hb, wb",
    [(1, 5, 6, 7, 8), (3, 6, 5, 8, 7), (16, 5, 6, 7, 8), (130, 5, 6, 7, 8), (5, 17, 19, 23, 29)],
)  # the last: gradients sum over more pixels than one block holds
def test_equals_hsnet(backend, channels, ha, wa, hb, wb):
    query, support = lattice(2, channels, ha, wa), lattice(2, channels, hb, wb)
    leaves = query.requires_grad_(), support.requires_grad_()
    mask = torch.rand(2, 40, 50, dtype=torch.float64) + 0.05
    results = []
    for function in (hypercorrelation, hsnet):
        out = function(*leaves, mask)
        results.append([out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_by_hand(backend):
    """Lengths 5 and 2, eps 1: 6 and 3 ("add"); eps 4 holds the second at 4 ("clamp")."""
    query = torch.tensor([[[[3.0]], [[4.0]]]], requires_grad=True)
    support = torch.tensor([[[[2.0, -2.0]], [[0.0, 0.0]]]], requires_grad=True)
    out = hypercorrelation(query, support, eps=1.0)
    torch.testing.assert_close(out.detach(), torch.tensor([[[[[6 / 18, 0.0]]]]]))
    out.sum().backward()
    # d = (2/3, 0); x . d = 2: d/6 - x * 2 / (5 * 36)
    torch.testing.assert_close(query.grad[0, :, 0, 0], torch.tensor([2 / 18 - 6 / 180, -8 / 180]))
    # d = (3/6, 4/6); x . d = 1: d/3 - x * 1 / (2 * 9)
    torch.testing.assert_close(support.grad[0, :, 0, 0], torch.tensor([0.5 / 3 - 2 / 18, 2 / 9]))
    assert not support.grad[..., 1].any()
    clamped = hypercorrelation(query, support, eps=4.0, eps_mode="clamp", clamp=False)
    torch.testing.assert_close(clamped.detach(), torch.tensor([[[[[6 / 20, -6 / 20]]]]]))


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("eps_mode", MODES)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_zero_vectors(backend, eps, eps_mode, memory_format):
    """Cosine 0 and gradient 0, on both sides, alone among others and everywhere."""
    query, support = lattice(2, 20, 5, 6), lattice(2, 20, 7, 8)
    query[0, :, 2, 3] = 0
    query[1] = 0
    support[0, :, 4:, 5] = 0
    leaves = [x.contiguous(memory_format=memory_format).requires_grad_() for x in (query, support)]
    out = hypercorrelation(*leaves, eps=eps, eps_mode=eps_mode, clamp=False)
    assert not out[0, 2, 3].any() and not out[0, :, :, 4:, 5].any() and not out[1].any()
    (out * 3).sum().backward()
    assert not leaves[0].grad[0, :, 2, 3].any() and not leaves[0].grad[1].any()
    assert not leaves[1].grad[0, :, 4:, 5].any() and not leaves[1].grad[1].any()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in leaves)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_all_zero_mask(backend, eps):
    query, support = lattice(2, 5, 5, 6).requires_grad_(), lattice(2, 5, 7, 8).requires_grad_()
    out = hypercorrelation(query, support, torch.zeros(2, 20, 20), eps=eps)
    assert not out.any()
    out.sum().backward()
    assert not query.grad.any() and not support.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
def test_nan_outside_the_mask_does_not_leak(backend, memory_format, dtype, bad):
    query, support = lattice(2, 20, 9, 8, dtype=dtype), lattice(2, 20, 10, 13, dtype=dtype)
    mask = torch.zeros(2, 10, 13)
    mask[0, 2:5, 3:9], mask[1, :, 12] = 1, 0.5
    results = []
    for fill in (bad, 0.0):
        poisoned = torch.where((mask == 0)[:, None], torch.tensor(fill, dtype=dtype), support)
        leaves = [x.contiguous(memory_format=memory_format).requires_grad_() for x in (query.clone(), poisoned)]
        out = hypercorrelation(*leaves, mask)
        out.sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for got, wanted in zip(*results, strict=True):
        assert wanted.isfinite().all() and wanted.any()
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_nan_marks_its_pairs(backend, dtype, bad, clamp):
    """A query vector with NaN or Inf: its row, under the mask or not; a kept support vector: its column."""
    query, support = lattice(1, 20, 9, 8, dtype=dtype), lattice(1, 20, 10, 13, dtype=dtype)
    mask = torch.zeros(1, 10, 13)
    mask[0, 3:6, 2:9] = 1
    query[0, 7, 4, 5] = bad
    support[0, 3, 4, 6] = bad
    out = hypercorrelation(query, support, mask, clamp=clamp)
    wanted = torch.zeros_like(out, dtype=torch.bool)
    wanted[0, 4, 5] = True
    wanted[0, :, :, 4, 6] = True
    assert torch.equal(out.isnan(), wanted)


def test_overflowing_norm_is_nan(backend):
    query = torch.full((1, 3, 1, 2), 1e30)
    query[..., 1] = 1.0
    out = hypercorrelation(query, torch.ones(1, 3, 1, 1))
    assert out[0, 0, 0].isnan().all() and out[0, 0, 1].isfinite().all()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_no_gradient_at_exactly_zero(backend, dtype):
    """Orthogonal vectors with exact arithmetic: the output is 0 and so is its gradient."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype).view(1, 2, 1, 2).requires_grad_()
    support = torch.tensor([[1.0], [0.0]], dtype=dtype).view(1, 2, 1, 1).requires_grad_()
    out = hypercorrelation(query, support, eps=0.0)
    assert out.flatten().tolist() == [1.0, 0.0]
    out.sum().backward()
    assert not query.grad.any() and not support.grad.any()
    out = hypercorrelation(query, support, eps=0.0, clamp=False)
    assert torch.autograd.grad(out.sum(), query)[0][0, :, 0].tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_no_mask_is_a_mask_of_ones(backend):
    query, support = lattice(2, 9, 5, 6, dtype=torch.float32), lattice(2, 9, 7, 8, dtype=torch.float32)
    wanted = hypercorrelation(query, support)
    for mask in (torch.ones(2, 7, 8), torch.ones(2, 30, 20, dtype=torch.bool), torch.ones(2, 1, 1)):
        assert torch.equal(hypercorrelation(query, support, mask), wanted)


def test_mask_dtypes_agree(backend):
    query, support = lattice(2, 9, 5, 6, dtype=torch.float32), lattice(2, 9, 7, 8, dtype=torch.float32)
    binary = torch.rand(2, 29, 31) > 0.5
    wanted = hypercorrelation(query, support, binary.float())
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64):
        torch.testing.assert_close(hypercorrelation(query, support, binary.to(dtype)), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(hypercorrelation(query, support, binary.float().transpose(1, 2).contiguous().mT), wanted)


def test_the_mask_is_a_constant(backend):
    query, support = lattice(1, 3, 4, 5).requires_grad_(), lattice(1, 3, 4, 5)
    mask = torch.rand(1, 4, 5, dtype=torch.float64, requires_grad=True)
    hypercorrelation(query, support, mask).sum().backward()
    assert mask.grad is None and query.grad is not None
    arguments = [query], [support], mask, 1e-5, "add", True
    with pytest.raises(RuntimeError):  # the raw op says so instead of returning 0
        torch.ops.fss.hypercorrelation_fwd(*arguments)[0].sum().backward()


def test_one_tensor_on_both_sides(backend):
    x = lattice(2, 9, 5, 6).requires_grad_()
    y = x.detach().clone().requires_grad_()
    for leaves, arguments in (((x,), (x, x)), ((y,), (y, y * 1.0))):
        out = hypercorrelation(*arguments)
        (out * out.detach().cos()).sum().backward()
        assert leaves[0].grad.any()
    torch.testing.assert_close(x.grad, y.grad)


def test_autocast_takes_the_wider_dtype(backend):
    query, support = lattice(1, 9, 5, 6, dtype=torch.bfloat16), lattice(1, 9, 7, 8, dtype=torch.float32)
    for dtype, wanted in ((torch.float32, torch.float32), (torch.float16, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16):
            out = hypercorrelation(query, support.to(dtype))
        assert out.dtype == wanted
        assert torch.equal(out, hypercorrelation(query.float(), support.to(dtype).float()))


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 47, 48, 49, 97])
def test_signs(backend, columns):
    """One bit an output, rows of whole bytes, padded with 0."""
    query, support = lattice(2, 6, 3, 5), lattice(2, 6, 1, columns)
    out, *_, signs = torch.ops.fss.hypercorrelation_fwd([query], [support], torch.ones(2, 1, 1), 1e-5, "add", True)
    assert signs.shape == (1, 2, 15, -(-columns // 8)) and signs.dtype == torch.uint8
    assert torch.equal(reference.unpack_bits(signs[0], columns), out.view(2, 15, columns) > 0)
    assert torch.equal(signs[0], reference.pack_bits(out.view(2, 15, columns) > 0))
    *_, signs = torch.ops.fss.hypercorrelation_fwd([query], [support], torch.ones(2, 1, 1), 1e-5, "add", False)
    assert signs.shape == (1, 2, 15, 0)


@pytest.mark.parametrize("channels", [512, 1100, 2048])
def test_many_channels(channels):
    """Every size of a task, against float64."""
    query, support = lattice(1, channels, 7, 15, dtype=torch.float32), lattice(1, channels, 10, 11, dtype=torch.float32)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (query, support)]
        with fss_kernels.use_backend("cpp" if dtype == torch.float32 else "reference"):
            out = hypercorrelation(*leaves)
            results.append([out, *torch.autograd.grad((out * out.detach().double().cos().to(dtype)).sum(), leaves)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())


def test_same_bits_wherever_a_tile_lies():
    """Repeated pixels have repeated cosines and gradients, in every position of a tile, strip and task."""
    query, support = torch.randn(1, 70, 1, 1).expand(1, 70, 11, 19), torch.randn(1, 70, 1, 1).expand(1, 70, 13, 17)
    leaves = [x.clone().requires_grad_() for x in (query, support)]
    out = hypercorrelation(*leaves, clamp=False)
    assert out.unique().numel() == 1
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert torch.equal(grad, grad[:, :, :1, :1].expand_as(grad))


@pytest.mark.parametrize("columns", [(40, 40), (41, 37)], ids=["whole-lines", "ragged"])
def test_streamed_and_stored_outputs_agree(columns):
    """Writing a large output past the caches changes where it goes, not what it is."""
    query, support = torch.randn(1, 16, 40, 41), torch.randn(1, 16, *columns)
    large = hypercorrelation(query, support)
    assert large.nbytes > 8 << 20
    assert torch.equal(hypercorrelation(query[:, :, 17:21], support), large[:, 17:21])


def test_extra_memory():
    """What the spec states and the docstring promises, from the allocator's own record."""
    spec = testing.specs()["hypercorrelation"]
    query, support = torch.randn(3, 64, 20, 20), torch.randn(3, 64, 24, 20)
    sample = testing.Sample("memory", {"query": query, "support": support})
    hypercorrelation(query, support)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = hypercorrelation(query, support)
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    assert 0 < peak - out.nbytes <= spec.scratch_bytes(sample, torch.float32) + 64 * 10


def test_raw_backward_checks_its_arguments():
    layers = [torch.randn(1, 3, 4, 4)], [torch.randn(1, 3, 2, 5)], torch.ones(1, 1, 1)
    options = (0.1, "add", True)
    out, *saved = torch.ops.fss.hypercorrelation_fwd(*layers, *options)
    for grad, statistics in (
        (out.double(), saved),
        (out[:, :, :1], saved),
        (out[:, 0], saved),
        (out, [saved[0][:, :, :2], *saved[1:]]),
        (out, [saved[0], saved[1].double(), *saved[2:]]),
        (out, [*saved[:3], saved[3][..., :1]]),
        (out, [*saved[:3], saved[3].int()]),
    ):
        with pytest.raises(RuntimeError, match=r"hypercorrelation: (grad|norms|signs)"):
            torch.ops.fss_cpp.hypercorrelation_bwd(grad, *layers, *statistics, *options, [True], [True])
    with pytest.raises(RuntimeError, match="one flag a layer"):
        torch.ops.fss_cpp.hypercorrelation_bwd(out, *layers, *saved, *options, [True, True], [True])


# ---- the pyramid ----------------------------------------------------------------------------------------------------

GRIDS = (((5, 4), (3, 7), (6, 2, 9)), ((3, 2), (4, 5), (11,)), ((1, 1), (2, 3), (40, 3)))  # query, support, channels
LEVELS = (3, 1, 2)


def pyramid_layers(dtype=torch.float64):
    queries = [lattice(2, c, *grid, dtype=dtype) for grid, _, channels in GRIDS for c in channels]
    supports = [lattice(2, c, *grid, dtype=dtype) for _, grid, channels in GRIDS for c in channels]
    return queries, supports


def hsnet_pyramid(queries, supports, mask, levels, eps=1e-5):
    """HSNet's `multilayer_correlation`: layer after layer, then stacked by level and turned to batch first."""
    layers = [hsnet(q, s, mask, eps) for q, s in zip(queries, supports, strict=True)]
    starts = list(itertools.accumulate(levels, initial=0))
    return [torch.stack(layers[i:j]).transpose(0, 1).contiguous() for i, j in itertools.pairwise(starts)]


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["planes", "channels_last"])
def test_pyramid_equals_hsnet(backend, memory_format):
    """Values and every layer's gradients; layers of one level with channels of their own."""
    queries, supports = pyramid_layers()
    mask = torch.rand(2, 9, 8, dtype=torch.float64) + 0.1
    leaves = [x.to(memory_format=memory_format).requires_grad_() for x in (*queries, *supports)]
    n = len(queries)
    ours = hypercorrelation_pyramid(leaves[:n], leaves[n:], mask, levels=LEVELS)
    plain = [x.detach().clone().requires_grad_() for x in leaves]
    wanted = hsnet_pyramid(plain[:n], plain[n:], mask, LEVELS)
    assert [tuple(x.shape) for x in ours] == [
        (2, count, *a, *b) for count, (a, b, _) in zip(LEVELS, GRIDS, strict=True)
    ]
    for x, y in zip(ours, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    seeds = [torch.randn(x.shape, dtype=torch.float64) for x in ours]
    for x, y in zip(torch.autograd.grad(ours, leaves, seeds), torch.autograd.grad(wanted, plain, seeds), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_pyramid_equals_single_layers_bit_for_bit(backend):
    queries, supports = pyramid_layers(torch.float32)
    mask = torch.rand(2, 9, 8)
    levels = hypercorrelation_pyramid(queries, supports, mask, levels=LEVELS, eps_mode="clamp", clamp=False, eps=0.1)
    layers = [layer for level in levels for layer in level.unbind(1)]
    for layer, q, s in zip(layers, queries, supports, strict=True):
        assert torch.equal(layer, hypercorrelation(q, s, mask, eps_mode="clamp", clamp=False, eps=0.1))


def test_pyramid_computes_only_wanted_gradients(backend, recorded_ops):
    queries, supports = pyramid_layers(torch.float32)
    queries[1].requires_grad_()
    supports[2].requires_grad_()
    with recorded_ops() as recorder:
        sum(level.sum() for level in hypercorrelation_pyramid(queries, supports, levels=LEVELS)).backward()
    forwards = [name for name, _ in recorder.calls if name.endswith("_fwd")]
    flags = [args[-2:] for name, args in recorder.calls if name.endswith("_bwd")]
    assert len(forwards) == 3 and flags == [([False, True, False], [False, False, True])]
    for i in range(len(queries)):
        assert (queries[i].grad is not None) == (i == 1) and (supports[i].grad is not None) == (i == 2)


def test_pyramid_of_one_dtype_under_autocast(backend):
    queries, supports = pyramid_layers(torch.float32)
    supports[1] = supports[1].bfloat16()
    with pytest.raises(TypeError, match=r"pyramid: supports\[1\] must have the dtype of queries\[0\]"):
        hypercorrelation_pyramid(queries, supports, levels=LEVELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {x.dtype for x in hypercorrelation_pyramid(queries, supports, levels=LEVELS)} == {torch.float32}


def test_pyramid_compiles():
    queries, supports = pyramid_layers(torch.float32)
    wanted = hypercorrelation_pyramid(queries, supports, levels=LEVELS)
    compiled = torch.compile(lambda q, s: hypercorrelation_pyramid(q, s, levels=LEVELS), fullgraph=True)
    for x, y in zip(compiled(queries, supports), wanted, strict=True):
        assert torch.equal(x, y)


COUNTS = "levels must be counts >= 1 that add up to"
Q, S = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 5, 4)


@pytest.mark.parametrize(
    "error, message, queries, supports, levels",
    [
        (TypeError, "queries must be a sequence of torch.Tensor, got Tensor", Q, [S], (1,)),
        (ValueError, "queries must hold at least one layer, got none", [], [], ()),
        (ValueError, "supports must be as many as queries, 2, got 1", [Q, Q], [S], (2,)),
        (TypeError, "levels must be a sequence of int, got int", [Q], [S], 1),
        (TypeError, "levels must be a sequence of int, got (1.0,)", [Q], [S], (1.0,)),
        (ValueError, f"{COUNTS} 2, the length of queries, got (1,)", [Q, Q], [S, S], (1,)),
        (ValueError, f"{COUNTS} 1, the length of queries, got (0, 1)", [Q], [S], (0, 1)),
        (TypeError, "supports[1] must be a torch.Tensor, got NoneType", [Q, Q], [S, None], (2,)),
        (ValueError, "queries[1] must have shape (B, C, H, W), got (3, 4, 4)", [Q, Q[0]], [S, S], (2,)),
        (ValueError, "queries[1] must have the batch size of queries[0], 2, got 1", [Q, Q[:1]], [S, S[:1]], (2,)),
        (ValueError, "supports[1] must have the channels of queries[1], 3, got 2", [Q, Q], [S, S[:, :2]], (1, 1)),
        (ValueError, "queries[1] must have the grid of queries[0], (4, 4), got (4, 3)", [Q, Q[..., 1:]], [S, S], (2,)),
        (ValueError, "supports[2] must have the grid of supports[1], (5, 4), got (4, 4)", [Q] * 3, [S, S, Q], (1, 2)),
    ],
)  # fmt: skip
def test_pyramid_bad_input(error, message, queries, supports, levels):
    with pytest.raises(error, match=f"^{re.escape('hypercorrelation_pyramid: ' + message)}$"):
        hypercorrelation_pyramid(queries, supports, levels=levels)


def test_pyramid_signature():
    names = {n: p.default for n, p in inspect.signature(hypercorrelation_pyramid).parameters.items()}
    needed = dict.fromkeys(("queries", "supports", "levels"), inspect.Parameter.empty)
    assert names == {**needed, "mask": None, "eps": 1e-5, "eps_mode": "add", "clamp": True}


def test_gradients_of_many_pixels(backend):
    """Sums over 3,600 pixels of the other side, all of one sign: no worse than PyTorch's products of matrices."""
    x = torch.randn(2, 1, 16, 60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.6
    results = []
    for dtype, run in ((torch.float32, backend), (torch.float64, "reference")):
        leaves = [t.to(dtype).requires_grad_() for t in x]
        with fss_kernels.use_backend(run):
            out = hypercorrelation(*leaves, clamp=False)
        results.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 2.0**-20 * wanted.abs().max()
