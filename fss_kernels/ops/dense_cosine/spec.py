"""Samples, costs, known-bad inputs and benchmark sizes of dense_cosine_max and dense_cosine_match.

The batteries see the scores only, of both directions side by side for the match; a gradient at another index than the
oracle's would be wrong, so they see the indices through it. Features are random: the two best scores of a pixel differ
by more than float32 rounds. Ties have tests of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels import _loading
from fss_kernels.ops.dense_cosine import dense_cosine_match, dense_cosine_max, reference
from fss_kernels.ops.dense_cosine.op import match_op, max_op
from fss_kernels.testing import A_FIFTH, BadInput, Cost, Sample, Spec, disc

_DPCN = ((5, 1), (3, 3), (1, 5))


def _folded(query: Tensor, support: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    support = support.flatten(0, 1) if support.ndim == 5 else support
    if mask is None:
        mask = query.new_ones(support.shape[0], 1, 1)
    return query, support, mask.flatten(0, 1) if mask.ndim == 4 else mask


def _max_arguments(
    query: Tensor,
    support: Tensor,
    mask: Tensor | None = None,
    windows: tuple[tuple[int, int], ...] = ((1, 1),),
    masked: str = "zero",
    eps: float = 1e-7,
    eps_mode: str = "clamp",
) -> tuple[Any, ...]:
    return *_folded(query, support, mask), [n for w in windows for n in w], masked, eps, eps_mode


def _match_arguments(
    query: Tensor, support: Tensor, mask: Tensor | None = None, eps: float = 1e-7, eps_mode: str = "clamp"
) -> tuple[Any, ...]:
    return *_folded(query, support, mask), eps, eps_mode


def _side_by_side(query_scores: Tensor, support_scores: Tensor) -> Tensor:
    return torch.cat([query_scores.flatten(-2), support_scores.flatten(-2)], -1)


def _max_scores(*tensors: Tensor, **options: Any) -> Tensor:
    return dense_cosine_max(*tensors, **options)[0]


def _match_scores(*tensors: Tensor, **options: Any) -> Tensor:
    query_scores, _, support_scores, _ = dense_cosine_match(*tensors, **options)
    return _side_by_side(query_scores, support_scores)


def _shots(query: Tensor, support: Tensor) -> tuple[int, int]:
    return query.shape[0], support.shape[1] if support.ndim == 5 else 1


def _max_reference(query: Tensor, support: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    scores, _ = reference.dense_cosine_max_reference(*_max_arguments(query, support, mask, **options))
    return scores.unflatten(0, _shots(query, support))


def _match_reference(query: Tensor, support: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    scores = reference.dense_cosine_match_reference(*_match_arguments(query, support, mask, **options))
    return _side_by_side(scores[0], scores[1]).unflatten(0, _shots(query, support))


def _plain_cosines(query: Tensor, support: Tensor, mask: Tensor, eps: float, eps_mode: str) -> tuple[Tensor, Tensor]:
    """Both sides normalised, dropped pixels zeroed, one matrix product: (N, Ns, Nq), and which pixels are kept."""
    mask = F.interpolate(mask[:, None].float(), support.shape[2:], mode="bilinear", align_corners=True)
    support = support.masked_fill(mask <= 0, 0)
    norms = query.norm(dim=1, keepdim=True), support.norm(dim=1, keepdim=True)
    if eps_mode == "add":
        q, s = (x / (n + eps) for x, n in zip((query, support), norms, strict=True))
    else:
        q, s = (x / n.clamp(min=eps) for x, n in zip((query, support), norms, strict=True))
    q = reference.per_shot(q, support)
    return torch.bmm(s.flatten(2).transpose(1, 2), q.flatten(2)), (mask > 0).flatten(1)


def _plain_max(query: Tensor, support: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """PFENet's and DPCN's formula: the whole matrix, its window means, its largest element a column."""
    q, s, m, windows, masked, eps, eps_mode = _max_arguments(query, support, mask, **options)
    cosines, kept = _plain_cosines(q, s, m, eps, eps_mode)
    cosines = cosines.view(-1, *s.shape[2:], *q.shape[2:])
    maps = []
    for window in zip(windows[::2], windows[1::2], strict=True):
        scores = reference.window_mean(cosines, window).flatten(3).flatten(1, 2)
        if masked == "exclude":
            scores = scores.masked_fill(~kept[..., None], -torch.inf)
        best = scores.max(1).values
        maps.append(torch.where(best.isinf(), 0.0, best))
    return torch.stack(maps, 1).view(*_shots(query, support), -1, *q.shape[2:])


def _plain_match(query: Tensor, support: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    q, s, m, eps, eps_mode = _match_arguments(query, support, mask, **options)
    cosines, kept = _plain_cosines(q, s, m, eps, eps_mode)
    of_query = cosines.masked_fill(~kept[..., None], -torch.inf).max(1).values
    of_query = torch.where(kept.any(1)[:, None], of_query, 0.0)
    of_support = torch.where(kept, cosines.max(2).values, 0.0)
    return torch.cat([of_query, of_support], 1).unflatten(0, _shots(query, support))


def _blobs(batch: int, height: int, width: int) -> Tensor:
    """A rectangle of about a fifth of the grid that moves with the sample, with a hole."""
    mask = torch.zeros(batch, height, width, dtype=torch.float64)
    for b in range(batch):
        top, left = (b + 1) * height // (batch + 3), (b + 1) * width // (batch + 4)
        mask[b, top : top + -(-height // 2), left : left + -(-width // 2)] = 1
        mask[b, top + height // 4, left + width // 4] = 0
    return mask


def _common_samples(seed: int) -> Iterator[Sample]:
    """What both ops are tried on."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:  # a mean that is not 0, as after ReLU: cosines of either sign, most positive
        return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def sample(
        id: str, q: Tensor, s: Tensor, mask: Tensor | None = None, large: bool = False, **options: Any
    ) -> Sample:
        follow = ("mask",) if options.pop("follow", False) else ()
        tensors = {"query": q, "support": s}
        return Sample(id, tensors if mask is None else {**tensors, "mask": mask}, options, follow, large)

    yield sample("shots", randn(2, 19, 5, 6), randn(2, 2, 19, 4, 7), (rand(2, 2, 9, 8) > 0.6).double())
    yield sample("no-mask", randn(2, 7, 5, 4), randn(2, 7, 4, 6))
    yield sample("five-shots", randn(2, 9, 5, 4), randn(2, 5, 9, 4, 3), rand(2, 5, 4, 3) > 0.5)
    yield sample("add", randn(2, 7, 5, 4), randn(2, 7, 4, 6), _blobs(2, 9, 10), eps=0.25, eps_mode="add")
    sizes = torch.linspace(0.2, 3.0, 30, dtype=torch.float64)  # norms on both sides of eps, on both operands
    unit_q, unit_s = F.normalize(randn(2, 8, 5, 6), dim=1), F.normalize(randn(2, 8, 6, 5), dim=1)
    yield sample("clamped", unit_q * sizes.view(5, 6), unit_s * sizes.view(6, 5), _blobs(2, 6, 5), eps=1.7)
    yield sample("no-eps", randn(2, 6, 5, 4), randn(2, 6, 4, 6), eps=0.0)
    yield sample("one-pixel", randn(2, 6, 1, 1), randn(2, 6, 1, 1), rand(2, 3, 2) + 0.1)
    yield sample("one-query-pixel", randn(2, 6, 1, 1), randn(2, 6, 7, 9), rand(2, 7, 9) > 0.3)
    yield sample("one-channel", randn(2, 1, 5, 4), randn(2, 1, 4, 3), eps=0.5, eps_mode="add")
    half_empty = (rand(2, 4, 6) > 0.5).double()
    half_empty[0] = 0
    yield sample("empty-mask", randn(2, 6, 5, 4), randn(2, 6, 4, 6), half_empty)
    one = torch.zeros(2, 4, 6)
    one[0, 1, 2] = one[1, 3, 5] = 1
    yield sample("one-kept", randn(2, 6, 5, 4), randn(2, 6, 4, 6), one)
    yield sample("uint8-mask", randn(2, 6, 5, 4), randn(2, 6, 4, 6), (rand(2, 13, 9) * 3).to(torch.uint8))
    yield sample("same-dtype-mask", randn(2, 6, 5, 4), randn(2, 6, 4, 6), rand(2, 4, 6).round(), follow=True)
    yield sample("many-rows", randn(1, 300, 6, 7), randn(1, 300, 5, 9), _blobs(1, 5, 9))
    yield sample("many-pixels", randn(2, 19, 17, 19), randn(2, 19, 18, 17), _blobs(2, 31, 33))
    yield sample("streamed", randn(1, 64, 37, 23), randn(1, 64, 31, 35), _blobs(1, 50, 60), large=True)


