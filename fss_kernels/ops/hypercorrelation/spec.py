"""Samples, costs, known-bad inputs and benchmark sizes of hypercorrelation.

Most samples have features on a lattice: channel 0 odd, the others even, in units of 1/4. Their products never add up to
0, so no rounding decides on which side of the clamp a cosine is, and its gradient is the same for every formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels.ops.hypercorrelation import hypercorrelation, hypercorrelation_pyramid, reference
from fss_kernels.ops.hypercorrelation.op import op
from fss_kernels.testing import A_FIFTH, BadInput, Cost, Sample, Spec, disc

_FEATURES = tuple(f"{name}{i or ''}" for name in ("query", "support") for i in range(13))


def _parse(
    *tensors: Tensor, levels: tuple[int, ...] = (1,), **options: Any
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Any]:
    """Queries, supports, mask and options of a call whose tensors come one by one: as many queries as ``levels`` add up
    to, as many supports, then a mask or none."""
    layers = sum(levels)
    queries, supports, mask = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
    return list(queries), list(supports), mask[0] if mask else None, options


def _stack(call: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> Any:
    """``call(queries, supports, mask, **options)`` a level; what the public function of these options returns."""
    queries, supports, mask, chosen = _parse(*tensors, **options)
    if "levels" not in options:
        return call(queries, supports, mask, **chosen).squeeze(1)
    starts = itertools.pairwise(itertools.accumulate(options["levels"], initial=0))
    levels = [call(queries[i:j], supports[i:j], mask, **chosen) for i, j in starts]
    return levels if len(levels) > 1 else levels[0]


def _function(*tensors: Tensor, **options: Any) -> Any:
    """The op with its tensors one by one; with an option ``levels`` the pyramid, a single level without its list."""
    queries, supports, mask, chosen = _parse(*tensors, **options)
    if "levels" not in options:
        return hypercorrelation(queries[0], supports[0], mask, **chosen)
    levels = hypercorrelation_pyramid(queries, supports, mask, levels=options["levels"], **chosen)
    return levels if len(levels) > 1 else levels[0]


def _raw(queries: Any, supports: Any, mask: Tensor | None, **options: Any) -> tuple[Any, ...]:
    if mask is None:
        mask = queries[0].new_ones(queries[0].shape[0], 1, 1)
    return queries, supports, mask, *({"eps": 1e-5, "eps_mode": "add", "clamp": True} | options).values()


def _arguments(*tensors: Tensor, **options: Any) -> tuple[Any, ...]:
    queries, supports, mask, chosen = _parse(*tensors, **options)
    return _raw(queries, supports, mask, **chosen)


def _reference(*tensors: Tensor, **options: Any) -> Any:
    return _stack(lambda *a, **o: reference.hypercorrelation_reference(*_raw(*a, **o)), *tensors, **options)


def _plain_level(queries: Any, supports: Any, mask: Tensor | None, **options: Any) -> Tensor:
    layers = [_plain_layer(q, s, mask, **options) for q, s in zip(queries, supports, strict=True)]
    return torch.stack(layers).transpose(0, 1).contiguous()


def _plain(*tensors: Tensor, **options: Any) -> Any:
    """HSNet's correlation layer by layer, stacked."""
    return _stack(_plain_level, *tensors, **options)


def _plain_layer(
    query: Tensor, support: Tensor, mask: Tensor | None, eps: float = 1e-5, eps_mode: str = "add", clamp: bool = True
) -> Tensor:
    """The mask multiplied in, both normalised, one matrix product, clamped."""
    if mask is not None:
        mask = F.interpolate(mask[:, None].to(support.dtype), support.shape[2:], mode="bilinear", align_corners=True)
        # the fill changes no value: g / eps, the formula's gradient at a zero vector, overflows float16
        support = (support * mask).masked_fill(mask == 0, 0)
    norms = query.norm(dim=1, keepdim=True), support.norm(dim=1, keepdim=True)
    if eps_mode == "add":
        q, s = (x / (n + eps) for x, n in zip((query, support), norms, strict=True))
    else:
        q, s = (x / n.clamp(min=eps) for x, n in zip((query, support), norms, strict=True))
    cosine = torch.bmm(q.flatten(2).transpose(1, 2), s.flatten(2))
    if clamp:
        cosine = cosine.clamp(min=0)
    return cosine.view(query.shape[0], *query.shape[2:], *support.shape[2:])


