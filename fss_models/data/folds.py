"""Which classes a fold tests."""

from __future__ import annotations

from fss_models.errors import ConfigError

FOLDS = 4  # of PASCAL-5i, COCO-20i and the glyphs


def fold_classes(count: int, fold: int, *, folds: int = FOLDS, rule: str = "contiguous") -> tuple[int, ...]:
    """The classes, 1 ... count, that a fold tests; it trains on the others.

    Args:
        count: how many classes there are, a multiple of ``folds``; 20 for PASCAL, 80 for COCO.
        fold: 0 ... folds - 1.
        folds: how many folds there are.
        rule: ``"contiguous"``: fold i tests a block of neighbours (PASCAL-5i, and one variant of COCO-20i);
            ``"step"``: fold i tests i + 1, i + 1 + folds, ... (COCO-20i).

    Raises:
        ConfigError: unknown rule, fold out of range, a count that does not divide.

    Example:
        >>> fold_classes(20, 1)
        (6, 7, 8, 9, 10)
        >>> fold_classes(80, 1, rule="step")[:3]
        (2, 6, 10)
    """
    if not 0 <= fold < folds:
        raise ConfigError(f"fold must be 0 ... {folds - 1}, got {fold}")
    if count % folds:
        raise ConfigError(f"{count} classes do not divide into {folds} folds")
    size = count // folds
    if rule == "contiguous":
        return tuple(range(fold * size + 1, (fold + 1) * size + 1))
    if rule == "step":
        return tuple(range(fold + 1, count + 1, folds))
    raise ConfigError(f"fold rule must be contiguous or step, got {rule!r}")
