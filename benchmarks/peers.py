"""The one registry of peers: what people run today, and the best PyTorch alternatives, written from the formulas.

A peer is called exactly as the op. Its builder may compile; it sees the size's first tensors and options.
"""

from __future__ import annotations

import importlib
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
    backward: bool = True  # has gradients
    released: bool = False  # what published repositories run

    def takes(self, size: Mapping[str, Any], mode: str) -> bool:
        """Whether this peer has a place in a row."""
        return self.applies(size) and (self.backward or mode == "forward")


registry: dict[str, list[Peer]] = defaultdict(list)

# What published repositories run, written from the formulas: the average of most, PFENet's prior and weighted average,
# PANet's average at image size and one cosine a prototype, HSNet's layers, and kernels a sample folded into groups
# (CondConv and its followers). DPCN has no public code: its windows are the paper's.
RELEASED = {
    "masked_avg_pool": ("eager", "pfenet", "panet"),
    "prototype_cosine": ("cosine_similarity",),
    "dense_cosine_max": ("pfenet",),
    "hypercorrelation": ("hsnet",),
    "dynamic_conv2d": ("grouped",),
}
# Not measured on a CPU: compiled, these remain the same library calls, and none was the fastest of any row measured on
# two machines. A GPU run has them.
NOT_ON_CPU = {"dynamic_conv2d": ("compile(grouped)", "compile(per-sample)", "compile(merged-taps)")}


def _always(size: Mapping[str, Any]) -> bool:
    return True


def peer(
    op: str,
    name: str,
    cannot: str,
    applies: Callable[[Mapping[str, Any]], bool] = lambda size: True,
    version: Callable[[], str] = lambda: f"torch {torch.__version__}",
    optional: bool = False,
    backward: bool = True,
) -> Callable[[Build], Build]:
    """Registers a builder as a peer of ``op``."""

    def register(build: Build) -> Build:
        released = name in RELEASED.get(op, ())
        registry[op].append(Peer(name, build, cannot, applies, version, optional, backward, released))
        return build

    return register


def resolve(op: str) -> tuple[list[Peer], list[dict[str, Any]]]:
    """The peers of an op that can run here, and a record of every one: version, or why it is missing."""
    usable, records = [], []
    for p in registry[op]:
        record = {name: getattr(p, name) for name in ("name", "optional", "cannot", "released")}
        record |= {"op": op, "version": None, "error": None}
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


# The mode "max-autotune-no-cudagraphs", which leaves no room for an option, without its table a product on stderr.
MAX_AUTOTUNE = {"max_autotune": True, "coordinate_descent_tuning": True, "autotune_num_choices_displayed": 0}


def autotuned(function: Function) -> Function:
    """The function under torch.compile, which times several codes for every matrix product."""
    return compiled(function) if "backend" in COMPILE else compiled(function, options=MAX_AUTOTUNE)


def _autotuned_peer(op: str, name: str, function: Function, cannot: str, **fields: Any) -> None:
    cannot = f"{cannot}; needs up to a minute of compilation per shape"
    peer(op, f"max-autotune({name})", cannot, **fields)(lambda tensors, options: autotuned(function))


def _gpu_version(module: str, extra: str = "") -> Callable[[], str]:
    """The version of a module whose code for this op runs on a GPU alone."""

    def version() -> str:
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"{error}; pip install '.[{extra}]'") from None
        if not torch.cuda.is_available():
            raise ImportError(f"{module} {found.__version__} does this on a GPU only, and PyTorch sees none")
        return f"{module} {found.__version__}"

    return version


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


_autotuned_peer(
    "masked_avg_pool",
    "bmm",
    _bmm,
    "returns the gradient transposed in memory and has no NaN rule",
    applies=_is_bilinear,
)


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
# No product is among the shifted planes: on a CPU there is nothing to choose from, and the code is that of the default.
_autotuned_peer(
    "dynamic_conv2d", "shifted", _shifted, "reads x once for every tap", version=_gpu_version("torch"), optional=True
)


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
_autotuned_peer("prototype_cosine", "folded-bmm", _folded_norms, _COSINES["folded-bmm"][1])


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
_autotuned_peer("hypercorrelation", "cosine-bmm", _stacked(_cosine_bmm), _CORRELATIONS["cosine-bmm"][1])


