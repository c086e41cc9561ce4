"""From rollouts to micro-batches: what a token weighs, and that every row is planned once, evenly over the ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rollouts import made_rollout, made_sequence

from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError
from medseg_gym.rl.advantages import advantages
from medseg_gym.rl.batch import NORMALISERS, Plan, filler, flatten, plan, rows_of, supervised_rows
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.types import Row, Segment, TokenSequence

properties = settings(deadline=None, derandomize=True, max_examples=100)
CONFIG = GRPOConfig(model="tiny", out="out", env="MedSeg-Phantom-Stub-v0", max_new_tokens=10)


def config(normaliser: str) -> GRPOConfig:
    return replace(CONFIG, normaliser=normaliser)


def row(length: int) -> Row:
    """A row of so many tokens, all trained but the first."""
    sequence = made_sequence([length - 1], gap=1)
    return Row(sequence, sequence.loss_mask.astype(np.float32))


# Two rollouts: answers of 3 and 1 tokens, and one of 2.
PAIR = [made_rollout([0.0, 1.0], answers=[3, 1]), made_rollout([0.5], answers=[2])]
GIVEN = [np.array([0.25, 0.75]), np.array([-0.25])]


@pytest.mark.parametrize(
    ("normaliser", "first", "second"),
    [("constant", 1 / 20, 1 / 20), ("token", 1 / 6, 1 / 6), ("sequence", 1 / 8, 1 / 4)],
)
def test_what_a_token_weighs(normaliser, first, second):
    # constant: 2 rollouts of at most 10 tokens; token: 6 in all; sequence: 2 rollouts, of 4 tokens and of 2
    one, two = rows_of(PAIR, GIVEN, config(normaliser))
    # two tokens of the prompt, three of the answer, two of the observation, one of the answer
    assert one.weights == pytest.approx(np.array([0, 0, 1, 1, 1, 0, 0, 1]) * first)
    assert two.weights == pytest.approx(np.array([0, 0, 1, 1]) * second)
    assert one.weights.dtype == np.float32 and one.advantages is not None and one.advantages.dtype == np.float32
    assert one.old is None and one.reference is None


def test_each_token_has_its_turns_advantage():
    one, two = rows_of(PAIR, GIVEN, CONFIG)
    assert one.advantages.tolist() == [0, 0, 0.25, 0.25, 0.25, 0, 0, 0.75]
    assert two.advantages.tolist() == [0, 0, -0.25, -0.25]


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_without_history_the_rollout_is_still_the_unit(normaliser):
    """A chat a turn: the same tokens weigh the same and have the same advantages as in one chat."""
    apart = [made_rollout([0.0, 1.0], answers=[3, 1], history=False), made_rollout([0.5], answers=[2], history=False)]
    rows, whole = rows_of(apart, GIVEN, config(normaliser)), rows_of(PAIR, GIVEN, config(normaliser))
    assert len(rows) == 3 and len(whole) == 2
    ours, theirs = flatten(rows), flatten(whole)
    assert ours.weights.tolist() == theirs.weights.tolist()
    assert ours.advantages.tolist() == theirs.advantages.tolist()
    assert ours.lengths == (3, 1, 2) and theirs.lengths == (4, 2)


@properties
@given(
    st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans()), min_size=1, max_size=8),
    st.sampled_from(NORMALISERS),
)
def test_weights_add_up(members, normaliser):
    rollouts = [made_rollout([0.0] * len(answers), answers=answers, history=kept) for answers, kept in members]
    rows = rows_of(rollouts, [np.ones(len(answers)) for answers, _ in members], config(normaliser))
    tokens = sum(sum(answers) for answers, _ in members)
    wanted = tokens / (10 * len(members)) if normaliser == "constant" else 1.0
    assert sum(float(row.weights.sum(dtype=np.float64)) for row in rows) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_members_that_are_not_trained_have_no_row_and_change_no_weight(normaliser):
    """Trap 14."""
    group = [*PAIR, made_rollout([5.0], answers=[9], dropped="failed"), made_rollout([float("nan")], answers=[9])]
    rows = rows_of(group, advantages(group), config(normaliser))
    alone = rows_of(PAIR, advantages(PAIR), config(normaliser))
    assert [r.sequence for r in rows] == [r.sequence for r in alone]
    for ours, theirs in zip(rows, alone, strict=True):
        assert ours.weights.tolist() == theirs.weights.tolist()
        assert ours.advantages.tolist() == theirs.advantages.tolist()


def test_only_sampled_tokens_weigh_anything():
    """Trap 3: not observations, not what was injected (trap 9's end of turn), not marked actions."""
    sequence = TokenSequence(
        (
            Segment("prompt", (1, 1), 0),
            Segment("action", (7, 7), 0, marked=True),
            Segment("observation", (1,), 1),
            Segment("action", (7, 7), 1),
            Segment("injected", (2,), 1),
        )
    )
    rollout = replace(made_rollout([0.0, 1.0]), sequences=(sequence,))
    (only,) = rows_of([rollout], [np.array([0.5, 0.25])], config("token"))
    assert only.weights.tolist() == [0, 0, 0, 0, 0, 0.5, 0.5, 0]
    assert only.advantages.tolist() == [0, 0, 0, 0, 0, 0.25, 0.25, 0]
    assert supervised_rows([sequence])[0].weights.tolist() == [0, 0, 0, 0, 0, 0.5, 0.5, 0]


def test_a_rollout_without_a_trained_token_has_no_row_and_is_not_counted():
    mute = replace(made_rollout([0.5]), sequences=(TokenSequence((Segment("prompt", (1, 1), 0),)),))
    rows = rows_of([*PAIR, mute], [*GIVEN, np.array([0.5])], config("sequence"))
    assert [r.weights.sum() for r in rows] == pytest.approx([0.5, 0.5])


def test_a_chat_of_more_turns_than_the_episode_has_is_refused():
    with pytest.raises(BadDataError, match="turn 1 of an episode of 1 turns"):
        rows_of([made_rollout([0.5], answers=[1, 1])], [np.array([0.5])], CONFIG)


def test_an_unknown_normaliser_is_refused():
    with pytest.raises(UnknownNameError, match="'token'"):
        rows_of(PAIR, GIVEN, config("tokens"))


def test_a_supervised_step_is_the_mean_over_its_trained_tokens():
    rows = supervised_rows([made_sequence([3]), made_sequence([1, 4])])
    assert [r.weights.max() for r in rows] == pytest.approx([1 / 8, 1 / 8])
    assert sum(r.weights.sum() for r in rows) == pytest.approx(1)
    assert rows[0].advantages is None
    with pytest.raises(BadDataError, match="none of the 1 chats"):
        supervised_rows([TokenSequence((Segment("prompt", (1,), 0),))])


def lengths(planned: Plan) -> list[list[list[int]]]:
    return [[[len(r.weights) for r in micro] for micro in micros] for micros in planned]


def weighing(planned: Plan) -> list[Row]:
    return [r for micros in planned for micro in micros for r in micro if r.weights.any()]


def test_rows_of_like_length_go_together():
    rows = [row(n) for n in (4, 9, 5, 10)]
    assert lengths(plan(rows, 1, micro_rows=4, micro_tokens=20)) == [[[10, 9], [5, 4]]]
    assert lengths(plan(rows, 1, micro_rows=1, micro_tokens=20)) == [[[10], [9], [5], [4]]]


def test_padding_counts():
    # 10 + 9 + 1 are 20 tokens, but padded to the longest they take 30
    assert lengths(plan([row(10), row(9), row(2)], 1, micro_rows=9, micro_tokens=20)) == [[[10, 9], [2]]]


def test_a_row_too_long_for_any_micro_batch_goes_alone():
    assert lengths(plan([row(5), row(30), row(5)], 1, micro_rows=9, micro_tokens=20)) == [[[30], [5, 5]]]


def test_large_micro_batches_are_halved_before_a_rank_goes_idle():
    assert lengths(plan([row(5)] * 4, 2, micro_rows=4, micro_tokens=100)) == [[[5, 5]], [[5, 5]]]
    assert lengths(plan([row(9), row(9), row(9), row(4)], 2, micro_rows=2, micro_tokens=100)) == [[[9, 9]], [[9, 4]]]


def test_ranks_have_the_large_micro_batches_at_the_same_time():
    # [20, 9], [9, 9, 9, 8] and [8, 8] are three; the largest, padded to 40, is halved into 20 and 9
    planned = plan([row(n) for n in (20, 9, 9, 9, 9, 8, 8, 8)], 2, micro_rows=4, micro_tokens=40)
    assert lengths(planned) == [[[9, 9, 9, 8], [8, 8]], [[20], [9]]]


def test_ranks_with_fewer_rows_are_given_weightless_copies_of_a_short_one():
    """Trap 11: filtered groups leave ranks with equal counts."""
    rows = [row(9), row(6), row(4)]
    planned = plan(rows, 2, micro_rows=1, micro_tokens=100)
    assert lengths(planned) == [[[9], [4]], [[6], [4]]]
    assert planned[0][1][0].weights.any() != planned[1][1][0].weights.any()
    assert len(weighing(planned)) == 3
    single = plan([row(3)], 4, micro_rows=8, micro_tokens=100)
    assert lengths(single) == [[[3]]] * 4 and len(weighing(single)) == 1


def test_without_rows_no_rank_has_any():
    assert plan([], 3, 4, 100) == [[], [], []]


@properties
@given(st.lists(st.integers(2, 40), max_size=30), st.integers(1, 4), st.integers(1, 6), st.integers(1, 100))
def test_every_row_is_planned_once_and_the_ranks_are_even(sizes, ranks, micro_rows, micro_tokens):
    """Trap 11."""
    rows = [row(n) for n in sizes]
    planned = plan(rows, ranks, micro_rows, micro_tokens)
    assert len(planned) == ranks and len({len(micros) for micros in planned}) == 1
    assert sorted(map(id, weighing(planned))) == sorted(map(id, rows))
    for micros in planned:
        for micro in micros:
            assert 1 <= len(micro) <= micro_rows
            assert len(micro) == 1 or len(micro) * max(len(r.weights) for r in micro) <= micro_tokens
    flat = [r for micros in planned for micro in micros for r in micro]
    assert len(flat) - len(rows) < ranks
    assert all(len(r.weights) == min(sizes) for r in flat if not r.weights.any())
    again = plan(rows, ranks, micro_rows, micro_tokens)
    assert lengths(again) == lengths(planned)


@properties
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 6))
def test_a_plans_weights_are_its_rows(sizes, ranks, micro_rows):
    rows = supervised_rows([made_sequence([n]) for n in sizes])
    planned = plan(rows, ranks, micro_rows, 60)
    assert sum(float(r.weights.sum()) for micros in planned for micro in micros for r in micro) == pytest.approx(1)


