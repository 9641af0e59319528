"""The ops as modules without parameters: each only calls its function."""

from __future__ import annotations

from torch import Tensor, nn

from fss_kernels.ops import masked_avg_pool, prototype_cosine


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


class PrototypeCosine(nn.Module):
    """`fss_kernels.prototype_cosine` with its options fixed.

    Example:
        >>> import torch
        >>> PrototypeCosine(scale=10.0)(torch.ones(1, 2, 1, 2), torch.ones(1, 1, 2)).round()
        tensor([[[[10., 10.]]]])
    """

    def __init__(self, *, scale: float = 1.0, eps: float = 1e-8, eps_mode: str = "clamp") -> None:
        super().__init__()
        self.scale, self.eps, self.eps_mode = scale, eps, eps_mode

    def forward(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """Features (B, C, H, W) and prototypes (B, P, C) or (P, C) to (B, P, H, W)."""
        return prototype_cosine(features, prototypes, scale=self.scale, eps=self.eps, eps_mode=self.eps_mode)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"scale={self.scale}, eps={self.eps}, eps_mode={self.eps_mode!r}"
