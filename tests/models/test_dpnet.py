"""DPNet's modules and the whole network against their literal form."""

import literal_models as literal
import pytest
import torch
from model_samples import balanced, episode, small, soft_mask, stages

from fss_models import build
from fss_models.dpnet import CycleComparison, DPNet, PrototypeInteraction, stretched
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
    assert count(build("dpnet", "resnet50", mfm="branches").head.fusion) + reductions == 10_817_034
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


def comparison(**options):
    defaults = {"ccm": "pixel", "match": "stage4", "threshold": 0.5, "confidence": False, "shots": "union"}
    return CycleComparison(**defaults | {"iou": 0.5, "pool_eps": 5e-4} | options)


def cycle_case(shots: int):
    query, support = stages(2, shots)
    mask = soft_mask(2, shots)
    x_q, x_s = randn(2, 4, 7, 9), randn(2 * shots, 4, 7, 9, seed=1)
    return query, support, x_q, x_s, mask, randn(2, 4, seed=2)


@pytest.mark.parametrize("match", ["stage3", "mid"])
def test_matched_features(match):
    query, support, x_q, x_s, mask, p = cycle_case(2)
    u_q, u_s = (x_q, x_s) if match == "mid" else (query.stage3, support.stage3)
    weights, u_s = literal.at_grid(mask, (7, 9)), u_s.view(2, 2, *u_s.shape[1:])
    omega = torch.stack([literal.cycle(u_q[b].detach(), u_s[b].detach(), weights[b]) for b in range(2)])
    expected = literal.pooled(x_q, omega.view(2, 7, 9).double())
    torch.testing.assert_close(comparison(match=match)(query, support, x_q, x_s, mask, p), expected)


def test_mean_of_shots():
    query, support, x_q, x_s, mask, p = cycle_case(3)
    mask[1, 2] = 0
    weights, high = literal.at_grid(mask, (7, 9)), support.stage4.view(2, 3, *support.stage4.shape[1:]).detach()
    expected = []
    for b in range(2):
        each = []
        for s in range(3):
            omega = literal.cycle(query.stage4[b].detach(), high[b, [s]], weights[b, [s]]).view(1, 7, 9).double()
            each.append(literal.pooled(x_q[[b]], omega)[0] if omega.any() else p[b])
        expected.append(torch.stack(each).mean(0))
    result = comparison(shots="mean")(query, support, x_q, x_s, mask, p)
    torch.testing.assert_close(result, torch.stack(expected))
    assert not torch.allclose(comparison()(query, support, x_q, x_s, mask, p), result)


def test_confidence():
    query, support, x_q, x_s, mask, p = cycle_case(1)
    weights, u_q, u_s = literal.at_grid(mask, (7, 9)), query.stage4.detach(), support.stage4.detach()
    omega = torch.stack([literal.cycle(u_q[b], u_s[[b]], weights[b]) for b in range(2)]).double()
    cosines = literal.normalised(u_s.flatten(2), 1).mT @ literal.normalised(u_q.flatten(2), 1)
    foreground = weights[:, 0].flatten(1) >= 0.5
    best = cosines.masked_fill(~foreground[..., None], -2).amax(1).clamp(min=0)
    expected = literal.pooled(x_q, (omega * best).view(2, 7, 9))
    torch.testing.assert_close(comparison(confidence=True)(query, support, x_q, x_s, mask, p), expected)


@pytest.mark.parametrize("iou", [0.0, 1.0])
def test_prototype_cycle(iou):
    query, support, x_q, x_s, mask, p = cycle_case(2)
    scores = torch.cosine_similarity(x_q, p[..., None, None], 1)
    coarse = (literal.minmax(scores.flatten(1)).view_as(scores) >= 0.5).double()
    pseudo = literal.pooled(x_q, coarse)
    expected = p if iou else pseudo
    torch.testing.assert_close(comparison(ccm="proto", iou=iou)(query, support, x_q, x_s, mask, p), expected)
    back = torch.cosine_similarity(x_s.view(2, 2, 4, 7, 9), pseudo[:, None, :, None, None], 2)
    back = literal.minmax(back.flatten(0, 1).flatten(1)).view(2, -1) >= 0.5
    truth = literal.at_grid(mask, (7, 9)).view(2, -1) >= 0.5
    overlap = (back & truth).sum(1) / (back | truth).sum(1)
    middle = overlap.mean().item()
    mixed = comparison(ccm="proto", iou=middle)(query, support, x_q, x_s, mask, p)
    torch.testing.assert_close(mixed, torch.where((overlap >= middle)[:, None], pseudo, p))
    assert not torch.allclose(mixed, p) and not torch.allclose(mixed, pseudo)


