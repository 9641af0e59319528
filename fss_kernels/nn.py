"""The ops as modules without parameters: each only calls its function."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fss_kernels.ops import (
    dense_cosine_match,
    dense_cosine_max,
    dynamic_conv2d,
    hypercorrelation,
    hypercorrelation_pyramid,
    masked_avg_pool,
    prototype_cosine,
)


class DenseCosineMax(nn.Module):
    """`fss_kernels.dense_cosine_max` with its options fixed.

    Example:
        >>> import torch
        >>> scores, index = DenseCosineMax(windows=((3, 3), (1, 5)))(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 6))
        >>> scores.shape
        torch.Size([1, 1, 2, 3, 4])
    """

    def __init__(
        self,
        *,
        windows: Sequence[tuple[int, int]] = ((1, 1),),
        masked: str = "zero",
        eps: float = 1e-7,
        eps_mode: str = "clamp",
    ) -> None:
        super().__init__()
        self.windows, self.masked, self.eps, self.eps_mode = windows, masked, eps, eps_mode

    def forward(self, query: Tensor, support: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Query (B, C, Hq, Wq), support (B, S, C, Hs, Ws) and mask (B, S, h, w) to scores and indices."""
        return dense_cosine_max(
            query, support, mask, windows=self.windows, masked=self.masked, eps=self.eps, eps_mode=self.eps_mode
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"windows={self.windows}, masked={self.masked!r}, eps={self.eps}, eps_mode={self.eps_mode!r}"


class DenseCosineMatch(nn.Module):
    """`fss_kernels.dense_cosine_match` with its options fixed.

    Example:
        >>> import torch
        >>> [r.shape[2:] for r in DenseCosineMatch()(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 6))]
        [torch.Size([3, 4]), torch.Size([3, 4]), torch.Size([5, 6]), torch.Size([5, 6])]
    """

    def __init__(self, *, eps: float = 1e-7, eps_mode: str = "clamp") -> None:
        super().__init__()
        self.eps, self.eps_mode = eps, eps_mode

    def forward(
        self, query: Tensor, support: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query (B, C, Hq, Wq), support (B, S, C, Hs, Ws) and mask (B, S, h, w) to scores and indices of both."""
        return dense_cosine_match(query, support, mask, eps=self.eps, eps_mode=self.eps_mode)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"eps={self.eps}, eps_mode={self.eps_mode!r}"


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


class HypercorrelationPyramid(nn.Module):
    """`fss_kernels.hypercorrelation_pyramid` with its levels and options fixed.

    Example:
        >>> import torch
        >>> layers = [torch.ones(1, 8, 4, 4), torch.ones(1, 16, 2, 2)]
        >>> [level.shape for level in HypercorrelationPyramid((1, 1))(layers, layers)]
        [torch.Size([1, 1, 4, 4, 4, 4]), torch.Size([1, 1, 2, 2, 2, 2])]
    """

    def __init__(self, levels: Sequence[int], *, eps: float = 1e-5, eps_mode: str = "add", clamp: bool = True) -> None:
        super().__init__()
        self.levels, self.eps, self.eps_mode, self.clamp = tuple(levels), eps, eps_mode, clamp

    def forward(
        self, queries: Sequence[Tensor], supports: Sequence[Tensor], mask: Tensor | None = None
    ) -> list[Tensor]:
        """N layers (B, C, Ha, Wa) and (B, C, Hb, Wb) and mask (B, h, w) to one (B, L, Ha, Wa, Hb, Wb) a level."""
        return hypercorrelation_pyramid(
            queries, supports, mask, levels=self.levels, eps=self.eps, eps_mode=self.eps_mode, clamp=self.clamp
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"levels={self.levels}, eps={self.eps}, eps_mode={self.eps_mode!r}, clamp={self.clamp}"


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


class DynamicConv2d(nn.Module):
    """`fss_kernels.dynamic_conv2d` with its option fixed.

    Example:
        >>> import torch
        >>> DynamicConv2d()(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 3))
        tensor([[[[2., 3., 2.]]]])
    """

    def __init__(self, *, merge: bool = False) -> None:
        super().__init__()
        self.merge = merge

    def forward(self, x: Tensor, kernels: Tensor | Sequence[Tensor]) -> Tensor:
        """x (B, C, H, W) and kernels (B, C, kh, kw), one or several, to (B, L*C, H, W) or their sum."""
        return dynamic_conv2d(x, kernels, merge=self.merge)

    def extra_repr(self) -> str:
        """The option, for printing."""
        return f"merge={self.merge}"


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
