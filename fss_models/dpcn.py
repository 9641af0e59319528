"""DPCN, the dynamic prototype convolution network (Liu et al., CVPR 2022).

The paper states the architecture but not every width, kernel size and rule. What it leaves open is an option here, and
its default is the choice that the paper and the code of the PFENet family support best (see README.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fss_kernels import dense_cosine_max, dynamic_conv2d, masked_avg_pool, prior_mask, support_activation
from fss_models.backbones import Features
from fss_models.interpolation import resized
from fss_models.layers import ASPP, Reduction, classifier, convolution, expanded, mean_prototype, pair
from fss_models.losses import sample_losses, segmentation_loss
from fss_models.model import (
    FewShotModel,
    check_count,
    check_flags,
    check_number,
    check_odd,
    check_option,
    check_windows,
    default_stages,
    precise,
    weights_of,
)

# The settings of the paper: on COCO-20i the backbone is frozen and the prior mask stands in for SAM, for speed.
PASCAL: dict[str, Any] = {"sam": True, "trainable_backbone": (4,)}
COCO: dict[str, Any] = {"sam": False, "trainable_backbone": False}

_ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "identity": nn.Identity}
_KERNELS = ("vertical", "horizontal", "square")


class SupportActivation(nn.Module):
    """SAM: for every window, how well each query pixel's surroundings match somewhere in the masked support.

    ``act_w = minmax_j( max_i mean_{o in w} cos(support_{i+o} mask_{i+o}, query_{j+o}) )``; with ``windows=None``
    PFENet's prior mask, one map.
    """

    def __init__(
        self, windows: Sequence[tuple[int, int]] | None, eps: float, flat_eps: float, normalisation: str, shots: str
    ) -> None:
        super().__init__()
        self.windows, self.eps, self.flat_eps = windows, eps, flat_eps
        self.normalisation, self.shots = normalisation, shots

    def forward(self, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """High-level query (B, C, h, w), support (B*S, C, h, w) and mask (B, S, H, W) to (B, L, h, w)."""
        query, support = precise(query), precise(support).unflatten(0, mask.shape[:2])
        if self.shots == "mean":
            return self.maps(query, support, mask)
        each = [self.maps(query, support[:, [s]], mask[:, [s]]) for s in range(mask.shape[1])]
        return torch.stack(each).amax(0)

    def maps(self, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """The maps (B, L, h, w), averaged over the shots."""
        windows = ((1, 1),) if self.windows is None else self.windows
        if self.normalisation == "none":
            return dense_cosine_max(query, support, mask, windows=windows, eps=self.eps)[0].mean(1)
        if self.windows is None:
            return prior_mask(query, support, mask, eps=self.eps, flat_eps=self.flat_eps)
        return support_activation(query, support, mask, windows=windows, eps=self.eps, flat_eps=self.flat_eps)


class FeatureFiltering(nn.Module):
    """FFM: ``refined = sigmoid(conv(x_q * pseudo + x_p))``; the filtered query is ``x_q * (1 + refined)``."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, 1, kernel, padding=kernel // 2)

    def forward(self, query: Tensor, prototype: Tensor, pseudo: Tensor | None) -> tuple[Tensor, Tensor]:
        """Query (B, C, h, w), prototype (B, C, h, w) and pseudo mask (B, 1, h, w) to the filtered query and mask."""
        highlighted = query if pseudo is None else query * pseudo
        refined = torch.sigmoid(self.score(highlighted + prototype))
        return query * (1 + refined), refined


def foreground_pixels(weights: Tensor, mask: Tensor, rule: str, threshold: float, empty: str) -> Tensor:
    """The support pixels (B, S, h, w), bool, that become tokens.

    Args:
        weights: (B, S, h, w), the resized mask.
        mask: (B, S, H, W).
        rule: ``"threshold"``: weight >= threshold; ``"positive"``: the mask, taken as 0 and 1, has weight > 0 here;
            ``"nearest"``: it is 1 at the nearest pixel.
        threshold: of the first rule.
        empty: ``"peak"``: the first pixel of the largest weight in a sample that has no other; ``"prototype"``: none.
    """
    certain = weights_of(mask >= 0.5, mask)  # a soft mask has weight everywhere
    if rule == "nearest":
        chosen = F.interpolate(certain, weights.shape[-2:], mode="nearest") > 0
    elif rule == "positive":
        chosen = resized(certain, weights.shape[-2:]) > 0
    else:
        chosen = weights >= threshold
    if empty == "peak":
        flat = weights.flatten(1)
        peak = torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.argmax(1, keepdim=True), True)
        none = ~chosen.flatten(1).any(1)
        chosen = chosen | (peak & none[:, None]).view(chosen.shape)
    return chosen


