"""Random calls of prototype_cosine."""

from __future__ import annotations

from fss_kernels._fuzz import Draw
from fss_kernels.testing import Sample


def prototype_cosine(d: Draw) -> Sample:
    """Prototypes of every sample, or shared by all."""
    batch, channels, count = d.size(3), d.channels(), d.of(1, 2, 3, 5, 12, 0)
    sets = d.of((batch,), ())
    tensors = {
        "features": d.features(batch, channels, *d.grid(20)),
        "prototypes": d.features(*sets, count, channels, channels=-1),
    }
    options = {"scale": d.of(1.0, 20.0, -2.5, 0.0), **d.normalisation(None, channels)}
    return Sample("random", tensors, options, shared=() if sets else ("prototypes",))
