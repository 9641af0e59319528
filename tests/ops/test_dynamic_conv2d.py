"""dynamic_conv2d against independent definitions: loops, grouped and per-sample convolutions, numbers done by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fss_kernels
from fss_kernels import dynamic_conv2d, testing

BACKENDS = ["reference", "cpp"]
MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]
DPCN = ((5, 1), (1, 5), (5, 5))
SIZES = [(h, w) for h in (1, 3, 5, 7, 9) for w in (1, 3, 5, 7, 9)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fss_kernels.use_backend(request.param):
        yield request.param


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def by_loops(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """One branch, one output and one tap at a time."""
    batch, channels, height, width = x.shape
    kh, kw = kernel.shape[2:]
    out = np.zeros_like(x)
    for b, c, y, z, i, j in itertools.product(*(range(n) for n in (batch, channels, height, width, kh, kw))):
        row, column = y + i - kh // 2, z + j - kw // 2
        if 0 <= row < height and 0 <= column < width:
            out[b, c, y, z] += kernel[b, c, i, j] * x[b, c, row, column]
    return out


def grouped(x: torch.Tensor, kernels: list[torch.Tensor], merge: bool = False) -> torch.Tensor:
    """The batch folded into the groups of F.conv2d."""
    batch, channels, height, width = x.shape
    outputs = [
        F.conv2d(
            x.reshape(1, batch * channels, height, width),
            k.reshape(batch * channels, 1, *k.shape[2:]),
            padding=(k.shape[2] // 2, k.shape[3] // 2),
            groups=batch * channels,
        ).view(x.shape)
        for k in kernels
    ]
    return sum(outputs) if merge else torch.cat(outputs, 1)


def per_sample(x: torch.Tensor, kernels: list[torch.Tensor]) -> torch.Tensor:
    """One depthwise convolution a sample and branch."""
    samples = []
    for b in range(x.shape[0]):
        branches = [
            F.conv2d(x[b : b + 1], k[b, :, None], padding=(k.shape[2] // 2, k.shape[3] // 2), groups=x.shape[1])
            for k in kernels
        ]
        samples.append(torch.cat(branches, 1))
    return torch.cat(samples)


def results(function, x, kernels, *args, **options):
    """Output and every gradient."""
    leaves = [t.detach().requires_grad_() for t in (x, *kernels)]
    out = function(leaves[0], leaves[1:], *args, **options)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, seed)]


def assert_close(ours, wanted, tolerance=1e-12):
    for o, w in zip(ours, wanted, strict=True):
        assert o.shape == w.shape
        assert (o - w).abs().max() <= tolerance * w.abs().max().clamp(min=1)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_loops(size, memory_format, backend):
    for shape in ((2, 3, 6, 7), (1, 2, 4, 19), (1, 9, 2, 3)):
        x, kernel = randn(*shape).contiguous(memory_format=memory_format), randn(*shape[:2], *size)
        out = dynamic_conv2d(x, kernel)
        np.testing.assert_allclose(out.numpy(), by_loops(x.numpy(), kernel.numpy()), rtol=1e-12, atol=1e-12)
        assert out.is_contiguous(memory_format=memory_format)


def test_by_hand(backend):
    """Correlation, not convolution; zeros outside; branches one after the other."""
    x = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    right, below = torch.tensor([[[[0.0, 0.0, 1.0]]]]), torch.tensor([[[[0.0], [0.0], [1.0]]]])
    out = dynamic_conv2d(x, [right, below])
    assert out.tolist() == [[[[2, 3, 0], [5, 6, 0]], [[4, 5, 6], [0, 0, 0]]]]
    assert dynamic_conv2d(x, [right, below], merge=True).tolist() == [[[[6, 8, 6], [5, 6, 0]]]]


def test_every_sample_has_its_own_kernels(backend):
    x = torch.ones(2, 1, 1, 3)
    kernels = torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    assert dynamic_conv2d(x, kernels).flatten().tolist() == [1, 1, 1, 10, 10, 10]


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("merge", [False, True], ids=["concatenated", "merged"])
@pytest.mark.parametrize(
    "sizes",
    [
        DPCN,
        ((5, 5),),
        ((5, 5), (1, 5), (5, 1)),
        ((1, 5), (5, 5), (5, 1)),
        ((7, 3), (1, 9), (3, 3), (1, 1)),
        ((5, 1), (1, 5)),
    ],
    ids=str,
)
def test_grouped_convolution(sizes, merge, memory_format, backend):
    """Outputs and gradients, on grids with tails in every direction."""
    for shape in ((2, 3, 13, 21), (1, 17, 9, 33), (2, 2, 3, 3), (1, 3, 1, 40), (1, 3, 40, 1), (3, 2, 60, 60)):
        x = randn(*shape).contiguous(memory_format=memory_format)
        kernels = [randn(*shape[:2], *s) for s in sizes]
        assert_close(results(dynamic_conv2d, x, kernels, merge=merge), results(grouped, x, kernels, merge))


def test_per_sample_loop(backend):
    x, kernels = randn(3, 4, 11, 10), [randn(3, 4, *s) for s in DPCN]
    assert_close(results(dynamic_conv2d, x, kernels), results(per_sample, x, kernels))


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(1, 2, 3000, 5), (1, 2, 3, 5000), (1, 1, 260, 270)], ids=str)
def test_planes_of_several_strips(shape, memory_format, backend):
    """Strips meet without a seam: halos of 4 rows, long columns, rows wider than a strip."""
    x = randn(*shape).contiguous(memory_format=memory_format)
    for sizes in (DPCN, ((9, 3), (3, 9))):
        kernels = [randn(*shape[:2], *s) for s in sizes]
        assert_close(results(dynamic_conv2d, x, kernels), results(grouped, x, kernels), 1e-11)


def test_strides_of_kernels(backend):
    """channels_last x with contiguous kernels, transposed, expanded and channels_last kernels."""
    x = randn(2, 6, 9, 8)
    full = randn(2, 6, 5, 5)
    variants = {
        "channels_last": full.contiguous(memory_format=torch.channels_last),
        "transposed": full.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": torch.cat([full, full], 3)[..., :5],
    }
    for memory_format in MEMORY_FORMATS:
        wanted = results(grouped, x, [full])
        for kernel in variants.values():
            assert_close(results(dynamic_conv2d, x.contiguous(memory_format=memory_format), [kernel]), wanted)
        one = full[:1, :1].expand(full.shape)
        assert_close(results(dynamic_conv2d, x, [one]), results(grouped, x, [one]))


def test_gradient_in_another_memory_format(backend):
    x, kernels = randn(2, 6, 9, 8), [randn(2, 6, *s) for s in DPCN]
    seed = randn(2, 18, 9, 8)
    grads = []
    for memory_format, seed_format in itertools.product(MEMORY_FORMATS, repeat=2):
        leaves = [t.detach().requires_grad_() for t in (x.contiguous(memory_format=memory_format), *kernels)]
        out = dynamic_conv2d(leaves[0], leaves[1:])
        grads.append(torch.autograd.grad(out, leaves, seed.contiguous(memory_format=seed_format)))
    for g in grads[1:]:
        assert_close(g, grads[0])
    leaves = [t.detach().requires_grad_() for t in (x, *kernels)]
    summed = torch.autograd.grad(dynamic_conv2d(leaves[0], leaves[1:]).sum(), leaves)  # an expanded gradient
    assert_close(summed, torch.autograd.grad(grouped(leaves[0], leaves[1:]).sum(), leaves))


def test_a_single_kernel_and_a_sequence_of_one_are_the_same(backend):
    x, kernel = randn(2, 3, 6, 7), randn(2, 3, 3, 5)
    assert torch.equal(dynamic_conv2d(x, kernel), dynamic_conv2d(x, (kernel,)))
    assert torch.equal(dynamic_conv2d(x, kernel, merge=True), dynamic_conv2d(x, [kernel]))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 3), (0, 2), (1, 3)], ids=str)
def test_only_some_gradients(wanted, merge, backend):
    """Inputs that need no gradient do not change those of the others."""
    tensors = [randn(2, 3, 13, 12), *(randn(2, 3, *s) for s in DPCN)]
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    out = dynamic_conv2d(leaves[0], leaves[1:], merge=merge)
    seed = randn(*out.shape)
    grads = torch.autograd.grad(out, [leaves[i] for i in wanted], seed)
    everything = [t.detach().requires_grad_() for t in tensors]
    wanted_grads = torch.autograd.grad(grouped(everything[0], everything[1:], merge), everything, seed)
    assert_close(grads, [wanted_grads[i] for i in wanted])


def test_nan_stays_in_its_window(backend):
    """In the outputs, in the gradient to x, and in the taps whose sums do not hold it."""
    for memory_format, width in itertools.product(MEMORY_FORMATS, (7, 16, 19, 33)):
        x, kernel = randn(1, 2, 9, width), randn(1, 2, 5, 5)
        x[0, 0, 4, width - 1] = math.nan
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        kernel.requires_grad_()
        out = dynamic_conv2d(x, kernel)
        inside = torch.zeros(1, 2, 9, width, dtype=torch.bool)
        inside[0, 0, 2:7, width - 3 :] = True
        assert torch.equal(out.isnan(), inside)
        grad_x, grad_kernel = torch.autograd.grad(out, [x, kernel], torch.ones_like(out))
        assert not grad_x.isnan().any()
        meets = torch.zeros(1, 2, 5, 5, dtype=torch.bool)
        meets[0, 0, :, 2:] = True  # a tap to the left of the middle never reads the last column
        assert torch.equal(grad_kernel.isnan(), meets)


def test_merged_taps_that_no_kernel_covers_do_not_read(backend):
    x = randn(1, 1, 5, 5)
    x[0, 0, 0, 0] = math.nan
    out = dynamic_conv2d(x, [torch.ones(1, 1, 5, 1).double(), torch.ones(1, 1, 1, 5).double()], merge=True)
    inside = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    inside[0, 0, :3, 0] = inside[0, 0, 0, :3] = True
    assert torch.equal(out.isnan(), inside)


def test_autocast_promotes_to_the_widest(backend):
    x, kernels = randn(2, 3, 6, 5, dtype=torch.bfloat16), [randn(2, 3, 3, 3, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = dynamic_conv2d(x.requires_grad_(), kernels)
    assert out.dtype == torch.float32 and torch.equal(out, dynamic_conv2d(x.float(), kernels))
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_merged_half_precision_adds_kernels_in_float32(backend):
    """1 + 2^-9 has no bfloat16: adding rounded kernels would lose the small one."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16) * 256
    kernels = [torch.full((1, 1, 1, 1), v, dtype=torch.bfloat16) for v in (1.0, 2.0**-9, -1.0)]
    assert dynamic_conv2d(x, kernels, merge=True).item() == 0.5


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("merge", [False, True], ids=["concatenated", "merged"])
def test_10000_repeats_give_the_same_bits(merge, memory_format):
    """Every gradient, several tiles and tails, two threads."""
    threads = torch.get_num_threads()
    x = randn(2, 19, 23, 37, dtype=torch.float32).contiguous(memory_format=memory_format)
    kernels = [randn(2, 19, *s, dtype=torch.float32) for s in DPCN]
    out, taps = torch.ops.fss.dynamic_conv2d_fwd(x, kernels, merge)
    seed = torch.randn_like(out)
    try:
        torch.set_num_threads(2)
        first = None
        for _ in range(2500):
            grad_x, grad_kernels = torch.ops.fss.dynamic_conv2d_bwd(
                seed, x, kernels, taps, merge, True, [True, True, True]
            )
            grads = [grad_x, *grad_kernels]
            first = first or grads
            assert all(torch.equal(a, b) for a, b in zip(grads, first, strict=True))
    finally:
        torch.set_num_threads(threads)


