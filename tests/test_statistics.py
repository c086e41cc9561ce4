"""Intervals clustered by patient and paired differences: worked by hand, against SciPy, and the degenerate cases."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from medseg_gym.bench import statistics
from medseg_gym.bench.statistics import Interval, difference, differences, interval
from medseg_gym.errors import MedSegError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_cluster_t_by_hand() -> None:
    """Patients' means .4, .6, .8, two cases each: s = .2, error = .2 / sqrt(3) = .11547, t(2) = 4.30265."""
    found = interval([0.3, 0.5, 0.6, 0.6, 0.7, 0.9], list("aabbcc"), rng())
    assert found.mean == pytest.approx(0.6)
    assert (found.low, found.high) == pytest.approx((0.6 - 0.496827, 0.6 + 0.496827), abs=1e-6)
    assert (found.cases, found.patients, found.method, found.few_patients) == (6, 3, "t", True)


def test_bounds_cut_the_interval() -> None:
    found = interval([0.3, 0.5, 0.6, 0.6, 0.7, 0.9], list("aabbcc"), rng(), bounds=(0.2, 1))
    assert (found.low, found.high) == (0.2, 1.0)
    assert type(found.high) is float


def test_patients_with_more_cases_weigh_more() -> None:
    """(1, 1) and (0): mean 2/3; left out, 0 and 1 remain: squared error 1/2 (4/9 + 1/9) = 5/18, t(1) = 12.7062."""
    found = interval([1, 1, 0], ["a", "a", "b"], rng())
    assert found.mean == pytest.approx(2 / 3)
    assert found.high == pytest.approx(2 / 3 + 12.7062 * (5 / 18) ** 0.5, rel=1e-5)


def test_one_case_a_patient_is_the_usual_t_interval() -> None:
    values = rng(3).random(12)
    usual = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    found = interval(values, [f"p{i}" for i in range(12)], rng())
    assert (found.low, found.high) == pytest.approx(usual)


def test_bootstrap_by_hand() -> None:
    """20 of 40 patients score 1: a resample's sum is binomial(40, 1/2), whose 2.5 and 97.5 % points are 14 and 26."""
    found = interval([0, 1] * 20, [f"p{i}" for i in range(40)], rng())
    assert (found.low, found.high) == (14 / 40, 26 / 40)
    assert found.method == "bootstrap"


def test_repeating_a_patients_cases_adds_nothing() -> None:
    values, patients = [0, 1] * 20, [f"p{i}" for i in range(40)]
    once, thrice = interval(values, patients, rng()), interval(values * 3, patients * 3, rng())
    assert (once.low, once.high) == (thrice.low, thrice.high)
    alone = interval(values * 3, [f"p{i}" for i in range(120)], rng())  # as if they were other patients: too narrow
    assert alone.high is not None and once.high is not None and alone.high < once.high


@pytest.mark.parametrize(
    ("patients", "method", "few"),
    [(2, "t", True), (7, "t", True), (8, "t", False), (39, "t", False), (40, "bootstrap", False)],
)
def test_the_method_hangs_on_the_number_of_patients(patients: int, method: str, few: bool) -> None:
    names = [f"p{i % patients}" for i in range(3 * patients)]
    found = interval(rng(1).random(3 * patients), names, rng(), resamples=50)
    assert (found.method, found.few_patients, found.patients) == (method, few, patients)


def test_one_patient_has_no_interval() -> None:
    found = interval([0.2, 0.4], ["a", "a"], rng(), bounds=(0, 1))
    assert (found.low, found.high, found.method, found.few_patients) == (None, None, "none", True)
    assert found.mean == pytest.approx(0.3)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


@pytest.mark.parametrize("patients", [5, 60])
def test_patients_who_all_score_alike_have_an_interval_of_width_0(patients: int) -> None:
    found = interval([0.5] * patients, [f"p{i}" for i in range(patients)], rng(), resamples=50)
    assert (found.low, found.mean, found.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("patients", [6, 60])
def test_the_order_of_the_cases_does_not_matter(patients: int) -> None:
    values, names = rng(2).random(200), np.array([f"p{i % patients}" for i in range(200)])
    order = rng(5).permutation(200)
    assert interval(values, list(names), rng(), resamples=200) == interval(
        values[order], list(names[order]), rng(), resamples=200
    )


def test_many_patients_are_resampled_in_blocks() -> None:
    """The blocks only bound the memory: all resamples are drawn, and look like the normal approximation."""
    values = rng(4).normal(size=5000)
    found = interval(values, [f"p{i}" for i in range(5000)], rng(), resamples=1000)
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 5000**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("values", "patients", "text"),
    [
        ([], [], "at least one case"),
        ([0.1, 0.2], ["a"], "1 patients for 2 scores"),
        ([0.1, float("nan")], ["a", "b"], "not finite"),
        ([[0.1], [0.2]], ["a", "b"], "shape"),
    ],
)
def test_what_is_no_score_is_refused(values, patients, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MedSegError, match=text):
        interval(values, patients, rng())


FIRST = {"c1": 0.9, "c2": 0.8, "c3": 0.5, "c4": 0.7}
SECOND = {"c1": 0.7, "c2": 0.7, "c3": 0.5, "c4": 0.4}
PATIENT = {case: f"of {case}" for case in FIRST}


