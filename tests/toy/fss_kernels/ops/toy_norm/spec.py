"""Samples, costs, known-bad inputs and benchmark sizes of toy_norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fss_kernels.ops.toy_norm import reference, toy_norm
from fss_kernels.ops.toy_norm.op import op
from fss_kernels.testing import BadInput, Cost, Sample, Spec


def _arguments(features: Tensor, gain: Tensor, eps: float = 1e-5) -> tuple[Any, ...]:
    return features, gain, eps


def _reference(features: Tensor, gain: Tensor, **options: Any) -> Tensor:
    return reference.toy_norm_reference(*_arguments(features, gain, **options))


def _plain(features: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor:
    return gain[..., None, None] * features / (features.square().mean(1, keepdim=True) + eps).sqrt()


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(6)

    def sample(id: str, *shape: int, **options: Any) -> Sample:
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
        gain = torch.randn(shape[:2], generator=generator, dtype=torch.float64) + 0.3
        return Sample(id, {"features": x, "gain": gain}, options)

    yield sample("plain", 2, 19, 13, 11)
    yield sample("large-eps", 2, 7, 6, 5, eps=2.5)
    yield sample("one-pixel", 3, 6, 1, 1)
    yield sample("one-column", 2, 6, 7, 1)
    yield sample("two-channels", 2, 2, 9, 8, eps=0.5)
    yield sample("many-pixels", 2, 9, 20, 37)
    yield sample("three-samples", 3, 5, 17, 16)


def _bad_inputs() -> Iterator[BadInput]:
    x, gain = torch.ones(2, 3, 4, 4), torch.ones(2, 3)
    dtypes = "float32, float64, float16, bfloat16"

    def bad(id: str, error: type[Exception], message: str, x: Any = x, gain: Any = gain, **options: Any) -> BadInput:
        return BadInput(id, (x, gain), options, error, f"toy_norm: {message}")

    yield bad("features-list", TypeError, "features must be a torch.Tensor, got list", [1.0])
    yield bad("features-int", TypeError, f"features must have dtype {dtypes}, got int64", x.long())
    yield bad("features-rank", ValueError, "features must have shape (B, C, H, W), got (3, 4, 4)", x[0])
    yield bad("no-channels", ValueError, "features has no channels or pixels, got shape (2, 0, 4, 4)", x[:, :0])
    yield bad("gain-none", TypeError, "gain must be a torch.Tensor, got NoneType", gain=None)
    yield bad("gain-rank", ValueError, "gain must have shape (B, C), got (3,)", gain=gain[0])
    yield bad("batch", ValueError, "gain must have the batch size of features, 2, got 1", gain=gain[:1])
    yield bad("channels", ValueError, "gain must have the channels of features, 3, got 2", gain=gain[:, :2])
    yield bad("eps-negative", ValueError, "eps must be finite and >= 0, got -1.0", eps=-1.0)
    yield bad("eps-none", TypeError, "eps must be a number, got NoneType", eps=None)


def _benchmark_sample(batch: int, channels: int, grid: int) -> Sample:
    """Random features and gains."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, channels, grid, grid, generator=generator)
    return Sample("benchmark", {"features": x, "gain": torch.randn(batch, channels, generator=generator)})


def _cost(sample: Sample, dtype: torch.dtype, mode: str) -> Cost:
    """Features read and the result written; in the backward features and the result's gradient read, theirs written."""
    count, size = sample.tensors["features"].numel(), torch.empty(0, dtype=dtype).element_size()
    return Cost(2 * count * size, 3 * count) if mode == "forward" else Cost(5 * count * size, 9 * count)


def _scratch_bytes(sample: Sample, dtype: torch.dtype) -> int:
    """The factors kept for the backward."""
    return sample.tensors["features"][:, 0].numel() * (8 if dtype == torch.float64 else 4)


SPEC = Spec(
    name="toy_norm",
    signature="(features, gain, *, eps=1e-05)",
    function=toy_norm,
    op=op,
    reference=_reference,
    plain=_plain,
    arguments=_arguments,
    features=("features", "gain"),
    differentiable=("features", "gain"),
    samples=_samples,
    bad_inputs=_bad_inputs,
    sizes={"2x64x16x16": {"batch": 2, "channels": 64, "grid": 16}},
    base={"batch": 2, "channels": 64, "grid": 16},
    axes={"grid": (8, 16), "channels": (32, 64)},
    units={"grid": "pixels a side"},
    computes="every pixel's vector divided by the root of its mean square, times a gain",
    replaces="`F.rms_norm` along the channels",
    benchmark_sample=_benchmark_sample,
    cost=_cost,
    scratch_bytes=_scratch_bytes,
)
