"""DPCN's modules and the whole network against their literal form."""

import literal_models as literal
import pytest
import torch
from model_samples import balanced, episode, small, soft_mask, stages

from fss_models import backbones, build, dpcn
from fss_models.dpcn import DPCN, WINDOWS, SupportActivation, bins_of, pooled_tokens
from fss_models.interpolation import resized


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(channels=(6, 10, 12), **options):
    backbone = torch.nn.Module()
    backbone.channels = channels
    torch.manual_seed(3)
    options = {"channels": 8, "dilations": (1, 2), "mid_dropout": 0.0, "cls_dropout": 0.0} | options
    return DPCN(backbone, **options).double().head


# ---- parameters -----------------------------------------------------------------------------------------------------


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts():
    """5.44 M and 6.23 M of the specification, cut after two digits, and its 14.9 M of layer 4."""
    model = build("dpcn", "resnet50")
    c = 256
    generator = 2 * (c * c + c)
    aspp = 2 * (c * c + c) + 3 * (9 * c * c + c) + 5 * c * c + 2 * 9 * c * c
    classifier = 9 * c * c + 2 * c + 2
    by_hand = 2 * 1536 * c + 9 * c + 1 + 3 * generator + (4 * c + 4) * c + aspp + classifier
    assert count(model.head) == by_hand
    assert by_hand // 10_000 == 544
    assert count(build("dpcn", "resnet50", generator_kernel=3).head) // 10_000 == 623
    trained = [p for p in model.backbone.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) // 100_000 == 149
    assert {id(p) for p in trained} == {id(p) for p in model.backbone.layer4.parameters()}


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 4 * 8 + 4),
        (dpcn.PASCAL, 4 * 8 + 4),
        (dpcn.COCO, 4 * 8 + 2),
        ({"ffm": False}, 4 * 8 + 3),
        ({"dcm": False}, 2 * 8 + 4),
        ({"sam": False, "ffm": False, "dcm": False}, 2 * 8 + 1),
        ({"kernels": ("vertical", "horizontal")}, 3 * 8 + 4),
        ({"kernels": ("square",)}, 2 * 8 + 4),
    ],
)
def test_decoder_width(options, width):
    model = small("dpcn", **options)
    assert model.head.width == width == model.head.decoder[0][0].in_channels
    e = episode()
    assert model.loss(*e).isfinite()
    assert model(*e[:3]).shape == (2, 2, 33, 41)


# ---- support activation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(7, 9), (6, 6)])
@pytest.mark.parametrize("shots", [1, 3])
def test_activation_is_the_literal_window_code(grid, shots):
    query, support = randn(2, 5, *grid), randn(2 * shots, 5, *grid, seed=1)
    mask = soft_mask(2, shots)
    weights, each = literal.at_grid(mask, grid), support.view(2, shots, 5, *grid)
    expected = torch.stack(
        [
            torch.stack([literal.window_activation(query, each[:, s], weights[:, s], w) for s in range(shots)]).mean(0)
            for w in WINDOWS
        ],
        1,
    )
    assert WINDOWS == ((5, 1), (3, 3), (1, 5))
    torch.testing.assert_close(SupportActivation(WINDOWS)(query, support, mask), expected)
    priors = torch.stack([literal.prior(query, each[:, s], weights[:, s]) for s in range(shots)]).mean(0)
    torch.testing.assert_close(SupportActivation(None)(query, support, mask)[:, 0], priors)


def test_activation_of_half_precision_is_computed_in_float32():
    query, support, mask = randn(1, 5, 7, 9).bfloat16(), randn(1, 5, 7, 9, seed=1).bfloat16(), soft_mask(1, 1)
    sam = SupportActivation(((3, 3),))
    maps = sam(query, support, mask)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, sam(query.float(), support.float(), mask), rtol=0, atol=0)


