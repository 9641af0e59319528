"""What tests, ``fss-kernels verify`` and benchmarks share: specs of ops, samples, layouts and one comparison rule.

The rule (`compare`): inputs are rounded to their dtype first; against a float64 oracle, the error of an op may be k
times the error of the plain PyTorch formula in the same dtype (k = 2 forward, 3 backward) plus a floor, in the maximum
and in the root mean square. For float16 and bfloat16 every element is also within 1 ulp of its dtype plus the float32
bound, so a half-precision accumulator does not pass.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fss_kernels import _backends, _loading, _op

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FACTOR = {"forward": 2.0, "backward": 3.0}
# Relative to the largest element: what any order of summation may cost beyond the plain formula.
FLOOR = {torch.float64: 2.0**-47, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
# The float64 reference is compared with the plain formula, whose resize computes positions in floating point.
REFERENCE_FLOOR = 2.0**-40
# A plain formula further off than this is not computing the same thing: its error buys no tolerance beyond it.
PLAIN_CAP = {torch.float64: 2.0**-43, torch.float32: 2.0**-15, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}

# A kernel, an id, the types of its pointers and its constants: what a launcher of Triton instantiates.
Variant = tuple[Any, str, dict[str, Any], dict[str, Any]]
TRITON_DTYPES = ("fp32", "bf16", "fp16")  # of features

A_FIFTH = math.pi / 16  # of an image: a disc whose radius is a quarter of its side


@dataclass(frozen=True, eq=False)
class Sample:
    """Inputs of one call. Floating tensors are float64 and are rounded to the tested dtype by `Spec.cast`."""

    id: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    follow: tuple[str, ...] = ()  # further tensors that take the dtype of the features
    large: bool = False  # only a few layouts
    shared: tuple[str, ...] = ()  # tensors without a batch dimension


@dataclass(frozen=True)
class BadInput:
    """A call that must raise ``error`` with exactly ``message``."""

    id: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class Cost:
    """Least work of one call: bytes that must move, operations, and how many of those bytes are written. ``screened``:
    products of less precision may choose what is computed exactly."""

    bytes: int
    flops: int
    written: int = 0
    screened: bool = False


@dataclass(frozen=True)
class Peer:
    """An alternative to an op, called as the spec's ``function``; an op's folder lists its own in ``peers.py``.

    Peers are frozen: they call PyTorch, or the library that they are, and nothing of this package, so that a ratio to
    them changes with our code alone. Only the benchmarks import them.
    """

    name: str
    function: Callable[..., Any]
    cannot: str  # in one sentence, what the op does and this does not
    applies: Callable[[Mapping[str, Any]], bool] = lambda size: True  # to a size: arguments of `benchmark_sample`
    released: bool = False  # what published repositories run
    form: str = "eager"  # or "compile", "max-autotune": how PyTorch compiles ``function``
    part: Callable[..., Any] | None = None  # compiled in every form, and then the first argument of ``function``
    runs: tuple[str, ...] = ()  # "quick" and "sweep": it has a part in these runs too, as all peers if none says so
    on_cpu: bool = True  # False where on a CPU its code is that of another peer: left out of runs there
    backward: bool = True  # has gradients
    module: str = "torch"  # what it needs; its version is recorded
    extra: str = ""  # the project's extra that installs the module
    gpu_only: bool = False  # the module does this on a GPU only
    optional: bool = False  # may be missing without failing the run

    def takes(self, size: Mapping[str, Any], mode: str) -> bool:
        """Whether this peer has a place in a row."""
        return self.applies(size) and (self.backward or mode == "forward")

    def compiled(self, **changes: Any) -> Peer:
        """The same under ``torch.compile``: no code that was released."""
        return self._formed("compile", "seconds of compilation per shape", changes)

    def autotuned(self, **changes: Any) -> Peer:
        """The same under ``torch.compile``, which times several codes for every matrix product."""
        return self._formed("max-autotune", "up to a minute of compilation per shape", changes)

    def _formed(self, form: str, needs: str, changes: dict[str, Any]) -> Peer:
        cannot = f"{changes.pop('cannot', self.cannot)}; needs {needs}"
        same: dict[str, Any] = {"name": f"{form}({self.name})", "form": form, "released": False, "runs": ()}
        return replace(self, **{**same, "cannot": cannot, **changes})


@dataclass(frozen=True, eq=False)
class Spec:
    """Everything the generic batteries and the benchmarks need to know of one op."""

    name: str
    signature: str  # of the public function, without annotations
    function: Callable[..., Any]  # public function, with every tensor as an argument of its own
    op: _op.Op
    reference: Callable[..., Any]  # differentiable plain PyTorch, same call as `function`: the oracle in float64
    plain: Callable[..., Any]  # the formula as the field writes it, same call: sets the tolerance
    arguments: Callable[..., tuple[Any, ...]]  # the call as positional arguments of the raw forward op
    features: tuple[str, ...]  # tensors that take the tested dtype
    differentiable: tuple[str, ...]
    samples: Callable[[], Iterable[Sample]]
    bad_inputs: Callable[[], Iterable[BadInput]]
    sizes: dict[str, dict[str, Any]]  # label -> arguments of `benchmark_sample`, and "modes" unless all are measured
    benchmark_sample: Callable[..., Sample]
    cost: Callable[[Sample, torch.dtype, str], Cost]  # mode "forward", "forward+backward" or one of `wanted`
    scratch_bytes: Callable[[Sample, torch.dtype], int]  # extra memory of a forward call
    public: Callable[..., Any] | None = None  # where it takes lists of tensors and `function` does not
    wanted: dict[str, tuple[str, ...]] = field(default_factory=dict)  # benchmark mode -> whose gradients it takes
    # arguments of `benchmark_sample` and, one varied at a time, other values of them: the plots of time and memory
    base: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, tuple[float, ...]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)  # of the axes that have one
    computes: str = ""  # what the README's table of ops says of this op, or of its whole folder
    replaces: str = ""
    static: dict[str, tuple[int, ...]] = field(default_factory=dict)  # tensor -> dimensions fixed under torch.compile
    counted: tuple[str, ...] = ()  # tensors of masks, prototypes or shots: of these (dimension 1) there may be 0
    channel_dim: dict[str, int] = field(default_factory=dict)  # feature tensor -> its dimension of channels, if not -3
    # Results that are cosines, with eps=0 and with what this function of a call's options changes in them.
    cosines: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    indexed: bool = False  # the public function returns every map of scores and then its index; `function` scores alone

    def gradients_of(self, mode: str, tensors: Iterable[str]) -> list[str]:
        """Those of the named tensors whose gradients a benchmark mode takes."""
        features = () if mode == "forward" else self.features
        return [n for n in self.wanted.get(mode, features) if n in self.differentiable and n in tensors]

    def cast(self, sample: Sample, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """The tensors of a sample rounded to the tested dtype; other floating tensors to its accumulation type."""
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        cast = {}
        for name, tensor in sample.tensors.items():
            if tensor.is_floating_point():
                tensor = tensor.to(dtype if name in self.features + sample.follow else accumulate)
            cast[name] = tensor.to(device)
        return cast


def disc(batch: int, size: int, share: float) -> Tensor:
    """Masks (batch, size, size) of one disc, whose centre moves with the sample: this share of the image."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    i = torch.arange(batch).view(batch, 1, 1)
    distance = (y - 0.3 * torch.sin(1.0 + i)) ** 2 + (x - 0.3 * torch.cos(2.0 * i)) ** 2
    nearest = distance.flatten(1).argsort(1)[:, : max(1, round(share * size * size))]
    return torch.zeros(batch, size * size).scatter_(1, nearest, 1.0).view(batch, size, size)