def _lattice(generator: torch.Generator, *shape: int) -> Tensor:
    x = 2 * torch.randint(-2, 3, shape, generator=generator)
    x[:, 0] = 2 * torch.randint(-1, 2, x[:, 0].shape, generator=generator) + 1
    return x.double() / 4


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(1)

    def lattice(*shape: int) -> Tensor:
        return _lattice(generator, *shape)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1

    def sample(
        id: str, query: Tensor, support: Tensor, mask: Tensor | None = None, large: bool = False, **options: Any
    ) -> Sample:
        follow = ("mask",) if options.pop("follow", False) else ()
        tensors = {"query": query, "support": support}
        return Sample(id, tensors if mask is None else {**tensors, "mask": mask}, options, follow, large)

    def level(id: str, channels: tuple[int, ...], *grids: tuple[int, int], **options: Any) -> Sample:
        tensors = {
            f"{name}{i or ''}": lattice(2, c, *grid)
            for name, grid in zip(("query", "support"), grids, strict=True)
            for i, c in enumerate(channels)
        }
        return Sample(id, {**tensors, "mask": rand(2, 9, 10)}, {"levels": (len(channels),), **options})

    yield sample("soft", lattice(2, 19, 5, 7), lattice(2, 19, 4, 6), rand(2, 13, 11))
    yield sample("no-mask", lattice(2, 5, 6, 4), lattice(2, 5, 3, 7))
    yield sample("normal", normal(2, 19, 5, 4), normal(2, 19, 4, 6), rand(2, 9, 10), clamp=False)
    yield sample("clamp-mode", lattice(2, 7, 5, 4), lattice(2, 7, 4, 6), rand(2, 9, 10), eps_mode="clamp")
    yield sample("below-eps", lattice(2, 3, 5, 4), lattice(2, 3, 4, 6), eps=1.2, eps_mode="clamp")
    yield sample("large-eps", lattice(2, 6, 5, 4), lattice(2, 6, 4, 6), rand(2, 5, 3), eps=2.0)
    yield sample("no-eps", lattice(2, 6, 5, 4), lattice(2, 6, 4, 6), rand(2, 5, 3), eps=0.0)
    yield sample("same-grid", lattice(1, 33, 4, 5), lattice(1, 33, 6, 5), rand(1, 6, 5))
    yield sample("one-pixel", lattice(2, 6, 1, 1), lattice(2, 6, 1, 1), rand(2, 5, 4))
    yield sample("one-query-pixel", lattice(2, 6, 1, 1), lattice(2, 6, 9, 7), rand(2, 1, 1), clamp=False)
    yield sample("one-channel", lattice(2, 1, 5, 4), lattice(2, 1, 4, 3), rand(2, 7, 8), eps=0.5)
    half_empty = (rand(2, 8, 9) > 0.5).double()
    half_empty[0] = 0
    yield sample("empty-mask", lattice(2, 6, 5, 4), lattice(2, 6, 4, 6), half_empty)
    yield sample("bool-mask", lattice(2, 6, 5, 4), lattice(2, 6, 4, 6), rand(2, 13, 9) > 0.6)
    yield sample("uint8-mask", lattice(2, 6, 5, 4), lattice(2, 6, 4, 6), (rand(2, 13, 9) * 3).to(torch.uint8))
    yield sample("same-dtype-mask", lattice(2, 6, 5, 4), lattice(2, 6, 4, 6), rand(2, 13, 9), follow=True)
    yield sample("negative-mask", lattice(2, 6, 5, 4), lattice(2, 6, 4, 6), -rand(2, 4, 6))
    blob = torch.zeros(2, 21, 23, dtype=torch.float64)
    blob[0, 3:11, 5:9], blob[1, 7:9, 2:20] = 1, 0.5
    yield sample("blob", lattice(2, 40, 9, 11), lattice(2, 40, 21, 23), blob)
    yield sample("many-rows", lattice(1, 300, 6, 7), lattice(1, 300, 5, 9), rand(1, 13, 13))
    yield sample("many-pixels", lattice(2, 9, 17, 19), lattice(2, 9, 18, 17), rand(2, 31, 33))
    yield level("two-layers", (5, 5), (5, 4), (3, 7))
    yield level("three-layers", (7, 3, 18), (3, 5), (6, 9), eps_mode="clamp", eps=0.5)
    yield level("thirteen-layers", (3, 2, 4) * 4 + (5,), (3, 2), (2, 3))  # as many as ResNet-50 has
    # more than 8 MB of output in float32, rows that are not whole cache lines; more than 512 query pixels a task
    yield sample("streamed", lattice(1, 64, 37, 43), lattice(1, 64, 41, 35), rand(1, 50, 60), large=True)


