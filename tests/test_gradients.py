"""First and second derivatives against finite differences in float64; no gradient that nobody asked for."""

import pytest
import torch
from conftest import BACKENDS, SMALL, SPECS, ids

import fss_kernels
from fss_kernels import testing

CASES = [
    pytest.param(spec, backend, sample, id=f"{spec.name}-{backend}-{sample.id}")
    for spec, sample in SMALL
    for backend in testing.backends(spec.op)
]


def leaves(spec, sample):
    tensors = spec.cast(sample, torch.float64)
    names = testing.differentiable_names(spec, tensors)
    free = [tensors[n].requires_grad_() for n in names]

    def call(*values):
        return spec.function(*{**tensors, **dict(zip(names, values, strict=True))}.values(), **sample.options)

    return call, free


@pytest.mark.parametrize("spec, backend, sample", CASES)
def test_gradcheck(spec, backend, sample):
    call, free = leaves(spec, sample)
    with fss_kernels.use_backend(backend):
        assert torch.autograd.gradcheck(call, free, fast_mode=sum(f.numel() for f in free) > 300)


@pytest.mark.parametrize("spec, backend, sample", CASES)
def test_gradgradcheck(spec, backend, sample):
    call, free = leaves(spec, sample)
    with fss_kernels.use_backend(backend):
        assert torch.autograd.gradgradcheck(call, free, fast_mode=True)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_second_derivative_is_not_silently_linear(spec):
    """d/dx of the squared norm of the first derivative, against the same through the reference formula."""
    sample = next(s for s in spec.samples() if not s.large)
    results = []
    for function in (spec.function, spec.reference):
        tensors = spec.cast(sample, torch.float64)
        free = [tensors[n].requires_grad_() for n in testing.differentiable_names(spec, tensors)]
        outputs = function(*tensors.values(), **sample.options)
        first = torch.autograd.grad(outputs.pow(4).sum(), free, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), free)
        third = torch.autograd.grad(
            sum(
                g.pow(3).sum()
                for g in torch.autograd.grad(
                    function(*tensors.values(), **sample.options).pow(4).sum(), free, create_graph=True
                )
            ),
            free,
        )
        results.append([*second, *third])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)
        assert wanted.abs().max() > 0


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("spec, backend", BACKENDS, ids=ids)
def test_layout_of_the_output_gradient(spec, backend, layout):
    """An output gradient in other strides, some past NaN, is its values."""
    arrange = testing.LAYOUTS[layout]
    for sample in (s for sp, s in SMALL if sp is spec):
        tensors = spec.cast(sample, torch.float64)
        names = testing.differentiable_names(spec, tensors)
        with fss_kernels.use_backend(backend):
            _, grads = testing.gradients(spec.function, tensors, sample.options, names, arrange)
            _, wanted = testing.gradients(
                spec.function, tensors, sample.options, names, lambda seed: arrange(seed).clone().contiguous()
            )
        for g, w in zip(grads, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_only_wanted_gradients_are_computed(spec, recorded_ops):
    sample = next(iter(spec.samples()))
    for wanted in testing.differentiable_names(spec, sample.tensors):
        tensors = spec.cast(sample, torch.float32)
        tensors[wanted].requires_grad_()
        with recorded_ops() as recorder:
            spec.function(*tensors.values(), **sample.options).sum().backward()
        name, arguments = recorder.calls[-1]
        assert name == f"fss::{spec.name}_bwd"
        call = spec.op.backward_call.Call(*arguments)
        needs = spec.op.gradients.flatten([getattr(call, f"need_{n}") for n in spec.op.differentiable])
        assert needs == [n == wanted for n in tensors if n in spec.differentiable]
        assert tensors[wanted].grad is not None
        assert all(t.grad is None for n, t in tensors.items() if n != wanted)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_gradients_not_wanted_have_no_elements(spec):
    """The raw backward op returns nothing for a gradient whose flag is false."""
    sample = next(iter(spec.samples()))
    tensors = spec.cast(sample, torch.float32)
    arguments = spec.arguments(*tensors.values(), **sample.options)
    results = spec.op.fwd(*arguments)
    for backend in testing.backends(spec.op):
        for first in (False, True):
            flags = [first and i == 0 for i in range(len(tensors))]
            with fss_kernels.use_backend(backend):
                grads = spec.op.bwd(*testing.raw_backward(spec, results, arguments, flags))
            found = [g.numel() > 0 for g in spec.op.gradients.flatten(grads)]
            assert found == [flag for name, flag in zip(tensors, flags, strict=True) if name in spec.differentiable]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_features_are_not_kept_for_their_own_gradient(layout):
    """Pooling is linear in the features: no copy is held, they may be overwritten, and double backward still works."""
    x0, mask = torch.randn(2, 8, 16, 15), torch.rand(2, 2, 31, 33)
    x0 = testing.LAYOUTS[layout](x0).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        x = x0 * 2
        out = fss_kernels.masked_avg_pool(x, mask)
    assert all(t.untyped_storage().nbytes() < x.nbytes or t.shape == mask.shape for t in saved)
    with torch.no_grad():
        x.zero_()
    (grad,) = torch.autograd.grad(out.pow(2).sum(), x0, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), x0)
    y = x0.detach().clone().requires_grad_()
    r = torch.nn.functional.interpolate(mask, (16, 15), mode="bilinear", align_corners=True)
    plain = torch.einsum("bchw,bmhw->bmc", y * 2, r) / (r.sum((2, 3)) + 5e-4)[..., None]
    (wanted,) = torch.autograd.grad(plain.pow(2).sum(), y, create_graph=True)
    torch.testing.assert_close(grad, wanted)
    torch.testing.assert_close(second, torch.autograd.grad(wanted.pow(2).sum(), y)[0])
    assert grad.stride() == x0.stride()
