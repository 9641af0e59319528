"""Which images a data set has of which class: PASCAL-5i, COCO-20i and FSS-1000 as people have them on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from fss_models.data.files import Array, inside, read_class_labels, read_image, read_white, write_bytes
from fss_models.errors import DataError

_log = logging.getLogger(__name__)
_SPLIT_LINE = re.compile(r"(?P<name>\S+?)__(?P<id>\d{1,9})$")
PASCAL_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep"
    " sofa train tvmonitor"
).split()


@dataclasses.dataclass(frozen=True)
class Item:
    """An image and its label map, relative to the root."""

    image: str
    label: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Images by class.

    Attributes:
        root: folder the items are relative to.
        classes: id to the images that hold the class, in the order of the list.
        listed: every image with each of its classes, in the order of the list.
        names: id to name.
        read_label: (path, class) to (H, W) uint8 of 0, 1, 255.
        where: the list or folder all this comes from, for messages.
        bad: files that were left out while the list was read, with the reason.
    """

    root: Path
    classes: dict[int, tuple[Item, ...]]
    listed: tuple[tuple[Item, int], ...]
    names: dict[int, str]
    read_label: Callable[[Path, int], Array]
    where: str
    bad: tuple[str, ...] = ()

    def check_shots(self, shots: int) -> None:
        """DataError for a class with too few images for a query and ``shots`` supports, or if there is no class."""
        if shots < 1:
            raise DataError(f"shots must be at least 1, got {shots}")
        if not self.classes:
            raise DataError(f"{self.where}: no class to sample from")
        for c, items in self.classes.items():
            if len(items) < shots + 1:
                raise DataError(
                    f"{self.where}: class {self.names[c]} ({c}) has {len(items)} images; "
                    f"a query and {shots} shots need {shots + 1}"
                )

    def pairs(self) -> list[tuple[Item, tuple[int, ...]]]:
        """Every image once with its classes, in the order of the list."""
        result: dict[Item, list[int]] = {}
        for item, c in self.listed:
            result.setdefault(item, []).append(c)
        return [(item, tuple(sorted(classes))) for item, classes in result.items()]

    def read(self, item: Item, class_id: int) -> tuple[Array, Array]:
        """(image (H, W, 3), label (H, W) of 0, 1, 255); DataError with the path for anything unusable."""
        image = read_image(self.root / item.image)
        label = self.read_label(self.root / item.label, class_id)
        if image.shape[:2] != label.shape:
            size = f"{label.shape[1]}x{label.shape[0]}"
            raise DataError(
                f"{self.root / item.label}: mask of {size} for an image of {image.shape[1]}x{image.shape[0]}"
            )
        if not (label == 1).any():
            name = self.names.get(class_id, "?")
            raise DataError(f"{self.root / item.label}: the mask has no pixel of class {name} ({class_id})")
        return image, label


@dataclasses.dataclass(frozen=True)
class _OneClass:
    """Reads a label map of many classes as one of a single class; every other one is background."""

    count: int

    def __call__(self, path: Path, class_id: int) -> Array:
        labels = read_class_labels(path, self.count)
        return np.where(labels == 255, np.uint8(255), (labels == class_id).astype(np.uint8))


def _fss_label(path: Path, class_id: int) -> Array:
    return read_white(path)


def _folder(root: str | Path, nested: str, needed: str) -> Path:
    """root, or root/nested, whichever holds ``needed``."""
    for folder in (Path(root), Path(root, nested)):
        if (folder / needed).is_dir():
            return folder
    raise DataError(f"{root}: no folder {needed} (nor {nested}/{needed})")


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file; lists are text, pickled ones are never read") from None
    if not lines:
        raise DataError(f"{path}: the list is empty")
    return lines


