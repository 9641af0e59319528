"""COCO-20i from the official JSON: one label map of 80 classes for each image, and the lists."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from fss_models.data.files import Array, write_bytes, write_png
from fss_models.errors import DataError

_LARGEST = 1e5  # pixels: pycocotools allocates by coordinates, and crashes on those that are not finite


def _runs(text: str) -> list[int] | None:
    """The runs of a compressed region, five bits a character, from the fourth on less the last but one; None if it
    ends within a number, or has one of more than 30 bits: pycocotools reads on behind either."""
    runs: list[int] = []
    value = bits = 0
    for c in text:
        digit = ord(c) - ord("0")
        if not 0 <= digit < 64 or bits == 30:
            return None
        value, bits = value | (digit & 31) << bits, bits + 5
        if digit < 32:
            value -= (digit >> 4) << bits
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    return None if bits else runs


def _is_drawable(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether pycocotools can draw an annotation without reading or writing outside of its memory."""
    size, drawn = [image["height"], image["width"]], annotation["segmentation"]
    if isinstance(drawn, dict):
        counts: Any = _runs(drawn["counts"]) if isinstance(drawn["counts"], str) else drawn["counts"]
        known = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
        return drawn["size"] == size and known and sum(counts) == size[0] * size[1]
    polygons = [p for p in drawn if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
    numbers = [v for p in polygons for v in p]
    return 0 < len(polygons) == len(drawn) and all(type(v) in (int, float) and abs(v) <= _LARGEST for v in numbers)


def prepare_coco(annotations: str | Path, root: str | Path, *, crowd: bool = False) -> dict[str, int]:
    """Writes annotations/<split>/<image>.png (ids 1 ... 80 in the order of COCO's own ids), names and lists.

    ``<root>/lists/<split>.txt`` has a line ``image label`` for each image (PFENet's convention),
    ``<root>/splits/<split>.txt`` a line ``<split>/name__class`` for each image and class (HSNet's). Where objects
    overlap the smaller one is on top.

    Args:
        annotations: an ``instances_<split>.json``.
        root: folder that holds ``<split>``; the split is that of the file's name.
        crowd: whether regions marked as crowds count as objects; otherwise they are 255, ignored.

    Returns:
        How many images, objects and images without objects.

    Raises:
        DataError: a missing, corrupt or incomplete file, no 80 classes, a name without a split, pycocotools missing.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise DataError("prepare-coco needs pycocotools: pip install 'fss-kernels[models]'") from None
    path = Path(annotations)
    split = path.stem.removeprefix("instances_")
    if not re.fullmatch(r"\w+", split):
        raise DataError(f"{path}: the name must be instances_<split>.json; the split is that of the images' folder")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(path))
        categories = sorted(coco.loadCats(coco.getCatIds()), key=lambda c: c["id"])
        ids = {category["id"]: i for i, category in enumerate(categories, 1)}
        names = {i: str(category["name"]) for i, category in enumerate(categories, 1)}
        images = sorted(coco.imgs.values(), key=lambda image: image["file_name"])
        broken = _broken(coco, ids)
    except Exception as error:  # pycocotools raises whatever its parsing ran into
        raise DataError(f"{path}: not a readable COCO annotation file ({type(error).__name__}: {error})") from None
    if broken or len(categories) != 80:
        raise DataError(f"{path}: {broken or f'{len(categories)} categories; COCO-20i has 80'}")
    root, pairs, listed, objects = Path(root), [], [], 0
    for image in tqdm(images, desc=f"label maps of {split}"):
        name = Path(image["file_name"]).stem
        found = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
        try:
            labels = _label_map(coco, image, found, ids, crowd)
        except Exception as error:
            raise DataError(f"{path}: image {image['id']}: {type(error).__name__}: {error}") from None
        objects += len(found)
        write_png(root / "annotations" / split / f"{name}.png", labels)
        pairs.append(f"{split}/{Path(image['file_name']).name} annotations/{split}/{name}.png")
        listed += [f"{split}/{name}__{c:02d}" for c in np.unique(labels) if 0 < c <= 80]
    write_bytes(root / "lists" / f"{split}.txt", "".join(f"{line}\n" for line in pairs).encode())
    write_bytes(root / "splits" / f"{split}.txt", "".join(f"{line}\n" for line in listed).encode())
    write_bytes(root / "annotations" / "names.json", json.dumps(names, indent=1).encode())
    return {"images": len(images), "objects": objects, "empty": len(images) - len({p.split("__")[0] for p in listed})}


def _broken(coco: Any, ids: dict[int, int]) -> str:
    """What the annotations lack; empty: nothing. Before the first label map is written."""
    if not coco.imgs or not coco.anns:
        return f"no {'annotations' if coco.imgs else 'images'}"
    for image in coco.imgs.values():
        if not re.fullmatch(r"\w[\w.-]{0,199}", Path(image["file_name"]).stem):
            return f"image {image['id']} has the file name {image['file_name'][:80]!r}"
        if not all(type(n) is int and 0 < n <= _LARGEST for n in (image["height"], image["width"])):
            return f"image {image['id']} has the size {image['height']} x {image['width']}"
    for a in coco.anns.values():
        if a["image_id"] not in coco.imgs or a["category_id"] not in ids:
            return f"annotation {a['id']} is of an unknown image or category"
        if not a["segmentation"] or not a["area"] >= 0:
            return f"annotation {a['id']} has no region"
        if not _is_drawable(a, coco.imgs[a["image_id"]]):
            return f"annotation {a['id']} cannot be drawn"
    return ""


def _label_map(
    coco: Any, image: dict[str, Any], found: list[dict[str, Any]], ids: dict[int, int], crowd: bool
) -> Array:
    """Ids 1 ... 80 of an image's objects: crowds first, then from large to small; the last one drawn is on top."""
    labels = np.zeros((image["height"], image["width"]), np.uint8)
    for a in sorted(found, key=lambda a: (not a.get("iscrowd"), -a["area"], a["id"])):
        labels[coco.annToMask(a).astype(bool)] = ids[a["category_id"]] if crowd or not a.get("iscrowd") else 255
    return labels


@dataclasses.dataclass
class CocoConfig:
    """Label maps and lists of COCO-20i from the official JSON.

    Attributes:
        annotations: instances_train2014.json or instances_val2014.json.
        root: folder that holds train2014 and val2014.
        crowd: whether regions marked as crowds count as objects; otherwise they are ignored.
    """

    annotations: str
    root: str
    crowd: bool = False
