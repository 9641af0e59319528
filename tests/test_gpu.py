"""What only a GPU can show: numerics of its backends, streams, graphs, autograd threads, offsets past 2^31 elements.

Parametrised over every backend, so that collection needs no GPU; a backend that is missing skips with its reason.
"""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from conftest import SPECS, ids
from torch.library import opcheck

import fss_kernels
import fss_models
from fss_kernels import testing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = "cuda"
KERNELS = [(spec, backend) for spec in SPECS for backend in ("triton", "cuda") if backend in spec.op.backends]
HALF = (torch.bfloat16, torch.float16)
OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# every kernel that this version has; one that a machine with a GPU cannot run fails its tests
each_kernel = pytest.mark.parametrize("spec, backend", KERNELS, ids=ids)
CALLS = [
    (spec, backend, dtype)
    for spec, backend in [*((spec, b) for spec in SPECS for b in (None, "reference")), *KERNELS]
    for dtype in testing.DTYPES
    if backend is None or dtype in (spec.op.backends[backend].dtypes or testing.DTYPES)
]
each_dense_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def largest(spec, count):
    """The largest samples that every layout runs."""
    small = [s for s in spec.samples() if not s.large]
    return sorted(small, key=lambda s: -sum(t.numel() for t in s.tensors.values()))[:count]


def on_gpu(spec, sample, dtype=torch.float32, layout="contiguous", device=DEVICE):
    return {k: testing.LAYOUTS[layout](t).detach() for k, t in spec.cast(sample, dtype, device).items()}


def bound(spec, sample, backend):
    """(function of the tensors, forced to a backend; names of the differentiable ones in float32)."""

    def call(*tensors):
        with fss_kernels.use_backend(backend):
            return spec.function(*tensors, **sample.options)

    return call, testing.differentiable_names(spec, on_gpu(spec, sample))


def flat(results):
    return [*results[0], *results[1]]


def assert_same(results, wanted, label=""):
    for r, w in zip(results, wanted, strict=True):
        assert torch.equal(r, w), label


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("spec, backend, dtype", CALLS, ids=ids)
def test_numerics(spec, backend, dtype, layout, poisoned_memory):
    """Every sample, forward and backward, by the one comparison rule; None is the default choice."""
    for sample in (s for s in spec.samples() if testing.takes(s, layout)):
        for name, comparison in testing.evaluate(spec, sample, backend, dtype, layout, DEVICE):
            assert comparison.passed, f"{name}: {comparison.message}"


@each_dense_layout
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=ids)
@each_kernel
def test_200_repeats_give_the_same_bits(spec, backend, dtype, layout):
    for sample in largest(spec, 3):
        call, names = bound(spec, sample, backend)
        tensors = on_gpu(spec, sample, dtype, layout)
        first = flat(testing.gradients(call, tensors, {}, names))
        for _ in range(200):
            assert_same(flat(testing.gradients(call, tensors, {}, names)), first, sample.id)


@each_dense_layout
@each_kernel
def test_batch_neighbours_do_not_matter(spec, backend, layout):
    for sample in (s for s in spec.samples() if not s.large and not s.shared):
        tensors = spec.cast(sample, torch.float32, DEVICE)
        call, names = bound(spec, sample, backend)

        def run(chosen, call=call, names=names):
            held = {k: testing.LAYOUTS[layout](t).detach().requires_grad_(k in names) for k, t in chosen.items()}
            out = call(*held.values())
            (out * out.detach()).sum().backward()
            return [out.detach(), *(held[n].grad for n in names)]

        batch = next(iter(tensors.values())).shape[0]
        together = run(tensors) if batch > 1 else []
        for i in {0, batch - 1} if batch > 1 else ():
            alone = run({k: t[i : i + 1].clone() for k, t in tensors.items()})
            assert_same([a[0] for a in alone], [t[i] for t in together], sample.id)


