"""What the launchers of hypercorrelation instantiate, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from fss_kernels.ops.hypercorrelation import triton_kernels as k
from fss_kernels.testing import TRITON_DTYPES, Variant


def variants() -> Iterator[Variant]:
    """Every kernel, for the dtypes and options that change its code."""
    for x in TRITON_DTYPES:
        for last in (False, True):
            for clamp in (True, False):
                name = f"{x}-{'last' if last else 'planes'}-{'clamp' if clamp else 'signed'}"
                pointers = {**dict.fromkeys(("x_ptr", "grad_ptr", "out_ptr"), x), "signs_ptr": "u8"}
                for layers in (1, 6) if x == "bf16" and not last else (1,):
                    lists = {"queries_ptr": (x,) * layers, "supports_ptr": (x,) * layers, "channels": layers}
                    options = {"LAYERS": layers, "QUERY_LAST": last, "SUPPORT_LAST": last, "ADD": clamp, "CLAMP": clamp}
                    tile = k.TILE if x == "fp32" else k.HALF_TILE
                    id = f"{name}-{layers}"
                    yield k.level_kernel, id, {**pointers, **lists}, {**options, "WIDEN": False, **tile}
                for query in (True, False):
                    options = {"OF_QUERY": query, "LAST": last, "ADD": clamp, "CLAMP": clamp, **k.PRODUCT_TILE}
                    yield k.product_kernel, f"{name}-{'query' if query else 'support'}", pointers, options
                options = {"WEIGHTED": clamp, "LAST": last, "ADD": clamp, "BLOCK_C": 32, "BLOCK_N": 32}
                yield k.finish_kernel, name, pointers, options
