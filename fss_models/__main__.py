"""``fss-models train | evaluate | predict | demo | prepare-coco``."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from fss_models.errors import UserError


def _train(config: Any) -> int:
    from fss_models.train import train

    print(f"{train(config)}")
    return 0


def _evaluate(config: Any) -> int:
    import os

    from fss_models.evaluate import evaluate

    result = evaluate(config)
    if os.environ.get("RANK", "0") == "0":
        summary: dict[str, Any] = {
            name: {k: round(v, 2) for k, v in result[name].items()} for name in ("miou", "fb_iou")
        }
        summary["bad_files"] = len(result["bad_files"])
        print(json.dumps(summary))
    return 0


def _predict(config: Any) -> int:
    from fss_models.predict import predict

    for path in predict(config):
        print(path)
    return 0


def _demo(config: Any) -> int:
    from fss_models.demo import demo

    return demo(config)


def _prepare_coco(config: Any) -> int:
    from fss_models.data.coco import prepare_coco

    print(json.dumps(prepare_coco(config.annotations, config.root, crowd=config.crowd)))
    return 0


def _commands() -> dict[str, tuple[Callable[[Any], int], Any]]:
    from fss_models.config import Config
    from fss_models.data.coco import CocoConfig
    from fss_models.demo import DemoConfig
    from fss_models.evaluate import EvalConfig
    from fss_models.predict import PredictConfig

    return {
        "train": (_train, Config),
        "evaluate": (_evaluate, EvalConfig),
        "predict": (_predict, PredictConfig),
        "demo": (_demo, DemoConfig),
        "prepare-coco": (_prepare_coco, CocoConfig),
    }


def _load(text: str) -> Any:
    """YAML of plain values. jsonargparse would import what a ``class_path`` names, and make one."""
    import yaml
    from jsonargparse import get_loader

    value = get_loader("yaml")(text)
    seen: set[int] = set()
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, (dict, list)):
            if id(part) in seen:
                raise yaml.YAMLError("aliases are not accepted")
            seen.add(id(part))
            if isinstance(part, dict) and "class_path" in part:
                raise yaml.YAMLError("class_path is not accepted")
            rest += part.values() if isinstance(part, dict) else part
    return value


def _config_file(arguments: list[str]) -> str:
    """What ``--config`` names, for messages that do not."""
    for i, argument in enumerate(arguments):
        if argument == "--config":
            return arguments[i + 1] if i + 1 < len(arguments) else ""
        if argument.startswith("--config="):
            return argument.partition("=")[2]
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Entry point: every command is a dataclass, from YAML (``--config``) and the command line. The exit code."""
    try:
        import yaml
        from jsonargparse import ArgumentError, ArgumentParser, set_loader
    except ImportError:
        print("fss-models needs jsonargparse: pip install 'fss-kernels[models]'", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(levelname)s %(message)s")
    functions = _commands()
    set_loader("plain", _load, (yaml.YAMLError,))
    options: dict[str, Any] = {"exit_on_error": False, "parser_mode": "plain"}
    parser = ArgumentParser(prog="fss-models", description=__doc__, **options)
    subcommands = parser.add_subcommands()
    for name, (_, kind) in functions.items():
        command = ArgumentParser(description=(kind.__doc__ or "").partition("\n")[0], **options)
        command.add_argument("--config", action="config", help="YAML file of these options")
        command.add_class_arguments(kind, as_group=False)
        subcommands.add_subcommand(name, command)
    try:
        chosen = parser.parse_args(arguments)
        name = chosen.subcommand
        if name == "evaluate" and chosen[name].checkpoint and chosen[name].data is not None:
            from fss_models import checkpoints

            trained, _ = checkpoints.read_config(checkpoints.resolve(chosen[name].checkpoint))
            # what is not given stays as in the training
            parser.set_defaults({"evaluate.data": dataclasses.replace(trained.data, cache="")})
            chosen = parser.parse_args(arguments)
        config = parser.instantiate(chosen)[name]
        config.pop("config", None)
        function, kind = functions[name]
        return function(kind(**config.as_dict()) if not isinstance(config, kind) else config)
    except (ArgumentError, UserError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        given = _config_file(sys.argv[1:] if arguments is None else arguments)
        if not isinstance(error, UserError) and given and given not in text:
            text = f"{given}: {text}"
        print(f"fss-models: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
