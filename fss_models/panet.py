"""PANet (Wang et al., ICCV 2019): a prototype of foreground and background each, and the cosine with them. A baseline.

It has no parameters but those of the backbone, and segments with random or pretrained features alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fss_kernels import _checks, masked_avg_pool, prototype_cosine
from fss_models.backbones import Features
from fss_models.interpolation import resized
from fss_models.losses import sample_losses, segmentation_loss
from fss_models.model import FewShotModel, weights_of


class PANet(FewShotModel):
    """Prototype alignment network.

    Prototypes are pooled as in the released code, which upsamples the features without aligned corners. Its scores it
    upsamples so, too; here they are brought to the image's size with aligned corners, as those of every model. Ignored
    pixels of the support, which it takes for background, are neither.

    Args:
        backbone: a module, see `fss_models.backbones`.
        scale: of the cosines, >= 0.
        stage: whose features are compared, 2, 3 or 4.
        pool_eps: added to the mask's area.
        align_weight: of the alignment loss: the predicted query segments the support; 0: none.
        trainable_backbone: stages that train, True or False.
        frozen_bn: BatchNorm of the backbone uses running statistics in training, too.

    Raises:
        TypeError, ValueError: an option of another type or outside its range; the message names it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        scale: float = 20.0,
        *,
        stage: int = 4,
        pool_eps: float = 1e-5,
        align_weight: float = 1.0,
        trainable_backbone: bool | Sequence[int] = True,
        frozen_bn: bool = True,
    ) -> None:
        super().__init__(backbone, trainable_backbone, frozen_bn)
        self.scale = _checks.non_negative("PANet", "scale", scale)
        self.pool_eps = _checks.non_negative("PANet", "pool_eps", pool_eps)
        self.align_weight = _checks.non_negative("PANet", "align_weight", align_weight)
        _checks.integer("PANet", "stage", stage, 2, 4)
        self.stage = stage

    def prototypes(self, features: Tensor, masks: Tensor) -> Tensor:
        """Means over the shots (B, M, C) of features (B*S, C, h, w) under masks (B, S, M, H, W) at image size."""
        pooled = masked_avg_pool(
            features, masks.flatten(0, 1), eps=self.pool_eps, resize="adjoint", align_corners=False
        )
        return pooled.unflatten(0, masks.shape[:2]).mean(1)

    def segment(self, query: Features, support: Features, labels: Tensor) -> Tensor:
        """Logits (B, 2, h, w): cosines with the prototypes of background and foreground; ignored pixels are neither."""
        q, s = query[self.stage - 2], support[self.stage - 2]
        masks = weights_of(torch.stack([labels == 0, labels == 1], 2), s)
        return prototype_cosine(q, self.prototypes(s, masks), scale=self.scale)

    def alignment_losses(self, query: Features, support: Features, labels: Tensor, logits: Tensor) -> Tensor:
        """The losses (B,) with swapped roles: prototypes of the query under its prediction segment every shot.

        The mean over the shots; 0 for a sample that has only one class in its prediction. Logits (B, 2, h, w).
        """
        q, s = query[self.stage - 2], support[self.stage - 2]
        chosen = logits[:, 1] > logits[:, 0]
        masks = weights_of(torch.stack([~chosen, chosen], 1), q)
        prototypes = masked_avg_pool(q, masks, eps=self.pool_eps)
        batch, shots = labels.shape[:2]
        repeated = prototypes.unsqueeze(1).expand(-1, shots, -1, -1).flatten(0, 1)
        losses = sample_losses(prototype_cosine(s, repeated, scale=self.scale), labels.flatten(0, 1))
        both = masks.flatten(2).any(2).all(1)
        return torch.where(both, losses.unflatten(0, (batch, shots)).mean(1), 0.0)

    def episode_loss(self, query: Features, support: Features, labels: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of the query plus ``align_weight`` times the alignment loss."""
        logits = self.segment(query, support, labels)
        loss = segmentation_loss(resized(logits, target.shape[-2:]), target)
        if self.align_weight == 0:
            return loss
        return loss + self.align_weight * self.alignment_losses(query, support, labels, logits).mean()
