"""torch.compile and torch.export: one graph, the kernel in both directions, dynamic shapes without recompiling."""

from typing import Any

import pytest
import torch
from conftest import SPECS, ids
from torch._dynamo.backends.common import aot_autograd

from fss_kernels import testing


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bound(spec, sample, dtype=torch.float32):
    tensors = spec.cast(sample, dtype)
    names = testing.differentiable_names(spec, tensors)

    def call(*values):
        return spec.function(*values, **sample.options)

    return call, tensors, names


def graph_recorder() -> tuple[Any, list[set[str]]]:
    """A compiler backend that records the ops of the forward and of the backward graph."""
    graphs: list[set[str]] = []

    def record(module, _inputs):
        graphs.append({str(n.target) for n in module.graph.nodes if n.op == "call_function"})
        return module.forward

    return aot_autograd(fw_compiler=record, bw_compiler=record), graphs


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_inductor_fullgraph(spec):
    """Forward and backward under the default compiler equal eager bit for bit."""
    for sample in [s for s in spec.samples() if not s.large][:2]:
        call, tensors, names = bound(spec, sample)
        eager = testing.gradients(call, tensors, {}, names)
        compiled = testing.gradients(torch.compile(call, fullgraph=True), tensors, {}, names)
        for e, c in zip([*eager[0], *eager[1]], [*compiled[0], *compiled[1]], strict=True):
            torch.testing.assert_close(c, e, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_kernel_is_in_both_graphs(spec, layout):
    sample = next(iter(spec.samples()))
    call, tensors, names = bound(spec, sample)
    tensors = {k: testing.LAYOUTS[layout](t) for k, t in tensors.items()}
    backend, graphs = graph_recorder()
    eager = testing.gradients(call, tensors, {}, names)
    compiled = testing.gradients(torch.compile(call, fullgraph=True, backend=backend), tensors, {}, names)
    assert len(graphs) == 2
    assert f"fss.{spec.name}_fwd.default" in graphs[0] and f"fss.{spec.name}_bwd.default" in graphs[1]
    for e, c in zip([*eager[0], *eager[1]], [*compiled[0], *compiled[1]], strict=True):
        torch.testing.assert_close(c, e, rtol=0, atol=0)
        assert c.stride() == e.stride()


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_no_grad_graph(spec):
    sample = next(iter(spec.samples()))
    call, tensors, _ = bound(spec, sample)
    backend, graphs = graph_recorder()
    with torch.no_grad():
        out = torch.compile(call, fullgraph=True, backend=backend)(*tensors.values())
        torch.testing.assert_close(out, call(*tensors.values()), rtol=0, atol=0)
    assert f"fss.{spec.name}_fwd.default" in graphs[0]


def _grown(tensor: torch.Tensor, extra: int, static: tuple[int, ...]) -> torch.Tensor:
    """The tensor with every dimension larger by ``extra``, except some."""
    pads = [n for d in reversed(range(tensor.ndim)) for n in (0, 0 if d in static else extra)]
    return torch.nn.functional.pad(tensor.float(), pads, value=0.5).to(tensor.dtype)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_dynamic_shapes_do_not_recompile(spec):
    sample = next(iter(spec.samples()))
    call, tensors, names = bound(spec, sample)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for extra in (0, 3, 5):
            grown = {k: _grown(t, extra, spec.static.get(k, ())) for k, t in tensors.items()}
            eager = testing.gradients(call, grown, {}, names)
            result = testing.gradients(compiled, grown, {}, names)
            for e, c in zip([*eager[0], *eager[1]], [*result[0], *result[1]], strict=True):
                torch.testing.assert_close(c, e, rtol=0, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_export(spec):
    sample = next(iter(spec.samples()))
    call, tensors, _ = bound(spec, sample)

    class Module(torch.nn.Module):
        def forward(self, *values):
            return call(*values)

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch},) * len(tensors)
    program = torch.export.export(Module(), tuple(tensors.values()), dynamic_shapes=(shapes,))
    assert any(f"{spec.name}_fwd" in str(n.target) for n in program.graph.nodes)
    larger = [torch.cat([t, t]) for t in tensors.values()]
    torch.testing.assert_close(program.module()(*larger), call(*larger), rtol=0, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_compiled_func_grad_is_right_or_raises(spec):
    """Silent zeros are the one outcome that is not allowed."""
    sample = next(iter(spec.samples()))
    call, tensors, _ = bound(spec, sample)
    values = list(tensors.values())

    def loss(x):
        return call(x, *values[1:]).pow(2).sum()

    wanted = torch.func.grad(loss)(values[0])
    try:
        got = torch.compile(torch.func.grad(loss), backend="aot_eager")(values[0])
    except Exception:
        return
    torch.testing.assert_close(got, wanted)


def test_compiled_double_backward_raises():
    spec = SPECS[0]
    call, tensors, names = bound(spec, next(iter(spec.samples())))
    values = [t.requires_grad_(k in names) for k, t in tensors.items()]
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*values)
    (first,) = torch.autograd.grad(out.pow(2).sum(), values[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|torch\.compile"):
        torch.autograd.grad(first.pow(2).sum(), values[0])
