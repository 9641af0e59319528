"""Training that can be killed at any moment and goes on to the same weights, in one process or many."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from fss_models import checkpoints
from fss_models.config import Config, OptimConfig, to_dict
from fss_models.data.build import left_out, train_episodes
from fss_models.data.episodes import batches, to_batch
from fss_models.data.files import write_bytes
from fss_models.errors import CheckpointError, ConfigError, DataError, UserError
from fss_models.model import FewShotModel
from fss_models.optimisation import StepGuard, parameter_groups
from fss_models.processes import Processes, processes

_log = logging.getLogger(__name__)
_COLUMNS = ("step", "loss", "lr", "seconds", "skipped", "bad_files")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StepSampler(Sampler):
    """Which episodes this process takes: of step t those of t * batch ..., in ``accumulate`` pieces.

    All processes together take the same episodes however many they are.
    """

    def __init__(self, optim: OptimConfig, first: int, rank: int, count: int) -> None:
        self.optim, self.first, self.rank = optim, first, rank
        self.piece = optim.batch // (count * optim.accumulate)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.optim.steps):
            for a in range(self.optim.accumulate):
                start = step * self.optim.batch + (self.rank * self.optim.accumulate + a) * self.piece
                yield list(range(start, start + self.piece))

    def __len__(self) -> int:
        return (self.optim.steps - self.first) * self.optim.accumulate


class BadFiles:
    """Counts files that could not be used, says each once, and ends the run at a limit.

    Args:
        limit: so many are accepted.
        messages: those of an earlier part of the run.
    """

    def __init__(self, limit: int, messages: list[str] | None = None) -> None:
        self.limit = limit
        self.messages: dict[str, None] = dict.fromkeys(messages or [])

    def add(self, batch: list[list[str]], done: str = "replaced by another draw") -> None:
        """The ``bad`` lists of a batch, and what was done about them; DataError beyond the limit."""
        for message in (m for episode in batch for m in episode):
            if message not in self.messages:
                self.messages[message] = None
                _log.warning("%s: %s", done, message)
        self.check()

    def share(self, group: Processes) -> list[str]:
        """Makes those of all processes everyone's, so that all end the run together. Collective."""
        self.messages |= dict.fromkeys(group.union(list(self.messages)))
        self.check()
        return list(self.messages)

    def check(self) -> None:
        """DataError beyond the limit."""
        if len(self.messages) > self.limit:
            last = next(reversed(self.messages))
            raise DataError(f"{len(self.messages)} unusable files (data.bad_limit {self.limit}), the last: {last}")


class _Loss(nn.Module):
    """The model's loss as a forward, which is what DistributedDataParallel wraps."""

    def __init__(self, model: FewShotModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, query: Tensor, support: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        return self.model.loss(query, support, mask, target)


def rate(optim: OptimConfig, step: int) -> float:
    """The factor of the learning rate at a step: linear warm-up, polynomial decay.

    Example:
        >>> rate(OptimConfig(steps=10, power=1.0), 5)
        0.5
    """
    return min(1.0, (step + 1) / optim.warmup if optim.warmup else 1.0) * (1 - step / optim.steps) ** optim.power


def _optimizer(config: Config, model: FewShotModel) -> torch.optim.Optimizer:
    optim = config.optim
    groups = parameter_groups(model, optim.lr, optim.backbone_lr)
    if not groups:
        raise ConfigError(f"model {config.model.name}: nothing of it trains")
    for group in groups:
        group["base_lr"] = group["lr"]
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


class _Log:
    """log.csv, and TensorBoard where it is installed."""

    def __init__(self, config: Config, start: int) -> None:
        self.path = Path(config.out, "log.csv")
        kept: list[dict[str, str]] = []
        if start and self.path.exists():
            try:
                with open(self.path, newline="") as file:
                    rows = ({c: row.get(c) or "" for c in _COLUMNS} for row in csv.DictReader(file))
                    complete = (row for row in rows if all(row.values()))
                    kept = [row for row in complete if int(row["step"]) <= start]
            except (ValueError, csv.Error) as error:
                raise UserError(
                    f"{self.path}: not the log of a run, move it away to begin a new one ({error})"
                ) from error
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
        write_bytes(self.path, text.getvalue().encode())
        self.board: Any = None
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.board = SummaryWriter(Path(config.out, "tensorboard"), purge_step=start + 1)

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, _COLUMNS).writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            )
        if self.board is not None:
            for name in ("loss", "lr", "skipped", "bad_files"):
                self.board.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


