"""Episodes from files: folds, lists, formats, protocols, determinism, augmentation, bad input."""

from __future__ import annotations

import doctest
import importlib
import json
import pickle
import pkgutil
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from PIL import Image

from fss_models.config import DataConfig
from fss_models.data import (
    PROTOCOLS,
    Episodes,
    Source,
    collate,
    fold_classes,
    fss_source,
    labelled_source,
    protocol,
)
from fss_models.data.augment import Augment
from fss_models.data.build import eval_episodes, protocol_of, source_of, train_episodes
from fss_models.data.coco import prepare_coco
from fss_models.data.episodes import batches, denormalise, fit
from fss_models.data.files import inside, read_binary, read_image, read_labels
from fss_models.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def voc_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    builders.voc(root)
    return root


def pascal(root: Path, part: str = "val", **options: object) -> Source:
    classes = range(1, 6) if part == "val" else range(6, 21)
    folds = (0,) if part == "val" else (1, 2, 3)
    lists = [root / "VOC2012" / "splits" / "pascal" / part / f"fold{f}.txt" for f in folds]
    return labelled_source("pascal", root, lists, classes, **options)  # type: ignore[arg-type]


# ---- folds and protocols


def test_folds_are_the_published_ones() -> None:
    assert [fold_classes(20, f) for f in range(4)] == [
        (1, 2, 3, 4, 5), (6, 7, 8, 9, 10), (11, 12, 13, 14, 15), (16, 17, 18, 19, 20),
    ]  # fmt: skip
    steps = [fold_classes(80, f, rule="step") for f in range(4)]
    assert steps[0][:3] == (1, 5, 9) and steps[3][-1] == 80
    assert sorted(c for s in steps for c in s) == list(range(1, 81))
    assert fold_classes(80, 2) == tuple(range(41, 61))


