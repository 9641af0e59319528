"""The blocks of RECIPES.md against the formulas of the networks, written without the ops."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fss_models

_TEXT = Path(fss_models.__file__).with_name("RECIPES.md").read_text()
_BLOCKS = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)
RECIPES: dict[str, Any] = {}
for block in _BLOCKS:
    exec(compile(block, "RECIPES.md", "exec"), RECIPES)


@pytest.fixture
def data() -> dict[str, Tensor]:
    """Features as ReLU leaves them, signed ones, masks at image size and at the grid's."""
    g = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 3, 49, 41)
    mask[0, :, 8:30, 5:22] = 1
    mask[1, :, 17:44, 11:38] = 1
    return {
        "query": torch.randn(2, 16, 7, 6, generator=g, dtype=torch.float64).relu(),
        "support": torch.randn(2, 3, 16, 7, 6, generator=g, dtype=torch.float64).relu(),
        "signed_query": torch.randn(2, 16, 7, 6, generator=g, dtype=torch.float64),
        "signed": torch.randn(2, 3, 16, 7, 6, generator=g, dtype=torch.float64),
        "mask": mask.double(),
    }


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def bilinear(mask: Tensor, features: Tensor) -> Tensor:
    """(B, h, w) to (B, 1, H, W)."""
    return F.interpolate(mask[:, None], features.shape[-2:], mode="bilinear", align_corners=True)


def weighted_gap(features: Tensor, mask: Tensor, eps: float = 5e-4) -> Tensor:
    """PFENet's two average poolings over the whole map, (B, C)."""
    m = bilinear(mask, features)
    h, w = features.shape[-2:]
    area = F.avg_pool2d(m, (h, w)) * h * w + eps
    return (F.avg_pool2d(features * m, (h, w)) * h * w / area)[..., 0, 0]


def cosines(query: Tensor, support: Tensor, eps: float = 1e-7) -> Tensor:
    """(B, N support, N query), eps added to the product of the norms."""
    q, s = query.flatten(2), support.flatten(2)
    product = torch.bmm(s.mT, q)
    norms = torch.bmm(s.norm(dim=1)[..., None], q.norm(dim=1)[:, None])
    return product / (norms + eps)


def min_max(maps: Tensor) -> Tensor:
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return (maps - low) / (high - low + 1e-7)


