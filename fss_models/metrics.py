"""mIoU and FB-IoU as few-shot segmentation counts them: pixels summed over all episodes of a class, then averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class EpisodeIoU(Metric):
    """Intersections and unions summed over the episodes of every class.

    With I[c, k] and U[c, k] the pixels, summed over the episodes of class c, in which prediction and truth agree on, or
    either of them says, k (0 background, 1 foreground): the IoU of c is I[c, 1] / U[c, 1], mIoU its mean over the
    classes that had episodes, FB-IoU the mean over k of sum_c I[c, k] / sum_c U[c, k]. Truth 255 does not count.
    Sums are integers: the result does not depend on the order, the batches or the number of processes.

    Args:
        classes: ids, in the order of the result.
        names: of the ids; the ids themselves where there is none.

    Example:
        >>> metric = EpisodeIoU([3, 7])
        >>> metric.update(torch.tensor([[[1, 1, 0]]]), torch.tensor([[[1, 0, 255]]]), torch.tensor([3]))
        >>> result = metric.compute()
        >>> result["miou"], result["fb_iou"], result["per_class"]["3"]["iou"]
        (50.0, 25.0, 50.0)
    """

    full_state_update = False
    intersection: Tensor
    union: Tensor
    episodes: Tensor
    ids: Tensor

    def __init__(self, classes: Sequence[int], names: Mapping[int, str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.class_ids = list(classes)
        self.names = dict(names or {})
        count = len(self.class_ids)
        for state in ("intersection", "union"):
            self.add_state(state, torch.zeros(count, 2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("episodes", torch.zeros(count, dtype=torch.int64), dist_reduce_fx="sum")
        self.register_buffer("ids", torch.tensor(self.class_ids), persistent=False)

    def update(self, prediction: Tensor, truth: Tensor, classes: Tensor) -> None:
        """Adds episodes.

        Args:
            prediction: (B, H, W), 0 or 1.
            truth: (B, H, W), 0, 1 or 255.
            classes: (B,), ids.

        Raises:
            ValueError: shapes that differ, an id that the metric was not made for.
        """
        if prediction.shape != truth.shape or prediction.ndim != 3 or classes.shape != prediction.shape[:1]:
            raise ValueError(
                f"EpisodeIoU: prediction and truth must be (B, H, W) with B classes, got {tuple(prediction.shape)}, "
                f"{tuple(truth.shape)} and {tuple(classes.shape)}"
            )
        rows = classes.to(self.ids.device)[:, None] == self.ids
        if not bool(rows.any(1).all()):
            raise ValueError(f"EpisodeIoU: no class {classes[~rows.any(1).cpu()].tolist()}")
        valid = truth != 255
        for k in (0, 1):
            said, true = (prediction == k) & valid, truth == k
            for state, pixels in ((self.intersection, said & true), (self.union, said | true)):
                state[:, k] += rows.T.long().mul(pixels.sum((1, 2)).to(rows.device)).sum(1)
        self.episodes += rows.sum(0)

    def compute(self) -> dict[str, Any]:
        """``miou`` and ``fb_iou`` in percent (nan without episodes), and ``per_class`` by name: iou, episodes, sums."""
        iou = 100 * self.intersection.double() / self.union.double()
        seen = self.union[:, 1] > 0
        total = 100 * self.intersection.sum(0).double() / self.union.sum(0).clamp(min=1)
        per_class = {
            self.names.get(c, str(c)): {
                "iou": float(iou[i, 1]) if seen[i] else None,
                "episodes": int(self.episodes[i]),
                "intersection": int(self.intersection[i, 1]),
                "union": int(self.union[i, 1]),
            }
            for i, c in enumerate(self.class_ids)
        }
        return {
            "miou": float(iou[seen, 1].mean()) if bool(seen.any()) else float("nan"),
            "fb_iou": float(total.mean()) if int(self.episodes.sum()) else float("nan"),
            "episodes": int(self.episodes.sum()),
            "classes": int(seen.sum()),
            "per_class": per_class,
        }
