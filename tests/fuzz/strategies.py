"""Hypothesis strategies: calls of every op with random shapes, strides, dtypes, masks, options and wanted gradients."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from conftest import SPECS
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import Tensor

from fss_kernels import testing
from fss_kernels._checks import MASK_DTYPES
from fss_kernels._resize import resize_mask

# `make fuzz` says how many examples a test has to try; a plain run tries few, always the same.
COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.differing_executors],
}
settings.register_profile("few", max_examples=40, derandomize=True, **COMMON)
settings.register_profile("fuzz", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "0")) or 20, **COMMON)
settings.load_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "few")

BY_NAME = {spec.name: spec for spec in SPECS}
WIDE = (torch.float32, torch.float64)
NUDGE = 2.0**-20
EPS = (1e-5, 1e-7, 0.25, 1.5)


@dataclass(frozen=True)
class Layout:
    """The same values (with ``repeat``: the first sample's for all) in other memory: dimensions stored in this order,
    one of them a window of a longer one, one of them every second element, the whole so many elements off."""

    order: tuple[int, ...]
    cut: int | None
    step: int | None
    offset: int
    repeat: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        order = [d for d in self.order if d < x.ndim]
        stored = [x.shape[d] * (1 + (d == self.step)) + 3 * (d == self.cut) for d in order]
        count = int(torch.tensor(stored).prod())
        memory = torch.full((self.offset + count,), torch.nan if x.is_floating_point() else 1, dtype=x.dtype)
        slices = [slice((d == self.cut), None, 1 + (d == self.step)) for d in order]
        view = memory[self.offset :].view(stored)[tuple(slices)]
        view = view[tuple(slice(x.shape[d]) for d in order)].permute([order.index(d) for d in range(x.ndim)])
        view.copy_(x)
        return view[:1].expand(x.shape) if self.repeat else view


PLAIN = Layout(tuple(range(6)), None, None, 0)


def layouts(repeat: bool = True) -> st.SearchStrategy[Layout]:
    axis = st.none() | st.integers(0, 5)
    offset = st.integers(0, 9)
    return st.builds(
        Layout, st.permutations(range(6)).map(tuple), axis, axis, offset, st.booleans() if repeat else st.just(False)
    )


@dataclass(frozen=True)
class Case:
    """One call of an op on a backend."""

    op: str
    backend: str
    dtype: torch.dtype
    shapes: dict[str, str]
    options: dict[str, Any]
    layouts: dict[str, Layout]
    grad_layout: Layout
    wanted: list[str]
    values: str
    tensors: dict[str, Tensor] = field(repr=False)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis prints: the tensors follow from the rest."""
        printer.text(repr(self))

    @property
    def spec(self) -> testing.Spec:
        return BY_NAME[self.op]

    def run(self, **changed: Any) -> Tensor:
        """The op's output for these tensors and options, or for others in their place."""
        tensors = {n: changed.pop(n, t) for n, t in self.tensors.items()}
        return self.spec.function(*tensors.values(), **{**self.options, **changed})


def sizes(largest: int) -> st.SearchStrategy[int]:
    """Mostly small."""
    return st.one_of(st.integers(1, min(4, largest)), st.integers(1, largest))


CHANNELS = st.one_of(st.integers(1, 9), st.integers(2, 40), st.sampled_from((64, 65, 96)))


class Draw:
    """What the ops' strategies share: a source of choices, and one of values that follows from a drawn seed."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.kind, self.power = draw(st.sampled_from(("normal", "relu"))), draw(st.sampled_from((0, -4, 4)))
        self.seed = draw(st.integers(0, 2**32 - 1))
        self.generator = torch.Generator().manual_seed(self.seed)

    def size(self, largest: int) -> int:
        return self.draw(sizes(largest))

    def grid(self, largest: int) -> tuple[int, int]:
        return self.size(largest), self.size(largest)

    def of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def features(self, *shape: int, channels: int = 1) -> Tensor:
        """Vectors along dimension ``channels``, none of them 0."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) + 0.3
        if self.kind == "relu":
            x.clamp_(min=0)
            x.select(channels, 0).add_(0.1)
        return x * 2.0**self.power

    def mask(self, *shape: int) -> Tensor:
        """Any dtype that an op takes; float32 is the one that it computes in."""
        u = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        kind = self.of("soft", "binary", "ones", "zeros", "one")
        mask = {
            "soft": u + 0.1,
            "binary": (u > 0.6).double(),
            "ones": torch.ones_like(u),
            "zeros": torch.zeros_like(u),
            "one": (u.flatten(-2) == u.flatten(-2).amax(-1, keepdim=True)).view(shape).double(),
        }[kind]
        return mask.to(self.of(torch.float32, *MASK_DTYPES))

    def normalisation(self, mask: Tensor | None, *channels: int) -> dict[str, Any]:
        """eps and its mode: 0 only where the plain formula does not divide by it; of one channel the gradient is 0 but
        for what a large eps that is added leaves of it."""
        if 1 in channels:
            return {"eps": 1.5 * 2.0**self.power, "eps_mode": "add"}
        zero = (0.0,) if mask is None or bool((mask > 0).all()) else ()
        return {"eps": self.of(*EPS, *zero), "eps_mode": self.of("clamp", "add")}


def masked_avg_pool(d: Draw) -> tuple[dict[str, Tensor], dict[str, Any]]:
    batch, channels, grid = d.size(3), d.draw(CHANNELS), d.grid(20)
    mask_grid = d.of(grid, d.grid(24))
    masks = d.of((), (1,), (2,), (5,))
    tensors = {"features": d.features(batch, channels, *grid), "mask": d.mask(batch, *masks, *mask_grid)}
    resize, align_corners = d.of("bilinear", "nearest", "adjoint"), d.of(True, False)
    return tensors, {"eps": d.of(0.0, 1e-5, 5e-4, 0.25), "resize": resize, "align_corners": align_corners}


def prototype_cosine(d: Draw) -> tuple[dict[str, Tensor], dict[str, Any]]:
    batch, channels, count = d.size(3), d.draw(CHANNELS), d.of(1, 2, 3, 5, 12, 0)
    sets = d.of((batch,), ())
    tensors = {
        "features": d.features(batch, channels, *d.grid(20)),
        "prototypes": d.features(*sets, count, channels, channels=-1),
    }
    return tensors, {"scale": d.of(1.0, 20.0, -2.5, 0.0), **d.normalisation(None, channels)}


def _dense(d: Draw) -> tuple[dict[str, Tensor], dict[str, Any]]:
    batch, channels, grid, support_grid = d.size(2), d.draw(CHANNELS), d.grid(9), d.grid(9)
    shots = d.of((), (1,), (2,), (3,))
    tensors = {
        "query": d.features(batch, channels, *grid),
        "support": d.features(batch, *shots, channels, *support_grid, channels=1 + len(shots)),
    }
    if d.of(True, False):
        tensors["mask"] = d.mask(batch, *shots, *d.of(support_grid, d.grid(12)))
    return tensors, d.normalisation(tensors.get("mask"), channels)


def dense_cosine_max(d: Draw) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, options = _dense(d)
    odd = st.sampled_from((1, 3, 5))
    windows = d.draw(st.lists(st.tuples(odd, odd), min_size=1, max_size=3))
    return tensors, {**options, "windows": tuple(windows), "masked": d.of("zero", "exclude")}


def dense_cosine_match(d: Draw) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _dense(d)


def hypercorrelation(d: Draw) -> tuple[dict[str, Tensor], dict[str, Any]]:
    batch, levels = d.size(2), d.of(None, (1,), (2,), (1, 2), (3,))
    queries, supports = [], []
    for layers in levels or (1,):
        grid, support_grid = d.grid(7), d.grid(9)
        for _ in range(layers):
            channels = d.draw(CHANNELS)
            queries.append(d.features(batch, channels, *grid))
            supports.append(d.features(batch, channels, *support_grid))
    tensors = {f"query{i or ''}": q for i, q in enumerate(queries)}
    tensors |= {f"support{i or ''}": s for i, s in enumerate(supports)}
    if d.of(True, False):
        tensors["mask"] = d.mask(batch, *d.of(tuple(supports[0].shape[2:]), d.grid(12)))
    options = d.normalisation(tensors.get("mask"), *(q.shape[1] for q in queries))
    return tensors, {**options, "clamp": d.of(True, False), **({"levels": levels} if levels else {})}


def dynamic_conv2d(d: Draw) -> tuple[dict[str, Tensor], dict[str, Any]]:
    batch, channels, grid = d.size(3), d.draw(CHANNELS), d.grid(24)
    odd = st.sampled_from((1, 3, 5, 7, 9))
    kernels = d.draw(st.lists(st.tuples(odd, odd), min_size=1, max_size=4))
    tensors = {"x": d.features(batch, channels, *grid)}
    tensors |= {f"kernel{i}": d.features(batch, channels, *size) for i, size in enumerate(kernels)}
    return tensors, {"merge": d.of(False, True)}


OPS = {
    f.__name__: f
    for f in (
        masked_avg_pool,
        prototype_cosine,
        dense_cosine_max,
        dense_cosine_match,
        hypercorrelation,
        dynamic_conv2d,
    )
}


COSINES = ("prototype_cosine", "dense_cosine_max", "dense_cosine_match", "hypercorrelation")
EXAMPLES: Counter[str] = Counter()  # tried to the end, by op


def counted(test: Callable[..., None]) -> Callable[..., None]:
    """Counts the examples that a test has tried for the op of its parameter or case."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        test(**arguments)
        EXAMPLES[arguments.get("op") or arguments["case"].op] += 1

    return run


@st.composite
def cases(
    draw: Any,
    op: str,
    backends: tuple[str, ...] = ("cpp", "reference"),
    dtypes: tuple[torch.dtype, ...] = testing.DTYPES,
    plain: bool = False,
) -> Case:
    """Calls of an op; ``plain``: every tensor contiguous."""
    spec, d = BY_NAME[op], Draw(draw)
    tensors, options = OPS[op](d)
    dtype = d.of(*dtypes)
    arranged = {n: PLAIN if plain else draw(layouts()) for n in tensors}
    for name, layout in arranged.items():
        cast = tensors[name].to(dtype) if name in spec.features else tensors[name]
        tensors[name] = layout(cast)
    differentiable = [
        n
        for n in testing.differentiable_names(spec, tensors)
        # the gradient to a mask of less precision than the features is one that the rule has no tolerance for
        if torch.promote_types(tensors[n].dtype, dtype) == tensors[n].dtype
    ]
    if "mask" in differentiable:
        rows, columns = (min(t.shape[d] for t in tensors.values()) for d in (-2, -1))
        if rows * columns == 1:  # one free weight: the mean does not change with it but for what eps leaves of it
            differentiable.remove("mask")
    wanted = [n for n in differentiable if plain or draw(st.integers(0, 3))]
    shapes = {n: f"{str(t.dtype)[6:]}{list(t.shape)}" for n, t in tensors.items()}
    values = f"{d.kind} * 2^{d.power}, seed {d.seed}"
    grad_layout = PLAIN if plain else draw(layouts(repeat=False))
    return Case(op, d.of(*backends), dtype, shapes, options, arranged, grad_layout, wanted, values, tensors)


def nudged(case: Case, sign: float, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors in float64, every feature changed by at most 2^-20 of the largest and every weight of a mask by at
    most 2^-20 of itself."""
    result = {}
    for name, t in case.tensors.items():
        if t.is_floating_point():
            u = 2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1
            t = t.double()
            t = t + sign * NUDGE * u * (t.abs().max() if name in case.spec.features and t.numel() else t)
        result[name] = t
    return result


def assume_settled(case: Case) -> None:
    """Rejects what no tolerance is for: where the reference's results jump (another winner of a maximum, a cosine at
    the clamp, a norm at eps) or move by more than 8 times a nudge, one of three and back, of the inputs and of the
    gradients of the outputs (two of which may cancel), or leave the dtype's range."""
    results = []
    for seed, sign in enumerate((0.0, *(1.0, -1.0) * 3)):
        inputs, generator = (torch.Generator().manual_seed(n) for n in ((seed + 1) // 2, seed))

        def nudge(grad: Tensor, sign: float = sign, generator: torch.Generator = generator) -> Tensor:
            return grad * (1 + sign * NUDGE * (2 * torch.randint(2, grad.shape, generator=generator) - 1))

        tensors = nudged(case, sign, inputs)
        outputs, grads = testing.gradients(case.spec.reference, tensors, case.options, case.wanted, nudge)
        results.append([*outputs, *grads])
    for base, *others in zip(*results, strict=True):
        scale = base.abs().max() if base.numel() else base.new_zeros(())
        assume(bool(scale < torch.finfo(case.dtype).max / 4))
        assume(all(bool(((o - base).abs() <= 8 * NUDGE * scale).all()) for o in others))


def assume_plain(case: Case) -> None:
    """Rejects what the plain formula, the oracle of the float64 reference, defines otherwise: an empty mask without
    eps, and masks that PyTorch's resize, whose positions are rounded, sees elsewhere."""
    mask = case.tensors.get("mask")
    resize = case.options.get("resize", "bilinear")
    if mask is None:
        return
    assume(case.options["eps"] > 0 or bool(mask.flatten(-2).any(-1).all()))
    if resize == "adjoint":
        return
    align_corners = case.options.get("align_corners", True)
    name = "features" if case.op == "masked_avg_pool" else "support"
    grids = [t.shape[-2:] for n, t in case.tensors.items() if n.startswith(name)]
    for grid in grids:
        for dtype in WIDE:
            m = mask.to(dtype).reshape(-1, 1, *mask.shape[-2:])
            ours = resize_mask(m, *grid, resize, align_corners)
            theirs = F.interpolate(
                m, grid, mode=resize, **({} if resize == "nearest" else {"align_corners": align_corners})
            )
            assume(torch.equal(ours == 0, theirs == 0))
            assume(dtype == torch.float32 or bool(((ours - theirs).abs() < 1e-12).all()))
