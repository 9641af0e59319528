"""Random calls of toy_norm."""

from __future__ import annotations

from fss_kernels._fuzz import EPS, Draw
from fss_kernels.testing import Sample


def toy_norm(d: Draw) -> Sample:
    """Of one channel little is left: the sign."""
    batch, channels = d.size(3), 1 + d.channels()
    tensors = {"features": d.features(batch, channels, *d.grid(20)), "gain": d.features(batch, channels)}
    return Sample("random", tensors, {"eps": d.of(*EPS)})
