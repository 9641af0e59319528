"""Episodes of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fss_models.config import DataConfig, check_size
from fss_models.data.episodes import Episodes
from fss_models.data.folds import FOLDS, fold_classes
from fss_models.data.glyphs import GlyphEpisodes
from fss_models.data.protocols import Protocol, protocol
from fss_models.data.sources import Source, fss_source, labelled_source
from fss_models.errors import DataError

_COUNTS = {"pascal": 20, "coco": 80}


def protocol_of(data: DataConfig) -> Protocol:
    """The protocol of a configuration, with what it overrides; ConfigError for a size that is not 8n + 1."""
    chosen = protocol(data.protocol, size=data.size, min_area=data.min_area, fold_rule=data.fold_rule)
    check_size(chosen.size)
    return chosen


def _list_files(data: DataConfig, dataset: str, part: str) -> list[Path]:
    given = data.train_list if part == "train" else data.test_list
    if given:
        return [Path(given.replace("{fold}", str(data.fold)))]
    lists = Path(data.root, "splits", dataset)
    if dataset == "fss":
        return [lists / ("trn.txt" if part == "train" else "test.txt")]
    own = lists / ("trn" if part == "train" else "val") / f"fold{data.fold}.txt"
    if part == "test" or dataset == "coco":
        return [own]  # COCO's lists for training hold the classes that the fold trains on, PASCAL's its own
    return [own.with_name(f"fold{f}.txt") for f in range(FOLDS) if f != data.fold]


def source_of(data: DataConfig, part: str) -> Source:
    """The images of a configuration, ``part`` train or test, by class.

    Raises:
        DataError, ConfigError: no root, another ``part``, and as `labelled_source` and `fss_source`; more than
            ``bad_limit`` label maps that cannot be read.
    """
    chosen = protocol_of(data)
    if part not in ("train", "test"):
        raise DataError(f"part must be train or test, got {part!r}")
    if not data.root:
        raise DataError(f"protocol {data.protocol} needs data.root, the folder of the data set")
    lists = _list_files(data, chosen.dataset, part)
    if chosen.dataset == "fss":
        return fss_source(data.root, lists[0])
    count = _COUNTS[chosen.dataset]
    tested = fold_classes(count, data.fold, rule=chosen.fold_rule)
    trained = tuple(c for c in range(1, count + 1) if c not in tested)
    source = labelled_source(
        chosen.dataset,
        data.root,
        lists,
        tested if part == "test" else trained,
        min_area=chosen.min_area,
        without=tested if part == "train" and chosen.drop_novel else (),
        cache=data.cache or None,
    )
    if len(source.bad) > data.bad_limit:
        raise DataError(f"{source.where}: {len(source.bad)} unusable files (limit {data.bad_limit}): {source.bad[0]}")
    return source


def train_episodes(data: DataConfig, seed: int, length: int) -> Dataset:
    """Training episodes: classes that the fold does not test, changed at random if they come from files."""
    chosen = protocol_of(data)
    if chosen.dataset == "glyphs":
        return GlyphEpisodes(data.fold, "train", shots=data.shots, size=chosen.size, seed=seed, length=length)
    common: dict[str, Any] = {"shots": data.shots, "size": chosen.size, "seed": seed, "length": length}
    source = source_of(data, "train")
    if not data.augment:
        return Episodes(source, order="classes", how="stretch", **common)
    from fss_models.data.augment import Augment

    return Episodes(source, order=chosen.order, augment=Augment(chosen.size, chosen.scale), **common)


def eval_episodes(data: DataConfig, seed: int, length: int, part: str = "test") -> Dataset:
    """Episodes to evaluate on, as the protocol says; ``part`` train: of the training classes, unchanged."""
    chosen = protocol_of(data)
    if chosen.dataset == "glyphs":
        return GlyphEpisodes(data.fold, part, shots=data.shots, size=chosen.size, seed=seed, length=length)
    return Episodes(
        source_of(data, part),
        shots=data.shots,
        size=chosen.size,
        seed=seed,
        length=length,
        order=chosen.order,
        how=chosen.fit,
        truth=chosen.truth,
    )


def class_names(dataset: Any) -> dict[int, str]:
    """Ids and names of the classes of `train_episodes` or `eval_episodes`."""
    if isinstance(dataset, Episodes):
        return {c: dataset.source.names[c] for c in dataset.class_ids}
    return {c: dataset.names[c] for c in dataset.class_ids}


def left_out(dataset: Any) -> list[str]:
    """Why files were left out while the lists behind `train_episodes` or `eval_episodes` were read."""
    return list(dataset.source.bad) if isinstance(dataset, Episodes) else []