def bins_of(chosen: Tensor, bins: int, order: str = "rows") -> Tensor:
    """Membership (B, bins, S, h, w), bool, of chosen pixels (B, S, h, w) in the bins of an adaptive pooling.

    The chosen pixels of all shots stand in a line, shot after shot, by rows (or by columns). Of N pixels bin b gets
    those at floor(b N / bins) ... ceil((b + 1) N / bins) - 1: what ``F.adaptive_avg_pool1d`` averages.
    """
    line = chosen.mT if order == "columns" else chosen
    tokens = line.flatten(1).long()
    rank, count = tokens.cumsum(1) - tokens, tokens.sum(1)[:, None]
    b = torch.arange(bins, device=chosen.device)
    first, last = b * count // bins, ((b + 1) * count + bins - 1) // bins
    inside = (rank[:, None] >= first[..., None]) & (rank[:, None] < last[..., None]) & line.flatten(1)[:, None]
    members = inside.unflatten(2, line.shape[1:])
    return members.mT if order == "columns" else members


def pooled_tokens(features: Tensor, weights: Tensor, members: Tensor, pooling: str = "avg") -> Tensor:
    """Average (or maximum) over every bin of the weighted features.

    Args:
        features: (B*S, C, h, w).
        weights: (B, S, h, w), multiplied into the features.
        members: (B, L, S, h, w), bool, the bins.
        pooling: ``"avg"`` or ``"max"``.

    Returns:
        (B, L, C); 0 for an empty bin.
    """
    if pooling == "max":
        weighted = (features.unflatten(0, weights.shape[:2]) * weights[:, :, None].to(features.dtype)).transpose(1, 2)
        lowest = torch.finfo(features.dtype).min
        bins = [weighted.masked_fill(~m[:, None], lowest).amax((2, 3, 4)) for m in members.unbind(1)]
        return torch.where(members.flatten(2).any(2)[..., None], torch.stack(bins, 1), 0.0)
    parts = (members * weights[:, None]).transpose(1, 2).flatten(0, 1)  # (B*S, L, h, w)
    sums = masked_avg_pool(features, parts, eps=0.0) * parts.sum((2, 3))[..., None]
    return sums.unflatten(0, weights.shape[:2]).sum(1) / members.flatten(2).sum(2)[..., None].clamp(min=1)