def read_list(
    path: Path, root: Path, image: Callable[[str], str], label: Callable[[str], str]
) -> list[tuple[Item, int | None]]:
    """The entries of a list file, in either convention.

    ``name__07`` (HSNet and its descendants): an image name and the class it is listed for; ``image`` and ``label`` turn
    the name into paths. ``image.jpg label.png`` (PFENet and its descendants): paths relative to the root; the classes
    are those of the label map, hence None.

    Raises:
        DataError: no such file, not text, empty, a line of neither kind, a path outside of the root.
    """
    entries: list[tuple[Item, int | None]] = []
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        parts = line.split()
        match = _SPLIT_LINE.match(line)
        if match:
            item, class_id = Item(image(match["name"]), label(match["name"])), int(match["id"])
        elif len(parts) == 2:
            item, class_id = Item(*parts), None
        else:
            raise DataError(f"{where}: neither 'name__class' nor 'image label': {line[:80]}")
        for relative in (item.image, item.label):
            inside(root, relative, where)
        entries.append((item, class_id))
    return entries


def _checked(known: Any, count: int) -> dict[str, dict[str, int]]:
    """Label maps to classes 1 ... count to pixels; ValueError for anything else."""
    ids = {str(c) for c in range(1, count + 1)}
    maps = known.values() if isinstance(known, dict) else [None]
    if not all(isinstance(m, dict) and m.keys() <= ids and all(type(n) is int for n in m.values()) for m in maps):
        raise ValueError
    return known


def _areas(
    items: Iterable[Item], root: Path, count: int, list_file: Path, cache: Path | None
) -> tuple[dict[Item, dict[int, int]], list[str]]:
    """Pixels of each class in each label map, and the maps that cannot be read. Kept in ``cache`` as JSON."""
    unique = list(dict.fromkeys(items))
    key = hashlib.sha256("\n".join([str(root.resolve()), *(i.label for i in unique)]).encode()).hexdigest()[:16]
    file = cache / f"areas-{key}.json" if cache else None
    known: dict[str, dict[str, int]] = {}
    if file and file.exists():
        try:
            known = _checked(json.loads(file.read_text()), count)
        except (ValueError, RecursionError):
            _log.warning("%s: not the areas of classes, made anew", file)
    areas: dict[Item, dict[int, int]] = {}
    bad: list[str] = []
    missing = [item for item in unique if item.label not in known]
    for item in tqdm(missing, desc=f"areas of {list_file.name}", disable=len(missing) < 1000):
        try:
            histogram = np.bincount(read_class_labels(root / item.label, count).ravel(), minlength=256)
            known[item.label] = {str(c): int(histogram[c]) for c in range(1, count + 1) if histogram[c]}
        except DataError as error:
            bad.append(str(error))
    for item in unique:
        if item.label in known:
            areas[item] = {int(c): n for c, n in known[item.label].items()}
    if file and missing:
        write_bytes(file, json.dumps(known).encode())
    return areas, bad