@each_kernel
def test_runs_on_the_current_stream(spec, backend):
    """Beside a long kernel on the default stream it does not wait; behind one on its own stream it does."""
    sample = largest(spec, 1)[0]
    call, names = bound(spec, sample, backend)
    tensors = on_gpu(spec, sample)
    wanted = flat(testing.gradients(call, tensors, {}, names))
    late = {k: torch.zeros_like(t) for k, t in tensors.items()}
    side = torch.cuda.Stream()
    torch.cuda.synchronize()

    torch.cuda._sleep(2 * 10**9)
    busy = torch.cuda.Event()
    busy.record()
    with torch.cuda.stream(side):
        results = flat(testing.gradients(call, tensors, {}, names))
        side.synchronize()
    assert not busy.query(), "waited for the default stream"
    assert_same(results, wanted)

    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(2 * 10**8)
        for k, t in late.items():
            t.copy_(tensors[k])
        results = flat(testing.gradients(call, late, {}, names))
    torch.cuda.synchronize()
    assert_same(results, wanted, "did not wait for its own stream")


@each_dense_layout
@each_kernel
def test_graph_replays_with_new_inputs(spec, backend, layout):
    """Forward and backward in one CUDA graph."""
    for sample in largest(spec, 3):
        call, names = bound(spec, sample, backend)
        static = on_gpu(spec, sample, layout=layout)
        seed = torch.randn_like(call(*static.values()))

        def step(tensors, call=call, names=names, seed=seed):
            held = {k: t.detach().requires_grad_(k in names) for k, t in tensors.items()}
            out = call(*held.values())
            return [out.detach(), *torch.autograd.grad(out, [held[n] for n in names], seed)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(static)
        for _ in range(3):
            for t in static.values():
                t.copy_(torch.rand_like(t) if t.is_floating_point() else torch.randint_like(t, 0, 2))
            for result in captured:
                result.fill_(float("nan"))
            graph.replay()
            assert_same(captured, step(static), sample.id)


@pytest.mark.parametrize("backend", ("reference", "triton"))  # CUDA has not every op
@pytest.mark.parametrize("name", ("dpcn", "dpnet", "panet"))
def test_networks_replay_with_new_inputs(name, backend, request):
    """Prediction, loss and every gradient of a network in one CUDA graph: nothing in it waits for the device."""
    torch.manual_seed(0)
    model = fss_models.build(name, "tiny").to(DEVICE).eval()
    batch = [torch.randn(2, 3, 65, 65), torch.randn(2, 2, 3, 65, 65)]
    batch += [torch.rand(2, 2, 65, 65).round(), torch.randint(0, 2, (2, 65, 65))]
    static = [t.to(DEVICE) for t in batch]

    def step():
        with fss_kernels.use_backend(backend):
            loss = model.loss(*static)
            return [model(*static[:3]).detach(), loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])]

    torch.use_deterministic_algorithms(True, warn_only=True)  # the resize of the logits is none by default
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for t in static:
            t.copy_(torch.randn_like(t) if t.is_floating_point() else torch.randint_like(t, 0, 2))
        static[2].round_().clamp_(0, 1)
        graph.replay()
        assert_same(captured, step(), name)


@each_kernel
def test_second_device(spec, backend):
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("no second GPU")
    sample = largest(spec, 1)[0]
    call, names = bound(spec, sample, backend)
    first, second = (
        flat(testing.gradients(call, on_gpu(spec, sample, device=device), {}, names)) for device in ("cuda:0", "cuda:1")
    )
    assert {str(r.device) for r in second} == {"cuda:1"}
    assert_same([r.cpu() for r in second], [r.cpu() for r in first])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@each_kernel
def test_opcheck(spec, backend, layout):
    sample = next(s for s in spec.samples() if not s.large)
    tensors = on_gpu(spec, sample, layout=layout)
    for name in testing.differentiable_names(spec, tensors):
        tensors[name].requires_grad_()
    arguments = spec.arguments(*tensors.values(), **sample.options)
    with fss_kernels.use_backend(backend):
        assert set(opcheck(spec.op.fwd, arguments, test_utils=OPCHECK).values()) == {"SUCCESS"}
        results = [r.detach() for r in spec.op.fwd(*arguments)]
        backward = testing.raw_backward(spec, results, arguments, [True] * len(tensors))
        assert set(opcheck(spec.op.bwd, backward, test_utils=OPCHECK).values()) == {"SUCCESS"}


