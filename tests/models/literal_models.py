"""The networks once more, written out literally from the specification: loops, gathers, whole matrices, no ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def at_grid(maps: torch.Tensor, grid) -> torch.Tensor:
    return F.interpolate(maps, tuple(grid), mode="bilinear", align_corners=True)


def minmax(maps: torch.Tensor) -> torch.Tensor:
    """(B, N) by its own range."""
    low, high = maps.min(1, keepdim=True)[0], maps.max(1, keepdim=True)[0]
    return (maps - low) / (high - low + 1e-7)


def normalised(x: torch.Tensor, dim: int, eps: float = 1e-7) -> torch.Tensor:
    return x / x.norm(dim=dim, keepdim=True).clamp(min=eps)


def window_activation(query: torch.Tensor, support: torch.Tensor, mask: torch.Tensor, window) -> torch.Tensor:
    """SAM as the paper writes it, one shot: query, support (B, C, h, w), mask (B, h, w) on the grid, to (B, h, w)."""
    (dh, dw), (batch, channels, height, width) = window, query.shape
    padding = (dh // 2, dw // 2)
    r_s = F.unfold(support * mask[:, None], window, padding=padding).view(batch, channels, dh * dw, -1)
    r_q = F.unfold(query, window, padding=padding).view(batch, channels, dh * dw, -1)
    corr = torch.einsum("bcoi,bcoj->boij", normalised(r_s, 1), normalised(r_q, 1))
    return minmax(corr.mean(1).amax(1)).view(batch, height, width)


def prior(query: torch.Tensor, support: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """PFENet's prior, one shot."""
    q, s = query.flatten(2), (support * mask[:, None]).flatten(2)
    corr = s.mT @ q / (s.norm(dim=1)[:, :, None] * q.norm(dim=1)[:, None] + 1e-7)
    return minmax(corr.amax(1)).view_as(query[:, 0])


def pooled(features: torch.Tensor, mask: torch.Tensor, eps: float = 5e-4) -> torch.Tensor:
    """(B, C, h, w) and (B, h, w) to (B, C)."""
    return (features * mask[:, None]).sum((2, 3)) / (mask.sum((1, 2))[:, None] + eps)


def foreground_tokens(features: torch.Tensor, weights: torch.Tensor):
    """One sample: features (S, C, h, w), weights (S, h, w) to (N, C), pixel after pixel."""
    shots, height, width = weights.shape
    return [
        features[s, :, y, x] * weights[s, y, x]
        for s in range(shots)
        for y in range(height)
        for x in range(width)
        if weights[s, y, x] >= 0.5
    ]


def token_bands(features, weights, fallback, bins: int) -> torch.Tensor:
    """(B, S, C, h, w), (B, S, h, w), (B, C) to (B, C, bins)."""
    result = []
    for f, w, p in zip(features, weights, fallback, strict=True):
        tokens = foreground_tokens(f, w)
        line = torch.stack(tokens, 1)[None] if tokens else p[None, :, None]
        result.append(F.adaptive_avg_pool1d(line, bins)[0])
    return torch.stack(result)


