"""DPCN, the dynamic prototype convolution network (Liu et al., CVPR 2022).

The paper states the architecture but not every width, kernel size and rule. Where it is silent, the choice is the one
that the paper and the code of the PFENet family support best (see README.md). A choice that a study or a published
setting varies is an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fss_kernels import _checks, dynamic_conv2d, masked_avg_pool, prior_mask, support_activation
from fss_models.backbones import Features
from fss_models.interpolation import resized
from fss_models.layers import ASPP, Reduction, classifier, convolution, expanded, mean_prototype
from fss_models.losses import sample_losses, segmentation_loss
from fss_models.model import FewShotModel, default_stages, precise, weights_of

# The settings of the paper: on COCO-20i the backbone is frozen and the prior mask stands in for SAM, for speed.
PASCAL: dict[str, Any] = {"sam": True, "trainable_backbone": (4,)}
COCO: dict[str, Any] = {"sam": False, "trainable_backbone": False}

WINDOWS = ((5, 1), (3, 3), (1, 5))  # of SAM
FOREGROUND = 0.5  # weight of the resized mask from which a support pixel is pooled by DCM
_KERNELS = ("vertical", "horizontal", "square")


class SupportActivation(nn.Module):
    """SAM: for every window, how well each query pixel's surroundings match somewhere in the masked support.

    ``act_w = minmax_j( max_i mean_{o in w} cos(support_{i+o} mask_{i+o}, query_{j+o}) )``; with ``windows=None``
    PFENet's prior mask, one map. The maps are averaged over the shots.
    """

    def __init__(self, windows: Sequence[tuple[int, int]] | None) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """High-level query (B, C, h, w), support (B*S, C, h, w) and mask (B, S, H, W) to (B, L, h, w)."""
        query, support = precise(query), precise(support).unflatten(0, mask.shape[:2])
        if self.windows is None:
            return prior_mask(query, support, mask)
        return support_activation(query, support, mask, windows=self.windows)


class FeatureFiltering(nn.Module):
    """FFM: ``refined = sigmoid(conv(x_q * pseudo + x_p))``; the filtered query is ``x_q * (1 + refined)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, query: Tensor, prototype: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor]:
        """Query (B, C, h, w), prototype (B, C, h, w) and pseudo mask (B, 1, h, w) to the filtered query and mask."""
        refined = torch.sigmoid(self.score(query * pseudo + prototype))
        return query * (1 + refined), refined


def bins_of(chosen: Tensor, bins: int) -> Tensor:
    """Membership (B, bins, S, h, w), bool, of chosen pixels (B, S, h, w) in the bins of an adaptive pooling.

    The chosen pixels of all shots stand in a line, shot after shot, row after row. Of N pixels bin b gets those at
    floor(b N / bins) ... ceil((b + 1) N / bins) - 1: what ``F.adaptive_avg_pool1d`` averages.
    """
    line = chosen.flatten(1)
    tokens = line.long()
    rank, count = tokens.cumsum(1) - tokens, tokens.sum(1)[:, None]
    b = torch.arange(bins, device=chosen.device)
    first, last = b * count // bins, ((b + 1) * count + bins - 1) // bins
    inside = (rank[:, None] >= first[..., None]) & (rank[:, None] < last[..., None]) & line[:, None]
    return inside.unflatten(2, chosen.shape[1:])


def pooled_tokens(features: Tensor, weights: Tensor, members: Tensor) -> Tensor:
    """Average over every bin of the weighted features.

    Args:
        features: (B*S, C, h, w).
        weights: (B, S, h, w), multiplied into the features.
        members: (B, L, S, h, w), bool, the bins.

    Returns:
        (B, L, C); 0 for an empty bin.
    """
    parts = (members * weights[:, None]).transpose(1, 2).flatten(0, 1)  # (B*S, L, h, w)
    sums = masked_avg_pool(features, parts, eps=0.0) * parts.sum((2, 3))[..., None]
    return sums.unflatten(0, weights.shape[:2]).sum(1) / members.flatten(2).sum(2)[..., None].clamp(min=1)


