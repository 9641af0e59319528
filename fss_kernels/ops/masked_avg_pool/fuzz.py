"""Random calls of masked_avg_pool."""

from __future__ import annotations

from fss_kernels._fuzz import Draw
from fss_kernels.testing import Sample


def masked_avg_pool(d: Draw) -> Sample:
    """Masks on the grid of the features or another; none, one or several a sample."""
    batch, channels, grid = d.size(3), d.channels(), d.grid(20)
    mask_grid = d.of(grid, d.grid(24))
    masks = d.of((), (1,), (2,), (5,))
    tensors = {"features": d.features(batch, channels, *grid), "mask": d.mask(batch, *masks, *mask_grid)}
    resize, align_corners = d.of("bilinear", "nearest", "adjoint"), d.of(True, False)
    eps = d.of(0.0, 1e-5, 5e-4, 0.25)
    return Sample("random", tensors, {"eps": eps, "resize": resize, "align_corners": align_corners})
