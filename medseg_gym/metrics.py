"""Overlap of a mask with its target, F1 over many, and what an episode's quality curve says: NumPy in, float out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from medseg_gym.types import Mask


def iou(mask: Mask, target: Mask) -> float:
    """Intersection over union in [0, 1] of two (H, W) masks; two empty masks agree, so they score 1."""
    return iou_of_areas(*areas(mask, target))


def dice(mask: Mask, target: Mask) -> float:
    """Dice overlap in [0, 1] of two (H, W) masks; two empty masks agree, so they score 1."""
    return dice_of_areas(*areas(mask, target))


def areas(mask: Mask, target: Mask) -> tuple[int, int, int]:
    """Pixels in both, in the mask, in the target. Masks of different shapes raise ValueError."""
    if mask.shape != target.shape:
        raise ValueError(f"mask is {mask.shape}, target is {target.shape}; they must be of one image")
    return int(np.count_nonzero(mask & target)), int(np.count_nonzero(mask)), int(np.count_nonzero(target))


def iou_of_areas(both: int, mask: int, target: int) -> float:
    union = mask + target - both
    return 1.0 if union == 0 else both / union


def dice_of_areas(both: int, mask: int, target: int) -> float:
    total = mask + target
    return 1.0 if total == 0 else 2 * both / total


ENTITY_IOU = 0.5  # exclusive: no mask can overlap two disjoint entities by more (Kirillov et al. 2019)


def entity_counts(iou: float, drawn: bool, present: bool, *, failed: bool = False) -> tuple[int, int]:
    """(twice the matches, answers + entities) of one case: what its F1 adds up.

    A mask that holds a pixel is an answer, a target that does is an entity; they match at an IoU above .5. A failed
    episode is an answer that matches nothing, or failing on an absent structure would look like seeing its absence.
    """
    match = present and drawn and not failed and iou > ENTITY_IOU
    return 2 * match, int(drawn or failed) + int(present)


def entity_f1(counts: Iterable[tuple[int, int]]) -> float:
    """F1 in [0, 1] of mask-to-entity correspondence over cases, from their entity_counts.

    2 * matches / (answers + entities), the harmonic mean of precision and recall. Neither an answer nor an entity: 1.
    """
    matches, total = 0, 0
    for twice, both in counts:
        matches, total = matches + twice, total + both
    return 1.0 if total == 0 else matches / total


def noc(curve: Sequence[float], quality: float) -> int | None:
    """Number of clicks: the first action after which the curve (T + 1 values) reaches `quality`; None if never.

    A curve that starts there needs 0. Publish with nof over the same episodes: a mean of NoC alone hides failures.
    """
    return next((t for t, q in enumerate(curve) if q >= quality), None)


def nof(curves: Sequence[Sequence[float]], quality: float) -> float:
    """Number of failures as a share in [0, 1]: curves that never reach `quality`; nan without curves."""
    if not curves:
        return float("nan")
    return sum(noc(curve, quality) is None for curve in curves) / len(curves)


def at_action(curve: Sequence[float], k: int) -> float:
    """The curve's value after k actions; an episode that ended earlier keeps its last value."""
    return float(curve[min(k, len(curve) - 1)])


def auc(curve: Sequence[float], horizon: int) -> float:
    """Mean quality after actions 1..horizon, in [0, 1]: the area under the curve; the last value is kept."""
    return float(np.mean([at_action(curve, k) for k in range(1, horizon + 1)]))


def regret(curve: Sequence[float], ceiling: Sequence[float], horizon: int) -> float:
    """Mean over actions 1..horizon of the ceiling's quality minus the curve's; below 0 where the curve is better."""
    return auc(ceiling, horizon) - auc(curve, horizon)
