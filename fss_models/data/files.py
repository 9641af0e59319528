"""Images and label maps from files, with errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from fss_models.errors import DataError

Array = npt.NDArray[np.uint8]
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow would hand EPS to Ghostscript, a program
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, UnidentifiedImageError, Image.DecompressionBombError)


def inside(root: Path, relative: str, where: str) -> Path:
    """root / relative; DataError if that leaves the root. ``where`` names the list that asked for it."""
    path = os.path.normpath(relative)
    if os.path.isabs(path) or path == ".." or path.startswith(f"..{os.sep}"):
        raise DataError(f"{where}: {relative} is outside of the data root {root}")
    return root / path


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path, formats=_FORMATS)
        image.load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except _BROKEN as error:
        raise DataError(f"{path}: not a readable image ({_short(error)})") from None
    return image


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def read_image(path: Path) -> Array:
    """(H, W, 3), uint8, sRGB; DataError with the path for a missing, truncated or foreign file."""
    return np.asarray(_open(path).convert("RGB"))


def read_labels(path: Path, black_and_white: bool = False) -> Array:
    """(H, W), uint8: the indices of a palette PNG, or the values of a grey one.

    Args:
        path: the label map.
        black_and_white: an image in colours is read, too, if it has no other ones.

    Raises:
        DataError: missing or unreadable file, or one in colours, whose ids are lost.
    """
    image = _open(path)
    if black_and_white and image.mode in ("RGB", "RGBA"):
        pixels = np.asarray(image.convert("RGB"))
        if (pixels.min(2) == pixels.max(2)).all() and set(np.unique(pixels)) <= {0, 255}:
            return pixels[..., 0]
    if image.mode not in ("P", "L", "1"):
        raise DataError(
            f"{path}: a mask must be a palette or 8-bit grey PNG that holds class ids, this is {image.mode}"
        )
    return np.asarray(image.convert("L") if image.mode == "1" else image)


def read_class_labels(path: Path, classes: int) -> Array:
    """`read_labels`, checked: 0 ... classes and 255 only; DataError otherwise (another palette, another data set)."""
    labels = read_labels(path)
    found = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
    foreign = [int(v) for v in found if classes < v < 255]
    if foreign:
        raise DataError(f"{path}: wrong palette: ids must be 0 ... {classes} or 255, found {foreign[:5]}")
    return labels


def read_binary(path: Path, value: int | None = None) -> Array:
    """(H, W), uint8: 1 foreground, 0 background, 255 ignored.

    Args:
        path: mask of one object.
        value: the id that is foreground. None: everything but 0; 255 is foreground only if there is no other id.

    Raises:
        DataError: as `read_labels`, or no pixel of foreground.
    """
    labels = read_labels(path, black_and_white=True)
    if value is None and set(np.unique(labels)) <= {0, 255}:
        binary = (labels == 255).astype(np.uint8)
    else:
        binary = (labels == value if value is not None else labels > 0).astype(np.uint8)
        binary[(labels == 255) & (value != 255)] = 255
    if not (binary == 1).any():
        raise DataError(f"{path}: the mask has no pixel of {'foreground' if value is None else f'class {value}'}")
    return binary


def read_white(path: Path) -> Array:
    """(H, W), uint8: 1 where any kind of image is at least half white (FSS-1000), else 0. Errors as `read_image`."""
    return (np.asarray(_open(path).convert("L")) >= 128).astype(np.uint8)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes under a temporary name and renames, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_png(path: Path, pixels: Array) -> None:
    """The same for an image, (H, W) or (H, W, 3)."""
    import io

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    write_bytes(path, content.getvalue())
