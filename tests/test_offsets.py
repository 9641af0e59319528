"""Offsets past 2^31 elements, by strides over untouched memory and by one real result of that size."""

import pytest
import torch

import fss_kernels

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
