"""Samples, costs, known-bad inputs and benchmark sizes of prototype_cosine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels.ops.prototype_cosine import prototype_cosine, reference
from fss_kernels.ops.prototype_cosine.op import op
from fss_kernels.testing import BadInput, Cost, Sample, Spec


def _arguments(
    features: Tensor, prototypes: Tensor, scale: float = 1.0, eps: float = 1e-8, eps_mode: str = "clamp"
) -> tuple[Any, ...]:
    return features, prototypes if prototypes.ndim == 3 else prototypes.unsqueeze(0), scale, eps, eps_mode


def _reference(features: Tensor, prototypes: Tensor, **options: Any) -> Tensor:
    return reference.prototype_cosine_reference(*_arguments(features, prototypes, **options))


def _plain(features: Tensor, prototypes: Tensor, **options: Any) -> Tensor:
    """Both sides normalised, then multiplied: F.cosine_similarity written out, with the eps mode."""
    features, sets, scale, eps, eps_mode = _arguments(features, prototypes, **options)
    if eps_mode == "clamp":
        x, w = F.normalize(features, dim=1, eps=eps), F.normalize(sets, dim=2, eps=eps)
    else:
        x = features / (features.norm(dim=1, keepdim=True) + eps)
        w = sets / (sets.norm(dim=2, keepdim=True) + eps)
    return scale * (x[:, None] * w[..., None, None]).sum(2)


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> Tensor:  # a mean that is not 0, as after ReLU: cosines of either sign, most positive
        return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3

    def sample(id: str, x: Tensor, w: Tensor, large: bool = False, **options: Any) -> Sample:
        shared = ("prototypes",) if w.ndim == 2 else ()
        return Sample(id, {"features": x, "prototypes": w}, options, large=large, shared=shared)

    yield sample("plain", randn(2, 19, 13, 11), randn(2, 2, 19), scale=10.0)
    yield sample("add", randn(2, 7, 6, 5), randn(2, 3, 7), eps=0.25, eps_mode="add")
    yield sample("shared", randn(3, 9, 6, 7), randn(4, 9), scale=-2.5)
    yield sample("shared-add", randn(2, 5, 7, 9), randn(2, 5), eps=1e-5, eps_mode="add")
    yield sample("one-prototype", randn(2, 12, 9, 8), randn(2, 1, 12))
    yield sample("five-prototypes", randn(2, 16, 9, 8), randn(2, 5, 16), scale=20.0)
    yield sample("eleven-prototypes", randn(2, 17, 5, 7), randn(2, 11, 17))
    yield sample("one-pixel", randn(2, 6, 1, 1), randn(2, 2, 6))
    yield sample("one-column", randn(2, 6, 7, 1), randn(2, 2, 6))
    yield sample("one-channel", randn(2, 1, 9, 8), randn(2, 2, 1), eps=0.5, eps_mode="add")
    yield sample("many-rows", randn(2, 300, 6, 7), randn(2, 3, 300))
    yield sample("many-pixels", randn(2, 9, 40, 37), randn(2, 2, 9))
    yield sample("more-pixels", randn(1, 11, 61, 23), randn(1, 6, 11))
    # norms on both sides of eps, on both operands
    sizes = torch.linspace(0.2, 3.0, 63, dtype=torch.float64).view(1, 1, 7, 9)
    yield sample("clamped", F.normalize(randn(2, 8, 7, 9), dim=1) * sizes, randn(2, 3, 8), eps=1.7)
    yield sample("added", F.normalize(randn(2, 8, 7, 9), dim=1) * sizes, randn(2, 3, 8), eps=1.7, eps_mode="add")
    yield sample("no-eps", randn(2, 6, 9, 8), randn(2, 2, 6), eps=0.0)
    yield sample("scale-zero", randn(1, 6, 4, 5), randn(1, 2, 6), scale=0.0, eps=1e-5)
    # more than 8 MB of gradient in half precision, planes that are not whole cache lines
    yield sample("streamed", randn(3, 87, 127, 129), randn(3, 2, 87), large=True)


def _bad_inputs() -> Iterator[BadInput]:
    x, w = torch.ones(2, 3, 4, 4), torch.ones(2, 5, 3)
    dtypes = "float32, float64, float16, bfloat16"

    def bad(id: str, error: type[Exception], message: str, *args: Any, **options: Any) -> BadInput:
        return BadInput(id, args or (x, w), options, error, f"prototype_cosine: {message}")

    yield bad("features-list", TypeError, "features must be a torch.Tensor, got list", [1.0], w)
    yield bad("features-int", TypeError, f"features must have dtype {dtypes}, got int64", x.long(), w)
    yield bad("features-rank", ValueError, "features must have shape (B, C, H, W), got (3, 4, 4)", x[0], w)
    yield bad("prototypes-none", TypeError, "prototypes must be a torch.Tensor, got NoneType", x, None)
    yield bad("prototypes-bool", TypeError, f"prototypes must have dtype {dtypes}, got bool", x, w > 0)
    yield bad("prototypes-rank", ValueError, "prototypes must have shape (B, P, C) or (P, C), got (3,)", x, w[0, 0])
    yield bad(
        "mixed-dtypes",
        TypeError,
        "prototypes must have the dtype of features, float16, got float32; pass prototypes.to(torch.float16)",
        x.half(),
        w,
    )
    yield bad("batch", ValueError, "prototypes must have the batch size of features, 2, got 1", x, w[:1])
    yield bad("channels", ValueError, "prototypes must have the channels of features, 3, got 2", x, w[..., :2])
    yield bad("device", ValueError, "prototypes must be on the device of features, cpu, got meta", x, w.to("meta"))
    yield bad("no-channels", ValueError, "features has no channels or pixels, got shape (2, 0, 4, 4)", x[:, :0], w)
    yield bad("no-pixels", ValueError, "features has no channels or pixels, got shape (2, 3, 0, 4)", x[:, :, :0], w)
    yield bad("scale-inf", ValueError, "scale must be finite, got inf", scale=float("inf"))
    yield bad("scale-text", TypeError, "scale must be a number, got str", scale="20")
    yield bad("scale-bool", TypeError, "scale must be a number, got bool", scale=True)
    yield bad("eps-negative", ValueError, "eps must be finite and >= 0, got -1.0", eps=-1.0)
    yield bad("eps-none", TypeError, "eps must be a number, got NoneType", eps=None)
    yield bad("eps-mode", ValueError, "eps_mode must be one of clamp, add, got 'max'", eps_mode="max")
    yield bad("eps-mode-none", TypeError, "eps_mode must be a string, got NoneType", eps_mode=None)


def _benchmark_sample(batch: int, channels: int, grid: int, prototypes: int) -> Sample:
    """Random features and prototypes, one set a sample."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, channels, grid, grid, generator=generator)
    w = torch.randn(batch, prototypes, channels, generator=generator)
    return Sample("benchmark", {"features": x, "prototypes": w}, {"scale": 20.0})


