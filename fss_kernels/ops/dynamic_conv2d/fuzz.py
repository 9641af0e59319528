"""Random calls of dynamic_conv2d."""

from __future__ import annotations

from fss_kernels._fuzz import Draw
from fss_kernels.testing import Sample


def dynamic_conv2d(d: Draw) -> Sample:
    """Up to four kernels, apart or merged."""
    batch, channels, grid = d.size(3), d.channels(), d.grid(24)
    tensors = {"x": d.features(batch, channels, *grid)}
    tensors |= {f"kernel{i}": d.features(batch, channels, *size) for i, size in enumerate(d.odd_sizes(9, most=4))}
    return Sample("random", tensors, {"merge": d.of(False, True)})
