"""What a run of trajectories came to, in the papers' form: tried, kept, dropped and why, how long and how good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medseg_gym.trajectories.records import Trajectory
from medseg_gym.types import Box, Click


def statistics(trajectories: Iterable[Trajectory], envs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"rows": one an env and strategy, "modalities": one a modality, tool and strategy, all trajectories pooled}.

    `envs` say for each env id its dataset, modality and tool. Strategies come in the order in which they are met.
    """
    known = {env["env"]: env for env in envs}
    groups: dict[tuple[str, str], list[_Facts]] = {}
    for trajectory in trajectories:
        groups.setdefault((trajectory.episode.env, trajectory.strategy), []).append(_Facts.of(trajectory))
    strategies = list(dict.fromkeys(strategy for _, strategy in groups))
    rows: list[dict[str, Any]] = []
    pooled: dict[tuple[str, str, str], list[_Facts]] = {}
    for env in known.values():
        for strategy in strategies:
            facts = groups.get((env["env"], strategy), [])
            labels = {name: env[name] for name in ("env", "dataset", "modality", "tool")} | {"strategy": strategy}
            rows.append({**labels, **summary(facts)})
            pooled.setdefault((env["modality"], env["tool"], strategy), []).extend(facts)
    modalities = [
        {"modality": modality, "tool": tool, "strategy": strategy, **summary(facts)}
        for (modality, tool, strategy), facts in pooled.items()
    ]
    return {"rows": rows, "modalities": modalities}


class _Facts:
    """The few numbers of a trajectory that are kept; a run may have half a million."""

    __slots__ = ("dice", "dropped", "iou", "kind", "prompts", "tries", "turns")

    def __init__(self, dropped: str, kind: str, turns: int, prompts: int, tries: int, iou: float, dice: float) -> None:
        self.dropped, self.kind, self.turns, self.prompts = dropped, kind, turns, prompts
        self.tries, self.iou, self.dice = tries, iou, dice

    @staticmethod
    def of(trajectory: Trajectory) -> _Facts:
        episode = trajectory.episode
        return _Facts(
            trajectory.dropped,
            trajectory.kind,
            len(episode.turns),
            sum(isinstance(turn.action, Click | Box) for turn in episode.turns),
            trajectory.tries,
            episode.iou[-1],
            episode.dice[-1],
        )


def summary(facts: Sequence[_Facts]) -> dict[str, Any]:
    """Counts of all that were tried; lengths and overlaps of those kept, None without any; `iou_tried` of all.

    `turns` counts the stop, as the papers' tables do, `prompts` does not; `rounds` says how many kept ones have how
    many turns. `tries` is the mean of tool calls spent, retries and dropped trajectories included.
    """
    kept = [fact for fact in facts if not fact.dropped]
    return {
        "tried": len(facts),
        "kept": len(kept),
        "dropped": dict(sorted(Counter(fact.dropped for fact in facts if fact.dropped).items())),
        "kinds": dict(sorted(Counter(fact.kind for fact in kept).items())),
        "turns": _mean([fact.turns for fact in kept]),
        "prompts": _mean([fact.prompts for fact in kept]),
        "rounds": {str(turns): n for turns, n in sorted(Counter(fact.turns for fact in kept).items())},
        "iou": {"mean": _mean([fact.iou for fact in kept]), "median": _median([fact.iou for fact in kept])},
        "dice": {"mean": _mean([fact.dice for fact in kept]), "median": _median([fact.dice for fact in kept])},
        "iou_tried": {"mean": _mean([fact.iou for fact in facts]), "median": _median([fact.iou for fact in facts])},
        "tries": _mean([fact.tries for fact in facts]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None
