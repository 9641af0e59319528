"""The one registry of peers: what people run today, and the best PyTorch alternatives, written from the formulas.

A peer is called exactly as the op. Its builder may compile; it sees the size's first tensors and options.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]
Build = Callable[[Mapping[str, Tensor], Mapping[str, Any]], Function]


@dataclass(frozen=True)
class Peer:
    """One alternative to an op. ``version`` and ``build`` may raise ImportError when what they need is missing."""

    name: str
    build: Build
    cannot: str  # in one sentence, what the op does and this does not
    applies: Callable[[Mapping[str, Any]], bool]  # to a size: arguments of the spec's benchmark_sample
    version: Callable[[], str]
    optional: bool = False  # may be missing without failing the run


registry: dict[str, list[Peer]] = defaultdict(list)


def _always(size: Mapping[str, Any]) -> bool:
    return True


def peer(
    op: str,
    name: str,
    cannot: str,
    applies: Callable[[Mapping[str, Any]], bool] = lambda size: True,
    version: Callable[[], str] = lambda: f"torch {torch.__version__}",
    optional: bool = False,
) -> Callable[[Build], Build]:
    """Registers a builder as a peer of ``op``."""

    def register(build: Build) -> Build:
        registry[op].append(Peer(name, build, cannot, applies, version, optional))
        return build

    return register


def resolve(op: str) -> tuple[list[Peer], list[dict[str, Any]]]:
    """The peers of an op that can run here, and a record of every one: version, or why it is missing."""
    usable, records = [], []
    for p in registry[op]:
        record = {"op": op, "name": p.name, "optional": p.optional, "cannot": p.cannot, "version": None, "error": None}
        try:
            record["version"] = p.version()
            usable.append(p)
        except ImportError as error:
            record["error"] = str(error)
        records.append(record)
    return usable, records


# ---- masked_avg_pool -----------------------------------------------------------------------------------------------


def _is_adjoint(size: Mapping[str, Any]) -> bool:
    return size.get("resize") == "adjoint"


def _is_bilinear(size: Mapping[str, Any]) -> bool:
    return not _is_adjoint(size)


def _on_grid(mask: Tensor, features: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(mask.to(features.dtype), features.shape[-2:], mode="bilinear", align_corners=align_corners)


def _masked_means(features: Tensor, masks: Tensor, eps: float) -> Tensor:
    """The average as most repositories write it: one mask after the other."""
    means = [(features * m[:, None]).sum((2, 3)) / (m.sum((1, 2))[:, None] + eps) for m in masks.unbind(1)]
    return torch.stack(means, 1)


def _eager(features: Tensor, mask: Tensor, eps: float = 5e-4, align_corners: bool = True) -> Tensor:
    return _masked_means(features, _on_grid(mask, features, align_corners), eps)


def _window_average(features: Tensor, mask: Tensor, eps: float = 5e-4, align_corners: bool = True) -> Tensor:
    """PFENet's weighted average: both sums are averages over the whole map, multiplied back by its size."""
    h, w = features.shape[-2:]
    means = []
    for m in _on_grid(mask, features, align_corners).split(1, 1):
        area = F.avg_pool2d(m, (h, w)) * h * w + eps
        means.append((F.avg_pool2d(features * m, (h, w)) * h * w / area).flatten(1))
    return torch.stack(means, 1)


def _matrix_product(features: Tensor, masks: Tensor, eps: float) -> Tensor:
    sums = torch.bmm(masks.flatten(2), features.flatten(2).transpose(1, 2))
    return sums / (masks.sum((2, 3))[..., None] + eps)


def _bmm(features: Tensor, mask: Tensor, eps: float = 5e-4, align_corners: bool = True) -> Tensor:
    return _matrix_product(features, _on_grid(mask, features, align_corners), eps)


def _panet(features: Tensor, mask: Tensor, eps: float, align_corners: bool, resize: str) -> Tensor:
    """PANet upsamples the features to the mask's size and averages there."""
    upsampled = F.interpolate(features, mask.shape[-2:], mode="bilinear", align_corners=align_corners)
    return _masked_means(upsampled, mask.to(features.dtype), eps)


