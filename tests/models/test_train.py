"""Training: the same weights after being killed, in two processes, in pieces; checkpoints; what ends a run."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fss_models
from fss_models import checkpoints
from fss_models.config import Config, DataConfig, ModelConfig, OptimConfig, from_dict, to_dict
from fss_models.errors import CheckpointError, ConfigError, DataError, UserError
from fss_models.train import StepSampler, rate, train

CALM = {"channels": 16, "dilations": [1, 2], "mid_dropout": 0.0, "cls_dropout": 0.0}
NOISE = {"mid_dropout": 0.5, "cls_dropout": 0.1}
NOISY = {**CALM, **NOISE}
NETWORKS = {
    "dpcn": CALM,
    "dpnet": {"channels": 16, "bins": [3, 2], "mid_dropout": 0.0, "cls_dropout": 0.0},
    "panet": {"stage": 3},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(out: Path, options: dict[str, Any] = CALM, network: str = "dpcn", **optim: Any) -> Config:
    return Config(
        data=DataConfig("glyphs", size=33),
        model=ModelConfig(network, "tiny", options=options),
        optim=OptimConfig(**{"steps": 4, "batch": 4, "lr": 0.05, **optim}),
        out=str(out),
        device="cpu",
        save_every=100,
        log_every=1,
        tensorboard=False,
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.resolve(run))


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) if tolerance == 0 else (a[name] - b[name]).abs().max() <= tolerance, name


def launch(arguments: list[str], out: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=out, env=env, capture_output=True, text=True, timeout=240)


# A trainer that kills itself: at the start of a step, or half way through writing a file of a checkpoint.
_KILLED = """
import json, os, signal, sys
import torch
from fss_models import checkpoints, train
from fss_models.config import from_dict
config = from_dict(json.load(open(sys.argv[1])), sys.argv[1])
torch.set_num_threads(1)
advance, save, write = train._Run._advance, torch.save, checkpoints.write_weights
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
def stepping(self, *arguments):
    if str(self.step) == os.environ.get("KILL_AT_STEP"):
        kill()
    return advance(self, *arguments)
