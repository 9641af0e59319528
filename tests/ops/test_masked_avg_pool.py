"""masked_avg_pool against independent definitions: loops, F.interpolate, the field's formulas, numbers done by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fss_kernels
from fss_kernels import masked_avg_pool, testing
from fss_kernels.ops.masked_avg_pool import reference

BACKENDS = ["reference", "cpp"]
MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]
RESIZES = [("bilinear", True), ("bilinear", False), ("nearest", True), ("adjoint", True), ("adjoint", False)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fss_kernels.use_backend(request.param):
        yield request.param


def weights_by_loops(source: int, target: int, resize: str, align_corners: bool) -> np.ndarray:
    """Interpolation weights, one output at a time, straight from the definition."""
    weights = np.zeros((target, source))
    for i in range(target):
        if resize == "nearest":
            weights[i, math.floor(i * source / target + 1e-9)] = 1
            continue
        if align_corners:
            position = i * (source - 1) / (target - 1) if target > 1 else 0.0
        else:
            position = max((i + 0.5) * source / target - 0.5, 0.0)
        low = min(math.floor(position + 1e-12), source - 1)
        fraction = max(position - low, 0.0)
        weights[i, low] += 1 - fraction
        weights[i, min(low + 1, source - 1)] += fraction
    return weights


def pool_by_loops(x: np.ndarray, mask: np.ndarray, eps: float, resize: str, align_corners: bool) -> np.ndarray:
    batch, channels, height, width = x.shape
    _, masks, h, w = mask.shape
    out = np.zeros((batch, masks, channels))
    for b, m in itertools.product(range(batch), range(masks)):
        resized = np.zeros((height, width))
        if resize == "adjoint":
            rows, columns = (
                weights_by_loops(height, h, "b", align_corners),
                weights_by_loops(width, w, "b", align_corners),
            )
            for i, j, y, z in itertools.product(range(height), range(width), range(h), range(w)):
                resized[i, j] += rows[y, i] * columns[z, j] * mask[b, m, y, z]
        else:
            rows, columns = (
                weights_by_loops(h, height, resize, align_corners),
                weights_by_loops(w, width, resize, align_corners),
            )
            for i, j, y, z in itertools.product(range(height), range(width), range(h), range(w)):
                resized[i, j] += rows[i, y] * columns[j, z] * mask[b, m, y, z]
        for c in range(channels):
            out[b, m, c] = (resized * x[b, c]).sum() / (resized.sum() + eps)
    return out


@pytest.mark.parametrize("mask_size", [(9, 7), (3, 2), (5, 6), (1, 1), (13, 4)])
@pytest.mark.parametrize("resize, align_corners", RESIZES)
def test_equals_loops(backend, resize, align_corners, mask_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 2, *mask_size, generator=generator, dtype=torch.float64)
    out = masked_avg_pool(x, mask, eps=0.01, resize=resize, align_corners=align_corners)
    wanted = pool_by_loops(x.numpy(), mask.numpy(), 0.01, resize, align_corners)
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("source", [1, 2, 3, 8, 29, 57, 473])
@pytest.mark.parametrize("target", [1, 2, 3, 7, 8, 30, 60, 100])
def test_resize_equals_interpolate(source, target):
    mask = torch.rand(1, 1, source, 3, dtype=torch.float64)
    for align_corners in (True, False):
        ours = reference.resize_mask(mask, target, 3, "bilinear", align_corners)
        theirs = F.interpolate(mask, (target, 3), mode="bilinear", align_corners=align_corners)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-13)
    if (source * 1024) % target == 0 or target <= 8:  # elsewhere PyTorch's float scale may fall below an integer
        ours = reference.resize_mask(mask, target, 3, "nearest", True)
        assert torch.equal(ours, F.interpolate(mask, (target, 3), mode="nearest"))


def test_nearest_is_the_exact_floor():
    """Row i of the grid takes mask row floor(i*h/H); in float arithmetic 29 * (1000/1000) style products slip below."""
    for h, height in ((1000, 7), (473, 60), (7, 1000), (3, 49)):
        mask = torch.arange(h, dtype=torch.float64).view(1, 1, h, 1)
        rows = reference.resize_mask(mask, height, 1, "nearest", True)[0, 0, :, 0]
        assert rows.tolist() == [i * h // height for i in range(height)]


def test_473_to_60_samples_every_eighth_pixel(backend):
    mask = torch.rand(1, 1, 473, 473)
    x = torch.randn(1, 4, 60, 60)
    torch.testing.assert_close(
        masked_avg_pool(x, mask), masked_avg_pool(x, mask[:, :, ::8, ::8].contiguous()), rtol=0, atol=0
    )


@pytest.mark.parametrize("align_corners", [True, False])
def test_adjoint_equals_upsampled_features(backend, align_corners):
    """PANet: upsample the features to the mask, pool there."""
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    mask = (torch.rand(2, 2, 71, 66) > 0.4).double()
    up = F.interpolate(x, (71, 66), mode="bilinear", align_corners=align_corners)
    wanted = (up[:, None] * mask[:, :, None]).sum((3, 4)) / (mask.sum((2, 3))[..., None] + 1e-5)
    out = masked_avg_pool(x, mask, eps=1e-5, resize="adjoint", align_corners=align_corners)
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-13)
    _, _, area = torch.ops.fss.masked_avg_pool_fwd(x, mask, 1e-5, "adjoint", align_corners)
    torch.testing.assert_close(area, mask.sum((2, 3)), rtol=1e-13, atol=0)


def test_equals_pfenet_weighted_gap(backend):
    """PFENet writes the average as two full-window poolings."""
    x, mask = torch.randn(2, 6, 12, 10, dtype=torch.float64), torch.rand(2, 1, 45, 37, dtype=torch.float64)
    m = F.interpolate(mask, (12, 10), mode="bilinear", align_corners=True)
    area = F.avg_pool2d(m, (12, 10)) * 120 + 0.0005
    wanted = F.avg_pool2d(x * m, (12, 10)) * 120 / area
    torch.testing.assert_close(masked_avg_pool(x, mask)[:, 0], wanted[:, :, 0, 0], rtol=1e-11, atol=1e-13)


def test_by_hand(backend):
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]]])
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.5, 1.0]]]])
    out = masked_avg_pool(x, mask, eps=0.5)
    torch.testing.assert_close(out, torch.tensor([[[4 / 2.5, 40 / 2.5], [5.5 / 2, 55 / 2]]]))
    # the mask's gradient at output gradient 1: sum over c of (x - p) / (area + eps)
    mask.requires_grad_()
    masked_avg_pool(x, mask, eps=0.5)[:, 0].sum().backward()
    p = 44 / 2.5
    wanted = [[(11 - p) / 2.5, (22 - p) / 2.5], [(33 - p) / 2.5, (44 - p) / 2.5]]
    torch.testing.assert_close(mask.grad[0, 0], torch.tensor(wanted))
    assert not mask.grad[0, 1].any()


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_all_zero_mask(backend, eps, memory_format):
    x = torch.randn(2, 5, 6, 7).contiguous(memory_format=memory_format).requires_grad_()
    mask = torch.zeros(2, 1, 6, 7, requires_grad=True)
    out = masked_avg_pool(x, mask, eps=eps)
    assert not out.any()
    g = torch.randn_like(out)
    out.backward(g)
    assert not x.grad.any()
    wanted = torch.einsum("bmc,bchw->bmhw", g, x.detach()) / eps if eps else torch.zeros_like(mask)
    torch.testing.assert_close(mask.grad, wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
def test_nan_outside_the_mask_does_not_leak(backend, memory_format, dtype, bad):
    """Isolated and whole-row bad values, next to weighted pixels and far from them; two masks with different zeros."""
    x = torch.randn(2, 9, 20, 19).to(dtype)
    mask = torch.zeros(2, 2, 20, 19)
    mask[:, 0, 3:11, 4:9] = 1.0
    mask[:, 1, :, 10:] = torch.rand(20, 9) + 0.1
    poisoned = x.clone()
    unused = (mask == 0).all(1, keepdim=True).expand_as(x)
    poisoned[unused] = bad
    zeroed = torch.where(unused, 0, x)
    one_sided = poisoned.clone()
    one_sided[0, 2, 5, 5] = bad  # under mask 0 only
    format_ = {"memory_format": memory_format}
    clean = masked_avg_pool(zeroed.contiguous(**format_), mask)
    torch.testing.assert_close(masked_avg_pool(poisoned.contiguous(**format_), mask), clean)
    out = masked_avg_pool(one_sided.contiguous(**format_), mask)
    assert not out[0, 0, 2].isfinite()
    assert out.isfinite().sum() == out.numel() - 1
    torch.testing.assert_close(out[0, 1], clean[0, 1])

    grads = []
    for features in (poisoned, zeroed):
        leaves = features.contiguous(**format_).requires_grad_(), mask.clone().requires_grad_()
        masked_avg_pool(*leaves).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_mask_dtypes_agree(backend):
    x = torch.randn(2, 5, 13, 12)
    binary = torch.rand(2, 2, 29, 31) > 0.5
    wanted = masked_avg_pool(x, binary.float(), resize="adjoint")
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64):
        torch.testing.assert_close(masked_avg_pool(x, binary.to(dtype), resize="adjoint"), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(masked_avg_pool(x, binary), masked_avg_pool(x, binary.to(torch.uint8)))


def test_three_and_four_dimensional_masks_agree(backend):
    x, mask = torch.randn(2, 5, 8, 8), torch.rand(2, 20, 20)
    assert torch.equal(masked_avg_pool(x, mask), masked_avg_pool(x, mask[:, None])[:, 0])


def test_no_masks(backend):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    mask = torch.rand(2, 0, 4, 4, requires_grad=True)
    out = masked_avg_pool(x, mask)
    assert out.shape == (2, 0, 3)
    out.sum().backward()
    assert not x.grad.any() and mask.grad.shape == mask.shape


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
def test_float16_sums_do_not_overflow(backend, memory_format):
    x = torch.full((1, 3, 30, 30), 65504.0, dtype=torch.float16).contiguous(memory_format=memory_format)
    out = masked_avg_pool(x, torch.ones(1, 1, 30, 30), eps=0.0)
    assert out.dtype == torch.float16 and bool((out == 65504).all())


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_are_rounded_to_nearest_even(backend, dtype, memory_format):
    """With area 1 the gradient is g * w, exact in float32 and rounded once: ties, subnormals, overflow, Inf and NaN."""
    special = [1.0, 1.00390625, 1.01171875, 65504.0, 65520.0, 6e-8, 2.9e-8, 1e-7, -3.3e-5, 0.0, math.inf, math.nan]
    g = torch.cat([torch.tensor(special), torch.randn(1000, generator=torch.Generator().manual_seed(0))]).to(dtype)
    x = torch.zeros(1, g.numel(), 1, 2, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    mask = torch.tensor([0.375, 0.625]).view(1, 1, 1, 2)
    masked_avg_pool(x, mask, eps=0.0)[0, 0].backward(g)
    wanted = torch.stack([(g.float() * w).to(dtype) for w in (0.375, 0.625)], 1)
    torch.testing.assert_close(x.grad[0, :, 0], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("masks", [1, 2, 3, 8])
def test_extra_memory_is_the_resized_masks(masks):
    """Exact, from the allocator's own record."""
    spec = testing.specs()["masked_avg_pool"]
    x, mask = torch.randn(4, 64, 30, 30), torch.rand(4, masks, 111, 111)
    sample = testing.Sample("memory", {"features": x, "mask": mask})
    masked_avg_pool(x, mask)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = masked_avg_pool(x, mask)
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    assert peak - out.nbytes <= spec.scratch_bytes(sample, torch.float32) + 64 * 4 * masks
    assert peak - out.nbytes >= 4 * masks * 900 * 4