def _max_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(6)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.2

    def sample(id: str, q: Tensor, s: Tensor, mask: Tensor | None, large: bool = False, **options: Any) -> Sample:
        tensors = {"query": q, "support": s}
        return Sample(id, tensors if mask is None else {**tensors, "mask": mask}, options, large=large)

    yield from _common_samples(4)
    yield sample("exclude", randn(2, 7, 5, 4), randn(2, 7, 4, 6), _blobs(2, 9, 10), masked="exclude")
    yield sample("exclude-one", randn(2, 3, 5, 4), randn(2, 3, 4, 6), _blobs(2, 4, 6).roll(1, 2), masked="exclude")
    # few channels and kept pixels: the best score of many query pixels is below 0
    few = torch.zeros(2, 6, 5)
    few[:, 1, 1] = 1
    yield sample("below-zero", randn(2, 3, 7, 6), randn(2, 3, 6, 5), few)
    yield sample("dpcn", randn(2, 11, 7, 6), randn(2, 11, 6, 7), _blobs(2, 6, 7), windows=_DPCN)
    yield sample("dpcn-shots", randn(2, 5, 5, 6), randn(2, 2, 5, 6, 5), _blobs(4, 6, 5).view(2, 2, 6, 5), windows=_DPCN)
    yield sample("dpcn-exclude", randn(2, 7, 6, 5), randn(2, 7, 5, 6), _blobs(2, 9, 9), windows=_DPCN, masked="exclude")
    yield sample("no-mask-windows", randn(1, 7, 6, 5), randn(1, 7, 5, 6), None, windows=((3, 1), (1, 1)))
    yield sample("small-grid", randn(2, 9, 2, 3), randn(2, 9, 3, 1), None, windows=((5, 7), (3, 1)), eps=0.5)
    yield sample(
        "many-pixels-windows", randn(2, 33, 17, 19), randn(2, 33, 18, 16), _blobs(2, 18, 16), windows=_DPCN, large=True
    )