# ---- dynamic convolution --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [5, 9, 25])
@pytest.mark.parametrize("pixels", [0, 1, 2, 5, 23, 63, 120])
def test_pooling_is_gather_and_adaptive_pooling(pixels, bins):
    """Any number of foreground pixels in two shots, fewer than bins and none as well."""
    shots, grid = 2, (7, 9)
    features = randn(3 * shots, 4, *grid)
    places = torch.rand(3, shots * 63, generator=torch.Generator().manual_seed(1)).argsort(1)
    weights = 0.4 * (randn(3, shots * 63, seed=2).sigmoid())
    weights = torch.where(places < pixels, 0.6 + weights, weights).view(3, shots, *grid)
    chosen = weights >= 0.5
    assert (chosen.flatten(1).sum(1) == pixels).all()
    pooled = pooled_tokens(features, weights, bins_of(chosen, bins)).mT
    each = features.view(3, shots, 4, *grid)
    expected = literal.token_bands(each, weights, torch.zeros(3, 4).double(), bins)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


def kernels_of(size=3, **options):
    head = head_of(kernel_size=size, **options)
    support, weights = randn(2, 8, 7, 9), literal.at_grid(soft_mask(2, 1), (7, 9))
    return head.dcm, support, weights, literal.pooled(support, weights[:, 0])


def test_generators_do_not_share_parameters_and_taps_are_in_order():
    dcm, support, weights, p = kernels_of(5)
    assert len({id(x) for g in dcm.generators.values() for x in g.parameters()}) == 12
    vertical, horizontal, square = dcm.kernels(support, weights, p)
    assert [k.shape[2:] for k in (vertical, horizontal, square)] == [(5, 1), (1, 5), (5, 5)]
    tokens = literal.token_bands(support[:, None], weights, p, 5)
    generate = dcm.generators["square"]
    torch.testing.assert_close(square, generate(tokens.repeat_interleave(5, 2)).view(2, 8, 5, 5))
    torch.testing.assert_close(square[..., 0], square[..., 4])  # taps of a row come from one prototype
    assert not torch.allclose(square[..., 0, :], square[..., 4, :])
    torch.testing.assert_close(vertical[..., 0], dcm.generators["vertical"](tokens))
    torch.testing.assert_close(horizontal[..., 0, :], dcm.generators["horizontal"](tokens))


def test_without_foreground_every_band_is_the_prototype():
    """A mask too thin for the threshold still has a prototype; a sample with foreground keeps its bands."""
    dcm, support, weights, _ = kernels_of(5)
    weights = weights * torch.tensor([0.4, 1.0])[:, None, None, None]
    p = literal.pooled(support, weights[:, 0])
    bands = dcm.prototypes(support, weights, p, 5)
    torch.testing.assert_close(bands, literal.token_bands(support[:, None], weights, p, 5))
    torch.testing.assert_close(bands[0], p[0][:, None].expand(-1, 5))


def test_square_from_the_foreground():
    dcm, support, weights, p = kernels_of(3, square_from="fg")
    square = dcm.kernels(support, weights, p)[2]
    tokens = literal.token_bands(support[:, None], weights, p, 9)
    torch.testing.assert_close(square, dcm.generators["square"](tokens).view(2, 8, 3, 3))


# ---- the whole network ----------------------------------------------------------------------------------------------


SETTINGS = {
    "pascal": {},
    "coco": {"sam": False},
    "without ffm": {"ffm": False},
    "without dcm": {"dcm": False},
    "baseline": {"sam": False, "ffm": False, "dcm": False},
    "generators of 3": {"generator_kernel": 3},
    "kernels of 7": {"kernel_size": 7},
}


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_head_is_the_specification(setting, shots, empty):
    """Logits and gradients of every parameter and stage, with a support mask that is empty as well."""
    options = SETTINGS[setting]
    head = head_of(**options)
    windows = ((5, 1), (3, 3), (1, 5)) if options.get("sam", True) else None
    query, support = stages(2, shots)
    mask = soft_mask(2, shots)
    if empty:
        mask[0] = 0
    inputs = [*query, *support, *head.parameters()]
    logits = head(query, support, mask)
    weights = dict(head.named_parameters())
    expected = literal.dpcn_logits(
        weights, query, support, mask, windows, size=options.get("kernel_size", 5), dilations=(1, 2)
    )
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    if not empty:  # the literal min-max of a flat map has no use as a gradient
        probe = randn(*logits.shape, seed=9)
        got, want = (torch.autograd.grad(x, inputs, probe, allow_unused=True) for x in (logits, expected))
        for x, g, w in zip(inputs, got, want, strict=True):
            g, w = (torch.zeros_like(x) if d is None else d for d in (g, w))
            torch.testing.assert_close(g, w)


