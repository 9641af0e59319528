"""Peers of prototype_cosine: PANet's one cosine a prototype, which its descendants run, and rewrites."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels.testing import Peer


def _cosine_similarity(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    """PANet and its descendants: one call a prototype, each of which normalises the features again."""
    maps = [F.cosine_similarity(features, p[..., None, None], dim=1) for p in prototypes.unbind(1)]
    return scale * torch.stack(maps, 1)


def _cosine_broadcast(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    """The same as one call that broadcasts features against all prototypes."""
    return scale * F.cosine_similarity(features[:, None], prototypes[..., None, None], dim=2)


def _normalised_einsum(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("bchw,bpc->bphw", F.normalize(features, dim=1), F.normalize(prototypes, dim=2))


def _folded_norms(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    """A matrix product of the features as they are; their norms divide the few maps instead of the many channels."""
    x = features.flatten(2)
    dots = torch.bmm(F.normalize(prototypes, dim=2), x)
    maps = scale * dots * x.square().sum(1, keepdim=True).clamp_min(1e-16).rsqrt()
    return maps.unflatten(2, features.shape[2:])


_SIMILARITY = Peer(
    "cosine_similarity",
    _cosine_similarity,
    "reads and writes the features several times for every prototype",
    released=True,
    runs=("quick", "sweep"),
)
_BROADCAST = Peer(
    "cosine_broadcast", _cosine_broadcast, "holds a product of features and prototypes for every prototype"
)
_EINSUM = Peer("normalize+einsum", _normalised_einsum, "writes a normalised copy of the features")
_FOLDED = Peer(
    "folded-bmm",
    _folded_norms,
    "reads the features twice, has no add mode and no rule for zero vectors",
    runs=("quick", "sweep"),
)
PEERS = {
    "prototype_cosine": (
        _SIMILARITY,
        _SIMILARITY.compiled(),
        _BROADCAST,
        _BROADCAST.compiled(),
        _EINSUM,
        _EINSUM.compiled(),
        _FOLDED,
        _FOLDED.compiled(runs=("sweep",)),
        _FOLDED.autotuned(),
    )
}
