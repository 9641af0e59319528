"""What the launchers of masked_avg_pool instantiate, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from fss_kernels.ops.masked_avg_pool import triton_kernels as k
from fss_kernels.testing import TRITON_DTYPES, Variant


def variants() -> Iterator[Variant]:
    """Every kernel, for the dtypes and options that change its code."""
    acc = {"ACC": triton.language.float32}
    modes = {"bilinear": (False, True), "corners-off": (False, False), "nearest": (True, True)}
    for x in TRITON_DTYPES:
        pooled = {"x_ptr": x, "grad_ptr": x, "pooled_ptr": x, "out_ptr": x}
        for masks in (1, 2, 4):
            block_c = 16 if masks == 1 else 8
            tile = {**acc, "MASKS": masks, "BLOCK_C": block_c, "BLOCK_N": 128, "PIECE": k.PIECE}
            yield k.pool_kernel, f"{x}-{masks}", pooled, tile
            yield k.moments_kernel, f"{x}-{masks}", pooled, {**acc, "MASKS": masks, "BLOCK_C": 16, "BLOCK_N": 64}
        yield k.finish_pool_kernel, x, pooled, {**acc, "BLOCK": 256}
        for block_c, block_n in ((8, 256), (128, 16)):
            yield k.grad_features_kernel, f"{x}-{block_c}", pooled, {**acc, "BLOCK_C": block_c, "BLOCK_N": block_n}
    yield k.area_kernel, "fp32", {}, {**acc, "BLOCK": 1024}
    yield k.grad_weights_kernel, "fp32", {}, {"BLOCK": 1024}
    for name, (nearest, align) in modes.items():
        options = {**acc, "NEAREST": nearest, "ALIGN": align, "BLOCK": k.BLOCK}
        for source, target in (("u8", "fp32"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")):
            pointers = {"source_ptr": source, "target_ptr": target}
            yield k.resize_kernel, f"{name}-{source}-{target}", pointers, options
            yield k.transposed_axis_kernel, f"{name}-{source}-{target}", pointers, options
