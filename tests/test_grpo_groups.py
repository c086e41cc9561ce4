"""Case order, curriculum, and the groups of an iteration: what is drawn, replaced and kept, by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from grpo_parts import rollout

from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.rl.curriculum import CaseOrder, Draw, read_keys
from medseg_gym.rl.groups import Group, Groups, draw_groups, solved_share
from medseg_gym.rl.types import Rollout, Segment, TokenSequence

KEYS = [f"case-{i}" for i in range(6)]


def test_a_pass_holds_every_case_once_and_the_next_pass_has_another_order() -> None:
    order = CaseOrder(KEYS, seed=1)
    first, second = ([draw.key for draw in order.draw(6)] for _ in range(2))
    assert sorted(first) == sorted(second) == KEYS
    assert first != second and first != KEYS


def test_the_order_goes_on_from_its_state() -> None:
    whole = CaseOrder(KEYS, seed=1)
    expected = [draw.key for draw in whole.draw(20)]
    begun = CaseOrder(KEYS, seed=1)
    start = [draw.key for draw in begun.draw(9)]
    gone_on = CaseOrder(KEYS, seed=1)
    gone_on.load(begun.state())
    assert start + [draw.key for draw in gone_on.draw(11)] == expected


def test_a_state_of_other_cases_is_refused() -> None:
    """Trap 10: a file of keys that was edited would give a run that goes on other cases, without a word."""
    for other in (KEYS[:5], KEYS[::-1]):
        with pytest.raises(MedSegError, match="not those this run began with"):
            CaseOrder(other, seed=1).load(CaseOrder(KEYS, seed=1).state())


def test_cases_never_or_always_solved_come_a_tenth_as_often() -> None:
    """With estimates 0, 1 and .5 the chances are .1, .1 and 1: over 600 looks 20 : 20 : 200 are expected."""
    order = CaseOrder(["never", "always", "half"], seed=0, curriculum="difficulty")
    for key, share in (("never", 0.0), ("always", 1.0), ("half", 0.5)):
        order.played(key, share)
    counts = dict.fromkeys(order.keys, 0)
    while order.cursor < 600:
        counts[order.draw(1)[0].key] += 1
    assert counts["half"] in (199, 200, 201)
    assert 8 <= counts["never"] <= 34 and 8 <= counts["always"] <= 34


def test_the_estimate_of_success_runs_and_is_part_of_the_state() -> None:
    order = CaseOrder(KEYS, seed=0, curriculum="difficulty")
    order.played("case-0", 1.0)
    order.played("case-0", 0.5)  # 1 + .5 (.5 - 1)
    assert order.state() == {**CaseOrder(KEYS, seed=0).state(), "cursor": 0, "solved": {"case-0": 0.75}}


def test_without_a_curriculum_nothing_is_remembered_or_passed_over() -> None:
    order = CaseOrder(KEYS, seed=0)
    order.played("case-0", 0.0)
    assert [draw.position for draw in order.draw(12)] == list(range(12))
    assert order.state() == {**CaseOrder(KEYS, seed=0).state(), "cursor": 12, "solved": {}}


def test_what_a_curriculum_draws_is_a_function_of_its_state() -> None:
    def drawn(state: dict[str, object]) -> list[Draw]:
        order = CaseOrder(KEYS, seed=3, curriculum="difficulty")
        order.load(state)
        return order.draw(30)

    state = {**CaseOrder(KEYS, seed=3).state(), "cursor": 4, "solved": dict.fromkeys(KEYS[:4], 0.0)}
    assert drawn(state) == drawn(state)


def test_wrong_orders_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="difficulty"):
        CaseOrder(KEYS, 0, "dificulty")
    with pytest.raises(MedSegError, match="no cases"):
        CaseOrder([], 0)
    with pytest.raises(MedSegError, match="1 case keys come twice"):
        CaseOrder([*KEYS, "case-1"], 0)


def test_a_keys_file_is_read_line_by_line_and_its_stranger_is_named(tmp_path: Path) -> None:
    file = tmp_path / "hard.txt"
    file.write_text("# the hard set\ncase-3\n\ncase-1\n")
    assert read_keys(file, KEYS) == ["case-3", "case-1"]
    file.write_text("case-3\ncase-9\n")
    with pytest.raises(MedSegError, match="line 2: no case 'case-9'"):
        read_keys(file, KEYS)


def member(group: int, number: int, reward: float, *, dropped: str = "", iou: float = 0.0) -> Rollout:
    made = rollout(group, number, reward, dropped=dropped, iou=iou)
    chat = TokenSequence((Segment("action", (1,), 0, logprobs=(-1.0,), versions=((0, 0, 1),)),))
    return Rollout(made.group, made.member, made.episode, (chat,), dropped)


def drawn(order: CaseOrder, rewards: dict[str, Sequence[float]], reverse: bool = False, **given: object) -> Groups:
    """Groups whose members' rewards hang on the case alone; `reverse` completes each round's groups backwards."""

    async def play(draws: Sequence[Draw], first: int) -> AsyncIterator[Group]:
        groups = [
            [member(first + at, i, value) for i, value in enumerate(rewards[draw.key])] for at, draw in enumerate(draws)
        ]
        for group in reversed(groups) if reverse else groups:
            yield group

    settings = {"wanted": 2, "filtered": True, "credit": "episode", "resample": 2, "solved": 0.8, **given}
    return asyncio.run(draw_groups(order, play, **settings))  # type: ignore[arg-type]


FLAT, SPREAD = (0.5, 0.5), (0.0, 1.0)


def case_rewards(order: CaseOrder, pattern: str) -> dict[str, Sequence[float]]:
    """Rewards by the place in the first pass: "f" a flat group, "s" one with spread."""
    keys = [draw.key for draw in CaseOrder(order.keys, order.seed).draw(len(order.keys))]
    return {key: FLAT if letter == "f" else SPREAD for key, letter in zip(keys, pattern, strict=True)}


def test_flat_groups_are_replaced_by_the_next_cases() -> None:
    order = CaseOrder(KEYS, seed=0)
    groups = drawn(order, case_rewards(order, "fsfsss"))
    assert [group[0].group for group in groups.trained] == [1, 3]  # rounds: 0 1 | 2 | 3
    assert (len(groups.played), groups.equal, groups.rounds, order.cursor) == (4, 2, 2, 4)


@pytest.mark.parametrize("pattern", ["ssffff", "fsfsss", "ffssff", "ffffff"])
def test_what_is_trained_hangs_on_no_order_of_completion(pattern: str) -> None:
    chosen = []
    for reverse in (False, True):
        order = CaseOrder(KEYS, seed=0)
        groups = drawn(order, case_rewards(order, pattern), reverse)
        chosen.append(([group[0].group for group in groups.trained], len(groups.played), order.cursor))
    assert chosen[0] == chosen[1]


def test_drawing_others_ends_after_the_rounds_it_may_take() -> None:
    order = CaseOrder(KEYS, seed=0)
    groups = drawn(order, case_rewards(order, "ffffff"), resample=2)
    assert (len(groups.played), groups.trained, groups.equal, groups.rounds) == (6, (), 6, 2)


def test_without_the_filter_flat_groups_stay_and_nothing_is_drawn_again() -> None:
    order = CaseOrder(KEYS, seed=0)
    groups = drawn(order, case_rewards(order, "ffssss"), filtered=False)
    assert (len(groups.played), len(groups.trained), groups.equal) == (2, 2, 0)


def test_a_group_of_one_member_is_short() -> None:
    """Trap 14: a dropped member leaves its group, and a group needs two."""

    async def play(draws: Sequence[Draw], first: int) -> AsyncIterator[Group]:
        for at in range(len(draws)):
            yield [member(first + at, 0, 0.1), member(first + at, 1, 0.9, dropped="the env failed")]

    groups = asyncio.run(
        draw_groups(CaseOrder(KEYS, 0), play, wanted=1, filtered=True, credit="episode", resample=1, solved=0.8)
    )
    assert (groups.short, groups.trained, len(groups.played)) == (2, (), 2)


def test_a_group_that_does_not_come_back_is_noticed() -> None:
    async def play(draws: Sequence[Draw], first: int) -> AsyncIterator[Group]:
        yield [member(first, 0, 0.1), member(first, 1, 0.2)]

    with pytest.raises(MedSegError, match=r"groups \[0\] came back; 0 to 1 were played"):
        asyncio.run(
            draw_groups(CaseOrder(KEYS, 0), play, wanted=2, filtered=True, credit="episode", resample=1, solved=0.8)
        )


def test_solved_is_counted_over_members_that_were_not_dropped() -> None:
    group = [member(0, 0, 0.0, iou=0.9), member(0, 1, 0.0, iou=0.7), member(0, 2, 0.0, iou=0.9, dropped="aborted")]
    assert solved_share(group, 0.8) == 0.5
    assert solved_share(group[2:], 0.8) is None


def test_the_curriculum_learns_from_groups_that_are_filtered_out() -> None:
    order = CaseOrder(KEYS, seed=0, curriculum="difficulty")
    drawn(order, dict.fromkeys(KEYS, FLAT), wanted=2, resample=0)
    assert list(order.state()["solved"].values()) == [0.0, 0.0]