def part(op: _op.Op, name: str, member: str, purpose: str) -> Any:
    """What a module in the op's folder defines: every op brings its own spec, random calls and variants of kernels.

    Raises:
        ImportError: the module or its member is missing; the message names the file and what it has to define.
    """
    path = f"fss_kernels.ops.{op.folder}.{name}"
    file = f"{path.replace('.', '/')}.py"
    if importlib.util.find_spec(path) is None:
        raise ImportError(f"{op.name}: {file} is missing; it has to define {member}: {purpose}")
    module = importlib.import_module(path)
    if not hasattr(module, member):
        raise ImportError(f"{op.name}: {file} has to define {member}: {purpose}")
    return getattr(module, member)


def specs() -> dict[str, Spec]:
    """The spec of every op, by name; a folder of several ops has `SPECS`."""
    found = {}
    for name, op in _op.ops.items():
        if op.folder != name:
            found[name] = part(op, "spec", "SPECS", "a fss_kernels.testing.Spec for every op, by name")[name]
        else:
            found[name] = part(op, "spec", "SPEC", "a fss_kernels.testing.Spec")
    return found


def _sliced(x: Tensor) -> Tensor:
    big = x.new_empty([n + 3 for n in x.shape]).fill_(math.nan if x.is_floating_point() else 1)
    view = big[tuple(slice(1, 1 + n) for n in x.shape)]
    return view.copy_(x)