class _Run:
    """One training run in one of its processes."""

    def __init__(self, config: Config, group: Processes) -> None:
        self.config, self.group = config, group
        config.check(group.count)
        self.folder = Path(config.out, "checkpoints")
        found = checkpoints.complete(self.folder)
        if found and not config.resume:
            raise ConfigError(f"{config.out}: has checkpoints already; say --resume true or another --out")
        optim = config.optim
        self.episodes = train_episodes(config.data, config.seed, optim.steps * optim.batch)
        torch.manual_seed(config.seed)
        self.model = checkpoints.build_model(config.model).to(group.device)
        self.optimizer = _optimizer(config, self.model)
        self.guard = StepGuard(optim.clip)
        self.scaler = torch.amp.GradScaler(group.device.type) if optim.amp == "fp16" else None
        self.bad = BadFiles(config.data.bad_limit)
        self.step, self.skipped_in_a_row = 0, 0
        self.losses: list[float] = []
        torch.manual_seed(config.seed + 1 + group.rank)  # dropout differs between processes
        if found:
            self._load(found[-1])
        self.bad.add([left_out(self.episodes)], "left out")

    # ---- state

    def _state(self) -> dict[str, Any]:
        """Everything but the weights. Collective: every process must call it."""
        generators = [torch.get_rng_state()]
        if self.group.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(self.group.device))
        return {
            "step": self.step,
            "sampler": {"seed": self.config.seed, "next_episode": self.step * self.config.optim.batch},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "guard": self.guard.state_dict(),
            "rng": [self.group.gather(state) for state in generators],
            "losses": self.losses,
            "skipped_in_a_row": self.skipped_in_a_row,
            "bad_files": self.bad.share(self.group),
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
        }

    def _load(self, checkpoint: Path) -> None:
        tensors, config, step = checkpoints.read_weights(checkpoint / checkpoints.WEIGHTS)
        state = checkpoints.read_state(checkpoint / checkpoints.STATE)
        if state["step"] != step:
            raise CheckpointError(f"{checkpoint}: weights of step {step} beside a state of step {state['step']}")
        if to_dict(config)["model"] != json.loads(json.dumps(to_dict(self.config)))["model"]:  # tuples became lists
            raise CheckpointError(
                f"{checkpoint}: a checkpoint of {config.model.name} with {config.model.backbone} "
                f"{config.model.options or ''}, not of this run's {self.config.model.name} with "
                f"{self.config.model.backbone} {self.config.model.options or ''}"
            )
        checkpoints.fill(self.model, tensors, checkpoint, config.model)
        if (config.seed, config.data, config.optim) != (self.config.seed, self.config.data, self.config.optim):
            _log.warning("%s: seed, data or optim differ from this run's: it does not go on exactly", checkpoint)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.guard.load_state_dict(state["guard"])
            states = state["rng"]
            if len(states[0]) == self.group.count:
                torch.set_rng_state(states[0][self.group.rank])
                if len(states) > 1 and self.group.device.type == "cuda":
                    torch.cuda.set_rng_state(states[1][self.group.rank], self.group.device)
            else:
                _log.warning("%s: made by %d processes, now %d: random numbers differ", checkpoint, len(states[0]),
                             self.group.count)  # fmt: skip
            self.losses = [float(loss) for loss in state["losses"]]
            self.skipped_in_a_row = int(state["skipped_in_a_row"])
            self.bad = BadFiles(self.config.data.bad_limit, state["bad_files"])
        except (KeyError, ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{checkpoint}: the state does not fit this run ({error})") from None
        self.step = step

    def _save(self) -> None:
        state = self._state()
        if self.group.first:
            checkpoints.save(self.folder, self.step, self.model, self.config, state, self.config.keep)
        self.group.barrier()

    # ---- training

    def _pieces(self) -> Iterator[dict[str, Any]]:
        sampler = StepSampler(self.config.optim, self.step, self.group.rank, self.group.count)
        pin_memory = self.group.device.type == "cuda"
        return batches(self.episodes, sampler, workers=self.config.data.workers, pin_memory=pin_memory)

    def _advance(self, module: nn.Module, pieces: Iterator[dict[str, Any]]) -> None:
        """One optimizer step."""
        optim, device = self.config.optim, self.group.device
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate(optim, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for a in range(optim.accumulate):
            with self.group.together():
                batch = next(pieces)
                self.bad.add(batch["bad"])
            last = a == optim.accumulate - 1
            alone = isinstance(module, DistributedDataParallel) and not last
            with module.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(device.type, _DTYPES.get(optim.amp), enabled=optim.amp != "no"):
                    loss = module(*to_batch(batch, device)) / optim.accumulate
                (self.scaler.scale(loss) if self.scaler else loss).backward()
            total += float(loss.detach())
        taken = self.guard.step(self.optimizer, self.scaler)
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > optim.non_finite_limit:
            raise UserError(
                f"step {self.step}: the gradients of {self.skipped_in_a_row} steps in a row are not finite "
                f"(optim.non_finite_limit); loss {total:g}, learning rate {self.optimizer.param_groups[0]['lr']:g}"
            )
        self.losses.append(total)
        self.step += 1

    def train(self) -> Path:
        """Trains to the last step; the last checkpoint."""
        config, group = self.config, self.group
        steps = [int(step) for step in group.gather(torch.tensor(self.step))]
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"{self.folder}: the processes would go on from the steps {', '.join(map(str, steps))}; "
                "copy the newest checkpoint to every machine, or use a folder that they share"
            )
        module: nn.Module = _Loss(self.model)
        if group.count > 1:
            ids = [group.device.index] if group.device.type == "cuda" else None
            module = DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)
        module.train()
        log = None
        if group.first:
            write_bytes(Path(config.out, "config.json"), (json.dumps(to_dict(config), indent=1) + "\n").encode())
            log = _Log(config, self.step)
        pieces = self._pieces()
        bar = tqdm(total=config.optim.steps, initial=self.step, desc=config.model.name, unit="step",
                   disable=None if group.first else True)  # fmt: skip
        since = time.perf_counter()
        while self.step < config.optim.steps:
            self._advance(module, pieces)
            bar.update()
            if self.step % config.log_every == 0 or self.step == config.optim.steps:
                loss = group.total(sum(self.losses) / len(self.losses)) / group.count
                bad = len(self.bad.share(group))
                self.losses = []
                now = time.perf_counter()
                bar.set_postfix(loss=f"{loss:.4f}")
                if log is not None:
                    rates = self.optimizer.param_groups[0]["lr"]
                    log.write({"step": self.step, "loss": loss, "lr": rates, "seconds": now - since,
                               "skipped": self.guard.non_finite, "bad_files": bad})  # fmt: skip
                since = now
            if self.step % config.save_every == 0 or self.step == config.optim.steps:
                self._save()
        bar.close()
        if log is not None:
            log.close()
            if self.bad.messages:
                _log.warning("%d unusable files were replaced by others", len(self.bad.messages))
        return self.folder / checkpoints.folder_name(self.step)


def train(config: Config) -> Path:
    """Trains, and returns the last checkpoint's folder. Under torchrun, one of its processes.

    Same configuration, machine and number of threads: same weights, bit for bit on a CPU, whether or not the run was
    killed and resumed in between. ``n`` processes give the weights of one with the same ``batch``, up to rounding, if
    nothing random or batch-dependent is in the model (dropout 0, GroupNorm or frozen norms).

    Raises:
        UserError: anything the user can put right, in one line: data, configuration, checkpoint, gradients that stay
            infinite.
    """
    with processes(config.device) as group:
        with group.together():
            run = _Run(config, group)
        return run.train()