def _common_bad_inputs(name: str) -> Iterator[BadInput]:
    q, s, mask = torch.ones(2, 3, 4, 4), torch.ones(2, 2, 3, 5, 4), torch.ones(2, 2, 8, 8)
    dtypes = "float32, float64, float16, bfloat16"

    def bad(id: str, error: type[Exception], message: str, *args: Any, **options: Any) -> BadInput:
        return BadInput(id, args or (q, s, mask), options, error, f"{name}: {message}")

    yield bad("query-list", TypeError, "query must be a torch.Tensor, got list", [1.0], s)
    yield bad("query-int", TypeError, f"query must have dtype {dtypes}, got int64", q.long(), s)
    yield bad("support-int", TypeError, f"support must have dtype {dtypes}, got int32", q, s.int())
    yield bad(
        "mixed-dtypes",
        TypeError,
        "support must have the dtype of query, float32, got bfloat16; pass support.to(torch.float32)",
        q,
        s.bfloat16(),
    )
    yield bad("query-rank", ValueError, "query must have shape (B, C, Hq, Wq), got (3, 4, 4)", q[0], s)
    ranks = "(B, S, C, Hs, Ws) or (B, C, Hs, Ws)"
    yield bad("support-rank", ValueError, f"support must have shape {ranks}, got (3, 5, 4)", q, s[0, 0])
    yield bad("mask-list", TypeError, "mask must be a torch.Tensor, got list", q, s, [1])
    yield bad("mask-int", TypeError, f"mask must have dtype {dtypes}, bool, uint8, got int64", q, s, mask.long())
    yield bad("mask-rank", ValueError, "mask must have shape (B, S, h, w), got (2, 8, 8)", q, s, mask[:, 0])
    yield bad("mask-shots", ValueError, "mask must have shape (B, h, w), got (2, 2, 8, 8)", q, s[:, 0], mask)
    yield bad("batch", ValueError, "support must have the batch size of query, 2, got 1", q, s[:1])
    yield bad("mask-batch", ValueError, "mask must have the batch size of query, 2, got 1", q, s, mask[:1])
    yield bad("shots", ValueError, "mask must have the shots of support, 2, got 1", q, s, mask[:, :1])
    yield bad("channels", ValueError, "support must have the channels of query, 3, got 2", q, s[:, :, :2])
    yield bad("device", ValueError, "support must be on the device of query, cpu, got meta", q, s.to("meta"))
    yield bad("mask-device", ValueError, "mask must be on the device of query, cpu, got meta", q, s, mask.to("meta"))
    yield bad("no-channels", ValueError, "query has no channels or pixels, got shape (2, 0, 4, 4)", q[:, :0], s)
    yield bad("no-pixels", ValueError, "support has no channels or pixels, got shape (2, 2, 3, 0, 4)", q, s[..., :0, :])
    yield bad("mask-no-pixels", ValueError, "mask has no pixels, got shape (2, 2, 8, 0)", q, s, mask[..., :0])
    yield bad("eps-negative", ValueError, "eps must be finite and >= 0, got -1.0", eps=-1.0)
    yield bad("eps-text", TypeError, "eps must be a number, got str", eps="1e-5")
    yield bad("eps-mode", ValueError, "eps_mode must be one of clamp, add, got 'max'", eps_mode="max")
    yield bad("eps-mode-none", TypeError, "eps_mode must be a string, got NoneType", eps_mode=None)