def test_masked_stage4():
    model, e = small("dpcn", premask_layer4=True), episode()
    query, support = model.encode(e.query, e.support)
    weights = resized((e.mask == 1).float(), support.stage3.shape[2:])
    masked = support._replace(stage4=model.backbone.layer4(support.stage3 * weights))
    expected = model.head(query, masked, (e.mask == 1).float())
    torch.testing.assert_close(model.segment(query, support, e.mask), expected)
    assert not torch.allclose(small("dpcn").segment(query, support, e.mask), expected)


@pytest.mark.parametrize("shots", [1, 2])
def test_loss_has_both_directions(shots):
    """Against a loop: the prediction for the query, then the query and its prediction as support for every shot."""
    e = episode(shots=shots, size=(17, 25)).to(torch.float64)
    model = balanced(small("dpcn", torch.float64, swap_weight=0.7), e)
    logits = model(*e[:3])
    total = literal.loss(logits, e.target)
    predicted = logits.argmax(1)
    assert 0 < predicted.float().mean() < 1
    for b in range(2):
        for s in range(shots):
            swapped = model(e.support[b, s][None], e.query[b][None, None], predicted[b][None, None])
            total += 0.7 * literal.sample_loss(swapped[0], e.mask[b, s]) / (2 * shots)
    assert model.loss(*e).item() == pytest.approx(total, rel=1e-9)
    model.swap_weight = 0.0
    assert model.loss(*e).item() == pytest.approx(literal.loss(logits, e.target))


def biased(model, foreground: float):
    with torch.no_grad():
        model.head.decoder[2][2].bias.copy_(torch.tensor([0.0, foreground]))
    return model


def test_swapped_loss_skips_empty_predictions():
    model, e = biased(small("dpcn", torch.float64), -50.0), episode().to(torch.float64)
    loss = model.loss(*e)
    assert loss.item() == pytest.approx(literal.loss(model(*e[:3]), e.target))
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_skipped_samples_count_as_zero():
    e = episode().to(torch.float64)
    model = balanced(small("dpcn", torch.float64), e)
    query, support = model.encode(e.query, e.support)
    logits = model(*e[:3])
    both = model.swapped_losses(query, support, e.mask, logits)
    none = logits.clone()
    none[0, 1] = none[0, 0] - 1
    one = model.swapped_losses(query, support, e.mask, none)
    assert one[0] == 0 and both[0] > 0
    torch.testing.assert_close(one[1], both[1])


def test_what_trains():
    def trained(model):
        return [i for i in range(5) if any(p.requires_grad for p in getattr(model.backbone, f"layer{i}").parameters())]

    with torch.device("meta"):
        assert trained(build("dpcn", "resnet50", **dpcn.COCO)) == []
        assert trained(build("dpcn", "vgg16", **dpcn.PASCAL)) == [4]
    assert trained(build("dpcn", "tiny")) == [0, 1, 2, 3, 4]
    assert trained(build("dpcn", "tiny", trainable_backbone=[1, 3])) == [0, 1, 3]
    model = build("dpcn", backbones.Tiny(8), channels=8, trainable_backbone=(4,))
    model.loss(*episode()).backward()
    assert all(p.grad is not None for p in model.backbone.layer4.parameters())
    assert all(p.grad is None for p in model.backbone.layer3.parameters())