def _adjoint_bmm(features: Tensor, mask: Tensor, eps: float, align_corners: bool, resize: str) -> Tensor:
    """The same sums by moving the transposed upsampling to the mask, as two small matrix products."""

    def upsampling(source: int, target: int) -> Tensor:
        eye = torch.eye(source, dtype=features.dtype, device=features.device)[None]
        return F.interpolate(eye, target, mode="linear", align_corners=align_corners)[0]  # (source, target)

    mask = mask.to(features.dtype)
    rows, columns = (upsampling(s, t) for s, t in zip(features.shape[-2:], mask.shape[-2:], strict=True))
    masks = rows @ mask @ columns.T
    sums = torch.bmm(masks.flatten(2), features.flatten(2).transpose(1, 2))
    return sums / (mask.sum((2, 3))[..., None] + eps)


# How peers are compiled. A dry run of the GPU stages only traces, with the backend "aot_eager".
COMPILE: dict[str, Any] = {"dynamic": False}


def compiled(function: Function, **options: Any) -> Function:
    """The function under torch.compile."""
    return torch.compile(function, **{**options, **COMPILE})


@peer("masked_avg_pool", "eager", "writes features * mask for every mask and has no NaN rule", _is_bilinear)
def _(tensors, options):
    return _eager


@peer("masked_avg_pool", "pfenet", "writes features * mask for every mask and has no NaN rule", _is_bilinear)
def _(tensors, options):
    return _window_average


@peer("masked_avg_pool", "bmm", "returns the gradient transposed in memory and has no NaN rule", _is_bilinear)
def _(tensors, options):
    return _bmm


@peer("masked_avg_pool", "compile(eager)", "needs seconds of compilation per shape and has no NaN rule", _is_bilinear)
def _(tensors, options):
    return compiled(_eager)


@peer("masked_avg_pool", "compile(bmm)", "needs seconds of compilation per shape and has no NaN rule", _is_bilinear)
def _(tensors, options):
    return compiled(_bmm)


@peer(
    "masked_avg_pool",
    "resize+compile(sums)",
    "needs the resize kept out of the graph by hand, seconds of compilation per shape, and has no NaN rule",
    _is_bilinear,
)
def _(tensors, options):
    means = compiled(_masked_means)

    def run(features: Tensor, mask: Tensor, eps: float = 5e-4, align_corners: bool = True) -> Tensor:
        return means(features, _on_grid(mask, features, align_corners), eps)

    return run


@peer(
    "masked_avg_pool",
    "panet",
    "writes features of the mask's size and its gradient is non-deterministic on CUDA",
    _is_adjoint,
)
def _(tensors, options):
    return _panet


@peer("masked_avg_pool", "compile(panet)", "needs seconds of compilation per shape and has no NaN rule", _is_adjoint)
def _(tensors, options):
    return compiled(_panet)


@peer("masked_avg_pool", "adjoint-bmm", "returns the gradient transposed in memory and has no NaN rule", _is_adjoint)
def _(tensors, options):
    return _adjoint_bmm


# ---- dynamic_conv2d ------------------------------------------------------------------------------------------------


def _join(outputs: list[Tensor], merge: bool) -> Tensor:
    return torch.stack(outputs).sum(0) if merge else torch.cat(outputs, 1)


def _same(kernel: Tensor) -> tuple[int, int]:
    """The padding that keeps the size."""
    return kernel.shape[2] // 2, kernel.shape[3] // 2


