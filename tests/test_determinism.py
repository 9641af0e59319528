"""Same inputs, same bits: repeats, threads, position in the batch; no state between calls, whatever memory held."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import BACKENDS, SAMPLES, SPECS, ids

import fss_kernels
from fss_kernels import testing

COMPILED = [pytest.param(s, b, id=f"{s.name}-{b}") for s, b in BACKENDS if b != "reference"]
LARGE = [
    pytest.param(spec, backend, sample, id=f"{spec.name}-{backend}-{sample.id}")
    for spec, backend in BACKENDS
    for sample in spec.samples()
    if backend != "reference" and sample.large and next(iter(sample.tensors.values())).shape[0] > 1
]


def big_enough(spec):
    """The samples that several threads share: the large ones and the four largest of the others."""
    rest = [s for s in spec.samples() if not s.large]
    largest = sorted(rest, key=lambda s: -sum(t.numel() for t in s.tensors.values()))[:4]
    return [*largest, *(s for s in spec.samples() if s.large)]


def results(spec, sample, dtype, layout):
    tensors = {k: testing.LAYOUTS[layout](t) for k, t in spec.cast(sample, dtype).items()}
    outputs, grads = testing.gradients(
        spec.function, tensors, sample.options, testing.differentiable_names(spec, tensors)
    )
    return [*outputs, *grads]


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=ids)
@pytest.mark.parametrize("spec, backend", COMPILED)
def test_repeats_and_threads(spec, backend, dtype, layout, restore_threads):
    for sample in big_enough(spec):
        with fss_kernels.use_backend(backend):
            torch.set_num_threads(1)
            first = results(spec, sample, dtype, layout)
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                for a, b in zip(first, results(spec, sample, dtype, layout), strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("spec, backend", COMPILED)
def test_batch_neighbours_do_not_matter(spec, backend, layout):
    for sample in (s for sp, s in SAMPLES if sp is spec and not s.large and not s.shared):
        tensors = spec.cast(sample, torch.float32)
        batch = next(iter(tensors.values())).shape[0]
        if batch < 2:
            continue

        def run(chosen, sample=sample):
            held = {k: testing.LAYOUTS[layout](t).detach() for k, t in chosen.items()}
            out = spec.function(*(t.requires_grad_(t.is_floating_point()) for t in held.values()), **sample.options)
            (out * out.detach()).sum().backward()
            return [out.detach(), *(held[n].grad for n in testing.differentiable_names(spec, held))]

        with fss_kernels.use_backend(backend):
            together = run(tensors)
            for i in (0, batch - 1):
                alone = run({k: t[i : i + 1].detach().clone() for k, t in tensors.items()})
                for a, t in zip(alone, together, strict=True):
                    assert torch.equal(a[0], t[i]), sample.id


@pytest.mark.parametrize("spec, backend, sample", LARGE)
def test_large_and_small_gradients_agree(spec, backend, sample):
    """Writing a large gradient past the caches changes where it goes, not what it is."""
    tensors = spec.cast(sample, torch.float32)
    first = {k: t if k in sample.shared else t[:1] for k, t in tensors.items()}
    with fss_kernels.use_backend(backend):
        grads = []
        for chosen in (tensors, first):
            x = chosen[spec.features[0]].clone().requires_grad_()
            spec.function(*{**chosen, spec.features[0]: x}.values(), **sample.options).sum().backward()
            grads.append(x.grad)
    assert torch.equal(grads[0][:1], grads[1])


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_nothing_reads_what_was_not_written(spec):
    """glibc fills whatever is allocated, the kernels' own scratch too, with huge numbers; elsewhere it tests less."""
    command = [sys.executable, "-m", "fss_kernels", "verify", spec.name, "--backend", "cpp"]
    done = subprocess.run(command, env=os.environ | {"MALLOC_PERTURB_": "128"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
