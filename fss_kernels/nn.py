"""The ops as modules without parameters: each only calls its function."""

from __future__ import annotations

from torch import Tensor, nn

from fss_kernels.ops import hypercorrelation, masked_avg_pool


class Hypercorrelation(nn.Module):
    """`fss_kernels.hypercorrelation` with its options fixed.

    Example:
        >>> import torch
        >>> Hypercorrelation()(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 6)).shape
        torch.Size([1, 3, 4, 5, 6])
    """

    def __init__(self, *, eps: float = 1e-5, eps_mode: str = "add", clamp: bool = True) -> None:
        super().__init__()
        self.eps, self.eps_mode, self.clamp = eps, eps_mode, clamp

    def forward(self, query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
        """Query (B, C, Ha, Wa), support (B, C, Hb, Wb) and mask (B, h, w) to (B, Ha, Wa, Hb, Wb)."""
        return hypercorrelation(query, support, mask, eps=self.eps, eps_mode=self.eps_mode, clamp=self.clamp)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"eps={self.eps}, eps_mode={self.eps_mode!r}, clamp={self.clamp}"


class MaskedAvgPool(nn.Module):
    """`fss_kernels.masked_avg_pool` with its options fixed.

    Example:
        >>> import torch
        >>> MaskedAvgPool(eps=0.0)(torch.ones(1, 2, 4, 4), torch.ones(1, 8, 8))
        tensor([[1., 1.]])
    """

    def __init__(self, *, eps: float = 5e-4, resize: str = "bilinear", align_corners: bool = True) -> None:
        super().__init__()
        self.eps, self.resize, self.align_corners = eps, resize, align_corners

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features (B, C, H, W) and mask (B, M, h, w) or (B, h, w) to (B, M, C) or (B, C)."""
        return masked_avg_pool(features, mask, eps=self.eps, resize=self.resize, align_corners=self.align_corners)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"eps={self.eps}, resize={self.resize!r}, align_corners={self.align_corners}"