def _max_bad_inputs() -> Iterator[BadInput]:
    q, s = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 5, 4)

    def bad(id: str, error: type[Exception], message: str, **options: Any) -> BadInput:
        return BadInput(id, (q, s), options, error, f"dense_cosine_max: {message}")

    yield from _common_bad_inputs("dense_cosine_max")
    yield bad("windows-int", TypeError, "windows must be a sequence of pairs (dh, dw), got int", windows=3)
    yield bad("windows-flat", TypeError, "windows must hold pairs (dh, dw) of int, got 3", windows=(3, 3))
    yield bad(
        "windows-triple", TypeError, "windows must hold pairs (dh, dw) of int, got (3, 3, 1)", windows=[(3, 3, 1)]
    )
    yield bad("windows-float", TypeError, "windows must hold pairs (dh, dw) of int, got (3.0, 1)", windows=[(3.0, 1)])
    yield bad("windows-none", ValueError, "windows must hold at least one pair (dh, dw), got none", windows=())
    yield bad("windows-even", ValueError, "windows must have odd sizes >= 1, got 3 x 2", windows=((1, 1), (3, 2)))
    yield bad("windows-negative", ValueError, "windows must have odd sizes >= 1, got -1 x 1", windows=((-1, 1),))
    yield bad("masked", ValueError, "masked must be one of zero, exclude, got 'drop'", masked="drop")
    yield bad("masked-bool", TypeError, "masked must be a string, got bool", masked=True)


def _benchmark_sample(
    batch: int,
    channels: int,
    grid: int,
    image: int = 0,
    dpcn: bool = False,
    shots: int = 1,
    foreground: float = A_FIFTH,
) -> Sample:
    """Random features, without a mask or under a foreground disc of about 20 %, or of that share (image: size of the
    mask)."""
    generator = torch.Generator().manual_seed(batch)
    tensors = {
        "query": torch.randn(batch, channels, grid, grid, generator=generator),
        "support": torch.randn(batch, shots, channels, grid, grid, generator=generator),
    }
    if image:
        tensors["mask"] = disc(batch * shots, image, foreground).view(batch, shots, image, image)
    return Sample("benchmark", tensors, {"windows": _DPCN} if dpcn else {})


def _sizes(sample: Sample) -> tuple[int, int, int, int, int]:
    """B, N, C, Nq, Ns."""
    query, support, _ = _folded(sample.tensors["query"], sample.tensors["support"], None)
    return query.shape[0], support.shape[0], query.shape[1], query.shape[2:].numel(), support.shape[2:].numel()


def _elements(sample: Sample) -> int:
    """Window elements of all maps of a query pixel."""
    return sum(dh * dw for dh, dw in sample.options.get("windows", ((1, 1),)))


def _cost(sample: Sample, dtype: torch.dtype, mode: str) -> Cost:
    """Operands read once, scores and indices written; for gradients the operands once more and their gradients written,
    and two sums of vectors a winning pair. Products of kept support pixels only."""
    batch, pairs, channels, rows, columns = _sizes(sample)
    size = torch.empty(0, dtype=dtype).element_size()
    kept = pairs * columns
    if "mask" in sample.tensors:
        _, support, mask = _folded(*(sample.tensors[n] for n in ("query", "support", "mask")))
        kept = int(reference.kept_pixels(mask, support.float()).sum())
    operands = channels * (batch * rows + pairs * columns) * size
    results = pairs * len(sample.options.get("windows", ((1, 1),))) * rows * (size + 8)
    flops = 2 * kept * rows * channels
    screened = _elements(sample) == 1 and dtype == torch.float32
    if mode == "forward":
        return Cost(operands + results, flops, screened=screened)
    flops += 4 * pairs * rows * _elements(sample) * channels
    return Cost(3 * operands + 2 * results, flops, screened=screened)


