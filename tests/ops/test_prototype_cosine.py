"""prototype_cosine against independent definitions: loops, F.cosine_similarity, the field's formulas, edge rules."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fss_kernels
from fss_kernels import prototype_cosine, testing

BACKENDS = ["reference", "cpp"]
MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]
each_format = pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=["nchw", "nhwc"])
each_mode = pytest.mark.parametrize("eps_mode", ["clamp", "add"])


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fss_kernels.use_backend(request.param):
        yield request.param


def divisor(norm: float, eps: float, eps_mode: str) -> float:
    return norm + eps if eps_mode == "add" else max(norm, eps)


def cosine_by_loops(x: np.ndarray, w: np.ndarray, scale: float, eps: float, eps_mode: str) -> np.ndarray:
    batch, _, height, width = x.shape
    out = np.zeros((batch, w.shape[1], height, width))
    for b, p, i, j in itertools.product(range(batch), range(w.shape[1]), range(height), range(width)):
        q, s = x[b, :, i, j], w[b, p]
        norms = [math.sqrt(sum(float(v) ** 2 for v in vector)) for vector in (q, s)]
        dot = sum(float(a) * float(c) for a, c in zip(q, s, strict=True))
        out[b, p, i, j] = scale * dot / (divisor(norms[0], eps, eps_mode) * divisor(norms[1], eps, eps_mode))
    return out


def gradient_by_loops(x, w, g, scale, eps, eps_mode):
    """The rule of the contract, one vector at a time: through the normalisation of one operand, then of the other."""

    def through(v, dv):
        n = math.sqrt((v * v).sum())
        if n == 0:
            return np.zeros_like(v)
        if eps_mode == "clamp":
            return (dv - v / n * (v / n * dv).sum()) / n if n > eps else dv / eps
        return dv / (n + eps) - v * (v * dv).sum() / (n * (n + eps) ** 2)

    def unit(v):
        return v / divisor(math.sqrt((v * v).sum()), eps, eps_mode)

    grad_x, grad_w = np.zeros_like(x), np.zeros_like(w)
    batch, _, height, width = x.shape
    for b, i, j in itertools.product(range(batch), range(height), range(width)):
        dv = scale * sum(g[b, p, i, j] * unit(w[b, p]) for p in range(w.shape[1]))
        grad_x[b, :, i, j] = through(x[b, :, i, j], dv)
    for b, p in itertools.product(range(batch), range(w.shape[1])):
        dv = scale * sum(g[b, p, i, j] * unit(x[b, :, i, j]) for i, j in itertools.product(range(height), range(width)))
        grad_w[b, p] = through(w[b, p], dv)
    return grad_x, grad_w


@each_format
@pytest.mark.parametrize("eps", [1e-8, 0.7, 2.0])
@each_mode
def test_equals_loops(backend, eps_mode, eps, memory_format):
    """Values and both gradients; eps below, among and above the norms."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    w = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(2, 4, 4, 5, generator=generator, dtype=torch.float64)
    leaves = x.clone(memory_format=memory_format).requires_grad_(), w.clone().requires_grad_()
    out = prototype_cosine(*leaves, scale=3.0, eps=eps, eps_mode=eps_mode)
    wanted = cosine_by_loops(x.numpy(), w.numpy(), 3.0, eps, eps_mode)
    np.testing.assert_allclose(out.detach().numpy(), wanted, rtol=1e-12, atol=1e-13)
    out.backward(g)
    for leaf, grad in zip(leaves, gradient_by_loops(x.numpy(), w.numpy(), g.numpy(), 3.0, eps, eps_mode), strict=True):
        np.testing.assert_allclose(leaf.grad.numpy(), grad, rtol=1e-11, atol=1e-12)


