"""PANet against its own formulas: features upsampled to the image, pooled there, cosines."""

import literal_models as literal
import pytest
import torch
import torch.nn.functional as F
from model_samples import episode, small

import fss_models
from fss_models.backbones import Tiny


def scores(features: torch.Tensor, prototypes: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([20 * F.cosine_similarity(features, p[..., None, None], 1) for p in prototypes], 1)


def prototypes_at_image_size(support, labels) -> list[torch.Tensor]:
    """Background and foreground, from features (B, S, C, h, w) upsampled to labels (B, S, H, W)."""
    size, result = labels.shape[2:], []
    for label in (0, 1):
        each = []
        for s in range(labels.shape[1]):
            up = F.interpolate(support[:, s], size, mode="bilinear", align_corners=False)
            each.append(literal.pooled(up, (labels[:, s] == label).double(), 1e-5))
        result.append(torch.stack(each).mean(0))
    return result


@pytest.mark.parametrize("stage", [2, 4])
@pytest.mark.parametrize("shots", [1, 3])
def test_logits_and_loss(shots, stage):
    e = episode(shots=shots, size=(17, 25)).to(torch.float64)
    model = small("panet", torch.float64, stage=stage, align_weight=0.5)
    q = model.backbone(e.query)[stage - 2]
    s = model.backbone(e.support.flatten(0, 1))[stage - 2]
    s = s.view(2, shots, *s.shape[1:])
    small_logits = scores(q, prototypes_at_image_size(s, e.mask))
    expected = literal.at_grid(small_logits, (17, 25))
    logits = model(*e[:3])
    torch.testing.assert_close(logits, expected)
    total = literal.loss(logits, e.target)
    predicted = small_logits.argmax(1)
    assert all(len(p.unique()) == 2 for p in predicted)
    back = [literal.pooled(q, (predicted == label).double(), 1e-5) for label in (0, 1)]
    for k in range(shots):
        total += 0.5 / shots * literal.loss(literal.at_grid(scores(s[:, k], back), (17, 25)), e.mask[:, k])
    assert model.loss(*e).item() == pytest.approx(total, rel=1e-9)


def test_alignment_skips_predictions_of_one_class():
    e = episode().to(torch.float64)
    model = small("panet", torch.float64)
    query, support = model.encode(e.query, e.support)
    logits = model.segment(query, support, e.mask)
    both = model.alignment_losses(query, support, e.mask, logits)
    logits = logits.clone()
    logits[0, 0] = 30
    one = model.alignment_losses(query, support, e.mask, logits)
    assert one[0] == 0 and both[0] > 0 and one[1] == both[1]


def test_segments_without_training():
    """A red square before noise, found by random features."""
    hits = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = fss_models.PANet(Tiny(16), stage=2).eval()
        images, masks = 0.3 * torch.randn(2, 3, 65, 65), torch.zeros(2, 65, 65, dtype=torch.int64)
        for i, corner in enumerate((8, 24)):
            images[i, 0, corner : corner + 32, corner : corner + 32] += 2
            masks[i, corner : corner + 32, corner : corner + 32] = 1
        found = model(images[:1], images[None, 1:], masks[None, 1:]).argmax(1) == 1
        truth = masks[:1] == 1
        hits.append(((found & truth).sum() / (found | truth).sum()).item())
    assert min(hits) > 1.5 * 32**2 / 65**2, hits  # all foreground would have 32**2 / 65**2