def _offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def _channels_last(x: Tensor) -> Tensor:
    if x.ndim == 5:  # (B, S, C, H, W)
        return _channels_last(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _channels_last_sliced(x: Tensor) -> Tensor:
    if x.ndim != 4:
        return _offset(x)
    return _channels_last(torch.cat([x, x[:, :3]], 1))[:, : x.shape[1]]


# Name -> the same values (for "expanded": the first sample repeated) with other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": _channels_last,
    "offset": _offset,  # dense, not aligned
    "sliced": _sliced,  # a window of a larger tensor
    "channels_last_sliced": _channels_last_sliced,
    "permuted": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[:1].expand(x.shape),
}
LARGE_LAYOUTS = ("contiguous", "channels_last", "offset")


@dataclass(frozen=True)
class Comparison:
    """How far a result is from the oracle: the largest ratio of observed to allowed error; passes up to 1."""

    ratio: float
    exact: bool  # no difference at all
    message: str

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0


def _maximum(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=info.tiny)))) * info.eps


def compare(
    actual: Tensor,
    oracle: Tensor,
    plain: Tensor,
    direction: str,
    plain32: Tensor | None = None,
    label: str = "",
    floor: float = 0.0,
) -> Comparison:
    """The comparison rule of this module.

    Args:
        actual: result of the op under test.
        oracle: the float64 result for the same rounded inputs.
        plain: result of the plain formula in the tested dtype.
        direction: ``"forward"`` or ``"backward"``.
        plain32: result of the plain formula in float32, needed when the tested dtype is float16 or bfloat16.
        label: what is compared, for the message.
        floor: a larger relative floor than the dtype's, for an oracle that is itself less exact.
    """
    if actual.shape != oracle.shape:
        return Comparison(math.inf, False, f"{label}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    out, want, k = actual.detach().double(), oracle.detach().double(), FACTOR[direction]
    if bool((~out.isfinite() & want.isfinite()).any()):
        return Comparison(math.inf, False, f"{label}: not finite where the oracle is")
    if bool((~want.isfinite()).any()):
        return Comparison(math.inf, False, f"{label}: the oracle is not finite: such values need a test of their own")
    error = out - want

    def bound(measure: Callable[[Tensor], float], result: Tensor, dtype: torch.dtype) -> float:
        scale = measure(want)
        # in this order: a plain formula that overflows to NaN buys no more than the cap
        plain_error = min(PLAIN_CAP[dtype] * scale, measure(result.detach().double() - want))
        return k * plain_error + max(floor, FLOOR[dtype]) * scale + torch.finfo(dtype).tiny

    allowed = bound(_maximum, plain, plain.dtype)
    ratios = {"maximum": _maximum(error) / allowed, "rms": _rms(error) / bound(_rms, plain, plain.dtype)}
    if plain32 is not None and out.numel():
        by_element = torch.full_like(want, bound(_maximum, plain32, torch.float32))
        if actual.dtype in (torch.float16, torch.bfloat16):
            by_element += _ulp(want, actual.dtype)
        ratios["ulp"] = (error.abs() / by_element).max().item()
    ratio = max(ratios.values())
    message = ""
    if ratio > 1:
        worst = tuple(int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape))
        message = (
            f"{label}: error {ratio:.3g} times the allowed ({max(ratios, key=lambda r: ratios[r])} rule); worst at "
            f"{worst}: got {out[worst].item():.9g}, expected {want[worst].item():.9g}"
        )
    return Comparison(ratio, not bool(error.any()), message)


def check(*args: Any, **kwargs: Any) -> Comparison:
    """`compare` that raises AssertionError when the result does not pass."""
    result = compare(*args, **kwargs)
    assert result.passed, result.message
    return result


