"""A network in the style of DPNet, the dual prototype network (Mao et al., AAAI 2022): a reconstruction.

Only the abstract was at hand. It names the parts: a prototype of the support, a pseudo-prototype of the query, a cycle
comparison module that picks reliable query foreground for it, a prototype interaction module, a multi-scale fusion
module around the dense comparison. Every equation below is a reconstruction from the code base that the network grows
out of (PFENet), so results of this module are not results of DPNet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fss_kernels import _checks, cycle_consistent_foreground, masked_avg_pool, prior_mask
from fss_models.backbones import Features
from fss_models.interpolation import resized
from fss_models.layers import FeatureEnrichment, Reduction, mean_prototype
from fss_models.losses import segmentation_loss
from fss_models.model import FewShotModel, default_stages, precise, weights_of


def cycle_comparison(x_q: Tensor, query: Tensor, support: Tensor, mask: Tensor, prototype: Tensor) -> Tensor:
    """CCM: the pseudo-prototype (B, C), the mean of the query's reliable pixels; without one, the prototype.

    A query pixel is reliable when it is the best match of a foreground pixel of some shot and its own best match in
    that shot is foreground.

    Args:
        x_q: mid-level features (B, C, h, w) of the query, which are averaged.
        query: stage 4 (B, C', h', w') of the query, which is compared.
        support: stage 4 (B, S, C', h', w') of the support, not masked, or no pixel could find the background.
        mask: (B, S, H, W).
        prototype: (B, C).
    """
    reliable = cycle_consistent_foreground(query, support, mask)
    pseudo = masked_avg_pool(x_q, weights_of(reliable, query))
    return torch.where(reliable.flatten(1).any(1, keepdim=True), pseudo, prototype)


class PrototypeInteraction(nn.Module):
    """PIM: attention between the two prototypes P, ``P + W_o(softmax(theta(P) phi(P)^T / sqrt(C)) psi(P))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**-0.5
        names = ("theta", "phi", "psi", "out")
        self.maps = nn.ModuleDict({name: nn.Linear(channels, channels, bias=False) for name in names})

    def forward(self, prototype: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor]:
        """Two (B, C) to two (B, C)."""
        both = torch.stack([prototype, pseudo], 1)
        affinity = self.maps["theta"](both) @ self.maps["phi"](both).mT * self.scale
        mixed = both + self.maps["out"](affinity.softmax(-1) @ self.maps["psi"](both))
        return mixed[:, 0], mixed[:, 1]


class DPNetHead(nn.Module):
    """Everything after the backbone; see `DPNet` for the options."""

    def __init__(
        self, stages: Sequence[int], channels: int, mid_dropout: float, bins: Sequence[int | float], cls_dropout: float
    ) -> None:
        super().__init__()
        self.down_query = Reduction(stages, channels, mid_dropout)
        self.down_support = Reduction(stages, channels, mid_dropout)
        self.pim = PrototypeInteraction(channels)
        self.fusion = FeatureEnrichment(channels, 2 * channels + 1, bins, cls_dropout)

    def forward(self, query: Features, support: Features, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Query (B, C, h, w), support (B*S, C, h, w), foreground weights (B, S, H, W): logits, inner logits."""
        x_q, x_s = self.down_query(query), self.down_support(support)
        prototype = mean_prototype(x_s, resized(mask, x_s.shape[-2:]))
        high_q, high_s = precise(query.stage4), precise(support.stage4).unflatten(0, mask.shape[:2])
        pseudo = cycle_comparison(x_q, high_q, high_s, mask, prototype)
        prior = resized(prior_mask(high_q, high_s, mask), x_q.shape[-2:]).to(x_q.dtype)
        return self.fusion(x_q, [*(p[..., None, None] for p in self.pim(prototype, pseudo)), prior])


class DPNet(FewShotModel):
    """A DPNet-style network, reconstructed from the abstract of Mao et al., AAAI 2022: not the authors' network.

    Every option and default below is a reconstruction.

    Args:
        backbone: a module, see `fss_models.backbones`.
        bins: of the fusion; int cells, or float parts of the grid (PFENet's COCO setting is 1.0, 0.5, 0.25, 0.125).
        channels: of the mid-level features and everything after.
        mid_dropout, cls_dropout: of the mid-level features and before logits.
        trainable_backbone: stages that train, True or False. None: nothing of a pretrained kind, all of
            `fss_models.backbones.Tiny` and of other modules.
        frozen_bn: BatchNorm of the backbone uses running statistics in training, too.

    Raises:
        TypeError, ValueError: an option of another type or outside its range; the message names it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        bins: Sequence[int | float] = (60, 30, 15, 8),
        channels: int = 256,
        mid_dropout: float = 0.5,
        cls_dropout: float = 0.1,
        trainable_backbone: bool | Sequence[int] | None = None,
        frozen_bn: bool = True,
    ) -> None:
        _checks.sequence("DPNet", "bins", bins, "bin", "a sequence of int or float")
        if not all((type(b) is int and b > 0) or (type(b) is float and 0 < b <= 1) for b in bins):
            raise ValueError(f"DPNet: bins must be positive int or float parts 0 ... 1 of the grid, got {bins!r}")
        _checks.integer("DPNet", "channels", channels, 1)
        _checks.fraction("DPNet", "mid_dropout", mid_dropout)
        _checks.fraction("DPNet", "cls_dropout", cls_dropout)
        if trainable_backbone is None:
            trainable_backbone = default_stages(backbone, False)
        super().__init__(backbone, trainable_backbone, frozen_bn)
        self.head = DPNetHead(self.channels_of_stages, channels, mid_dropout, bins, cls_dropout)

    def _results(self, query: Features, support: Features, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.head(query, support, weights_of(labels == 1, query.stage4))

    def segment(self, query: Features, support: Features, labels: Tensor) -> Tensor:
        """Logits (B, 2, h, w), see `FewShotModel.segment`."""
        return self._results(query, support, labels)[0]

    def episode_loss(self, query: Features, support: Features, labels: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of the logits plus the mean of that of the bins' logits."""
        logits, inner = self._results(query, support, labels)
        return segmentation_loss(logits, target) + torch.stack([segmentation_loss(i, target) for i in inner]).mean()
