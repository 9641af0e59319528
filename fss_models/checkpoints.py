"""Checkpoints that are whole or not there: a folder per step, renamed into place at once."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fss_models.config import Config, ModelConfig, from_dict, to_dict
from fss_models.errors import CheckpointError, ConfigError
from fss_models.model import FewShotModel

WEIGHTS, STATE = "model.safetensors", "state.pt"
_NAME = re.compile(r"step-(\d{8})$")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_name(step: int) -> str:
    """Of the checkpoint of a step."""
    return f"step-{step:08d}"


def complete(folder: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = []
    for path in Path(folder).glob("step-*"):
        match = _NAME.match(path.name)
        if match and (path / WEIGHTS).is_file() and (path / STATE).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def save(folder: str | Path, step: int, model: nn.Module, config: Config, state: dict[str, Any], keep: int) -> Path:
    """Writes <folder>/step-<step> and removes all but the newest ``keep`` checkpoints.

    Both files are written and flushed under a temporary name, then the folder is renamed: whoever is killed at any
    moment leaves the checkpoints before it complete, and at most a temporary folder that the next save removes.

    Args:
        folder: of the run's checkpoints.
        step: the optimizer steps done.
        model: its weights go to ``model.safetensors``, with the configuration and the step in the metadata.
        config: of the run.
        state: tensors, numbers, strings, lists and dictionaries; goes to ``state.pt``.
        keep: at least 1.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder / f".tmp-{step:08d}-{os.getpid()}"
    temporary.mkdir()
    write_weights(temporary / WEIGHTS, model, config, step)
    torch.save(state, temporary / STATE)
    for path in (temporary / WEIGHTS, temporary / STATE, temporary):
        _flush(path)
    final = folder / folder_name(step)
    discard(final)
    os.replace(temporary, final)
    _flush(folder)
    for old in complete(folder)[:-keep]:
        discard(old)
    return final


def discard(path: Path) -> None:
    """Removes a checkpoint so that it is never seen in part."""
    if path.exists():
        trash = path.with_name(f".tmp-old-{path.name}-{os.getpid()}")
        os.replace(path, trash)
        shutil.rmtree(trash)


def write_weights(path: Path, model: nn.Module, config: Config, step: int) -> None:
    """Weights as safetensors with the configuration inside; every tensor on the CPU and contiguous."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, path, metadata={"config": json.dumps(to_dict(config)), "step": str(step), "format": "pt"})


def resolve(path: str | Path) -> Path:
    """The weights that a path stands for: a file, a checkpoint's folder, or a run's folder (its newest checkpoint)."""
    given = Path(path)
    if given.is_file():
        return given
    if (given / WEIGHTS).is_file():
        return given / WEIGHTS
    for folder in (given / "checkpoints", given):
        if found := complete(folder):
            return found[-1] / WEIGHTS
    raise CheckpointError(f"{given}: no checkpoint here")


def read_config(path: Path) -> tuple[Config, int]:
    """(configuration, step) of a file that `write_weights` wrote; CheckpointError names the file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    if "config" not in metadata:
        raise CheckpointError(f"{path}: no configuration inside; it was not written by fss-models train")
    try:
        config = from_dict(json.loads(metadata["config"]), str(path))
        return config, int(metadata.get("step", 0))
    except (ConfigError, ValueError, RecursionError) as error:
        reason = error if isinstance(error, ConfigError) else f"{path}: {error}"
        raise CheckpointError(f"corrupted configuration: {reason}") from None


def read_weights(path: Path) -> tuple[dict[str, Tensor], Config, int]:
    """(tensors, configuration, step) of a file that `write_weights` wrote; CheckpointError names the file."""
    config, step = read_config(path)
    try:
        return load_file(path), config, step
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def read_state(path: Path) -> dict[str, Any]:
    """The second file of a checkpoint; nothing but tensors and plain values is ever unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its readers raise: RuntimeError, EOFError, UnpicklingError ...
        raise CheckpointError(f"{path}: not a readable state ({type(error).__name__})") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise CheckpointError(f"{path}: not the state of a training run")
    return state


def check_fit(model: nn.Module, tensors: dict[str, Tensor], where: Path, described: ModelConfig) -> None:
    """CheckpointError for weights of another architecture."""
    own = model.state_dict()
    name = f"{described.name} with {described.backbone}"
    for kind, keys in (("lacks", own.keys() - tensors.keys()), ("has the foreign", tensors.keys() - own.keys())):
        if keys:
            raise CheckpointError(f"{where}: not a checkpoint of {name}: it {kind} {min(keys)} (of {len(keys)})")
    for key, value in own.items():
        if value.shape != tensors[key].shape:
            shapes = f"{tuple(tensors[key].shape)} instead of {tuple(value.shape)}"
            raise CheckpointError(f"{where}: not a checkpoint of {name}: {key} is {shapes}")


def fill(model: nn.Module, tensors: dict[str, Tensor], where: Path, described: ModelConfig) -> None:
    """Loads weights into a model; CheckpointError if they are those of another architecture."""
    check_fit(model, tensors, where, described)
    model.load_state_dict(tensors)


def build_model(config: ModelConfig) -> FewShotModel:
    """The network of a configuration; ConfigError for anything its constructor refuses."""
    import fss_models

    try:
        return fss_models.build(config.name, backbone=config.backbone, weights=config.weights or None, **config.options)
    except Exception as error:  # options of a wrong kind or size: whatever the layers raise
        raise ConfigError(f"model {config.name}: {' '.join(str(error).split())}") from None


def load_model(path: str | Path) -> tuple[FewShotModel, Config, int]:
    """The network of a checkpoint, in evaluation mode, with its configuration and step."""
    import dataclasses

    file = resolve(path)
    tensors, config, step = read_weights(file)
    described = dataclasses.replace(config.model, weights="")
    try:
        with torch.device("meta"):  # shapes only: no more memory is taken than the file has weights for
            shapes = build_model(described)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    check_fit(shapes, tensors, file, described)
    model = build_model(described)
    fill(model, tensors, file, config.model)
    return model.eval(), config, step
