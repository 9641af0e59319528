"""Several Python threads, forked workers of a DataLoader, threads that change their number: the same bits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import BACKENDS, SAMPLES
from torch.utils.data import DataLoader, Dataset

import fss_kernels
from fss_kernels import _backends, testing

COMPILED = [(spec, backend) for spec, backend in BACKENDS if backend != "reference"]
# of every op: the largest sample, whose work several threads share, and the first one
CHOSEN = [
    (spec, backend, sample)
    for spec, backend in COMPILED
    for own in [[s for sp, s in SAMPLES if sp is spec]]
    for sample in {
        s.id: s for s in (max(own, key=lambda s: sum(t.numel() for t in s.tensors.values())), own[0])
    }.values()
]


def results(case):
    """Outputs and gradients of one chosen call."""
    spec, backend, sample = CHOSEN[case]
    tensors = spec.cast(sample, torch.float32)
    with fss_kernels.use_backend(backend):
        outputs, grads = testing.gradients(
            spec.function, tensors, sample.options, testing.differentiable_names(spec, tensors)
        )
    return [*outputs, *grads]


@pytest.fixture(scope="module")
def wanted():
    """Every chosen call, alone and with one thread; then two threads are used once, so that a fork finds them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [results(case) for case in range(len(CHOSEN))]
    torch.set_num_threads(2)
    results(0)
    yield alone
    torch.set_num_threads(threads)


def assert_same(found, wanted, case):
    for a, b in zip(found, wanted[case], strict=True):
        assert torch.equal(a, b), CHOSEN[case][2].id


@pytest.mark.parametrize("change", [False, True], ids=["threads", "changing-numbers"])
def test_python_threads(wanted, change):
    """Four threads run all calls in different orders, all at once; each may change how many threads its calls take."""
    start = threading.Barrier(4)

    def run(worker):
        start.wait()
        for turn in range(2 * len(CHOSEN)):
            if change:
                torch.set_num_threads(1 + (worker + turn) % 3)
            case = (turn * (2 * worker + 1) + worker) % len(CHOSEN)
            assert_same(results(case), wanted, case)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_forced_backends_are_of_one_thread():
    """A backend forced in one thread is not forced in another, before, while and after."""
    forced, checked = threading.Event(), threading.Event()

    def other():
        assert forced.wait(60)
        seen = _backends.forced()
        checked.set()
        return seen

    with ThreadPoolExecutor(1) as pool, fss_kernels.use_backend("reference"):
        seen = pool.submit(other)
        forced.set()
        assert checked.wait(60) and seen.result() is None
        assert _backends.forced() == "reference"


class Calls(Dataset):
    """Item i is a chosen call."""

    def __len__(self):
        return 2 * len(CHOSEN)

    def __getitem__(self, i):
        return results(i % len(CHOSEN))


FORKED = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "fork", "timeout": 120}


def test_workers_of_a_data_loader(wanted):
    for i, found in enumerate(DataLoader(Calls(), **FORKED)):
        assert_same(found, wanted, i % len(CHOSEN))
    assert_same(results(0), wanted, 0)  # and the parent goes on


def test_threads_while_a_loader_forks(wanted):
    """Calls of the training process go on while its workers are started."""
    stop = threading.Event()

    def run():
        turns = 0
        while not stop.is_set() or turns < len(CHOSEN):
            assert_same(results(turns % len(CHOSEN)), wanted, turns % len(CHOSEN))
            turns += 1
        return turns

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            for i, found in enumerate(DataLoader(Calls(), **FORKED)):
                assert_same(found, wanted, i % len(CHOSEN))
        finally:
            stop.set()
        assert running.result(120) >= len(CHOSEN)
