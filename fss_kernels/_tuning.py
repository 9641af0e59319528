"""Choices that come from measurements on a GPU, shipped as JSON: the same bits in every run, nothing tuned at run time.

``configs/backends.json`` maps a GPU's name to an op to ``[[largest number of feature elements, backend], ...]`` in
ascending order; null as the largest number stands for the rest. An op or a GPU that nobody has measured is not in it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path


@functools.cache
def _backends() -> dict[str, dict[str, list[tuple[int | None, str]]]]:
    return json.loads(Path(__file__).with_name("configs").joinpath("backends.json").read_text())


@functools.lru_cache(maxsize=1024)
def backend(op: str, gpu: str, elements: int) -> str | None:
    """The backend measured to be the fastest for features of this size on this GPU, or None."""
    rows = _backends().get(gpu, {}).get(op, [])
    return next((name for most, name in rows if most is None or elements <= most), None)
