"""The Triton kernels in the interpreter: TRITON_INTERPRET=1 was set when the process started (make test, test-slow and
test-long)."""

import pytest
import torch
from conftest import SPECS, ids, sample_of
from test_offsets import FAR, far

import fss_kernels
from fss_kernels import _loading, testing

TRITON = [spec for spec in SPECS if "triton" in spec.op.backends]
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted", "expanded")


def elements(sample):
    return sum(t.numel() for t in sample.tensors.values())


def layouts(dtype, index, sample):
    """The interpreter takes seconds: every layout for small samples in float32; else one or two, in turn."""
    if dtype == torch.float32 and elements(sample) <= 1000:
        return LAYOUTS
    return (LAYOUTS[index % 2],) if dtype == torch.float16 else (LAYOUTS[index % 2], LAYOUTS[2 + index % 3])


def speed(dtype, index, layout, sample):
    """Fast are small samples, float32 in one layout, in turn. Larger ones are slow in that layout, long in others."""
    in_turn, small = dtype == torch.float16 or layout == LAYOUTS[index % len(LAYOUTS)], elements(sample) <= 640
    if elements(sample) > 5000 or not (small or in_turn):
        return pytest.mark.long
    return () if in_turn and small else pytest.mark.slow


CASES = [
    pytest.param(
        spec,
        dtype,
        layout,
        sample,
        id=f"{spec.name}-{ids(dtype)}-{layout}-{sample.id}",
        marks=speed(dtype, index, layout, sample),
    )
    for spec in TRITON
    for index, sample in enumerate(spec.samples())
    if elements(sample) <= 40_000
    for dtype in (torch.float32, torch.float16)  # the interpreter truncates bfloat16 stores
    for layout in layouts(dtype, index, sample)
]


def test_there_are_cases():
    assert _loading.TRITON_INTERPRETED and CASES
    assert all(spec.op.why_not("triton", "cpu") is None for spec in TRITON)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("spec, dtype, layout, sample", CASES)
def test_matches_float64(spec, dtype, layout, sample):
    for _, comparison in testing.evaluate(spec, sample, "triton", dtype, layout):
        assert comparison.passed, comparison.message


@pytest.mark.slow
@pytest.mark.parametrize("spec", TRITON, ids=ids)
def test_batch_neighbours_do_not_matter(spec):
    """The split of the work depends on the sample, not on the batch: the same bits alone and together."""
    own = (s for s in spec.samples() if elements(s) <= 40_000 and not s.shared)
    sample = max((s for s in own if next(iter(s.tensors.values())).shape[0] > 1), key=elements)
    tensors = spec.cast(sample, torch.float32)
    names = testing.differentiable_names(spec, tensors)

    def run(chosen):
        held = {k: t.detach().requires_grad_(k in names) for k, t in chosen.items()}
        out = spec.function(*held.values(), **sample.options)
        (out * out.detach()).sum().backward()
        return [out.detach(), *(held[n].grad for n in names)]

    with fss_kernels.use_backend("triton"):
        together = run(tensors)
        alone = run({k: t[1:] for k, t in tensors.items()})
    for a, t in zip(alone, together, strict=True):
        assert torch.equal(a[0], t[1])


@pytest.mark.parametrize("spec", TRITON, ids=ids)
def test_float64_is_refused(spec):
    sample = next(iter(spec.samples()))
    with fss_kernels.use_backend("triton"), pytest.raises(RuntimeError, match=r"does not take torch\.float64"):
        spec.function(*spec.cast(sample, torch.float64).values(), **sample.options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_nan_outside_the_mask(memory_format, bad):
    x, mask = torch.randn(2, 5, 6, 7), torch.zeros(2, 2, 6, 7)
    mask[:, 0, 2:5, 1:4] = torch.rand(3, 3) + 0.1
    mask[:, 1, :, 5:] = 1.0
    unused = (mask == 0).all(1, keepdim=True).expand_as(x)
    results = []
    for fill in (bad, 0.0):
        leaves = torch.where(unused, fill, x).contiguous(memory_format=memory_format), mask.clone()
        with fss_kernels.use_backend("triton"):
            out = fss_kernels.masked_avg_pool(*(leaf.requires_grad_() for leaf in leaves))
            out.sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("resize, align_corners", [("bilinear", True), ("bilinear", False), ("nearest", True)])
def test_every_resize_and_its_transpose(resize, align_corners):
    """Many sizes, up and down: the gather of the transposed resize leaves no position out."""
    from fss_kernels.ops.masked_avg_pool import reference, triton_kernels

    for source in (1, 2, 3, 5, 8, 13, 29, 64):
        for target in (1, 2, 3, 4, 7, 8, 17, 30, 63):
            image = torch.rand(1, 1, source, 2)
            out = torch.empty(1, 1, target, 2)
            triton_kernels._resize(image, out, resize == "nearest", align_corners, False)
            matrix = reference.interpolation_matrix(source, target, resize, align_corners, image)
            torch.testing.assert_close(out[0, 0], matrix @ image[0, 0], msg=f"{source} -> {target}")
            back = torch.empty(1, 1, target, 2)
            triton_kernels._resize(image, back, resize == "nearest", align_corners, True)
            matrix = reference.interpolation_matrix(target, source, resize, align_corners, image)
            torch.testing.assert_close(back[0, 0], matrix.T @ image[0, 0], msg=f"transposed {source} -> {target}")


COSINES = [s for s in TRITON if s.cosines is not None and not s.indexed]  # of a maximum, NaN marks other results


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ids)
@pytest.mark.parametrize("spec", COSINES, ids=ids)
def test_nan_marks_its_pairs(spec, dtype, layout, bad):
    """A vector of either side whose norm is not finite: NaN where the reference has it, and every other score keeps its
    bits. So has a float32 whose square overflows; float16's largest numbers are squared in float32."""
    sample = next(iter(spec.samples()))
    clean, finite = spec.cast(sample, dtype), bad is None and dtype == torch.float16
    bad = (60000.0 if finite else 1e30) if bad is None else bad
    for name in [*clean][:2]:
        tensors = clean | {name: clean[name].clone()}
        tensors[name][(1, 2, *(1 for _ in clean[name].shape[2:])) if clean[name].dim() == 4 else (1, 1, 2)] = bad
        outputs = {}
        for backend, given in (("triton", clean), ("triton", tensors), ("reference", tensors)):
            held = {n: testing.LAYOUTS[layout](t) if n in spec.features else t for n, t in given.items()}
            with fss_kernels.use_backend(backend):
                outputs[backend, given is clean] = spec.function(*held.values(), **sample.options)
        nan = outputs["reference", False].isnan()
        assert nan.any() != finite and not nan.all()
        assert torch.equal(outputs["triton", False].isnan(), nan)
        if not finite:
            assert torch.equal(outputs["triton", False][~nan], outputs["triton", True][~nan])


