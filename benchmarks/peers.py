"""Finds the peers of an op, which its folder lists in ``peers.py``, and makes of each what is called and timed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fss_kernels import testing
from fss_kernels.testing import Peer

Function = Callable[..., Any]

# How peers are compiled. A dry run of the GPU stages only traces, with the backend "aot_eager".
COMPILE: dict[str, Any] = {"dynamic": False}
# The mode "max-autotune-no-cudagraphs", which leaves no room for an option, without its table a product on stderr.
MAX_AUTOTUNE = {"max_autotune": True, "coordinate_descent_tuning": True, "autotune_num_choices_displayed": 0}


def compiled(function: Function, **options: Any) -> Function:
    """The function under torch.compile."""
    return torch.compile(function, **{**options, **COMPILE})


def autotuned(function: Function) -> Function:
    """The function under torch.compile, which times several codes for every matrix product."""
    return compiled(function) if "backend" in COMPILE else compiled(function, options=MAX_AUTOTUNE)


FORMS: dict[str, Callable[[Function], Function]] = {
    "eager": lambda function: function,
    "compile": compiled,
    "max-autotune": autotuned,
}


def build(peer: Peer) -> Function:
    """What is called in place of the op."""
    if peer.form not in FORMS:
        raise ValueError(f"peer {peer.name}: form must be one of {', '.join(FORMS)}, got {peer.form!r}")
    whole = peer.function if peer.part is None else functools.partial(peer.function, compiled(peer.part))
    return FORMS[peer.form](whole)


def version(peer: Peer) -> str:
    """The version of what a peer needs; ImportError where that is missing, or a GPU."""
    try:
        found = importlib.import_module(peer.module)
    except ImportError as error:
        hint = f"; pip install '.[{peer.extra}]'" if peer.extra else ""
        raise ImportError(f"{error}{hint}") from None
    if peer.gpu_only and not torch.cuda.is_available():
        raise ImportError(f"{peer.module} {found.__version__} does this on a GPU only, and PyTorch sees none")
    return f"{peer.module} {found.__version__}"


def of(op: str) -> tuple[Peer, ...]:
    """The peers of an op: none where its folder has no ``peers.py``, or where the name is no op's."""
    specs = testing.specs()
    if op not in specs:
        return ()
    module = f"fss_kernels.ops.{specs[op].op.folder}.peers"
    if importlib.util.find_spec(module) is None:
        return ()
    return tuple(importlib.import_module(module).PEERS.get(op, ()))


def resolve(op: str) -> tuple[list[Peer], list[dict[str, Any]]]:
    """The peers of an op that can run here, and a record of every one: version, or why it is missing."""
    usable, records = [], []
    for p in of(op):
        record = {name: getattr(p, name) for name in ("name", "optional", "cannot", "released")}
        record |= {"op": op, "version": None, "error": None}
        try:
            record["version"] = version(p)
            usable.append(p)
        except ImportError as error:
            record["error"] = str(error)
        records.append(record)
    return usable, records


def chosen(usable: Iterable[Peer], quick: bool, sweep: bool) -> list[Peer]:
    """Those of an op's peers that a run on a CPU measures; compiling takes minutes, and a quick run none of them."""
    found = [p for p in usable if p.on_cpu and not (quick and (p.form != "eager" or p.part is not None))]
    run = "quick" if quick else "sweep" if sweep else ""
    return [p for p in found if run in p.runs] or found