def _grouped(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    """What most write: the batch folded into the groups of one convolution a branch."""
    folded = x.reshape(1, -1, *x.shape[2:])
    weights = [k.reshape(folded.shape[1], 1, *k.shape[2:]) for k in kernels]
    outputs = [F.conv2d(folded, w, padding=_same(w), groups=folded.shape[1]).view(x.shape) for w in weights]
    return _join(outputs, merge)


def _grouped_channels_last(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    return _grouped(
        x.reshape(1, -1, *x.shape[2:]).contiguous(memory_format=torch.channels_last).view(x.shape),
        *kernels,
        merge=merge,
    )


def _sample_by_sample(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    """One depthwise convolution a sample and branch."""
    samples = []
    for b in range(x.shape[0]):
        branches = [F.conv2d(x[b : b + 1], k[b, :, None], padding=_same(k), groups=x.shape[1]) for k in kernels]
        samples.append(_join(branches, merge))
    return torch.cat(samples)


def _unfolded(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    outputs = []
    for k in kernels:
        windows = F.unfold(x, k.shape[2:], padding=_same(k)).view(*x.shape[:2], -1, x.shape[2] * x.shape[3])
        outputs.append(torch.einsum("bctn,bct->bcn", windows, k.flatten(2)).view(x.shape))
    return _join(outputs, merge)


def _shifted(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    """Sums of shifted planes: what a compiler fuses best."""
    height, width = x.shape[2:]
    padded, outputs = F.pad(x, (4, 4, 4, 4)), []
    for k in kernels:
        top, left = 4 - k.shape[2] // 2, 4 - k.shape[3] // 2
        outputs.append(
            sum(
                padded[:, :, top + i : top + i + height, left + j : left + j + width] * k[:, :, i, j, None, None]
                for i in range(k.shape[2])
                for j in range(k.shape[3])
            )
        )
    return _join(outputs, merge)


def _merged_taps(x: Tensor, *kernels: Tensor, merge: bool = True) -> Tensor:
    """Summed branches as one convolution with the sum of the padded kernels."""
    height, width = (max(k.shape[d] for k in kernels) for d in (2, 3))
    padded = [F.pad(k, ((width - k.shape[3]) // 2,) * 2 + ((height - k.shape[2]) // 2,) * 2) for k in kernels]
    return _grouped(x, torch.stack(padded).sum(0))


def _merges(size: Mapping[str, Any]) -> bool:
    return bool(size.get("merge"))


_CONVOLUTIONS: dict[str, tuple[Function, str, Callable[[Mapping[str, Any]], bool]]] = {
    "grouped": (_grouped, "reads x once a branch; its gradient to the kernels is a matrix product a plane", _always),
    "grouped-nhwc": (_grouped_channels_last, "copies x into another memory format first", _always),
    "per-sample": (_sample_by_sample, "launches a convolution for every sample and branch", _always),
    "unfold+einsum": (_unfolded, "writes x once for every tap", _always),
    "shifted": (_shifted, "reads x once for every tap", _always),
    "merged-taps": (_merged_taps, "only sums branches", _merges),
}


def _register_convolutions() -> None:
    for name, (function, cannot, applies) in _CONVOLUTIONS.items():
        if name != "shifted":  # eager, it is a hundred passes over x
            peer("dynamic_conv2d", name, cannot, applies)(lambda tensors, options, f=function: f)
        if name not in ("grouped-nhwc", "unfold+einsum"):  # compiled they remain the same calls
            peer("dynamic_conv2d", f"compile({name})", f"{cannot}; needs seconds of compilation per shape", applies)(
                lambda tensors, options, f=function: compiled(f)
            )


_register_convolutions()


# ---- prototype_cosine ----------------------------------------------------------------------------------------------


def _cosine_similarity(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    """PANet and its descendants: one call a prototype, each of which normalises the features again."""
    maps = [F.cosine_similarity(features, p[..., None, None], dim=1) for p in prototypes.unbind(1)]
    return scale * torch.stack(maps, 1)


def _cosine_broadcast(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    """The same as one call that broadcasts features against all prototypes."""
    return scale * F.cosine_similarity(features[:, None], prototypes[..., None, None], dim=2)


def _normalised_einsum(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("bchw,bpc->bphw", F.normalize(features, dim=1), F.normalize(prototypes, dim=2))


def _folded_norms(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    """A matrix product of the features as they are; their norms divide the few maps instead of the many channels."""
    x = features.flatten(2)
    dots = torch.bmm(F.normalize(prototypes, dim=2), x)
    maps = scale * dots * x.square().sum(1, keepdim=True).clamp_min(1e-16).rsqrt()
    return maps.unflatten(2, features.shape[2:])


_COSINES: dict[str, tuple[Function, str]] = {
    "cosine_similarity": (_cosine_similarity, "reads and writes the features several times for every prototype"),
    "cosine_broadcast": (_cosine_broadcast, "holds a product of features and prototypes for every prototype"),
    "normalize+einsum": (_normalised_einsum, "writes a normalised copy of the features"),
    "folded-bmm": (_folded_norms, "reads the features twice, has no add mode and no rule for zero vectors"),
}


def _register_cosines() -> None:
    for name, (function, cannot) in _COSINES.items():
        peer("prototype_cosine", name, cannot)(lambda tensors, options, f=function: f)
        peer("prototype_cosine", f"compile({name})", f"{cannot}; needs seconds of compilation per shape")(
            lambda tensors, options, f=function: compiled(f)
        )


_register_cosines()


# ---- hypercorrelation ----------------------------------------------------------------------------------------------


def _under(mask: Tensor | None, support: Tensor) -> Tensor:
    return support if mask is None else support * _on_grid(mask[:, None], support, True)


def _hsnet(query: Tensor, support: Tensor, mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """HSNet's layer: mask, divide each side by norm + eps, one product, clamp."""
    q, s = query.flatten(2), _under(mask, support).flatten(2)
    q = q / (q.norm(dim=1, p=2, keepdim=True) + eps)
    s = s / (s.norm(dim=1, p=2, keepdim=True) + eps)
    product = torch.bmm(q.transpose(1, 2), s).clamp(min=0)
    return product.view(*query.shape[:1], *query.shape[2:], *support.shape[2:])


def _cosine_bmm(query: Tensor, support: Tensor, mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The fewest passes in eager code: norms without a copy, one factor a side, one product, clamped in place."""
    q, s = query.flatten(2), support.flatten(2)
    u = 1 / (torch.linalg.vector_norm(q, dim=1, keepdim=True) + eps)
    v = torch.linalg.vector_norm(s, dim=1, keepdim=True)
    if mask is None:
        v = 1 / (v + eps)
    else:
        m = _on_grid(mask[:, None], support, True).flatten(2)
        v = m / (v * m + eps)
    product = torch.bmm((q * u).transpose(1, 2), s * v).relu_()
    return product.view(*query.shape[:1], *query.shape[2:], *support.shape[2:])


def _stacked(layer: Function) -> Function:
    """Of a layer's correlation: the same call as the op's, for one layer or, with ``levels``, stacked as HSNet does."""

    def run(*tensors: Tensor, levels: tuple[int, ...] | None = None) -> Any:
        if levels is None:
            return layer(*tensors)
        n = sum(levels)
        layers = [layer(q, s, *tensors[2 * n :]) for q, s in zip(tensors[:n], tensors[n : 2 * n], strict=True)]
        starts = itertools.pairwise(itertools.accumulate(levels, initial=0))
        return [torch.stack(layers[i:j]).transpose(0, 1).contiguous() for i, j in starts]

    return run


_CORRELATIONS: dict[str, tuple[Function, str]] = {
    "hsnet": (_hsnet, "passes over the output several times and multiplies masked-out pixels"),
    "cosine-bmm": (_cosine_bmm, "copies both operands, keeps the output for the gradient, no zero or NaN rule"),
}


def _register_correlations() -> None:
    for name, (layer, cannot) in _CORRELATIONS.items():
        peer("hypercorrelation", name, cannot)(lambda tensors, options, f=layer: _stacked(f))
        peer("hypercorrelation", f"compile({name})", f"{cannot}; needs seconds of compilation per shape")(
            lambda tensors, options, f=layer: compiled(_stacked(f))
        )


_register_correlations()
