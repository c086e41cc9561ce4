"""Rewards: values worked out by hand, dense = terminal, and what cannot be farmed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_gym import rewards
from medseg_gym.errors import UnknownNameError
from medseg_gym.types import Action, Box, Click, Stop, Undo, Unreadable

CLICK = Click(1, 1, True)


def play(
    spec: rewards.RewardSpec, steps: list[tuple[Action | Unreadable, float]], start_iou: float = 0.0
) -> tuple[list[dict[str, float]], rewards.Progress]:
    """The terms of every turn of an episode given as (action, IoU after it), and the final progress."""
    now = rewards.start(start_iou, _dice(start_iou))
    turns = []
    for i, (action, iou) in enumerate(steps):
        later = rewards.after(now, action, iou, _dice(iou), hit=True if isinstance(action, Click) else None)
        turns.append(spec.terms_of_turn(now, later, ends=i == len(steps) - 1))
        now = later
    return turns, now


def _dice(iou: float) -> float:
    return 2 * iou / (1 + iou)


def total(name: str, path: list[float], timing: str = "dense") -> float:
    steps: list[tuple[Action | Unreadable, float]] = [(CLICK, iou) for iou in path]
    turns, _ = play(rewards.resolve(name, timing), [*steps, (Stop(), path[-1] if path else 0.0)])
    return sum(sum(t.values()) for t in turns)


@pytest.mark.parametrize("timing", ["dense", "terminal"])
@pytest.mark.parametrize(
    ("path", "shaped", "medsam"),
    [([0.8], 0.9351, 0.876), ([0.1, 0.8], 0.9271, 0.916), ([0.1, 0.8, 0.1, 0.8], 0.9111, 0.956)],
)
def test_paths_of_the_papers_score_as_published(path: list[float], shaped: float, medsam: float, timing: str) -> None:
    assert total("shaped", path, timing) == pytest.approx(shaped, abs=5e-5)
    assert total("medsam-agent", path, timing) == pytest.approx(medsam, abs=5e-4)


@pytest.mark.parametrize("q", [0.3, 0.8, 0.9, 0.95, 0.99])
def test_shaped_prefers_the_straight_path_at_every_quality(q: float) -> None:
    assert total("shaped", [q]) > total("shaped", [0.1, q]) > total("shaped", [0.1, q, 0.1, q])


def test_medsam_agent_can_be_farmed_by_zig_zag_as_released() -> None:
    assert (
        total("medsam-agent", [0.1, 0.8, 0.1, 0.8]) > total("medsam-agent", [0.1, 0.8]) > total("medsam-agent", [0.8])
    )


def test_stopping_at_once_on_an_absent_structure_is_worth_one() -> None:
    turns, _ = play(rewards.PRESETS["shaped"], [(Stop(), 1.0)], start_iou=1.0)
    assert sum(turns[0].values()) == pytest.approx(1.0)


def test_undo_restores_the_potential_except_for_the_tool_call() -> None:
    spec = rewards.PRESETS["shaped"]
    _, straight = play(spec, [(CLICK, 0.8)])
    _, undone = play(spec, [(CLICK, 0.8), (CLICK, 0.3), (Undo(), 0.8)])
    difference = sum(spec.potential(straight).values()) - sum(spec.potential(undone).values())
    assert difference == pytest.approx(0.8 * 0.01)


def test_one_unreadable_turn_of_two_costs_half_the_readable_term() -> None:
    turns, _ = play(rewards.PRESETS["shaped"], [(CLICK, 0.8), (Unreadable("?"), 0.8)])
    assert turns[1] == pytest.approx({"readable": -0.1, "quality": 0, "gain": 0, "overshoot": 0, "tool_cost": 0})


def test_ibis_pays_each_step_as_released() -> None:
    turns, _ = play(rewards.PRESETS["ibis"], [(CLICK, 0.75), (Box(0, 0, 1, 1), 0.85), (Stop(), 0.85)])
    # fifths of: format, answer, click, gain, length
    assert list(turns[0].values()) == pytest.approx([0.2, 0.4, 0.2, 0.2, 0.2])
    assert list(turns[1].values()) == pytest.approx([0.2, 0.6, 0.0, 0.2, 0.2])
    assert list(turns[2].values()) == pytest.approx([0.2, 0.6, 0.0, 0.0, 0.2])


def test_ibis_length_turns_negative_after_the_fifth_step() -> None:
    turns, _ = play(rewards.PRESETS["ibis"], [(CLICK, 0.1)] * 7)
    assert [t["ibis_length"] for t in turns] == pytest.approx([0.2] * 5 + [-0.04, -0.08])


STEPS = st.lists(
    st.tuples(st.sampled_from([CLICK, Click(2, 3, False), Box(0, 0, 4, 4), Undo(), Unreadable("x")]), st.floats(0, 1)),
    max_size=9,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(STEPS, st.floats(0, 1), st.sampled_from(["shaped", "medsam-agent"]), st.booleans())
def test_dense_rewards_add_up_to_the_terminal_reward(steps: list, start: float, name: str, stops: bool) -> None:
    if stops or not steps:
        steps = [*steps, (Stop(), steps[-1][1] if steps else start)]
    dense, final = play(rewards.resolve(name, "dense"), steps, start)
    terminal, _ = play(rewards.resolve(name, "terminal"), steps, start)
    earned = sum(sum(turn.values()) for turn in dense)
    assert earned == pytest.approx(sum(terminal[-1].values()), abs=1e-12)
    assert earned == pytest.approx(sum(rewards.PRESETS[name].potential(final).values()), abs=1e-12)
    assert all(value == 0 for turn in terminal[:-1] for value in turn.values())


@settings(deadline=None, derandomize=True)
@given(STEPS.filter(bool), st.floats(0, 1))
def test_shaped_never_exceeds_what_one_perfect_prompt_earns(steps: list, start: float) -> None:
    _, final = play(rewards.PRESETS["shaped"], steps, start)
    assert sum(rewards.PRESETS["shaped"].potential(final).values()) <= 0.2 + 0.8 * 1.1 + 1e-12


def test_a_users_own_terms_are_weighed_and_named() -> None:
    spec = rewards.RewardSpec({"quality": 2.0, "tool_cost": -0.5}, name="mine", timing="terminal")
    turns, _ = play(spec, [(CLICK, 1.0), (Stop(), 1.0)])
    assert turns == [{"quality": 0.0, "tool_cost": 0.0}, {"quality": 2.0, "tool_cost": -0.5}]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: rewards.resolve("shapd"), "did you mean 'shaped'"),
        (lambda: rewards.RewardSpec({"qualty": 1.0}), "did you mean 'quality'"),
        (lambda: rewards.RewardSpec({}), "no terms"),
        (lambda: rewards.RewardSpec({"quality": float("nan")}), "wanted a number"),
        (lambda: rewards.RewardSpec({"quality": "1"}), "wanted a number"),  # type: ignore[dict-item]
        (lambda: rewards.RewardSpec({"quality": 1.0, "ibis_gain": 1.0}), "mixes"),
        (lambda: rewards.resolve("ibis", "terminal"), "no terminal timing"),
        (lambda: rewards.resolve("shaped", "late"), "timing"),
        (lambda: rewards.RewardSpec({"quality": 1.0}, clipped=("gain",)), "does not have"),
    ],
)
def test_unusable_rewards_are_refused_with_a_reason(make: object, says: str) -> None:
    with pytest.raises(UnknownNameError, match=says):
        make()  # type: ignore[operator]
