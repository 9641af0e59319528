"""What the README promises of every op: exact errors, empties, dtypes of masks, backends, the public signature."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from conftest import SPECS, ids

import fss_kernels
from fss_kernels import _backends, _loading, _op, testing

BAD = [pytest.param(spec, bad, id=f"{spec.name}-{bad.id}") for spec in SPECS for bad in spec.bad_inputs()]


@pytest.mark.parametrize("spec, bad", BAD)
def test_bad_input(spec, bad):
    with pytest.raises(bad.error, match=f"^{re.escape(bad.message)}$"):
        (spec.public or spec.function)(*bad.args, **bad.options)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_public_signature(spec):
    function = spec.public or spec.function
    signature = inspect.signature(function)
    bare = signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()],
        return_annotation=signature.empty,
    )
    assert str(bare) == spec.signature
    assert getattr(fss_kernels, spec.name) is function
    for word in ("Args:", "Returns:", "Raises:", "Example:", "Cost:", "Source"):
        assert word in function.__doc__


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_empty_batch(spec, backend, layout):
    sample = next(iter(spec.samples()))
    tensors = {k: testing.LAYOUTS[layout](t[:0]) for k, t in spec.cast(sample, torch.float32).items()}
    names = testing.differentiable_names(spec, tensors)
    with fss_kernels.use_backend(backend):
        outputs, grads = testing.gradients(spec.function, tensors, sample.options, names)
    full = spec.function(*spec.cast(sample, torch.float32).values(), **sample.options)
    assert outputs[0].shape == (0, *full.shape[1:])
    assert [g.shape for g in grads] == [tensors[n].shape for n in names]


def test_use_backend_errors():
    names = ", ".join(_loading.BACKENDS)
    with pytest.raises(ValueError, match=f"^use_backend: name must be one of {names}, got 'fast'$"):
        fss_kernels.use_backend("fast").__enter__()
    reason = re.escape(_loading.unavailable["triton"])
    with pytest.raises(RuntimeError, match=f"^use_backend: backend 'triton' is not available: {reason}$"):
        fss_kernels.use_backend("triton").__enter__()


def test_use_backend_nests_and_restores():
    assert _backends.forced() is None
    with fss_kernels.use_backend("reference"):
        with fss_kernels.use_backend("cpp"):
            assert _backends.forced() == "cpp"
        assert _backends.forced() == "reference"
    assert _backends.forced() is None


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_backend_is_really_used(spec, monkeypatch):
    """Forcing a backend runs that backend in forward and backward, and the default on CPU is the compiled one."""
    sample = next(iter(spec.samples()))
    tensors = spec.cast(sample, torch.float32)
    names = testing.differentiable_names(spec, tensors)
    used = []
    for name, backend in spec.op.backends.items():

        def spy(direction, run, name=name):
            return lambda *args: (used.append((name, direction)), run(*args))[1]

        spied = _backends.Backend(spy("f", backend.forward), spy("b", backend.backward), backend.devices)
        monkeypatch.setitem(spec.op.backends, name, spied)
    for forced, expected in (("reference", "reference"), ("cpp", "cpp"), (None, "cpp")):
        used.clear()
        with fss_kernels.use_backend(forced):
            outputs = spec.function(*(t.requires_grad_(n in names) for n, t in tensors.items()), **sample.options)
        outputs.sum().backward()  # outside the block
        assert used == [(expected, "f"), (expected, "b")]


def test_meta_tensors_have_shapes():
    out = fss_kernels.masked_avg_pool(torch.empty(2, 3, 8, 8, device="meta"), torch.empty(2, 9, 9, device="meta"))
    assert out.shape == (2, 3) and out.device.type == "meta"


def test_backend_table(monkeypatch):
    """The committed table chooses by GPU, op and size; what nobody has measured is not in it."""
    from fss_kernels import _tuning

    assert _tuning.backend("masked_avg_pool", "no such GPU", 1000) is None
    table = {"GPU A": {"masked_avg_pool": [[1000, "cuda"], [None, "triton"]]}}
    monkeypatch.setattr(_tuning, "_backends", lambda: table)
    _tuning.backend.cache_clear()
    chosen = [_tuning.backend("masked_avg_pool", "GPU A", n) for n in (1, 1000, 1001)]
    assert chosen == ["cuda", "cuda", "triton"]
    assert _tuning.backend("masked_avg_pool", "GPU B", 1) is None
    _tuning.backend.cache_clear()


def test_tests_do_not_need_the_benchmarks():
    """What both need is in the package; tests of the benchmarks aside."""
    folder = Path(__file__).parent
    about = ("test_benchmarks*.py", "test_storage.py", "test_picture.py", "test_gpu_dry.py")
    files = [p for p in folder.rglob("*.py") if not any(map(p.match, about)) and "mutants" not in p.parts]
    importing = re.compile(r"^\s*(from|import) benchmarks\b", re.MULTILINE)
    assert len(files) > 40 and not [p.name for p in files if importing.search(p.read_text())]


DECLARED = {"saved": ("s",), "differentiable": ("x", "w"), "maps": ("x",), "fake": None, "formula": None}


@pytest.mark.parametrize(
    "schema, changed, message",
    [
        ("(Tensor x, float eps, Tensor w) -> (Tensor out, Tensor s)", {}, "tensors before options"),
        ("(Tensor x, Tensor w) -> (Tensor s, Tensor out)", {}, "outputs before saved results"),
        ("(Tensor x, Tensor w) -> (Tensor out, Tensor s)", {"differentiable": ("w", "x")}, "inputs in their order"),
        ("(Tensor x, Tensor w) -> (Tensor out, Tensor s)", {"differentiable": ("x",)}, "two at least"),
        ("(Tensor x, Tensor w) -> (Tensor out)", {"saved": ()}, "saved must hold a result"),
        ("(Tensor x, Tensor w) -> (Tensor out, Tensor s)", {"returned": ("t",)}, "the first of saved"),
        ("(Tensor x, Tensor w) -> (Tensor out, Tensor s)", {"reads": {"x": ("s",)}}, "reads must map"),
        ("(Tensor x, Tensor w) -> (Tensor out, Tensor s)", {"maps": ("w",)}, "the first input among them"),
        ("(Tensor x, Tensor w) -> (Tensor out, Tensor s)", {"batch_dims": {"w": 1}}, "batch_dims must be of saved"),
    ],
)
def test_a_declaration_that_would_be_misread_is_refused(schema, changed, message):
    with pytest.raises(ValueError, match=f"not_declared: .*{message}"):
        _op.Op(f"not_declared{schema}", **DECLARED | changed)
    assert "not_declared" not in _op.ops


def test_what_commands_import_exists():
    text = (Path(__file__).parents[1] / "Makefile").read_text()
    imports = re.findall(r"from (fss_kernels|fss_models|benchmarks) import (\w+)", text)
    modules = re.findall(r"-m ((?:fss_kernels|fss_models|benchmarks)[\w.]*)", text)
    assert imports and {"fss_kernels", "fss_models", "benchmarks"} <= {*modules}
    for module in [*map(".".join, imports), *modules]:
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("spec", [s for s in SPECS if set(s.op.inputs) - set(s.op.differentiable)], ids=ids)
def test_a_gradient_that_an_input_does_not_have_is_refused(spec):
    """The raw op raises where a gradient to the mask is asked for, instead of a silent zero."""
    sample = next(s for s in spec.samples() if not s.large)
    call = spec.op.forward_call.Call(*spec.arguments(*spec.cast(sample, torch.float32).values(), **sample.options))
    for name in set(spec.op.inputs) - set(spec.op.differentiable):
        given = getattr(call, name).float().requires_grad_()
        outputs = spec.op.fwd(*call._replace(**{name: given}))
        with pytest.raises(RuntimeError, match=f"{spec.name}: no gradient to {name}: pass it detached"):
            outputs[0].sum().backward()
