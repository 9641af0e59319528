"""Memory formats and dtypes of the tensors that ops read and write."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(features: Tensor) -> bool:
    """Whether (B, C, H, W) features are stored with the channels innermost."""
    _, channels, height, width = features.shape
    return features.stride(1) == 1 and channels > 1 and height * width > 1


def empty_rows_like(features: Tensor, channels: int | None = None) -> Tensor:
    """An uninitialised dense tensor in the memory format of the features, with as many channels or another number."""
    memory_format = torch.channels_last if is_channels_last(features) else torch.contiguous_format
    batch, own, height, width = features.shape
    shape = (batch, own if channels is None else channels, height, width)
    return torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=memory_format)


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and memory format that holds at most one value a channel."""
    if tensor.ndim == 4 and is_channels_last(tensor):
        return tensor.new_zeros((1, tensor.shape[1], 1, 1)).expand(tensor.shape)
    return tensor.new_zeros((1,) * tensor.ndim).expand(tensor.shape)


def accumulate_dtype(features: Tensor) -> torch.dtype:
    """The dtype of sums: float64 for float64 features, otherwise float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32