# ---- dense_cosine_max, dense_cosine_match --------------------------------------------------------------------------


def _by_shot(query: Tensor, support: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query once a shot, support (N, C, Hs, Ws), and the pixels the mask keeps (N, 1, Hs, Ws)."""
    query = query[:, None].expand(-1, support.shape[1], -1, -1, -1).flatten(0, 1)
    support = support.flatten(0, 1)
    return query, support, None if mask is None else _on_grid(mask.flatten(0, 1)[:, None], support, True) > 0


def _cosine_matrix(query: Tensor, support: Tensor) -> Tensor:
    """PFENet's similarity: one product, divided by the product of the norms."""
    q, s = query.flatten(2), support.flatten(2).transpose(1, 2)
    norms = torch.bmm(s.norm(dim=2, keepdim=True), q.norm(dim=1, keepdim=True))
    return torch.bmm(s, q) / (norms + 1e-7)


def _normalised_matrix(query: Tensor, support: Tensor) -> Tensor:
    return torch.bmm(F.normalize(support.flatten(2), dim=1).transpose(1, 2), F.normalize(query.flatten(2), dim=1))


def _like_scores(best: Tensor, query: Tensor, support: Tensor) -> Tensor:
    """Maps (N, L, Nq) as (B, S, L, Hq, Wq)."""
    return best.view(*support.shape[:2], -1, *query.shape[2:])


def _pfenet_prior(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    q, s, kept = _by_shot(query, support, mask)
    return _like_scores(_cosine_matrix(q, s if kept is None else s * kept).max(1).values, query, support)


def _winners(query: Tensor, support: Tensor, index: Tensor) -> Tensor:
    """Cosines (N, 1, Nq) of every query pixel with its winner, differentiable."""
    chosen = support.flatten(2).gather(2, index[:, None].expand(-1, support.shape[1], -1))
    return (F.normalize(query.flatten(2), dim=1) * F.normalize(chosen, dim=1)).sum(1, keepdim=True)


def _argmax_gather(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    """The rewrite that avoids autograd through the matrix: argmax without gradient, then the winners' cosines."""
    q, s, kept = _by_shot(query, support, mask)
    s = s if kept is None else s * kept
    with torch.no_grad():
        best, index = _normalised_matrix(q, s).max(1)
    return _like_scores(_winners(q, s, index) if torch.is_grad_enabled() else best, query, support)


def _packed_foreground(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sample by sample, only the foreground pixels."""
    q, s, kept = _by_shot(query, support, mask)
    results = []
    for x, y, k in zip(q.flatten(2), s.flatten(2), kept.flatten(1), strict=True):
        chosen = F.normalize(y[:, k], dim=0).T
        best = (chosen @ F.normalize(x, dim=0)).max(0).values
        results.append(best if bool(k.all()) else best.clamp(min=0))
    return _like_scores(torch.stack(results), query, support)


def _faiss_search(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    """faiss' exact inner-product index on normalised, transposed foreground pixels; the winners' cosines with a
    gradient."""
    import faiss

    q, s, kept = _by_shot(query, support, mask)
    results = []
    for x, y, k in zip(q.flatten(2), s.flatten(2), [None] * len(q) if kept is None else kept.flatten(1), strict=True):
        y = y if k is None else y[:, k]
        rows, columns = (F.normalize(t.detach(), dim=0).T.contiguous().numpy() for t in (y, x))
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        scores, at = (torch.from_numpy(r)[:, 0] for r in index.search(columns, 1))
        best = _winners(x[None], y[None], at[None])[0, 0] if torch.is_grad_enabled() else scores
        results.append(best if k is None or bool(k.all()) else best.clamp(min=0))
    return _like_scores(torch.stack(results), query, support)


def _literal_windows(query: Tensor, support: Tensor, mask: Tensor | None = None, windows: Any = ()) -> Tensor:
    """DPCN as written: windows unfolded on both sides, one product for every element of every window."""
    q, s, kept = _by_shot(query, support, mask)
    s, maps = s if kept is None else s * kept, []
    for dh, dw in windows:
        x, y = (
            F.normalize(F.unfold(t, (dh, dw), padding=(dh // 2, dw // 2)).unflatten(1, (t.shape[1], -1)), dim=1)
            for t in (q, s)
        )
        cosines = torch.einsum("ncoi,ncoj->noij", y, x)
        maps.append(cosines.mean(1).max(1).values)
    return _like_scores(torch.stack(maps, 1), query, support)


def _one_matrix_windows(query: Tensor, support: Tensor, mask: Tensor | None = None, windows: Any = ()) -> Tensor:
    """The same from one matrix, by adding shifted copies of it."""
    q, s, kept = _by_shot(query, support, mask)
    (hs, ws), (hq, wq) = s.shape[2:], q.shape[2:]
    cosines = _normalised_matrix(q, s if kept is None else s * kept).view(-1, hs, ws, hq, wq)
    maps = []
    for dh, dw in windows:
        padded = F.pad(cosines, (dw // 2, dw // 2, dh // 2, dh // 2) * 2)
        sums = sum(padded[:, y : y + hs, x : x + ws, y : y + hq, x : x + wq] for y in range(dh) for x in range(dw))
        maps.append((sums / (dh * dw)).flatten(3).flatten(1, 2).max(1).values)
    return _like_scores(torch.stack(maps, 1), query, support)


def _both_maxima(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    q, s, _ = _by_shot(query, support, None)
    cosines = _normalised_matrix(q, s)
    return torch.cat([cosines.max(1).values, cosines.max(2).values], 1).unflatten(0, support.shape[:2])


def _both_argmax_gather(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    q, s, _ = _by_shot(query, support, None)
    with torch.no_grad():
        cosines = _normalised_matrix(q, s)
        (best, index), (other_best, other) = cosines.max(1), cosines.max(2)
    if torch.is_grad_enabled():
        best, other_best = _winners(q, s, index)[:, 0], _winners(s, q, other)[:, 0]
    return torch.cat([best, other_best], 1).unflatten(0, support.shape[:2])


def _pixels(size: Mapping[str, Any]) -> bool:
    return not size.get("dpcn")


def _masked_pixels(size: Mapping[str, Any]) -> bool:
    return _pixels(size) and bool(size.get("image"))


def _windowed(size: Mapping[str, Any]) -> bool:
    return bool(size.get("dpcn"))


def _faiss_version() -> str:
    import faiss

    return f"faiss {faiss.__version__}"


_Applies = Callable[[Mapping[str, Any]], bool]
_DENSE_COSINES: dict[str, dict[str, tuple[Function, str, _Applies]]] = {
    "dense_cosine_max": {
        "pfenet": (_pfenet_prior, "holds the matrix and the product of the norms, for the gradient too", _pixels),
        "argmax-gather": (_argmax_gather, "holds the matrix and multiplies the background", _pixels),
        "packed-foreground": (_packed_foreground, "goes sample by sample and waits for every count", _masked_pixels),
        "literal": (_literal_windows, "holds a matrix for every window element", _windowed),
        "one-matrix": (_one_matrix_windows, "holds the matrix several times and multiplies the background", _windowed),
    },
    "dense_cosine_match": {
        "both-maxima": (_both_maxima, "holds the matrix, for the gradient too", _always),
        "argmax-gather": (_both_argmax_gather, "holds the matrix", _always),
    },
}


def _register_dense_cosines() -> None:
    for op, functions in _DENSE_COSINES.items():
        for name, (function, cannot, applies) in functions.items():
            peer(op, name, cannot, applies)(lambda tensors, options, f=function: f)
            if name not in ("packed-foreground", "literal"):  # data-dependent shapes; gigabytes in either form
                peer(op, f"compile({name})", f"{cannot}; needs seconds of compilation per shape", applies)(
                    lambda tensors, options, f=function: compiled(f)
                )


_register_dense_cosines()
for _op, _name in (
    ("dense_cosine_max", "argmax-gather"),
    ("dense_cosine_max", "one-matrix"),
    ("dense_cosine_match", "both-maxima"),
):
    _function, _cannot, _applies = _DENSE_COSINES[_op][_name]
    _autotuned_peer(_op, _name, _function, _cannot, applies=_applies)


@peer("dense_cosine_max", "faiss", "takes one normalised, transposed sample at a time", _pixels, _faiss_version, True)
def _(tensors, options):
    return _faiss_search


def _keops_argmax(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
    """KeOps' symbolic matrix: normalised vectors, the index of the largest product, then the winners' cosines."""
    from pykeops.torch import LazyTensor

    q, s, kept = _by_shot(query, support, mask)
    s = s if kept is None else s * kept
    rows, columns = (F.normalize(x.detach().flatten(2), dim=1).mT.contiguous() for x in (q, s))
    index = (LazyTensor(rows[:, :, None]) | LazyTensor(columns[:, None])).argmax(dim=2)[..., 0]
    return _like_scores(_winners(q, s, index), query, support)


def _keops_version() -> str:
    import pykeops

    pykeops.set_verbose(False)
    return f"pykeops {pykeops.__version__}"


def _small_pixels(size: Mapping[str, Any]) -> bool:  # its sums over channels are plain loops: seconds at C = 512
    return _pixels(size) and not size.get("image") and size["channels"] <= 512


@peer("dense_cosine_max", "keops", "recomputes the winner's cosine, slow for many channels", _small_pixels,
      _keops_version, True)  # fmt: skip
def _(tensors, options):
    return _keops_argmax


def _unit_rows(query: Tensor, support: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normalised pixels (N, Nq, C) and (N, Ns, C); those of the background are 0."""
    q, s, kept = _by_shot(query, support, mask)
    s = s if kept is None else s * kept
    return F.normalize(q.flatten(2), dim=1).mT.contiguous(), F.normalize(s.flatten(2), dim=1).mT.contiguous()


# Not run on a GPU yet; on a CPU FlexAttention returns no maxima.
@peer("dense_cosine_max", "flex-attention", "copies both sides, goes on to a softmax, has no index and no gradient",
      _pixels, _gpu_version("torch"), optional=True, backward=False)  # fmt: skip
def _(tensors, options):
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attention = compiled(flex_attention)

    def run(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
        q, s = _unit_rows(query, support, mask)
        values = s.new_zeros(len(s), 1, s.shape[1], 16)  # the narrowest it takes
        _, found = attention(q[:, None], s[:, None], values, scale=1.0, return_aux=AuxRequest(max_scores=True))
        return _like_scores(found.max_scores, query, support)

    return run


MaxSim = Callable[[Tensor, Tensor], Tensor]


def maxsim_map(maxsim: MaxSim) -> Function:
    """The op from sums over a query's tokens of their best scores: tokens (n, l, C), others (1, m, C) -> (n, 1).

    Without gradient, queries have 128 pixels, and the gradient of the sum to a pixel is its winner. With gradient every
    pixel is a query of its own: within a query all pixels would share one factor.
    """

    def best(pixels: Tensor, others: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return maxsim(pixels[:, None], others)[:, 0]
        tokens = F.pad(pixels, (0, 0, 0, -len(pixels) % 128)).unflatten(0, (-1, 128)).detach()
        with torch.enable_grad():
            (winners,) = torch.autograd.grad(maxsim(tokens.requires_grad_(), others).sum(), tokens)
        return (pixels * winners.flatten(0, 1)[: len(pixels)]).sum(1)

    def run(query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
        q, s = _unit_rows(query, support, mask)
        return _like_scores(torch.stack([best(x, y[None]) for x, y in zip(q, s, strict=True)]), query, support)

    return run


_SUMS_ONLY = "returns only the sum over a query: pixels come from its gradient, or from one query a pixel"


# Not run on a GPU yet, both.
@peer("dense_cosine_max", "flash-maxsim", _SUMS_ONLY, _pixels, _gpu_version("flash_maxsim", "gpu-peers"), True)
def _(tensors, options):
    from flash_maxsim import flash_maxsim_batched_train

    return maxsim_map(flash_maxsim_batched_train)


@peer("dense_cosine_max", "late-interaction-kernels", _SUMS_ONLY, _pixels,
      _gpu_version("late_interaction_kernels", "gpu-peers"), True)  # fmt: skip
def _(tensors, options):
    from late_interaction_kernels import maxsim

    return maxsim_map(maxsim)