def test_nothing_reliable_gives_the_prototype():
    query, support, x_q, x_s, mask, p = cycle_case(1)
    result = comparison()(query, support, x_q, x_s, mask * torch.tensor([0, 1])[:, None, None, None], p)
    assert torch.equal(result[0], p[0]) and not torch.allclose(result[1], p[1])


def test_gradient_of_the_pseudo_prototype_stays_on_the_reliable_pixels():
    query, support, x_q, x_s, mask, p = cycle_case(1)
    x_q.requires_grad_()
    comparison()(query, support, x_q, x_s, mask, p).sum().backward()
    weights = literal.at_grid(mask, (7, 9))
    for b in range(2):
        omega = literal.cycle(query.stage4[b].detach(), support.stage4[[b]].detach(), weights[b]).view(7, 9)
        assert torch.equal(x_q.grad[b, 0] != 0, omega > 0)
    assert query.stage4.grad is None and support.stage4.grad is None


# ---- interaction and fusion -----------------------------------------------------------------------------------------


def test_interaction_of_channels():
    pim, (p, q) = PrototypeInteraction(4, "channels").double(), (randn(2, 4), randn(2, 4, seed=1))
    got = pim(p, q)
    w = pim.maps["out"].weight
    for b in range(2):
        affinity = torch.outer(q[b], p[b]) / 2
        torch.testing.assert_close(got[1][b], q[b] + w @ (affinity.softmax(1) @ p[b]))
        torch.testing.assert_close(got[0][b], p[b] + w @ (affinity.T.softmax(1) @ q[b]))
    assert PrototypeInteraction(4, "identity")(p, q) == (p, q)
    assert not list(PrototypeInteraction(4, "identity").parameters())


def test_branches_share_weights_and_are_summed():
    head = head_of(mfm="branches", use_prior=False, pim="identity")
    query = randn(2, 8, 7, 9)
    one, two = randn(2, 8, 1, 1, seed=1), randn(2, 8, 1, 1, seed=2)
    _, inner = head.fusion(query, [[one], [two]])
    pooled = torch.nn.functional.adaptive_avg_pool2d(query, 6)
    weights = dict(head.fusion.named_parameters())
    compared = [
        literal.conv(weights, "merge.0.0", torch.cat([pooled, p.repeat(1, 1, 6, 6)], 1)).relu() for p in (one, two)
    ]
    expected = literal.classify(weights, "inner.0", literal.residual(weights, "beta.0", sum(compared)))
    torch.testing.assert_close(inner[0], expected)


def test_bins():
    fusion = FeatureEnrichment(4, 4, (1.0, 0.5, 0.125, 60), 0.1)
    assert fusion.grids((60, 41)) == [(60, 41), (30, 20), (7, 5), (60, 60)]
    assert fusion.grids((5, 5))[2] == (1, 1)


def test_stretched():
    maps = randn(2, 1, 3, 4)
    torch.testing.assert_close(stretched(maps).flatten(1), literal.minmax(maps.flatten(1)))
    assert (stretched(torch.ones(1, 1, 2, 2)) == 0).all()


@pytest.mark.parametrize("inner_weight", [1.0, 0.3, 0.0])
def test_loss_is_main_and_mean_inner(inner_weight):
    e = episode(size=(17, 25)).to(torch.float64)
    model = small("dpnet", torch.float64, inner_weight=inner_weight)
    query, support = model.encode(e.query, e.support)
    logits, inner = model.head(query, support, (e.mask == 1).double())
    expected = literal.loss(resized(logits, (17, 25)), e.target)
    expected += inner_weight * sum(literal.loss(resized(i, (17, 25)), e.target) for i in inner) / 2
    assert model.loss(*e).item() == pytest.approx(expected, rel=1e-9)
    assert segmentation_loss(logits, e.target) > 0


def test_masked_stage4_is_for_the_prior_alone():
    model, e = balanced(small("dpnet", premask_layer4=True), episode()), episode()
    query, support = model.encode(e.query, e.support)
    mask = (e.mask == 1).float()
    seen = {}
    model.head.ccm.register_forward_hook(lambda _, inputs, __: seen.update(support=inputs[1].stage4))
    maps = []
    whole = model.head.prior
    model.head.prior = lambda q, s, m, like: maps.append(s) or whole(q, s, m, like)
    model.segment(query, support, e.mask)
    assert torch.equal(seen["support"], support.stage4)
    weights = resized(mask, support.stage3.shape[2:])
    torch.testing.assert_close(maps[0], model.backbone.layer4(support.stage3 * weights))
