"""Overlap and curve metrics: values worked out by hand, the rules for nothing, and a second implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance

from medseg_gym import metrics
from medseg_gym.types import Mask


def row(text: str) -> Mask:
    return np.array([[char == "#" for char in text]])


@pytest.mark.parametrize(
    ("mask", "target", "iou", "dice"),
    [
        ("##..", ".##.", 1 / 3, 1 / 2),  # 1 shared of 3; 2 * 1 / (2 + 2)
        ("###.", "#...", 1 / 3, 1 / 2),
        ("####", "##..", 1 / 2, 2 / 3),
        ("##..", "..##", 0, 0),
        ("#.#.", "#.#.", 1, 1),
        ("....", "....", 1, 1),  # two empty masks agree
        ("....", "#...", 0, 0),
        ("#...", "....", 0, 0),
    ],
)
def test_overlap_by_hand(mask: str, target: str, iou: float, dice: float) -> None:
    assert metrics.iou(row(mask), row(target)) == pytest.approx(iou)
    assert metrics.dice(row(mask), row(target)) == pytest.approx(dice)


def test_areas_by_hand() -> None:
    assert metrics.areas(row("##.."), row(".###")) == (1, 2, 3)


@pytest.mark.parametrize("measure", [metrics.iou, metrics.dice, metrics.areas])
def test_masks_of_different_images_raise(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"mask is \(1, 4\), target is \(4, 1\)"):
        measure(row("#..."), row("#...").T)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1), st.floats(0.05, 1))
def test_overlap_agrees_with_scipy(seed: int, share: float, other: float) -> None:
    rng = np.random.default_rng(seed)
    mask, target = rng.random((9, 13)) < share, rng.random((9, 13)) < other
    mask[0, 0] = True  # scipy's rule for two empty masks is another
    dice, iou = metrics.dice(mask, target), metrics.iou(mask, target)
    assert dice == pytest.approx(1 - distance.dice(mask.ravel(), target.ravel()))
    assert iou == pytest.approx(1 - distance.jaccard(mask.ravel(), target.ravel()))
    assert dice == pytest.approx(2 * iou / (1 + iou))
    assert metrics.iou(target, mask) == iou
    assert type(iou) is type(dice) is float


def test_overlap_does_not_overflow_on_large_masks() -> None:
    full = np.ones((5000, 5000), np.bool_)
    assert metrics.dice(full, full) == 1
    assert metrics.areas(full, full) == (25_000_000,) * 3


# (IoU, drawn, present): what a case's mask is to its entity
MATCH, WRONG, MISSED = (0.51, True, True), (0.5, True, True), (0.0, False, True)
SILENT, INVENTED = (1.0, False, False), (0.0, True, False)


@pytest.mark.parametrize(
    ("cases", "f1"),
    [
        ([MATCH, MATCH], 1),
        ([MATCH, WRONG], 2 / 4),  # 1 match; 2 answers, 2 entities
        ([MATCH, MISSED], 2 / 3),  # 1 match; 1 answer, 2 entities
        ([MATCH, INVENTED], 2 / 3),
        ([MATCH, SILENT], 1),  # rightly silent: neither answer nor entity
        ([WRONG, MISSED, INVENTED], 0),
        ([SILENT, SILENT], 1),
        ([], 1),
    ],
)
def test_f1_of_mask_to_entity_correspondence_by_hand(cases: list[tuple[float, bool, bool]], f1: float) -> None:
    assert metrics.entity_f1(metrics.entity_counts(*case) for case in cases) == pytest.approx(f1)


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    """6 matches in 7 answers, 9 entities."""
    cases = [MATCH] * 6 + [WRONG] + [MISSED] * 2 + [SILENT] * 5
    precision, recall = 6 / 7, 6 / 9
    wanted = 2 * precision * recall / (precision + recall)
    assert metrics.entity_f1(metrics.entity_counts(*case) for case in cases) == pytest.approx(wanted)


def test_a_failed_episode_is_a_wrong_answer_to_f1() -> None:
    """On an absent structure too, or failing there would look like seeing its absence."""
    assert metrics.entity_counts(0.9, True, True, failed=True) == (0, 2)
    assert metrics.entity_counts(0.0, False, True, failed=True) == (0, 2)
    assert metrics.entity_counts(1.0, False, False, failed=True) == (0, 1)


def test_no_mask_matches_two_disjoint_entities() -> None:
    """The reason for an IoU above .5: a mask that is half of one and half of another structure matches neither."""
    left, right = row("##.."), row("..##")
    both = left | right
    assert metrics.iou(both, left) == metrics.iou(both, right) == 0.5
    assert metrics.entity_counts(metrics.iou(both, left), True, True) == (0, 2)


CURVE = (0.0, 0.5, 0.85, 0.8, 0.9)  # before any action, then after actions 1 to 4


@pytest.mark.parametrize(("quality", "clicks"), [(0.0, 0), (0.4, 1), (0.85, 2), (0.86, 4), (0.9, 4), (0.91, None)])
def test_noc_is_the_first_action_that_reaches_the_quality(quality: float, clicks: int | None) -> None:
    assert metrics.noc(CURVE, quality) == clicks


def test_noc_of_a_curve_that_starts_there_is_zero() -> None:
    """The absent structure: the empty mask is right before any action."""
    assert metrics.noc([1.0], 0.9) == 0


def test_never_reached_is_none_however_long_the_curve() -> None:
    assert metrics.noc([0.5] * 21, 0.9) is None


def test_nof_is_a_share() -> None:
    assert metrics.nof([CURVE, [0.0, 0.95], [0.0, 0.1], [0.2]], 0.9) == 0.5
    assert metrics.nof([CURVE], 0.9) == 0
    assert math.isnan(metrics.nof([], 0.9))


def test_at_action_keeps_the_last_value() -> None:
    assert [metrics.at_action(CURVE, k) for k in (0, 1, 4, 9)] == [0.0, 0.5, 0.9, 0.9]
    assert metrics.at_action([0.3], 5) == 0.3


def test_auc_by_hand() -> None:
    assert metrics.auc(CURVE, 4) == pytest.approx((0.5 + 0.85 + 0.8 + 0.9) / 4)
    assert metrics.auc(CURVE, 6) == pytest.approx((0.5 + 0.85 + 0.8 + 0.9 * 3) / 6)
    assert metrics.auc(CURVE, 1) == 0.5
    assert metrics.auc([0.7], 5) == pytest.approx(0.7)  # ended before any action


def test_auc_rewards_reaching_the_same_mask_earlier() -> None:
    assert metrics.auc([0, 0.9], 5) > metrics.auc([0, 0.1, 0.9], 5) > metrics.auc([0, 0.1, 0.1, 0.9], 5)


def test_regret_is_the_mean_distance_below_the_ceiling() -> None:
    """After actions 1 to 4: .9 - .5, .9 - .85, .9 - .8, .9 - .9."""
    assert metrics.regret(CURVE, [0.0, 0.9], 4) == pytest.approx((0.4 + 0.05 + 0.1 + 0) / 4)
    assert metrics.regret([0.0, 0.9], CURVE, 4) == -metrics.regret(CURVE, [0.0, 0.9], 4)
    assert metrics.regret(CURVE, CURVE, 9) == 0
