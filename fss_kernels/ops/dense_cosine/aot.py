"""What the launchers of dense_cosine instantiate, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fss_kernels.ops.dense_cosine import triton_kernels as k
from fss_kernels.testing import TRITON_DTYPES, Variant


def unit(last: bool, *operands: str) -> dict[str, Any]:
    """A stride that is 1 is a constant of the compiled kernel."""
    return {f"stride_{operand}{'c' if last else 'n'}": 1 for operand in operands}


def variants() -> Iterator[Variant]:
    """Every kernel, for the dtypes and options that change its code."""
    features = ("x_ptr", "query_ptr", "support_ptr", "other_ptr", "grad_ptr", "out_ptr", "scores_ptr")
    lists = dict.fromkeys(("before_ptr", "list_ptr", "facts_ptr", "starts_ptr"), "i32") | {"kept_ptr": "i8"}
    partial = {**lists, **dict.fromkeys(("index_ptr", "across_index_ptr", "best_index_ptr"), "i32")}
    saved = {**lists, **dict.fromkeys(("index_ptr", "order_ptr"), "i64"), "others_ptr": "i32"}
    pairs = {"index_ptr": "i64", "to_ptr": "i32", "other_ptr": "i32"}
    for x in TRITON_DTYPES:
        own = dict.fromkeys(features, x)
        for last in (False, True) if x != "fp16" else (False,):
            name = f"{x}-{'last' if last else 'planes'}"
            for mask in ("fp32", None) if last else ("u8", "fp32", None):
                options = {"MASKED": mask is not None, **unit(last, ""), **k.NORM_TILES[last]}
                yield k.norm_kernel, f"{name}-{mask}", {**own, **lists, "mask_ptr": mask or "fp32"}, options
            for precision in ("ieee", "tf32") if x == "fp32" and not last else ("ieee",):
                tile = k.TILES[precision if x == "fp32" else "half"]
                options = {"ADD": last, "PRECISION": precision, "WIDEN": False, **unit(last, "q", "s"), **tile}
                yield k.ring_kernel, f"{name}-{precision}", {**own, **lists}, options
                for match in (False, True):
                    id = f"{name}-{precision}-{'match' if match else 'max'}"
                    yield k.best_kernel, id, {**own, **partial}, {**options, "MATCH": match, "CHUNK": k.CHUNK}
            for windows in (1, 3) if x == "bf16" else (1,):
                for write in (False, True):
                    id = f"{name}-{windows}-{'write' if write else 'sum'}"
                    pointers = {**own, **saved, "windows": 2 * windows}
                    options = {"L": windows, "WRITE": write, "ADD": last}
                    tile = {**unit(last, "q", "s", "o"), **k.GATHER_TILES[last]}
                    yield k.grad_query_kernel, id, pointers, {**options, **tile}
            for write in (False, True):
                options = {"WRITE": write, "ADD": last, **unit(last, "x", "t", "o"), **k.LIST_TILE}
                yield k.grad_listed_kernel, f"{name}-{'write' if write else 'sum'}", {**own, **saved}, options
        for side in (False, True):
            options = {"OWN": side, "ADD": side, "BLOCK": k.BLOCK}
            yield k.pairs_kernel, f"{x}-{'own' if side else 'other'}", {**own, **pairs}, options
        for id, listed, zero in (("zero", False, True), ("exclude", False, False), ("support", True, False)):
            pointers = {**own, **partial, "index_ptr": "i64"}
            yield k.finish_kernel, f"{x}-{id}", pointers, {"LISTED": listed, "ZERO": zero, "BLOCK": k.FINISH}
    yield k.compact_kernel, "lists", lists, {"BLOCK": k.BLOCK}
    for id, every, exclude in (("zero", False, False), ("exclude", False, True), ("query", True, False)):
        yield k.candidates_kernel, id, lists, {"EVERY": every, "EXCLUDE": exclude, "BLOCK": k.BLOCK}
    for id, exclude in (("zero", False), ("exclude", True)):
        yield k.window_kernel, id, partial, {"EXCLUDE": exclude, **k.WINDOW_TILE}
