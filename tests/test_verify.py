"""``fss-kernels``: what `info` says, and that `verify` fails when something is wrong or nothing was tested."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import SPECS, ids, sample_of

from fss_kernels import __main__, _backends, _loading, _op, testing


@pytest.fixture
def few_rows(monkeypatch):
    """One small sample, one layout, one dtype."""
    spec = next(s for s in SPECS if s.name == "masked_avg_pool")
    small = dataclasses.replace(spec, samples=lambda: [sample_of(spec, "soft")])
    monkeypatch.setattr(testing, "specs", lambda: {spec.name: small})
    monkeypatch.setattr(testing, "DTYPES", (torch.float32,))
    monkeypatch.setattr(testing, "LAYOUTS", {"contiguous": testing.LAYOUTS["contiguous"]})
    monkeypatch.setattr(__main__, "_verify_interpreted", lambda *_: (0, ""))
    return spec


def test_info(capsys):
    assert __main__.main(["info"]) == 0
    out = capsys.readouterr().out
    for op in _op.ops:
        assert op in out
    for reason in _loading.unavailable.values():
        assert reason in out


def test_verify_passes(few_rows, capsys):
    assert __main__.main(["verify"]) == 0
    out = capsys.readouterr().out
    assert "verify: 2 rows, 6 cases, all within bounds" in out and "grad_mask" in out


def test_verify_fails_on_a_wrong_kernel(few_rows, monkeypatch, capsys):
    backend = few_rows.op.backends["cpp"]
    wrong = _backends.Backend(lambda *a: [r * 1.0001 for r in backend.forward(*a)], backend.backward, backend.devices)
    monkeypatch.setitem(few_rows.op.backends, "cpp", wrong)
    assert __main__.main(["verify"]) == 1
    assert "times the allowed" in capsys.readouterr().out


def test_verify_fails_on_a_wrong_gradient(few_rows, monkeypatch, capsys):
    backend = few_rows.op.backends["cpp"]
    wrong = _backends.Backend(backend.forward, lambda *a: [r * 1.0001 for r in backend.backward(*a)], backend.devices)
    monkeypatch.setitem(few_rows.op.backends, "cpp", wrong)
    assert __main__.main(["verify"]) == 1
    assert "grad_features: error" in capsys.readouterr().out


def test_verify_fails_on_no_cases(few_rows, monkeypatch, capsys):
    spec = dataclasses.replace(testing.specs()[few_rows.name], samples=lambda: [])
    monkeypatch.setattr(testing, "specs", lambda: {spec.name: spec})
    assert __main__.main(["verify"]) == 1
    assert "0 cases" in capsys.readouterr().out


def test_verify_fails_without_a_gradient(few_rows, monkeypatch, capsys):
    """A gradient that no sample exercises is a failure, not a pass."""
    spec = dataclasses.replace(testing.specs()[few_rows.name], samples=lambda: [sample_of(few_rows, "bool-mask")])
    monkeypatch.setattr(testing, "specs", lambda: {spec.name: spec})
    assert __main__.main(["verify"]) == 1
    assert "grad_mask: 0 cases" in capsys.readouterr().out


def test_verify_fails_on_only_exact_zeros(few_rows, monkeypatch, capsys):
    monkeypatch.setattr(testing, "evaluate", lambda *_: [("output 0", testing.Comparison(0.0, True, ""))])
    assert __main__.main(["verify"]) == 1
    assert "only exact zeros" in capsys.readouterr().out


def test_verify_fails_without_rows(monkeypatch):
    monkeypatch.setattr(testing, "specs", dict)
    monkeypatch.setattr(__main__, "_verify_interpreted", lambda *_: (0, ""))
    assert __main__.main(["verify"]) == 1


def test_verify_reports_the_interpreted_process(few_rows, monkeypatch, capsys):
    """Triton without a GPU is verified by another process; its failure is the failure of the whole."""
    monkeypatch.setattr(__main__, "_verify_interpreted", lambda *_: (1, "of the other process"))
    assert __main__.main(["verify"]) == (0 if torch.cuda.is_available() else 1)
    assert torch.cuda.is_available() or "of the other process" in capsys.readouterr().out


def test_verify_without_the_interpreter(few_rows, monkeypatch):
    monkeypatch.setattr(__main__, "_verify_interpreted", lambda *_: (1, "of the other process"))
    assert __main__.main(["verify", "--no-interpreter"]) == 0


def test_triton_is_verified_in_the_interpreter():
    """One op in a process of its own; tests/interpreted has the others."""
    code, out = __main__._verify_interpreted(["masked_avg_pool"])
    assert code == 0
    assert "triton" in out and "verify: 3 rows, " in out and ", all within bounds" in out and "reference" not in out


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_the_samples_of_a_backend_have_every_gradient(spec, backend):
    taken = [s for s in spec.samples() if __main__._takes(s, backend, "cpu")]
    names = {n for s in taken for n in testing.differentiable_names(spec, spec.cast(s, torch.float32))}
    assert names == set(spec.differentiable)


def test_an_interpreter_that_cannot_run_is_named(few_rows, monkeypatch, capsys):
    """Triton before 3.7 takes int() of arrays with one element, which NumPy refuses since 2.4."""

    class Refused:
        def __int__(self):
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    version = _loading.np.__version__
    monkeypatch.setattr(_loading, "np", SimpleNamespace(zeros=lambda _: 0, __version__=version))
    assert _loading.interpreter_fault("3.6.0") is None
    monkeypatch.setattr(_loading, "np", SimpleNamespace(zeros=lambda _: Refused(), __version__=version))
    assert _loading.interpreter_fault("3.7.0") is None and _loading.interpreter_fault("4.0") is None
    fault = _loading.interpreter_fault("3.6.0")
    assert fault == f"the interpreter of Triton 3.6.0 does not run loops with NumPy {version}"
    monkeypatch.setattr(_loading, "interpreter_fault", lambda _: fault)
    monkeypatch.setattr(__main__, "_verify_interpreted", lambda *_: (1, "of the other process"))
    assert __main__.main(["verify"]) == 0
    assert torch.cuda.is_available() or f"triton on the CPU: not run here ({fault})" in capsys.readouterr().out


def test_verify_takes_known_ops_only(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["verify", "masked_max_pool"])
    assert "unknown op masked_max_pool; there are " in capsys.readouterr().err
