"""Few-shot segmentation networks on the ops of `fss_kernels`.

Every model is called ``model(query (B, 3, H, W), support (B, S, 3, H, W), mask (B, S, H, W))`` and returns logits
(B, 2, H, W); ``model.loss(query, support, mask, target)`` is its training loss.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from fss_models import backbones, dpcn, losses
from fss_models.backbones import Backbone, Features, LoadReport, load_weights
from fss_models.dpcn import DPCN
from fss_models.dpnet import DPNet
from fss_models.losses import segmentation_loss
from fss_models.model import FewShotModel
from fss_models.optimisation import StepGuard, parameter_groups
from fss_models.panet import PANet

MODELS: dict[str, type[FewShotModel]] = {"dpcn": DPCN, "dpnet": DPNet, "panet": PANet}


def build(
    name: str, backbone: str | nn.Module = "tiny", *, weights: str | Path | None = None, **options: Any
) -> FewShotModel:
    """A model by name.

    Args:
        name: ``"dpcn"``, ``"dpnet"`` or ``"panet"``.
        backbone: a name of `backbones.BACKBONES` or a module.
        weights: a local file for the backbone, see `load_weights`.
        options: keyword arguments of the model's class.

    Raises:
        ValueError: unknown ``name``, ``backbone`` or option, an option outside its range, weights that do not fit.
        TypeError, FileNotFoundError, ModuleNotFoundError: as `load_weights`.

    Example:
        >>> build("dpcn", "tiny", kernel_size=3).head.dcm.size
        3
    """
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"build: name must be one of {', '.join(MODELS)}, got {name!r}")
    known = [p for p in inspect.signature(MODELS[name].__init__).parameters if p not in ("self", "backbone")]
    for option in options:
        if option not in known:
            raise ValueError(f"build: {name} has no option {option!r}; it has {', '.join(known)}")
    module = backbones.create(backbone) if isinstance(backbone, str) else backbone
    if weights is not None:
        load_weights(module, weights)
    return MODELS[name](module, **options)


__all__ = [
    "DPCN",
    "MODELS",
    "Backbone",
    "DPNet",
    "Features",
    "FewShotModel",
    "LoadReport",
    "PANet",
    "StepGuard",
    "backbones",
    "build",
    "dpcn",
    "load_weights",
    "losses",
    "parameter_groups",
    "segmentation_loss",
]