def gradients(
    function: Callable[..., Any],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    wanted: Iterable[str],
    layout: Callable[[Tensor], Tensor] = LAYOUTS["contiguous"],
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a call, and its gradients to the ``wanted`` tensors under fixed pseudo-random output gradients, which
    ``layout`` brings into other strides."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in wanted}
    results = function(*{**tensors, **leaves}.values(), **options)
    outputs = [r for r in ([results] if isinstance(results, Tensor) else results) if r.is_floating_point()]
    generator = torch.Generator().manual_seed(7)
    seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    # rounded to half precision first, so that every dtype sees the same output gradients
    seeds = [
        layout(s.to(torch.bfloat16).to(device=o.device, dtype=o.dtype)) for s, o in zip(seeds, outputs, strict=True)
    ]
    reached = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    grads: tuple[Tensor, ...] = ()
    if leaves:
        grads = torch.autograd.grad([o for o, _ in reached], list(leaves.values()), [s for _, s in reached])
    return [o.detach() for o in outputs], list(grads)


def raw_backward(spec: Spec, results: Any, arguments: tuple[Any, ...], needs: Iterable[bool]) -> tuple[Any, ...]:
    """Arguments of the raw backward op: the forward's results stand for the gradients of its outputs; one flag a
    tensor, false for those that only the raw op has."""
    op, given, flags = spec.op, dict(zip(spec.op.forward_call.names, arguments, strict=True)), iter(needs)
    given |= dict(zip(op.results, results, strict=True))
    given |= {f"grad_{name}": given[name] for name in op.outputs}
    for name in op.inputs:
        lists = name in op.lists
        given[f"need_{name}"] = [next(flags, False) for _ in given[name]] if lists else next(flags, False)
    return tuple(given[name] for name in op.backward_call.names)


def differentiable_names(spec: Spec, tensors: dict[str, Tensor]) -> list[str]:
    """The differentiable tensors of a sample that are floating."""
    return [name for name in spec.differentiable if name in tensors and tensors[name].is_floating_point()]


def evaluate(
    spec: Spec, sample: Sample, backend: str | None, dtype: torch.dtype, layout: str, device: str = "cpu"
) -> list[tuple[str, Comparison]]:
    """Runs one sample on one backend; one comparison an output and a gradient, labelled by name."""
    tensors = {name: LAYOUTS[layout](t) for name, t in spec.cast(sample, dtype, device).items()}
    names = differentiable_names(spec, tensors)
    expected = _expected(spec, sample, dtype, layout == "expanded", device)
    return judge(spec, tensors, sample.options, names, backend, dtype, f"[{sample.id}] {layout}", expected=expected)


Results = tuple[list[Tensor], list[Tensor]]  # of `gradients`


@dataclass(frozen=True)
class _Expected:
    """What a call is compared with: the oracle of the tensors as rounded, the plain formula in the tested dtype and,
    where that has half precision, in float32."""

    oracle: Results
    plain: Results
    plain32: Results | None


def _expectation(
    spec: Spec, tensors: dict[str, Tensor], options: dict[str, Any], names: list[str], dtype: torch.dtype
) -> _Expected:
    def rounded(to: torch.dtype) -> dict[str, Tensor]:
        return {k: t.to(to) if t.is_floating_point() else t for k, t in tensors.items()}

    half = dtype in (torch.float16, torch.bfloat16)
    return _Expected(
        gradients(spec.reference, rounded(torch.float64), options, names),
        gradients(spec.plain, rounded(dtype), options, names),
        gradients(spec.plain, rounded(torch.float32), options, names) if half else None,
    )


@functools.lru_cache(maxsize=2)  # neighbouring calls are of one sample: strides do not change what is right
def _expected(spec: Spec, sample: Sample, dtype: torch.dtype, expanded: bool, device: str) -> _Expected:
    layout = LAYOUTS["expanded" if expanded else "contiguous"]
    tensors = {name: layout(t) for name, t in spec.cast(sample, dtype, device).items()}
    return _expectation(spec, tensors, sample.options, differentiable_names(spec, tensors), dtype)


def judge(
    spec: Spec,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    names: list[str],
    backend: str | None,
    dtype: torch.dtype,
    label: str = "",
    layout: Callable[[Tensor], Tensor] = LAYOUTS["contiguous"],
    expected: _Expected | None = None,
) -> list[tuple[str, Comparison]]:
    """Compares a call, and its gradients to the tensors of these names, with the oracle.

    Args:
        tensors: as the op gets them, the features in ``dtype``.
        label: what the message says of the call besides op, backend and dtype.
        layout: gives the output gradients other strides; with the same values only.
        expected: the oracle of these values, if it is known.
    """
    expected = expected or _expectation(spec, tensors, options, names, dtype)
    with _backends.use_backend(backend):
        actual = gradients(spec.function, tensors, options, names, layout)
    # the float64 reference cannot be its own oracle
    itself = backend == "reference" and dtype == torch.float64
    oracle = expected.plain if itself else expected.oracle

    comparisons = []
    for part, direction in enumerate(("forward", "backward")):
        for i, result in enumerate(actual[part]):
            name = f"output {i}" if direction == "forward" else f"grad_{names[i]}"
            what = f"{spec.name}{label} {backend} {dtype} {name}"
            like = expected.plain32[part][i] if expected.plain32 else None
            floor = REFERENCE_FLOOR if itself else 0.0
            found = compare(result, oracle[part][i], expected.plain[part][i], direction, like, what, floor)
            comparisons.append((name, found))
    return comparisons


def backends(op: _op.Op, device: str = "cpu") -> list[str]:
    """The backends that can run an op on a device type here."""
    return [b for b in _loading.BACKENDS if op.why_not(b, device) is None]


def takes(sample: Sample, layout: str) -> bool:
    """Whether to run a sample in a layout: large ones in a few only."""
    return not sample.large or layout in LARGE_LAYOUTS
