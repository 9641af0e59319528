"""Hypothesis strategies: the random calls of every op (`ops/*/fuzz.py`) in random strides, dtypes and backends."""

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
from fss_kernels._fuzz import Draw
from fss_kernels._resize import resize_mask

# `make fuzz` says how many examples a test has to try; a plain run tries few, always the same.
COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.differing_executors],
}
settings.register_profile("few", max_examples=12, derandomize=True, **COMMON)
settings.register_profile("fuzz", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "0")) or 20, **COMMON)
settings.load_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "few")

BY_NAME = {spec.name: spec for spec in SPECS}
WIDE = (torch.float32, torch.float64)
NUDGE = 2.0**-20
OPS = tuple(BY_NAME)
COSINES = tuple(spec.name for spec in SPECS if spec.cosines is not None)


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
    shared: tuple[str, ...]
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
    call = testing.part(spec.op, "fuzz", op, "a function from a fss_kernels._fuzz.Draw to a random testing.Sample")(d)
    tensors, options = dict(call.tensors), call.options
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
    backend = d.of(*backends)
    return Case(op, backend, dtype, shapes, options, arranged, grad_layout, wanted, values, call.shared, tensors)


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
    features = [n for n in case.tensors if n in case.spec.features]
    masked = [n for n in features if n.startswith("support")] or features
    for grid in {case.tensors[n].shape[-2:] for n in masked}:
        for dtype in WIDE:
            m = mask.to(dtype).reshape(-1, 1, *mask.shape[-2:])
            ours = resize_mask(m, *grid, resize, align_corners)
            theirs = F.interpolate(
                m, grid, mode=resize, **({} if resize == "nearest" else {"align_corners": align_corners})
            )
            assume(torch.equal(ours == 0, theirs == 0))
            assume(dtype == torch.float32 or bool(((ours - theirs).abs() < 1e-12).all()))
