"""What a leaderboard says of an agent beside its means: NoC with NoF, and its regret against the oracle ceiling."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medseg_gym import metrics
from medseg_gym.bench.statistics import RESAMPLES, Interval, clusters_of_ratio, differences, interval, weighted_interval
from medseg_gym.errors import MedSegError

Curve = Sequence[float]  # T + 1 values of IoU, the first before any action (bench.summary.curves)


@dataclass(frozen=True, slots=True)
class Clicks:
    """NoC and NoF at one quality; `noc` is over the `reached` episodes only, None where none reaches it."""

    quality: float
    noc: float | None
    reached: int
    nof: Interval


@dataclass(frozen=True, slots=True)
class Regret:
    """Oracle minus agent: the mean over actions 1..K with its interval, and the mean regret after each action."""

    mean: Interval
    at: tuple[float, ...]  # K values


def clicks(
    curves: Sequence[Curve],
    patients: Sequence[str],
    quality: float,
    rng: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Clicks:
    """Number of clicks to reach an IoU, with the share of episodes that never do; "never" enters no mean."""
    found = [metrics.noc(curve, quality) for curve in curves]
    reached = [n for n in found if n is not None]
    never = [float(n is None) for n in found]
    nof = interval(never, patients, rng, resamples=resamples, bounds=(0, 1))
    return Clicks(quality, float(np.mean(reached)) if reached else None, len(reached), nof)


def clicks_of_both(
    first: Mapping[Hashable, Curve], second: Mapping[Hashable, Curve], quality: float
) -> tuple[float, float, int] | None:
    """Two agents' mean NoC over the cases that both bring to `quality`, and how many; None where there is none.

    The only fair comparison of two NoCs: each agent's own mean is over other, for a weak agent easier, cases.
    """
    pairs = [(metrics.noc(first[c], quality), metrics.noc(second[c], quality)) for c in first if c in second]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not both:
        return None
    return float(np.mean([a for a, _ in both])), float(np.mean([b for _, b in both])), len(both)


def correspondence(
    counts: Sequence[tuple[int, int]],
    patients: Sequence[str],
    rng: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Interval:
    """F1 of mask-to-entity correspondence with its interval, from one metrics.entity_counts a case.

    F1 is a ratio of sums, not a mean over cases; patients are resampled, or left out, just as for a mean.
    """
    group = clusters_of_ratio([m for m, _ in counts], [n for _, n in counts], patients)
    found = weighted_interval([group], [1.0], rng, resamples=resamples, bounds=(0, 1))
    return replace(found, cases=len(counts))


def ceiling(oracles: Mapping[str, Mapping[Hashable, Curve]], horizon: int) -> str:
    """The oracle that is the ceiling of a tool on some cases: of the oracles' curves by case, the largest mean auc.

    One oracle for all cases, so that it is a policy that exists; ties go to the first name. In a single case an
    agent, or another oracle, may be better. No oracle raises MedSegError.
    """
    if not oracles:
        raise MedSegError("no oracle played these cases; add one to the run: --policy OracleBoxThenClicks")
    mean = {
        name: np.mean([metrics.auc(curve, horizon) for curve in curves.values()]) for name, curves in oracles.items()
    }
    return min(mean, key=lambda name: (-mean[name], name))


def regret(
    agent: Mapping[Hashable, Curve],
    oracle: Mapping[Hashable, Curve],
    patients: Mapping[Hashable, str],
    horizon: int,
    rng: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Regret:
    """Regret per action against an oracle on the same cases: mean over k = 1..horizon of its IoU@k minus the agent's.

    An ended episode keeps its last IoU; this is metrics.regret, auc(oracle) - auc(agent), in [-1, 1]; negative where
    the agent is the better. Different cases raise MedSegError, naming them.
    """
    area = {case: metrics.auc(curve, horizon) for case, curve in agent.items()}
    above = {case: metrics.auc(curve, horizon) for case, curve in oracle.items()}
    scores = differences(above, area, patients)
    after = [
        float(np.mean([metrics.at_action(oracle[case], k) - metrics.at_action(agent[case], k) for case in agent]))
        for k in range(1, horizon + 1)
    ]
    return Regret(interval(scores.values, scores.patients, rng, resamples=resamples, bounds=(-1, 1)), tuple(after))
