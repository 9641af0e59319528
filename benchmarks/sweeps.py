"""Sizes along one axis at a time, for plots of time and memory: ``python -m benchmarks run --sweep``.

A spec has a base and its axes; along an axis one number varies and the others stay. A mask has the size of the image
that gives such a grid at stride 8.
"""

from __future__ import annotations

from typing import Any

from fss_kernels.testing import Spec

# Released code, and what is or comes near the fastest along an axis. Left out, since slower than one of these in every
# row of every axis measured so far: argmax-gather as it is (1.4 times at least), compile(shifted) (1.1 times).
PEERS = {
    "masked_avg_pool": ("eager", "bmm", "compile(bmm)"),
    "prototype_cosine": ("cosine_similarity", "folded-bmm", "compile(folded-bmm)"),
    "dense_cosine_max": ("pfenet", "packed-foreground", "compile(argmax-gather)"),
    "dense_cosine_match": ("both-maxima", "compile(both-maxima)"),
    "hypercorrelation": ("hsnet", "cosine-bmm", "compile(hsnet)"),
    "dynamic_conv2d": ("grouped", "per-sample"),
}
# A quick run leaves out what is compiled, which takes minutes, and has the best eager form in its place.
QUICK = {**PEERS, "dense_cosine_max": ("pfenet", "argmax-gather", "packed-foreground")}


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
