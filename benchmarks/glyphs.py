"""``python -m benchmarks.glyphs run | table | curves``: do the modules of DPCN help on characters never seen?

Glyph fold 0, one network for each method, trained with one shot and judged with one and five on the 16 unseen
characters. Every method trains the same tiny backbone end to end for the same steps; its learning rate is the one of
`RATES` that does best on new episodes of its *training* characters with seed 0, and then serves all seeds. One JSON
file a run in benchmarks/results/glyphs; what is there is not run again, and a run that was killed goes on.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from benchmarks import environment
from fss_models import checkpoints
from fss_models.config import Config, DataConfig, ModelConfig, OptimConfig, to_dict
from fss_models.data.build import eval_episodes
from fss_models.data.glyphs import VERSION
from fss_models.demo import SMALL
from fss_models.evaluate import measure
from fss_models.train import train

RESULTS = environment.RESULTS / "glyphs"
RUNS = environment.ROOT / "build" / "glyphs"
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)
STEPS, BATCH, SIZE = 1000, 8, 65
EPISODES = 500
SHOTS = (1, 5)
_CHOICE_SEED, _TEST_SEED = 1000, 2000  # of episodes; training uses the run's own seed


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: how it is called there, the network, whether it is trained."""

    title: str
    model: ModelConfig
    trained: bool = True


def _dpcn(**options: Any) -> ModelConfig:
    return ModelConfig("dpcn", "tiny", options={**SMALL["dpcn"], "cls_dropout": 0.0, **options})


METHODS = {
    "panet-untrained": Method("prototype cosine, untrained", ModelConfig("panet", "tiny"), trained=False),
    "panet": Method("prototype cosine (PANet), trained", ModelConfig("panet", "tiny")),
    "dpnet": Method("DPNet", ModelConfig("dpnet", "tiny", options={**SMALL["dpnet"], "cls_dropout": 0.0})),
    "dpcn": Method("DPCN", _dpcn()),
    "dpcn-no-sam": Method("DPCN without SAM", _dpcn(sam=False, prior=False)),
    "dpcn-no-ffm": Method("DPCN without FFM", _dpcn(ffm=False)),
    "dpcn-no-dcm": Method("DPCN without DCM", _dpcn(dcm=False)),
}


def _name(method: str, rate: float, seed: int) -> str:
    return f"{method}-lr{rate:g}-seed{seed}" if METHODS[method].trained else f"{method}-seed{seed}"


