"""Tiny data sets on disk, in the formats people have, made of coloured rectangles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

PALETTE = [int(v) for v in np.random.default_rng(0).integers(0, 256, 768)]


def rectangle(rng: np.random.Generator, h: int, w: int) -> tuple[slice, slice]:
    top, left = int(rng.integers(0, h // 2)), int(rng.integers(0, w // 2))
    return slice(top, top + h // 3), slice(left, left + w // 3)


def picture(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
    """An image in which every id has its own colour."""
    image = rng.integers(0, 60, (*label.shape, 3))
    for c in np.unique(label):
        if 0 < c < 255:
            image[label == c] += np.random.default_rng(int(c)).integers(60, 190, 3)
    return image.astype(np.uint8)


def voc(root: Path, per_class: int = 3, convention: str = "split", palette: bool = True) -> None:
    """VOC2012 with 20 classes, some images with a second class and a border of 255; HSNet's lists for fold 0."""
    rng = np.random.default_rng(1)
    base = root / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClassAug"):
        (base / folder).mkdir(parents=True)
    lines: dict[tuple[str, int], list[str]] = {("val", 0): [], **{("trn", f): [] for f in range(4)}}
    for c in range(1, 21):
        part = "val" if c <= 5 else "trn"
        for k in range(per_class):
            h, w = (40, 56) if k % 2 else (48, 44)
            label = np.zeros((h, w), np.uint8)
            if k == 1:
                other = (c % 5 + 1) if c <= 5 else (c - 6 + 1) % 15 + 6
                label[rectangle(rng, h, w)] = other
            rows, columns = rectangle(rng, h, w)
            label[max(rows.start - 1, 0) : rows.stop + 1, max(columns.start - 1, 0) : columns.stop + 1] = 255
            label[rows, columns] = c
            name = f"2007_{c:03d}{k:03d}"
            Image.fromarray(picture(rng, label)).save(base / "JPEGImages" / f"{name}.jpg", quality=95)
            mask = Image.fromarray(label)
            if palette:
                mask.putpalette(PALETTE)
            mask.save(base / "SegmentationClassAug" / f"{name}.png")
            for i in (int(i) for i in np.unique(label) if 0 < i < 255):
                if convention == "split":
                    lines[part, (i - 1) // 5].append(f"{name}__{i:02d}")
                elif i == c:
                    lines[part, (c - 1) // 5].append(f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png")
    lines["trn", 0].append("2007_999000__01" if convention == "split" else "absent.jpg absent.png")  # of a novel class
    for (part, fold), entries in lines.items():
        path = base / "splits" / "pascal" / part / f"fold{fold}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(entries) + "\n")


def coco_json(root: Path, split: str, per_class: int = 2) -> Path:
    """<root>/<split> with images and instances_<split>.json: 80 categories with COCO's gaps, boxes as polygons."""
    rng = np.random.default_rng(2)
    folder = root / split
    folder.mkdir(parents=True)
    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    images, annotations = [], []
    for position, category in enumerate(ids, 1):
        for k in range(per_class):
            h, w = 40, 48
            number = position * 100 + k
            name = f"COCO_{split}_{number:012d}"
            label = np.zeros((h, w), np.uint8)
            rows, columns = rectangle(rng, h, w)
            label[rows, columns] = position
            top, left, bottom, right = rows.start, columns.start, rows.stop, columns.stop
            polygon = [left, top, right, top, right, bottom, left, bottom]
            images.append({"id": number, "file_name": f"{name}.jpg", "height": h, "width": w})
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0,
                                "area": (bottom - top) * (right - left), "segmentation": [polygon],
                                "bbox": [left, top, right - left, bottom - top]})  # fmt: skip
            Image.fromarray(picture(rng, label)).save(folder / f"{name}.jpg", quality=95)
    categories = [{"id": i, "name": f"category{i}"} for i in ids]
    path = root / f"instances_{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def fss(root: Path, per_class: int = 4) -> None:
    """FSS-1000 with 6 classes: 3 for training, 3 for testing."""
    rng = np.random.default_rng(3)
    names = ["abacus", "bell", "cup", "drum", "egg", "fan"]
    for i, name in enumerate(names, 1):
        (root / name).mkdir(parents=True)
        for k in range(1, per_class + 1):
            label = np.zeros((44, 44), np.uint8)
            label[rectangle(rng, 44, 44)] = i
            Image.fromarray(picture(rng, label)).save(root / name / f"{k}.jpg", quality=95)
            white = np.repeat(((label > 0) * 255).astype(np.uint8)[..., None], 3, 2)
            Image.fromarray(white[..., 0] if k > 1 else white).save(root / name / f"{k}.png")
    (root / "splits" / "fss").mkdir(parents=True)
    (root / "splits" / "fss" / "trn.txt").write_text("\n".join(names[:3]))
    (root / "splits" / "fss" / "test.txt").write_text("\n".join(names[3:]))
