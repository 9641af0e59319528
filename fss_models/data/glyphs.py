"""Episodes rendered from the fonts that ship with matplotlib: characters are classes. No download, no files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from fss_models.data.episodes import Geometry, normalise
from fss_models.data.folds import FOLDS, fold_classes
from fss_models.errors import DataError

# One of each set that looks alike in some face, or after a small turn: no F beside E, no c, O, o, 0, s, 5, 1, 8, 9 ...
CHARACTERS = "ABCDEGHJKLMNPQRSTUVWXYZabdefghmnrt347&@#?%§¶€£ß±¤‡©÷ΔΞΣΨΩδελμξφω"
FACES = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono DejaVuSansMono-Bold"
    " DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic"
    " DejaVuSerif-BoldItalic STIXGeneral STIXGeneralItalic STIXGeneralBol STIXGeneralBolIta"
).split()
_PIXELS = 96  # height of the cached bitmaps


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")), _PIXELS)


@functools.cache
def bitmap(character: str, face: str) -> Image.Image:
    """The character in a face, white on black, cropped to its ink, ``L``, at most about 100 pixels high."""
    font = _font(face)
    box = font.getbbox(character)
    image = Image.new("L", (int(box[2] - box[0]) + 2, int(box[3] - box[1]) + 2))
    ImageDraw.Draw(image).text((1 - box[0], 1 - box[1]), character, fill=255, font=font)
    ink = image.getbbox()
    if ink is None:
        raise DataError(f"{face} has no ink for {character!r}")
    return image.crop(ink)


def _colour(rng: np.random.Generator, away_from: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
    """A random colour (3,) of 0 ... 1, at least 0.35 in some channel from another one."""
    for _ in range(50):
        colour = rng.random(3, dtype=np.float32)
        if away_from is None or np.abs(colour - away_from).max() > 0.35:
            break
    return colour


def _texture(rng: np.random.Generator, size: int, colour: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(size, size, 3): a colour with clouds, stripes or a gradient on it."""
    kind = rng.integers(4)
    field: npt.NDArray[np.floating]
    strength = rng.uniform(0.05, 0.25)
    if kind == 0:
        field = np.zeros((size, size), np.float32)
    elif kind == 1:
        cells = int(rng.integers(3, 12))
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
        field = np.asarray(noise.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
    else:
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 16)
        line = np.arange(size, dtype=np.float32)
        ramp = np.float32(np.cos(angle)) * line + np.float32(np.sin(angle)) * line[:, None]
        field = np.sin(ramp * np.float32(2 * np.pi / period)) if kind == 2 else ramp / np.float32(size)
    tint = rng.uniform(-1, 1, 3).astype(np.float32)
    return (colour + np.float32(strength) * field[..., None] * tint).astype(np.float32)