def test_paired_difference_agrees_with_the_paired_t_test() -> None:
    test = stats.ttest_rel(list(FIRST.values()), list(SECOND.values()))
    found = difference(FIRST, SECOND, PATIENT, rng())
    assert found.interval.mean == pytest.approx(0.15)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(test.confidence_interval()))
    assert found.p == pytest.approx(test.pvalue)


def test_pairing_is_by_case_not_by_position() -> None:
    turned = dict(reversed(SECOND.items()))
    assert difference(FIRST, turned, PATIENT, rng()) == difference(FIRST, SECOND, PATIENT, rng())


def test_pairing_takes_out_what_the_cases_differ_by() -> None:
    """Both agents vary by .3 from case to case; that one is .1 better everywhere is certain all the same."""
    first = {i: float(v) for i, v in enumerate(rng(6).random(60))}
    second = {i: v - 0.1 for i, v in first.items()}
    found = difference(first, second, {i: f"p{i}" for i in first}, rng())
    assert (found.interval.low, found.interval.high) == pytest.approx((0.1, 0.1))
    assert found.p == pytest.approx(2 / 10_001)  # no resample on the other side of 0; the data are counted as one


@pytest.mark.parametrize("shift", np.linspace(-0.15, 0.15, 13))
@pytest.mark.parametrize("patients", [12, 50])
def test_p_is_below_5_per_cent_just_where_the_interval_leaves_0_out(shift: float, patients: int) -> None:
    gap = rng(7).normal(scale=0.3, size=patients)
    cases = {i: float(v) for i, v in enumerate(gap - gap.mean() + shift)}
    found = difference(cases, dict.fromkeys(cases, 0.0), {i: f"p{i}" for i in cases}, rng(), resamples=2000)
    low, high = found.interval.low, found.interval.high
    assert low is not None and high is not None and found.p is not None
    assert (found.p < 0.05) == (low > 0 or high < 0)


@pytest.mark.parametrize("patients", [5, 60])
def test_equal_agents_differ_by_nothing(patients: int) -> None:
    cases = {i: float(v) for i, v in enumerate(rng().random(patients))}
    found = difference(cases, cases, {i: f"p{i}" for i in cases}, rng(), resamples=50)
    assert (found.interval.low, found.interval.mean, found.interval.high, found.p) == (0, 0, 0, 1)


def test_a_difference_on_one_patient_has_no_p() -> None:
    found = difference(FIRST, SECOND, dict.fromkeys(FIRST, "a"), rng())
    assert found.p is None and found.interval.low is None


def test_different_cases_are_named() -> None:
    with pytest.raises(MedSegError, match="second agent has no score for c1; "):
        differences(FIRST, {k: v for k, v in SECOND.items() if k != "c1"}, PATIENT)
    with pytest.raises(MedSegError, match="first agent has no score for c1, c2; "):
        differences({k: v for k, v in FIRST.items() if k > "c2"}, SECOND, PATIENT)
    with pytest.raises(MedSegError, match="no patient for c4"):
        differences(FIRST, SECOND, {k: v for k, v in PATIENT.items() if k != "c4"})
    many = {f"k{i:02}": 0.0 for i in range(9)}
    with pytest.raises(MedSegError, match="k00, k01, k02, k03, k04 and 4 more"):
        differences({}, many, {})


def dice_like(patients: int, cases: int, generator: np.random.Generator) -> tuple[np.ndarray, list[str], float]:
    """Skewed scores in [0, 1] as Dice has them: patients differ (mean .8), and so do the cases of one patient."""
    of_patient = generator.beta(6, 1.5, patients)
    values = generator.beta(8 * of_patient[:, None] + 1e-3, 8 * (1 - of_patient[:, None]) + 1e-3, (patients, cases))
    return values.ravel(), [f"p{i}" for i in range(patients) for _ in range(cases)], 0.8


def covers(found: Interval, truth: float) -> bool:
    assert found.low is not None and found.high is not None
    return found.low <= truth <= found.high


@pytest.mark.slow
def test_the_bootstrap_covers_95_per_cent_with_60_patients() -> None:
    generator = rng(11)
    hits = 0
    for _ in range(2000):
        values, patients, truth = dice_like(60, 10, generator)
        hits += covers(interval(values, patients, generator, resamples=1000), truth)
    assert 0.93 <= hits / 2000 <= 0.97


@pytest.mark.slow
def test_with_5_patients_the_cluster_t_covers_and_the_bootstrap_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def coverage() -> float:
        generator = rng(12)
        drawn = (dice_like(5, 10, generator) for _ in range(2000))
        return sum(covers(interval(v, p, generator, resamples=500), truth) for v, p, truth in drawn) / 2000

    assert coverage() >= 0.92
    monkeypatch.setattr(statistics, "BOOTSTRAP_FROM", 2)
    assert 0.79 <= coverage() <= 0.86


@pytest.mark.slow
def test_cases_taken_for_patients_would_cover_far_too_little() -> None:
    """Why intervals cluster: 60 patients of 10 cases are not 600 patients."""
    generator = rng(13)
    hits = 0
    for _ in range(500):
        values, patients, truth = dice_like(60, 10, generator)
        hits += covers(interval(values, [f"{p}-{i}" for i, p in enumerate(patients)], generator, resamples=500), truth)
    assert hits / 500 < 0.8
