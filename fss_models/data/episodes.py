"""Episodes from files: which images, deterministic from (seed, index), and how they become tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fss_models.data.files import Array
from fss_models.data.sources import Item, Source
from fss_models.errors import DataError, UserError

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
_ATTEMPTS = 20


def normalise(image: Tensor) -> Tensor:
    """(3, H, W) of 0 ... 1 to zero mean and unit variance over ImageNet."""
    return (image - MEAN) / STD


def denormalise(image: Tensor) -> Tensor:
    """The inverse of `normalise`, clamped to 0 ... 1."""
    return (image * STD + MEAN).clamp(0, 1)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a test image became the input: its own (height, width), and the part of the square that it fills."""

    original: tuple[int, int]
    filled: tuple[int, int]


def fit(image: Array, label: Array | None, size: int, how: str) -> tuple[Tensor, Tensor | None, Geometry]:
    """A test image as a square: (3, size, size) of 0 ... 1, its label (size, size) int64 and the geometry.

    ``stretch``: resized to the square; ``pad``: the longer side to ``size``, both sides floored to multiples of 8, the
    rest black with label 255. Images bilinearly with antialiasing, labels by the nearest pixel.
    """
    h, w = image.shape[:2]
    filled = (size, size)
    if how == "pad":
        filled = tuple(max(8, int(n * size / max(h, w)) // 8 * 8) for n in (h, w))  # type: ignore[assignment]
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    pixels = torch.nn.functional.interpolate(pixels, filled, mode="bilinear", antialias=True).clamp(0, 1)[0]
    margins = (0, size - filled[1], 0, size - filled[0])
    target = None
    if label is not None:
        resized = torch.nn.functional.interpolate(torch.from_numpy(label.copy())[None, None].float(), filled)[0, 0]
        target = torch.nn.functional.pad(resized, margins, value=255).long()
    return torch.nn.functional.pad(pixels, margins), target, Geometry((h, w), filled)


class Episodes(Dataset):
    """Episodes of a source; number i is the same for the same seed, whoever asks, in whatever order.

    An item is a dict: ``query`` (3, size, size) and ``support`` (S, 3, size, size), normalised; ``mask``
    (S, size, size) float32 of 0 and 1; ``target`` (size, size) int64 of 0, 1, 255; ``class_id``, ``index``; ``truth``
    (h, w) int64, the label at the size where it is judged; ``geometry``; ``names``, the query's image and those of the
    support; ``bad``, messages about files that could not be used and were replaced by another draw.

    Args:
        source: images by class.
        shots: support images S of an episode.
        size: side of the square inputs.
        seed: of everything random.
        length: how many episodes there are; any number.
        order: as in `Protocol.order`.
        how: as in `Protocol.fit`.
        truth: as in `Protocol.truth`.
        augment: None, or `fss_models.data.augment.Augment`: joint random change of every image and mask, for training.

    Raises:
        DataError: as `Source.check_shots`; on reading, when too many draws in a row cannot be used.
    """

    def __init__(
        self,
        source: Source,
        *,
        shots: int,
        size: int,
        seed: int,
        length: int,
        order: str = "images",
        how: str = "stretch",
        truth: str = "input",
        augment: Any = None,
    ) -> None:
        source.check_shots(shots)
        self.source, self.shots, self.size, self.seed, self.length = source, shots, size, seed, length
        self.order, self.how, self.truth, self.augment = order, how, truth, augment
        self.class_ids = sorted(source.classes)
        self.queries = [(item, (c,)) for item, c in source.listed] if order == "entries" else source.pairs()

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int, attempt: int = 0) -> tuple[int, list[Item], np.random.Generator]:
        """Class, the query's item then those of the support, and the generator to go on with."""
        rng = np.random.default_rng([self.seed, index, attempt])
        if self.order == "classes":
            class_id = int(rng.choice(self.class_ids))
            items = self.source.classes[class_id]
            query = items[int(rng.integers(len(items)))]
        else:
            number = len(self.queries)
            cycled = self.order != "drawn" and self.augment is None
            query, present = self.queries[(index + attempt) % number if cycled else int(rng.integers(number))]
            class_id = int(rng.choice(present))
        items = self.source.classes[class_id]
        drawn = (items[int(i)] for i in rng.choice(len(items), self.shots + 1, replace=False))
        return class_id, [query, *[item for item in drawn if item != query][: self.shots]], rng

    def __getitem__(self, index: int) -> dict[str, Any]:
        bad: list[str] = []
        for attempt in range(_ATTEMPTS):
            class_id, items, rng = self.draw(index, attempt)
            try:
                read = [self.source.read(item, class_id) for item in items]
            except DataError as error:
                bad.append(str(error))
                continue
            return {**self._tensors(read, rng), "class_id": class_id, "index": index, "bad": bad,
                    "names": [item.image for item in items]}  # fmt: skip
        raise DataError(f"episode {index}: {_ATTEMPTS} draws in a row cannot be used, the last: {bad[-1]}")

    def _tensors(self, read: list[tuple[Array, Array]], rng: np.random.Generator) -> dict[str, Any]:
        images, labels, geometries = [], [], []
        for image, label in read:
            if self.augment is not None:
                pixels, target = self.augment(image, label, rng)
                geometry = Geometry((self.size, self.size), (self.size, self.size))
            else:
                pixels, target, geometry = fit(image, label, self.size, self.how)
            images.append(normalise(pixels))
            labels.append(target)
            geometries.append(geometry)
        original = self.truth == "original" and self.augment is None
        return {
            "query": images[0],
            "support": torch.stack(images[1:]),
            "mask": torch.stack([(label == 1).float() for label in labels[1:]]),
            "target": labels[0],
            "truth": torch.from_numpy(read[0][1].astype(np.int64)) if original else labels[0],
            "geometry": geometries[0],
        }


_STACKED = ("query", "support", "mask", "target")


def collate(episodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tensors of one size stacked, ``class_id`` and ``index`` as int64 (B,), everything else as lists of B."""
    batch: dict[str, Any] = {key: [e[key] for e in episodes] for key in episodes[0]}
    for key in _STACKED:
        batch[key] = torch.stack(batch[key])
    for key in ("class_id", "index"):
        batch[key] = torch.tensor(batch[key])
    return batch


class _Caught(Dataset):
    """The items of a data set, or the error in place of one: a worker's would arrive with its traceback in the text."""

    def __init__(self, episodes: Dataset) -> None:
        self.episodes = episodes

    def __getitem__(self, index: int) -> dict[str, Any] | UserError:
        try:
            return self.episodes[index]
        except UserError as error:
            return error


def _collate_caught(items: Sequence[Any]) -> dict[str, Any] | UserError:
    errors = [item for item in items if isinstance(item, UserError)]
    return errors[0] if errors else collate(items)


def batches(
    episodes: Dataset, indices: Iterable[list[int]], *, workers: int = 0, pin_memory: bool = False
) -> Iterator[dict[str, Any]]:
    """Batches as `collate` makes them.

    Args:
        episodes: of `Episodes` or `GlyphEpisodes`.
        indices: those of each batch.
        workers: processes that load; 0: this one.
        pin_memory: of the tensors.

    Raises:
        UserError: as reading an episode, in whichever process that was.
    """
    # a generator of its own: making the iterator must not advance the one that dropout draws from
    loader = DataLoader(_Caught(episodes), batch_sampler=indices, num_workers=workers, collate_fn=_collate_caught,
                        generator=torch.Generator(), pin_memory=pin_memory)  # fmt: skip
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def to_batch(batch: dict[str, Any], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(query, support, mask, target) of a batch on a device."""
    query, support, mask, target = (batch[key].to(device, non_blocking=True) for key in _STACKED)
    return query, support, mask, target
