"""Samples, costs, known-bad inputs and benchmark sizes of dynamic_conv2d."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels.ops.dynamic_conv2d import dynamic_conv2d, reference
from fss_kernels.ops.dynamic_conv2d.op import op
from fss_kernels.testing import BadInput, Cost, Sample, Spec

DPCN = ((5, 1), (1, 5), (5, 5))
_KERNELS = ("kernel0", "kernel1", "kernel2", "kernel3")


def _function(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    """The op with every kernel as an argument of its own."""
    return dynamic_conv2d(x, kernels, merge=merge)


def _arguments(x: Tensor, *kernels: Tensor, merge: bool = False) -> tuple[Any, ...]:
    return x, list(kernels), merge


def _reference(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    return reference.dynamic_conv2d_reference(x, kernels, merge)


def _plain(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    """The batch folded into the groups of a convolution in float64. In other dtypes PyTorch would compile that anew for
    every shape, for up to seconds: there, windows unfolded and weighted."""
    outputs = []
    for k in kernels:
        kh, kw = k.shape[2:]
        if x.dtype == torch.float64:
            groups = x.shape[0] * x.shape[1]
            # turned round, so that it adds in another order than the reference and their errors can be told apart
            turned = x.reshape(1, groups, *x.shape[2:]).flip(2, 3)
            weight = k.reshape(groups, 1, kh, kw).flip(2, 3)
            out = F.conv2d(turned, weight, padding=(kh // 2, kw // 2), groups=groups)
            outputs.append(out.flip(2, 3).view(x.shape))
            continue
        windows = F.unfold(x, (kh, kw), padding=(kh // 2, kw // 2)).view(*x.shape[:2], kh * kw, -1)
        outputs.append(torch.einsum("bctn,bct->bcn", windows, k.flatten(2)).view(x.shape))
    return torch.stack(outputs).sum(0) if merge else torch.cat(outputs, 1)


def _sample(
    id: str,
    shape: tuple[int, int, int, int],
    sizes: tuple[tuple[int, int], ...] = DPCN,
    large: bool = False,
    merge: bool = False,
) -> Sample:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kernels = {name: randn(*shape[:2], *size) for name, size in zip(_KERNELS, sizes, strict=False)}
    return Sample(id, {"x": randn(*shape) + 0.5, **kernels}, {"merge": True} if merge else {}, large=large)


def _samples() -> Iterator[Sample]:
    yield _sample("three-branches", (2, 6, 13, 11))
    yield _sample("one-kernel", (2, 7, 9, 10), ((3, 3),))
    yield _sample("five", (3, 4, 12, 9), ((5, 5),))
    yield _sample("merged", (2, 3, 11, 13), merge=True)
    yield _sample("merged-cross", (2, 3, 9, 8), ((5, 1), (1, 3)), merge=True)
    yield _sample("other-order", (2, 3, 10, 19), ((5, 5), (1, 5), (5, 1)))
    yield _sample("odd-sizes", (2, 2, 8, 9), ((9, 1), (1, 7), (3, 9), (1, 1)))
    yield _sample("row", (2, 6, 1, 21))
    yield _sample("column", (2, 6, 21, 1))
    yield _sample("one-pixel", (2, 5, 1, 1), ((5, 5), (3, 1)))
    yield _sample("smaller-than-kernel", (2, 5, 3, 2), ((9, 9), (5, 5)))
    yield _sample("one-channel", (2, 1, 9, 8), ((3, 5), (5, 1)))
    yield _sample("many-channels", (1, 70, 6, 7))
    yield _sample("many-pixels", (2, 3, 40, 37))
    yield _sample("many-pixels-merged", (2, 3, 37, 53), merge=True)
    yield _sample("many-rows", (1, 2, 150, 130))
    yield _sample("wide", (1, 2, 6, 300))
    # more than 8 MB of outputs in half precision, planes that are not whole cache lines
    yield _sample("streamed", (3, 44, 127, 129), ((3, 1), (1, 3)), large=True)


def _bad_inputs() -> Iterator[BadInput]:
    x, k = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 5, 1)
    dtypes = "float32, float64, float16, bfloat16"

    def bad(id: str, error: type[Exception], message: str, *args: Any, **options: Any) -> BadInput:
        return BadInput(id, args, options, error, f"dynamic_conv2d: {message}")

    sizes = "must have odd sizes 1 ... 9, got"
    yield bad("x-none", TypeError, "x must be a torch.Tensor, got NoneType", None, k)
    yield bad("x-int", TypeError, f"x must have dtype {dtypes}, got int64", x.long(), k)
    yield bad("x-rank", ValueError, "x must have shape (B, C, H, W), got (3, 4, 4)", x[0], k)
    yield bad("no-channels", ValueError, "x has no channels or pixels, got shape (2, 0, 4, 4)", x[:, :0], k[:, :0])
    yield bad("no-pixels", ValueError, "x has no channels or pixels, got shape (2, 3, 0, 4)", x[:, :, :0], k)
    yield bad("kernels-none", TypeError, "kernels must be a torch.Tensor or a sequence of them, got NoneType", x, None)
    yield bad("no-kernels", ValueError, "kernels must hold at least one kernel, got none", x, [])
    yield bad("kernel-list", TypeError, "kernels[1] must be a torch.Tensor, got list", x, [k, [1.0]])
    yield bad("kernel-int", TypeError, f"kernels must have dtype {dtypes}, got int32", x, k.int())
    yield bad("kernel-rank", ValueError, "kernels must have shape (B, C, kh, kw), got (3, 5, 1)", x, k[0])
    yield bad("batch", ValueError, "kernels must have the batch size of x, 2, got 1", x, k[:1])
    yield bad("channels", ValueError, "kernels[1] must have the channels of x, 3, got 2", x, [k, k[:, :2]])
    yield bad("device", ValueError, "kernels must be on the device of x, cpu, got meta", x, k.to("meta"))
    yield bad("even", ValueError, f"kernels {sizes} 4 x 1", x, k[:, :, :4])
    yield bad("empty-kernel", ValueError, f"kernels {sizes} 0 x 1", x, k[:, :, :0])
    yield bad("too-large", ValueError, f"kernels[1] {sizes} 1 x 11", x, [k, torch.ones(2, 3, 1, 11)])
    yield bad(
        "mixed-dtypes",
        TypeError,
        "kernels[1] must have the dtype of x, float32, got bfloat16; pass kernels[1].to(torch.float32)",
        x,
        [k, k.bfloat16()],
    )
    yield bad("merge", TypeError, "merge must be a bool, got int", x, k, merge=1)


def _benchmark_sample(batch: int, channels: int, grid: int, merge: bool = False, channels_last: bool = False) -> Sample:
    """Random features and DPCN's three kernels a sample."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, channels, grid, grid, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    kernels = {
        name: torch.randn(batch, channels, *size, generator=generator) * 0.2
        for name, size in zip(_KERNELS, DPCN, strict=False)
    }
    return Sample("benchmark", {"x": x, **kernels}, {"merge": True} if merge else {})