@pytest.mark.slow
@pytest.mark.parametrize("spec, sample, tensor, dimension", [f for f in FAR if f[0] in TRITON], ids=ids)
def test_strides_past_2_31(spec, sample, tensor, dimension):
    """Outputs and gradients are those of the same values close together."""
    near = spec.cast(sample, torch.float16)
    names = testing.differentiable_names(spec, near)
    with fss_kernels.use_backend("triton"):
        results = [
            testing.gradients(spec.function, tensors, sample.options, names)
            for tensors in (near, {**near, tensor: far(near[tensor], dimension)})
        ]
    assert all(r.any() for r in results[0][0] + results[0][1])
    for here, there in zip(*results, strict=True):
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a, b)


def assert_empty(spec, sample, cut):
    """No output elements and gradients without a value."""
    tensors = {k: cut(t) for k, t in spec.cast(sample, torch.float32).items()}
    names = testing.differentiable_names(spec, tensors)
    with fss_kernels.use_backend("triton"):
        outputs, grads = testing.gradients(spec.function, tensors, sample.options, names)
    assert outputs[0].numel() == 0 and all(not g.any() for g in grads)


@pytest.mark.parametrize("spec", TRITON, ids=ids)
def test_empty_batch(spec):
    assert_empty(spec, next(iter(spec.samples())), lambda t: t[:0])


def test_no_masks():
    spec = next(s for s in TRITON if s.name == "masked_avg_pool")
    assert_empty(spec, sample_of(spec, "soft"), lambda t: t[:, :0] if t.shape[1] == 2 else t)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("sizes", [((5, 1), (3, 9), (1, 1), (1, 7), (7, 1)), ((1, 5),) * 3 + ((9, 1),)])
def test_more_kernels_than_one_launch_takes(sizes, merge):
    """Outputs, their gradients and merged taps of several launches; gradients of some of the inputs."""
    spec = next(s for s in TRITON if s.name == "dynamic_conv2d")
    tensors = {"x": torch.randn(2, 3, 7, 8)} | {f"k{i}": torch.randn(2, 3, *size) for i, size in enumerate(sizes)}
    options = {"merge": merge}
    wanted = testing.gradients(spec.reference, {k: t.double() for k, t in tensors.items()}, options, list(tensors))
    with fss_kernels.use_backend("triton"):
        for names in (list(tensors), ["x"], ["k1"], ["k3", "k0"], ["x", "k2"]):
            outputs, grads = testing.gradients(spec.function, tensors, options, names)
            torch.testing.assert_close(outputs[0].double(), wanted[0][0], rtol=1e-5, atol=1e-5)
            for name, grad in zip(names, grads, strict=True):
                torch.testing.assert_close(grad.double(), wanted[1][list(tensors).index(name)], rtol=1e-5, atol=1e-4)


def test_unwanted_gradients_of_kernels_take_no_launch(monkeypatch):
    from fss_kernels.ops.dynamic_conv2d import triton_kernels

    asked, launches = [], triton_kernels._launches
    monkeypatch.setattr(triton_kernels, "_launches", lambda wanted, *m: asked.append([*wanted]) or launches(wanted, *m))
    kernels = [torch.randn(1, 3, 1, 3), torch.randn(1, 3, 3, 1, requires_grad=True), torch.randn(1, 3, 1, 1)]
    with fss_kernels.use_backend("triton"):
        out = fss_kernels.dynamic_conv2d(torch.randn(1, 3, 4, 5), kernels)
        asked.clear()
        out.sum().backward()
    assert asked == [[1], [1]]  # its products, and the sum over their pieces


@pytest.mark.parametrize("merge", [False, True])
def test_nan_reaches_what_a_tap_covers(merge):
    """A merged cross does not spread it to its bounding box; a weight of 0 does not stop it."""
    from fss_kernels.ops.dynamic_conv2d import reference

    x, kernels = torch.randn(1, 2, 9, 8), [torch.zeros(1, 2, 5, 1), torch.randn(1, 2, 1, 3)]
    x[0, 1, 4, 4] = float("nan")
    with fss_kernels.use_backend("triton"):
        out = fss_kernels.dynamic_conv2d(x, kernels, merge=merge)
    wanted = reference.dynamic_conv2d_reference(x, kernels, merge)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert out.isnan().sum() == (7 if merge else 8)
