"""Random calls of hypercorrelation."""

from __future__ import annotations

from fss_kernels._fuzz import Draw
from fss_kernels.testing import Sample


def hypercorrelation(d: Draw) -> Sample:
    """One layer, or the layers of one or two levels."""
    batch, levels = d.size(2), d.of(None, (1,), (2,), (1, 2), (3,))
    queries, supports = [], []
    for layers in levels or (1,):
        grid, support_grid = d.grid(7), d.grid(9)
        for _ in range(layers):
            channels = d.channels()
            queries.append(d.features(batch, channels, *grid))
            supports.append(d.features(batch, channels, *support_grid))
    tensors = {f"query{i or ''}": q for i, q in enumerate(queries)}
    tensors |= {f"support{i or ''}": s for i, s in enumerate(supports)}
    if d.of(True, False):
        tensors["mask"] = d.mask(batch, *d.of(tuple(supports[0].shape[2:]), d.grid(12)))
    options = d.normalisation(tensors.get("mask"), *(q.shape[1] for q in queries))
    return Sample("random", tensors, {**options, "clamp": d.of(True, False), **({"levels": levels} if levels else {})})