def _bad_inputs() -> Iterator[BadInput]:
    q, s, mask = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 5, 4), torch.ones(2, 8, 8)
    dtypes = "float32, float64, float16, bfloat16"

    def bad(id: str, error: type[Exception], message: str, *args: Any, **options: Any) -> BadInput:
        return BadInput(id, args or (q, s, mask), options, error, f"hypercorrelation: {message}")

    yield bad("query-list", TypeError, "query must be a torch.Tensor, got list", [1.0], s)
    yield bad("query-int", TypeError, f"query must have dtype {dtypes}, got int64", q.long(), s)
    yield bad(
        "support-complex", TypeError, f"support must have dtype {dtypes}, got complex64", q, s.to(torch.complex64)
    )
    yield bad(
        "mixed-dtypes",
        TypeError,
        "support must have the dtype of query, float32, got bfloat16; pass support.to(torch.float32)",
        q,
        s.bfloat16(),
    )
    yield bad("query-rank", ValueError, "query must have shape (B, C, H, W), got (3, 4, 4)", q[0], s)
    yield bad("support-rank", ValueError, "support must have shape (B, C, H, W), got (2, 1, 3, 5, 4)", q, s[:, None])
    yield bad("mask-list", TypeError, "mask must be a torch.Tensor, got list", q, s, [1])
    yield bad("mask-int", TypeError, f"mask must have dtype {dtypes}, bool, uint8, got int64", q, s, mask.long())
    yield bad("mask-rank", ValueError, "mask must have shape (B, h, w), got (2, 1, 8, 8)", q, s, mask[:, None])
    yield bad("batch", ValueError, "support must have the batch size of query, 2, got 1", q, s[:1])
    yield bad("mask-batch", ValueError, "mask must have the batch size of query, 2, got 1", q, s, mask[:1])
    yield bad("channels", ValueError, "support must have the channels of query, 3, got 2", q, s[:, :2])
    yield bad("device", ValueError, "support must be on the device of query, cpu, got meta", q, s.to("meta"))
    yield bad("mask-device", ValueError, "mask must be on the device of query, cpu, got meta", q, s, mask.to("meta"))
    yield bad("no-channels", ValueError, "query has no channels or pixels, got shape (2, 0, 4, 4)", q[:, :0], s)
    yield bad("no-pixels", ValueError, "support has no channels or pixels, got shape (2, 3, 0, 4)", q, s[:, :, :0])
    yield bad("mask-no-pixels", ValueError, "mask has no pixels, got shape (2, 8, 0)", q, s, mask[:, :, :0])
    yield bad("eps-negative", ValueError, "eps must be finite and >= 0, got -1.0", eps=-1.0)
    yield bad("eps-nan", ValueError, "eps must be finite and >= 0, got nan", eps=float("nan"))
    yield bad("eps-text", TypeError, "eps must be a number, got str", eps="1e-5")
    yield bad("eps-mode", ValueError, "eps_mode must be one of add, clamp, got 'max'", eps_mode="max")
    yield bad("eps-mode-none", TypeError, "eps_mode must be a string, got NoneType", eps_mode=None)
    yield bad("clamp", TypeError, "clamp must be a bool, got int", clamp=1)


def _benchmark_sample(
    batch: int, channels: int = 0, grid: int = 0, image: int = 0, stages: Any = None, foreground: float = A_FIFTH
) -> Sample:
    """Lattice features, without a mask or under a foreground disc of about 20 %, or of that share (image: size of the
    mask). ``stages``: the pyramid of these (layers, channels, grid)."""
    generator = torch.Generator().manual_seed(batch)
    layers = [(c, n) for count, c, n in stages or ((1, channels, grid),) for _ in range(count)]
    tensors = {
        f"{name}{i or ''}": _lattice(generator, batch, c, n, n).float()
        for name in ("query", "support")
        for i, (c, n) in enumerate(layers)
    }
    options = {"levels": tuple(count for count, *_ in stages)} if stages else {}
    return Sample("benchmark", {**tensors, "mask": disc(batch, image, foreground)} if image else tensors, options)


