"""Files of others: whatever is in them, one line that names the file, or a result; nothing of them is executed, and
nothing is written outside of the folders that were asked for."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pycocotools.mask
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from fss_models import checkpoints
from fss_models.__main__ import main
from fss_models.backbones import create, read_state
from fss_models.config import Config, DataConfig, ModelConfig, OptimConfig, from_dict, to_dict
from fss_models.data.coco import prepare_coco
from fss_models.data.files import read_binary, read_image, read_labels, read_white
from fss_models.data.sources import fss_source, labelled_source
from fss_models.errors import UserError
from fss_models.evaluate import EvalConfig, evaluate
from fss_models.train import _COLUMNS, _Log, train

fuzzed = settings(
    max_examples=200, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(autouse=True)
def sentinel(tmp_path: Path) -> Iterator[Path]:
    """What hostile files try to make."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small untrained network."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    config = Config(model=ModelConfig("panet", "tiny"), data=DataConfig("glyphs", size=33))
    checkpoints.write_weights(path, checkpoints.build_model(config.model), config, 3)
    return path


class Evil:
    """Makes a folder when it is unpickled, or made."""

    def __init__(self, path: str) -> None:
        os.mkdir(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def evil(path: Path) -> Evil:
    made = Evil.__new__(Evil)
    made.path = str(path)  # type: ignore[attr-defined]
    return made


def refuses(call: Callable[[], object], name: str, required: bool = True) -> None:
    """The call raises one line that names the file; where ``required`` is false it may work instead."""
    try:
        call()
    except (UserError, ValueError) as error:
        assert name in str(error) and "\n" not in str(error), error
        assert isinstance(error, UserError) or "weights: " in str(error), error
    else:
        assert not required, f"{name} was accepted"


def in_a_process(call: Callable[[], object]) -> None:
    """The call in a process of its own, which may crash or hang."""
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join(240)
    process.kill()
    process.join()
    assert process.exitcode == 0


# ---- checkpoints and weights


@pytest.mark.parametrize("read", [checkpoints.load_model, checkpoints.read_state, read_state], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "code", "text", "empty", "zip"])
def test_pickles_and_junk_are_no_weights(tmp_path: Path, sentinel: Path, read: Callable, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps(evil(sentinel)))
    elif kind in ("torch", "old torch"):
        torch.save({"step": 1, "w": evil(sentinel)}, path, _use_new_zipfile_serialization=kind == "torch")
    elif kind == "zip":
        shutil.make_archive(str(tmp_path / "archive"), "zip", Path(__file__).parent, "builders.py")
        os.replace(tmp_path / "archive.zip", path)
    else:
        path.write_bytes({"code": f"import os; os.mkdir({str(sentinel)!r})", "text": "w", "empty": ""}[kind].encode())
    refuses(lambda: read(path), str(path))


