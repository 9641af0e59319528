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

from fss_models.data.files import write_bytes, write_png
from fss_models.errors import DataError

_LARGEST = 1e5  # pixels: pycocotools allocates by coordinates, and crashes on those that are not finite


def _is_drawable(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether pycocotools can draw an annotation without reading or writing outside of its memory."""
    size, drawn = [image["height"], image["width"]], annotation["segmentation"]
    if isinstance(drawn, dict):
        counts = drawn["counts"]
        known = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
        return drawn["size"] == size and (isinstance(counts, str) or (known and sum(counts) == size[0] * size[1]))
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
        DataError: a missing or corrupt file, no 80 classes, a name without a split, pycocotools missing.
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
        images = sorted(coco.imgs.values(), key=lambda image: image["file_name"])
        for i in images:
            if not re.fullmatch(r"\w[\w.-]{0,199}", Path(i["file_name"]).stem):
                raise ValueError(f"image {i['id']} has the file name {i['file_name'][:80]!r}")
            if not all(type(n) is int and 0 < n <= _LARGEST for n in (i["height"], i["width"])):
                raise ValueError(f"image {i['id']} is {i['height']} x {i['width']}")
        for a in coco.anns.values():
            if not (_is_drawable(a, coco.imgs[a["image_id"]]) and a["area"] >= 0 and a["category_id"] in coco.cats):
                raise ValueError(f"annotation {a['id']} cannot be drawn")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise DataError(f"{path}: not a readable COCO annotation file ({type(error).__name__}: {error})") from None
    if len(categories) != 80:
        raise DataError(f"{path}: {len(categories)} categories; COCO-20i has 80")
    ids = {category["id"]: i for i, category in enumerate(categories, 1)}
    root, pairs, listed, objects = Path(root), [], [], 0
    for image in tqdm(images, desc=f"label maps of {split}"):
        name = Path(image["file_name"]).stem
        labels = np.zeros((image["height"], image["width"]), np.uint8)
        # crowds first, then from large to small: the last one drawn is on top
        found = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
        for a in sorted(found, key=lambda a: (not a.get("iscrowd"), -a["area"], a["id"])):
            try:
                drawn = coco.annToMask(a).astype(bool)
            except ValueError as error:  # of compressed regions
                raise DataError(f"{path}: annotation {a['id']} cannot be drawn ({error})") from None
            labels[drawn] = ids[a["category_id"]] if crowd or not a.get("iscrowd") else 255
        objects += len(found)
        write_png(root / "annotations" / split / f"{name}.png", labels)
        pairs.append(f"{split}/{Path(image['file_name']).name} annotations/{split}/{name}.png")
        listed += [f"{split}/{name}__{c:02d}" for c in np.unique(labels) if 0 < c <= 80]
    write_bytes(root / "lists" / f"{split}.txt", "".join(f"{line}\n" for line in pairs).encode())
    write_bytes(root / "splits" / f"{split}.txt", "".join(f"{line}\n" for line in listed).encode())
    names = {i: category["name"] for i, category in enumerate(categories, 1)}
    write_bytes(root / "annotations" / "names.json", json.dumps(names, indent=1).encode())
    return {"images": len(images), "objects": objects, "empty": len(images) - len({p.split("__")[0] for p in listed})}


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
