"""Backbones: images to the features of stages 2, 3 and 4, and their weights from a local file.

Any module can be a backbone: ``forward(images (B, 3, H, W))`` returns three tensors (B, C, h, w), the attribute
``channels`` says how many channels they have. Two things are optional: ``stage4(stage3)`` (masking before stage 4), and
submodules ``layer0`` ... ``layer4`` (freezing some stages only; layer0 and layer1 are stage 1).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Features(NamedTuple):
    """Features (B, C, h, w) of three stages; those of supports are folded to (B*S, C, h, w)."""

    stage2: Tensor
    stage3: Tensor
    stage4: Tensor


class Backbone(nn.Module):
    """Five layers in a row; the last three return features. Parameters are named as in PSPNet: ``layer0.0.weight``."""

    def __init__(self, layers: Sequence[nn.Module], channels: tuple[int, int, int]) -> None:
        super().__init__()
        self.layer0, self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.channels = channels

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
        stage2 = self.layer2(self.layer1(self.layer0(images)))
        stage3 = self.layer3(stage2)
        return Features(stage2, stage3, self.layer4(stage3))

    def stage4(self, stage3: Tensor) -> Tensor:
        """The last stage alone."""
        return self.layer4(stage3)

    def own_name(self, key: str) -> str:
        """The name that a parameter of torchvision's layout has here."""
        return key


# ---- ResNet ---------------------------------------------------------------------------------------------------------

_STEM = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4", "conv3": "6", "bn3": "7"}
_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Bottleneck(nn.Module):
    """1x1, 3x3 (stride and dilation), 1x1 and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, shortcut: bool) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if shortcut:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 4 * width, H', W')."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(Backbone):
    """ResNet-50 or -101 with the strides of layers 3 and 4 turned into dilations 2 and 4: all features at stride 8.

    Args:
        depth: 50 or 101.
        deep_stem: three 3x3 convolutions (3 -> 64 -> 64 -> 128) instead of one 7x7, as in PSPNet's "v2" weights.

    Raises:
        ValueError: another ``depth``.
    """

    def __init__(self, depth: int = 50, *, deep_stem: bool = False) -> None:
        if depth not in _BLOCKS:
            raise ValueError(f"ResNet: depth must be one of {', '.join(map(str, _BLOCKS))}, got {depth!r}")
        sizes = ((3, 64, 3, 2), (64, 64, 3, 1), (64, 128, 3, 1)) if deep_stem else ((3, 64, 7, 2),)
        stem: list[nn.Module] = []
        for inputs, outputs, size, stride in sizes:
            convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
            stem += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        stem.append(nn.MaxPool2d(3, 2, 1))
        layers: list[nn.Module] = [nn.Sequential(*stem)]
        inputs = sizes[-1][1]
        for width, blocks, stride, dilation in zip(
            (64, 128, 256, 512), _BLOCKS[depth], (1, 2, 1, 1), (1, 1, 2, 4), strict=True
        ):
            first = Bottleneck(inputs, width, stride, dilation, shortcut=True)
            inputs = 4 * width
            rest = [Bottleneck(inputs, width, 1, dilation, shortcut=False) for _ in range(blocks - 1)]
            layers.append(nn.Sequential(first, *rest))
        super().__init__(layers, (512, 1024, 2048))

    def own_name(self, key: str) -> str:
        """conv1.weight -> layer0.0.weight and so on; the blocks have the same names."""
        module, _, rest = key.partition(".")
        return f"layer0.{_STEM[module]}.{rest}" if module in _STEM else key


# ---- VGG ------------------------------------------------------------------------------------------------------------

_VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(Backbone):
    """VGG-16 without its classifier and last pooling: stage 2 at stride 8 (after pool 3), stages 3 and 4 at 16.

    Args:
        batch_norm: a BatchNorm after every convolution.
    """

    def __init__(self, *, batch_norm: bool = True) -> None:
        layers: list[nn.Module] = []
        self._starts = [0]  # where every layer starts in torchvision's `features`
        inputs = 3
        for width, convolutions in _VGG:
            layer: list[nn.Module] = []
            for _ in range(convolutions):
                layer += [nn.Conv2d(inputs, width, 3, padding=1), *([nn.BatchNorm2d(width)] * batch_norm), nn.ReLU()]
                inputs = width
            if len(layers) < 4:
                layer.append(nn.MaxPool2d(2, 2, ceil_mode=True))
            layers.append(nn.Sequential(*layer))
            self._starts.append(self._starts[-1] + len(layer))
        super().__init__(layers, (256, 512, 512))

    def own_name(self, key: str) -> str:
        """features.7.weight -> layer1.0.weight and so on."""
        match = re.fullmatch(r"features\.(\d+)\.(.+)", key)
        if match is None or int(match[1]) >= self._starts[-1]:
            return key
        index = int(match[1])
        layer = max(i for i, start in enumerate(self._starts[:-1]) if start <= index)
        return f"layer{layer}.{index - self._starts[layer]}.{match[2]}"


# ---- tiny -----------------------------------------------------------------------------------------------------------


class Tiny(Backbone):
    """A small network with GroupNorm that trains from scratch on a CPU: all features at stride 8.

    Args:
        width: channels of stage 2; stages 3 and 4 have twice as many. A multiple of 8.

    Raises:
        ValueError: another ``width``.
    """

    def __init__(self, width: int = 32) -> None:
        if not isinstance(width, int) or width < 8 or width % 8:
            raise ValueError(f"Tiny: width must be a positive multiple of 8, got {width!r}")

        def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
            return [convolution, nn.GroupNorm(4, outputs), nn.ReLU()]

        layers = [
            block(3, width // 2, 2),
            block(width // 2, width, 2),
            block(width, width, 2) + block(width, width),
            block(width, 2 * width, dilation=2) + block(2 * width, 2 * width, dilation=2),
            block(2 * width, 2 * width, dilation=4),
        ]
        super().__init__([nn.Sequential(*layer) for layer in layers], (width, 2 * width, 2 * width))


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "tiny": Tiny,
    "resnet50": lambda: ResNet(50),
    "resnet101": lambda: ResNet(101),
    "resnet50_v2": lambda: ResNet(50, deep_stem=True),
    "resnet101_v2": lambda: ResNet(101, deep_stem=True),
    "vgg16": lambda: VGG16(batch_norm=False),
    "vgg16_bn": lambda: VGG16(batch_norm=True),
}


def create(name: str) -> Backbone:
    """A backbone by name, with random weights; ``_v2`` has the deep stem.

    Raises:
        ValueError: ``name`` is not one of `BACKBONES`.

    Example:
        >>> create("tiny").channels
        (32, 64, 64)
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone must be a module or one of {', '.join(BACKBONES)}, got {name!r}")
    return BACKBONES[name]()


