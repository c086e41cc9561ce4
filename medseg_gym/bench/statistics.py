"""Intervals of a mean over cases that cluster by patient, and of the paired difference between two agents."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medseg_gym.errors import MedSegError

LEVEL = 0.95
RESAMPLES = 10_000
BOOTSTRAP_FROM = 40  # patients; with 4 or 5 the percentile bootstrap covers 81 to 84 %, from 40 on what it says
FEW_PATIENTS = 8  # an interval from fewer is flagged

Floats = NDArray[np.float64]
Method = Literal["bootstrap", "t", "none"]


class Scores(NamedTuple):
    """One agent's score on every case of one dataset, and whose case it is: two sequences of equal length."""

    values: Sequence[float] | Floats
    patients: Sequence[str]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over cases and its 95 % interval; low and high are None where there is only one patient."""

    mean: float
    low: float | None
    high: float | None
    cases: int
    patients: int
    method: Method
    few_patients: bool  # fewer than 8 in all, or in one of the datasets that were averaged


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of (first - second) over the cases both played; `p` is two-sided, None where there is no interval."""

    interval: Interval
    p: float | None


@dataclass(frozen=True, slots=True)
class Clusters:
    """Cases added up per patient, in the order of their names: (G,) sums of scores and (G,) numbers of cases."""

    sums: Floats
    sizes: Floats

    @property
    def count(self) -> int:
        return len(self.sums)

    @property
    def mean(self) -> float:
        """The mean over cases."""
        return float(ratio(self.sums.sum(), self.sizes.sum()))