@pytest.mark.parametrize("arguments, text", [
    ({"count": 20, "fold": 4}, "fold must be 0 ... 3"), ({"count": 21, "fold": 0}, "do not divide"),
    ({"count": 20, "fold": 0, "rule": "odd"}, "fold rule"),
])  # fmt: skip
def test_bad_folds(arguments: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        fold_classes(**arguments)


def test_protocols_say_what_the_papers_say() -> None:
    pfenet, hsnet, bam = protocol("pfenet-coco"), protocol("hsnet-pascal"), protocol("bam-pascal")
    assert (pfenet.size, pfenet.fold_rule, pfenet.min_area, pfenet.episodes) == (641, "step", 2048, 20000)
    assert (hsnet.episodes, hsnet.seeds, hsnet.truth, hsnet.fit) == (1000, (0,), "input", "stretch")
    assert bam.drop_novel and bam.episodes == 1000
    # BAM and HDMNet draw their seeds themselves
    drawn = tuple(np.random.RandomState(123).randint(0, 1000, 10))
    cyctr, hdmnet, ssp = (tuple(protocol(f"{n}-{d}") for d in ("pascal", "coco")) for n in ("cyctr", "hdmnet", "ssp"))
    assert bam.seeds == tuple(np.random.RandomState(123).randint(0, 1000, 5)) and hdmnet[0].seeds == drawn
    assert [(p.size, p.episodes, p.seeds) for p in cyctr] == [(473, 1000, (123,)), (473, 5000, (321,))]
    assert [(p.size, p.episodes, p.fit, p.truth) for p in hdmnet] == [
        (473, 1000, "stretch", "original"), (633, 10000, "stretch", "original"),
    ]  # fmt: skip
    assert [(p.episodes, p.seeds, p.fold_rule) for p in ssp] == [
        (1000, (0, 1, 2, 3, 4), "contiguous"), (4000, (0, 1, 2, 3, 4), "contiguous"),
    ]  # fmt: skip
    assert (cyctr[1].fold_rule, hdmnet[1].fold_rule, hdmnet[0].drop_novel, cyctr[0].drop_novel) == (
        "step", "step", True, False,
    )  # fmt: skip
    assert {p.min_area for p in (*cyctr, *hdmnet, *ssp)} == {2048}
    assert all(p.size % 8 == 1 and p.order in ("images", "entries", "drawn", "classes") for p in PROTOCOLS.values())
    with pytest.raises(ConfigError, match="unknown protocol 'x'; there are pfenet-pascal"):
        protocol("x")
    with pytest.raises(ConfigError, match=r"8n \+ 1, got 64; near it are 57 and 65"):
        protocol_of(DataConfig(size=64))


# ---- formats


@pytest.mark.parametrize("convention", ["split", "pairs"])
@pytest.mark.parametrize("palette", [True, False])
def test_pascal_lists_and_masks(tmp_path: Path, convention: str, palette: bool) -> None:
    builders.voc(tmp_path, convention=convention, palette=palette)
    source = pascal(tmp_path)
    assert sorted(source.classes) == [1, 2, 3, 4, 5] and source.names[5] == "bottle"
    # three images of each class, and one of another class that shows it, too
    assert {c: len(items) for c, items in source.classes.items()} == {1: 4, 2: 4, 3: 4, 4: 4, 5: 4}
    image, label = source.read(source.classes[1][0], 1)
    truth = np.asarray(Image.open(source.root / source.classes[1][0].label))
    assert image.shape == (*truth.shape, 3)
    np.testing.assert_array_equal(label, np.where(truth == 255, 255, truth == 1))


def test_training_images_with_novel_classes_can_be_left_out(tmp_path: Path) -> None:
    builders.voc(tmp_path, convention="pairs")
    lists = tmp_path / "VOC2012" / "splits" / "pascal"
    both = [*(lists / "trn" / f"fold{f}.txt" for f in (1, 2, 3)), lists / "val" / "fold0.txt"]
    base = tmp_path / "VOC2012" / "SegmentationClassAug"
    source = labelled_source("pascal", tmp_path, both, range(6, 21), without=range(1, 6))
    for items in source.classes.values():
        for item in items:
            ids = set(np.unique(np.asarray(Image.open(base / Path(item.label).name)))) - {0, 255}
            assert not ids & {1, 2, 3, 4, 5}
    everything = labelled_source("pascal", tmp_path, both, range(1, 21))
    assert sum(map(len, everything.classes.values())) > sum(map(len, source.classes.values()))


def test_area_threshold_and_its_cache(voc_root: Path, tmp_path: Path) -> None:
    areas = {}
    source = pascal(voc_root)
    for c, items in source.classes.items():
        for item in items:
            areas[c, item] = int((np.asarray(Image.open(source.root / item.label)) == c).sum())
    limit = int(np.median(list(areas.values()))) + 1
    for _ in range(2):  # the second time from the cache
        kept = pascal(voc_root, min_area=limit, cache=tmp_path)
        assert {(c, i) for c, items in kept.classes.items() for i in items} == {
            k for k, n in areas.items() if n >= limit
        }
    (cached,) = tmp_path.glob("areas-*.json")
    assert json.loads(cached.read_text())


def test_coco_from_the_official_json(tmp_path: Path) -> None:
    root = tmp_path / "COCO2014"
    annotations = builders.coco_json(root, "val2014")
    assert prepare_coco(annotations, root) == {"images": 160, "objects": 160, "empty": 0}
    json_file = json.loads(annotations.read_text())
    a = json_file["annotations"][-1]
    labels = read_labels(root / "annotations" / "val2014" / f"COCO_val2014_{a['image_id']:012d}.png")
    x, y, w, h = a["bbox"]
    expected = np.zeros((40, 48), np.uint8)
    expected[y : y + h, x : x + w] = 80  # category 90 is the 80th
    np.testing.assert_array_equal(labels, expected)
    for list_file in ("lists/val2014.txt", "splits/val2014.txt"):
        source = labelled_source("coco", tmp_path, root / list_file, fold_classes(80, 0, rule="step"))
        assert sorted(source.classes)[:2] == [1, 5] and {len(i) for i in source.classes.values()} == {2}
        assert source.names[80] == "category90"
        source.read(source.classes[5][0], 5)


def test_crowds_and_small_objects(tmp_path: Path) -> None:
    annotations = builders.coco_json(tmp_path, "val2014")
    content = json.loads(annotations.read_text())
    first, second = content["annotations"][:2]
    second.update(image_id=first["image_id"], category_id=2, area=1.0, bbox=[0, 0, 5, 5])
    second["segmentation"] = [[0, 0, 5, 0, 5, 5, 0, 5]]
    crowd = np.zeros((40, 48), np.uint8)
    crowd[30:, :] = 1
    runs = np.flatnonzero(np.diff(np.concatenate([[0], crowd.T.ravel(), [0]])))
    counts = np.diff(np.concatenate([[0], runs, [crowd.size]])).tolist()
    region = {"size": [40, 48], "counts": counts}
    content["annotations"].append(
        {"id": 9999, "image_id": first["image_id"], "category_id": 3, "iscrowd": 1, "area": 480,
         "segmentation": region, "bbox": [0, 30, 48, 10]}
    )  # fmt: skip
    annotations.write_text(json.dumps(content))
    prepare_coco(annotations, tmp_path)
    labels = read_labels(tmp_path / "annotations" / "val2014" / f"COCO_val2014_{first['image_id']:012d}.png")
    assert (labels[:5, :5] == 2).all()  # the small one is on top
    assert (labels[39] == 255).all()
    prepare_coco(annotations, tmp_path, crowd=True)
    labels = read_labels(tmp_path / "annotations" / "val2014" / f"COCO_val2014_{first['image_id']:012d}.png")
    assert (labels[39] == 3).all()


def test_fss_1000(tmp_path: Path) -> None:
    builders.fss(tmp_path)
    train = fss_source(tmp_path, tmp_path / "splits" / "fss" / "trn.txt")
    test = fss_source(tmp_path, tmp_path / "splits" / "fss" / "test.txt")
    assert sorted(train.names.values()) == ["abacus", "bell", "cup"] and not set(train.classes) & set(test.classes)
    for item in test.classes[min(test.classes)]:  # one mask in colours, the others grey
        _, label = test.read(item, min(test.classes))
        np.testing.assert_array_equal(label, np.asarray(Image.open(tmp_path / item.label).convert("L")) > 0)


# ---- episodes


def test_episodes_depend_on_seed_and_index_only(voc_root: Path) -> None:
    def made(seed: int) -> Episodes:
        return Episodes(pascal(voc_root, "trn"), shots=2, size=33, seed=seed, length=50, augment=Augment(33))

    a, b, other = made(3), made(3), made(4)
    torch.manual_seed(0)
    forwards = [a[i] for i in range(6)]
    torch.manual_seed(1)
    for i in reversed(range(6)):
        again = b[i]
        assert again["names"] == forwards[i]["names"] and again["class_id"] == forwards[i]["class_id"]
        for key in ("query", "support", "mask", "target"):
            assert torch.equal(again[key], forwards[i][key])
    assert any(other[i]["names"] != forwards[i]["names"] for i in range(6))
    loader = torch.utils.data.DataLoader(a, batch_size=3, num_workers=2, collate_fn=collate)
    batch = next(iter(loader))
    assert torch.equal(batch["query"], torch.stack([e["query"] for e in forwards[:3]]))


def test_an_episode_is_of_one_class_with_different_images(voc_root: Path) -> None:
    source = pascal(voc_root)
    episodes = Episodes(source, shots=3, size=41, seed=0, length=40)
    pairs = source.pairs()
    for i in range(40):
        episode = episodes[i]
        assert len(set(episode["names"])) == 4 and episode["names"][0] == pairs[i % len(pairs)][0].image
        listed = {item.image for item in source.classes[episode["class_id"]]}
        assert set(episode["names"]) <= listed
        assert set(episode["target"].unique().tolist()) <= {0, 1, 255} and (episode["target"] == 1).any()
        assert set(episode["mask"].unique().tolist()) == {0.0, 1.0} and episode["mask"].shape == (3, 41, 41)


@pytest.mark.parametrize("convention", ["split", "pairs"])
def test_queries_run_through_the_list_in_its_order(tmp_path: Path, convention: str) -> None:
    builders.voc(tmp_path, convention=convention)
    file = tmp_path / "VOC2012" / "splits" / "pascal" / "val" / "fold0.txt"
    lines = file.read_text().split("\n")[:-1]
    np.random.default_rng(0).shuffle(lines)
    file.write_text("\n".join(lines) + "\n")
    listed: list[tuple[str, set[int]]] = []  # by hand: image and classes of every line
    for line in lines:
        name = Path(line.split()[0]).stem.partition("__")[0]
        found = np.unique(np.asarray(Image.open(tmp_path / "VOC2012" / "SegmentationClassAug" / f"{name}.png")))
        classes = {int(line.partition("__")[2])} if convention == "split" else {int(c) for c in found if 0 < c <= 5}
        listed.append((name, classes))
    source = pascal(tmp_path)

    def drawn(order: str) -> list[tuple[str, int]]:
        episodes = Episodes(source, shots=1, size=33, seed=0, length=60, order=order)
        return [(Path(items[0].image).stem, c) for c, items, _ in map(episodes.draw, range(60))]

    images = list(dict.fromkeys(name for name, _ in listed))
    of = {name: {c for n, classes in listed for c in classes if n == name} for name in images}
    assert images != sorted(images) and max(map(len, of.values())) == 2
    assert [name for name, _ in drawn("images")] == [images[i % len(images)] for i in range(60)]
    assert all(c in of[name] for name, c in drawn("images"))
    entries = [(name, c) for name, classes in listed for c in sorted(classes)]
    assert drawn("entries") == [entries[i % len(entries)] for i in range(60)]
    at_random = drawn("drawn")
    assert all(c in of[name] for name, c in at_random) and {n for n, _ in at_random} == set(images)
    assert [n for n, _ in at_random] != [images[i % len(images)] for i in range(60)]


def test_fit_stretches_and_pads() -> None:
    image = np.full((40, 80, 3), 100, np.uint8)
    label = np.ones((40, 80), np.uint8)
    pixels, target, geometry = fit(image, label, 65, "pad")
    assert geometry.filled == (32, 64) and geometry.original == (40, 80)
    assert (target[:32, :64] == 1).all() and (target[32:] == 255).all() and (target[:, 64:] == 255).all()
    assert torch.allclose(pixels[:, :32, :64], torch.tensor(100 / 255)) and (pixels[:, 32:] == 0).all()
    pixels, target, geometry = fit(image, label, 65, "stretch")
    assert pixels.shape == (3, 65, 65) and (target == 1).all() and geometry.filled == (65, 65)


def test_truth_at_the_original_size(voc_root: Path) -> None:
    episodes = Episodes(pascal(voc_root), shots=1, size=33, seed=0, length=9, how="pad", truth="original")
    for i in range(9):
        episode = episodes[i]
        name = Path(episode["names"][0]).stem
        stored = np.asarray(Image.open(voc_root / "VOC2012" / "SegmentationClassAug" / f"{name}.png"))
        np.testing.assert_array_equal(episode["truth"] == 1, stored == episode["class_id"])


# ---- augmentation


def test_augmentation_moves_image_and_mask_together() -> None:
    # the image shows its own label: after any change both must still agree
    rng = np.random.default_rng(0)
    label = np.zeros((60, 80), np.uint8)
    label[15:45, 20:55] = 1
    image = np.where(label[..., None] == 1, 255, 0).astype(np.uint8).repeat(3, 2)
    changed = 0
    for _ in range(30):
        pixels, target = Augment(65, (0.8, 1.25), blur=0)(image, label, rng)
        assert set(target.unique().tolist()) <= {0, 1, 255}
        # a pixel counts if all its neighbours say the same: at edges the two resamplings differ
        around = torch.nn.functional.pad(target[None].float(), (1, 1, 1, 1), mode="replicate")
        around = around.unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)[0]
        sure = around.amin(-1) == around.amax(-1)
        assert torch.equal((pixels[0] > 0.5)[sure & (target != 255)], (target == 1)[sure & (target != 255)])
        filled = pixels[:, sure & (target == 255)]
        assert torch.allclose(filled, torch.tensor([[0.485], [0.456], [0.406]]).expand_as(filled), atol=1e-5)
        changed += int((target == 255).any())
    assert changed