def depthwise(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Sample by sample, (B, C, kh, kw)."""
    padding = (kernels.shape[2] // 2, kernels.shape[3] // 2)
    return torch.cat([F.conv2d(x[[b]], k[:, None], padding=padding, groups=x.shape[1]) for b, k in enumerate(kernels)])


def conv(weights, name: str, x: torch.Tensor, dilation: int = 1) -> torch.Tensor:
    w, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if w.ndim == 3:
        return F.conv1d(x, w, bias, padding=w.shape[-1] // 2)
    return F.conv2d(x, w, bias, padding=dilation * (w.shape[-1] // 2), dilation=dilation)


def reduce(weights, name: str, stages) -> torch.Tensor:
    """Mid-level features of stages 2 and 3."""
    stage2, stage3, _ = stages
    return F.relu(conv(weights, f"{name}.reduce.0.0", torch.cat([stage3, at_grid(stage2, stage3.shape[2:])], 1)))


def classify(weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return conv(weights, f"{name}.2", F.relu(conv(weights, f"{name}.0.0", x)))


def residual(weights, name: str, x: torch.Tensor) -> torch.Tensor:
    y = F.relu(conv(weights, f"{name}.0.0", x))
    return x + F.relu(conv(weights, f"{name}.1.0", y))


def dpcn_logits(weights, query, support, mask, windows=((5, 1), (3, 3), (1, 5)), size=5, dilations=(6, 12, 18)):
    """DPCN's head: stages of query (B, C, h, w) and support (B*S, C, h, w), mask (B, S, H, W) of 0 and 1.

    ``windows=None``: the COCO setting. Without weights of FFM or DCM the network has none.
    """
    batch, shots = mask.shape[:2]
    x_q, x_s = reduce(weights, "down_query", query), reduce(weights, "down_support", support)
    grid = x_q.shape[2:]
    x_s = x_s.view(batch, shots, *x_s.shape[1:])
    high_s = support[2].view(batch, shots, *support[2].shape[1:])
    m = at_grid(mask, grid)
    m_high = at_grid(mask, query[2].shape[2:])
    per_shot = []
    for s in range(shots):
        args = (query[2], high_s[:, s], m_high[:, s])
        maps = [prior(*args)] if windows is None else [window_activation(*args, w) for w in windows]
        per_shot.append(torch.stack(maps, 1))
    acts = torch.stack(per_shot).mean(0)
    acts = acts if acts.shape[2:] == grid else at_grid(acts, grid)
    p = torch.stack([pooled(x_s[:, s], m[:, s]) for s in range(shots)]).mean(0)
    x_p = p[..., None, None].repeat(1, 1, *grid)
    x_t, maps = x_q, [x_p, acts]
    if "ffm.score.weight" in weights:
        m_0 = acts.mean(1, keepdim=True)
        m_r = torch.sigmoid(conv(weights, "ffm.score", x_q * m_0 + x_p))
        x_t = x_q * m_r + x_q
        maps.append(m_r)
    p_s = token_bands(x_s, m, p, size)
    p_s2 = F.adaptive_avg_pool1d(p_s, size * size)

    def generated(name: str, tokens: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(conv(weights, f"dcm.generators.{name}.0", tokens))
        return conv(weights, f"dcm.generators.{name}.2", hidden)

    responses = [x_t]
    if "dcm.generators.square.0.weight" in weights:
        vertical = generated("vertical", p_s)[..., None]
        horizontal = generated("horizontal", p_s)[..., None, :]
        square = generated("square", p_s2).reshape(batch, -1, size, size)
        responses = [depthwise(x_t, k) for k in (vertical, horizontal, square)]
    x = F.relu(conv(weights, "decoder.0.0", torch.cat([*responses, *maps], 1)))
    views = [F.relu(conv(weights, "decoder.1.image.0", x.mean((2, 3), keepdim=True))).repeat(1, 1, *grid)]
    for i, dilation in enumerate((1, *dilations)):
        views.append(F.relu(conv(weights, f"decoder.1.views.{i}.0", x, dilation)))
    joined = F.relu(conv(weights, "decoder.1.join.0", torch.cat(views, 1)))
    return classify(weights, "decoder.2", residual(weights, "decoder.1.refine", joined))


def cycle(query, supports, masks) -> torch.Tensor:
    """Reliable query pixels (h*w), one sample: query (C, h, w), supports (S, C, h, w), masks (S, h, w), by loops."""
    reliable = torch.zeros(query[0].numel())
    for support, mask in zip(supports, masks, strict=True):
        corr = normalised(support.flatten(1), 0).T @ normalised(query.flatten(1), 0)  # N_s, N_q
        foreground = mask.flatten() >= 0.5
        for i in range(corr.shape[0]):
            j = int(corr[i].argmax())
            if foreground[i] and foreground[int(corr[:, j].argmax())]:
                reliable[j] = 1
    return reliable


def dpnet_logits(weights, query, support, mask, bins):
    """DPNet's default head, and the inner logits."""
    batch, shots = mask.shape[:2]
    x_q, x_s = reduce(weights, "down_query", query), reduce(weights, "down_support", support)
    grid = x_q.shape[2:]
    m, m_high = at_grid(mask, grid), at_grid(mask, query[2].shape[2:])
    x_s = x_s.view(batch, shots, *x_s.shape[1:])
    high_s = support[2].view(batch, shots, *support[2].shape[1:])
    p_s = torch.stack([pooled(x_s[:, s], m[:, s]) for s in range(shots)]).mean(0)
    p_q = []
    for b in range(batch):
        omega = cycle(query[2][b].detach(), high_s[b].detach(), m_high[b]).to(x_q.dtype)
        p_q.append((x_q[b].flatten(1) * omega).sum(1) / (omega.sum() + 5e-4) if omega.any() else p_s[b])
    tokens = torch.stack([p_s, torch.stack(p_q)], 1)
    theta, phi, psi, out = (tokens_map(weights, name) for name in ("theta", "phi", "psi", "out"))
    affinity = torch.softmax(theta(tokens) @ phi(tokens).mT / tokens.shape[-1] ** 0.5, -1)
    mixed = tokens + out(affinity @ psi(tokens))
    prior_map = torch.stack([prior(query[2], high_s[:, s], m_high[:, s]) for s in range(shots)]).mean(0)[:, None]
    prior_map = prior_map if prior_map.shape[2:] == grid else at_grid(prior_map, grid)
    pyramid, inner = [], []
    for i, bin_size in enumerate(bins):
        size = (bin_size, bin_size)
        maps = [F.adaptive_avg_pool2d(x_q, size)]
        maps += [mixed[:, k, :, None, None].repeat(1, 1, *size) for k in (0, 1)]
        maps.append(at_grid(prior_map, size))
        x = F.relu(conv(weights, f"fusion.merge.{i}.0", torch.cat(maps, 1)))
        if i:
            above = torch.cat([x, at_grid(pyramid[-1], size)], 1)
            x = x + F.relu(conv(weights, f"fusion.alpha.{i - 1}.0", above))
        x = residual(weights, f"fusion.beta.{i}", x)
        pyramid.append(x)
        inner.append(classify(weights, f"fusion.inner.{i}", x))
    joined = F.relu(conv(weights, "fusion.join.0", torch.cat([at_grid(p, grid) for p in pyramid], 1)))
    return classify(weights, "fusion.classify", residual(weights, "fusion.refine", joined)), inner


def tokens_map(weights, name: str):
    return lambda x: x @ weights[f"pim.maps.{name}.weight"].T


def sample_loss(logits: torch.Tensor, target: torch.Tensor) -> float:
    """One sample, pixel by pixel: logits (2, H, W), target (H, W)."""
    terms = []
    for y in range(target.shape[0]):
        for x in range(target.shape[1]):
            label = int(target[y, x])
            if label != 255:
                terms.append(-torch.log_softmax(logits[:, y, x].double(), 0)[label].item())
    return sum(terms) / len(terms) if terms else 0.0


def loss(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Mean over the samples; logits at the target's size."""
    return sum(sample_loss(x, t) for x, t in zip(logits, target, strict=True)) / len(target)