def saving(state, path):
    save(state, path)
    if str(state["step"]) == os.environ.get("KILL_IN_SAVE"):
        os.truncate(path, os.path.getsize(path) // 2)
        kill()
train._Run._advance, torch.save = stepping, saving
train.train(config)
"""


def test_killed_three_times_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(_KILLED)
    files = {}
    for name in ("straight", "killed"):
        run = dataclasses.replace(config(tmp_path / name, NOISY, steps=8, batch=2), save_every=2, resume=True, keep=2)
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(to_dict(run)))
    assert launch(["run.py", str(files["straight"])], tmp_path).returncode == 0
    folder = tmp_path / "killed" / "checkpoints"
    seed = random.randrange(1 << 32)
    print(f"seed of the kills: {seed}")
    draw = random.Random(seed)
    in_save = draw.choice((4, 6, 8))  # in the middle of a checkpoint's second file
    for at in sorted([in_save, *draw.sample([n for n in range(3, 8) if n != in_save], 2)]):
        kill = {"KILL_IN_SAVE" if at == in_save else "KILL_AT_STEP": str(at)}
        left = at - 2 if at == in_save else at // 2 * 2
        killed = launch(["run.py", str(files["killed"])], tmp_path, **kill)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert checkpoints.complete(folder)[-1].name == f"step-{left:08d}"
        assert bool(list(folder.glob(".tmp-*"))) == ("KILL_IN_SAVE" in kill)
    assert launch(["run.py", str(files["killed"])], tmp_path).returncode == 0
    assert_equal(weights(tmp_path / "killed"), weights(tmp_path / "straight"))
    states = [
        checkpoints.read_state(checkpoints.complete(tmp_path / n / "checkpoints")[-1] / "state.pt") for n in files
    ]
    for a, b in zip(states[0]["optimizer"]["state"].values(), states[1]["optimizer"]["state"].values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert torch.equal(states[0]["rng"][0][0], states[1]["rng"][0][0])
    assert not list(folder.glob(".tmp-*")) and len(checkpoints.complete(folder)) == 2
    logs = []
    for name in files:
        with open(tmp_path / name / "log.csv", newline="") as file:
            logs.append([(row["step"], row["loss"]) for row in csv.DictReader(file)])
    assert logs[0] == logs[1] and [int(s) for s, _ in logs[0]] == list(range(1, 9))


_TRAINER = """
import json, sys
from fss_models.config import from_dict
from fss_models.train import train
for path in sys.argv[1:]:
    train(from_dict(json.load(open(path)), path))
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Up to rounding; two processes and two processes, to the bit."""
    (tmp_path / "run.py").write_text(_TRAINER)
    named = [(network, processes) for network in NETWORKS for processes in ("one", "two", "again")]
    runs = {(n, p): config(tmp_path / n / p, NETWORKS[n], n, steps=3) for n, p in named}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"]
    for (network, processes), run in runs.items():
        if processes == "one":
            train(run)
        else:
            command.append(f"{network}-{processes}.json")
            (tmp_path / command[-1]).write_text(json.dumps(to_dict(run)))
    done = launch(command, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for network in NETWORKS:
        one, two, again = (weights(tmp_path / network / processes) for processes in ("one", "two", "again"))
        assert_equal(two, again)
        start = checkpoints.build_model(runs[network, "one"].model).state_dict()
        assert max((v - start[k]).abs().max() for k, v in one.items()) > 1e-3
        assert_equal(one, two, 1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_same_seed_same_numbers(tmp_path: Path, network: str) -> None:
    """The same bits for a number of threads; another number rounds differently, another seed is another run."""
    noisy = {**NETWORKS[network], **(NOISE if network != "panet" else {})}  # which has no dropout
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name in ("a", "b"):
            train(config(tmp_path / f"{name}{threads}", noisy, network, steps=2))
        assert_equal(weights(tmp_path / f"a{threads}"), weights(tmp_path / f"b{threads}"))
    assert_equal(weights(tmp_path / "a1"), weights(tmp_path / "a2"), 1e-5)
    train(dataclasses.replace(config(tmp_path / "c", noisy, network, steps=2), seed=1))
    assert max((v - weights(tmp_path / "c")[k]).abs().max() for k, v in weights(tmp_path / "a1").items()) > 1e-3


# In each of two processes: what each run said. A collective that waits for the other process fails after a minute.
_TOGETHER = """
import datetime, json, os, sys
import torch
from fss_models.config import DataConfig, ModelConfig, from_dict
from fss_models.errors import UserError
from fss_models.evaluate import EvalConfig, evaluate
from fss_models.train import train
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
rank = torch.distributed.get_rank()
told = {}
for name, config in json.load(open(sys.argv[1])).items():
    if rank == 1:
        for key, value in config.pop("second").items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
    config.pop("second", None)
    try:
        if name.startswith("evaluate"):
            data, model = DataConfig(**config.pop("data")), ModelConfig(**config.pop("model"))
            evaluate(EvalConfig(data=data, model=model, **config))
        else:
            train(from_dict(config, name))
        told[name] = "nothing"
    except UserError as error:
        told[name] = f"{type(error).__name__}: {error}"
json.dump(told, open(f"told-{rank}.json", "w"))
"""


def test_an_error_of_one_process_ends_all(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        builders.voc(tmp_path / name)
    images = tmp_path / "bad" / "VOC2012" / "JPEGImages"
    for path in images.iterdir():
        path.write_text("x")
    good, bad = (DataConfig("hsnet-pascal", str(tmp_path / name / "VOC2012"), size=33) for name in ("good", "bad"))
    train(config(tmp_path / "shared", steps=1))
    run = dataclasses.replace(config(tmp_path / "train", steps=2), data=good, model=ModelConfig("panet", "tiny"))
    resumed = dataclasses.replace(config(tmp_path / "shared", steps=2), resume=True)
    judged = {"data": vars(good), "model": vars(run.model), "episodes": 5, "seeds": [0], "device": "cpu"}
    elsewhere, nowhere = {"out": str(tmp_path / "elsewhere")}, {"data": {"root": str(tmp_path / "nowhere")}}
    runs = {
        "train": {**to_dict(run), "second": {"data": {"root": bad.root}}},
        "train without data": {**to_dict(run), "second": nowhere},
        "evaluate": {**judged, "second": {"data": {"root": bad.root}}},
        "evaluate without data": {**judged, "second": nowhere},
        "resume": {**to_dict(resumed), "second": elsewhere},
        "train again": {**to_dict(run), "second": elsewhere},
    }
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    (tmp_path / "run.py").write_text(_TOGETHER)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py", "runs.json"]
    done = launch(command, tmp_path)
    assert done.returncode == 0, done.stderr[:6000]
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    for told in (first, second):  # each names its own folder
        assert "/checkpoints: the processes would go on from the steps 1, 0; copy" in told.pop("resume")
    assert first == second and "\n" not in "".join(first.values())
    for name in ("train", "evaluate"):
        assert "draws in a row cannot be used" in first[name] and str(images) in first[name]
        assert f"{tmp_path}/nowhere: no folder JPEGImages" in first[f"{name} without data"]
    assert first["train again"] == "nothing"
    assert checkpoints.complete(tmp_path / "train" / "checkpoints")[-1].name == "step-00000002"
    assert not (tmp_path / "elsewhere").exists()


def test_options_in_tuples_resume(tmp_path: Path) -> None:
    run = config(tmp_path, {**CALM, "dilations": (1, 2), "trainable_backbone": (3, 4)}, steps=1)
    train(run)
    run = dataclasses.replace(run, resume=True, optim=dataclasses.replace(run.optim, steps=2))
    assert train(run).name == "step-00000002"


def test_broken_weights_of_the_backbone_are_named(tmp_path: Path) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        file = tmp_path / name
        file.write_bytes(b"no weights")
        with pytest.raises(ConfigError, match="model dpcn: ") as caught:
            checkpoints.build_model(ModelConfig("dpcn", "resnet50", str(file)))
        assert "\n" not in str(caught.value) and str(file.name) in str(caught.value)


def test_pieces_equal_the_whole(tmp_path: Path) -> None:
    train(config(tmp_path / "whole", steps=2))
    train(config(tmp_path / "pieces", steps=2, accumulate=4))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "pieces"), 1e-5)


def test_workers_do_not_change_the_result(tmp_path: Path) -> None:
    train(config(tmp_path / "none", NOISY, steps=2))
    some = config(tmp_path / "some", NOISY, steps=2)
    some.data.workers = 2
    train(some)
    assert_equal(weights(tmp_path / "none"), weights(tmp_path / "some"))


def test_processes_share_the_episodes_of_a_step() -> None:
    optim = OptimConfig(steps=5, batch=12, accumulate=2)
    for count in (1, 2, 3):
        each = [list(StepSampler(optim, 3, rank, count)) for rank in range(count)]
        assert all(len(pieces) == 4 == len(StepSampler(optim, 3, 0, count)) for pieces in each)
        for step in (0, 1):
            taken = sorted(i for pieces in each for piece in pieces[2 * step : 2 * step + 2] for i in piece)
            assert taken == list(range((3 + step) * 12, (4 + step) * 12))


def test_rate_warms_up_and_decays() -> None:
    optim = OptimConfig(steps=100, warmup=10, power=0.9)
    assert rate(optim, 0) == pytest.approx(0.1)
    assert rate(optim, 50) == pytest.approx(0.5**0.9)
    assert rate(dataclasses.replace(optim, warmup=0), 0) == 1.0


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_and_adamw(tmp_path: Path, amp: str) -> None:
    run = config(tmp_path, steps=3, amp=amp, optimizer="adamw", lr=1e-3, clip=1.0)
    run = dataclasses.replace(run, tensorboard=True)
    checkpoint = train(run)
    state = checkpoints.read_state(checkpoint / "state.pt")
    assert ("scale" in state["scaler"]) == (amp == "fp16")
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in weights(tmp_path).values())
    assert list((tmp_path / "tensorboard").iterdir())
    again = dataclasses.replace(run, resume=True, optim=dataclasses.replace(run.optim, steps=4))
    assert train(again).name == "step-00000004"


def test_gradients_that_stay_infinite_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fss_models.DPCN, "loss", lambda self, *episode: _nan(self))
    with pytest.raises(UserError, match=r"step 2: the gradients of 3 steps in a row are not finite"):
        train(config(tmp_path, steps=10, non_finite_limit=2))


def _nan(model: nn.Module) -> torch.Tensor:
    return sum(p.sum() for p in model.parameters()) * float("nan")  # type: ignore[return-value]


# ---- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(config(out, steps=1))
    return out


def test_checkpoint_holds_its_configuration(trained: Path) -> None:
    model, read, step = checkpoints.load_model(trained)
    assert read == config(trained, steps=1) and step == 1 and not model.training
    for path in (trained / "checkpoints", trained / "checkpoints" / "step-00000001", checkpoints.resolve(trained)):
        assert checkpoints.resolve(path) == checkpoints.resolve(trained)
    written = json.loads((trained / "config.json").read_text())
    assert from_dict(written, "config.json") == read
    assert sorted(p.name for p in checkpoints.resolve(trained).parent.iterdir()) == ["model.safetensors", "state.pt"]


def test_incomplete_checkpoints_do_not_exist(tmp_path: Path) -> None:
    for name in ("step-00000003", ".tmp-00000009-1", "step-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    (tmp_path / ".tmp-00000009-1" / "state.pt").write_bytes(b"")
    assert checkpoints.complete(tmp_path) == []
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no checkpoint here"):
        checkpoints.resolve(tmp_path)


def copy(trained: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    return checkpoints.resolve(tmp_path / "run")


def test_broken_checkpoints_are_named(trained: Path, tmp_path: Path) -> None:
    file = copy(trained, tmp_path)
    content, state = file.read_bytes(), file.with_name("state.pt")
    run = dataclasses.replace(config(tmp_path / "run", steps=2), resume=True)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a readable safetensors file"):
        checkpoints.load_model(file)
    tensors = {k: v for k, v in weights(trained).items()}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="no configuration inside"):
        checkpoints.load_model(file)
    for bad, text in (("{", "corrupted configuration"), ('{"optim": {"lr": "fast"}}', r"optim.lr cannot be 'fast'"),
                      ('{"colour": 1}', "unknown option colour"), ("[]", "must be a mapping, got list")):  # fmt: skip
        save_file(tensors, file, metadata={"config": bad, "step": "1"})
        with pytest.raises(CheckpointError, match=text) as caught:
            checkpoints.load_model(file)
        assert str(file) in str(caught.value)
    name = max(tensors)
    described = json.dumps(to_dict(config(trained)))
    for changed, text in (
        ({k: v for k, v in tensors.items() if k != name}, f"it lacks {name}"),
        ({**tensors, "foreign": tensors[name].clone()}, "it has the foreign foreign"),
        ({**tensors, name: torch.zeros(7, 7, 7)}, r"is \(7, 7, 7\) instead of"),
    ):
        save_file(changed, file, metadata={"config": described, "step": "1"})
        with pytest.raises(CheckpointError, match=rf"not a checkpoint of dpcn with tiny: .*{text}"):
            checkpoints.load_model(file)
    file.write_bytes(content)
    for bad_state in (b"", state.read_bytes()[:100]):
        state.write_bytes(bad_state)
        with pytest.raises(CheckpointError, match=r"state.pt: not a readable state"):
            train(run)
    torch.save({"step": 5}, state)
    with pytest.raises(CheckpointError, match="weights of step 1 beside a state of step 5"):
        train(run)


def test_pickled_code_is_not_run(trained: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "run-by-pickle"),)

    file = copy(trained, tmp_path)
    torch.save({"step": 1, "evil": Evil()}, file.with_name("state.pt"))
    with pytest.raises(CheckpointError, match=r"state.pt: not a readable state"):
        train(dataclasses.replace(config(tmp_path / "run", steps=2), resume=True))
    assert not (tmp_path / "run-by-pickle").exists()


def test_another_architecture_does_not_resume(trained: Path, tmp_path: Path) -> None:
    copy(trained, tmp_path)
    other = dataclasses.replace(config(tmp_path / "run"), model=ModelConfig("panet", "tiny"), resume=True)
    with pytest.raises(CheckpointError, match=r"step-00000001: a checkpoint of dpcn with tiny .* this run's panet"):
        train(other)
    with pytest.raises(ConfigError, match=r"run: has checkpoints already; say --resume true or another --out"):
        train(dataclasses.replace(other, resume=False))


@pytest.mark.parametrize("change, text", [
    ({"optim": OptimConfig(steps=0)}, "optim.steps must be at least 1, got 0"),
    ({"optim": OptimConfig(batch=3, accumulate=2)}, "optim.batch of 3 does not divide into 1 processes x 2 pieces"),
    ({"optim": OptimConfig(lr=0.0)}, "optim.lr must be above 0"),
    ({"optim": OptimConfig(clip=-1.0)}, "optim.clip must be above 0, got -1.0"),
    ({"optim": OptimConfig(momentum=-0.1)}, "optim.momentum must not be negative, got -0.1"),
    ({"data": DataConfig(workers=-1)}, "data.workers must not be negative, got -1"),
    ({"data": DataConfig(shots=0)}, "data.shots must be at least 1, got 0"),
    ({"data": DataConfig(size=64)}, r"data.size must be 8n \+ 1, got 64; near it are 57 and 65"),
    ({"data": DataConfig("nothing")}, "unknown protocol 'nothing'"),
    ({"data": DataConfig(fold=9)}, r"fold must be 0 \.\.\. 3, got 9"),
    ({"model": ModelConfig("unet")}, "model unet: "),
    ({"model": ModelConfig("dpcn", options={"depth": 3})}, "model dpcn: .*depth"),
    ({"model": ModelConfig("panet", "tiny", options={"trainable_backbone": False})}, "panet: nothing of it trains"),
    ({"model": ModelConfig("dpcn", "tiny", "nowhere.pth")}, "model dpcn: .*nowhere.pth"),
    ({"device": "abacus"}, "device 'abacus'"),
])  # fmt: skip
def test_bad_configurations(tmp_path: Path, change: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        train(dataclasses.replace(config(tmp_path), **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, option", [("dpcn", "swap_detach"), ("dpnet", "ccm")])
def test_checkpoints_that_name_an_option_of_an_older_version(tmp_path: Path, name: str, option: str) -> None:
    """The option is named, and so is the file; without the option the same weights load."""
    file = tmp_path / "model.safetensors"
    run = config(tmp_path, NETWORKS[name], name)
    model = checkpoints.build_model(run.model)
    checkpoints.write_weights(file, model, run, 1)
    loaded, _, _ = checkpoints.load_model(file)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    run.model.options = {**NETWORKS[name], option: True}
    checkpoints.write_weights(file, model, run, 1)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}: model {name}: .* has no option '{option}'"):
        checkpoints.load_model(file)


# ---- unusable files in a long run


def test_bad_files_are_counted_and_limited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    builders.voc(tmp_path)
    for k in range(3):
        (tmp_path / "VOC2012" / "JPEGImages" / f"2007_01{k}000.jpg").write_bytes(b"x")
    run = config(tmp_path / "run", steps=12)
    run.model = ModelConfig("panet", "tiny")
    run.data = DataConfig("hsnet-pascal", str(tmp_path / "VOC2012"), size=33, bad_limit=3)
    train(run)
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        counted = [int(row["bad_files"]) for row in csv.DictReader(file)]
    assert counted == sorted(counted) and counted[-1] >= 1
    said = [r.message for r in caplog.records if "replaced by another draw" in r.message]
    assert len(said) == len(set(said)) == counted[-1] and all("2007_01" in m for m in said)
    run.data.bad_limit, run.out = 0, str(tmp_path / "strict")
    with pytest.raises(DataError, match=r"1 unusable files \(data.bad_limit 0\), the last: .*2007_01\d000.jpg: not a"):
        train(run)
    (tmp_path / "VOC2012" / "SegmentationClassAug" / "2007_009000.png").write_bytes(b"x")  # found with the areas
    run.data.min_area, run.data.bad_limit, run.out, run.optim.steps = 1, 10, str(tmp_path / "areas"), 1
    train(run)
    state = checkpoints.read_state(checkpoints.complete(tmp_path / "areas" / "checkpoints")[-1] / "state.pt")
    assert any("2007_009000.png" in message for message in state["bad_files"])