class GlyphEpisodes(Dataset):
    """Episodes of rendered characters; number i is the same for the same seed, whoever asks, in whatever order.

    An image holds one glyph of the episode's class and 1 ... ``distractors`` of other classes of the same part, in
    random faces, sizes, rotations up to 15 degrees, colours and textures, beside each other; then a little noise.
    Fold f tests the classes f*n + 1 ... (f + 1)*n of a fixed shuffle of `CHARACTERS`, and trains on the rest: tested
    characters never occur in training, not even as distractors.

    Items are as those of `Episodes`.

    Args:
        fold: 0 ... 3.
        part: ``"train"`` or ``"test"``: which classes.
        shots: support images S of an episode.
        size: side of the images in pixels.
        seed: of everything random.
        length: how many episodes there are; any number.
        distractors: most glyphs of other classes in an image.

    Raises:
        ConfigError: fold out of range. DataError: shots below 1, size below 9, unknown part.

    Example:
        >>> episode = GlyphEpisodes(0, "test", size=33)[7]
        >>> tuple(episode["support"].shape), sorted(episode["target"].unique().tolist())
        ((1, 3, 33, 33), [0, 1])
    """

    def __init__(
        self,
        fold: int,
        part: str,
        *,
        shots: int = 1,
        size: int = 97,
        seed: int = 0,
        length: int = 1000,
        distractors: int = 3,
    ) -> None:
        if shots < 1:
            raise DataError(f"shots must be at least 1, got {shots}")
        if size < 9:
            raise DataError(f"size must be at least 9, got {size}")
        if part not in ("train", "test"):
            raise DataError(f"part must be train or test, got {part!r}")
        tested = fold_classes(len(CHARACTERS) // FOLDS * FOLDS, fold, folds=FOLDS)
        shuffled = np.random.default_rng(20).permutation(len(CHARACTERS))
        self.names = {i: CHARACTERS[int(j)] for i, j in enumerate(shuffled, 1)}
        self.class_ids = [i for i in self.names if (i in tested) == (part == "test")]
        self.shots, self.size, self.seed, self.length, self.distractors = shots, size, seed, length, distractors

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index])
        class_id = int(rng.choice(self.class_ids))
        drawn = [self.scene(class_id, rng) for _ in range(self.shots + 1)]
        images = [normalise(torch.from_numpy(pixels).permute(2, 0, 1)) for pixels, _ in drawn]
        labels = [torch.from_numpy(label.astype(np.int64)) for _, label in drawn]
        return {
            "query": images[0],
            "support": torch.stack(images[1:]),
            "mask": torch.stack([label.float() for label in labels[1:]]),
            "target": labels[0],
            "truth": labels[0],
            "geometry": Geometry((self.size, self.size), (self.size, self.size)),
            "class_id": class_id,
            "index": index,
            "names": [f"{self.names[class_id]}-{index}-{k}" for k in range(self.shots + 1)],
            "bad": [],
        }

    def scene(self, class_id: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """An image (size, size, 3) of 0 ... 1 and where the class's glyph is."""
        size = self.size
        ground = _colour(rng)
        image = _texture(rng, size, ground)
        truth = np.zeros((size, size), bool)
        others = [c for c in self.class_ids if c != class_id]
        count = int(rng.integers(1, self.distractors + 1)) if self.distractors else 0
        shown = [class_id, *(int(i) for i in rng.choice(others, count, replace=False))]
        placed: list[tuple[int, npt.NDArray[np.float32]]] = []
        while len(placed) < min(2, len(shown)):  # all over again when the class's glyph leaves no room for another
            taken: list[tuple[float, float, float, float]] = []
            found = [(c, self._place(c, rng, taken)) for c in shown]
            placed = [(c, alpha) for c, alpha in found if alpha is not None]
        for c, alpha in placed:
            paint = _texture(rng, size, _colour(rng, ground))
            image += alpha[..., None] * (paint - image)
            if c == class_id:
                truth = alpha >= 0.5
        image += rng.normal(0, rng.uniform(0, 0.04), image.shape).astype(np.float32)
        return np.clip(image, 0, 1).astype(np.float32), truth

    def _place(
        self, class_id: int, rng: np.random.Generator, taken: list[tuple[float, float, float, float]]
    ) -> npt.NDArray[np.float32] | None:
        """Coverage (size, size) of a glyph at a free place, which is added to ``taken``; None where none is free."""
        size = self.size
        glyph = bitmap(self.names[class_id], str(rng.choice(FACES)))
        angle = np.deg2rad(rng.uniform(-15, 15))
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        w, h = glyph.size
        for attempt in range(12):
            # of the larger side, in pixels of the image; later tries are smaller
            zoom = float(rng.uniform(0.42, 0.68)) * 0.96**attempt * size / max(w, h)
            half_w = zoom * (abs(cos) * w + abs(sin) * h) / 2
            half_h = zoom * (abs(sin) * w + abs(cos) * h) / 2
            x, y = float(rng.uniform(half_w, size - half_w)), float(rng.uniform(half_h, size - half_h))
            box = (x - half_w - 1, y - half_h - 1, x + half_w + 1, y + half_h + 1)
            if all(box[2] <= t[0] or t[2] <= box[0] or box[3] <= t[1] or t[3] <= box[1] for t in taken):
                break
        else:
            return None
        taken.append(box)
        # PIL maps a pixel of the result to one of the source, which was shrunk so that no stroke falls between pixels
        small = glyph.resize((max(1, round(w * zoom)), max(1, round(h * zoom))), Image.Resampling.BOX)
        data = (cos, sin, small.width / 2 - cos * x - sin * y, -sin, cos, small.height / 2 + sin * x - cos * y)
        padded = Image.new("L", (small.width + 4, small.height + 4))
        padded.paste(small, (2, 2))
        data = (*data[:2], data[2] + 2, *data[3:5], data[5] + 2)
        turned = padded.transform((size, size), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
        return np.asarray(turned, np.float32) / np.float32(255)