def interval(
    values: Sequence[float] | Floats,
    patients: Sequence[str],
    rng: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """The mean over cases with its 95 % interval, clustered by patient; the order of the cases does not matter.

    From 40 patients on the percentile bootstrap over patients, below that the cluster t interval (jackknife over
    patients, G - 1 degrees of freedom), below 8 flagged. `bounds` cuts the interval to what the score can be, (0, 1)
    for overlaps. One patient has no interval; patients who all score alike have one of width 0.
    No case, a score that is not finite, or patients of another number than values raise MedSegError.
    """
    return weighted_interval([clusters(values, patients)], [1.0], rng, resamples=resamples, bounds=bounds)


def difference(
    first: Mapping[Hashable, float],
    second: Mapping[Hashable, float],
    patients: Mapping[Hashable, str],
    rng: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Difference:
    """The paired difference first - second of two agents' scores by case, clustered by patient as in `interval`.

    `p` is that of the t test below 40 patients; from 40 on twice the smaller share of resamples on one side of 0,
    itself counted among them, so it is never 0. Two agents that score alike in every case have p = 1.
    Agents that played different cases raise MedSegError, naming the cases.
    """
    scores = differences(first, second, patients)
    return Difference(*_estimate([clusters(*scores)], [1.0], rng, resamples, None))


def differences(
    first: Mapping[Hashable, float], second: Mapping[Hashable, float], patients: Mapping[Hashable, str]
) -> Scores:
    """first - second by case, as Scores: what `averages` takes for a paired difference over many datasets.

    Different cases, or a case without a patient, raise MedSegError that names them.
    """
    for name, other, absent in (("second", first, second), ("first", second, first)):
        missing = [str(case) for case in other if case not in absent]
        if missing:
            raise MedSegError(
                f"the {name} agent has no score for {_some(missing)}; a paired difference needs the same cases: "
                "evaluate both with the same suite, cases and seed"
            )
    missing = [str(case) for case in first if case not in patients]
    if missing:
        raise MedSegError(f"no patient for {_some(missing)}; give one for every case")
    cases = list(first)
    return Scores([first[case] - second[case] for case in cases], [patients[case] for case in cases])


def clusters(values: Sequence[float] | Floats, patients: Sequence[str]) -> Clusters:
    """Scores added up per patient; raises as `interval` does."""
    return clusters_of_ratio(values, np.ones(len(values)), patients)


def clusters_of_ratio(
    values: Sequence[float] | Floats, sizes: Sequence[float] | Floats, patients: Sequence[str]
) -> Clusters:
    """Numerators and denominators added up per patient, for a score that is the ratio of both sums; raises alike."""
    scores, weights = np.asarray(values, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise MedSegError(f"scores of shape {scores.shape}; wanted one for each of at least one case")
    if len(patients) != len(scores):
        raise MedSegError(f"{len(patients)} patients for {len(scores)} scores; wanted one for every score")
    if not np.isfinite(scores).all():
        raise MedSegError("a score is not finite; failed episodes count as 0, and empty masks have their own rule")
    names, of_case = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    order = np.lexsort((scores, of_case))  # sums then do not depend on the order of the cases, to the last bit
    of_case, scores, weights = of_case[order], scores[order], weights[order]
    return Clusters(_totals(of_case, scores, len(names)), _totals(of_case, weights, len(names)))


def _totals(group: NDArray[np.intp], values: Floats, groups: int) -> Floats:
    """(groups,) sums of the values of each group."""
    return np.bincount(group, weights=values, minlength=groups).astype(np.float64)


def weighted_interval(
    strata: Sequence[Clusters],
    weights: Sequence[float],
    rng: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
    bounds: tuple[float, float] | None = None,
    drawn: Sequence[Floats | None] | None = None,
) -> Interval:
    """Of a weighted sum of datasets' means, patients being independent within and between datasets.

    Bootstrap (resampled within each dataset) where every dataset has 40 patients, else t with Welch and
    Satterthwaite's degrees of freedom. No interval where a dataset has one patient only. `drawn` gives the datasets'
    resampled means where they are there already; a dataset of fewer than 40 patients needs none.
    """
    return _estimate(strata, weights, rng, resamples, bounds, drawn)[0]


def _estimate(
    strata: Sequence[Clusters],
    weights: Sequence[float],
    rng: np.random.Generator,
    resamples: int,
    bounds: tuple[float, float] | None,
    drawn: Sequence[Floats | None] | None = None,
) -> tuple[Interval, float | None]:
    """The interval, and the two-sided p of a mean of 0."""
    share = np.asarray(weights, dtype=np.float64)
    mean = float(share @ [group.mean for group in strata])
    fewest = min(group.count for group in strata)
    low: float | None
    high: float | None
    p: float | None
    method: Method
    if fewest == 1:
        method, low, high, p = "none", None, None, None
    elif fewest >= BOOTSTRAP_FROM:
        method = "bootstrap"
        means = np.zeros(resamples)
        for weight, group, ready in zip(share, strata, drawn or [None] * len(strata), strict=True):
            means += weight * (resample(group, resamples, rng) if ready is None else ready)
        low, high = (float(q) for q in np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        side = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
        p = min(1.0, 2 * (int(side) + 1) / (resamples + 1))
    else:
        method = "t"
        parts = share**2 * [squared_error(group) for group in strata]
        total = float(parts.sum())
        low, high, p = mean, mean, float(mean == 0)
        if total > 0:
            from scipy import stats

            freedom = total**2 / (parts**2 / [group.count - 1 for group in strata]).sum()
            reach = float(stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(total))
            low, high = mean - reach, mean + reach
            p = float(2 * stats.t.sf(abs(mean) / np.sqrt(total), freedom))
    if bounds is not None and low is not None and high is not None:
        low, high = max(low, float(bounds[0])), min(high, float(bounds[1]))
    found = Interval(
        mean,
        low,
        high,
        cases=int(sum(group.sizes.sum() for group in strata)),
        patients=sum(group.count for group in strata),
        method=method,
        few_patients=fewest < FEW_PATIENTS,
    )
    return found, p


def squared_error(group: Clusters) -> float:
    """The mean's squared standard error: the jackknife over patients (at least two).

    With equally many cases a patient it is the variance of the patients' means over their number.
    """
    rest = ratio(group.sums.sum() - group.sums, group.sizes.sum() - group.sizes)
    return float((group.count - 1) / group.count * np.square(rest - group.mean).sum())


def resample(group: Clusters, resamples: int, rng: np.random.Generator, *, draws: int | None = None) -> Floats:
    """(resamples,) means over the cases of as many patients as there are (or `draws`), drawn with replacement."""
    draws = group.count if draws is None else draws
    means = np.empty(resamples)
    block = max(1, 2_000_000 // draws)  # 16 MB of indices at a time
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = rng.integers(0, group.count, (stop - start, draws))
        means[start:stop] = ratio(group.sums[drawn].sum(axis=1), group.sizes[drawn].sum(axis=1))
    return means


def ratio(sums: Floats, sizes: Floats) -> Floats:
    """Means from sums and sizes; of nothing it is 1, which only F1 meets (an agent rightly silent everywhere)."""
    return np.divide(sums, sizes, out=np.ones_like(sizes), where=sizes > 0)


def _some(names: Sequence[str]) -> str:
    """Names for an error: five, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