LARGE = 2**31 + 64


@pytest.mark.parametrize(
    "sizes, strides",
    [([2, 2, 4, 3], [2 * LARGE, LARGE, 3, 1]), ([2, 3, 1, 2], [2 * LARGE, 1, 2 * LARGE, LARGE])],
    ids=["planes", "pixels"],
)
def test_strides_past_2_31(sizes, strides):
    """A handful of elements whose strides do not fit 32 bits; the memory between them is never touched."""
    span = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
    x = torch.empty(span, dtype=torch.bfloat16).as_strided(sizes, strides)
    values = randn(*sizes, dtype=torch.bfloat16)
    x.copy_(values)
    kernels = [randn(*sizes[:2], *s, dtype=torch.bfloat16) for s in DPCN]
    for ours, wanted in zip(*(results(dynamic_conv2d, v, kernels) for v in (x, values)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_are_not_kept_where_no_gradient_reads_them(layout):
    """The gradient to the kernels reads x, that to x the kernels: what is not read may be overwritten."""
    x = testing.LAYOUTS[layout](randn(2, 3, 8, 9)).requires_grad_()
    kernels = [randn(2, 3, *s) for s in DPCN]
    features = x * 2
    out = dynamic_conv2d(features, kernels)
    with torch.no_grad():
        features.zero_()
    seed = randn(*out.shape)
    wanted = torch.autograd.grad(grouped(x * 2, kernels), x, seed)
    assert_close(torch.autograd.grad(out, x, seed), wanted)