def released_prior(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    """One shot, (B, H, W)."""
    best = cosines(query, support * bilinear(mask, support)).amax(1)
    return min_max(best).view(query.shape[0], *query.shape[2:])


def test_every_network_has_a_section() -> None:
    sections = set(re.findall(r"^## (\S+)$", _TEXT, re.MULTILINE))
    assert sections == {
        "PFENet",
        "PFENet++",
        "HSNet",
        "VAT",
        "SSP",
        "PANet",
        "BAM",
        "CyCTR",
        "MSANet",
        "Sym-Net",
        "HDMNet",
    }
    tested = Path(__file__).read_text()
    for name in re.findall(r"^def (\w+)", "\n".join(_BLOCKS), re.MULTILINE):
        assert f'RECIPES["{name}"]' in tested, name


def test_prototype(data: dict[str, Tensor]) -> None:
    expected = torch.stack([weighted_gap(data["support"][:, s], data["mask"][:, s]) for s in range(3)]).mean(0)
    close(RECIPES["prototype"](data["support"], data["mask"]), expected)


def test_pfenet(data: dict[str, Tensor]) -> None:
    query, support, mask = data["query"], data["support"], data["mask"]
    expected = torch.stack([released_prior(query, support[:, s], mask[:, s]) for s in range(3)]).mean(0)
    close(RECIPES["pfenet_prior"](query, support, mask), expected[:, None])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_pfenet_plus_plus(data: dict[str, Tensor], k: int) -> None:
    query, support, mask = data["signed_query"], data["signed"][:, 0, :, ::2, ::2].contiguous(), data["mask"][:, 0]
    unit_query = F.normalize(query, dim=1)
    unit_support = F.normalize(support * bilinear(mask, support), dim=1)
    expected = []
    for q, s in zip(unit_query, unit_support, strict=True):  # the loop over samples of the released code
        filters = F.unfold(s[None], k, padding=k // 2)[0].T.reshape(-1, 16, k, k)
        expected.append(F.conv2d(q[None], filters, padding=k // 2)[0])
    got = RECIPES["pfenet_plus_responses"](query, support, mask, k)
    close(got, torch.stack(expected).view(2, *support.shape[2:], *query.shape[2:]).permute(0, 3, 4, 1, 2))


def hsnet_layer(query: Tensor, support: Tensor) -> Tensor:
    q, s = query.flatten(2), support.flatten(2)
    q, s = (x / (x.norm(dim=1, keepdim=True) + 1e-5) for x in (q, s))
    return torch.bmm(q.mT, s).clamp(min=0).view(-1, *query.shape[2:], *support.shape[2:])


def test_hsnet() -> None:
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 33, 33, generator=g, dtype=torch.float64)
    sizes = [(8, 6)] * 4 + [(12, 4)] * 6 + [(16, 3)] * 3
    queries, supports = (
        [torch.randn(2, c, n, n, generator=g, dtype=torch.float64) for c, n in sizes] for _ in range(2)
    )
    levels = RECIPES["hsnet_correlation"](queries, supports, mask)
    layers = [hsnet_layer(q, s * bilinear(mask, s)) for q, s in zip(queries, supports, strict=True)]
    for got, expected in zip(levels, (layers[:4], layers[4:10], layers[10:]), strict=True):
        close(got, torch.stack(expected, 1))


def test_vat() -> None:
    g = torch.Generator().manual_seed(2)
    mask = torch.rand(2, 33, 33, generator=g, dtype=torch.float64)
    levels, sides = (1, 2, 1), (9, 6, 5)
    each = (9, 6, 6, 5)
    queries, supports = ([torch.randn(2, 8, 7, 7, generator=g, dtype=torch.float64) for _ in each] for _ in range(2))
    layers = []
    for query, support, side in zip(queries, supports, each, strict=True):  # resize_feats, then mask_feature
        q, s = (F.interpolate(x, (side, side), mode="bilinear", align_corners=True) for x in (query, support))
        layers.append(hsnet_layer(q, s * bilinear(mask, s)))
    pyramid = RECIPES["vat_correlation"](queries, supports, mask, levels, sides)
    for got, expected in zip(pyramid, (layers[:1], layers[1:3], layers[3:]), strict=True):
        close(got, torch.stack(expected, 1))


def test_ssp(data: dict[str, Tensor]) -> None:
    query, support, mask = data["query"], data["support"][:, 0], data["mask"][:, 0]
    masks = torch.stack([mask, 1 - mask], 1)
    expected = torch.stack([weighted_gap(support, m, 1e-5) for m in masks.unbind(1)], 1)
    prototypes = RECIPES["ssp_prototypes"](support, masks)
    close(prototypes, expected)
    similarity = [F.cosine_similarity(query, p[..., None, None], dim=1) * 10 for p in expected.unbind(1)]
    close(RECIPES["ssp_similarity"](query, prototypes), torch.stack(similarity, 1))
    features = data["signed_query"].flatten(2).mT
    kept = torch.arange(42)[None].expand(2, -1) % 3 > 0
    rows = []
    for f, keep in zip(features, kept, strict=True):  # the loop over samples
        chosen = f[keep]
        scores = F.normalize(f, dim=1) @ F.normalize(chosen, dim=1).T
        rows.append((scores * 2.0).softmax(-1) @ chosen)
    close(RECIPES["ssp_local"](features, kept), torch.stack(rows))


def test_panet(data: dict[str, Tensor]) -> None:
    query, support, mask = data["signed_query"], data["signed"][:, 0], data["mask"][:, 0]
    masks = torch.stack([1 - mask, mask], 1)
    upsampled = F.interpolate(support, mask.shape[-2:], mode="bilinear")
    expected = torch.stack(
        [(upsampled * m[:, None]).sum((2, 3)) / (m[:, None].sum((2, 3)) + 1e-5) for m in masks.unbind(1)], 1
    )
    prototypes = RECIPES["panet_prototypes"](support, masks)
    close(prototypes, expected)
    distance = [F.cosine_similarity(query, p[..., None, None], dim=1) * 20 for p in expected.unbind(1)]
    close(RECIPES["panet_distance"](query, prototypes), torch.stack(distance, 1))


def test_bam(data: dict[str, Tensor]) -> None:
    query, support, mask = data["query"], data["support"], data["mask"]

    def gram(x: Tensor) -> Tensor:
        unit = x.flatten(2) / (x.flatten(2).norm(dim=2, keepdim=True) + 1e-7)
        return unit @ unit.mT

    distance = torch.stack([(gram(query) - gram(support[:, s])).flatten(1).norm(dim=1) / 16 for s in range(3)], 1)
    learned = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 3)).double()  # kshot_rw
    sorted_distance, order = distance.sort(1)
    weights = learned(sorted_distance).gather(1, order.argsort(1)).softmax(1).detach()
    assert (weights - 1 / 3).abs().max() > 0.01
    each = torch.stack([released_prior(query, support[:, s], mask[:, s]) for s in range(3)], 1)
    expected = (each * weights[..., None, None]).sum(1, keepdim=True)
    close(RECIPES["bam_prior"](query, support, mask, weights), expected)
    pooled = torch.stack([weighted_gap(support[:, s], mask[:, s]) for s in range(3)], 1)
    close(RECIPES["bam_prototype"](support, mask, weights), (pooled * weights[..., None]).sum(1))


def test_cyctr(data: dict[str, Tensor]) -> None:
    query, support = data["signed_query"], data["signed"][:, 0]
    mask = F.interpolate(data["mask"][:, :1], support.shape[-2:], mode="nearest")[:, 0]
    scores = cosines(query, support).mT  # (B, N query, N support)
    found = scores.argmax(1)  # of every support token, its query token
    back = scores.argmax(2).gather(1, found)
    labels = mask.flatten(1)
    expected = (labels == labels.gather(1, back)).view(mask.shape)
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(RECIPES["cyctr_consistent"](query, support, mask), expected)
    q, k, v = (x.flatten(2).unflatten(1, (2, 8)).mT for x in (query, support, support + 1))  # two heads
    dropped = ~expected.flatten(1)[:, None].expand(-1, 2, -1)
    attention = (q @ k.mT / 8**0.5 + dropped[:, :, None] * -10000.0).softmax(-1)
    close(RECIPES["cyctr_attention"](q, k, v, dropped), attention @ v)


MSANET, SYMNET = RECIPES["msanet_similarity"], RECIPES["symnet_similarity"]
# tokens of a support and a soft mask on its grid
CHOSEN = {
    MSANET: lambda s, m: (s * m)[:, m >= m[m > 0].mean()] if m.any() else s.new_zeros(16, 1),
    SYMNET: lambda s, m: s[:, m == 1] if (m == 1).any() else s.new_zeros(16, 1),
}


@pytest.mark.parametrize("recipe", CHOSEN, ids=["msanet", "symnet"])
def test_mean_similarity_of_chosen_tokens(data: dict[str, Tensor], recipe: Callable[..., Tensor]) -> None:
    """MSANet and Sym-Net, with and without foreground: the ragged gather, sample by sample."""
    query, support = data["signed_query"], data["signed"][:, 0]
    mask = data["mask"][:, 0, :44, :37].clone()  # soft on the grid
    for empty in (False, True):
        if empty:
            mask[1] = 0
        expected = []
        for q, s, m in zip(query, support, bilinear(mask, support), strict=True):
            tokens = CHOSEN[recipe](s, m[0])
            tokens = tokens / (tokens.norm(dim=0, keepdim=True) + 1e-5)
            unit = q.flatten(1) / (q.flatten(1).norm(dim=0, keepdim=True) + 1e-5)
            expected.append((unit.T @ tokens).clamp(min=0).mean(1).view(q.shape[1:]))
        close(recipe(query, support, mask), torch.stack(expected))


@pytest.mark.parametrize("window", [(5, 5), (7, 1), (1, 7)])
def test_symnet(data: dict[str, Tensor], window: tuple[int, int]) -> None:
    query, support = data["query"], data["support"][:, 0]
    mask = bilinear(data["mask"][:, 0], support)[:, 0]
    pool = torch.nn.AvgPool2d(window, 1, (window[0] // 2, window[1] // 2))
    q, s = pool(query), pool(support * mask[:, None])
    scores = (cosines(q, s) * q.flatten(2).norm(dim=1)[:, None]).mean(1).view(2, 7, 6)
    got = RECIPES["symnet_scores"](query, support, mask, window)
    close(got, scores)
    close(min_max(got.flatten(1)), min_max(scores.flatten(1)), 1e-5)


def test_symnet_prototypes(data: dict[str, Tensor]) -> None:
    query = data["signed_query"]
    prior = torch.rand(2, 7, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    prior[1] = 0.56 + 0.1 * prior[1]  # neither high nor in doubt nor low
    expected = []
    for q, p in zip(query.flatten(2), prior.flatten(1), strict=True):  # the loop over samples
        order = p.sort().indices
        rows = []
        for chosen, twelve in (
            (p > 0.7, order[-12:]), ((p > 0.4) & (p < 0.55), order[21 - 6 : 21 + 6]), (p < 0.4, order[:12]),
        ):  # fmt: skip
            rows.append(q[:, chosen].mean(1) if chosen.any() else q[:, twelve].mean(1))
        expected.append(torch.stack(rows))
    close(RECIPES["symnet_prototypes"](query, prior), torch.stack(expected))


def test_hdmnet(data: dict[str, Tensor]) -> None:
    query, support, mask = data["query"], data["support"], data["mask"]
    each = []
    for s in range(3):
        nearest = F.interpolate(mask[:, s, None], support.shape[-2:], mode="nearest")
        each.append(cosines(query, support[:, s] * nearest).amax(1).view(2, 1, 7, 6))
    close(RECIPES["hdmnet_prior"](query, support, mask), torch.stack(each).mean(0))