def test_equals_cosine_similarity(backend):
    """PANet: one call of F.cosine_similarity a prototype, times 20."""
    x, w = torch.randn(2, 6, 7, 8, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    wanted = torch.stack([20 * F.cosine_similarity(x, p[None, :, None, None], dim=1) for p in w], 1)
    torch.testing.assert_close(prototype_cosine(x, w, scale=20.0), wanted, rtol=1e-12, atol=1e-13)


def test_equals_ssp(backend):
    """SSP: foreground and background prototypes of each sample against its query, times 10, stacked as two classes."""
    x = torch.randn(3, 8, 5, 6, dtype=torch.float64)
    foreground, background = torch.randn(2, 3, 8, 1, 1, dtype=torch.float64)
    wanted = torch.cat([F.cosine_similarity(x, p, dim=1)[:, None] for p in (background, foreground)], 1) * 10.0
    prototypes = torch.stack([background[..., 0, 0], foreground[..., 0, 0]], 1)
    torch.testing.assert_close(prototype_cosine(x, prototypes, scale=10.0), wanted, rtol=1e-12, atol=1e-13)


def test_by_hand(backend):
    x = torch.tensor([[[[3.0, 0.0]], [[4.0, 2.0]]]], requires_grad=True)
    w = torch.tensor([[0.0, 5.0]], requires_grad=True)
    out = prototype_cosine(x, w, scale=10.0)
    torch.testing.assert_close(out, torch.tensor([[[[8.0, 10.0]]]]))
    out[0, 0, 0, 0].backward()
    # d cos/dx = (w^ - x^ cos) / |x| with w^ = (0, 1), x^ = (0.6, 0.8), cos = 0.8
    torch.testing.assert_close(x.grad[0, :, 0], 10 * torch.tensor([[-0.48 / 5, 0.0], [0.36 / 5, 0.0]]))
    torch.testing.assert_close(w.grad, 10 * torch.tensor([[0.6 / 5, 0.0]]), atol=1e-6, rtol=1e-6)


@each_format
@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.5])
@each_mode
def test_zero_vectors(backend, eps_mode, eps, memory_format):
    """Cosine 0 and gradient 0 at a zero pixel and at a zero prototype; the others do not notice."""
    x, w = torch.randn(2, 5, 6, 7), torch.randn(2, 3, 5)
    x[0, :, 2, 3] = 0
    w[1, 2] = 0
    x, w = x.contiguous(memory_format=memory_format).requires_grad_(), w.requires_grad_()
    out = prototype_cosine(x, w, eps=eps, eps_mode=eps_mode)
    assert not out[0, :, 2, 3].any() and not out[1, 2].any()
    out.backward(torch.randn_like(out))
    assert not x.grad[0, :, 2, 3].any() and not w.grad[1, 2].any()
    assert x.grad.isfinite().all() and w.grad.isfinite().all()
    assert (x.grad.abs().sum(1) > 0).sum() == x[:, 0].numel() - 1
    (second,) = torch.autograd.grad(
        torch.autograd.grad(prototype_cosine(x, w, eps=eps, eps_mode=eps_mode).sum(), w, create_graph=True)[0].sum(), x
    )
    assert second.isfinite().all()


@each_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_nan_is_decided_by_the_norms(backend, dtype, bad, memory_format):
    """A bad value makes NaN of its pixel's scores, or of its prototype's maps, also against zero vectors."""
    x, w = torch.randn(2, 9, 8, 9).to(dtype), torch.randn(2, 6, 9).to(dtype)
    x[1, :, 0, 0] = 0
    w[0, 5] = 0
    clean = prototype_cosine(x.contiguous(memory_format=memory_format), w)
    x[0, 4, 3, 2] = bad
    w[1, 2, 7] = bad
    out = prototype_cosine(x.contiguous(memory_format=memory_format), w)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, :, 3, 2] = True
    expected[1, 2] = True
    assert torch.equal(out.isnan(), expected)
    torch.testing.assert_close(out[~expected], clean[~expected])


@each_format
def test_norms_of_float16_do_not_overflow(backend, memory_format):
    x = torch.full((1, 2048, 3, 5), 60000.0, dtype=torch.float16).contiguous(memory_format=memory_format)
    w = torch.stack([torch.full((2048,), 60000.0), torch.full((2048,), -1e-3)]).half()
    out = prototype_cosine(x, w)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([1.0, -1.0]).half(), rtol=1e-3, atol=0)


def test_a_norm_beyond_float32_is_nan_not_a_number(backend):
    x = torch.full((1, 4, 1, 1), 1e25)
    assert prototype_cosine(x, torch.ones(1, 4)).isnan().all()


def test_shared_prototypes_equal_expanded_ones(backend):
    """(P, C) is (B, P, C) with every sample the same; its gradient is summed before it is rounded."""
    x, w = torch.randn(4, 7, 6, 5), torch.randn(3, 7)
    g = torch.randn(4, 3, 6, 5)
    for dtype in (torch.float64, torch.bfloat16):
        grads = []
        for shared in (True, False):
            leaf = w.to(dtype).requires_grad_()
            chosen = leaf if shared else leaf.double().expand(4, 3, 7)
            features = x.to(dtype) if shared else x.to(dtype).double()
            out = prototype_cosine(features, chosen)
            out.backward(g.to(dtype).to(out.dtype))
            grads.append(leaf.grad)
        if dtype == torch.float64:
            torch.testing.assert_close(*grads)
        else:  # one rounding
            torch.testing.assert_close(*grads, rtol=2**-8, atol=2**-12)


@each_format
def test_scores_do_not_depend_on_the_number_of_tasks(memory_format):
    """The pieces of a sample follow the number of threads; the sums of a pixel do not."""
    x = torch.randn(1, 70, 61, 59).contiguous(memory_format=memory_format)
    w = torch.randn(1, 3, 70)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5, 16):
            torch.set_num_threads(n)
            results.append(prototype_cosine(x, w))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results[1:])


