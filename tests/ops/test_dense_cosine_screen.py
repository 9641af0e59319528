"""The bfloat16 screen of the CPU kernel changes no bit: every case with and without it, in a process each.

python tests/ops/test_dense_cosine_screen.py results.pt        one process: its results, by case
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fss_kernels
from fss_kernels import _loading, dense_cosine_match, dense_cosine_max

LEVELS = ["avx512", "avx512_bf16"]


def cases():
    """name, query, support, mask, options."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    def noise(x, scale):
        return x * (1 + scale * randn(*x.shape))

    def ulps(x):
        """Every eighth element moved by one unit in the last place."""
        return torch.where(rand(*x.shape) < 0.125, torch.nextafter(x, torch.full_like(x, math.inf)), x)

    def shuffled(x):
        return x.flatten(2)[..., torch.randperm(x[0, 0].numel(), generator=generator)].view_as(x)

    def smooth(channels, coarse, height, width):
        return F.interpolate(randn(1, channels, coarse, coarse), (height, width), mode="bicubic").relu()

    for channels in (1, 3, 64, 65, 129, 511, 512, 1100, 2600):
        yield f"random-{channels}", randn(2, channels, 9, 17), randn(2, 2, channels, 13, 14), rand(2, 2, 5, 6) > 0.3, {}
    yield "below-zero", randn(1, 64, 11, 13).abs(), -randn(1, 64, 7, 13).abs(), None, {}
    yield "several-parts", randn(1, 96, 20, 21), randn(1, 96, 43, 51), None, {}
    yield "several-chunks", randn(1, 1100, 14, 15), randn(1, 1100, 37, 41), None, {}
    yield "smooth", smooth(192, 5, 30, 31), smooth(192, 6, 32, 30), None, {}
    scene = smooth(128, 9, 48, 48)
    yield "moved-scene", noise(scene[..., 7:, 7:], 0.1), scene[..., :41, :41], None, {"eps": 0.0}
    for dtype in (torch.bfloat16, torch.float16):
        yield str(dtype), randn(1, 160, 15, 16).to(dtype), randn(1, 160, 20, 21).to(dtype), None, {}
    for mode, eps in (("add", 0.1), ("add", 30.0), ("clamp", 12.0), ("clamp", 1e30)):
        yield f"{mode}-{eps}", randn(1, 128, 15, 16), randn(1, 128, 20, 21), None, {"eps": eps, "eps_mode": mode}

    # equal scores: few vectors of exact arithmetic, all of them or among others
    few = (2 * torch.randint(0, 2, (1, 256, 9), generator=generator) - 1) / 16
    query, support = few[..., torch.arange(330) % 7].view(1, 256, 15, 22), few[..., torch.arange(520) % 9]
    yield "ties", query, support.view(1, 256, 20, 26), None, {}
    some = torch.where(torch.arange(520) % 13 == 5, support, randn(1, 256, 520)).view(1, 256, 20, 26)
    yield "ties-among-others", query, some, None, {}
    yield "ties-of-the-other-side", some, query, None, {}
    yield "all-the-same", few[..., :1, None].expand(1, 256, 20, 26), few[..., :1, None].expand(1, 256, 45, 45), None, {}

    # scores within float32's rounding of each other, and within bfloat16's
    for name, move in (("ulps", ulps), ("close", lambda x: noise(x, 2e-3)), ("near", lambda x: noise(x, 5e-2))):
        for channels in (64, 300):
            base = randn(1, channels, 5)
            query = shuffled(move(base[..., torch.arange(360) % 5].view(1, channels, 20, 18)))
            at = torch.arange(1500)
            among = torch.where(at % 37 < 2, base[..., at % 5], randn(1, channels, 1500)).view(1, channels, 30, 50)
            among = shuffled(move(among))
            yield f"{name}-{channels}", query, among, None, {}
            yield f"{name}-{channels}-other-side", among, query, None, {}
    everywhere = noise(randn(1, 70, 1, 1).expand(1, 70, 40, 41), 1e-3)
    yield "hopeless", everywhere, noise(everywhere, 1e-3).repeat(1, 1, 2, 1), None, {}
    half = torch.where((torch.arange(80) < 30)[:, None], randn(1, 70, 80, 41), everywhere.repeat(1, 1, 2, 1))
    yield "hopeless-later", everywhere, half, None, {}
    yield "hopeless-rows", everywhere, randn(1, 70, 30, 41), None, {}

    # elements on either side of what bfloat16 rounds up: errors that all point the same way, the loser's upwards
    rounded = torch.ones(1, 64, 2)
    for i, d in enumerate((0.99 * 2**-8, 1.01 * 2**-8)):
        rounded[0, ::2, i], rounded[0, 1::2, i] = 1 + d, math.sqrt(2 - (1 + d) ** 2)
    for first, second in ((0, 1), (1, 0)):
        support = randn(1, 64, 400)
        support[..., 77], support[..., 301] = rounded[..., first], rounded[..., second]
        query = randn(1, 64, 200)
        query[..., 40:90] = 1
        yield f"one-sided-{first}", query.view(1, 64, 10, 20), support.view(1, 64, 20, 20), None, {}
        yield f"one-sided-{first}-query", support.view(1, 64, 20, 20), query.view(1, 64, 10, 20), None, {}

    # errors of one side that lower every sum alike, and winners that bfloat16 does not tell from those before them
    rounded = torch.ones(1, 64, 1, 1)
    rounded[:, ::4], rounded[:, 2::4] = 1 + 0.99 * 2**-8, 1 + 0.9 * 2**-8
    rounded[:, 1::2] = math.sqrt(2 - (1 + 0.95 * 2**-8) ** 2)
    copies = torch.ones(1, 64, 400)
    at = torch.arange(400)
    copies[0, torch.where(at < 300, 4 * (at % 16) + 2, 4 * (at % 16)), at] = 2
    rounded, copies = rounded.expand(1, 64, 8, 8), copies.view(1, 64, 20, 20)
    yield "one-sided-alike", rounded, copies, None, {}
    yield "one-sided-alike-other-side", copies, rounded, None, {}

    # the error of one vector alone: the others are exact in bfloat16, and the winner's strip or panel comes late
    exact = torch.zeros(1, 64, 400)
    for i in range(4):
        exact[0, (4 * (at + i) + torch.where(at < 300, 2, 0)) % 64, at] = 0.5
    mixed = randn(1, 64, 200)
    mixed[..., 50:200:30] = rounded[..., :1, 0]
    yield "one-sided-alone", mixed.view(1, 64, 10, 20), exact.view(1, 64, 20, 20), None, {}
    yield "one-sided-alone-other-side", exact.view(1, 64, 20, 20), mixed.view(1, 64, 10, 20), None, {}

    # vectors that are zero, tiny, huge or not finite
    for value in (0.0, 1e-25, 1e-21, 1e-13, 1e17, 1e19, 1e25, math.inf, math.nan):
        for side in ("query", "support", "both"):
            query, support = randn(1, 80, 12, 13).relu(), randn(1, 80, 15, 21)
            for x, name in ((query, "query"), (support, "support")):
                if side in (name, "both"):
                    x[:, :, 3, ::4] = x[:, :, 3, ::4] * value if math.isfinite(value) else value
            for eps in (0.0, 1e-7):
                yield f"{side}-{value}-{eps}", query, support, None, {"eps": eps}
    for value in (1e-12, 1e-20, 1e-23):
        yield f"all-{value}", randn(1, 80, 12, 13) * value, randn(1, 80, 15, 21) * value, None, {"eps": 0.0}
    query, support = randn(2, 80, 12, 13), randn(2, 2, 80, 15, 21)
    query[..., ::3], support[..., ::2] = 0, 0
    yield "zero-under-a-mask", query, support, rand(2, 2, 5, 6) > 0.6, {}
    yield "below-zero-under-a-mask", query.abs(), -support.abs(), rand(2, 2, 5, 6) > 0.6, {}
    dead = torch.zeros(1, 80, 12, 13)
    yield "dead-query", dead, randn(1, 80, 15, 21), None, {}
    yield "dead-support", randn(1, 80, 15, 21), dead, None, {}
    yield "channels-last", *(randn(1, 80, 15, 21).contiguous(memory_format=torch.channels_last) for _ in "qs"), None, {}