def test_crop_keeps_the_foreground() -> None:
    rng = np.random.default_rng(1)
    label = np.zeros((100, 100), np.uint8)
    label[5:20, 5:20] = 1
    augment = Augment(65, (1.0, 1.0), degrees=0.0, blur=0, tries=400)
    kept = [int((augment(label[..., None].repeat(3, 2), label, rng)[1] == 1).sum()) for _ in range(20)]
    assert min(kept) >= 0.85 * 225


def test_no_change_without_randomness() -> None:
    image = np.random.default_rng(0).integers(0, 256, (33, 33, 3), dtype=np.uint8)
    label = (image[..., 0] > 128).astype(np.uint8)
    plain = Augment(33, (1.0, 1.0), degrees=0.0, blur=0)
    results = [plain(image, label, np.random.default_rng(s)) for s in range(8)]
    expected = torch.from_numpy(image).permute(2, 0, 1) / 255
    flips = [torch.allclose(p, expected.flip(2), atol=1e-5) for p, _ in results]
    assert all(f or torch.allclose(p, expected, atol=1e-5) for f, (p, _) in zip(flips, results, strict=True))
    assert 0 < sum(flips) < 8
    for flipped, (_, target) in zip(flips, results, strict=True):
        truth = torch.from_numpy(label).long()
        assert torch.equal(target, truth.flip(1) if flipped else truth)


