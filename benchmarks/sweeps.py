"""Sizes along one axis at a time, for plots of time and memory: ``python -m benchmarks run --sweep``.

A spec has a base and its axes; along an axis one number varies and the others stay. A mask has the size of the image
that gives such a grid at stride 8.
"""

from __future__ import annotations

from typing import Any

from fss_kernels.testing import Spec


def sizes(spec: Spec) -> dict[str, dict[str, Any]]:
    """Label -> arguments of the spec's benchmark_sample, and "modes"."""
    found = {}
    for axis, values in spec.axes.items():
        for value in values:
            arguments = {**spec.base, axis: value, "modes": ("forward",)}
            if axis == "grid" and "image" in arguments:
                arguments["image"] = 8 * int(value) - 7
            found[f"{axis}={value:g}"] = arguments
    return found