@each_dense_layout
@each_kernel
def test_compile_fullgraph(spec, backend, layout):
    """The default compiler gives eager's bits forward; its backward runs where no backend is forced."""
    sample = next(s for s in spec.samples() if not s.large)
    _, names = bound(spec, sample, backend)
    tensors = on_gpu(spec, sample, layout=layout)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *values: spec.function(*values, **sample.options), fullgraph=True)
    with fss_kernels.use_backend(backend):
        eager = testing.gradients(spec.function, tensors, sample.options, names)
        result = testing.gradients(compiled, tensors, {}, names)
    assert_same(result[0], eager[0])
    for r, e in zip(result[1], eager[1], strict=True):
        torch.testing.assert_close(r, e, rtol=1e-4, atol=1e-5)


@each_dense_layout
@each_kernel
def test_no_host_synchronisation(spec, backend, layout):
    for sample in largest(spec, 3):
        call, names = bound(spec, sample, backend)
        tensors = {k: t.requires_grad_(k in names) for k, t in on_gpu(spec, sample, layout=layout).items()}
        seed = torch.randn_like(call(*tensors.values()))
        wanted = [tensors[n] for n in names]
        torch.autograd.grad(call(*tensors.values()), wanted, seed)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(call(*tensors.values()), wanted, seed)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_kernel
def test_backend_is_forced_in_the_backward_thread(spec, backend, monkeypatch):
    """The autograd engine runs a GPU's backward in a thread that does not see the caller's context."""
    original, calls = spec.op.backends[backend], []

    def spy(direction):
        def run(*args):
            calls.append((direction, threading.get_ident()))
            return getattr(original, direction)(*args)

        return run

    spied = dataclasses.replace(original, forward=spy("forward"), backward=spy("backward"))
    monkeypatch.setitem(spec.op.backends, backend, spied)
    sample = largest(spec, 1)[0]
    call, names = bound(spec, sample, backend)
    tensors = {k: t.requires_grad_(k in names) for k, t in on_gpu(spec, sample).items()}
    call(*tensors.values()).sum().backward()
    assert [direction for direction, _ in calls] == ["forward", "backward"]
    assert calls[0][1] != calls[1][1], "the backward ran in the caller's thread: nothing was tested"


@each_dense_layout
@pytest.mark.parametrize("shape", [(3, 4096, 512, 512), (1, 8200, 512, 512)], ids=["batch", "channels"])
@pytest.mark.parametrize("backend", [backend for spec, backend in KERNELS if spec.name == "masked_avg_pool"])
def test_more_than_2_31_elements(backend, shape, layout):
    """The last channels of the last sample, and their gradient, hold the formula's values."""
    spec = next(s for s in SPECS if s.name == "masked_avg_pool")
    batch, channels, height, width = shape
    assert batch * channels * height * width > 2**31
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("no GPU with 40 GB of free memory")
    generator = torch.Generator(DEVICE).manual_seed(5)
    stored = shape if layout == "contiguous" else (batch, height, width, channels)
    x = torch.empty(stored, dtype=torch.bfloat16, device=DEVICE).normal_(0.5, 1.0, generator=generator)
    x = x if layout == "contiguous" else x.permute(0, 3, 1, 2)
    mask = torch.rand(batch, 2, 473, 473, generator=generator, device=DEVICE)
    seed = torch.randn(batch, 2, channels, generator=generator, device=DEVICE).bfloat16()
    with fss_kernels.use_backend(backend):
        out = fss_kernels.masked_avg_pool(x.requires_grad_(), mask)
        (grad,) = torch.autograd.grad(out, x, seed)
    for part in (slice(0, 8), slice(channels - 8, channels)):
        for i in {0, batch - 1}:
            piece = x.detach()[i : i + 1, part].double().requires_grad_()
            wanted = spec.reference(piece, mask[i : i + 1].double())
            (wanted_grad,) = torch.autograd.grad(wanted, piece, seed[i : i + 1, :, part].double())
            torch.testing.assert_close(out[i : i + 1, :, part].double(), wanted, rtol=8e-3, atol=1e-5)
            scale = wanted_grad.abs().max().item()
            torch.testing.assert_close(grad[i : i + 1, part].double(), wanted_grad, rtol=8e-3, atol=1e-5 * scale)