# ---- bad input


def broken(root: Path, name: str, how: str) -> None:
    path = root / "VOC2012" / name
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "text":
        path.write_text("not an image")
    elif how == "colours":
        Image.open(path).convert("RGB").save(path)
    elif how == "palette":
        labels = np.asarray(Image.open(path)).copy()
        labels[0, 0] = 77
        Image.fromarray(labels).save(path)
    elif how == "empty":
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    elif how == "size":
        Image.open(path).resize((10, 10)).save(path)


@pytest.mark.parametrize("name, how, text", [
    ("JPEGImages/2007_001000.jpg", "missing", "no such file"),
    ("JPEGImages/2007_001000.jpg", "truncated", "not a readable image"),
    ("JPEGImages/2007_001000.jpg", "text", "not a readable image"),
    ("SegmentationClassAug/2007_001000.png", "missing", "no such file"),
    ("SegmentationClassAug/2007_001000.png", "truncated", "not a readable image"),
    ("SegmentationClassAug/2007_001000.png", "colours", "palette or 8-bit grey PNG that holds class ids, this is RGB"),
    ("SegmentationClassAug/2007_001000.png", "palette", r"wrong palette: ids must be 0 ... 20 or 255, found \[77\]"),
    ("SegmentationClassAug/2007_001000.png", "empty", r"the mask has no pixel of class aeroplane \(1\)"),
    ("SegmentationClassAug/2007_001000.png", "size", "mask of 10x10 for an image of 44x48"),
])  # fmt: skip
def test_bad_files_are_named_and_replaced(tmp_path: Path, name: str, how: str, text: str) -> None:
    builders.voc(tmp_path)
    broken(tmp_path, name, how)
    source = pascal(tmp_path)
    with pytest.raises(DataError, match=text) as caught:
        source.read(source.classes[1][0], 1)
    assert str(tmp_path / "VOC2012" / name) in str(caught.value) and "\n" not in str(caught.value)
    episodes = Episodes(source, shots=1, size=33, seed=0, length=40)
    messages = [m for i in range(40) for m in episodes[i]["bad"]]
    assert str(caught.value) in messages
    assert all("2007_001000" not in n for i in range(40) for n in episodes[i]["names"])


