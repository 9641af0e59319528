"""Memory: a forward call takes what its spec states; calls leave nothing behind, those that raise included."""

import ctypes
import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import BACKENDS, SAMPLES, SPECS, ids

import fss_kernels
from fss_kernels import _memory, testing

SLACK = 1280  # 20 small tensors, rounded up to 64 bytes each
COMPILED = [pytest.param(s, b, id=f"{s.name}-{b}") for s, b in BACKENDS if b != "reference"]


each_call = pytest.mark.parametrize(
    "dtype, layout", [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last")], ids=ids
)


def hungry(spec, dtype, layout):
    """The two samples with most scratch memory, and their tensors."""
    own = (s for sp, s in SAMPLES if sp is spec)
    for sample in sorted(own, key=lambda s: spec.scratch_bytes(s, dtype))[-2:]:
        tensors = spec.cast(sample, dtype)
        yield sample, tensors | {n: testing.LAYOUTS[layout](tensors[n]) for n in spec.features if n in tensors}


@each_call
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_peak_is_the_stated_scratch_memory(spec, dtype, layout):
    for sample, tensors in hungry(spec, dtype, layout):
        stated = spec.scratch_bytes(sample, dtype)
        assert stated > SLACK
        results = spec.op.fwd(*spec.arguments(*tensors.values(), **sample.options))
        indices = _memory.nbytes(results[len(spec.op.outputs) : len(spec.op.returned)])  # `function` leaves them out
        extra = _memory.extra_bytes(lambda t=tensors, o=sample.options: spec.function(*t.values(), **o))
        assert extra <= 1.05 * stated + indices + SLACK, sample.id


@each_call
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_gradients_take_as_much_again(spec, dtype, layout):
    """Forward and backward: beside results and gradients twice the scratch of a forward, and the results' gradients in
    another layout at most."""
    for sample, tensors in hungry(spec, dtype, layout):
        names = testing.differentiable_names(spec, tensors)
        results = _memory.nbytes(_memory.flat(spec.function(*tensors.values(), **sample.options)))
        extra = _memory.extra_bytes(lambda t=tensors, o=sample.options, n=names: gradients(spec, t, o, n))
        assert extra <= 2 * results + 2.05 * spec.scratch_bytes(sample, dtype) + SLACK, sample.id


def gradients(spec, tensors, options, names, **how):
    """The gradients of a call, with its results as theirs."""
    leaves = {n: t.detach().requires_grad_() if n in names else t for n, t in tensors.items()}
    results = [r for r in _memory.flat(spec.function(*leaves.values(), **options)) if r.requires_grad]
    return torch.autograd.grad(results, [leaves[n] for n in names], [r.detach() for r in results], **how)


class Heap(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Heap


def held() -> int:
    """Bytes on the heap, which C++ and PyTorch's allocator share with Python."""
    gc.collect()
    heap = mallinfo2()
    return heap.uordblks + heap.hblkhd


def visible() -> list[torch.Tensor]:
    """Tensors that Python sees."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lazy modules that are asked for their class
        return [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]


def smallest(spec: testing.Spec) -> tuple[testing.Sample, dict[str, torch.Tensor]]:
    """The sample with the fewest elements, of those without an empty tensor."""

    def size(sample):
        counts = [t.numel() for t in sample.tensors.values()]
        return sum(counts) if all(counts) else float("inf")

    sample = min(spec.samples(), key=size)
    return sample, spec.cast(sample, torch.float32)


def forward(spec: testing.Spec) -> Callable[[], object]:
    sample, tensors = smallest(spec)
    return lambda: spec.function(*tensors.values(), **sample.options)


def both(spec: testing.Spec) -> Callable[[], object]:
    sample, tensors = smallest(spec)
    names = testing.differentiable_names(spec, tensors)
    return lambda: testing.gradients(spec.function, tensors, sample.options, names)


def second(spec: testing.Spec) -> Callable[[], object]:
    """A graph that holds itself: the gradient's graph, and never freed by a backward pass."""
    sample, tensors = smallest(spec)
    names = testing.differentiable_names(spec, tensors)

    return lambda: gradients(spec, tensors, sample.options, names, create_graph=True)


def refused(spec: testing.Spec) -> Callable[[], object]:
    """Bad input, in turn."""
    function, turn = spec.public or spec.function, 0
    bad = list(spec.bad_inputs())

    def call():
        nonlocal turn
        turn += 1
        one = bad[turn % len(bad)]
        with pytest.raises(one.error):
            function(*one.args, **one.options)

    return call


def refused_below(spec: testing.Spec) -> Callable[[], object]:
    """Gradients of a wrong shape, which only the raw op sees."""
    sample, tensors = smallest(spec)
    arguments = spec.arguments(*tensors.values(), **sample.options)
    wrong = [r.new_zeros(3, 3) for r in spec.op.fwd(*arguments)]
    backward = testing.raw_backward(spec, wrong, arguments, [True] * len(tensors))

    def call():
        with pytest.raises((RuntimeError, IndexError)):
            spec.op.bwd(*backward)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("make", [forward, both, refused, refused_below, second], ids=lambda make: make.__name__)
@pytest.mark.parametrize("spec, backend", COMPILED)
def test_calls_leave_nothing_behind(spec, backend, make, calls=1000):
    """The smallest thing that can be lost is a block of 32 bytes in every call."""
    with fss_kernels.use_backend(backend):
        call = make(spec)
        for _ in range(calls // 5):
            call()
        known = visible()  # kept, since what an earlier test left may go late
        before = held()
        for _ in range(calls):
            call()
        after = held()
    assert after - before < 16 * calls
    ids_of_known = {id(t) for t in known}
    assert not [t.shape for t in visible() if id(t) not in ids_of_known]
