"""Rendered episodes: unseen classes stay unseen, numbers decide everything, glyphs are what they claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fss_models.data.glyphs import CHARACTERS, FACES, GlyphEpisodes, bitmap
from fss_models.errors import ConfigError, DataError


def test_folds_partition_the_characters() -> None:
    tested = [set(GlyphEpisodes(f, "test").class_ids) for f in range(4)]
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 64
    assert sorted(c for t in tested for c in t) == list(range(1, 65)) and {len(t) for t in tested} == {16}
    for fold in range(4):
        train = GlyphEpisodes(fold, "train")
        assert set(train.class_ids) == set(range(1, 65)) - tested[fold]
        assert {train.names[c] for c in train.class_ids}.isdisjoint(train.names[c] for c in tested[fold])


def test_unseen_characters_are_never_drawn_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: set[str] = set()

    def recording(character: str, face: str) -> Image.Image:
        drawn.add(character)
        return bitmap(character, face)

    monkeypatch.setattr("fss_models.data.glyphs.bitmap", recording)
    train, test = GlyphEpisodes(2, "train", size=33), GlyphEpisodes(2, "test", size=33)
    for i in range(150):
        train[i]
    assert drawn <= {train.names[c] for c in train.class_ids} and len(drawn) == 48
    drawn.clear()
    for i in range(60):
        test[i]
    assert drawn <= {test.names[c] for c in test.class_ids}


def test_same_seed_and_index_same_episode() -> None:
    a = GlyphEpisodes(0, "train", shots=2, size=41, seed=5)
    b = GlyphEpisodes(0, "train", shots=2, size=41, seed=5)
    first = [a[i] for i in range(5)]
    torch.manual_seed(1)
    np.random.seed(1)
    for i in reversed(range(5)):
        again = b[i]
        assert again["class_id"] == first[i]["class_id"]
        for key in ("query", "support", "mask", "target"):
            assert torch.equal(again[key], first[i][key])
    other = GlyphEpisodes(0, "train", shots=2, size=41, seed=6)
    assert not any(torch.equal(other[i]["query"], first[i]["query"]) for i in range(5))


def test_scene() -> None:
    episodes = GlyphEpisodes(1, "test", shots=3, size=65)
    areas = []
    for i in range(40):
        e = episodes[i]
        assert e["query"].shape == (3, 65, 65) and e["support"].shape == (3, 3, 65, 65)
        assert e["query"].isfinite().all() and e["target"].dtype == torch.int64
        for mask in (e["target"], *e["mask"]):
            assert set(mask.unique().tolist()) == {0, 1}
            areas.append(mask.float().mean().item())
        assert not torch.equal(e["support"][0], e["support"][1])
    assert 0.01 < min(areas) and max(areas) < 0.5


def test_the_mask_is_the_glyph() -> None:
    # without distractors, textures or noise of note the class's glyph is what differs from the ground
    episodes = GlyphEpisodes(0, "test", size=97, distractors=0)
    for i in range(20):
        rng = np.random.default_rng(i)
        image, truth = episodes.scene(episodes.class_ids[i % 16], rng)
        inside, outside = image[truth], image[~truth]
        contrast = np.abs(np.median(inside, 0) - np.median(outside, 0)).max()
        assert contrast > 0.1
        rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
        assert max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 >= 0.2 * 97


def test_another_character_is_in_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    place = GlyphEpisodes._place

    def placed(self: GlyphEpisodes, c: int, *rest: Any) -> Any:
        alpha = place(self, c, *rest)
        drawn.extend([c] if alpha is not None else [])
        return alpha

    monkeypatch.setattr(GlyphEpisodes, "_place", placed)
    episodes = GlyphEpisodes(0, "train", size=41, distractors=1)
    tries = 0
    for i in range(150):
        drawn.clear()
        class_id = episodes.class_ids[i % 48]
        episodes.scene(class_id, np.random.default_rng(i))
        assert drawn[-2] == class_id != drawn[-1]  # of the try that was kept
        tries += drawn.count(class_id)
    assert tries > 150  # some needed another


def test_no_two_characters_look_alike() -> None:
    shapes = np.stack(
        [[np.asarray(bitmap(c, f).resize((32, 32)), np.float32) / 255 for c in CHARACTERS] for f in FACES]
    )
    alike = [
        np.minimum(shapes[:, i], shapes[:, j]).sum((1, 2)) / np.maximum(shapes[:, i], shapes[:, j]).sum((1, 2))
        for i in range(64)
        for j in range(i)
    ]
    assert np.mean(alike, 1).max() < 0.75


def test_many_glyphs_have_holes() -> None:
    def holes(character: str) -> bool:
        ink = np.pad(np.asarray(bitmap(character, "DejaVuSans-Bold")) > 127, 1)
        outside = np.zeros_like(ink)
        outside[0, 0] = True
        for _ in range(600):
            grown = outside.copy()
            for axis in (0, 1):
                for step in (-1, 1):
                    grown |= np.roll(outside, step, axis)
            grown &= ~ink
            if (grown == outside).all():
                break
            outside = grown
        return bool((~ink & ~outside).any())

    found = {c for c in CHARACTERS if holes(c)}
    assert {"A", "B", "D", "P", "Q", "R", "a", "b", "d", "e", "g", "4"} <= found and not {"C", "L", "T"} & found
    assert len(found) >= 20


@pytest.mark.parametrize("options, error, text", [
    ({"fold": 4, "part": "test"}, ConfigError, r"fold must be 0 \.\.\. 3, got 4"),
    ({"fold": 0, "part": "val"}, DataError, "part must be train or test"),
    ({"fold": 0, "part": "test", "size": 8}, DataError, "size must be at least 9, got 8"),
    ({"fold": 0, "part": "test", "shots": 0}, DataError, "shots must be at least 1, got 0"),
])  # fmt: skip
def test_bad_options(options: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        GlyphEpisodes(**options)
