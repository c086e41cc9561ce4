"""The averaging chain, the interquartile mean and ranks: worked by hand, as properties, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medseg_gym.bench.statistics import Interval, Scores, interval
from medseg_gym.bench.statistics_tables import averages, interquartile_mean, iqm, ranks
from medseg_gym.errors import MedSegError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scores(values, cases: int = 1) -> Scores:  # type: ignore[no-untyped-def]
    """One patient after the other, each with so many cases."""
    return Scores(list(values), [f"p{i // cases}" for i in range(len(values))])


THREE = {"BTCV": scores([0.7, 0.9]), "MSDLiver": scores([0.5, 0.6, 0.7]), "PROMISE": scores([0.1, 0.3])}
MODALITY = {"BTCV": "CT", "MSDLiver": "CT", "PROMISE": "MR"}


def test_every_mean_of_the_chain_is_unweighted() -> None:
    """CT: (.8 + .6) / 2 = .7; overall: (.7 + .2) / 2 = .45, where the mean over datasets would be .533."""
    found = averages(THREE, MODALITY, rng())
    assert {name: i.mean for name, i in found.datasets.items()} == pytest.approx(
        {"BTCV": 0.8, "MSDLiver": 0.6, "PROMISE": 0.2}
    )
    assert {name: i.mean for name, i in found.modalities.items()} == pytest.approx({"CT": 0.7, "MR": 0.2})
    assert found.overall.mean == pytest.approx(0.45)
    assert (found.overall.cases, found.overall.patients) == (7, 7)


def test_an_average_of_few_patients_agrees_with_welch() -> None:
    """Half the sum of two datasets' means: half of Welch's interval of a - (-b)."""
    a, b = rng(1).random(6), rng(2).random(9)
    welch = stats.ttest_ind(a, -b, equal_var=False).confidence_interval()
    overall = averages({"a": scores(a), "b": scores(b)}, {"a": "CT", "b": "MR"}, rng()).overall
    assert overall.method == "t"
    assert (overall.low, overall.high) == pytest.approx((welch.low / 2, welch.high / 2))


@pytest.mark.parametrize("patients", [1, 6, 60])
def test_one_dataset_is_its_own_average(patients: int) -> None:
    one = scores(rng(3).random(3 * patients), cases=3)
    found = averages({"a": one}, {"a": "CT"}, rng(), resamples=200, bounds=(0, 1))
    assert found.overall == found.datasets["a"] == found.modalities["CT"]
    assert found.overall == interval(one.values, one.patients, rng(), resamples=200, bounds=(0, 1))


def test_the_bootstrap_is_for_averages_of_large_datasets_only() -> None:
    large, small = scores(rng(4).random(60)), scores(rng(5).random(6))
    both = averages({"a": large, "b": small}, {"a": "CT", "b": "MR"}, rng(), resamples=100)
    assert (both.modalities["CT"].method, both.modalities["MR"].method, both.overall.method) == ("bootstrap", "t", "t")
    assert (both.modalities["CT"].few_patients, both.overall.few_patients) == (False, True)
    assert (
        averages({"a": large, "b": large}, {"a": "CT", "b": "MR"}, rng(), resamples=100).overall.method == "bootstrap"
    )


def test_the_bootstrap_of_an_average_has_the_width_of_independent_datasets() -> None:
    """Two datasets of 100 patients, weights 1/2: half of the root of the summed squared errors, times 2 * 1.96."""
    a, b = rng(6).random(100), rng(7).random(100)
    found = averages({"a": scores(a), "b": scores(b)}, {"a": "CT", "b": "CT"}, rng()).overall
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(1.96 * np.hypot(stats.sem(a), stats.sem(b)), rel=0.03)


def test_an_average_with_a_dataset_of_one_patient_has_no_interval() -> None:
    found = averages({"a": scores([0.5, 0.7]), "b": scores([0.4])}, {"a": "CT", "b": "MR"}, rng())
    assert found.datasets["a"].low is not None
    assert (found.overall.low, found.overall.high, found.overall.method) == (None, None, "none")


def test_the_order_of_the_datasets_does_not_matter() -> None:
    data = {name: scores(rng(i).random(50)) for i, name in enumerate("abc")}
    kinds = {"a": "CT", "b": "MR", "c": "CT"}
    turned = dict(reversed(data.items()))
    assert averages(data, kinds, rng(), resamples=100) == averages(turned, kinds, rng(), resamples=100)
    assert iqm(data, rng(), resamples=100) == iqm(turned, rng(), resamples=100)


def test_nothing_to_average_and_unknown_modalities_are_refused() -> None:
    with pytest.raises(MedSegError, match="no dataset"):
        averages({}, {}, rng())
    with pytest.raises(MedSegError, match="no dataset"):
        iqm({}, rng())
    with pytest.raises(MedSegError, match="no modality for BTCV, PROMISE"):
        averages(THREE, {"MSDLiver": "CT", "PROMISE": ""}, rng())


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([100, 0, 6, 1, 2, 5, 3, 4], 3.5),  # 0, 1 and 6, 100 left out
        ([0, 1, 2, 30, 400], 11),  # floor(5 / 4) = 1 from each end
        ([0, 1, 5], 2),  # too few to leave any out
        ([0.3], 0.3),
    ],
)
def test_interquartile_mean_by_hand(values: list[float], mean: float) -> None:
    assert interquartile_mean(values) == pytest.approx(mean)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=25))
def test_interquartile_mean_agrees_with_scipy(values: list[float]) -> None:
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25))


def test_iqm_is_over_datasets() -> None:
    """Means .1, .5, .6, .9: the middle two give .55, however many cases the datasets have."""
    data = {"a": scores([0.0, 0.2]), "b": scores([0.4, 0.5, 0.6]), "c": scores([0.5, 0.7] * 9), "d": scores([0.9, 0.9])}
    found = iqm(data, rng(), resamples=200)
    assert found.mean == pytest.approx(0.55)
    assert found.low is not None and found.high is not None and found.low < 0.55 < found.high
    assert (found.cases, found.patients, found.few_patients) == (25, 25, True)
    assert iqm({**data, "e": scores([0.4])}, rng()).method == "none"


def test_iqm_draws_one_patient_less_than_there_are() -> None:
    """5 of 10 patients score 1: a resample of 9 sums to binomial(9, 1/2), whose 2.5 and 97.5 % points are 2 and 7."""
    found = iqm({"a": scores([0, 1] * 5)}, rng())
    assert (found.low, found.high) == pytest.approx((2 / 9, 7 / 9))


def span(low: float | None, high: float | None) -> Interval:
    mean = 0.5 if low is None or high is None else (low + high) / 2
    return Interval(mean, low, high, 10, 10, "t", False)


def test_ranks_tie_where_intervals_overlap() -> None:
    """A and B overlap, B and C overlap, A lies wholly above C and D, B above D: ranks 1, 1, 2, 3."""
    agents = {"D": span(0.1, 0.45), "C": span(0.4, 0.6), "B": span(0.5, 0.85), "A": span(0.8, 0.9)}
    assert ranks(agents) == {"A": 1, "B": 1, "C": 2, "D": 3}
    assert list(ranks(agents)) == ["A", "B", "C", "D"]


def test_intervals_that_touch_overlap() -> None:
    assert ranks({"a": span(0.5, 0.6), "b": span(0.6, 0.7)}) == {"b": 1, "a": 1}


def test_lower_can_be_better() -> None:
    agents = {"a": span(1, 2), "b": span(3, 4), "c": span(3.5, 5)}
    assert list(ranks(agents, higher_is_better=False).items()) == [("a", 1), ("b", 2), ("c", 2)]


def test_an_agent_without_interval_ties_with_all() -> None:
    assert ranks({"a": span(0.8, 0.9), "b": span(0.1, 0.2), "c": span(None, None)}) == {"a": 1, "c": 1, "b": 2}


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_ranks_never_contradict_the_intervals(pairs: list[tuple[float, float]]) -> None:
    agents = {f"agent {i}": span(*sorted(pair)) for i, pair in enumerate(pairs)}
    found = ranks(agents)
    for one, a in agents.items():
        for other, b in agents.items():
            assert a.low is not None and b.high is not None
            if a.low > b.high:
                assert found[one] < found[other]
            elif found[one] == found[other]:
                assert b.low is not None and a.high is not None and b.low <= a.high


@pytest.mark.slow
@pytest.mark.parametrize("which", ["chain", "iqm"])
def test_averages_over_datasets_of_5_patients_cover_95_per_cent(which: str) -> None:
    """12 datasets of 5 patients and 4 cases, in 4 modalities; the datasets' own means are .3, .35, ... .85."""
    generator = rng(14)
    truths = 0.3 + 0.05 * np.arange(12)
    names = [f"d{i:02}" for i in range(12)]
    modality = {name: f"m{i % 4}" for i, name in enumerate(names)}
    wanted = {"chain": truths.mean(), "iqm": truths[3:9].mean()}[which]
    hits = 0
    for _ in range(600):
        patients = generator.normal(truths[:, None], 0.05, (12, 5))
        values = generator.normal(np.repeat(patients, 4, axis=1), 0.05)
        data = {name: scores(v, cases=4) for name, v in zip(names, values, strict=True)}
        found = averages(data, modality, generator).overall if which == "chain" else iqm(data, generator, resamples=400)
        assert found.low is not None and found.high is not None
        hits += found.low <= wanted <= found.high
    assert 0.92 <= hits / 600 <= 0.98
