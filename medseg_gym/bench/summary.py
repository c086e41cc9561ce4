"""From episodes to the numbers of a summary: means per env and policy, failures counted as 0."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from medseg_gym import metrics
from medseg_gym.types import Episode, Unreadable

SUMMARY_SCHEMA = 1
NOC_THRESHOLDS = (80, 85, 90)  # per cent of IoU


def curves(episode: Episode) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The (iou, dice) curves that count, T + 1 values each; all zero for a failed or unreadable episode."""
    if not _counts(episode):
        zeros = (0.0,) * len(episode.iou)
        return zeros, zeros
    return episode.iou, episode.dice


def summarise_row(episodes: Sequence[Episode], **labels: Any) -> dict[str, Any]:
    """One row of the summary: the episodes of one policy on one env (at least one), after its labels."""
    iou, dice = zip(*(curves(episode) for episode in episodes), strict=True)
    horizon = episodes[0].horizon
    by_structure: dict[str, list[int]] = defaultdict(list)
    for i, episode in enumerate(episodes):
        by_structure[episode.structure].append(i)
    return {
        **labels,
        "horizon": horizon,
        "episodes": len(episodes),
        "patients": len({episode.patient for episode in episodes}),
        "dice": _mean(curve[-1] for curve in dice),
        "iou": _mean(curve[-1] for curve in iou),
        "dice_at": [_mean(metrics.at_action(curve, k) for curve in dice) for k in range(horizon + 1)],
        "iou_at": [_mean(metrics.at_action(curve, k) for curve in iou) for k in range(horizon + 1)],
        "noc": {str(q): _noc(iou, q / 100) for q in NOC_THRESHOLDS},
        "actions": _mean(len(episode.turns) for episode in episodes),
        "tool_calls": _mean(sum(turn.tool_called for turn in episode.turns) for episode in episodes),
        "reward": _mean(_counts(episode) * sum(turn.reward for turn in episode.turns) for episode in episodes),
        "unreadable_turns": sum(isinstance(t.action, Unreadable) for episode in episodes for t in episode.turns),
        "ended": {
            kind: Counter(episode.ended for episode in episodes)[kind]
            for kind in ("stopped", "horizon", "unreadable", "failed")
        },
        "structures": {
            structure: {
                "episodes": len(members),
                "dice": _mean(dice[i][-1] for i in members),
                "iou": _mean(iou[i][-1] for i in members),
            }
            for structure, members in sorted(by_structure.items())
        },
    }


def _counts(episode: Episode) -> bool:
    return episode.ended not in ("failed", "unreadable")


def _noc(curves_: Sequence[Sequence[float]], quality: float) -> dict[str, Any]:
    reached = [n for n in (metrics.noc(curve, quality) for curve in curves_) if n is not None]
    return {
        "mean": _mean(reached) if reached else None,  # over the episodes that reach it: read it beside nof
        "reached": len(reached),
        "nof": metrics.nof(curves_, quality),
    }


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