@each_format
@pytest.mark.parametrize("width", [64, 61])
@pytest.mark.parametrize("prototypes", [1, 4, 5, 6, 13])
def test_many_prototypes_and_large_gradients(prototypes, width, memory_format):
    """Every size of a group of prototypes, gradients written past the caches, rows aligned or not."""
    x = torch.randn(2, 300, 60, width).contiguous(memory_format=memory_format)
    w, g = torch.randn(2, prototypes, 300), torch.randn(2, prototypes, 60, width)
    grads = []
    for backend in BACKENDS:
        leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
        with fss_kernels.use_backend(backend):
            prototype_cosine(*leaves, eps=1e-5, eps_mode="add").backward(g)
        grads.append([leaf.grad for leaf in leaves])
    assert grads[1][0].nbytes >= 8 << 20
    for got, wanted in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


def test_no_prototypes(backend):
    x, w = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 0, 3, requires_grad=True)
    out = prototype_cosine(x, w)
    assert out.shape == (2, 0, 4, 4)
    out.sum().backward()
    assert not x.grad.any() and w.grad.shape == w.shape


def test_empty_batch_with_shared_prototypes(backend):
    x, w = torch.randn(0, 3, 4, 4, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    out = prototype_cosine(x, w)
    assert out.shape == (0, 2, 4, 4)
    out.sum().backward()
    assert x.grad.shape == x.shape and not w.grad.any()


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_promotes_mixed_dtypes(compiled):
    x, w = torch.randn(2, 5, 6, 7).bfloat16().requires_grad_(), torch.randn(2, 3, 5, requires_grad=True)
    call = torch.compile(prototype_cosine, fullgraph=True, backend="aot_eager") if compiled else prototype_cosine
    with torch.autocast("cpu", torch.bfloat16):
        out = call(x, w)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, prototype_cosine(x.float(), w))
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    with pytest.raises(TypeError, match=r"pass prototypes\.to\(torch\.bfloat16\)"):
        prototype_cosine(x, w)


def test_vmap_over_prototypes_reads_the_features_once(backend, recorded_ops):
    x = torch.randn(2, 5, 6, 7)
    w = torch.randn(4, 3, 5)
    with recorded_ops() as recorder:
        out = torch.vmap(prototype_cosine, (None, 0))(x, w)
    assert recorder.calls[-1][1][0].shape == x.shape and recorder.calls[-1][1][1].shape == (1, 12, 5)
    for o, prototypes in zip(out, w, strict=True):
        torch.testing.assert_close(o, prototype_cosine(x, prototypes))


def test_vmap_gradient_of_shared_prototypes(backend):
    x = torch.randn(3, 2, 5, 6, 7, dtype=torch.float64)
    w = torch.randn(4, 5, dtype=torch.float64)

    def loss(features, prototypes):
        return prototype_cosine(features, prototypes).pow(2).sum()

    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), (0, None))(x, w)
    for i in range(3):
        for g, wanted in zip(grads, torch.func.grad(loss, argnums=(0, 1))(x[i], w), strict=True):
            torch.testing.assert_close(g[i], wanted)


def test_extra_memory_is_what_the_spec_says():
    """Exact, from the allocator's own record."""
    spec = testing.specs()["prototype_cosine"]
    x, w = torch.randn(4, 64, 30, 30), torch.randn(4, 5, 64)
    prototype_cosine(x, w)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = prototype_cosine(x, w)
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    wanted = spec.scratch_bytes(testing.Sample("memory", {"features": x, "prototypes": w}), torch.float32)
    assert wanted <= peak - out.nbytes <= wanted + 3 * 64


def test_raw_backward_checks_its_arguments():
    x, w = torch.randn(1, 3, 4, 4), torch.rand(1, 2, 3)
    scores, cosines, norms = torch.ops.fss.prototype_cosine_fwd(x, w, 1.0, 0.1, "add")
    rest = (1.0, 0.1, "add", True, True)
    for grad, c, n in (
        (scores.double(), cosines, norms),
        (scores[:, :1], cosines, norms),
        (scores, cosines[..., :2], norms),
        (scores, cosines, norms.double()),
        (torch.randn(1), cosines, norms),
    ):
        with pytest.raises(RuntimeError, match=r"prototype_cosine: (grad|cosines) must be"):
            torch.ops.fss_cpp.prototype_cosine_bwd(grad, x, w, c, n, *rest)


def test_strides_past_2_31():
    large = 2**31 + 64
    x = torch.empty(2 * large + 64, dtype=torch.bfloat16).as_strided([1, 3, 4, 3], [1, large, 3, 1])
    values, w = torch.randn(1, 3, 4, 3).bfloat16(), torch.randn(1, 2, 3).bfloat16()
    x.copy_(values)
    wanted, got = (prototype_cosine(f, w) for f in (values, x))
    assert torch.equal(got, wanted)
    g = torch.ones_like(wanted)
    _, cosines, norms = torch.ops.fss.prototype_cosine_fwd(values, w, 1.0, 1e-8, "clamp")
    op = torch.ops.fss.prototype_cosine_bwd
    grads = [op(g, f, w, cosines, norms, 1.0, 1e-8, "clamp", False, True)[1] for f in (values, x)]
    assert torch.equal(*grads)