@given(data=st.data())
@fuzzed
def test_damaged_weights(weights: Path, tmp_path: Path, data: st.DataObject) -> None:
    path, content = tmp_path / "model.safetensors", bytearray(weights.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    kind = data.draw(st.sampled_from(("flip", "cut", "type", "length")))
    if kind == "flip":
        for at in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=8)):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "length":
        content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    else:
        of_kind = data.draw(st.sampled_from([b"I32", b"BF16", b"F64", b"F8_E5M2", b"F4", b"C64", b"XYZ"]))
        content[:] = content.replace(b'"F32"', b'"' + of_kind + b'"', data.draw(st.integers(1, 9)))
    path.write_bytes(content)
    refuses(lambda: checkpoints.load_model(path), str(path), required=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(data=st.data())
@fuzzed
def test_configurations_inside_checkpoints(weights: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    config = to_dict(Config(model=ModelConfig("panet", "tiny"), data=DataConfig("glyphs", size=33)))
    part = data.draw(st.sampled_from((config, config["data"], config["model"], config["model"]["options"])))
    keys = [*part, "scale", "stage", "trainable_backbone", "frozen_bn", "backbone", "class_path"]
    part[data.draw(st.sampled_from(keys))] = data.draw(JSON)
    save_file(load_file(weights), path, metadata={"config": json.dumps(config), "step": data.draw(st.text(max_size=4))})
    refuses(lambda: checkpoints.load_model(path), str(path), required=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of one step, and its configuration."""
    out, optim = tmp_path_factory.mktemp("run"), OptimConfig(steps=1, batch=1)
    config = Config(DataConfig("glyphs", size=33), ModelConfig("panet", "tiny"), optim, str(out), device="cpu")
    train(dataclasses.replace(config, tensorboard=False))
    return dataclasses.replace(config, tensorboard=False, resume=True, optim=dataclasses.replace(optim, steps=2))


@pytest.mark.parametrize("junk", [None, 5, "text", [], [[]], {}, {"state": 1}, torch.zeros(2)], ids=repr)
@pytest.mark.parametrize("key", ["step", "optimizer", "guard", "rng", "losses", "skipped_in_a_row", "bad_files"])
def test_states_with_junk_in_them(trained: Config, tmp_path: Path, key: str, junk: object) -> None:
    run = dataclasses.replace(trained, out=str(tmp_path / "run"))
    shutil.copytree(trained.out, run.out)
    path = checkpoints.resolve(run.out).with_name(checkpoints.STATE)
    torch.save({**checkpoints.read_state(path), key: junk}, path)
    refuses(lambda: train(run), str(path.parent), required=False)


def weights_of_backbone(path: Path) -> object:
    return checkpoints.build_model(ModelConfig("panet", "tiny", str(path)))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("kind", ["state", "weights", "code"])
def test_damaged_pickles(trained: Config, tmp_path: Path, sentinel: Path, kind: str, zipped: bool) -> None:
    """Bits flipped and ends cut of a state, of weights, and of a file that would run code if it could."""
    if kind == "state":
        content = checkpoints.read_state(checkpoints.resolve(trained.out).with_name(checkpoints.STATE))
    else:
        content = create("tiny").state_dict() | ({"evil": evil(sentinel)} if kind == "code" else {})
    path = tmp_path / "damaged.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    read = checkpoints.read_state if kind == "state" else weights_of_backbone

    @given(data=st.data())
    @settings(fuzzed, max_examples=50)
    def load(data: st.DataObject) -> None:
        damaged = bytearray(whole)
        reach = data.draw(st.sampled_from([300, 2000, len(whole)]))
        for at in data.draw(st.lists(st.integers(0, min(reach, len(whole)) - 1), max_size=6)):
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        del damaged[data.draw(st.integers(0, len(whole)) | st.just(len(whole))) :]
        path.write_bytes(damaged)
        refuses(lambda: read(path), path.name, required=False)

    in_a_process(load)


def itself(key: str) -> dict[str, object]:
    """A dictionary that holds itself."""
    made: dict[str, object] = {}
    made[key] = made
    return made


@pytest.mark.parametrize("change", [
    lambda w: w.to_sparse(), lambda w: w.to("meta"), lambda w: w.to(torch.complex64),
    lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), lambda w: torch.nested.nested_tensor([w[0], w[1, 1:]]),
], ids=["sparse", "meta", "complex", "quantised", "nested"])  # fmt: skip
def test_tensors_that_are_no_weights(tmp_path: Path, change: Callable) -> None:
    path, state = tmp_path / "weights.pth", create("tiny").state_dict()
    name = next(iter(state))
    torch.save({**state, name: change(state[name])}, path)
    refuses(lambda: weights_of_backbone(path), f"{path.name}: {name}")


@pytest.mark.parametrize("wrapped", [
    itself("model"), itself("state_dict"), {"model": torch.zeros(2)}, {"model": {"state_dict": [1]}},
    {5: torch.zeros(2)},
], ids=repr)  # fmt: skip
def test_dictionaries_that_hold_no_weights(tmp_path: Path, wrapped: dict) -> None:
    path = tmp_path / "weights.pth"
    torch.save(wrapped, path)
    in_a_process(lambda: refuses(lambda: weights_of_backbone(path), path.name))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model": ' * 5000, "9" * 5000, "null", '{"seed": 1e999}', "\0"])
def test_configurations_that_are_no_configurations(weights: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(load_file(weights), path, metadata={"config": text, "step": "1"})
    refuses(lambda: checkpoints.load_model(path), str(path))


def test_options_of_a_checkpoint_take_no_more_memory_than_its_weights(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = ModelConfig("dpcn", "tiny", options={"channels": 200_000})  # 1.4 TB of weights for one convolution
    save_file(load_file(weights), path, metadata={"config": json.dumps(to_dict(Config(model=model))), "step": "1"})
    refuses(lambda: checkpoints.load_model(path), str(path))


def test_a_checkpoint_names_no_place_to_write(tmp_path: Path) -> None:
    builders.voc(tmp_path)
    data = DataConfig("hsnet-pascal", str(tmp_path / "VOC2012"), size=33, min_area=1, cache=str(tmp_path / "theirs"))
    config = Config(model=ModelConfig("panet", "tiny"), data=data)
    checkpoints.write_weights(tmp_path / "m.safetensors", checkpoints.build_model(config.model), config, 1)
    for own in ("", str(tmp_path / "own")):
        evaluate(EvalConfig(str(tmp_path / "m.safetensors"), episodes=1, device="cpu", cache=own))
    assert not (tmp_path / "theirs").exists() and len(list((tmp_path / "own").iterdir())) == 1


# ---- configurations of commands


@pytest.mark.parametrize("text, reason", [
    ("model: !!python/object/apply:os.mkdir [SENTINEL]", "could not determine a constructor"),
    ("model: !!python/name:os.mkdir", "could not determine a constructor"),
    ("model: {options: {x: {class_path: test_untrusted.Evil, init_args: {path: SENTINEL}}}}", "class_path"),
    ("model: {class_path: test_untrusted.Evil, init_args: {path: SENTINEL}}", "class_path"),
    ("model: {class_path: makes_a_folder.It}", "class_path"),
    ("data: FOLDER/part.yaml", "class_path"),
    ("model: {options: &a {x: *a}}", "aliases"),
    ("model: {options: {x: " + "[" * 5000 + "]" * 5000 + "}}", "nesting depth"),
    ("model: {options: {x: " + "[" * 400 + "]" * 400 + "}}", "has no option 'x'"),
    ("\0", "control characters"),
    ("[]", ""),
    ("train", ""),
])  # fmt: skip
def test_configuration_files(
    tmp_path: Path,
    sentinel: Path,
    text: str,
    reason: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "makes_a_folder.py").write_text(f"import os; os.mkdir({str(sentinel)!r})")
    (tmp_path / "part.yaml").write_text("class_path: makes_a_folder.It\n")
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("SENTINEL", str(sentinel)).replace("FOLDER", str(tmp_path)))
    arguments = ["train", "--config", str(path), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and reason in error, error
    assert "makes_a_folder" not in sys.modules and not (tmp_path / "run").exists()


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")))
@fuzzed
def test_any_bytes_as_a_configuration_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert main(["predict", "--config", str(path)]) == 2  # whatever it says, the files are missing


@given(values=JSON)
@fuzzed
def test_any_json_as_a_configuration(values: object) -> None:
    refuses(lambda: from_dict(values, "a.json"), "a.json", required=False)  # type: ignore[arg-type]


# ---- images


def stored(path: Path, kind: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, kind)
    return path.read_bytes()


@given(data=st.data())
@fuzzed
def test_damaged_images(tmp_path: Path, data: st.DataObject) -> None:
    kind, mode = data.draw(st.sampled_from([("PNG", "RGB"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "P"), ("BMP", "L"),
                                            ("TIFF", "RGB"), ("WEBP", "RGB")]))  # fmt: skip
    path = tmp_path / "image.png"
    content = bytearray(stored(path, kind, mode))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[at] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    path.write_bytes(content)
    for read in (read_image, read_labels, read_white, read_binary):
        refuses(lambda read=read: read(path), str(path), required=False)


def huge(path: Path) -> None:
    """A PNG that says it is 100000 x 100000."""
    content = bytearray(stored(path, "PNG"))
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def postscript(path: Path) -> None:
    """Pillow gives it to Ghostscript, another program."""
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")


@pytest.mark.parametrize("make", [huge, postscript, Path.mkdir, lambda p: p.symlink_to("/dev/zero")])
def test_images_that_are_traps(tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr("subprocess.Popen.__init__", started)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    path = tmp_path / "image.png"
    make(path)
    for read in (read_image, read_labels, read_white, read_binary):
        refuses(lambda read=read: read(path), str(path))


# ---- lists and annotations

NAMES = st.text(st.sampled_from("ab/.\\ _017\0é\n\udc80"), max_size=12).map(
    lambda t: t.encode("utf-8", "surrogatepass")
)
LINES = st.one_of(
    NAMES, NAMES.map(lambda n: n + b"__07"), st.tuples(NAMES, NAMES).map(b" ".join), st.binary(max_size=20),
    st.sampled_from([b"/etc/passwd /etc/passwd", b"../../x__01", b"a/../../../x.png b.png", b"x__" + b"9" * 5000]),
)  # fmt: skip


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("roots")
    builders.voc(root / "voc")
    builders.fss(root / "fss")
    prepare_coco(builders.coco_json(root / "coco", "val2014", per_class=1), root / "coco")
    return root


CELLS = st.sampled_from([b"2", b"0.5", b"-1", b"", b"x", b"\xff", b"\0", b'"', b"1e9", b"9" * 5000, b",", b"step"])


@given(rows=st.lists(st.lists(CELLS, max_size=9).map(b",".join) | st.binary(max_size=40), max_size=4))
@fuzzed
def test_any_bytes_as_the_log_of_a_run(tmp_path: Path, rows: list[bytes]) -> None:
    """What cannot be gone on with is left as it is."""
    path, header = tmp_path / "log.csv", ",".join(_COLUMNS).encode()
    before = b"\n".join([header, *rows])
    path.write_bytes(before)
    refuses(lambda: _Log(Config(out=str(tmp_path), tensorboard=False), 3), "log.csv", required=False)
    after = path.read_bytes()
    assert after == before or after.startswith(header)


@given(lines=st.lists(LINES, max_size=4))
@fuzzed
def test_any_bytes_as_a_list(roots: Path, tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\n".join(lines))

    def read(source: Callable) -> None:
        found = source()
        for items in found.classes.values():
            for item in items:
                for name in (item.image, item.label):
                    assert os.path.realpath(found.root / name.replace("\0", "")).startswith(f"{found.root}/")
                refuses(lambda item=item: found.read(item, 1), str(found.root), required=False)

    refuses(lambda: read(lambda: labelled_source("pascal", roots / "voc", path, range(1, 21))), "", required=False)
    refuses(lambda: read(lambda: labelled_source("coco", roots / "coco", path, range(1, 81))), "", required=False)
    refuses(lambda: read(lambda: fss_source(roots / "fss", path)), "", required=False)


@pytest.fixture(scope="module")
def cached(roots: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[], dict], dict]:
    """A cache of areas, what reads it, and what that has to give."""
    folder, lists = tmp_path_factory.mktemp("cache"), roots / "list.txt"
    lists.write_text("".join(f"2007_00{c}{k:03d}__0{c}\n" for c in (1, 2) for k in range(3)))

    def read() -> dict:
        return labelled_source("pascal", roots / "voc", lists, range(1, 6), min_area=100, cache=folder).classes

    wanted = read()
    assert 0 < len(wanted[1] + wanted[2]) <= 6
    return next(folder.glob("areas-*.json")), read, wanted


AREAS = st.one_of(
    JSON.filter(lambda v: not isinstance(v, dict)),
    st.dictionaries(st.sampled_from(["0", "01", "21", "-1", "x", "9" * 5000]), st.integers(0, 9), min_size=1),
    st.dictionaries(st.sampled_from(["1", "2"]), JSON.filter(lambda n: type(n) is not int), min_size=1),
)


@given(content=st.one_of(
    JSON.map(json.dumps), st.text(st.characters(codec="utf-8"), max_size=9), st.just("[" * 100_000),
    AREAS.map(lambda areas: json.dumps({"SegmentationClassAug/2007_001000.png": areas})),
))  # fmt: skip
@settings(fuzzed, max_examples=50)
def test_any_text_as_a_cache(cached: tuple[Path, Callable[[], dict], dict], content: str) -> None:
    file, read, wanted = cached
    file.write_text(content)
    assert read() == wanted


@pytest.mark.parametrize("text", ["", "[]", "5", '{"a": "dog"}', "[" * 100_000])
def test_names_that_are_no_names(roots: Path, text: str) -> None:
    named, lists = roots / "coco" / "annotations" / "names.json", roots / "coco" / "splits" / "val2014.txt"
    whole = named.read_text()
    named.write_text(text)
    refuses(lambda: labelled_source("coco", roots / "coco", lists, range(1, 81)), str(named))
    named.write_text(whole)
    labelled_source("coco", roots / "coco", lists, range(1, 81))


def literal_runs(text: str) -> list[int]:
    """The runs of COCO's compressed regions, by their bits as text; nothing for what is no such region."""
    if not re.fullmatch("([P-o]{0,5}[0-O])*", text):
        return []
    words = ["".join(f"{(ord(c) - 48) % 32:05b}" for c in w[::-1]) for w in re.findall("[P-o]*[0-O]", text)]
    runs = [int(w, 2) - 2 ** len(w) * int(w[0]) for w in words]
    for m in range(3, len(runs)):
        runs[m] += runs[m - 2]
    return runs


@st.composite
def regions(draw: st.DrawFn) -> tuple[tuple[int, int], object]:
    """(size, region): compressed ones, whole and damaged, any text, runs, polygons."""
    h, w = size = draw(st.sampled_from([(4, 3), (1, 7), (40, 48)]))
    numbers = st.integers(-9, 99) | st.floats() | st.floats(-9, 99) | st.sampled_from([1e5, 1 << 40, None, "1", []])
    kind = draw(st.sampled_from(["whole", "damaged", "text", "runs", "polygons"]))
    if kind == "polygons":
        return size, draw(st.lists(st.lists(numbers, min_size=5, max_size=9), max_size=3))
    if kind in ("text", "runs"):
        return size, {"size": [h, w], "counts": draw(st.text(max_size=9) if kind == "text" else st.lists(numbers))}
    pixels = np.random.default_rng(draw(st.integers(0, 99))).random((h, w)) < 0.3
    text = pycocotools.mask.encode(np.asfortranarray(pixels, np.uint8))["counts"].decode()
    if kind == "damaged":
        more = draw(st.text(st.characters(min_codepoint=47, max_codepoint=112)))
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + more + text[at + draw(st.sampled_from([0, len(more), len(text)])) :]
    return size, {"size": [h, w], "counts": text}


def test_any_region(roots: Path, tmp_path: Path) -> None:
    """A label map, of the very region where that is compressed, or the file's name; in a process that may crash."""
    given_file, path, drawn = roots / "coco" / "instances_val2014.json", tmp_path / "instances_val2014.json", 0

    @given(regions())
    @fuzzed
    def prepare(case: tuple[tuple[int, int], Any]) -> None:
        nonlocal drawn
        (h, w), region = case
        content = json.loads(given_file.read_text())
        for key in ("images", "annotations"):
            content[key] = content[key][:1]
        content["images"][0] |= {"height": h, "width": w}
        content["annotations"][0]["segmentation"] = region
        path.write_text(json.dumps(content))
        compressed = isinstance(region, dict) and isinstance(region["counts"], str)
        runs = literal_runs(region["counts"]) if compressed else []
        whole = sum(runs) == h * w and min(runs) >= 0
        refuses(lambda: prepare_coco(path, tmp_path), str(path), required=compressed and not whole)
        labels = tmp_path / "annotations" / "val2014" / Path(content["images"][0]["file_name"]).with_suffix(".png")
        if whole:
            wanted = np.repeat(np.arange(len(runs)) % 2, runs).reshape(w, h).T
            np.testing.assert_array_equal(read_labels(labels), wanted)
            drawn += 1

    def run() -> None:
        prepare()
        assert drawn > 10

    in_a_process(run)


@pytest.mark.parametrize("change", [
    {"segmentation": [[0, 0, 1e300, 0, 1e12, 1e12]]}, {"segmentation": [[0, 0, float("nan"), 0, 5, float("inf")]]},
    {"segmentation": {"size": [1 << 20, 1 << 20], "counts": [3]}}, {"segmentation": {"size": [40, 48]}},
    {"segmentation": {"size": [40, 48], "counts": [3, 1 << 30]}},
    {"segmentation": {"size": [40, 48], "counts": "\xff" * 90}}, {"segmentation": {"size": [40, 48], "counts": ""}},
    {"segmentation": {"size": [40, 48], "counts": "Pl1o"}},  # 1920 pixels, then half a number
    {"segmentation": {"size": [40, 48], "counts": "PlQPPPP0"}},  # 1920 in 40 bits
    {"segmentation": [[1, 2]]}, {"segmentation": []}, {"segmentation": None}, {"segmentation": [["a"] * 6]},
    {"segmentation": {"size": [40, 48], "counts": [-5, 2**63]}}, {"segmentation": {"size": [40, 48], "counts": 7}},
    {"category_id": 1000}, {"image_id": 77}, {"area": "big"}, {"category_id": []},
    {"height": 1 << 30}, {"width": -1}, {"file_name": 5}, {"file_name": None}, {"file_name": "\0"}, {"file_name": ""},
    {"file_name": "/.."}, {"file_name": "a" * 5000},
])  # fmt: skip
def test_annotations_that_would_crash(tmp_path: Path, change: dict) -> None:
    """pycocotools is C: what it takes without looking is refused, and nothing is written outside of the root."""
    path = builders.coco_json(tmp_path / "given", "val2014", per_class=1)
    content = json.loads(path.read_text())
    content["annotations" if change.keys() & content["annotations"][0].keys() else "images"][0].update(change)
    path.write_text(json.dumps(content))
    before = {p for p in tmp_path.rglob("*")}
    root = tmp_path / "given" / "root"
    refuses(lambda: prepare_coco(path, root), str(path))
    assert {p for p in tmp_path.rglob("*")} == before


# ---- what is written


@pytest.mark.parametrize("name", ["..png", "...png", ".png", "-.png", "a b.png", "\N{GREEK SMALL LETTER ALPHA}.png"])
def test_predictions_stay_in_their_folder(weights: Path, tmp_path: Path, name: str) -> None:
    label = np.zeros((33, 33), np.uint8)
    label[8:20, 8:20] = 255
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "in" / name, tmp_path / "mask.png"):
        Image.fromarray(label).save(path, "PNG")
    out = tmp_path / "deep" / "out"
    query, mask = f"--query={tmp_path / 'in' / name}", f"--mask={tmp_path / 'mask.png'}"
    command = ["predict", f"--checkpoint={weights}", query, f"--support={tmp_path / 'mask.png'}", mask]
    assert main([*command, "--out", str(out), "--device", "cpu"]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["out"] and len(list(out.iterdir())) == 2
