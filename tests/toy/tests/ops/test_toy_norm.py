"""toy_norm against loops."""

import pytest
import torch

import fss_kernels


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_loops(backend):
    x, gain = torch.randn(2, 3, 2, 4), torch.randn(2, 3)
    with fss_kernels.use_backend(backend):
        out = fss_kernels.toy_norm(x, gain, eps=0.25)
    for b in range(2):
        for i in range(2):
            for j in range(4):
                squares = sum(float(x[b, c, i, j]) ** 2 for c in range(3))
                for c in range(3):
                    wanted = float(gain[b, c] * x[b, c, i, j]) / (squares / 3 + 0.25) ** 0.5
                    assert float(out[b, c, i, j]) == pytest.approx(wanted, rel=1e-5)
