"""From datasets to one line of a leaderboard: the averaging chain, the interquartile mean, and ranks that tie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg_gym.bench.statistics import (
    BOOTSTRAP_FROM,
    FEW_PATIENTS,
    LEVEL,
    RESAMPLES,
    Floats,
    Interval,
    Scores,
    clusters,
    resample,
    weighted_interval,
)
from medseg_gym.errors import MedSegError


@dataclass(frozen=True, slots=True)
class Averages:
    """An agent's means at every level of the chain, with intervals; names are sorted."""

    datasets: Mapping[str, Interval]
    modalities: Mapping[str, Interval]
    overall: Interval


def averages(
    scores: Mapping[str, Scores],
    modality: Mapping[str, str],
    rng: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
    bounds: tuple[float, float] | None = None,
) -> Averages:
    """case -> dataset -> modality -> overall, every mean unweighted (the tables of MedSAM-Agent).

    `scores` and `modality` are by dataset. The cases of one tool only: several tools see the same patients, whose
    scores are then not independent. No dataset, or a dataset without a modality, raises MedSegError.
    """
    if not scores:
        raise MedSegError("no dataset to average; wanted the scores of at least one")
    unknown = sorted(name for name in scores if not modality.get(name))
    if unknown:
        raise MedSegError(f"no modality for {', '.join(unknown)}; name one for every dataset")
    groups = {name: clusters(*scores[name]) for name in sorted(scores)}
    members: dict[str, list[str]] = defaultdict(list)
    for name in groups:
        members[modality[name]].append(name)

    # Drawn once for all levels, which are the same patients: it is most of the work.
    drawn = {name: resample(g, resamples, rng) if g.count >= BOOTSTRAP_FROM else None for name, g in groups.items()}

    def over(weights: Mapping[str, float]) -> Interval:
        return weighted_interval(
            [groups[name] for name in weights],
            list(weights.values()),
            rng,
            resamples=resamples,
            bounds=bounds,
            drawn=[drawn[name] for name in weights],
        )

    return Averages(
        datasets={name: over({name: 1.0}) for name in groups},
        modalities={kind: over({name: 1 / len(members[kind]) for name in members[kind]}) for kind in sorted(members)},
        overall=over({name: 1 / (len(members) * len(members[modality[name]])) for name in groups}),
    )


def interquartile_mean(values: Sequence[float] | Floats, axis: int = -1) -> Floats:
    """The mean along an axis without the lowest and the highest floor(D / 4) of D values; of up to 3, the mean."""
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=axis)
    cut = ordered.shape[axis] // 4
    return np.asarray(np.take(ordered, np.arange(cut, ordered.shape[axis] - cut), axis=axis).mean(axis=axis))


def iqm(
    scores: Mapping[str, Scores],
    rng: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Interquartile mean over the datasets' means, with the 95 % interval of a stratified bootstrap over patients.

    Of G patients of a dataset G - 1 are drawn, which makes the variance of few patients right in the mean (Rao and
    Wu 1988). The datasets are fixed: the interval speaks of other patients, not of other datasets.
    """
    if not scores:
        raise MedSegError("no dataset to average; wanted the scores of at least one")
    strata = [clusters(*scores[name]) for name in sorted(scores)]
    fewest = min(group.count for group in strata)
    low: float | None = None
    high: float | None = None
    if fewest > 1:
        drawn = np.stack([resample(group, resamples, rng, draws=group.count - 1) for group in strata])
        quantiles = np.quantile(interquartile_mean(drawn, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        low, high = (float(q) for q in quantiles)
        if bounds is not None:
            low, high = max(low, float(bounds[0])), min(high, float(bounds[1]))
    return Interval(
        float(interquartile_mean([group.mean for group in strata])),
        low,
        high,
        cases=int(sum(group.sizes.sum() for group in strata)),
        patients=sum(group.count for group in strata),
        method="none" if fewest == 1 else "bootstrap",
        few_patients=fewest < FEW_PATIENTS,
    )


def ranks(intervals: Mapping[str, Interval], *, higher_is_better: bool = True) -> dict[str, int]:
    """Rank = 1 + the number of agents whose interval lies wholly on the better side; best rank first, then by mean.

    Agents of equal rank always overlap, and an agent wholly above another always ranks before it. Overlapping agents
    may differ in rank, where only one of them is below a third. Without an interval an agent overlaps with all.
    """
    sign = 1 if higher_is_better else -1

    def ends(found: Interval) -> tuple[float, float]:
        if found.low is None or found.high is None:
            return -np.inf, np.inf
        return (found.low, found.high) if higher_is_better else (-found.high, -found.low)

    spans = {name: ends(found) for name, found in intervals.items()}
    rank = {name: 1 + sum(low > high for low, _ in spans.values()) for name, (_, high) in spans.items()}
    return dict(sorted(rank.items(), key=lambda item: (item[1], -sign * intervals[item[0]].mean, item[0])))
