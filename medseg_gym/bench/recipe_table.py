"""A recipe's record from its played arms: means with intervals, what was not run, and the papers' rows beside them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from medseg_gym.bench.recipe_records import Recipe
from medseg_gym.bench.recipe_run import Left, Ran
from medseg_gym.bench.statistics import Interval, Scores, difference, interval
from medseg_gym.bench.statistics_tables import averages
from medseg_gym.bench.summary import curves
from medseg_gym.types import Episode

Measure = Callable[[Episode, float], float]  # of an episode and its seconds

MEASURES: dict[str, tuple[Measure, tuple[float, float]]] = {
    "dice": (lambda episode, _: curves(episode)[1][-1], (0, 1)),
    "iou": (lambda episode, _: curves(episode)[0][-1], (0, 1)),
    "actions": (lambda episode, _: float(len(episode.turns)), (0, math.inf)),
    "tool_calls": (lambda episode, _: float(sum(turn.tool_called for turn in episode.turns)), (0, math.inf)),
    "seconds": (lambda _, seconds: seconds, (0, math.inf)),
}


def record_of(recipe: Recipe, ran: Sequence[Ran], left: Sequence[Left]) -> dict[str, Any]:
    """All of result.json but where it comes from."""
    if recipe.kind == "rewards":
        from medseg_gym.bench.recipe_rewards import reward_rows

        rows, overall = reward_rows(ran), []
    else:
        rows, overall = _rows(recipe, ran), _overall(recipe, ran)
    return {**told(recipe), "rows": rows, "overall": overall, "not_run": not_run(left, len(ran) + len(left))}


def told(recipe: Recipe) -> dict[str, Any]:
    """What a record says before anything was run."""
    return {
        "title": recipe.title,
        "about": recipe.about,
        "differs": recipe.differs,
        "kind": recipe.kind,
        "columns": list(recipe.columns),
        "reported": [
            {name: value if name != "metrics" else dict(row.metrics) for name, value in asdict(row).items()}
            for printed in recipe.printed
            for row in printed.rows()
        ],
    }


def labels(one: Ran) -> dict[str, Any]:
    """What a row says of its arm before any number."""
    entry = one.arm.entry
    return {
        "dataset": entry.dataset,
        "modality": entry.modality,
        "tool": entry.tool,
        "setting": one.arm.setting,
        "policy": one.episodes[0].policy,
        "horizon": entry.horizon,
        "cases": len(one.episodes),
        "patients": len({patient(episode) for episode in one.episodes}),
        "failed": sum(episode.ended in ("failed", "unreadable") for episode in one.episodes),
    }


def patient(episode: Episode) -> str:
    """Whose the case is; one that could not be read is its own."""
    return episode.patient or episode.key


def estimate(found: Interval, digits: int = 4) -> dict[str, Any]:
    """An interval as JSON; low and high are None for one patient."""
    low, high = (None if end is None else round(end, digits) for end in (found.low, found.high))
    return {"mean": round(found.mean, digits), "low": low, "high": high}


def mean_of(
    values: Sequence[float], episodes: Sequence[Episode], bounds: tuple[float, float] | None = None
) -> dict[str, Any]:
    """The mean of one number a case with its interval, clustered by patient."""
    return estimate(interval(values, [patient(e) for e in episodes], _rng(), bounds=bounds))


def paired(values: Sequence[float], others: Sequence[float], episodes: Sequence[Episode]) -> dict[str, Any]:
    """The mean of values - others over the same cases, with its interval."""
    keys: list[Hashable] = [episode.key for episode in episodes]
    whose: dict[Hashable, str] = {episode.key: patient(episode) for episode in episodes}
    mine, theirs = dict(zip(keys, values, strict=True)), dict(zip(keys, others, strict=True))
    return estimate(difference(mine, theirs, whose, _rng()).interval)


def _rows(recipe: Recipe, ran: Sequence[Ran]) -> list[dict[str, Any]]:
    first: dict[tuple[str, str], Ran] = {}
    rows = []
    for one in ran:
        measured = {
            name: mean_of([measure(e, s) for e, s in zip(one.episodes, one.seconds, strict=True)], one.episodes, bounds)
            for name, (measure, bounds) in MEASURES.items()
            if name in recipe.columns
        }
        against = first.setdefault((one.arm.entry.dataset, one.arm.entry.tool), one)
        rows.append({**labels(one), **measured, "difference": _difference(one, against)})
    return rows


def _difference(one: Ran, other: Ran) -> dict[str, Any] | None:
    """Of final IoU to the first arm on the same dataset and tool; None for that arm itself."""
    if one is other:
        return None
    iou = MEASURES["iou"][0]
    mine, theirs = ([iou(e, 0.0) for e in each.episodes] for each in (one, other))
    return {"to": other.arm.setting, **paired(mine, theirs, one.episodes)}


def _overall(recipe: Recipe, ran: Sequence[Ran]) -> list[dict[str, Any]]:
    """Dice and IoU over the real datasets as the papers average: dataset -> modality -> all; where there are two."""
    groups: dict[tuple[str, str], list[Ran]] = defaultdict(list)
    for one in ran:
        if one.arm.entry.dataset != "Phantom":
            groups[one.arm.entry.tool, one.arm.setting].append(one)
    rows = []
    for (tool, setting), members in groups.items():
        if len(members) < 2:
            continue
        modality = {one.arm.entry.dataset: one.arm.entry.modality for one in members}
        row: dict[str, Any] = {"tool": tool, "setting": setting, "datasets": list(modality)}
        for name in ("dice", "iou"):
            scores = {
                one.arm.entry.dataset: Scores(
                    [MEASURES[name][0](e, 0.0) for e in one.episodes], [patient(e) for e in one.episodes]
                )
                for one in members
            }
            row[name] = estimate(averages(scores, modality, _rng(), bounds=(0, 1)).overall)
        rows.append(row)
    return rows


def not_run(left: Sequence[Left], arms: int) -> dict[str, Any]:
    """What was not played and what it lacks; equal on every machine that lacks the same."""
    return {
        "arms": len(left),
        "of": arms,
        "tools": list(dict.fromkeys(name for one in left for name in one.tools)),
        "datasets": list(dict.fromkeys(name for one in left for name in one.datasets)),
        "agent": any(one.agent for one in left),
    }


def _rng() -> np.random.Generator:
    """A fresh one an interval, so that no number hangs on what was computed before it."""
    return np.random.default_rng(0)