def test_readme_derivation_of_the_mask_gradient():
    """dL/dr = (t - sum(r t) / d) / d needs no pooled vector: it equals sum_c g_c (x_c - p_c) / d."""
    x, r = torch.randn(7, 30, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
    g, eps = torch.randn(7, dtype=torch.float64), 0.3
    d = r.sum() + eps
    p = (x * r).sum(1) / d
    t = g @ x
    torch.testing.assert_close((t - (r * t).sum() / d) / d, (g[:, None] * (x - p[:, None])).sum(0) / d)


@pytest.mark.parametrize("total, eps", [(0.0, 1e-50), (-5e-4, 5e-4)])
def test_vanishing_denominator(backend, total, eps):
    """What is 0 in float32 is 0 in every result, also where eps is not."""
    mask = torch.full((1, 1, 1, 1), total, requires_grad=True)
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    out = masked_avg_pool(x, mask, eps=eps)
    out.sum().backward()
    assert not out.any() and not x.grad.any() and not mask.grad.any()


def test_raw_backward_checks_its_arguments():
    x, mask = torch.randn(1, 3, 4, 4), torch.rand(1, 2, 4, 4)
    pooled, resized, area = torch.ops.fss.masked_avg_pool_fwd(x, mask, 0.1, "bilinear", True)
    rest = (0.1, "bilinear", True, True, True)
    for grad, r, a in (
        (pooled.double(), resized, area),
        (pooled[:, :1], resized, area),
        (pooled, resized[..., :2], area),
        (pooled, resized, area.double()),
        (torch.randn(1), resized, area),
    ):
        with pytest.raises(RuntimeError, match=r"masked_avg_pool: (grad|resized) must be"):
            torch.ops.fss_cpp.masked_avg_pool_bwd(grad, x, mask, r, a, *rest)