class KernelGenerator(nn.Sequential):
    """Two 1-D convolutions over prototypes (B, C, L): one kernel tap each."""

    def __init__(self, channels: int, width: int, size: int, activation: str) -> None:
        super().__init__(
            nn.Conv1d(channels, width, size, padding=size // 2),
            _ACTIVATIONS[activation](),
            nn.Conv1d(width, channels, size, padding=size // 2),
        )


class DynamicConvolution(nn.Module):
    """DCM: kernels made of the support's foreground, one set an episode, convolved with the query depthwise.

    The foreground pixels of all shots are pooled to S prototypes and those to S*S; generators turn them into kernels of
    S x 1, 1 x S and S x S.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        kernels: Sequence[str],
        square_from: str,
        pooling: str,
        foreground: str,
        threshold: float,
        order: str,
        empty: str,
        generator_kernel: int,
        generator_width: int,
        generator_activation: str,
        padding: str,
    ) -> None:
        super().__init__()
        self.size, self.square_from, self.pooling = size, square_from, pooling
        self.foreground, self.threshold, self.order, self.empty = foreground, threshold, order, empty
        self.padding = padding
        self.generators = nn.ModuleDict(
            {k: KernelGenerator(channels, generator_width, generator_kernel, generator_activation) for k in kernels}
        )

    def prototypes(self, support: Tensor, weights: Tensor, mask: Tensor, prototype: Tensor, count: int) -> Tensor:
        """``count`` prototypes (B, C, count) from support (B*S, C, h, w); the mean one where there is no foreground."""
        chosen = foreground_pixels(weights, mask, self.foreground, self.threshold, self.empty)
        members = bins_of(chosen, count, self.order)
        pooled = pooled_tokens(support, weights, members, self.pooling)
        some = chosen.flatten(1).any(1)[:, None, None]
        return torch.where(some, pooled, prototype[:, None].to(pooled.dtype)).mT

    def kernels(self, support: Tensor, weights: Tensor, mask: Tensor, prototype: Tensor) -> list[Tensor]:
        """The kernels, (B, C, S, 1), (B, C, 1, S) and (B, C, S, S) or some of them."""
        few = self.prototypes(support, weights, mask, prototype, self.size)
        many = few
        if "square" in self.generators:
            if self.square_from == "fg":
                many = self.prototypes(support, weights, mask, prototype, self.size**2)
            else:
                pool = F.adaptive_avg_pool1d if self.pooling == "avg" else F.adaptive_max_pool1d
                many = pool(few, self.size**2)
        shapes = {"vertical": (self.size, 1), "horizontal": (1, self.size), "square": (self.size, self.size)}
        return [
            generate(many if name == "square" else few).unflatten(2, shapes[name])
            for name, generate in self.generators.items()
        ]

    def forward(self, query: Tensor, support: Tensor, weights: Tensor, mask: Tensor, prototype: Tensor) -> Tensor:
        """Query (B, C, h, w) to one response (B, C, h, w) a kernel, concatenated.

        The support is (B*S, C, h, w), weights (B, S, h, w) its mask on this grid, mask (B, S, H, W), prototype (B, C).
        """
        kernels = [k.to(query.dtype) for k in self.kernels(support, weights, mask, prototype)]
        if self.padding == "zeros":
            return dynamic_conv2d(query, kernels)
        margin = self.size // 2
        padded = F.pad(query, (margin,) * 4, mode=self.padding)
        return dynamic_conv2d(padded, kernels)[..., margin:-margin, margin:-margin]


class DPCNHead(nn.Module):
    """Everything after the backbone; see `DPCN` for the options."""

    def __init__(
        self,
        stages: Sequence[int],
        channels: int,
        mid_dropout: float,
        pool_eps: float,
        sam: SupportActivation | None,
        maps: int,
        copies: int,
        ffm: FeatureFiltering | None,
        dcm: DynamicConvolution | None,
        decoder: str,
        dilations: Sequence[int],
        cls_dropout: float,
    ) -> None:
        super().__init__()
        self.down_query = Reduction(stages, channels, mid_dropout)
        self.down_support = Reduction(stages, channels, mid_dropout)
        self.pool_eps, self.copies = pool_eps, copies
        self.sam, self.ffm, self.dcm = sam, ffm, dcm
        responses = 1 if dcm is None else len(dcm.generators)
        self.width = (responses + 1) * channels + maps * copies + (ffm is not None)
        self.decoder = nn.Sequential(
            convolution(self.width, channels, 1),
            ASPP(channels, dilations) if decoder == "aspp" else pair(channels),
            classifier(channels, cls_dropout),
        )

    def forward(self, query: Features, support: Features, mask: Tensor) -> Tensor:
        """Query (B, C, h, w), support (B*S, C, h, w) and foreground weights (B, S, H, W) to logits (B, 2, h, w)."""
        x_q, x_s = self.down_query(query), self.down_support(support)
        weights = resized(mask, x_s.shape[-2:])
        prototype = mean_prototype(x_s, weights, self.pool_eps)
        x_p = expanded(prototype, x_q)
        maps, pseudo = [], None
        if self.sam is not None:
            activation = self.sam(query.stage4, support.stage4, mask >= 0.5)  # it only selects
            activation = resized(activation, x_q.shape[-2:]).to(x_q.dtype)
            pseudo = activation.mean(1, keepdim=True)
            maps += [activation] * self.copies
        filtered = x_q
        if self.ffm is not None:
            filtered, refined = self.ffm(x_q, x_p, pseudo)
            maps.append(refined)
        responses = filtered if self.dcm is None else self.dcm(filtered, x_s, weights, mask, prototype)
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
        prior: without SAM, whether there is a prior mask at all (open: the paper's baseline).
        prior_copies: without SAM, how often the prior is given to the decoder (open: 1; 3 keeps the width 4C + 4).
        channels: of the mid-level features (open).
        mid_dropout: of the mid-level features (open).
        pool_eps: of the masked average pooling (open: PFENet's).
        windows: SAM's windows, odd (dh, dw).
        sam_eps: at the norms of the cosines (open).
        flat_eps: maps whose values differ by no more are 0, and so is their gradient; 0: the plain formula.
        sam_normalisation: ``"min-max"`` or ``"none"`` (open).
        premask_layer4: compute layer 4 of the support from masked layer 3, as PFENet (open).
        shots: activation maps of several shots are fused by ``"mean"`` or ``"max"`` (open).
        ffm_kernel: odd size of FFM's convolution (open: 3).
        kernel_size: S, odd, 3 ... 9.
        kernels: which of ``"vertical"`` (S x 1), ``"horizontal"`` (1 x S) and ``"square"`` (S x S) there are.
        square_from: the S*S prototypes are pooled from the S prototypes, ``"ps"`` (the letter of the paper), or from
            the foreground, ``"fg"``.
        pooling: ``"avg"`` or ``"max"`` (open).
        foreground: which support pixels are pooled: resized mask >= threshold, ``"threshold"``, > 0, ``"positive"``,
            or ``"nearest"`` (mask resized by nearest neighbour) (open).
        threshold: 0 ... 1 (open: 0.5).
        order: pixels in line by ``"rows"`` or by ``"columns"`` (open).
        empty: without such a pixel take the ``"prototype"`` (0 for an empty mask) or the ``"peak"`` of the mask (open).
        generator_kernel: odd size of the 1-D convolutions (open: 1; 3 is the alternative).
        generator_width: their hidden channels; None: ``channels`` (open).
        generator_activation: ``"relu"``, ``"leaky_relu"``, ``"gelu"``, ``"tanh"`` or ``"identity"`` (open).
        padding: of the dynamic convolutions, ``"zeros"`` or ``"replicate"`` (open).
        decoder: ``"aspp"`` or ``"plain"``, two 3x3 convolutions instead (open).
        dilations: of ASPP (open).
        cls_dropout: before the logits (open).
        swap_weight: of the loss with swapped roles; 0: none.
        swap_mask: the prediction as support mask is ``"hard"`` (foreground more likely than background) or ``"soft"``
            (probabilities; what only selects pixels thresholds them at 0.5) (open).
        swap_detach: no gradient through a soft prediction as mask (open).
        trainable_backbone: stages that train, True or False. None: stage 4 of a backbone that has stages, except
            `fss_models.backbones.Tiny`, which trains whole, as does any other module.
        frozen_bn: BatchNorm of the backbone uses running statistics in training, too (open).

    Raises:
        ValueError: an option outside its range; the message names it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        sam: bool = True,
        ffm: bool = True,
        dcm: bool = True,
        prior: bool = True,
        prior_copies: int = 1,
        channels: int = 256,
        mid_dropout: float = 0.5,
        pool_eps: float = 5e-4,
        windows: Sequence[tuple[int, int]] = ((5, 1), (3, 3), (1, 5)),
        sam_eps: float = 1e-7,
        flat_eps: float = 1e-6,
        sam_normalisation: str = "min-max",
        premask_layer4: bool = False,
        shots: str = "mean",
        ffm_kernel: int = 3,
        kernel_size: int = 5,
        kernels: Sequence[str] = _KERNELS,
        square_from: str = "ps",
        pooling: str = "avg",
        foreground: str = "threshold",
        threshold: float = 0.5,
        order: str = "rows",
        empty: str = "prototype",
        generator_kernel: int = 1,
        generator_width: int | None = None,
        generator_activation: str = "relu",
        padding: str = "zeros",
        decoder: str = "aspp",
        dilations: Sequence[int] = (6, 12, 18),
        cls_dropout: float = 0.1,
        swap_weight: float = 1.0,
        swap_mask: str = "hard",
        swap_detach: bool = True,
        trainable_backbone: bool | Sequence[int] | None = None,
        frozen_bn: bool = True,
    ) -> None:
        check_flags(
            "DPCN",
            sam=sam,
            ffm=ffm,
            dcm=dcm,
            prior=prior,
            premask_layer4=premask_layer4,
            swap_detach=swap_detach,
            frozen_bn=frozen_bn,
        )
        for name, value, choices in (
            ("sam_normalisation", sam_normalisation, ("min-max", "none")),
            ("shots", shots, ("mean", "max")),
            ("square_from", square_from, ("ps", "fg")),
            ("pooling", pooling, ("avg", "max")),
            ("foreground", foreground, ("threshold", "positive", "nearest")),
            ("order", order, ("rows", "columns")),
            ("empty", empty, ("prototype", "peak")),
            ("generator_activation", generator_activation, tuple(_ACTIVATIONS)),
            ("padding", padding, ("zeros", "replicate")),
            ("decoder", decoder, ("aspp", "plain")),
            ("swap_mask", swap_mask, ("hard", "soft")),
        ):
            check_option("DPCN", name, value, choices)
        check_odd("DPCN", "ffm_kernel", ffm_kernel)
        check_odd("DPCN", "kernel_size", kernel_size, lowest=3)
        check_odd("DPCN", "generator_kernel", generator_kernel)
        generator_width = channels if generator_width is None else generator_width
        check_count("DPCN", "channels", channels)
        check_count("DPCN", "generator_width", generator_width)
        check_count("DPCN", "prior_copies", prior_copies)
        for name, number, highest in (
            ("mid_dropout", mid_dropout, 1.0),
            ("cls_dropout", cls_dropout, 1.0),
            ("threshold", threshold, 1.0),
            ("pool_eps", pool_eps, float("inf")),
            ("sam_eps", sam_eps, float("inf")),
            ("flat_eps", flat_eps, float("inf")),
            ("swap_weight", swap_weight, float("inf")),
        ):
            check_number("DPCN", name, number, highest=highest)
        if isinstance(kernels, str) or not kernels or len(set(kernels)) < len(kernels):
            raise ValueError(f"DPCN: kernels must be some of {', '.join(_KERNELS)}, each once, got {kernels!r}")
        for kernel in kernels:
            check_option("DPCN", "kernels", kernel, _KERNELS)
        check_windows("DPCN", windows)
        if not dilations or not all(type(d) is int and d > 0 for d in dilations):
            raise ValueError(f"DPCN: dilations must be positive int, got {dilations!r}")
        if premask_layer4 and not hasattr(backbone, "stage4"):
            raise ValueError("DPCN: premask_layer4 needs a backbone with stage4(stage3)")
        if trainable_backbone is None:
            trainable_backbone = default_stages(backbone, (4,))
        super().__init__(backbone, trainable_backbone, frozen_bn)
        self.premask_layer4 = premask_layer4
        self.swap_weight, self.swap_mask, self.swap_detach = swap_weight, swap_mask, swap_detach
        chosen = tuple(windows) if sam else None
        activation = SupportActivation(chosen, sam_eps, flat_eps, sam_normalisation, shots) if sam or prior else None
        self.head = DPCNHead(
            self.channels_of_stages,
            channels,
            mid_dropout,
            pool_eps,
            sam=activation,
            maps=0 if activation is None else len(windows) if sam else 1,
            copies=1 if sam else prior_copies,
            ffm=FeatureFiltering(channels, ffm_kernel) if ffm else None,
            dcm=DynamicConvolution(
                channels,
                kernel_size,
                kernels,
                square_from,
                pooling,
                foreground,
                threshold,
                order,
                empty,
                generator_kernel,
                generator_width,
                generator_activation,
                padding,
            )
            if dcm
            else None,
            decoder=decoder,
            dilations=dilations,
            cls_dropout=cls_dropout,
        )

    def _logits(self, query: Features, support: Features, mask: Tensor) -> Tensor:
        if self.premask_layer4:
            support = self.with_masked_stage4(support, mask)
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
        if self.swap_mask == "soft":
            probability = precise(logits).softmax(1)[:, 1]
            mask = probability.detach() if self.swap_detach else probability
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