def _layers(sample: Sample) -> list[tuple[int, int, int, int, int]]:
    """B, C, Na, Nb and the kept support pixels of all samples, for every layer."""
    queries, supports, mask, _ = _parse(*sample.tensors.values(), **sample.options)
    result = []
    for query, support in zip(queries, supports, strict=True):
        batch, channels, columns = *query.shape[:2], support.shape[2:].numel()
        kept = batch * columns if mask is None else int((reference.weights_of(mask, support.float()) != 0).sum())
        result.append((batch, channels, query.shape[2:].numel(), columns, kept))
    return result


def _cost(sample: Sample, dtype: torch.dtype, mode: str) -> Cost:
    """Operands read once and the output written once; for gradients its gradient and the operands read once more, the
    operands' gradients written. Products of kept support pixels only."""
    size = torch.empty(0, dtype=dtype).element_size()
    operands = output = flops = 0
    for batch, channels, rows, columns, kept in _layers(sample):
        operands += batch * channels * (rows + columns) * size
        output += batch * rows * columns * size
        flops += 2 * kept * rows * channels
    if mode == "forward":
        return Cost(operands + output, flops)
    return Cost(3 * operands + 2 * output, 3 * flops)


def _scratch_bytes(sample: Sample, dtype: torch.dtype) -> int:
    """The packed support of as many samples as fit 16 MB, of one layer at a time; one bit an output and norms of the
    layers of one level, the resized mask. Levels come one after the other and leave nothing behind."""
    size, layers = 8 if dtype == torch.float64 else 4, iter(_layers(sample))
    most = 0
    for count in sample.options.get("levels", (1,)):
        packed = small = 0
        for batch, channels, rows, columns, _ in itertools.islice(layers, count):
            panels = (columns + 47) // 48 * 48 * (channels + 1) * size
            packed = max(packed, min(batch, max(1, (16 << 20) // panels)) * panels)
            bits = batch * rows * ((columns + 7) // 8) if sample.options.get("clamp", True) else 0
            small += bits + batch * (rows + columns) * size
        most = max(most, packed + small + batch * columns * size)
    return most


SPEC = Spec(
    name="hypercorrelation",
    signature="(query, support, mask=None, *, eps=1e-05, eps_mode='add', clamp=True)",
    function=_function,
    public=hypercorrelation,
    op=op,
    reference=_reference,
    plain=_plain,
    arguments=_arguments,
    features=_FEATURES,
    differentiable=_FEATURES,
    samples=_samples,
    bad_inputs=_bad_inputs,
    sizes={
        "4x512x60x60": {"batch": 4, "channels": 512, "grid": 60, "image": 473},
        "4x512x60x60-no-mask": {"batch": 4, "channels": 512, "grid": 60},
        "resnet50-400": {
            "batch": 4,
            "stages": ((4, 512, 50), (6, 1024, 25), (3, 2048, 13)),
            "image": 402,  # of 400, PyTorch's resize gives pixels that lie on a zero exactly a weight of about 1e-6
            "modes": ("forward",),  # HSNet and VAT correlate without a gradient
        },
        "4x1024x25x25": {"batch": 4, "channels": 1024, "grid": 25, "image": 400},
    },
    base={"batch": 1, "channels": 512, "grid": 50, "image": 393},
    axes={
        "grid": (13, 25, 50, 90),
        "channels": (128, 256, 512, 1024, 2048),
        "batch": (1, 2, 4, 8),
        "foreground": (0.02, 0.1, 0.2, 0.6, 1.0),
    },
    units={"grid": "pixels a side", "batch": "samples", "foreground": "fraction"},
    computes="cosine of every query pixel with every support pixel, with mask and clamp; all layers of a level are "
    "written into one tensor",
    replaces="HSNet's and VAT's correlation",
    benchmark_sample=_benchmark_sample,
    cost=_cost,
    scratch_bytes=_scratch_bytes,
    cosines=lambda options: {},
)