def test_no_usable_file_ends_the_run(tmp_path: Path) -> None:
    builders.voc(tmp_path)
    for path in (tmp_path / "VOC2012" / "JPEGImages").iterdir():
        path.write_text("x")
    with pytest.raises(DataError, match=r"draws in a row cannot be used, the last: .*2007_\d+\.jpg"):
        Episodes(pascal(tmp_path), shots=1, size=33, seed=0, length=1)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_a_worker_is_one_line(tmp_path: Path, workers: int) -> None:
    builders.voc(tmp_path)
    for path in (tmp_path / "VOC2012" / "JPEGImages").iterdir():
        path.write_text("x")
    episodes = Episodes(pascal(tmp_path), shots=1, size=33, seed=0, length=2)
    with pytest.raises(
        DataError, match=r"^episode 0: 20 draws in a row cannot be used, the last: .*: not a r"
    ) as caught:
        next(batches(episodes, [[0, 1]], workers=workers))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_bad_maps_in_the_scan_of_areas(tmp_path: Path) -> None:
    builders.voc(tmp_path)
    broken(tmp_path, "SegmentationClassAug/2007_001000.png", "truncated")
    source = pascal(tmp_path, min_area=1)
    assert len(source.bad) == 1 and "2007_001000.png" in source.bad[0]
    assert all("2007_001000" not in i.image for items in source.classes.values() for i in items)
    with pytest.raises(DataError, match=r"fold0.txt: 1 unusable files \(limit 0\): .*2007_001000.png"):
        source_of(DataConfig("hsnet-pascal", str(tmp_path / "VOC2012"), min_area=1, bad_limit=0), "test")


