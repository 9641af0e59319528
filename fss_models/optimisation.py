"""What a training loop needs around a model: parameter groups, and a guard around the optimiser's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fss_models.model import FewShotModel


def parameter_groups(model: FewShotModel, lr: float, backbone_lr: float | None = None) -> list[dict[str, Any]]:
    """Trainable parameters for an optimiser, those of the backbone with a learning rate of their own.

    Args:
        model: a model of this package.
        lr: learning rate of everything but the backbone.
        backbone_lr: that of the trainable part of the backbone. None: ``lr / 10`` when some of the backbone is frozen
            (layer 4 of DPCN, pretrained), ``lr`` when all of it trains.

    Returns:
        One or two groups with ``params``, ``lr`` and ``name`` ("head" or "backbone"); empty groups are left out.

    Example:
        >>> import fss_models
        >>> model = fss_models.build("dpcn", "tiny", trainable_backbone=(4,))
        >>> [(g["name"], g["lr"]) for g in parameter_groups(model, 0.005)]
        [('head', 0.005), ('backbone', 0.0005)]
    """
    inside = {id(p) for p in model.backbone.parameters()}
    head = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    if backbone_lr is None:
        backbone_lr = lr if len(backbone) == len(inside) else lr / 10
    groups = [
        {"params": head, "lr": lr, "name": "head"},
        {"params": backbone, "lr": backbone_lr, "name": "backbone"},
    ]
    return [g for g in groups if g["params"]]


class StepGuard:
    """Steps an optimiser only when the gradients are finite, clips their norm, and counts the steps left out.

    Args:
        max_norm: the largest norm of all gradients together; None: no clipping.

    ``step`` reads one number from the device; nothing in the models does.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> optimizer, guard = torch.optim.SGD([weight], lr=1.0), StepGuard(max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> guard.step(optimizer), weight.data
        (True, tensor([-0.6000, -0.8000]))
        >>> weight.grad = torch.tensor([float("nan"), 0.0])
        >>> guard.step(optimizer), guard.non_finite
        (False, 1)
    """

    def __init__(self, max_norm: float | None = None) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"StepGuard: max_norm must be None or > 0, got {max_norm!r}")
        self.max_norm = max_norm
        self.steps = 0
        self.non_finite = 0

    def step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> bool:
        """One step after ``backward``; with a gradient scaler it also unscales and updates. Whether it was taken."""
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            norm = torch.zeros(())
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = bool(norm.isfinite())
        if finite and self.max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        if finite and scaler is None:
            optimizer.step()
        if scaler is not None:
            if finite:  # a norm can overflow although no gradient did
                scaler.step(optimizer)
            scaler.update()
        self.steps += finite
        self.non_finite += not finite
        return finite

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"steps": self.steps, "non_finite": self.non_finite}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The counts of a checkpoint."""
        self.steps, self.non_finite = state["steps"], state["non_finite"]
