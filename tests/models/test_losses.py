"""The loss against a loop over pixels; groups of parameters; the guard around a step."""

import literal_models as literal
import pytest
import torch
from model_samples import balanced, blob, episode, small
from torch import nn

from fss_models import StepGuard, build, parameter_groups
from fss_models.backbones import Tiny
from fss_models.interpolation import resized
from fss_models.losses import sample_losses, segmentation_loss


def case():
    generator = torch.Generator().manual_seed(0)
    target = blob(3, 12, 15, generator)
    target[1, :6] = 255  # samples with different numbers of valid pixels
    return 3 * torch.randn(3, 2, 12, 15, generator=generator, dtype=torch.float64), target


def test_loss_is_a_mean_of_means():
    logits, target = case()
    losses = sample_losses(logits, target)
    for got, x, t in zip(losses, logits, target, strict=True):
        assert got.item() == pytest.approx(literal.sample_loss(x, t), rel=1e-12)
    assert segmentation_loss(logits, target).item() == pytest.approx(literal.loss(logits, target), rel=1e-12)
    one_mean = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
    assert one_mean.item() != pytest.approx(segmentation_loss(logits, target).item(), rel=1e-4)


def test_all_ignored_is_zero_with_gradient_zero():
    logits, target = case()
    target[1] = 255
    logits.requires_grad_()
    losses = sample_losses(logits, target)
    assert losses[1] == 0
    losses.mean().backward()
    assert (logits.grad[1] == 0).all() and (logits.grad[0] != 0).any() and logits.grad.isfinite().all()
    assert segmentation_loss(logits, torch.full_like(target, 255)) == 0


def test_logits_are_resized_and_widened():
    logits, target = case()
    small_logits = logits[..., ::3, ::3]
    up = literal.at_grid(small_logits, (12, 15))
    assert segmentation_loss(small_logits, target).item() == pytest.approx(literal.loss(up, target), rel=1e-12)
    half = segmentation_loss(small_logits.bfloat16(), target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, segmentation_loss(small_logits.bfloat16().float(), target), rtol=0, atol=0)
    assert resized(logits, (12, 15)) is logits


# ---- optimisation ---------------------------------------------------------------------------------------------------


def test_parameter_groups():
    model = small("dpcn", trainable_backbone=(4,))
    head, backbone = parameter_groups(model, 0.1)
    assert (head["lr"], backbone["lr"]) == (0.1, pytest.approx(0.01))
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.layer4.parameters()}
    assert parameter_groups(model, 0.1, 0.05)[1]["lr"] == 0.05
    assert [g["lr"] for g in parameter_groups(small("dpcn"), 0.1)] == [0.1, 0.1]
    assert [g["name"] for g in parameter_groups(build("panet", Tiny(8)), 0.1)] == ["backbone"]
    assert [g["name"] for g in parameter_groups(small("dpnet", trainable_backbone=False), 0.1)] == ["head"]
    torch.optim.SGD(parameter_groups(model, 0.1), momentum=0.9)


def guarded(gradient, **options):
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))]
    weights[0].grad, weights[1].grad = torch.tensor(gradient[:2]), torch.tensor(gradient[2:])
    optimizer, guard = torch.optim.SGD(weights, lr=1.0, weight_decay=0.5), StepGuard(**options)
    return guard.step(optimizer), guard, weights


def test_guard_clips_the_norm_of_all_gradients():
    taken, guard, weights = guarded([2.0, 1.0, 2.0], max_norm=1.5)
    assert taken and (guard.steps, guard.non_finite) == (1, 0)
    torch.testing.assert_close(torch.cat(list(weights[:2])).detach(), torch.tensor([-1.0, -0.5, -1.0]))
    for options in ({"max_norm": 5.0}, {}):
        weights = guarded([2.0, 1.0, 2.0], **options)[2]
        torch.testing.assert_close(torch.cat(list(weights[:2])).detach(), torch.tensor([-2.0, -1.0, -2.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_guard_leaves_out_and_counts_steps(bad):
    taken, guard, weights = guarded([2.0, 1.0, bad], max_norm=1.0)
    assert not taken and (guard.steps, guard.non_finite) == (0, 1)
    assert all((w == v).all() for w, v in zip(weights, (0, 0, 1), strict=True))
    other = StepGuard()
    other.load_state_dict(guard.state_dict())
    assert other.non_finite == 1
    with pytest.raises(ValueError, match="max_norm must be"):
        StepGuard(max_norm=0.0)


def test_guard_with_a_scaler():
    weight = nn.Parameter(torch.zeros(2))
    optimizer, scaler, guard = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu", 4.0), StepGuard(1.0)
    scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    assert guard.step(optimizer, scaler)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))
    optimizer.zero_grad()
    scaler.scale((weight * float("inf")).sum()).backward()
    assert not guard.step(optimizer, scaler) and guard.non_finite == 1 and scaler.get_scale() == 2.0
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


def test_guard_with_a_scaler_leaves_out_a_norm_that_overflows():
    """Every gradient is finite, which is all that the scaler looks at; their norm is not."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer, scaler, guard = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu", 1.0), StepGuard(1.0)
    scaler.scale((weight * 3e38).sum()).backward()
    assert weight.grad.isfinite().all() and not guard.step(optimizer, scaler)
    assert (guard.steps, guard.non_finite) == (0, 1) and not weight.detach().any()


@pytest.mark.parametrize("name", ["dpcn", "dpnet"])
def test_a_few_steps_learn_an_episode(name):
    """The whole loop: groups, loss, guard."""
    e = episode(size=(17, 25))
    model = balanced(small(name), e)
    optimizer = torch.optim.Adam(parameter_groups(model, 0.02))
    guard, losses = StepGuard(max_norm=5.0), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.loss(*e)
        loss.backward()
        guard.step(optimizer)
        losses.append(loss.item())
    assert guard.non_finite == 0 and min(losses[-3:]) < 0.7 * losses[0], losses
