"""What the ops' random calls (``ops/*/fuzz.py``) are drawn from. It needs Hypothesis; only tests import it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fss_kernels._checks import MASK_DTYPES

EPS = (1e-5, 1e-7, 0.25, 1.5)
CHANNELS = st.one_of(st.integers(1, 9), st.integers(2, 40), st.sampled_from((64, 65, 96)))


class Draw:
    """Choices, and values that follow from a drawn seed."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.kind, self.power = draw(st.sampled_from(("normal", "relu"))), draw(st.sampled_from((0, -4, 4)))
        self.seed = draw(st.integers(0, 2**32 - 1))
        self.generator = torch.Generator().manual_seed(self.seed)

    def of(self, *choices: Any) -> Any:
        """One of these."""
        return self.draw(st.sampled_from(choices))

    def size(self, largest: int) -> int:
        """Mostly small."""
        return self.draw(st.one_of(st.integers(1, min(4, largest)), st.integers(1, largest)))

    def grid(self, largest: int) -> tuple[int, int]:
        """Height and width."""
        return self.size(largest), self.size(largest)

    def channels(self) -> int:
        """Fewer and more than a vector register holds."""
        return self.draw(CHANNELS)

    def odd_sizes(self, largest: int, most: int) -> list[tuple[int, int]]:
        """From 1 to ``most`` heights and widths of windows or kernels."""
        odd = st.sampled_from(range(1, largest + 1, 2))
        return self.draw(st.lists(st.tuples(odd, odd), min_size=1, max_size=most))

    def features(self, *shape: int, channels: int = 1) -> Tensor:
        """Vectors along dimension ``channels``, none of them 0."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) + 0.3
        if self.kind == "relu":
            x.clamp_(min=0)
            x.select(channels, 0).add_(0.1)
        return x * 2.0**self.power

    def mask(self, *shape: int) -> Tensor:
        """Any dtype that an op takes; float32 is the one that it computes in."""
        u = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        kind = self.of("soft", "binary", "ones", "zeros", "one")
        mask = {
            "soft": u + 0.1,
            "binary": (u > 0.6).double(),
            "ones": torch.ones_like(u),
            "zeros": torch.zeros_like(u),
            "one": (u.flatten(-2) == u.flatten(-2).amax(-1, keepdim=True)).view(shape).double(),
        }[kind]
        return mask.to(self.of(torch.float32, *MASK_DTYPES))

    def normalisation(self, mask: Tensor | None, *channels: int) -> dict[str, Any]:
        """eps and its mode: 0 only where the plain formula does not divide by it; of one channel the gradient is 0 but
        for what a large eps that is added leaves of it."""
        if 1 in channels:
            return {"eps": 1.5 * 2.0**self.power, "eps_mode": "add"}
        zero = (0.0,) if mask is None or bool((mask > 0).all()) else ()
        return {"eps": self.of(*EPS, *zero), "eps_mode": self.of("clamp", "add")}