def _scratch_bytes(sample: Sample, dtype: torch.dtype, match: bool = False) -> int:
    """One packed sample of the query and a chunk of the support; running maxima and, for a match, those of every
    support pixel of the chunk by block of columns; the rows of cosines that windows reach; norms and the resized mask.
    With the screen: larger chunks, both operands once more in bfloat16, the errors of that and, for a match, the bounds
    of every support pixel of the chunk by strip.
    """
    size = 8 if dtype == torch.float64 else 4
    batch, pairs, channels, rows, columns = _sizes(sample)
    (height, width), support_width = sample.tensors["query"].shape[2:], sample.tensors["support"].shape[-1]
    windows = sample.options.get("windows", ((1, 1),))
    up, left = max(dh for dh, _ in windows) // 2, max(dw for _, dw in windows) // 2
    positions = -(-height * (width + left) // 48) * 48
    screen = size == 4 and up + left == 0 and channels >= 64 and _loading.cpu_isa() == "avx512_bf16"
    chunk = -(-2 * support_width // 16) * 16 if up + left else ((2 + 2 * screen) << 20) // (channels * size) // 16 * 16
    chunk = min(-(-columns // 16) * 16, max(16, chunk))
    blocks = -(-positions // 48 // min(8, max(1, (384 << 10) // (48 * channels * (2 if screen else size)))))
    ring = (2 * up + 2) * support_width * (positions + 2 * (up * (width + left) + left)) if up + left else 0
    values = (channels + 1) * (positions + chunk) + 2 * len(windows) * positions + ring
    values += match * (positions + 2 * blocks * chunk) + batch * rows + 2 * pairs * columns
    if screen:
        values += (-(-channels // 2) + 1) * (positions + chunk) + match * chunk * (positions // 48)
    return values * size + 4 * positions + 5 * columns


_COMMON: dict[str, Any] = {
    "features": ("query", "support"),
    "differentiable": ("query", "support"),
    "benchmark_sample": _benchmark_sample,
    "cost": _cost,
    "counted": ("support", "mask"),
    "indexed": True,
    "units": {"grid": "pixels a side", "batch": "samples", "shots": "images", "foreground": "fraction"},
    "computes": "largest cosine of every query pixel with the masked support, and its position, for pixels or windows; "
    "`match` gives both directions",
    "replaces": "PFENet's prior, DPCN's support activation, the cycle test of DPNet and CyCTR",
}
SPECS = {
    "dense_cosine_max": Spec(
        name="dense_cosine_max",
        signature=("(query, support, mask=None, *, windows=((1, 1),), masked='zero', eps=1e-07, eps_mode='clamp')"),
        function=_max_scores,
        public=dense_cosine_max,
        op=max_op,
        reference=_max_reference,
        plain=_plain_max,
        arguments=_max_arguments,
        samples=_max_samples,
        bad_inputs=_max_bad_inputs,
        sizes={
            "1x512x60x60": {"batch": 1, "channels": 512, "grid": 60},
            "1x2048x60x60": {"batch": 1, "channels": 2048, "grid": 60},
            "1x512x60x60-fg20": {"batch": 1, "channels": 512, "grid": 60, "image": 473},
            "1x2048x60x60-fg20": {"batch": 1, "channels": 2048, "grid": 60, "image": 473},
            "1x512x81x81-fg20": {"batch": 1, "channels": 512, "grid": 81, "image": 641, "modes": ("forward",)},
            "1x2048x60x60-dpcn": {"batch": 1, "channels": 2048, "grid": 60, "image": 473, "dpcn": True},
        },
        base={"batch": 1, "channels": 512, "grid": 60, "image": 473, "shots": 1},
        axes={
            "grid": (30, 45, 60, 90, 128),
            "channels": (128, 256, 512, 1024, 2048),
            "batch": (1, 2, 4, 8),
            "shots": (1, 5, 10),
            "foreground": (0.02, 0.1, 0.2, 0.6, 1.0),
        },
        scratch_bytes=_scratch_bytes,
        cosines=lambda options: {"windows": (*options.get("windows", ()), (1, 1))},
        **_COMMON,
    ),
    "dense_cosine_match": Spec(
        name="dense_cosine_match",
        signature="(query, support, mask=None, *, eps=1e-07, eps_mode='clamp')",
        function=_match_scores,
        public=dense_cosine_match,
        op=match_op,
        reference=_match_reference,
        plain=_plain_match,
        arguments=_match_arguments,
        samples=lambda: _common_samples(5),
        bad_inputs=lambda: _common_bad_inputs("dense_cosine_match"),
        sizes={"1x512x60x60": {"batch": 1, "channels": 512, "grid": 60}},
        base={"batch": 1, "channels": 512, "grid": 60},
        axes={"grid": (30, 45, 60, 90), "channels": (128, 256, 512, 1024, 2048)},
        scratch_bytes=functools.partial(_scratch_bytes, match=True),
        cosines=lambda options: {},
        **_COMMON,
    ),
}
