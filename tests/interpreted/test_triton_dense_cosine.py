"""dense_cosine's Triton kernels where they are cut: several tiles, chunks, bands and lists; edge rules; ties."""

import itertools
import math

import pytest
import torch

import fss_kernels
from fss_kernels import dense_cosine_match, dense_cosine_max, testing
from fss_kernels.ops.dense_cosine import triton_kernels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]
DPCN = ((5, 1), (3, 3), (1, 5))
OPTIONS = [{}, {"masked": "exclude"}, {"windows": DPCN}, {"windows": ((3, 1), (1, 1)), "masked": "exclude"}]
max_options = pytest.mark.parametrize("options", OPTIONS, ids=["zero", "exclude", "dpcn", "two-windows"])


@pytest.fixture
def small_tiles(monkeypatch):
    """So small that few pixels and channels are many tiles, chunks, steps and, with windows, bands and groups."""
    tile, map_tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}, {"BLOCK_C": 16, "BLOCK_N": 32}
    for name, value in {
        "TILES": {"ieee": tile, "half": tile},
        "CHUNK": 32,
        "BLOCK": 64,
        "FINISH": 32,
        "RING": 0,  # bands of one row
        "WINDOW_TILE": {"BLOCK_X": 4, "BLOCK_N": 32},
        "LIST_TILE": {"BLOCK_C": 16, "BLOCK_N": 32, "BLOCK_T": 2},
        "GATHER_TILES": {False: map_tile, True: map_tile},
        "NORM_TILES": {False: map_tile, True: map_tile},
    }.items():
        monkeypatch.setattr(triton_kernels, name, value)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def signs(*shape):
    """Vectors (C = 64) of entries +-1/8: norm 1, and every sum of products is exact."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (2 * torch.randint(0, 2, shape, generator=generator) - 1) / 8


def foreground(batch, shots, height, width):
    """Two rectangles with a hole, the first sample's mirrored."""
    mask = torch.zeros(batch, shots, height, width)
    mask[:, :, 1 : height // 2 + 1, : width // 2] = 1
    mask[:, :, -2:, width // 3 :] = 0.5
    mask[:, :, 2, 1] = 0
    mask[0] = mask[0].flip(-1)
    return mask


def evaluated(backend, function, tensors, options, dtype=torch.float32):
    """Results and, of a weighted sum of the scores that are numbers, both gradients."""
    query, support, *mask = tensors
    leaves = [x.detach().to(dtype).requires_grad_() for x in (query, support)]
    with fss_kernels.use_backend(backend):
        results = function(*leaves, *mask, **options)
        scores = [r for r in results if r.is_floating_point()]
        weights = [torch.linspace(-1, 1, s.numel(), dtype=dtype).view(s.shape) for s in scores]
        loss = sum((torch.where(s.isnan(), 0.0, s) * w).sum() for s, w in zip(scores, weights, strict=True))
        return [*(r.detach() for r in results), *torch.autograd.grad(loss, leaves)]


def scores_of(backend, function, tensors, options):
    """Results alone."""
    with fss_kernels.use_backend(backend):
        return function(*tensors, **options)


def agree(function, *tensors, **options):
    """The reference in float64, its indices exactly; returns our results."""
    ours = evaluated("triton", function, tensors, options)
    for got, wanted in zip(ours, evaluated("reference", function, tensors, options, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    return ours


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@max_options
def test_max_of_many_tiles(small_tiles, options, layout):
    query, support = (testing.LAYOUTS[layout](x) for x in (randn(2, 35, 6, 7), randn(2, 2, 35, 9, 6)))
    agree(dense_cosine_max, query, support, foreground(2, 2, 9, 6), **options)
    if layout != "contiguous":
        return
    one = query[:1], support[:1, 1:]
    agree(dense_cosine_max, *one, foreground(1, 1, 40, 30), eps=0.5, eps_mode="add", **options)
    agree(dense_cosine_max, *one, **options)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_match_of_many_tiles(small_tiles, layout):
    query, support = (testing.LAYOUTS[layout](x) for x in (randn(2, 35, 6, 7), randn(2, 2, 35, 9, 6)))
    agree(dense_cosine_match, query, support, foreground(2, 2, 9, 6))
    agree(dense_cosine_match, query, support, foreground(2, 2, 40, 30), eps=6.0)
    agree(dense_cosine_match, query[:1], support[:1])


@max_options
def test_five_shots(small_tiles, options):
    tensors = randn(2, 6, 4, 5), randn(2, 5, 6, 5, 3), foreground(2, 5, 5, 3)
    agree(dense_cosine_max, *tensors, **options)
    agree(dense_cosine_match, *tensors)


@pytest.mark.parametrize("grids", [((1, 1), (3, 2)), ((2, 7), (1, 5)), ((1, 6), (6, 1)), ((6, 1), (2, 1))], ids=str)
def test_grids_smaller_than_windows(grids):
    query, support = randn(1, 5, *grids[0]), randn(1, 5, *grids[1])
    mask = torch.ones(1, *grids[1])
    mask[..., 0, 0] = 0
    for masked in ("zero", "exclude"):
        agree(dense_cosine_max, query, support, mask, windows=((5, 7), *DPCN), masked=masked)


def test_bands_do_not_matter(monkeypatch):
    """However many rows the ring holds, whatever the samples that share it: the same bits. Sums are exact, since NumPy
    may multiply matrices of other shapes in another order."""
    tensors = signs(2, 64, 5, 4), signs(2, 64, 7, 6), foreground(2, 1, 7, 6)[:, 0]
    wanted = evaluated("triton", dense_cosine_max, tensors, {"windows": DPCN})
    for rows in (0, 6, 100):
        monkeypatch.setattr(triton_kernels, "RING", rows * 6 * 20 * 4)
        for got, same in zip(evaluated("triton", dense_cosine_max, tensors, {"windows": DPCN}), wanted, strict=True):
            assert torch.equal(got, same)


@pytest.mark.parametrize("masked", ["zero", "exclude"])
def test_ties_take_the_lowest_index(small_tiles, masked):
    """Repeated vectors with exact arithmetic, in every position of a tile and in later tiles, chunks and rows."""
    few = signs(1, 64, 1, 4)
    query = few[..., torch.arange(66) % 4].view(1, 64, 6, 11)
    support = few[..., torch.arange(91) % 3].view(1, 64, 7, 13)
    mask = torch.ones(1, 7, 13)
    mask[0, 0, :5] = 0
    for function, options in (
        (dense_cosine_max, {"masked": masked}),
        (dense_cosine_max, {"masked": masked, "windows": ((1, 3), (3, 1))}),
        (dense_cosine_match, {}),
    ):
        tensors = query, support, mask
        ours, wanted = (scores_of(backend, function, tensors, options) for backend in ("triton", "reference"))
        for got, like in zip(ours, wanted, strict=True):
            assert torch.equal(got, like)


def test_zero_beats_an_equal_score():
    query = torch.tensor([[1.0, 0.0, -1.0, 1.0], [0.0, 1.0, 0.0, 1.0]]).view(1, 2, 1, 4)
    support = torch.tensor([[1.0, 9.0], [0.0, 9.0]]).view(1, 2, 1, 2)
    mask = torch.tensor([[[1.0, 0.0]]])
    _, index, *_ = agree(dense_cosine_max, query, support, mask)
    assert index.flatten().tolist() == [0, -1, -1, 0]
    _, index, *_ = agree(dense_cosine_max, query, support, mask, windows=((1, 1), (1, 1)))
    assert index[0, 0, 1].flatten().tolist() == [0, -1, -1, 0]
    _, index, *_ = agree(dense_cosine_max, query, support, mask, masked="exclude")
    assert index.flatten().tolist() == [0] * 4


@max_options
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_zero_vectors(options, eps):
    """Cosine 0 and gradient 0; a zero kept vector is an ordinary candidate."""
    query, support = randn(3, 6, 4, 5), randn(3, 6, 3, 4)
    support[0] = -support[0].abs()
    query[0] = query[0].abs()
    query[0, :, 2, 3] = query[1] = support[0, :, 1, 2] = 0
    *_, grad_query, grad_support = agree(dense_cosine_max, query, support, eps=eps, **options)
    assert not grad_query[0, :, 2, 3].any() and not grad_query[1].any() and not grad_support[0, :, 1, 2].any()
    agree(dense_cosine_match, query, support, eps=eps)


@max_options
def test_all_zero_mask(options):
    query, support, mask = randn(2, 5, 5, 6), randn(2, 5, 7, 8), foreground(2, 1, 20, 20)[:, 0]
    mask[1] = 0
    support[1, :, 1] = math.inf  # nothing to compare with
    query[1, 0, 0, 0] = math.nan
    results = evaluated("triton", dense_cosine_max, (query, support, mask), options)
    matches = evaluated("triton", dense_cosine_match, (query, support, mask), {})
    for scores, index in (results[:2], matches[:2], matches[2:4]):
        assert not scores[1].any() and (index[1] == -1).all() and scores[0].any()
    assert not results[-1][1].any() and not matches[-1][1].any()


@pytest.mark.parametrize(
    "memory_format, bad",
    [(torch.contiguous_format, math.nan), (torch.channels_last, math.inf), (torch.contiguous_format, -math.inf)],
    ids=["nchw-nan", "nhwc-inf", "nchw-minus-inf"],
)
def test_nan_outside_the_mask_does_not_leak(memory_format, bad):
    query, support, mask = randn(2, 20, 5, 4), randn(2, 20, 6, 7), foreground(2, 1, 6, 7)[:, 0]
    for function, options in ((dense_cosine_max, {"windows": ((1, 1), *DPCN)}), (dense_cosine_match, {})):
        results = []
        for fill in (bad, 0.0):
            poisoned = torch.where((mask == 0)[:, None], fill, support).contiguous(memory_format=memory_format)
            tensors = query.contiguous(memory_format=memory_format), poisoned, mask
            results.append(evaluated("triton", function, tensors, options))
        for got, wanted in zip(*results, strict=True):
            assert wanted.isfinite().all() and wanted.any()
            assert torch.equal(got, wanted)


@max_options
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_nan_is_decided_from_the_norms(small_tiles, options, bad):
    """Vectors of either side that are not finite, or whose norms are not: scores, indices, and nothing else changes."""
    query, support, mask = randn(1, 20, 5, 4), randn(1, 2, 20, 6, 7), foreground(1, 2, 6, 7)
    mask[:, :, 2, 5] = 1
    for poison_support, function in itertools.product((False, True), (dense_cosine_max, dense_cosine_match)):
        q, s = query.clone(), support.clone()
        if poison_support:
            s[0, 1, 3, 2, 5] = s[0, 1, 0, 5, 6] = bad
        else:
            q[0, 7, 2, 1] = bad
        chosen = options if function is dense_cosine_max else {}
        ours, wanted = (scores_of(backend, function, (q, s, mask), chosen) for backend in ("triton", "reference"))
        assert any(w.isnan().any() for w in wanted) and any(w.isfinite().any() for w in wanted)
        for got, like in zip(ours, wanted, strict=True):
            torch.testing.assert_close(got, like, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("windows", [((1, 1),), DPCN], ids=["pixels", "windows"])
def test_everything_chooses_one_pixel(small_tiles, windows):
    """A list as long as the query."""
    query, support, mask = randn(2, 9, 7, 8), randn(2, 9, 4, 5), torch.zeros(2, 4, 5)
    mask[:, 2, 3] = 1
    _, index, *_ = agree(dense_cosine_max, query, support, mask, windows=windows, masked="exclude")
    assert (index == 13).all()
    agree(dense_cosine_match, query, support, mask)


@pytest.mark.parametrize("batch, shots", [(0, 2), (2, 0)])
def test_empties(batch, shots):
    query, support = randn(batch, 3, 4, 5), randn(batch, shots, 3, 2, 3)
    for function, options in ((dense_cosine_max, {"windows": DPCN}), (dense_cosine_max, {}), (dense_cosine_match, {})):
        *results, grad_query, grad_support = evaluated("triton", function, (query, support), options)
        assert all(r.numel() == 0 and r.shape[:2] == (batch, shots) for r in results)
        assert grad_query.shape == query.shape and not grad_query.any() and grad_support.shape == support.shape


def test_no_work_for_unwanted_gradients(monkeypatch):
    """Each alone has the bits it has beside the other, and the other's kernels do not run."""
    query, support = randn(1, 9, 5, 4), randn(1, 9, 4, 5)
    both = evaluated("triton", dense_cosine_max, (query, support), {})[-2:]
    weights = torch.linspace(-1, 1, 20).view(1, 1, 1, 5, 4)
    for wanted, unused in ((0, "_grad_listed"), (1, "grad_query_kernel")):
        with monkeypatch.context() as patched:
            patched.setattr(triton_kernels, unused, None)
            leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate((query, support))]
            with fss_kernels.use_backend("triton"):
                scores, _ = dense_cosine_max(*leaves)
                (grad,) = torch.autograd.grad((scores * weights).sum(), leaves[wanted])
        assert torch.equal(grad, both[wanted])


def test_views_are_read_in_place():
    """Slices of channels and of samples keep evenly spaced pixels; those of rows and columns do not."""
    for x in (randn(4, 12, 5, 6), randn(4, 5, 6, 12).permute(0, 3, 1, 2)):
        view = x[::2, 2:9]
        assert triton_kernels._even(view).data is view
        assert triton_kernels._even(x[..., 1:4]).data.data_ptr() != x[..., 1:4].data_ptr()


def test_strides_past_2_31(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # of 8 GB of address space
    large = 2**31 + 64
    features = []
    for grid in ((4, 3), (3, 5)):
        x = torch.empty(2 * large + 64, dtype=torch.float16).as_strided([1, 3, *grid], [1, large, grid[1], 1])
        features.append(x.copy_(randn(1, 3, *grid)))
    dense = [x.contiguous() for x in features]
    for function, options in (
        (dense_cosine_max, {}),
        (dense_cosine_max, {"windows": ((3, 3),)}),
        (dense_cosine_match, {}),
    ):
        results = []
        for tensors in (features, dense):
            leaves = [x.detach().requires_grad_() for x in tensors]
            with fss_kernels.use_backend("triton"):
                outputs = [r for r in function(*leaves, **options) if r.is_floating_point()]
                results.append([*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)])
        for got, wanted in zip(*results, strict=True):
            assert torch.equal(got, wanted)
