"""One query image, its support images and masks, from files to files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from fss_models import checkpoints
from fss_models.config import check_size
from fss_models.data.build import protocol_of
from fss_models.data.episodes import fit, normalise
from fss_models.data.files import read_binary, read_image, write_png
from fss_models.errors import ConfigError, DataError
from fss_models.evaluate import at_truth, overlay, probabilities
from fss_models.processes import processes


@dataclasses.dataclass
class PredictConfig:
    """A prediction.

    Attributes:
        checkpoint: file, checkpoint folder or run folder.
        query: image to segment.
        support: image that shows the class, or a list of them.
        mask: their masks, one each.
        value: the id in the masks that is foreground. None: everything but 0; 255 only if there is no other id.
        out: folder for <query>_mask.png (0 and 255, at the query's size) and <query>_overlay.png.
        size: side of the square inputs. None: that of the training.
        threshold: of the foreground's probability.
        scales: as for evaluation.
        device: ``auto``: CUDA if there is one.
    """

    checkpoint: str
    query: str
    support: list[str] | str
    mask: list[str] | str
    value: int | None = None
    out: str = "predictions"
    size: int | None = None
    threshold: float = 0.5
    scales: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    device: str = "auto"


def predict(config: PredictConfig) -> tuple[Path, Path]:
    """Writes the mask and the overlay; their paths.

    Raises:
        UserError: in one line: a file that is missing or cannot be read, a mask without foreground or of another size
            than its image, not as many masks as images, a bad checkpoint.
    """
    shown_in, masked_by = ([given] if isinstance(given, str) else given for given in (config.support, config.mask))
    if not shown_in or len(shown_in) != len(masked_by):
        raise ConfigError(f"needs one mask for each support image, got {len(shown_in)} images, {len(masked_by)} masks")
    if not config.scales:
        raise ConfigError("scales must not be empty")
    check_size(config.size)
    model, trained, _ = checkpoints.load_model(config.checkpoint)
    chosen = protocol_of(trained.data)
    size = config.size or chosen.size
    image = read_image(Path(config.query))
    query, _, geometry = fit(image, None, size, chosen.fit)
    supports, masks = [], []
    for image_path, mask_path in zip(shown_in, masked_by, strict=True):
        picture, label = read_image(Path(image_path)), read_binary(Path(mask_path), config.value)
        if picture.shape[:2] != label.shape:
            raise DataError(
                f"{mask_path}: mask of {label.shape[1]}x{label.shape[0]} for an image of "
                f"{picture.shape[1]}x{picture.shape[0]}"
            )
        pixels, target, _ = fit(picture, label, size, chosen.fit)
        assert target is not None
        if not bool((target == 1).any()):
            raise DataError(f"{mask_path}: the foreground vanishes at {size} pixels")
        supports.append(normalise(pixels))
        masks.append((target == 1).float())
    with processes(config.device) as group, torch.inference_mode():
        model.to(group.device)
        inputs = (normalise(query)[None], torch.stack(supports)[None], torch.stack(masks)[None])
        asked, shown, masked = (t.to(group.device) for t in inputs)
        chances = probabilities(model, asked, shown, masked, config.scales)[0]
        found = (at_truth(chances, geometry, geometry.original) > config.threshold).cpu().numpy().astype(np.uint8)
    paths = tuple(Path(config.out, f"{Path(config.query).stem}_{what}.png") for what in ("mask", "overlay"))
    write_png(paths[0], found * 255)
    write_png(paths[1], overlay(image, found))
    return paths[0], paths[1]
