"""NoC with NoF, F1 over patients, the ceiling and the regret against it, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_gym import metrics
from medseg_gym.bench.statistics_agents import ceiling, clicks, clicks_of_both, correspondence, regret
from medseg_gym.errors import MedSegError


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


FAST = (0.0, 0.9)
SLOW = (0.0, 0.2, 0.5, 0.92)
NEVER = (0.0, 0.3, 0.3, 0.3, 0.3)


def test_never_enters_no_mean_and_counts_as_a_failure() -> None:
    """1 and 3 clicks, and one that never gets there: NoC 2 over two of three, NoF 1/3; a cap of 5 would make it 3."""
    found = clicks([FAST, SLOW, NEVER], ["a", "b", "c"], 0.9, rng())
    assert (found.noc, found.reached, found.quality) == (2.0, 2, 0.9)
    assert found.nof.mean == pytest.approx(1 / 3)
    assert found.nof.low == 0.0 and found.nof.high is not None and found.nof.high <= 1


def test_noc_is_none_where_nobody_gets_there() -> None:
    found = clicks([NEVER, NEVER], ["a", "b"], 0.9, rng())
    assert (found.noc, found.reached, found.nof.mean) == (None, 0, 1.0)


def test_nocs_are_compared_on_the_cases_that_both_finish() -> None:
    """Alone the weak agent needs 1 click (it finishes the easy case only) and looks better than the other's 2."""
    strong, weak = {"easy": FAST, "hard": SLOW}, {"easy": FAST, "hard": NEVER}
    assert clicks(list(weak.values()), ["a", "b"], 0.9, rng()).noc == 1
    assert clicks(list(strong.values()), ["a", "b"], 0.9, rng()).noc == 2
    assert clicks_of_both(strong, weak, 0.9) == (1.0, 1.0, 1)
    assert clicks_of_both({"hard": SLOW}, {"hard": NEVER}, 0.9) is None
    assert clicks_of_both({"a": FAST}, {"b": FAST}, 0.9) is None


def test_regret_by_hand() -> None:
    """Oracle .9, .9, .9; agent .2, .5, .92: regrets .7, .4 and -.02, their mean .36."""
    found = regret({"c": SLOW, "d": SLOW}, {"c": FAST, "d": FAST}, {"c": "a", "d": "b"}, 3, rng())
    assert found.at == pytest.approx((0.7, 0.4, -0.02))
    assert found.mean.mean == pytest.approx(0.36) == np.mean(found.at)
    assert found.mean.mean == pytest.approx(metrics.auc(FAST, 3) - metrics.auc(SLOW, 3))


def test_regret_against_itself_is_nothing_and_other_cases_are_refused() -> None:
    curves, patients = {"c": SLOW, "d": NEVER}, {"c": "a", "d": "b"}
    assert regret(curves, curves, patients, 5, rng()).mean.mean == 0
    with pytest.raises(MedSegError, match="no score for d"):
        regret(curves, {"c": SLOW}, patients, 5, rng())


def test_the_ceiling_is_one_oracle_for_all_cases() -> None:
    """Over 3 actions: .9 and .3 (mean .6) against .54 twice: the first, though it is behind in the second case."""
    oracles = {"Box": {"c": FAST, "d": NEVER}, "Clicks": {"c": SLOW, "d": SLOW}}
    assert ceiling(oracles, 3) == "Box"
    assert ceiling({"b": {"c": SLOW}, "a": {"c": SLOW}}, 3) == "a"
    with pytest.raises(MedSegError, match="no oracle"):
        ceiling({}, 3)


def test_f1_of_patients_is_the_f1_of_all_their_cases() -> None:
    """Five cases: 2 matches, 1 wrong mask, 1 missed, 1 rightly silent: 2 * 2 / (3 + 4) = .571."""
    cases = [(0.9, True, True), (0.6, True, True), (0.4, True, True), (0.0, False, True), (1.0, False, False)]
    counts = [metrics.entity_counts(*case) for case in cases]
    found = correspondence(counts, ["a", "a", "b", "b", "c"], rng())
    assert found.mean == pytest.approx(4 / 7) == metrics.entity_f1(counts)
    assert (found.cases, found.patients) == (5, 3)
    assert found.low is not None and 0 <= found.low < 4 / 7


def test_f1_of_an_agent_rightly_silent_everywhere_is_1() -> None:
    silent = [metrics.entity_counts(1.0, False, False)] * 50
    for patients in (3, 50):
        found = correspondence(silent, [f"p{i % patients}" for i in range(50)], rng(), resamples=20)
        assert (found.low, found.mean, found.high) == (1, 1, 1)
