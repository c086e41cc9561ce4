"""Advantages: each member against its group, by the episode or by the turn, and who never enters a mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rollouts import made_rollout

from medseg_gym.errors import UnknownNameError
from medseg_gym.rl.advantages import advantages, too_few, usable, zero_spread

properties = settings(deadline=None, derandomize=True, max_examples=60)
REWARD = st.floats(-2, 2, width=32)
EPISODE = st.lists(REWARD, min_size=1, max_size=5)
GROUP = st.lists(EPISODE, min_size=2, max_size=8)


def found(rewards, **options) -> list[list[float]]:
    values = advantages([made_rollout(episode, member=i) for i, episode in enumerate(rewards)], **options)
    assert all(value is not None for value in values)
    return [value.tolist() for value in values]


def test_an_advantage_is_the_episodes_reward_minus_the_groups_mean():
    # rewards 0.9, 0.3 and 0.6 have the mean 0.6
    assert found([[0.4, 0.5], [0.3], [0.6, 0.0, 0.0]]) == [
        pytest.approx([0.3, 0.3]),
        pytest.approx([-0.3]),
        pytest.approx([0.0, 0.0, 0.0], abs=1e-15),
    ]


def test_std_divides_by_the_unbiased_deviation_and_a_millionth():
    # 1 and 3: mean 2, variance (1 + 1) / (2 - 1) = 2; the biased one would give 1 / 1.000001
    each = 1 / (math.sqrt(2) + 1e-6)
    assert found([[1.0], [3.0]], std=True) == [pytest.approx([-each]), pytest.approx([each])]


def test_std_is_what_torch_std_gives():
    torch = pytest.importorskip("torch")
    rewards = torch.tensor([0.1, 0.7, 0.35, 0.9, 0.2], dtype=torch.float64)
    theirs = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    ours = [value for (value,) in found([[r] for r in rewards.tolist()], std=True)]
    assert ours == pytest.approx(theirs.tolist(), rel=1e-12)


def test_turn_credit_compares_the_rewards_to_come_with_those_who_have_the_turn():
    # to go: [0.9, 0.5], [0.3], [0.6, 0.1]; means 0.6 over three and 0.3 over two
    assert found([[0.4, 0.5], [0.3], [0.5, 0.1]], credit="turn") == [
        pytest.approx([0.3, 0.2]),
        pytest.approx([-0.3]),
        pytest.approx([0.0, -0.2]),
    ]


def test_a_turn_that_one_member_alone_has_gets_nothing():
    assert found([[0.0, 1.0], [0.5]], credit="turn") == [pytest.approx([0.25, 0.0]), pytest.approx([-0.25])]


def test_std_by_turn_is_pooled_within_turns():
    # deviations from the turns' means 0.3, -0.3, 0.0 and 0.2, -0.2, of 3 - 1 and 2 - 1 degrees of freedom
    scale = math.sqrt((0.09 + 0.09 + 0.04 + 0.04) / 3) + 1e-6
    values = found([[0.4, 0.5], [0.3], [0.5, 0.1]], credit="turn", std=True)
    assert values[0] == pytest.approx([0.3 / scale, 0.2 / scale])


@properties
@given(GROUP, st.booleans())
def test_the_first_turns_credit_is_the_episodes(rewards, std):
    by_turn, by_episode = found(rewards, credit="turn"), found(rewards)
    assert [v[0] for v in by_turn] == pytest.approx([v[0] for v in by_episode], abs=1e-9)


@properties
@given(st.integers(1, 5), st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=8), st.booleans())
def test_turn_credit_is_the_episodes_where_the_reward_comes_at_the_end(turns, ends, std):
    rewards = [[0.0] * (turns - 1) + [end] for end in ends]
    by_turn, by_episode = found(rewards, credit="turn", std=std), found(rewards, std=std)
    for ours, theirs in zip(by_turn, by_episode, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)


@properties
@given(GROUP, st.permutations(range(8)), st.sampled_from(["episode", "turn"]), st.booleans())
def test_the_order_of_members_does_not_matter(rewards, order, credit, std):
    order = [i for i in order if i < len(rewards)]
    straight = found(rewards, credit=credit, std=std)
    shuffled = found([rewards[i] for i in order], credit=credit, std=std)
    for at, i in enumerate(order):
        assert shuffled[at] == pytest.approx(straight[i], rel=1e-6, abs=1e-8)


@properties
@given(GROUP, st.floats(-3, 3), st.sampled_from(["episode", "turn"]), st.booleans())
def test_a_constant_added_to_every_reward_changes_nothing(rewards, shift, credit, std):
    straight = found(rewards, credit=credit, std=std)
    shifted = found([[*episode[:-1], episode[-1] + shift] for episode in rewards], credit=credit, std=std)
    for ours, theirs in zip(shifted, straight, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3 if std else 1e-8)  # over 1e-6, rounding at 1e-9 is 1e-3


@properties
@given(GROUP, st.floats(0.5, 20), st.sampled_from(["episode", "turn"]))
def test_rewards_in_another_unit_give_advantages_in_it_and_with_std_the_same(rewards, scale, credit):
    scaled = [[reward * scale for reward in episode] for episode in rewards]
    for ours, theirs in zip(found(scaled, credit=credit), found(rewards, credit=credit), strict=True):
        assert ours == pytest.approx([scale * value for value in theirs], abs=1e-7)
    straight = found(rewards, credit=credit)
    if max(abs(value) for values in straight for value in values) > 0.1:
        by_std = found(rewards, credit=credit, std=True)
        for ours, theirs in zip(found(scaled, credit=credit, std=True), by_std, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@properties
@given(GROUP, st.sampled_from(["episode", "turn"]), st.booleans())
def test_the_advantages_of_a_turn_add_up_to_nothing(rewards, credit, std):
    values = found(rewards, credit=credit, std=std)
    turns = [0] if credit == "episode" else range(max(map(len, values)))
    for turn in turns:
        assert sum(v[turn] for v in values if len(v) > turn) == pytest.approx(0, abs=1e-7)


def test_failed_and_nan_members_never_enter_the_mean_and_are_not_trained():
    """Trap 14."""
    group = [
        made_rollout([0.2]),
        made_rollout([0.0, 9.0], dropped="the tool failed"),
        made_rollout([math.nan]),
        made_rollout([0.1, math.inf]),
        made_rollout([]),
        made_rollout([0.6]),
    ]
    for credit in ("episode", "turn"):
        for std, each in ((False, 0.2), (True, 0.2 / (math.sqrt(0.08) + 1e-6))):
            values = advantages(group, credit=credit, std=std)
            assert [value is None for value in values] == [False, True, True, True, True, False]
            assert values[0] == pytest.approx([-each]) and values[5] == pytest.approx([each])
    assert [usable(member) for member in group] == [True, False, False, False, False, True]


def test_a_group_needs_two():
    """Trap 14."""
    group = [made_rollout([0.2]), made_rollout([0.9], dropped="aborted"), made_rollout([math.nan])]
    assert too_few(group) and advantages(group) == [None, None, None]
    assert not zero_spread(group)  # it is short, not equal
    assert not too_few([*group, made_rollout([0.2])])


@properties
@given(st.floats(-2, 2), st.integers(2, 8), st.sampled_from(["episode", "turn"]), st.booleans())
def test_equal_rewards_give_exactly_nothing(reward, members, credit, std):
    """Trap 1: sums such as 0.1 + 0.1 + 0.1, over 3, are not 0.1 again."""
    values = found([[reward]] * members, credit=credit, std=std)
    assert values == [[0.0]] * members
    assert zero_spread([made_rollout([reward])] * members, credit=credit)


def test_rewards_that_differ_by_rounding_alone_are_equal():
    dense, end = [0.1, 0.2], [0.3]  # 0.30000000000000004 and 0.3
    assert sum(dense) != sum(end)
    assert found([dense, end], std=True) == [[0.0, 0.0], [0.0]]
    assert zero_spread([made_rollout(dense), made_rollout(end)])
    assert not zero_spread([made_rollout([0.3]), made_rollout([0.300001])])


def test_equal_episodes_of_unequal_turns_teach_by_turn_alone():
    group = [made_rollout([0.5, 0.1]), made_rollout([0.1, 0.5])]
    assert zero_spread(group) and not zero_spread(group, credit="turn")
    assert np.array(advantages(group, credit="turn", std=True))[:, 1] == pytest.approx(
        [-0.2 / 0.2, 0.2 / 0.2], rel=1e-4
    )


def test_dropped_members_do_not_hide_that_the_others_are_equal():
    assert zero_spread([made_rollout([0.5]), made_rollout([0.5]), made_rollout([0.9], dropped="failed")])


def test_an_unknown_credit_is_refused():
    with pytest.raises(UnknownNameError, match="turn"):
        advantages([made_rollout([0.5])], credit="turns")
