"""The compositions against the released formulas, written out; flat maps, empty masks, loops for the cycle test."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fss_kernels
from fss_kernels.compositions import cycle_consistent_foreground, prior_mask, support_activation

DPCN = ((5, 1), (3, 3), (1, 5))


@pytest.fixture(params=["reference", "cpp"], autouse=True)
def backend(request):
    with fss_kernels.use_backend(request.param):
        yield request.param


def randn(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3


def blobs(batch, shots, height, width):
    mask = torch.zeros(batch, shots, height, width)
    for b, s in itertools.product(range(batch), range(shots)):
        mask[b, s, 2 + b : height // 2 + s, 1 + s : width // 2 + b] = 1
    return mask


def stretched(a):
    """PFENet: the lowest value to 0, the highest to 1."""
    low, high = a.min(1, keepdim=True).values, a.max(1, keepdim=True).values
    return (a - low) / (high - low + 1e-7)


def pfenet(query, support, mask, size):
    """PFENet's loop over shots: mask, product over product of norms, best, min-max, mean, resize."""
    priors = []
    for shot in range(support.shape[1]):
        m = F.interpolate(mask[:, shot, None].double(), support.shape[3:], mode="bilinear", align_corners=True)
        s, q = (support[:, shot] * (m > 0)).flatten(2).transpose(1, 2), query.flatten(2)
        norms = torch.bmm(s.norm(dim=2, keepdim=True).clamp(min=1e-30), q.norm(dim=1, keepdim=True))
        best = (torch.bmm(s, q) / (norms + 1e-7)).max(1).values
        priors.append(stretched(best).view(query.shape[0], 1, *query.shape[2:]))
    prior = torch.stack(priors).mean(0)
    return F.interpolate(prior, size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("size", [None, (11, 13)])
def test_prior_is_pfenets(size):
    """Values and both gradients, through the min-max."""
    leaves = randn(2, 9, 7, 8).requires_grad_(), randn(2, 3, 9, 6, 9).requires_grad_()
    mask = blobs(2, 3, 24, 31)
    ours = prior_mask(*leaves, mask, flat_eps=0.0, size=size)
    wanted = pfenet(*leaves, mask, size or (7, 8))
    assert ours.shape == (2, 1, *(size or (7, 8)))
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    g = randn(*ours.shape)
    for a, b in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert b.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_stretched_in_float32(dtype):
    """The best cosines are in half precision; their range, the mean over shots and the resize are not."""
    query, support = randn(2, 9, 7, 8).to(dtype), randn(2, 3, 9, 6, 9).to(dtype)
    scores = fss_kernels.dense_cosine_max(query, support)[0][:, :, 0].float()
    wanted = torch.stack([stretched(shot.flatten(1)) for shot in scores.unbind(1)]).mean(0).view(2, 1, 7, 8)
    assert torch.equal(prior_mask(query, support, None), wanted.to(dtype))
    activation = support_activation(query, support, None, windows=((1, 1),))
    assert torch.equal(activation, wanted.to(dtype)) and activation.dtype == dtype


def dpcn(query, support, mask):
    """DPCN's literal code: windows unfolded, one product for every window element."""
    maps = []
    for dh, dw in DPCN:
        shots = []
        for shot in range(support.shape[1]):
            kept = (
                F.interpolate(mask[:, shot, None].double(), support.shape[3:], mode="bilinear", align_corners=True) > 0
            )
            q, s = (
                F.normalize(F.unfold(x, (dh, dw), padding=(dh // 2, dw // 2)).unflatten(1, (x.shape[1], -1)), dim=1)
                for x in (query, support[:, shot] * kept)
            )
            best = torch.einsum("bcoi,bcoj->bij", s, q).div(dh * dw).max(1).values
            shots.append(stretched(best).view(query.shape[0], *query.shape[2:]))
        maps.append(torch.stack(shots).mean(0))
    return torch.stack(maps, 1)


def test_support_activation_is_dpcns():
    leaves = randn(2, 9, 7, 8).requires_grad_(), randn(2, 2, 9, 6, 9).requires_grad_()
    mask = blobs(2, 2, 24, 31)
    ours, wanted = support_activation(*leaves, mask), dpcn(*leaves, mask)
    torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-12)
    g = randn(*ours.shape)
    for a, b in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert b.abs().max() > 0


@pytest.mark.parametrize("function", [prior_mask, support_activation])
def test_flat_maps_are_zero(function):
    """Without foreground, and where all query pixels are alike: 0 and no gradient, not 1e7 of it."""
    leaves = randn(2, 5, 6, 7), randn(2, 5, 6, 7)
    leaves[0][1] = 1
    leaves[0][1, 0, 0, 0] += 1e-8
    mask = blobs(2, 1, 6, 7)[:, 0]
    mask[0], mask[1] = 0, 1
    options = {"windows": ((1, 1),)} if function is support_activation else {}
    for x in leaves:
        x.requires_grad_()
    out = function(*leaves, mask, **options)
    assert not out.any()
    (out * randn(*out.shape)).sum().backward()
    assert not leaves[0].grad.any() and not leaves[1].grad.any()
    released = function(*leaves, mask, flat_eps=0.0, **options)
    assert released[1].max() > 0 and not released[0].any()
    (released * randn(*released.shape)).sum().backward()
    assert leaves[0].grad[1].abs().max() > 1e3


def test_stretched_has_one_winner():
    """Equal extremes: the gradient goes to the first of each."""
    query = torch.tensor([[[[3.0, 0.0, 3.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]]], dtype=torch.float64).requires_grad_()
    out = prior_mask(query, torch.tensor([1.0, 0.0]).double().view(1, 2, 1, 1), None, flat_eps=0.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 0.0, 1.0, 0.0]).double(), rtol=0, atol=1e-6)
    grad = torch.autograd.grad(out[..., 0].sum() + 2 * out[..., 2].sum(), query)[0]
    assert grad[0, :, 0, 3].abs().max() == 0  # the second of the two lowest


def cycle_by_loops(query, support, foreground):
    q, s = query.flatten(1), support.flatten(1)
    c = (s / s.norm(dim=0)).T @ (q / q.norm(dim=0))  # (Ns, Nq)
    flags = torch.zeros(q.shape[1], dtype=torch.bool)
    for i in range(s.shape[1]):
        if foreground.flatten()[i]:
            j = int(c[i].argmax())
            flags[j] = bool(foreground.flatten()[int(c[:, j].argmax())])
    return flags.view(query.shape[1:])


@pytest.mark.parametrize("shots", [1, 5])
def test_cycle_equals_loops(shots):
    query, support = randn(2, 4, 7, 8), randn(2, shots, 4, 6, 9)
    mask = torch.rand(2, shots, 17, 22, generator=torch.Generator().manual_seed(0))
    grid = F.interpolate(mask.double(), (6, 9), mode="bilinear", align_corners=True)
    for threshold in (0.3, 0.5, 0.7):
        ours = cycle_consistent_foreground(query, support, mask.double(), threshold=threshold)
        assert ours.dtype == torch.bool and ours.shape == (2, 7, 8)
        for b in range(2):
            flags = [cycle_by_loops(query[b], support[b, s], grid[b, s] >= threshold) for s in range(shots)]
            assert torch.equal(ours[b], torch.stack(flags).any(0))
        assert 0 < ours.sum() < ours.numel()
    assert torch.equal(
        cycle_consistent_foreground(query, support[:, 0], mask[:, 0]),
        cycle_consistent_foreground(query, support[:, :1], mask[:, :1]),
    )


def test_cycle_without_foreground_or_gradient():
    query, support = randn(2, 4, 7, 8).requires_grad_(), randn(2, 2, 4, 6, 9)
    out = cycle_consistent_foreground(query, support, torch.zeros(2, 2, 5, 5, dtype=torch.uint8))
    assert not out.any() and not out.requires_grad
    assert cycle_consistent_foreground(query, support, None).any()
    assert not cycle_consistent_foreground(query, support[:, :0], None).any()


def test_errors_name_the_argument():
    query, support, mask = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), torch.ones(1, 5, 5)
    with pytest.raises(ValueError, match=r"^prior_mask: flat_eps must be finite and >= 0, got -1\.0$"):
        prior_mask(query, support, mask, flat_eps=-1.0)
    with pytest.raises(ValueError, match=r"^prior_mask: size must be None or a pair of positive int, got \(0, 3\)$"):
        prior_mask(query, support, mask, size=(0, 3))
    for function in (prior_mask, support_activation):
        with pytest.raises(ValueError, match=f"^{function.__name__}: support has no shots$"):
            function(query, support[:, None][:, :0], None)
        with pytest.raises(ValueError, match=r"^dense_cosine_max: mask must have shape \(B, h, w\), got \(5, 5\)$"):
            function(query, support, mask[0])
    with pytest.raises(ValueError, match=r"^cycle_consistent_foreground: threshold must be finite, got nan$"):
        cycle_consistent_foreground(query, support, mask, threshold=float("nan"))
    with pytest.raises(ValueError, match=r"^cycle_consistent_foreground: support must have the batch size of query"):
        cycle_consistent_foreground(query, support[:0], mask)


@pytest.mark.parametrize("function", [prior_mask, support_activation, cycle_consistent_foreground])
def test_compiles_without_a_break(function):
    query, support, mask = randn(2, 4, 5, 6), randn(2, 2, 4, 6, 5), blobs(2, 2, 12, 13)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with fss_kernels.use_backend(None):
        torch.testing.assert_close(compiled(query, support, mask), function(query, support, mask), rtol=0, atol=0)
    torch._dynamo.reset()