def _cost(sample: Sample, dtype: torch.dtype, mode: str) -> Cost:
    """x and the kernels read and the outputs written once; backwards the same for x, the gradient and both results."""
    x, *kernels = sample.tensors.values()
    sizes = [(k.shape[2], k.shape[3]) for k in kernels]
    outputs = reference.tap_positions(sizes, bool(sample.options.get("merge")))
    size = torch.empty(0, dtype=dtype).element_size()
    written = x.numel() * len(outputs) * size
    weights = sum(k.numel() for k in kernels) * size
    flops = 2 * x.numel() * sum(len(positions) for positions in outputs)
    values = x.numel() * size
    forward = values + weights + written
    if mode == "forward":
        return Cost(forward, flops, written)
    if mode == "forward+kernel gradients":
        return Cost(forward + values + written + weights, 2 * flops, written + weights)
    return Cost(forward + 2 * values + written + 2 * weights, 3 * flops, written + values + weights)


def _scratch_bytes(sample: Sample, dtype: torch.dtype) -> int:
    """The kernels in the accumulation dtype."""
    x, *kernels = sample.tensors.values()
    sizes = [(k.shape[2], k.shape[3]) for k in kernels]
    outputs = reference.tap_positions(sizes, bool(sample.options.get("merge")))
    taps = sum(len(positions) for positions in outputs)
    return x.shape[0] * x.shape[1] * taps * (8 if dtype == torch.float64 else 4)


SPEC = Spec(
    name="dynamic_conv2d",
    signature="(x, kernels, *, merge=False)",
    function=_function,
    public=dynamic_conv2d,
    op=op,
    reference=_reference,
    plain=_plain,
    arguments=_arguments,
    features=("x", *_KERNELS),
    differentiable=("x", *_KERNELS),
    samples=_samples,
    bad_inputs=_bad_inputs,
    sizes={
        "8x512x60x60": {
            "batch": 8,
            "channels": 512,
            "grid": 60,
            "modes": ("forward", "forward+backward", "forward+kernel gradients"),
        },
        "8x512x60x60-merged": {"batch": 8, "channels": 512, "grid": 60, "merge": True},
        "8x512x60x60-nhwc": {"batch": 8, "channels": 512, "grid": 60, "channels_last": True},
        "1x256x60x60": {"batch": 1, "channels": 256, "grid": 60},
    },
    base={"batch": 4, "channels": 256, "grid": 60},
    axes={"grid": (30, 45, 60, 90, 128), "channels": (128, 256, 512, 1024), "batch": (1, 2, 4, 8)},
    units={"grid": "pixels a side", "batch": "samples"},
    computes="depthwise convolution in which every sample has its own kernels; several branches in one call",
    replaces="DPCN's dynamic convolution, grouped `F.conv2d` over batch x channels",
    benchmark_sample=_benchmark_sample,
    wanted={"forward+kernel gradients": _KERNELS},
    static=dict.fromkeys(_KERNELS, (2, 3)),
    cost=_cost,
    scratch_bytes=_scratch_bytes,
)