def results():
    """Bits of scores and indices of both ops, of the maximum with every rule for the mask."""
    found = {"level": [_loading.cpu_isa()]}
    for name, query, support, mask, options in cases():
        tensors = [
            *dense_cosine_max(query, support, mask, **options),
            *dense_cosine_max(query, support, mask, masked="exclude", **options),
            *dense_cosine_match(query, support, mask, **options),
        ]
        found[name] = [t.contiguous().view(torch.uint8) for t in tensors]
    return found


@pytest.mark.skipif(LEVELS[1] not in _loading.supported_isas(), reason="no AVX512-BF16")
def test_screen_changes_no_bit(tmp_path):
    """Random, equal, close, smooth, extreme vectors; several chunks; blocks that give the screen up."""
    found = []
    for level in LEVELS:
        out = tmp_path / f"{level}.pt"
        own = os.environ | {"FSS_KERNELS_CPU_ISA": level, "PYTHONPATH": str(Path(fss_kernels.__file__).parents[1])}
        subprocess.run([sys.executable, __file__, out], env=own, check=True)
        found.append(torch.load(out))
    plain, screened = found
    assert [plain.pop("level"), screened.pop("level")] == [[level] for level in LEVELS]
    assert plain.keys() == screened.keys() and len(plain) > 80
    different = [
        name for name in plain if not all(torch.equal(a, b) for a, b in zip(plain[name], screened[name], strict=True))
    ]
    assert not different


if __name__ == "__main__":
    torch.save(results(), sys.argv[1])