def test_lists_that_cannot_be_used(tmp_path: Path) -> None:
    builders.voc(tmp_path)
    base = tmp_path / "VOC2012"
    bad = base / "bad.txt"
    for content, text in (
        (b"", "bad.txt: the list is empty"),
        (b"2007_001000 and more\n", "bad.txt:1: neither 'name__class' nor 'image label'"),
        (pickle.dumps({1: ["COCO_val2014_1.jpg"]}), "pickled ones are never read"),
        (b"JPEGImages/../../../etc/passwd a.png\n", "bad.txt:1: .* is outside of the data root"),
        (b"/etc/passwd a.png\n", "is outside of the data root"),
        (b"../2007_001000__01\n../../../x__01\n", "bad.txt:2: .* is outside of the data root"),
    ):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=text):
            labelled_source("pascal", tmp_path, bad, [1])
    with pytest.raises(DataError, match=r"none.txt: No such file"):
        labelled_source("pascal", tmp_path, base / "none.txt", [1])
    with pytest.raises(DataError, match="no folder JPEGImages"):
        labelled_source("pascal", tmp_path / "nowhere", bad, [1])
    with pytest.raises(DataError, match=r"needs data\.root"):
        source_of(DataConfig("hsnet-pascal"), "test")


def test_paths_stay_inside(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/../b.png", "list") == tmp_path / "b.png"
    for relative in ("../b.png", "a/../../b.png", "/b.png", ".."):
        with pytest.raises(DataError, match=r"list: .* is outside of the data root"):
            inside(tmp_path, relative, "list")


def test_too_few_images_for_the_shots(voc_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fold0.txt: class aeroplane \(1\) has 4 images; a query and 5 shots need 6"):
        Episodes(pascal(voc_root), shots=5, size=33, seed=0, length=1)
    with pytest.raises(DataError, match="shots must be at least 1, got 0"):
        Episodes(pascal(voc_root), shots=0, size=33, seed=0, length=1)
    builders.fss(tmp_path)
    (tmp_path / "splits" / "fss" / "test.txt").write_text("../x\n")
    with pytest.raises(DataError, match=r"test.txt:1: \.\./x is outside of the data root"):
        fss_source(tmp_path, tmp_path / "splits" / "fss" / "test.txt")
    (tmp_path / "splits" / "fss" / "test.txt").write_text("zebra\n")
    with pytest.raises(DataError, match="zebra: no such folder"):
        fss_source(tmp_path, tmp_path / "splits" / "fss" / "test.txt")


@pytest.mark.parametrize("content", [b"", b"{", b'{"images": []}', b"\x00\x01"])
def test_corrupt_coco_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "instances_val2014.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"instances_val2014.json: (not a readable|0 categories)"):
        prepare_coco(path, tmp_path)
    with pytest.raises(DataError, match=r"none.json: not a readable"):
        prepare_coco(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize("section, key, value, text", [
    ("images", None, None, "annotation 1 is of an unknown image"),
    ("annotations", None, [], "no annotations"),
    ("images", "height", None, "not a readable COCO annotation file"),
    ("images", "width", 0, "image 100 has no size"),
    ("images", "file_name", None, "not a readable COCO annotation file"),
    ("categories", "name", None, "not a readable COCO annotation file"),
    ("annotations", "category_id", 12, "annotation 1 is of an unknown image or category"),
    ("annotations", "area", None, "not a readable COCO annotation file"),
    ("annotations", "segmentation", [], "annotation 1 has no region"),
    ("annotations", "segmentation", [[1, 2]], "image 100: "),
    ("annotations", "segmentation", "nothing", "image 100: "),
    ("annotations", "segmentation", {"size": [3, 3], "counts": [9]}, "image 100: "),
])  # fmt: skip
def test_incomplete_coco_json(tmp_path: Path, section: str, key: str | None, value: object, text: str) -> None:
    path = builders.coco_json(tmp_path, "val2014", per_class=1)
    content = json.loads(path.read_text())
    if key is None:
        content[section] = content[section][1:] if value is None else value
    elif value is None:
        del content[section][0][key]
    else:
        content[section][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"^{path}: {text}") as caught:
        prepare_coco(path, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_coco_image_names_stay_inside(tmp_path: Path) -> None:
    annotations = builders.coco_json(tmp_path, "val2014", per_class=1)
    assert prepare_coco(annotations, tmp_path)["images"] == 80
    content = json.loads(annotations.read_text())
    content["images"][0]["file_name"] = "../../../outside.jpg"
    annotations.write_text(json.dumps(content))
    prepare_coco(annotations, tmp_path)
    assert (tmp_path / "annotations" / "val2014" / "outside.png").exists()
    assert "val2014/outside.jpg annotations/val2014/outside.png" in (tmp_path / "lists" / "val2014.txt").read_text()
    evil = annotations.with_name("instances_...json")
    evil.write_text(annotations.read_text())
    with pytest.raises(DataError, match=r"the name must be instances_<split>.json"):
        prepare_coco(evil, tmp_path / "deep")


def test_predicts_masks_as_files_give_them(tmp_path: Path) -> None:
    def stored(values: list[int], mode: str = "L") -> Path:
        path = tmp_path / "mask.png"
        Image.fromarray(np.array([values], np.uint8)).convert(mode).save(path)
        return path

    assert read_binary(stored([0, 255, 255])).tolist() == [[0, 1, 1]]
    assert read_binary(stored([0, 255, 255], "RGB")).tolist() == [[0, 1, 1]]
    assert read_binary(stored([0, 3, 255])).tolist() == [[0, 1, 255]]
    assert read_binary(stored([0, 3, 4]), 4).tolist() == [[0, 0, 1]]
    assert read_binary(stored([0, 255]), 255).tolist() == [[0, 1]]
    with pytest.raises(DataError, match=r"mask.png: the mask has no pixel of class 7"):
        read_binary(stored([0, 3]), 7)
    with pytest.raises(DataError, match=r"mask.png: the mask has no pixel of foreground"):
        read_binary(stored([0, 0]))


def test_build_uses_the_protocol(voc_root: Path) -> None:
    data = DataConfig("bam-pascal", str(voc_root / "VOC2012"), size=33, min_area=0)
    train, test = train_episodes(data, 0, 10), eval_episodes(data, 0, 10)
    assert isinstance(train, Episodes) and isinstance(test, Episodes)
    assert train.augment.size == 33 and train.augment.scale == (0.9, 1.1)
    assert (test.how, test.truth, test.order) == ("pad", "original", "images")
    assert set(train.class_ids) == set(range(6, 21)) and set(test.class_ids) == {1, 2, 3, 4, 5}
    image = denormalise(test[0]["query"])
    name = voc_root / "VOC2012" / test[0]["names"][0]
    expected = fit(read_image(name), None, 33, "pad")[0]
    assert torch.allclose(image, expected, atol=1e-5)


def test_examples_of_the_docstrings() -> None:
    import fss_models.data

    modules = [
        importlib.import_module(f"fss_models.data.{m.name}") for m in pkgutil.iter_modules(fss_models.data.__path__)
    ]
    results = [doctest.testmod(module) for module in modules]
    assert sum(r.failed for r in results) == 0 and sum(r.attempted for r in results) >= 6
