"""What a leaderboard's figures show of each agent: quality after k actions, and what its k-th turn gained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg_gym import metrics
from medseg_gym.bench.leaderboard_read import Case, Played
from medseg_gym.bench.leaderboard_records import Results, Table

DONE = ("stop", "answer")  # actions that end an episode and leave the mask as it is
SMALL = 0.01  # of IoU: a turn that changes less has left the mask as it was


@dataclass(frozen=True, slots=True)
class Gain:
    """The k-th turn of an agent's episodes, after MedSAM-Agent's Fig. 3; every number counts episodes.

    `reached` took a k-th action other than stop; they are `better`, `same` or `worse` by it (by more than SMALL, or
    not). `stopped` stopped there, the others had ended before.
    """

    turn: int
    reached: int
    better: int
    same: int
    worse: int
    stopped: int
    mean: float | None  # IoU gained by those that reached it; None where none did


@dataclass(frozen=True, slots=True)
class Turns:
    """One agent's curves, averaged as the table's scores are, and its turns, pooled over all cases."""

    tool: str
    policy: str
    episodes: int
    iou_at: tuple[float, ...]  # horizon + 1 values, the first before any action
    dice_at: tuple[float, ...]
    gains: tuple[Gain, ...]  # up to the last turn that an episode took


def turns_of(results: Results, table: Table) -> tuple[Turns, ...]:
    """The agents of a table, in its order."""
    runs: dict[tuple[str, str], list[Played]] = defaultdict(list)
    for run in results.runs:
        if run.entry.group == table.group:
            runs[run.entry.tool, run.policy].append(run)
    horizon = max(run.entry.horizon for of_agent in runs.values() for run in of_agent)
    return tuple(_turns(row.tool, row.policy, runs[row.tool, row.policy], table, horizon) for row in table.rows)


def _turns(tool: str, policy: str, runs: Sequence[Played], table: Table, horizon: int) -> Turns:
    cases: dict[str, list[Case]] = defaultdict(list)
    for run in runs:
        cases[run.entry.title] += run.cases.values()
    every = [case for of_dataset in cases.values() for case in of_dataset]
    return Turns(
        tool=tool,
        policy=policy,
        episodes=len(every),
        iou_at=tuple(
            _after(k, {name: [c.iou for c in found] for name, found in cases.items()}, table) for k in _to(horizon)
        ),
        dice_at=tuple(
            _after(k, {name: [c.dice for c in found] for name, found in cases.items()}, table) for k in _to(horizon)
        ),
        gains=tuple(_gain(k, every) for k in range(1, max((len(case.kinds) for case in every), default=0) + 1)),
    )


def _to(horizon: int) -> Iterable[int]:
    return range(horizon + 1)


def _after(k: int, curves: Mapping[str, Sequence[Sequence[float]]], table: Table) -> float:
    """The mean after k actions: case -> dataset -> modality -> overall."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, of_dataset in curves.items():
        kinds[table.modality[name]].append(float(np.mean([metrics.at_action(curve, k) for curve in of_dataset])))
    return float(np.mean([np.mean(of_kind) for of_kind in kinds.values()]))


def _gain(turn: int, cases: Sequence[Case]) -> Gain:
    """A failed or unreadable episode counts 0 throughout, so its turns gain nothing."""
    took = [case for case in cases if len(case.kinds) >= turn]
    stopped = sum(case.kinds[turn - 1] in DONE for case in took)
    change = [case.iou[turn] - case.iou[turn - 1] for case in took if case.kinds[turn - 1] not in DONE]
    better, worse = sum(c > SMALL for c in change), sum(c < -SMALL for c in change)
    return Gain(
        turn=turn,
        reached=len(change),
        better=better,
        same=len(change) - better - worse,
        worse=worse,
        stopped=stopped,
        mean=float(np.mean(change)) if change else None,
    )
