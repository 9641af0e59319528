"""The whole way on the formats people have: train, evaluate, predict, by the commands; and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from model_samples import Episode, balanced
from PIL import Image
from test_metrics import slow
from torch import nn

from fss_models import checkpoints
from fss_models.__main__ import main
from fss_models.config import Config, DataConfig, ModelConfig
from fss_models.data import PROTOCOLS, GlyphEpisodes
from fss_models.data.build import eval_episodes
from fss_models.data.coco import prepare_coco
from fss_models.data.episodes import Geometry
from fss_models.evaluate import AllForeground, EvalConfig, at_truth, evaluate, measure, overlay, probabilities

NETWORKS = {"panet": {}, "dpcn": {"channels": 16, "dilations": [1, 2]}, "dpnet": {"channels": 16, "bins": [3, 2]}}
MODEL = ["--model.name", "dpcn", "--model.options", '{"channels": 16, "dilations": [1, 2]}']


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pascal(root: Path) -> tuple[str, list[str]]:
    builders.voc(root)
    return "bam-pascal", ["--data.root", str(root / "VOC2012"), "--data.min_area", "1"]


def coco(root: Path) -> tuple[str, list[str]]:
    prepare_coco(builders.coco_json(root, "val2014"), root)
    lists = str(root / "splits" / "val2014.txt")
    return "hsnet-coco", ["--data.root", str(root), "--data.train_list", lists, "--data.test_list", lists]


def fss(root: Path) -> tuple[str, list[str]]:
    builders.fss(root)
    return "hsnet-fss", ["--data.root", str(root)]


@pytest.mark.parametrize("make", [pascal, coco, fss])
def test_train_evaluate_predict(make: object, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    protocol, data = make(tmp_path / "data")  # type: ignore[operator]
    run, result_folder = tmp_path / "run", tmp_path / "result"
    train = ["train", "--data.protocol", protocol, *data, "--data.size", "33", *MODEL, "--out", str(run)]
    train += ["--optim.steps", "2", "--optim.batch", "2", "--device", "cpu", "--tensorboard", "false"]
    assert main(train) == 0
    command = [
        "evaluate",
        "--checkpoint",
        str(run),
        "--episodes",
        "12",
        "--seeds",
        "[3, 4]",
        "--out",
        str(result_folder),
    ]
    assert main([*command, "--save", "true", "--batch", "4", "--device", "cpu", "--grid", "3"]) == 0
    result = json.loads((result_folder / "result.json").read_text())
    assert result["protocol"]["name"] == protocol and result["protocol"]["note"] == PROTOCOLS[protocol].note
    assert result["protocol"]["size"] == 33 and result["protocol"]["episodes"] == 12 and result["step"] == 2
    assert result["bad_files"] == [] and result["environment"]["torch"] == torch.__version__
    used = DataConfig(**result["data"])
    mious = []
    for seed in (3, 4):
        episodes = eval_episodes(used, seed, 12)
        masks, truths, classes = [], [], []
        for i in range(12):
            masks.append((np.asarray(Image.open(result_folder / "predictions" / str(seed) / f"{i}.png")) > 127) * 1)
            truths.append(episodes[i]["truth"].numpy())
            classes.append(episodes[i]["class_id"])
            assert masks[-1].shape == truths[-1].shape
        miou, fb, _ = slow(masks, truths, np.array(classes))
        mious.append(miou)
        assert result["seeds"][str(seed)]["miou"] == pytest.approx(miou, abs=1e-9)
        assert result["seeds"][str(seed)]["fb_iou"] == pytest.approx(fb, abs=1e-9)
    assert result["miou"]["mean"] == pytest.approx(np.mean(mious))
    assert result["miou"]["std"] == pytest.approx(np.std(mious, ddof=1))
    assert Image.open(result_folder / "grid.png").size == (4 * 33, 14 + 3 * 33)

    source = episodes.source  # type: ignore[attr-defined]
    class_id = min(source.classes)
    items = source.classes[class_id][:2]
    command = ["predict", "--checkpoint", str(run), "--query", str(source.root / items[0].image), "--device", "cpu"]
    command += ["--support", f"[{source.root / items[1].image}]", "--mask", f"[{source.root / items[1].label}]"]
    value = [] if protocol == "hsnet-fss" else ["--value", str(class_id)]
    capsys.readouterr()
    assert main([*command, *value, "--out", str(tmp_path / "predicted")]) == 0
    mask, shown = (Image.open(line) for line in capsys.readouterr().out.split())
    query = np.asarray(Image.open(source.root / items[0].image))
    assert mask.mode == "L" and np.asarray(mask).shape == query.shape[:2]
    assert set(np.unique(np.asarray(mask))) <= {0, 255}
    np.testing.assert_array_equal(np.asarray(shown), overlay(query, np.asarray(mask)))


# ---- parts


class Reads(nn.Module):
    """Predicts the first support's mask."""

    def forward(self, query: torch.Tensor, support: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        chance = mask[:, :1].clamp(0.1, 0.9)
        return torch.cat([(1 - chance).log(), chance.log()], 1)


def test_all_foreground_scores_the_share_of_foreground() -> None:
    episodes = GlyphEpisodes(0, "test", size=33)
    chosen = torch.utils.data.Subset(episodes, range(9))
    chosen.class_ids, chosen.names = episodes.class_ids, episodes.names  # type: ignore[attr-defined]
    outcome = measure(AllForeground(), chosen, batch=2, pictures=2)
    shares: dict[int, list[float]] = {}
    for i in range(9):
        shares.setdefault(episodes[i]["class_id"], []).append(episodes[i]["target"].float().mean().item())
    assert outcome.result["miou"] == pytest.approx(100 * np.mean([np.mean(s) for s in shares.values()]), abs=1e-4)
    assert [r.shape for r in outcome.rows] == [(33, 132, 3)] * 2


def test_scales_average_probabilities() -> None:
    query, support, mask = torch.zeros(2, 3, 33, 41), torch.zeros(2, 1, 3, 33, 41), torch.zeros(2, 1, 33, 41)
    mask[..., :20] = 1
    sizes: list[tuple[int, ...]] = []

    class Spy(Reads):
        def forward(self, query: torch.Tensor, support: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(query.shape[-2:]))
            assert support.shape[-2:] == mask.shape[-2:] == query.shape[-2:]
            return super().forward(query, support, mask)

    result = probabilities(Spy(), query, support, mask, (1.0, 0.5, 1.5))
    assert sizes == [(33, 41), (17, 17), (49, 65)]  # 8 * round(40 / 8 * scale) + 1, halves to even
    assert result.shape == (2, 33, 41) and torch.allclose(result[..., :10], torch.tensor(0.9), atol=1e-5)
    assert torch.allclose(result[..., 30:], torch.tensor(0.1), atol=1e-5)


def test_padding_is_cut_before_resizing() -> None:
    chances = torch.zeros(33, 33)
    chances[:16, :32] = 1.0  # the image; everything else is padding
    judged = at_truth(chances, Geometry((40, 80), (16, 32)), (40, 80))
    assert judged.shape == (40, 80) and torch.allclose(judged, torch.ones(40, 80))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of untrained networks, moved so that they predict both classes."""
    files = {name: tmp_path_factory.mktemp("networks") / f"{name}.safetensors" for name in NETWORKS}
    drawn = [GlyphEpisodes(0, "test", size=33)[i] for i in range(4)]
    for name, file in files.items():
        config = Config(DataConfig("glyphs", size=33), ModelConfig(name, "tiny", options=NETWORKS[name]))
        torch.manual_seed(1)
        model = checkpoints.build_model(config.model).eval()
        if name != "panet":
            balanced(model, Episode(*(torch.stack([one[key] for one in drawn]) for key in Episode._fields)))
        checkpoints.write_weights(file, model, config, 1)
    return {name: str(file) for name, file in files.items()}


_EVALUATOR = """
import json, os
from fss_models.evaluate import EvalConfig, evaluate
results = [evaluate(EvalConfig(**chosen)) for chosen in json.load(open("chosen.json"))]
json.dump(results, open(f"told-{os.environ['RANK']}.json", "w"))
"""


def test_same_in_two_processes(networks: dict[str, str], tmp_path: Path) -> None:
    """Twice."""
    chosen = [{"checkpoint": file, "episodes": 9, "seeds": [0], "device": "cpu"} for file in networks.values()]
    (tmp_path / "run.py").write_text(_EVALUATOR)
    (tmp_path / "chosen.json").write_text(json.dumps(chosen * 2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=240)
    one, two = [evaluate(EvalConfig(**c)) for c in chosen], json.loads((tmp_path / "told-0.json").read_text())
    assert [r["seeds"] for r in one * 2] == [r["seeds"] for r in two] and all(r["seeds"]["0"]["miou"] > 0 for r in one)
    assert [r["environment"]["processes"] for r in (*one, *two)] == [1] * len(one) + [2] * len(two)


@pytest.mark.parametrize("network", NETWORKS)
def test_same_seed_same_scores(networks: dict[str, str], network: str) -> None:
    """Twice, with one thread and with two; another seed draws other episodes."""
    found = []
    for threads, seed in ((1, 0), (1, 0), (2, 0), (1, 5)):
        torch.set_num_threads(threads)
        result = evaluate(EvalConfig(networks[network], episodes=6, seeds=[seed], device="cpu"))
        found.append(result["seeds"][str(seed)])
    assert found[0] == found[1] == found[2] != found[3] and found[0]["miou"] > 0


def test_training_classes_and_other_shots() -> None:
    base = {"data": DataConfig("glyphs", size=33), "episodes": 6, "seeds": [0], "device": "cpu"}
    train = evaluate(EvalConfig(part="train", **base))  # type: ignore[arg-type]
    test = evaluate(EvalConfig(shots=5, **base))  # type: ignore[arg-type]
    names = [set(r["seeds"]["0"]["per_class"]) for r in (train, test)]
    assert names[0].isdisjoint(names[1]) and (len(names[0]), len(names[1])) == (48, 16)
    assert test["data"]["shots"] == 5


def test_given_fields_change_those_of_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, file = str(tmp_path / "run"), tmp_path / "evaluate.yaml"
    train = ["train", "--data.size", "33", "--data.fold", "1", "--data.shots", "2", "--data.bad_limit", "3"]
    train += [*MODEL[:1], "panet", "--optim.steps", "1", "--optim.batch", "1", "--tensorboard", "false"]
    assert main([*train, "--device", "cpu", "--seed", "4", "--out", run]) == 0
    trained = DataConfig("glyphs", size=33, fold=1, shots=2, bad_limit=3)

    def evaluated(*options: str) -> dict:
        command = ["evaluate", "--episodes", "1", "--device", "cpu", "--out", str(tmp_path / "result")]
        assert main([*command, *options]) == 0
        result = json.loads((tmp_path / "result" / "result.json").read_text())
        assert result["trained_on"] == dataclasses.asdict(trained)
        return result

    assert evaluated("--checkpoint", run)["data"] == dataclasses.asdict(trained)
    result = evaluated("--checkpoint", run, "--data.fold", "2")
    assert result["data"] == dataclasses.asdict(dataclasses.replace(trained, fold=2))
    file.write_text(f"checkpoint: {run}\nseeds: [0]\ndata:\n  size: 41\n")
    result = evaluated("--config", str(file), "--data.workers", "1")
    assert result["data"] == dataclasses.asdict(dataclasses.replace(trained, size=41, workers=1))
    # the training's own seed would draw its episodes again
    assert evaluated("--checkpoint", run, "--part", "train")["protocol"]["seeds"] == [5, 6, 7]
    assert not any("seed 4" in r.message for r in caplog.records)
    evaluated("--checkpoint", run, "--part", "train", "--seeds", "[4]")
    assert any("seed 4 is that of the training" in r.message for r in caplog.records)


def test_bad_files_are_reported(tmp_path: Path) -> None:
    builders.voc(tmp_path)
    (tmp_path / "VOC2012" / "JPEGImages" / "2007_002001.jpg").unlink()
    data = DataConfig("hsnet-pascal", str(tmp_path / "VOC2012"), size=33)
    config = EvalConfig(data=data, episodes=20, device="cpu")
    config.model.name = "panet"
    (message,) = evaluate(config)["bad_files"]
    assert "2007_002001.jpg: no such file" in message
    # a label map that cannot be read when the areas of classes are counted
    (tmp_path / "VOC2012" / "SegmentationClassAug" / "2007_003000.png").write_bytes(b"x")
    config.data.min_area = 1
    assert any("2007_003000.png: not a" in m for m in evaluate(config)["bad_files"])


# ---- the command line


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fss-models: "), error
    return error


def test_commands_refuse_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = tmp_path / "config.yaml"
    bad.write_text("optim: {lr: [")
    assert "config.yaml" in refused(["train", "--config", str(bad)], capsys)
    bad.write_text("optim: {speed: 3}\n")
    assert "speed" in refused(["train", "--config", str(bad)], capsys)
    bad.write_text("optim: {lr: fast}\n")
    assert "lr" in refused(["train", "--config", str(bad)], capsys)
    assert "none.yaml" in refused(["train", "--config", str(tmp_path / "none.yaml")], capsys)
    out = ["--out", str(tmp_path / "run")]
    assert "8n + 1, got 64" in refused(["train", "--data.size", "64", *out], capsys)
    assert "data.shots must be at least 1, got 0" in refused(["train", "--data.shots", "0", *out], capsys)
    assert "needs data.root" in refused(["train", "--data.protocol", "hsnet-pascal", *out], capsys)
    assert f"{tmp_path}/no: no checkpoint here" in refused(["evaluate", "--checkpoint", f"{tmp_path}/no"], capsys)
    assert "shots must be at least 1" in refused(["evaluate", "--shots", "0"], capsys)
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    arguments = ["--query", "q.jpg", "--support", "[s.jpg]", "--mask", "[m.png]"]
    text = refused(["predict", "--checkpoint", str(tmp_path / "weights.safetensors"), *arguments], capsys)
    assert "weights.safetensors: not a readable safetensors file" in text
    text = refused(["prepare-coco", "--annotations", f"{tmp_path}/none.json", "--root", str(tmp_path)], capsys)
    assert "none.json" in text


def test_predict_refuses_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = ["train", "--data.size", "33", *MODEL, "--optim.steps", "1", "--optim.batch", "1", "--device", "cpu"]
    assert main([*run, "--tensorboard", "false", "--out", str(tmp_path / "run")]) == 0
    for name, pixels in (("image.png", np.zeros((20, 30, 3))), ("mask.png", np.ones((20, 30))),
                         ("empty.png", np.zeros((20, 30))), ("small.png", np.ones((5, 5)))):  # fmt: skip
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")

    def predicted(query: str, support: str, mask: str, *more: str) -> str:
        files = [f"{tmp_path}/{name}" for name in (query, support, mask)]
        command = ["predict", "--checkpoint", str(tmp_path / "run"), "--query", files[0], "--support", files[1]]
        return refused([*command, "--mask", files[2], "--out", str(tmp_path / "out"), *more], capsys)

    assert f"{tmp_path}/none.png: no such file" in predicted("none.png", "image.png", "mask.png")
    assert f"{tmp_path}/text.png: not a readable image" in predicted("image.png", "text.png", "mask.png")
    assert f"{tmp_path}/empty.png: the mask has no pixel of foreground" in predicted(
        "image.png", "image.png", "empty.png"
    )
    assert f"{tmp_path}/small.png: mask of 5x5 for an image of 30x20" in predicted(
        "image.png", "image.png", "small.png"
    )
    assert "no pixel of class 9" in predicted("image.png", "image.png", "mask.png", "--value", "9")
    assert "got 1 images, 2 masks" in predicted("image.png", "image.png", "mask.png", "--mask", "[a, b]")
    assert "8n + 1, got 40" in predicted("image.png", "image.png", "mask.png", "--size", "40")
    assert not (tmp_path / "out").exists()


def test_importing_the_models_needs_no_command_line() -> None:
    code = "import sys, fss_models.config; print({'jsonargparse', 'kornia', 'torchmetrics'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