class KernelGenerator(nn.Sequential):
    """Two 1-D convolutions over prototypes (B, C, L): one kernel tap each."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(
            nn.Conv1d(channels, channels, size, padding=size // 2),
            nn.ReLU(),
            nn.Conv1d(channels, channels, size, padding=size // 2),
        )


class DynamicConvolution(nn.Module):
    """DCM: kernels made of the support's foreground, one set an episode, convolved with the query depthwise.

    The foreground pixels of all shots are pooled to S prototypes and those to S*S; generators turn them into kernels of
    S x 1, 1 x S and S x S.
    """

    def __init__(
        self, channels: int, size: int, kernels: Sequence[str], square_from: str, generator_kernel: int
    ) -> None:
        super().__init__()
        self.size, self.square_from = size, square_from
        self.generators = nn.ModuleDict({k: KernelGenerator(channels, generator_kernel) for k in kernels})

    def prototypes(self, support: Tensor, weights: Tensor, prototype: Tensor, count: int) -> Tensor:
        """``count`` prototypes (B, C, count) from support (B*S, C, h, w); the mean one where there is no foreground."""
        chosen = weights >= FOREGROUND
        pooled = pooled_tokens(support, weights, bins_of(chosen, count))
        some = chosen.flatten(1).any(1)[:, None, None]
        return torch.where(some, pooled, prototype[:, None].to(pooled.dtype)).mT

    def kernels(self, support: Tensor, weights: Tensor, prototype: Tensor) -> list[Tensor]:
        """The kernels, (B, C, S, 1), (B, C, 1, S) and (B, C, S, S) or some of them."""
        few = self.prototypes(support, weights, prototype, self.size)
        many = few
        if "square" in self.generators:
            if self.square_from == "fg":
                many = self.prototypes(support, weights, prototype, self.size**2)
            else:
                many = F.adaptive_avg_pool1d(few, self.size**2)
        shapes = {"vertical": (self.size, 1), "horizontal": (1, self.size), "square": (self.size, self.size)}
        return [
            generate(many if name == "square" else few).unflatten(2, shapes[name])
            for name, generate in self.generators.items()
        ]

    def forward(self, query: Tensor, support: Tensor, weights: Tensor, prototype: Tensor) -> Tensor:
        """Query (B, C, h, w) to one response (B, C, h, w) a kernel, concatenated.

        The support is (B*S, C, h, w), weights (B, S, h, w) its mask on this grid, prototype (B, C).
        """
        return dynamic_conv2d(query, [k.to(query.dtype) for k in self.kernels(support, weights, prototype)])


class DPCNHead(nn.Module):
    """Everything after the backbone; see `DPCN` for the options."""

    def __init__(
        self,
        stages: Sequence[int],
        channels: int,
        mid_dropout: float,
        sam: SupportActivation,
        ffm: FeatureFiltering | None,
        dcm: DynamicConvolution | None,
        dilations: Sequence[int],
        cls_dropout: float,
    ) -> None:
        super().__init__()
        self.down_query = Reduction(stages, channels, mid_dropout)
        self.down_support = Reduction(stages, channels, mid_dropout)
        self.sam, self.ffm, self.dcm = sam, ffm, dcm
        responses = 1 if dcm is None else len(dcm.generators)
        maps = 1 if sam.windows is None else len(sam.windows)
        self.width = (responses + 1) * channels + maps + (ffm is not None)
        self.decoder = nn.Sequential(
            convolution(self.width, channels, 1), ASPP(channels, dilations), classifier(channels, cls_dropout)
        )

    def forward(self, query: Features, support: Features, mask: Tensor) -> Tensor:
        """Query (B, C, h, w), support (B*S, C, h, w) and foreground weights (B, S, H, W) to logits (B, 2, h, w)."""
        x_q, x_s = self.down_query(query), self.down_support(support)
        weights = resized(mask, x_s.shape[-2:])
        prototype = mean_prototype(x_s, weights)
        x_p = expanded(prototype, x_q)
        activation = self.sam(query.stage4, support.stage4, mask)
        activation = resized(activation, x_q.shape[-2:]).to(x_q.dtype)
        maps, filtered = [activation], x_q
        if self.ffm is not None:
            filtered, refined = self.ffm(x_q, x_p, activation.mean(1, keepdim=True))
            maps.append(refined)
        responses = filtered if self.dcm is None else self.dcm(filtered, x_s, weights, prototype)
        return self.decoder(torch.cat([responses, x_p, *maps], 1))


class DPCN(FewShotModel):
    """Dynamic prototype convolution network (Liu et al., CVPR 2022).

    ``DPCN(backbone, **PASCAL)`` and ``DPCN(backbone, **COCO)`` are the paper's two settings. Where the paper is silent
    the default is a choice; these options are marked "open".

    Args:
        backbone: a module, see `fss_models.backbones`.
        sam: support activation by windows; False: PFENet's prior mask instead (the paper's COCO setting).
        ffm: feature filtering; False: the query as it is, no refined mask for the decoder.
        dcm: dynamic convolution; False: the (filtered) query itself goes to the decoder.
        channels: of the mid-level features (open).
        mid_dropout: of the mid-level features (open).
        premask_layer4: compute layer 4 of the support from masked layer 3, as PFENet (open).
        kernel_size: S, odd, 1 ... 9.
        kernels: which of ``"vertical"`` (S x 1), ``"horizontal"`` (1 x S) and ``"square"`` (S x S) there are.
        square_from: the S*S prototypes are pooled from the S prototypes, ``"ps"`` (the letter of the paper), or from
            the foreground, ``"fg"``.
        generator_kernel: odd size of the generators' 1-D convolutions, 1 ... 9 (open: 1; 3 is the alternative).
        dilations: of ASPP (open).
        cls_dropout: before the logits (open).
        swap_weight: of the loss with swapped roles; 0: none.
        trainable_backbone: stages that train, True or False. None: stage 4 of a backbone that has stages, except
            `fss_models.backbones.Tiny`, which trains whole, as does any other module.
        frozen_bn: BatchNorm of the backbone uses running statistics in training, too (open).

    Raises:
        TypeError, ValueError: an option of another type or outside its range; the message names it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        sam: bool = True,
        ffm: bool = True,
        dcm: bool = True,
        channels: int = 256,
        mid_dropout: float = 0.5,
        premask_layer4: bool = False,
        kernel_size: int = 5,
        kernels: Sequence[str] = _KERNELS,
        square_from: str = "ps",
        generator_kernel: int = 1,
        dilations: Sequence[int] = (6, 12, 18),
        cls_dropout: float = 0.1,
        swap_weight: float = 1.0,
        trainable_backbone: bool | Sequence[int] | None = None,
        frozen_bn: bool = True,
    ) -> None:
        for name, flag in (("sam", sam), ("ffm", ffm), ("dcm", dcm), ("premask_layer4", premask_layer4)):
            _checks.boolean("DPCN", name, flag)
        _checks.fraction("DPCN", "mid_dropout", mid_dropout)
        _checks.fraction("DPCN", "cls_dropout", cls_dropout)
        _checks.integer("DPCN", "channels", channels, 1)
        for name, size in (("kernel_size", kernel_size), ("generator_kernel", generator_kernel)):
            _checks.integer("DPCN", name, size, 1, 9)
            _checks.odd("DPCN", name, [size], 9)
        _checks.sequence("DPCN", "kernels", kernels, "kernel", f"some of {', '.join(_KERNELS)}")
        for kernel in kernels:
            _checks.one_of("DPCN", "kernels", kernel, _KERNELS)
        if len(set(kernels)) < len(kernels):
            raise ValueError(f"DPCN: kernels must be some of {', '.join(_KERNELS)}, each once, got {kernels!r}")
        _checks.one_of("DPCN", "square_from", square_from, ("ps", "fg"))
        _checks.sequence("DPCN", "dilations", dilations, "dilation", "a sequence of int")
        for dilation in dilations:
            _checks.integer("DPCN", "dilations", dilation, 1)
        swap_weight = _checks.non_negative("DPCN", "swap_weight", swap_weight)
        if premask_layer4 and not hasattr(backbone, "stage4"):
            raise ValueError("DPCN: premask_layer4 needs a backbone with stage4(stage3)")
        if trainable_backbone is None:
            trainable_backbone = default_stages(backbone, (4,))
        super().__init__(backbone, trainable_backbone, frozen_bn)
        self.premask_layer4, self.swap_weight = premask_layer4, swap_weight
        self.head = DPCNHead(
            self.channels_of_stages,
            channels,
            mid_dropout,
            sam=SupportActivation(WINDOWS if sam else None),
            ffm=FeatureFiltering(channels) if ffm else None,
            dcm=DynamicConvolution(channels, kernel_size, kernels, square_from, generator_kernel) if dcm else None,
            dilations=dilations,
            cls_dropout=cls_dropout,
        )

    def _logits(self, query: Features, support: Features, mask: Tensor) -> Tensor:
        if self.premask_layer4:
            backbone: Any = self.backbone
            weights = resized(mask.flatten(0, 1).unsqueeze(1), support.stage3.shape[-2:])
            support = support._replace(stage4=backbone.stage4(support.stage3 * weights.to(support.stage3.dtype)))
        return self.head(query, support, mask)

    def segment(self, query: Features, support: Features, labels: Tensor) -> Tensor:
        """Logits (B, 2, h, w), see `FewShotModel.segment`."""
        return self._logits(query, support, weights_of(labels == 1, query.stage4))

    def swapped_losses(self, query: Features, support: Features, labels: Tensor, logits: Tensor) -> Tensor:
        """The losses (B,) with swapped roles: the query and its prediction segment every shot of the support.

        The mean over the shots; 0 for a sample whose predicted foreground is empty. Logits (B, 2, H, W).
        """
        batch, shots = labels.shape[:2]
        chosen = logits[:, 1] > logits[:, 0]
        mask = weights_of(chosen, query.stage4)
        once = [f.unsqueeze(1).expand(-1, shots, -1, -1, -1).flatten(0, 1) if shots > 1 else f for f in query]
        masks = mask.unsqueeze(1).expand(-1, shots, -1, -1).flatten(0, 1).unsqueeze(1)
        losses = sample_losses(self._logits(support, Features(*once), masks), labels.flatten(0, 1))
        found = chosen.flatten(1).any(1)
        return torch.where(found, losses.unflatten(0, (batch, shots)).mean(1), 0.0)

    def episode_loss(self, query: Features, support: Features, labels: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of the query plus ``swap_weight`` times that of the support from the predicted query."""
        logits = resized(self.segment(query, support, labels), target.shape[-2:])
        loss = segmentation_loss(logits, target)
        if self.swap_weight == 0:
            return loss
        return loss + self.swap_weight * self.swapped_losses(query, support, labels, logits).mean()