def _config(method: str, rate: float, seed: int) -> Config:
    return Config(
        data=DataConfig("glyphs", size=SIZE),
        model=METHODS[method].model,
        optim=OptimConfig("adamw", lr=rate, weight_decay=1e-4, warmup=50, clip=1.0, steps=STEPS, batch=BATCH),
        out=str(RUNS / f"v{VERSION}" / _name(method, rate, seed)),
        seed=seed,
        device="cpu",
        save_every=max(1, STEPS // 6),
        log_every=25,
        tensorboard=False,
        resume=True,
    )


def _settings(config: Config) -> dict[str, Any]:
    """What a result depends on, as it is after a way through JSON: everything but where the run lies."""
    return json.loads(json.dumps({**to_dict(config), "out": Path(config.out).name, "episodes": EPISODES,
                                  "glyphs": VERSION}))  # fmt: skip


def _read(method: str, rate: float, seed: int) -> dict[str, Any] | None:
    """The result of a run with today's settings, if there is one."""
    path = RESULTS / f"{_name(method, rate, seed)}.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result is not None and result["config"] == _settings(_config(method, rate, seed)) else None


def chosen_rate(method: str) -> float | None:
    """The learning rate that did best on training characters with seed 0; None while a run is missing."""
    if not METHODS[method].trained:
        return RATES[0]
    found = {rate: _read(method, rate, 0) for rate in RATES}
    scores = {rate: result["training_classes"]["miou"] for rate, result in found.items() if result is not None}
    return max(scores, key=lambda rate: scores[rate]) if len(scores) == len(RATES) else None


def pending(only: list[str], seeds: list[int]) -> list[tuple[str, float, int]]:
    """Runs that can be done now and are not: first all rates with seed 0, then the chosen one with the others."""
    runs = []
    for method in only:
        trained, rate = METHODS[method].trained, chosen_rate(method)
        for seed in seeds:
            rates = RATES if trained and seed == 0 else (rate,) if rate is not None else ()
            runs += [(method, r, seed) for r in rates if _read(method, r, seed) is None]
    return sorted(runs, key=lambda run: run[2])


def one(method: str, rate: float, seed: int) -> dict[str, Any]:
    """Trains and evaluates one network; its result, which is also written."""
    name, config = _name(method, rate, seed), _config(method, rate, seed)
    kept = Path(config.out, "config.json")
    if kept.exists() and json.loads(kept.read_text()) != json.loads(json.dumps(to_dict(config))):
        shutil.rmtree(config.out)  # a run with other settings
    curve: list[tuple[int, float]] = []
    training = 0.0
    if METHODS[method].trained:
        model, _, _ = checkpoints.load_model(train(config))
        with open(Path(config.out, "log.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        curve = [(int(row["step"]), float(row["loss"])) for row in rows]
        training = sum(float(row["seconds"]) for row in rows)
    else:
        torch.manual_seed(seed)
        model = checkpoints.build_model(config.model).eval()
    data, started = config.data, time.perf_counter()
    choice = measure(model, eval_episodes(data, _CHOICE_SEED, EPISODES, "train"), batch=8, label=f"{name} choice")
    tests = {}
    for shots in SHOTS:
        test = eval_episodes(dataclasses.replace(data, shots=shots), _TEST_SEED, EPISODES)
        tests[str(shots)] = measure(model, test, batch=8, label=f"{name} {shots} shots").result
    result = {
        **environment.environment(),
        "method": method,
        "rate": rate if METHODS[method].trained else None,
        "seed": seed,
        "config": _settings(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_classes": {k: choice.result[k] for k in ("miou", "fb_iou")},
        "shots": tests,
        "curve": curve,
        "seconds": {"train": training, "evaluate": time.perf_counter() - started},
    }
    environment.write_json(RESULTS / f"{name}.json", result)
    return result


def run(only: list[str] | None = None, seed: list[int] | None = None, limit: int | None = None) -> int:
    """Does the runs that are missing.

    Args:
        only: methods; all of them when none is given.
        seed: seeds; all of them when none is given. The others wait until seed 0 has chosen the learning rate.
        limit: stop after so many runs.
    """
    methods = only or list(METHODS)
    if unknown := set(methods) - set(METHODS):
        print(f"run: unknown methods {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
        return 2
    done = 0
    while (limit is None or done < limit) and (runs := pending(methods, seed or list(SEEDS))):
        result = one(*runs[0])
        done += 1
        scores = ", ".join(f"{s} shots {result['shots'][str(s)]['miou']:.1f}" for s in SHOTS)
        seconds = result["seconds"]["train"] + result["seconds"]["evaluate"]
        print(
            f"{_name(*runs[0])}: {scores}, training classes {result['training_classes']['miou']:.1f}, {seconds:.0f} s"
        )
    print(f"{done} runs done, {len(pending(methods, seed or list(SEEDS)))} can be done next")
    return 0


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else "none"


def rows() -> list[dict[str, Any]]:
    """The methods with their results over the seeds at the chosen learning rate, as far as they are there."""
    found = []
    for method, described in METHODS.items():
        rate = chosen_rate(method)
        results = [r for seed in SEEDS if rate is not None and (r := _read(method, rate, seed)) is not None]
        if results:
            values = {(s, k): [r["shots"][str(s)][k] for r in results] for s in SHOTS for k in ("miou", "fb_iou")}
            found.append({"method": method, "title": described.title, "rate": rate if described.trained else None,
                          "seeds": len(results), "parameters": results[0]["parameters"], "values": values,
                          "curves": [r["curve"] for r in results],
                          "environments": [r["environment"] for r in results]})  # fmt: skip
    return found


def caption() -> str:
    """Where and when the networks of the table were trained."""
    found: dict[str, dict[str, None]] = {}
    for env in (env for row in rows() for env in row["environments"]):
        where = f"{env['cpu']}, threads {env['threads']}, PyTorch {env['torch']}"
        tree = "" if env["clean"] else " (with local changes)"
        found.setdefault(where, {})[f"{env['date'][:10]}, commit {(env['commit'] or 'unknown')[:10]}{tree}"] = None
    return "; ".join(f"{where}: {'; '.join(sorted(whens))}" for where, whens in found.items())


def table() -> int:
    """Prints the results as a Markdown table: mean ± standard deviation over the seeds, in percent."""
    print(markdown())
    return 0


HEADER = ("method", "mIoU, 1 shot", "FB-IoU, 1 shot", "mIoU, 5 shots", "FB-IoU, 5 shots", "rate", "parameters", "seeds")


def cells() -> list[list[str]]:
    """The rows of the table below `HEADER`, as text; none without results."""
    lines = []
    for row in rows():
        scores = [_cell(row["values"][s, k]) for s in SHOTS for k in ("miou", "fb_iou")]
        rate = f"{row['rate']:g}" if row["rate"] is not None else "none"
        lines.append([row["title"], *scores, rate, f"{row['parameters']:,}", str(row["seeds"])])
    return lines


def markdown() -> str:
    """The table of `table` below its caption; empty without results."""
    if not (body := cells()):
        return ""
    lines = (HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *body)
    return "\n".join([f"{caption()}.", "", *(f"| {' | '.join(line)} |" for line in lines)])


def svg() -> str:
    """Training loss over steps, one line a method (mean over its seeds), as inline SVG; empty without results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows() if row["curves"][0]]
    if not drawn:
        return ""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "glyphs", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
        for row in drawn:
            steps = [step for step, _ in row["curves"][0]]
            losses = [statistics.mean(loss for _, loss in points) for points in zip(*row["curves"], strict=True)]
            axes.plot(steps, losses, label=row["title"], linewidth=1.2)
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        figure.legend(loc="outside right upper", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def curves(out: str = "report/glyphs.svg") -> int:
    """Draws the training losses.

    Args:
        out: file to write.
    """
    environment.write_text(out, svg())
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(auto_cli([run, table, curves]))
