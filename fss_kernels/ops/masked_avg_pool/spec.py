"""Samples, costs, known-bad inputs and benchmark sizes of masked_avg_pool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels.ops.masked_avg_pool import masked_avg_pool, reference
from fss_kernels.ops.masked_avg_pool.op import op
from fss_kernels.testing import A_FIFTH, BadInput, Cost, Sample, Spec, disc


def _arguments(
    features: Tensor, mask: Tensor, eps: float = 5e-4, resize: str = "bilinear", align_corners: bool = True
) -> tuple[Any, ...]:
    return features, mask if mask.ndim == 4 else mask.unsqueeze(1), eps, resize, align_corners


def _reference(features: Tensor, mask: Tensor, **options: Any) -> Tensor:
    pooled = reference.masked_avg_pool_reference(*_arguments(features, mask, **options))
    return pooled if mask.ndim == 4 else pooled.squeeze(1)


def _plain(features: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """PFENet's weighted average with F.interpolate; PANet's, on upsampled features, for ``"adjoint"``."""
    _, masks, eps, resize, align_corners = _arguments(features, mask, **options)
    masks = masks.to(features.dtype)
    if resize == "adjoint":
        features = F.interpolate(features, masks.shape[-2:], mode="bilinear", align_corners=align_corners)
    elif resize == "nearest":
        masks = F.interpolate(masks, features.shape[-2:], mode="nearest")
    else:
        masks = F.interpolate(masks, features.shape[-2:], mode="bilinear", align_corners=align_corners)
    area = masks.sum((2, 3))[..., None] + eps
    sums = (features[:, None] * masks[:, :, None]).sum((3, 4))
    pooled = sums / area.masked_fill(area == 0, 1)
    return pooled if mask.ndim == 4 else pooled.squeeze(1)


def _blob(batch: int, masks: int, h: int, w: int) -> Tensor:
    """Discs that move with the sample and the mask: a segmentation-like foreground of about 20 %."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    i = torch.arange(batch * masks).view(batch, masks, 1, 1)
    inside = (y - 0.3 * torch.sin(1.0 + i)) ** 2 + (x - 0.3 * torch.cos(2.0 * i)) ** 2 < 0.25
    return inside.double()


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def features(*shape: int) -> Tensor:  # half of it like activations after ReLU: a mean that is not 0
        return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5

    def sample(id: str, x: Tensor, mask: Tensor, large: bool = False, follow: bool = False, **options: Any) -> Sample:
        return Sample(id, {"features": x, "mask": mask}, options, ("mask",) if follow else (), large)

    yield sample("soft", features(2, 19, 13, 11), rand(2, 2, 29, 31))
    yield sample("473-to-30", features(1, 3, 30, 30), rand(1, 2, 473, 473))
    yield sample("step-8", features(2, 8, 8, 8), (rand(2, 1, 57, 57) > 0.6).double(), eps=1.0)
    yield sample("upsampled", features(2, 5, 11, 9), rand(2, 3, 4, 5))
    yield sample("same-grid", features(1, 33, 7, 9), rand(1, 5, 7, 9))
    yield sample("three-dims", features(3, 4, 6, 5), rand(3, 9, 10))
    yield sample("one-pixel-grid", features(2, 6, 1, 1), rand(2, 2, 5, 4), eps=0.5)
    yield sample("one-pixel-mask", features(2, 6, 5, 4), rand(2, 2, 1, 1), eps=0.5)
    yield sample("one-channel", features(2, 1, 9, 8), rand(2, 2, 17, 8))
    yield sample("many-rows", features(1, 300, 6, 7), rand(1, 3, 13, 13))
    yield sample("many-pixels", features(2, 9, 40, 37), rand(2, 2, 53, 41))
    yield sample("blob", features(2, 10, 40, 37), _blob(2, 1, 119, 131))
    yield sample("corners-off", features(2, 7, 13, 11), rand(2, 2, 29, 31), align_corners=False)
    yield sample("corners-off-up", features(2, 7, 13, 11), rand(2, 2, 5, 6), align_corners=False)
    yield sample("nearest", features(2, 7, 13, 11), rand(2, 2, 29, 31), resize="nearest")
    yield sample("nearest-up", features(2, 7, 13, 11), rand(2, 2, 5, 6), resize="nearest")
    yield sample("adjoint", features(2, 7, 9, 10), rand(2, 2, 33, 29), resize="adjoint", align_corners=False, eps=1e-5)
    yield sample("adjoint-corners", features(2, 7, 9, 10), rand(2, 2, 33, 29), resize="adjoint")
    yield sample("adjoint-down", features(1, 3, 9, 10), rand(1, 2, 4, 6), resize="adjoint", align_corners=False)
    yield sample("no-eps", features(2, 6, 9, 8), rand(2, 2, 17, 15), eps=0.0)
    yield sample("large-eps", features(2, 6, 9, 8), rand(2, 2, 17, 15), eps=25.0)
    half_empty = rand(2, 2, 17, 15)
    half_empty[0, 1] = 0
    yield sample("empty-mask", features(2, 6, 9, 8), half_empty, eps=0.5)
    yield sample("bool-mask", features(2, 6, 9, 8), rand(2, 2, 17, 15) > 0.5)
    yield sample("uint8-mask", features(2, 6, 9, 8), (rand(2, 2, 17, 15) * 4).to(torch.uint8), resize="adjoint")
    yield sample("same-dtype-mask", features(2, 6, 9, 8), rand(2, 2, 17, 15), follow=True)
    # more than 8 MB of gradient in half precision, planes that are not whole cache lines
    yield sample("streamed", features(3, 87, 127, 129), _blob(3, 2, 127, 129) * rand(3, 2, 127, 129), large=True)


