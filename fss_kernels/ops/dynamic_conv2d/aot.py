"""What the launchers of dynamic_conv2d instantiate, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fss_kernels.ops.dynamic_conv2d import triton_kernels as k
from fss_kernels.testing import TRITON_DTYPES, Variant


def variants() -> Iterator[Variant]:
    """DPCN's three kernels, apart and merged; 9 x 9, the most taps there are; what a second launch adds."""
    dpcn, nine = [(5, 1), (1, 5), (5, 5)], [(9, 9)]
    cases = [(x, "dpcn", dpcn, False, 0) for x in TRITON_DTYPES]
    cases += [("bf16", "dpcn", dpcn, True, 0), ("bf16", "nine", nine, False, 0)]
    cases += [("bf16", "fourth", [*dpcn, (1, 3)], merge, 1) for merge in (False, True)]
    for x, name, sizes, merge, launch in cases:
        plan = k._Plan([torch.empty(1, 1, *size) for size in sizes], merge)
        id = f"{x}-{name}{'-merged' * merge}"
        half = {f"k{i}_ptr": x for i in range(3)} | {"x_ptr": x, "grad_ptr": x, "out_ptr": x}
        _, _, options = list(plan.branches(range(len(sizes))))[launch]
        add = {"ADD": launch > 0}
        yield k.pack_kernel, id, half, {**options, **add, "BLOCK": k.ROWS}
        yield k.unpack_kernel, id, half, {**options, "BLOCK": k.ROWS}
        groups = [masks for _, _, masks in plan.groups(range(len(plan.outputs)))]
        if launch == len(groups):
            continue
        layouts = list(k.TILES)[: 1 if name == "nine" else None]  # they take minutes
        for layout in layouts:
            block_c, block_n = k.TILES[layout]
            tile = {**groups[launch], "BLOCK_C": block_c, "BLOCK_N": block_n}
            yield k.conv_kernel, f"{id}-{layout}", half, tile
            yield k.grad_x_kernel, f"{id}-{layout}", half, {**tile, **add}
            block_c, block_n = k.SUM_TILES[layout]
            tile = {**groups[launch], "BLOCK_C": block_c, "BLOCK_N": block_n}
            yield k.grad_taps_kernel, f"{id}-{layout}", half, tile
