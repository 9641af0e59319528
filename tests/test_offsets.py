"""Offsets past 2^31 elements, by strides over untouched memory and by real inputs and results of that size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPECS, ids

import fss_kernels
from fss_kernels import testing

LARGE = 2**31 + 64


STRIDES = {  # sizes and strides; the memory between the elements is never touched
    "batch": ([2, 3, 4, 3], [LARGE, 12, 3, 1]),
    "channels": ([2, 3, 4, 3], [12, LARGE, 3, 1]),
    "rows": ([2, 3, 4, 3], [9, 3, LARGE, 1]),
    "columns": ([2, 3, 4, 3], [12, 4, 1, LARGE]),
    "channels_last": ([1, 3, 1, 3], [1, 1, 1, LARGE]),
}


@pytest.mark.parametrize("sizes, strides", STRIDES.values(), ids=STRIDES)
def test_feature_strides_past_2_31(sizes, strides):
    """A handful of elements whose stride in one dimension does not fit 32 bits."""
    span = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
    storage = torch.empty(span, dtype=torch.bfloat16)
    x = storage.as_strided(sizes, strides)
    values = torch.randn(sizes).bfloat16()
    x.copy_(values)
    mask = torch.rand(sizes[0], 2, 4, 5)
    wanted = fss_kernels.masked_avg_pool(values, mask)
    assert torch.equal(fss_kernels.masked_avg_pool(x, mask), wanted)
    grad_mask = [
        torch.autograd.grad(fss_kernels.masked_avg_pool(f, m).sum(), m)[0]
        for f in (values, x)
        for m in [mask.clone().requires_grad_()]
    ]
    assert torch.equal(*grad_mask)


def test_mask_strides_past_2_31():
    sizes, strides = [2, 2, 6, 7], [3 * LARGE, LARGE, 7, 1]
    storage = torch.empty(4 * LARGE + 64, dtype=torch.uint8)
    mask = storage.as_strided(sizes, strides)
    values = torch.randint(0, 2, sizes, dtype=torch.uint8)
    mask.copy_(values)
    x = torch.randn(2, 3, 6, 7)
    assert torch.equal(fss_kernels.masked_avg_pool(x, mask), fss_kernels.masked_avg_pool(x, values))


def dimensions(sample):
    """Tensors and their dimensions of more than one element."""
    return [(name, d) for name, t in sample.tensors.items() for d, n in enumerate(t.shape) if n > 1]


def thorough(spec):
    """Of the samples without an empty tensor the one with the most dimensions, and of those the smallest."""
    samples = (s for s in spec.samples() if all(t.numel() for t in s.tensors.values()))
    return min(samples, key=lambda s: (-len(dimensions(s)), sum(t.numel() for t in s.tensors.values())))


FAR = [(spec, sample, *place) for spec in SPECS for sample in [thorough(spec)] for place in dimensions(sample)]


def far(values, dimension):
    """The same values, the last ones of a dimension past 2^31; the memory between is never touched."""
    rest = [n for i, n in enumerate(values.shape) if i != dimension]
    strides = list(torch.empty(rest, device="meta").stride())
    strides.insert(dimension, -(-LARGE // (values.shape[dimension] - 1)))
    span = sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) + 1
    return torch.empty(span, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize("spec, sample, tensor, dimension", FAR, ids=ids)
def test_strides_past_2_31_of_every_op(spec, sample, tensor, dimension):
    """Outputs and gradients are those of the same values close together."""
    near = spec.cast(sample, torch.bfloat16)
    distant = {**near, tensor: far(near[tensor], dimension)}
    wanted = testing.differentiable_names(spec, near)
    results = [testing.gradients(spec.function, t, sample.options, wanted) for t in (near, distant)]
    assert all(r.any() for r in results[0][0] + results[0][1])
    for here, there in zip(*results, strict=True):  # outputs, then gradients
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a, b)


def test_features_of_more_than_2_31_elements():
    """Read from memory that the system gives out as zeros: only the last channels and the last pixels take any."""
    height, width = 256, 256
    channels = 2**31 // (height * width) + 2
    x = torch.from_numpy(np.zeros(channels * height * width, np.int16)).view(torch.bfloat16)
    x = x.view(1, channels, height, width)
    generator = torch.Generator().manual_seed(0)
    x[0, -3:] = torch.randn(3, height, width, generator=generator)
    mask = torch.rand(1, 1, height, width, generator=generator)
    pooled = fss_kernels.masked_avg_pool(x, mask, eps=0.0)
    wanted = (x[0, -3:].double() * mask[0].double()).sum((1, 2)) / mask.double().sum()
    torch.testing.assert_close(pooled[0, 0, -3:].double(), wanted, rtol=8e-3, atol=1e-6)
    assert not pooled[0, 0, :-3].any()


@pytest.fixture
def much_memory():
    """For a result of 4 GB, twice: two tests may run at once."""
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    if int(memory["MemAvailable"].split()[0]) < 8 << 20:
        pytest.skip("no 8 GB of free memory")


@pytest.mark.slow
@pytest.mark.usefixtures("much_memory")
def test_correlation_of_more_than_2_31_elements():
    """The natural result of that size: the last query pixels with every support pixel."""
    side = 216
    assert side**4 > 2**31
    query, support = torch.randn(2, 1, 2, side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = fss_kernels.hypercorrelation(query, support, eps=0.0).flatten(3).flatten(1, 2)[0]
    units = [torch.nn.functional.normalize(t.double().flatten(2)[0], dim=0) for t in (query, support)]
    for pixel in (0, side**2 // 2, side**2 - 1):
        wanted = (units[0][:, pixel] @ units[1]).clamp(min=0)
        torch.testing.assert_close(out[pixel].double(), wanted, rtol=8e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_of_more_than_2_31_elements(channels_last):
    """The last plane of a 4 GB gradient holds the formula's value."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    height, width = 256, 256
    channels = 2**31 // (height * width) + 2
    storage = torch.empty(channels * height * width, dtype=torch.bfloat16)  # never read: no mask gradient
    x = storage.view(1, channels, height, width)
    if channels_last:
        x = storage.view(1, height, width, channels).permute(0, 3, 1, 2)
    mask = torch.rand(1, 1, height, width)
    grad = torch.full((1, 1, channels), 1.0, dtype=torch.bfloat16)
    grad[..., -1] = 3.0
    op = torch.ops.fss.masked_avg_pool_bwd.default
    area = mask.sum((2, 3))
    result, _ = op(grad, x, mask, mask, area, 0.0, "bilinear", True, True, False)
    assert result.is_contiguous(memory_format=memory_format)
    for channel, factor in ((0, 1.0), (channels // 2, 1.0), (channels - 1, 3.0)):
        torch.testing.assert_close(
            result[0, channel], (mask[0, 0] * factor / area.item()).bfloat16(), rtol=8e-3, atol=0
        )