@pytest.mark.parametrize("bad", [{"ranks": 0}, {"micro_rows": 0}, {"micro_tokens": 0}])
def test_a_plan_for_nobody_is_refused(bad):
    with pytest.raises(MedSegError, match="=0; wanted 1 or more"):
        plan([row(3)], **{"ranks": 1, "micro_rows": 1, "micro_tokens": 9, **bad})


def test_flat_tokens_are_the_rows_one_after_the_other():
    rows = rows_of(
        [made_rollout([1.0], answers=[2], logprob=-0.5), PAIR[0]], [np.ones(1), GIVEN[0]], config("sequence")
    )
    flat = flatten([filler(rows[1]), rows[0], rows[1]])
    assert flat.lengths == (0, 2, 4)
    assert flat.weights.tolist() == [0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    assert flat.engine_logprobs.tolist() == [-0.5, -0.5, -1, -1, -1, -1]
    assert flat.advantages.tolist() == [1, 1, 0.25, 0.25, 0.25, 0.75]
    assert flat.old is None and flat.reference is None
    lent = [replace(r, old=np.arange(len(r.weights), dtype=np.float32)) for r in rows]
    assert flatten(lent).old.tolist() == [2, 3, 2, 3, 4, 7]


def test_rows_that_differ_in_what_they_hold_are_refused():
    rows = rows_of(PAIR, GIVEN, CONFIG)
    with pytest.raises(BadDataError, match="some rows have reference"):
        flatten([rows[0], replace(rows[1], reference=np.zeros(4, np.float32))])