def _cost(sample: Sample, dtype: torch.dtype, mode: str) -> Cost:
    """Features read once in the forward and once in the backward, their gradient and the maps written once."""
    features, prototypes, *_ = _arguments(sample.tensors["features"], sample.tensors["prototypes"])
    size = torch.empty(0, dtype=dtype).element_size()
    count = prototypes.shape[1]
    maps = features.shape[0] * count * features.shape[2:].numel()
    forward = features.numel() + maps + prototypes.numel()
    flops = 2 * (count + 1) * features.numel()
    if mode == "forward":
        return Cost(forward * size, flops)
    backward = 2 * features.numel() + maps + 2 * prototypes.numel()
    return Cost((forward + backward) * size, flops + 2 * (2 * count + 1) * features.numel())


def _scratch_bytes(sample: Sample, dtype: torch.dtype) -> int:
    """The cosines and norms kept for the backward, and the normalised prototypes padded to 16 channels."""
    features, prototypes, *_ = _arguments(sample.tensors["features"], sample.tensors["prototypes"])
    kept = features.shape[0] * (prototypes.shape[1] + 1) * features.shape[2:].numel()
    units = prototypes.shape[0] * prototypes.shape[1] * -(-prototypes.shape[2] // 16) * 16
    return (kept + units) * (8 if dtype == torch.float64 else 4)


SPEC = Spec(
    name="prototype_cosine",
    signature="(features, prototypes, *, scale=1.0, eps=1e-08, eps_mode='clamp')",
    function=prototype_cosine,
    op=op,
    reference=_reference,
    plain=_plain,
    arguments=_arguments,
    features=("features", "prototypes"),
    differentiable=("features", "prototypes"),
    samples=_samples,
    bad_inputs=_bad_inputs,
    sizes={
        "4x512x60x60-p5": {"batch": 4, "channels": 512, "grid": 60, "prototypes": 5},
        "4x512x60x60-p2": {"batch": 4, "channels": 512, "grid": 60, "prototypes": 2},
        "4x256x60x60-p2": {"batch": 4, "channels": 256, "grid": 60, "prototypes": 2},
        "8x1024x60x60-p6": {"batch": 8, "channels": 1024, "grid": 60, "prototypes": 6},
    },
    base={"batch": 4, "channels": 512, "grid": 60, "prototypes": 2},
    axes={
        "grid": (30, 45, 60, 90, 128),
        "channels": (128, 256, 512, 1024, 2048),
        "batch": (1, 2, 4, 8),
        "prototypes": (1, 2, 5, 10),
    },
    units={"grid": "pixels a side", "batch": "samples"},
    computes="cosine of every pixel with every prototype",
    replaces="`F.cosine_similarity` with broadcast prototypes, normalise + einsum",
    benchmark_sample=_benchmark_sample,
    cost=_cost,
    scratch_bytes=_scratch_bytes,
    counted=("prototypes",),
    channel_dim={"prototypes": -1},
    cosines=lambda options: {"scale": 1.0},
)