def labelled_source(
    kind: str,
    root: str | Path,
    lists: str | Path | Sequence[str | Path],
    classes: Iterable[int],
    *,
    min_area: int = 0,
    without: Iterable[int] = (),
    cache: str | Path | None = None,
) -> Source:
    """PASCAL-5i or COCO-20i: one label map of all classes for each image.

    Args:
        kind: ``"pascal"``: JPEGImages, SegmentationClassAug (ids 1 ... 20, 255 ignored), in ``root`` or root/VOC2012.
            ``"coco"``: train2014, val2014 and annotations/<the same>/*.png (ids 1 ... 80, made by
            ``fss-models prepare-coco``), in ``root`` or root/COCO2014.
        root: folder of the data set.
        lists: one file or several, see `read_list`.
        classes: ids to keep.
        min_area: an image counts for a class only if the class covers so many pixels in it.
        without: images that hold one of these classes are left out.
        cache: folder for the areas of the classes, which take a pass over all label maps to find.

    Raises:
        DataError: missing folders or list, and as `read_list`. Label maps that cannot be read are left out and are in
            ``Source.bad``.
    """
    files = [Path(f) for f in ([lists] if isinstance(lists, (str, Path)) else lists)]
    where = ", ".join(map(str, files))
    if kind == "pascal":
        image: Callable[[str], str]
        label: Callable[[str], str]
        count, folder = 20, _folder(root, "VOC2012", "JPEGImages")
        names = dict(enumerate(PASCAL_NAMES, 1))
        image, label = "JPEGImages/{}.jpg".format, "SegmentationClassAug/{}.png".format
    elif kind == "coco":
        count, folder = 80, _folder(root, "COCO2014", "annotations")
        names = {i: str(i) for i in range(1, count + 1)}
        named = folder / "annotations" / "names.json"
        if named.exists():
            try:
                names.update({int(k): str(v) for k, v in json.loads(named.read_text()).items()})
            except (ValueError, AttributeError, RecursionError):
                raise DataError(f"{named}: not a JSON object of ids and names") from None
        image, label = (lambda n: f"{_coco(n)}.jpg"), (lambda n: f"annotations/{_coco(n)}.png")
    else:
        raise DataError(f"unknown kind of data set {kind!r}; there are pascal and coco")
    entries = [entry for file in files for entry in read_list(file, folder, image, label)]
    unwanted = set(without)
    bad: list[str] = []
    areas: dict[Item, dict[int, int]] = {}
    if min_area or unwanted or any(c is None for _, c in entries):
        areas, bad = _areas((item for item, _ in entries), folder, count, files[0], Path(cache) if cache else None)
    by_class: dict[int, list[Item]] = {c: [] for c in sorted(set(classes))}
    found: dict[tuple[Item, int], None] = {}
    broken = set() if not areas and not bad else {item for item, _ in entries} - set(areas)
    for item, listed in entries:
        if item in broken:
            continue
        present = areas.get(item)
        if present is not None and unwanted & set(present):
            continue
        for c in (listed,) if listed is not None else sorted(present or {}):
            if c in by_class and (present is None or not min_area or present.get(c, 0) >= min_area):
                found[item, c] = None
    for item, c in found:
        by_class[c].append(item)
    frozen = {c: tuple(items) for c, items in by_class.items()}
    return Source(folder, frozen, tuple(found), names, _OneClass(count), where, tuple(bad))


def _coco(name: str) -> str:
    """COCO_val2014_0001 or val2014/COCO_val2014_0001 to the latter."""
    if "/" in name:
        return name
    match = re.match(r"COCO_((?:train|val)2014)_", name)
    return f"{match[1]}/{name}" if match else name


def fss_source(root: str | Path, list_file: str | Path) -> Source:
    """FSS-1000: <class>/1.jpg with 1.png, the mask white; the list names the classes, one a line.

    The id of a class is its rank among all folders of the root, so it does not depend on the list.

    Raises:
        DataError: missing folder or list, a class that is outside of the root.
    """
    folder = Path(root, "FSS-1000") if Path(root, "FSS-1000").is_dir() else Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    ids = {path.name: i for i, path in enumerate(sorted(p for p in folder.iterdir() if p.is_dir()), 1)}
    classes: dict[int, tuple[Item, ...]] = {}
    names: dict[int, str] = {}
    listed: dict[tuple[Item, int], None] = {}
    for number, name in enumerate(_lines(Path(list_file)), 1):
        path = inside(folder, name, f"{list_file}:{number}")
        if path.name not in ids or path.parent != folder:
            raise DataError(f"{list_file}:{number}: {path}: no such folder")
        images = sorted(path.glob("*.jpg"), key=lambda p: (len(p.name), p.name))
        items = tuple(Item(f"{name}/{p.name}", f"{name}/{p.stem}.png") for p in images)
        classes[ids[name]], names[ids[name]] = items, name
        listed |= dict.fromkeys((item, ids[name]) for item in items)
    return Source(folder, classes, tuple(listed), names, _fss_label, str(list_file))