# ---- weights --------------------------------------------------------------------------------------------------------

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "backbone.", "encoder.")
_HEADS = ("fc.", "classifier.", "ppm.", "cls.", "aux.", "head.")  # of the networks that such files come from


@dataclass(frozen=True)
class LoadReport:
    """What a file of weights gave to a backbone."""

    layout: str  # "torchvision" or "pspnet"
    loaded: int
    missing: tuple[str, ...]  # names here that the file does not have
    unexpected: tuple[str, ...]  # names of the file that the backbone does not have
    mismatched: tuple[str, ...]  # "name: shape in the file, shape here"
    ignored: tuple[str, ...]  # names of classifiers and segmentation heads

    @property
    def complete(self) -> bool:
        """Whether every parameter and buffer was loaded and nothing was left over but heads."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{self.layout} layout, {self.loaded} tensors loaded"]
        for kind in ("missing", "unexpected", "mismatched", "ignored"):
            names = getattr(self, kind)
            if names:
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                lines.append(f"{len(names)} {kind}: {shown}")
        return "; ".join(lines)


def _is_plain(x: Tensor) -> bool:
    """Whether a parameter can be copied from it."""
    special = x.layout != torch.strided or x.is_quantized or x.is_nested or x.is_complex()
    return not special and x.device.type == "cpu"


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by name: ``.safetensors``, anything else by ``torch.load(weights_only=True)``.

    Wrappers like ``{"state_dict": ...}`` and prefixes like ``module.`` are removed.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: a ``.safetensors`` file without the package safetensors.
        ValueError: the file holds no dictionary of tensors, or one of tensors that are no parameters.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}")
    load: Callable[[], Any] = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"weights: {path.name} needs the package safetensors") from error
        load = functools.partial(load_file, str(path))
    try:
        content = load()
    except Exception as error:  # what a broken file raises depends on where it is broken
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"weights: {path} cannot be read: {reason}") from None
    for _ in _WRAPPERS:  # a file may hold a dictionary that is in itself
        inner = next((content[w] for w in _WRAPPERS if w in content), None) if isinstance(content, Mapping) else None
        content = inner if isinstance(inner, Mapping) else content
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"weights: {path.name} holds no dictionary of tensors")
    state = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            if not _is_plain(value):
                raise ValueError(f"weights: {path.name}: {key} is sparse, quantised, nested, complex or has no values")
            while prefix := next((p for p in _PREFIXES if key.startswith(p)), None):
                key = key.removeprefix(prefix)
            state[key] = value
    return state


def load_weights(backbone: nn.Module, path: str | Path, *, strict: bool = True) -> LoadReport:
    """Loads a local file into a backbone, in torchvision's key layout or in PSPNet's (``layer0.0.weight``).

    Args:
        backbone: a `Backbone`.
        path: the file, as for `read_state`.
        strict: raise when something is missing, left over or of another shape. Classifiers and segmentation heads in
            the file are ignored, and so are missing ``num_batches_tracked``.

    Raises:
        TypeError: ``backbone`` is no `Backbone`.
        ValueError: ``strict`` and an incomplete report, which is the message; nothing is loaded then.
        FileNotFoundError, ModuleNotFoundError: as `read_state`.
    """
    if not isinstance(backbone, Backbone):
        raise TypeError(f"weights: backbone must be one of fss_models.backbones, got {type(backbone).__name__}")
    state = read_state(path)
    layout = "pspnet" if any(k.startswith("layer0.") for k in state) else "torchvision"
    ignored = tuple(k for k in state if k.startswith(_HEADS))
    named = {backbone.own_name(k): v for k, v in state.items() if k not in ignored}
    own = backbone.state_dict()
    common = {k: v for k, v in named.items() if k in own}
    fitting = {k: v for k, v in common.items() if v.shape == own[k].shape}
    mismatched = tuple(f"{k}: {tuple(v.shape)}, {tuple(own[k].shape)}" for k, v in common.items() if k not in fitting)
    missing = tuple(k for k in own if k not in named and not k.endswith("num_batches_tracked"))
    unexpected = tuple(k for k in named if k not in own)
    report = LoadReport(layout, len(fitting), missing, unexpected, mismatched, ignored)
    if strict and not report.complete:
        deep = isinstance(backbone, ResNet) and ("layer0.3.weight" in named) != ("layer0.3.weight" in own)
        hint = "; one has the deep stem (resnet50_v2, resnet101_v2), the other has not" if deep else ""
        raise ValueError(f"weights: {Path(path).name} does not fit {type(backbone).__name__}: {report}{hint}")
    backbone.load_state_dict(fitting, strict=False)
    return report
