"""What the launchers of prototype_cosine instantiate, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from fss_kernels.ops.prototype_cosine import triton_kernels as k
from fss_kernels.testing import Variant


def variants() -> Iterator[Variant]:
    """Every kernel, for the dtypes and options that change its code."""
    for x, add in (("fp32", False), ("fp32", True), ("bf16", False), ("fp16", False)):
        pointers = dict.fromkeys(("x_ptr", "w_ptr", "grad_ptr", "scores_ptr", "out_ptr"), x)
        base = {"ADD": add, "ACC": triton.language.float32}
        name = f"cosine-{x}-{'add' if add else 'clamp'}"
        for block_c, block_n in ((64, 16), (16, 64)):
            for shared in (1, 2, 4):
                tile = {**base, "PROTOTYPES": shared, "BLOCK_C": block_c, "BLOCK_N": block_n}
                yield k.scores_kernel, f"{name}-{block_c}-{shared}", pointers, tile
        for block_c, block_n in ((128, 16), (8, 128)):
            tile = {**base, "BLOCK_C": block_c, "BLOCK_N": block_n}
            yield k.grad_features_kernel, f"{name}-{block_c}", pointers, tile
        for shared in (1, 2, 4):
            tile = {**base, "PROTOTYPES": shared, "BLOCK_C": 16 if shared == 1 else 8, "BLOCK_N": 128}
            yield k.sums_kernel, f"{name}-{shared}", pointers, {**tile, "PIECE": k.PIECE}
        yield k.unit_kernel, name, pointers, {**base, "BLOCK": k.BLOCK}
        yield k.grad_prototypes_kernel, name, pointers, {**base, "BLOCK": k.BLOCK}