def _bad_inputs() -> Iterator[BadInput]:
    x, mask = torch.ones(2, 3, 4, 4), torch.ones(2, 1, 8, 8)
    dtypes = "float32, float64, float16, bfloat16"

    def bad(id: str, error: type[Exception], message: str, *args: Any, **options: Any) -> BadInput:
        return BadInput(id, args or (x, mask), options, error, f"masked_avg_pool: {message}")

    yield bad("features-list", TypeError, "features must be a torch.Tensor, got list", [1.0], mask)
    yield bad("features-int", TypeError, f"features must have dtype {dtypes}, got int64", x.long(), mask)
    yield bad(
        "features-complex", TypeError, f"features must have dtype {dtypes}, got complex64", x.to(torch.complex64), mask
    )
    yield bad("features-rank", ValueError, "features must have shape (B, C, H, W), got (3, 4, 4)", x[0], mask)
    yield bad("mask-none", TypeError, "mask must be a torch.Tensor, got NoneType", x, None)
    yield bad("mask-int", TypeError, f"mask must have dtype {dtypes}, bool, uint8, got int64", x, mask.long())
    yield bad("mask-rank", ValueError, "mask must have shape (B, M, h, w) or (B, h, w), got (8, 8)", x, mask[0, 0])
    yield bad("batch", ValueError, "mask must have the batch size of features, 2, got 1", x, mask[:1])
    yield bad("device", ValueError, "mask must be on the device of features, cpu, got meta", x, mask.to("meta"))
    yield bad("no-channels", ValueError, "features has no channels or pixels, got shape (2, 0, 4, 4)", x[:, :0], mask)
    yield bad("no-pixels", ValueError, "features has no channels or pixels, got shape (2, 3, 4, 0)", x[..., :0], mask)
    yield bad("mask-no-pixels", ValueError, "mask has no pixels, got shape (2, 1, 0, 8)", x, mask[:, :, :0])
    yield bad("eps-negative", ValueError, "eps must be finite and >= 0, got -1.0", eps=-1.0)
    yield bad("eps-nan", ValueError, "eps must be finite and >= 0, got nan", eps=float("nan"))
    yield bad("eps-text", TypeError, "eps must be a number, got str", eps="1e-5")
    yield bad("resize", ValueError, "resize must be one of bilinear, nearest, adjoint, got 'bicubic'", resize="bicubic")
    yield bad("resize-none", TypeError, "resize must be a string, got NoneType", resize=None)
    yield bad("align-corners", TypeError, "align_corners must be a bool, got int", align_corners=1)


