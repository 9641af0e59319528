"""DPNet's modules and the whole network against their literal form."""

import literal_models as literal
import pytest
import torch
from model_samples import episode, small, soft_mask, stages

from fss_models import build
from fss_models.dpnet import DPNet, cycle_comparison
from fss_models.interpolation import resized
from fss_models.layers import FeatureEnrichment
from fss_models.losses import segmentation_loss


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(**options):
    backbone = torch.nn.Module()
    backbone.channels = (6, 10, 12)
    torch.manual_seed(3)
    options = {"channels": 8, "bins": (6, 4, 3), "mid_dropout": 0.0, "cls_dropout": 0.0} | options
    return DPNet(backbone, **options).double().head


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts():
    """PFENet's 10,817,034 are this fusion with one prototype and the two reductions."""
    model = build("dpnet", "resnet50")
    reductions = count(model.head.down_query) + count(model.head.down_support)
    assert count(FeatureEnrichment(256, 257, (60, 30, 15, 8), 0.1)) + reductions == 10_817_034
    one_more_prototype = 4 * 256 * 256
    assert count(model.head.fusion) + reductions == 10_817_034 + one_more_prototype
    assert count(model.head.pim) == 4 * 256 * 256
    assert not any(p.requires_grad for p in model.backbone.parameters())


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("shots", [1, 3])
def test_head_is_the_specification(shots, empty):
    """Logits, inner logits and gradients; an empty support mask leaves nothing reliable."""
    head = head_of()
    query, support = stages(2, shots)
    mask = soft_mask(2, shots)
    if empty:
        mask[0] = 0
    inputs = [*query[:2], *support[:2], *head.parameters()]
    logits, inner = head(query, support, mask)
    expected, expected_inner = literal.dpnet_logits(dict(head.named_parameters()), query, support, mask, (6, 4, 3))
    for got, want in zip([logits, *inner], [expected, *expected_inner], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    probe = randn(*logits.shape, seed=9)
    got, want = (torch.autograd.grad((x * probe).sum(), inputs, allow_unused=True) for x in (logits, expected))
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w)


# ---- cycle comparison -----------------------------------------------------------------------------------------------


def cycle_case():
    query, support = (side.stage4.detach() for side in stages(2, 1))
    return randn(2, 4, 7, 9), query, support[:, None], soft_mask(2, 1), randn(2, 4, seed=2)


def test_nothing_reliable_gives_the_prototype():
    x_q, query, support, mask, p = cycle_case()
    result = cycle_comparison(x_q, query, support, mask * torch.tensor([0, 1])[:, None, None, None], p)
    assert torch.equal(result[0], p[0]) and not torch.allclose(result[1], p[1])


def test_gradient_of_the_pseudo_prototype_stays_on_the_reliable_pixels():
    x_q, query, support, mask, p = cycle_case()
    for x in (x_q, query, support):
        x.requires_grad_()
    cycle_comparison(x_q, query, support, mask, p).sum().backward()
    weights = literal.at_grid(mask, (7, 9))
    for b in range(2):
        omega = literal.cycle(query[b].detach(), support[b].detach(), weights[b]).view(7, 9)
        assert torch.equal(x_q.grad[b, 0] != 0, omega > 0)
    assert query.grad is None and support.grad is None


# ---- fusion and loss ------------------------------------------------------------------------------------------------


def test_bins():
    fusion = FeatureEnrichment(4, 4, (1.0, 0.5, 0.125, 60), 0.1)
    assert fusion.grids((60, 41)) == [(60, 41), (30, 20), (7, 5), (60, 60)]
    assert fusion.grids((5, 5))[2] == (1, 1)


def test_loss_is_main_and_mean_inner():
    e = episode(size=(17, 25)).to(torch.float64)
    model = small("dpnet", torch.float64)
    query, support = model.encode(e.query, e.support)
    logits, inner = model.head(query, support, (e.mask == 1).double())
    expected = literal.loss(resized(logits, (17, 25)), e.target)
    expected += sum(literal.loss(resized(i, (17, 25)), e.target) for i in inner) / 2
    assert model.loss(*e).item() == pytest.approx(expected, rel=1e-9)
    assert segmentation_loss(logits, e.target) > 0
