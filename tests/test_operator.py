"""The registered ops: opcheck in every layout, with and without gradients, on empties; fakes on permuted inputs."""

import dataclasses

import pytest
import torch
from conftest import SPECS, ids, sample_of
from torch.library import opcheck
from torch.utils import _pytree as pytree

from fss_kernels import testing

OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TRACED = ("contiguous", "channels_last_sliced")  # where backward is traced, its derivatives too: a minute an op
EMPTY = ("contiguous", "channels_last", "permuted")  # opcheck cannot copy a sliced one


def layouts(names, long):
    """Cases of which some are for `make test-long`."""
    return [pytest.param(name, marks=pytest.mark.long if name in long else ()) for name in names]


def raw_arguments(spec, sample, dtype, layout, requires_grad):
    tensors = {k: testing.LAYOUTS[layout](t).detach() for k, t in spec.cast(sample, dtype).items()}
    for name in testing.differentiable_names(spec, tensors) if requires_grad else ():
        tensors[name].requires_grad_()
    return spec.arguments(*tensors.values(), **sample.options)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("layout", layouts(testing.LAYOUTS, TRACED[1:]))
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_opcheck(spec, layout, requires_grad):
    sample = next(s for s in spec.samples() if not s.large)
    arguments = raw_arguments(spec, sample, torch.float32, layout, requires_grad)
    assert set(opcheck(spec.op.fwd, arguments, test_utils=OPCHECK).values()) == {"SUCCESS"}

    n_in, n_out = len(sample.tensors), len(spec.op.outputs)
    results = [r.detach() for r in spec.op.fwd(*arguments)]
    results[:n_out] = [torch.ones_like(r).requires_grad_(requires_grad) for r in results[:n_out]]
    for needs in ([True] * n_in, [i == 0 for i in range(n_in)], [i == n_in - 1 for i in range(n_in)]):
        backward = testing.raw_backward(spec, results, arguments, needs)
        utils = OPCHECK if all(needs) and layout in TRACED else OPCHECK[:-1]
        assert set(opcheck(spec.op.bwd, backward, test_utils=utils).values()) == {"SUCCESS"}


EMPTIES = [(spec, "batch") for spec in SPECS] + [(spec, spec.counted[0]) for spec in SPECS if spec.counted]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("layout", layouts(EMPTY, EMPTY[1:]))
@pytest.mark.parametrize("spec, cut", EMPTIES, ids=ids)
def test_opcheck_of_nothing(spec, cut, layout, requires_grad):
    sample = next(s for s in spec.samples() if not s.large)
    shrunk = {k: t[:, :0] if k in spec.counted else t for k, t in sample.tensors.items()}
    empty = {k: t[:0] for k, t in sample.tensors.items()} if cut == "batch" else shrunk
    arguments = raw_arguments(spec, dataclasses.replace(sample, tensors=empty), torch.float32, layout, requires_grad)
    assert set(opcheck(spec.op.fwd, arguments, test_utils=OPCHECK).values()) == {"SUCCESS"}
    results = [r.detach() for r in spec.op.fwd(*arguments)]
    backward = testing.raw_backward(spec, results, arguments, [True] * len(sample.tensors))
    assert set(opcheck(spec.op.bwd, backward, test_utils=OPCHECK).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=ids)
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_fake_agrees(spec, dtype):
    """Fake results have the shapes, dtypes and strides of real ones, in every layout and for every sample."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layout in testing.LAYOUTS:
        for sample in spec.samples():
            if sample.large:
                continue
            arguments = raw_arguments(spec, sample, dtype, layout, False)
            real = spec.op.fwd(*arguments)
            needs = [t.is_floating_point() for t in sample.tensors.values()]
            backward = testing.raw_backward(spec, real, arguments, needs)
            real = (*real, *spec.op.gradients.flatten(spec.op.bwd(*backward)))
            with FakeTensorMode() as mode:

                def fake(args, mode=mode):
                    return pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)

                results = (*spec.op.fwd(*fake(arguments)), *spec.op.gradients.flatten(spec.op.bwd(*fake(backward))))
            for r, f in zip(real, results, strict=True):
                assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_raw_op_is_differentiable(spec):
    """torch.ops.fss.<op>_fwd called directly has the gradients of the public function."""
    sample = next(iter(spec.samples()))
    tensors = spec.cast(sample, torch.float64)
    free = [tensors[n].requires_grad_() for n in testing.differentiable_names(spec, tensors)]
    outputs = spec.op.fwd(*spec.arguments(*tensors.values(), **sample.options))[: len(spec.op.outputs)]
    raw = torch.autograd.grad(sum(o.pow(2).sum() for o in outputs), free)
    public = torch.autograd.grad(spec.function(*tensors.values(), **sample.options).pow(2).sum(), free)
    for r, p in zip(raw, public, strict=True):
        torch.testing.assert_close(r, p, rtol=0, atol=0)


def test_gradient_rules_never_return_silent_zeros():
    """A raw backward op keeps its graph: its own derivatives are those of the formula."""
    spec = next(s for s in SPECS if s.name == "masked_avg_pool")
    x, mask, *options = raw_arguments(spec, sample_of(spec, "soft"), torch.float64, "contiguous", True)
    pooled, resized, area = (r.detach() for r in spec.op.fwd(x, mask, *options))
    grad = torch.ones_like(pooled).requires_grad_()
    grad_x, _ = spec.op.bwd(grad, x, mask, resized, area, *options, True, True)
    (wanted,) = torch.autograd.grad((grad_x * grad_x.detach()).sum(), grad)
    assert wanted.abs().max() > 0