def _benchmark_sample(
    batch: int,
    channels: int,
    grid: int,
    image: int,
    masks: int = 2,
    resize: str = "bilinear",
    foreground: float = A_FIFTH,
) -> Sample:
    """Random features under a foreground disc of about 20 %, or of that share, and, with two masks, its background."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, channels, grid, grid, generator=generator)
    kept = disc(batch, image, foreground)[:, None]
    mask = kept if masks == 1 else torch.cat([kept, 1 - kept], 1)
    panet = {"resize": "adjoint", "align_corners": False, "eps": 1e-5}
    return Sample("benchmark", {"features": x, "mask": mask}, panet if resize == "adjoint" else {})


def _cost(sample: Sample, dtype: torch.dtype, mode: str) -> Cost:
    """Features under a mask read once, their gradient written once, the mask pixels that are used read once."""
    call: dict[str, Any] = {**sample.tensors, **sample.options}
    features, mask, _, resize, align_corners = _arguments(**call)
    resized = reference.resize_mask(mask.float(), features.shape[2], features.shape[3], resize, align_corners)
    weighted = int((resized != 0).any(1).sum()) * features.shape[1]
    used = mask[0, 0].numel() if resize == "adjoint" else min(mask[0, 0].numel(), resized[0, 0].numel())
    size = torch.empty(0, dtype=dtype).element_size()
    reads = weighted * size + mask.shape[0] * mask.shape[1] * used * mask.element_size()
    flops = 2 * mask.shape[1] * features.numel()
    if mode == "forward":
        return Cost(reads, flops)
    return Cost(reads + features.numel() * size, 2 * flops, features.numel() * size)


def _scratch_bytes(sample: Sample, dtype: torch.dtype) -> int:
    """The resized masks and their areas."""
    _, mask, *_ = _arguments(sample.tensors["features"], sample.tensors["mask"])
    grid = sample.tensors["features"].shape[2:].numel()
    return mask.shape[0] * mask.shape[1] * (grid + 1) * (8 if dtype == torch.float64 else 4)


SPEC = Spec(
    name="masked_avg_pool",
    signature="(features, mask, *, eps=0.0005, resize='bilinear', align_corners=True)",
    function=masked_avg_pool,
    op=op,
    reference=_reference,
    plain=_plain,
    arguments=_arguments,
    features=("features",),
    differentiable=("features", "mask"),
    samples=_samples,
    bad_inputs=_bad_inputs,
    sizes={
        "20x512x60x60": {"batch": 20, "channels": 512, "grid": 60, "image": 473},
        # forward only: 80 % of the gradient is zeros, which some machines write faster than their measured ceiling
        "20x512x60x60-fg": {
            "batch": 20,
            "channels": 512,
            "grid": 60,
            "image": 473,
            "masks": 1,
            "modes": ("forward",),
        },
        "4x256x60x60": {"batch": 4, "channels": 256, "grid": 60, "image": 473},
        "1x512x53x53-adjoint": {"batch": 1, "channels": 512, "grid": 53, "image": 417, "resize": "adjoint"},
    },
    base={"batch": 4, "channels": 512, "grid": 60, "image": 473},
    axes={
        "grid": (30, 45, 60, 90, 128),
        "channels": (128, 256, 512, 1024, 2048),
        "batch": (1, 2, 4, 8, 20),
        "foreground": (0.02, 0.1, 0.2, 0.6, 1.0),
    },
    units={"grid": "pixels a side", "batch": "samples", "foreground": "fraction"},
    computes="prototype under each mask, any mask size",
    replaces='"Weighted GAP", PANet\'s pooling at image size',
    benchmark_sample=_benchmark_sample,
    cost=_cost,
    scratch_bytes=_scratch_bytes,
    counted=("mask",),
)
