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

from fss_kernels import (
    cycle_consistent_foreground,
    dense_cosine_max,
    masked_avg_pool,
    prior_mask,
    prototype_cosine,
)
from fss_models.backbones import Features
from fss_models.interpolation import resized
from fss_models.layers import FeatureEnrichment, Reduction, mean_prototype
from fss_models.losses import segmentation_loss
from fss_models.model import (
    FewShotModel,
    check_count,
    check_flags,
    check_number,
    check_option,
    default_stages,
    precise,
    weights_of,
)


def stretched(maps: Tensor) -> Tensor:
    """Maps (B, 1, h, w) brought to 0 ... 1 by their own minimum and maximum."""
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low + 1e-7)


class CycleComparison(nn.Module):
    """CCM: the pseudo-prototype (B, C) of the query from its reliable foreground.

    ``pixel``: query pixel j is reliable when it is the best match of a foreground pixel of the support and its own best
    match in the support is foreground. ``proto``: the prototype predicts a coarse query mask, the prototype of that
    predicts the support mask back; if the prediction agrees with the mask, the coarse mask is reliable.
    Where nothing is reliable the pseudo-prototype is the prototype.
    """

    def __init__(
        self, ccm: str, match: str, threshold: float, confidence: bool, shots: str, iou: float, pool_eps: float
    ) -> None:
        super().__init__()
        self.ccm, self.match, self.threshold, self.confidence = ccm, match, threshold, confidence
        self.shots, self.iou, self.pool_eps = shots, iou, pool_eps

    def forward(
        self, query: Features, support: Features, x_q: Tensor, x_s: Tensor, mask: Tensor, prototype: Tensor
    ) -> Tensor:
        """Features of both sides, mid-level x_q (B, C, h, w) and x_s (B*S, C, h, w), mask (B, S, H, W)."""
        if self.ccm == "proto":
            return self.by_prototypes(x_q, x_s, resized(mask, x_s.shape[-2:]), prototype)
        u_q, u_s = (x_q, x_s) if self.match == "mid" else (getattr(f, self.match) for f in (query, support))
        u_q, u_s = precise(u_q.detach()), precise(u_s.detach()).unflatten(0, mask.shape[:2])
        if self.shots == "union":
            return self.pooled(x_q, self.reliable(u_q, u_s, mask), prototype)
        each = [
            self.pooled(x_q, self.reliable(u_q, u_s[:, [s]], mask[:, [s]]), prototype) for s in range(mask.shape[1])
        ]
        return torch.stack(each).mean(0)

    def reliable(self, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """Weights (B, h, w) of the query pixels: 1 or their confidence where the cycle closes, 0 elsewhere."""
        chosen = weights_of(cycle_consistent_foreground(query, support, mask, threshold=self.threshold), query)
        if not self.confidence:
            return chosen
        foreground = resized(mask, support.shape[-2:]) >= self.threshold
        scores, _ = dense_cosine_max(query, support, foreground, masked="exclude")
        return chosen * scores[:, :, 0].amax(1).clamp(min=0)

    def pooled(self, x_q: Tensor, reliable: Tensor, prototype: Tensor) -> Tensor:
        """The average of the query over the reliable pixels."""
        pseudo = masked_avg_pool(x_q, reliable, eps=self.pool_eps)
        return torch.where(reliable.flatten(1).sum(1, keepdim=True) > 0, pseudo, prototype)

    def by_prototypes(self, x_q: Tensor, x_s: Tensor, weights: Tensor, prototype: Tensor) -> Tensor:
        """The alternative; weights (B, S, h, w)."""
        coarse = stretched(prototype_cosine(x_q.detach(), prototype.detach()[:, None])) >= self.threshold
        pseudo = masked_avg_pool(x_q, weights_of(coarse[:, 0], x_q), eps=self.pool_eps)
        shots = weights.shape[1]
        repeated = pseudo.detach().repeat_interleave(shots, 0)[:, None]
        back = stretched(prototype_cosine(x_s.detach(), repeated)).view(weights.shape) >= self.threshold
        truth = weights >= self.threshold
        overlap = (back & truth).flatten(1).sum(1) / (back | truth).flatten(1).sum(1).clamp(min=1)
        return torch.where((overlap >= self.iou)[:, None], pseudo, prototype)


class PrototypeInteraction(nn.Module):
    """PIM: prototype and pseudo-prototype exchange what their correlation says.

    ``tokens``: attention between the two, ``P + W_o(softmax(theta(P) phi(P)^T / sqrt(C)) psi(P))``. ``channels``: the
    attention is between the channels of the two, C x C. ``identity``: none.
    """

    def __init__(self, channels: int, pim: str) -> None:
        super().__init__()
        self.pim, self.scale = pim, channels**-0.5
        names = {"tokens": ("theta", "phi", "psi", "out"), "channels": ("out",), "identity": ()}[pim]
        self.maps = nn.ModuleDict({name: nn.Linear(channels, channels, bias=False) for name in names})

    def forward(self, prototype: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor]:
        """Two (B, C) to two (B, C)."""
        if self.pim == "identity":
            return prototype, pseudo
        both = torch.stack([prototype, pseudo], 1)
        if self.pim == "tokens":
            affinity = self.maps["theta"](both) @ self.maps["phi"](both).mT * self.scale
            exchanged = affinity.softmax(-1) @ self.maps["psi"](both)
        else:
            affinity = pseudo[:, :, None] * prototype[:, None] * self.scale
            to_pseudo = affinity.softmax(2) @ prototype[..., None]
            to_prototype = affinity.mT.softmax(2) @ pseudo[..., None]
            exchanged = torch.stack([to_prototype, to_pseudo], 1)[..., 0]
        mixed = both + self.maps["out"](exchanged)
        return mixed[:, 0], mixed[:, 1]


class DPNetHead(nn.Module):
    """Everything after the backbone; see `DPNet` for the options."""

    def __init__(
        self,
        stages: Sequence[int],
        channels: int,
        mid_dropout: float,
        pool_eps: float,
        ccm: CycleComparison,
        pim: str,
        mfm: str,
        use_prior: bool,
        prior_eps: float,
        flat_eps: float,
        bins: Sequence[int | float],
        cls_dropout: float,
    ) -> None:
        super().__init__()
        self.down_query = Reduction(stages, channels, mid_dropout)
        self.down_support = Reduction(stages, channels, mid_dropout)
        self.pool_eps, self.prior_eps, self.flat_eps = pool_eps, prior_eps, flat_eps
        self.use_prior, self.mfm = use_prior, mfm
        self.ccm = ccm
        self.pim = PrototypeInteraction(channels, pim)
        prototypes = 2 if mfm == "concat" else 1
        self.fusion = FeatureEnrichment(channels, prototypes * channels + use_prior, bins, cls_dropout)

    def forward(
        self, query: Features, support: Features, mask: Tensor, masked_stage4: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Query (B, C, h, w), support (B*S, C, h, w), foreground weights (B, S, H, W): logits, inner logits.

        ``masked_stage4`` replaces stage 4 of the support in the prior mask.
        """
        x_q, x_s = self.down_query(query), self.down_support(support)
        prototype = mean_prototype(x_s, resized(mask, x_s.shape[-2:]), self.pool_eps)
        pseudo = self.ccm(query, support, x_q, x_s, mask, prototype)
        tokens = [p[..., None, None] for p in self.pim(prototype, pseudo)]
        compared = support.stage4 if masked_stage4 is None else masked_stage4
        prior = [self.prior(query.stage4, compared, mask, x_q)] if self.use_prior else []
        branches = [[*tokens, *prior]] if self.mfm == "concat" else [[token, *prior] for token in tokens]
        return self.fusion(x_q, branches)

    def prior(self, query: Tensor, support: Tensor, mask: Tensor, like: Tensor) -> Tensor:
        """PFENet's prior mask (B, 1, h, w) on the grid and in the dtype of ``like``."""
        support = precise(support).unflatten(0, mask.shape[:2])
        prior = prior_mask(precise(query), support, mask, eps=self.prior_eps, flat_eps=self.flat_eps)
        return resized(prior, like.shape[-2:]).to(like.dtype)


class DPNet(FewShotModel):
    """A DPNet-style network, reconstructed from the abstract of Mao et al., AAAI 2022: not the authors' network.

    Every option and default below is a reconstruction.

    Args:
        backbone: a module, see `fss_models.backbones`.
        ccm: cycle comparison by ``"pixel"`` or by ``"proto"``.
        match: features compared by pixels: ``"stage4"``, ``"stage3"`` or the reduced ``"mid"``.
        threshold: of the resized mask (and of coarse masks), 0 ... 1.
        confidence: weigh reliable pixels by their best cosine with the foreground.
        shots: with several shots pool over the ``"union"`` of their reliable pixels or take the ``"mean"`` of their
            pseudo-prototypes.
        iou: overlap with the support mask from which ``ccm="proto"`` trusts its coarse mask.
        pim: prototype interaction by ``"tokens"`` or ``"channels"``, or ``"identity"``.
        mfm: prototypes are compared with the query by ``"concat"`` or in two ``"branches"`` with shared weights, which
            are summed.
        use_prior: PFENet's prior mask in the comparison.
        premask_layer4: the prior's layer 4 of the support from masked layer 3, as PFENet; the cycle needs the unmasked.
        bins: of the fusion; int cells, or float parts of the grid (PFENet's COCO setting is 1.0, 0.5, 0.25, 0.125).
        channels: of the mid-level features and everything after.
        mid_dropout, cls_dropout: of the mid-level features and before logits.
        pool_eps, prior_eps: of masked average pooling; at the norms of the cosines.
        flat_eps: a prior whose values differ by no more is 0.
        inner_weight: of the mean loss of the bins' own logits.
        trainable_backbone: stages that train, True or False. None: nothing of a pretrained kind, all of
            `fss_models.backbones.Tiny` and of other modules.
        frozen_bn: BatchNorm of the backbone uses running statistics in training, too.

    Raises:
        ValueError: an option outside its range; the message names it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        ccm: str = "pixel",
        match: str = "stage4",
        threshold: float = 0.5,
        confidence: bool = False,
        shots: str = "union",
        iou: float = 0.5,
        pim: str = "tokens",
        mfm: str = "concat",
        use_prior: bool = True,
        premask_layer4: bool = False,
        bins: Sequence[int | float] = (60, 30, 15, 8),
        channels: int = 256,
        mid_dropout: float = 0.5,
        cls_dropout: float = 0.1,
        pool_eps: float = 5e-4,
        prior_eps: float = 1e-7,
        flat_eps: float = 1e-6,
        inner_weight: float = 1.0,
        trainable_backbone: bool | Sequence[int] | None = None,
        frozen_bn: bool = True,
    ) -> None:
        check_flags(
            "DPNet", confidence=confidence, use_prior=use_prior, premask_layer4=premask_layer4, frozen_bn=frozen_bn
        )
        for name, value, choices in (
            ("ccm", ccm, ("pixel", "proto")),
            ("match", match, ("stage4", "stage3", "mid")),
            ("shots", shots, ("union", "mean")),
            ("pim", pim, ("tokens", "channels", "identity")),
            ("mfm", mfm, ("concat", "branches")),
        ):
            check_option("DPNet", name, value, choices)
        for name, number, highest in (
            ("threshold", threshold, 1.0),
            ("iou", iou, 1.0),
            ("mid_dropout", mid_dropout, 1.0),
            ("cls_dropout", cls_dropout, 1.0),
            ("pool_eps", pool_eps, float("inf")),
            ("prior_eps", prior_eps, float("inf")),
            ("flat_eps", flat_eps, float("inf")),
            ("inner_weight", inner_weight, float("inf")),
        ):
            check_number("DPNet", name, number, highest=highest)
        check_count("DPNet", "channels", channels)
        counts = isinstance(bins, (tuple, list)) and bool(bins)
        if not counts or not all((type(b) is int and b > 0) or (type(b) is float and 0 < b <= 1) for b in bins):
            raise ValueError(f"DPNet: bins must be positive int or float parts 0 ... 1 of the grid, got {bins!r}")
        if premask_layer4 and not hasattr(backbone, "stage4"):
            raise ValueError("DPNet: premask_layer4 needs a backbone with stage4(stage3)")
        if trainable_backbone is None:
            trainable_backbone = default_stages(backbone, False)
        super().__init__(backbone, trainable_backbone, frozen_bn)
        self.premask_layer4, self.inner_weight = premask_layer4, inner_weight
        comparison = CycleComparison(ccm, match, threshold, confidence, shots, iou, pool_eps)
        self.head = DPNetHead(
            self.channels_of_stages,
            channels,
            mid_dropout,
            pool_eps,
            comparison,
            pim,
            mfm,
            use_prior,
            prior_eps,
            flat_eps,
            bins,
            cls_dropout,
        )

    def _results(self, query: Features, support: Features, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        mask = weights_of(labels == 1, query.stage4)
        masked = self.with_masked_stage4(support, mask).stage4 if self.premask_layer4 else None
        return self.head(query, support, mask, masked)

    def segment(self, query: Features, support: Features, labels: Tensor) -> Tensor:
        """Logits (B, 2, h, w), see `FewShotModel.segment`."""
        return self._results(query, support, labels)[0]

    def episode_loss(self, query: Features, support: Features, labels: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of the logits plus ``inner_weight`` times the mean of that of the bins' logits."""
        logits, inner = self._results(query, support, labels)
        loss = segmentation_loss(logits, target)
        if self.inner_weight == 0:
            return loss
        return loss + self.inner_weight * torch.stack([segmentation_loss(i, target) for i in inner]).mean()
