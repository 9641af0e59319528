"""functorch, forward-mode AD, autocast, inference mode, checkpointing: right or a raised error, never silent."""

import itertools
import warnings

import pytest
import torch
from conftest import SPECS, ids
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fss_kernels
from fss_kernels import testing


def floating(spec, sample, dtype=torch.float64):
    tensors = spec.cast(sample, dtype)
    names = testing.differentiable_names(spec, tensors)
    return tensors, names


def first_sample(spec):
    return next(s for s in spec.samples() if not s.large)


def mapped(spec, tensors, chosen, size=3):
    """``size`` versions of the chosen tensors, stacked along a new dimension that is not the first."""
    generator = torch.Generator().manual_seed(3)
    stacked, dims = {}, {}
    for name, t in tensors.items():
        if name in chosen:
            versions = [t * (0.5 + torch.rand((), generator=generator, dtype=t.dtype)) for _ in range(size)]
            stacked[name], dims[name] = torch.stack(versions, t.ndim - 1), t.ndim - 1
        else:
            stacked[name], dims[name] = t, None
    return stacked, dims


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_vmap_equals_loop(spec, backend):
    sample = first_sample(spec)
    tensors, names = floating(spec, sample)
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            stacked, dims = mapped(spec, tensors, chosen)

            def call(*values):
                return spec.function(*values, **sample.options)

            def loss(*values):
                return spec.function(*values, **sample.options).pow(2).sum()

            positions = tuple(i for i, n in enumerate(tensors) if n in names)
            grads = torch.func.grad(loss, argnums=positions)
            with fss_kernels.use_backend(backend), warnings.catch_warnings():
                warnings.simplefilter("error")  # a batching rule that loops warns
                out = torch.vmap(call, tuple(dims.values()))(*stacked.values())
                per_sample = torch.vmap(grads, tuple(dims.values()))(*stacked.values())
                for i in range(3):
                    one = [t if dims[n] is None else t.select(dims[n], i) for n, t in stacked.items()]
                    torch.testing.assert_close(out[i], call(*one))
                    for g, w in zip(per_sample, grads(*one), strict=True):
                        torch.testing.assert_close(g[i], w)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_vmap_of_a_raw_backward(spec):
    """vjp mapped over output gradients, as in a Jacobian."""
    sample = first_sample(spec)
    tensors, names = floating(spec, sample)
    free = [tensors[n] for n in names]

    def call(*values):
        outputs = spec.function(*{**tensors, **dict(zip(names, values, strict=True))}.values(), **sample.options)
        return outputs[0].flatten(1).sum(1)

    jacobians = torch.func.jacrev(call, argnums=tuple(range(len(names))))(*free)
    wanted = torch.autograd.functional.jacobian(call, tuple(free))
    for j, w in zip(jacobians, wanted, strict=True):
        torch.testing.assert_close(j, w)
        assert w.abs().max() > 0


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_func_grad_and_second_order(spec):
    sample = first_sample(spec)
    tensors, names = floating(spec, sample)

    def build(function):
        def loss(x):
            return function(*{**tensors, names[0]: x}.values(), **sample.options).pow(4).sum()

        return loss

    x = tensors[names[0]]
    ours, reference = build(spec.function), build(spec.reference)
    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(reference)(x))
    v = torch.ones_like(x)
    products = [torch.func.vjp(torch.func.grad(f), x)[1](v)[0] for f in (ours, reference)]
    torch.testing.assert_close(*products)
    assert products[1].abs().max() > 0


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_forward_mode_raises(spec):
    sample = first_sample(spec)
    tensors, names = floating(spec, sample)
    x = tensors[names[0]]

    def call(value):
        return spec.function(*{**tensors, names[0]: value}.values(), **sample.options)

    # the error is PyTorch's own: an op has no forward mode, and says so
    with pytest.raises(NotImplementedError, match="must implement the jvp function"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="must implement the jvp function"):
        call(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_autocast_changes_nothing_for_one_dtype(spec, dtype):
    sample = first_sample(spec)
    for features in (torch.float32, dtype):
        tensors, names = floating(spec, sample, features)
        plain = testing.gradients(spec.function, tensors, sample.options, names)
        with torch.autocast("cpu", dtype):
            cast = testing.gradients(spec.function, tensors, sample.options, names)
        for p, c in zip([*plain[0], *plain[1]], [*cast[0], *cast[1]], strict=True):
            torch.testing.assert_close(c, p, rtol=0, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_grad_modes(spec):
    sample = first_sample(spec)
    tensors, names = floating(spec, sample, torch.float32)
    wanted = spec.function(*tensors.values(), **sample.options)
    leaves = [t.requires_grad_(n in names) for n, t in tensors.items()]
    recorded = spec.function(*leaves, **sample.options)
    assert recorded.requires_grad
    with torch.no_grad():
        quiet = spec.function(*leaves, **sample.options)
    with torch.inference_mode():
        inference = spec.function(*leaves, **sample.options)
    assert not quiet.requires_grad and inference.is_inference()
    for result in (recorded, quiet, inference):
        torch.testing.assert_close(result.detach().clone(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-hooks", "reentrant"])
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_checkpoint(spec, reentrant):
    sample = first_sample(spec)
    grads = []
    for wrapped in (False, True):
        tensors, names = floating(spec, sample, torch.float32)
        values = [t.requires_grad_(n in names) for n, t in tensors.items()]
        call = lambda *v: spec.function(*v, **sample.options)  # noqa: E731
        out = checkpoint(call, *values, use_reentrant=reentrant) if wrapped else call(*values)
        out.pow(2).sum().backward()
        grads.append([tensors[n].grad for n in names])
    for p, c in zip(*grads, strict=True):
        assert torch.equal(c, p)
