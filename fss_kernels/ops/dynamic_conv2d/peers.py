"""Peers of dynamic_conv2d: kernels of a sample folded into groups, as CondConv and its followers do, and rewrites.

DPCN has no public code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fss_kernels.testing import Peer


def _join(outputs: list[Tensor], merge: bool) -> Tensor:
    return torch.stack(outputs).sum(0) if merge else torch.cat(outputs, 1)


def _same(kernel: Tensor) -> tuple[int, int]:
    """The padding that keeps the size."""
    return kernel.shape[2] // 2, kernel.shape[3] // 2


def _grouped(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    """What most write: the batch folded into the groups of one convolution a branch."""
    folded = x.reshape(1, -1, *x.shape[2:])
    weights = [k.reshape(folded.shape[1], 1, *k.shape[2:]) for k in kernels]
    outputs = [F.conv2d(folded, w, padding=_same(w), groups=folded.shape[1]).view(x.shape) for w in weights]
    return _join(outputs, merge)


def _grouped_channels_last(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    return _grouped(
        x.reshape(1, -1, *x.shape[2:]).contiguous(memory_format=torch.channels_last).view(x.shape),
        *kernels,
        merge=merge,
    )


def _sample_by_sample(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    """One depthwise convolution a sample and branch."""
    samples = []
    for b in range(x.shape[0]):
        branches = [F.conv2d(x[b : b + 1], k[b, :, None], padding=_same(k), groups=x.shape[1]) for k in kernels]
        samples.append(_join(branches, merge))
    return torch.cat(samples)


def _unfolded(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    outputs = []
    for k in kernels:
        windows = F.unfold(x, k.shape[2:], padding=_same(k)).view(*x.shape[:2], -1, x.shape[2] * x.shape[3])
        outputs.append(torch.einsum("bctn,bct->bcn", windows, k.flatten(2)).view(x.shape))
    return _join(outputs, merge)


def _shifted(x: Tensor, *kernels: Tensor, merge: bool = False) -> Tensor:
    """Sums of shifted planes: what a compiler fuses best."""
    height, width = x.shape[2:]
    padded = F.pad(x, (4, 4, 4, 4))
    outputs: list[Any] = []
    for k in kernels:
        top, left = 4 - k.shape[2] // 2, 4 - k.shape[3] // 2
        outputs.append(
            sum(
                padded[:, :, top + i : top + i + height, left + j : left + j + width] * k[:, :, i, j, None, None]
                for i in range(k.shape[2])
                for j in range(k.shape[3])
            )
        )
    return _join(outputs, merge)


def _merged_taps(x: Tensor, *kernels: Tensor, merge: bool = True) -> Tensor:
    """Summed branches as one convolution with the sum of the padded kernels."""
    height, width = (max(k.shape[d] for k in kernels) for d in (2, 3))
    padded = [F.pad(k, ((width - k.shape[3]) // 2,) * 2 + ((height - k.shape[2]) // 2,) * 2) for k in kernels]
    return _grouped(x, torch.stack(padded).sum(0))


def _merges(size: Mapping[str, Any]) -> bool:
    return bool(size.get("merge"))


_GROUPED = Peer(
    "grouped",
    _grouped,
    "reads x once a branch; its gradient to the kernels is a matrix product a plane",
    released=True,
    runs=("quick", "sweep"),
)
_PER_SAMPLE = Peer(
    "per-sample",
    _sample_by_sample,
    "launches a convolution for every sample and branch",
    runs=("quick", "sweep"),
)
_SHIFTED = Peer("shifted", _shifted, "reads x once for every tap")  # eager, it is a hundred passes over x
_MERGED_TAPS = Peer("merged-taps", _merged_taps, "only sums branches", _merges)
# Compiled, convolutions remain the same library calls: none was the fastest of any row measured on two CPUs. The
# shifted planes have no matrix product: on a CPU there is nothing to tune. Along a sweep's axes they take 1.1 times as
# long as another peer in every row measured so far.
PEERS = {
    "dynamic_conv2d": (
        _GROUPED,
        _GROUPED.compiled(on_cpu=False),
        Peer("grouped-nhwc", _grouped_channels_last, "copies x into another memory format first"),
        _PER_SAMPLE,
        _PER_SAMPLE.compiled(on_cpu=False),
        Peer("unfold+einsum", _unfolded, "writes x once for every tap"),
        _SHIFTED.compiled(),
        _SHIFTED.autotuned(on_cpu=False),
        _MERGED_TAPS,
        _MERGED_TAPS.compiled(on_cpu=False),
    )
}
