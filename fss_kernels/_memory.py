"""The exact peak memory of a call: what its scratch memory is stated in, tested against and reported as."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def flat(result: Any) -> list[Tensor]:
    """The results of a call as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what native code writes to stderr; PyTorch's profiler announces every start and stop there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def extra_bytes(call: Callable[[], Any], warm: bool = False) -> int:
    """Peak of the memory that a call allocates, without its result: every event of PyTorch's allocator, in order.

    ``warm``: the caller has made such a call already; otherwise one comes first, which may compile.
    """
    if not warm:
        call()
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    events = sorted((e["ts"], e["args"]["Bytes"]) for e in trace if e.get("name") == "[memory]")
    running = np.cumsum([0, *(size for _, size in events)])
    return int(running.max()) - nbytes(flat(result))
