"""Reflective trajectories: mistakes that are taken back and marked, and wrong start masks that are discarded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import Blobs
from test_trajectories import Scripted, actions, empty, one, played, square

from medseg_gym.datasets.kinds import Kinds
from medseg_gym.datasets.phantom import Phantom
from medseg_gym.episodes import decode_mask
from medseg_gym.metrics import iou
from medseg_gym.tools.stub import Stub
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.reflect import wrong_start
from medseg_gym.trajectories.sample import sample
from medseg_gym.trajectories.strategies import STRATEGIES, Settings
from medseg_gym.types import Box, Click, Mask, Sample, Stop, Undo


class Grouped(Blobs):
    """Blobs that tells which cases share an image."""

    def siblings(self, key: str) -> dict[str, str]:
        image = key.rpartition("/")[0]
        return {structure: f"{image}/{structure}" for structure in self.structures}


def phantoms(count: int = 12) -> list[Sample]:
    data = Phantom(size=64)
    return [data[key] for key in data.keys("train")[:count]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mistake_is_marked_taken_back_and_replays_in_the_env(strategy: str) -> None:
    settings = Settings(self_correction=1.0, min_iou=0.2, min_dice=0.2, longest=20)
    made = sample(Stub(), phantoms(), strategy, settings, env="MedSeg-Phantom-Stub-v0")
    found = [t for t in made if t.kind == "self-correction"]
    assert len(found) >= 4
    for trajectory in found:
        episode = trajectory.episode
        at = trajectory.marked.index(True)
        assert sum(trajectory.marked) == 1 and len(trajectory.marked) == len(episode.turns) <= episode.horizon
        wrong, undo = episode.turns[at].action, episode.turns[at + 1].action
        assert isinstance(wrong, Click | Box) and undo == Undo()
        assert episode.iou[at + 2] == episode.iou[at]
        assert episode.iou[at + 1] < max(episode.iou[at] - 0.04, 0.04)
        assert wrong != episode.turns[at + 2].action and isinstance(episode.turns[-1].action, Stop)
        assert not trajectory.dropped
        assert episode == played(Phantom(size=64), Stub(), episode)


def test_without_the_mistake_it_is_the_plain_trajectory() -> None:
    still: dict[str, Any] = {"click_jitter": (0, 0), "retries": 0, "horizon": 9, "min_iou": 0.2}
    plain = sample(Stub(), phantoms(), "sequential-click", Settings.of(still))
    corrected = sample(Stub(), phantoms(), "sequential-click", Settings.of({**still, "self_correction": 1.0}))
    compared = 0
    for one_, other in zip(plain, corrected, strict=True):
        if other.kind == "self-correction" and len(one_.episode.turns) <= 7:
            at = other.marked.index(True)
            left = [action for i, action in enumerate(actions(other)) if i not in (at, at + 1)]
            assert left == actions(one_)
            compared += 1
    assert compared >= 4


def test_a_mistake_takes_the_place_of_the_last_prompts_where_turns_are_short() -> None:
    target = square().target

    def rows(n: int, query: object) -> Mask:
        mask = target.copy()
        if n < 4:
            mask[40 + (10, 15, 17, 19)[n] :] = False  # IoU .5, .75, .85, .95
        else:
            mask[:, 45:] = False  # .25: the mistake
        return mask

    made = one(Scripted(rows), "sequential-click", self_correction=1.0)  # 4 prompts and the stop fill the 5 turns
    assert made.kind == "self-correction" and len(made.episode.turns) == 5 and made.tries == 5
    assert [v for i, v in enumerate(made.episode.iou) if not made.marked[i - 1] or i == 0][-1] == 0.75
    bad = one(Scripted(rows), "sequential-click", self_correction=1.0, min_iou=0.8)  # .75 would be dropped
    assert bad.kind == "plain" and bad.episode.iou[-1] == 0.95 and bad.marked == ()


def test_where_no_mistake_does_harm_the_trajectory_stays_plain() -> None:
    made = one(Scripted(lambda n, query: square().target), "box-to-point", self_correction=1.0)
    assert made.kind == "plain" and made.marked == () and made.tries == 7  # one prompt, six tries to spoil it
    assert made.dropped == "" and len(made.episode.turns) == 2


def test_where_the_tool_fails_at_the_mistake_the_trajectory_is_whole_without() -> None:
    def fails(n: int, query: object) -> Mask:
        if n:
            raise RuntimeError("out of memory")
        return square().target

    made = one(Scripted(fails), "box-to-point", self_correction=1.0)
    assert made.kind == "plain" and made.dropped == "" and made.episode.ended == "stopped" and not made.episode.error


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_wrong_start_is_another_structure_and_is_undone_first(strategy: str) -> None:
    data = Grouped()
    keys = data.keys("train")
    others = [lambda key=key: [data[o].target for o in data.siblings(key).values() if o != key] for key in keys]
    made = sample(Stub(), [data[key] for key in keys], strategy, Settings(wrong_start=1.0), others=others)
    for key, trajectory in zip(keys, made, strict=True):
        episode = trajectory.episode
        assert trajectory.kind == "wrong-start" and trajectory.marked == ()
        (other,) = (data[o].target for o in data.siblings(key).values() if o != key)
        assert episode.start is not None and np.array_equal(decode_mask(episode.start), other)
        assert episode.turns[0].action == Undo() and not decode_mask(episode.turns[0].mask).any()
        assert len(episode.turns) <= episode.horizon
        again = played(data, Stub(), episode)
        assert (again.turns, again.iou, again.start) == (episode.turns, episode.iou, episode.start)


def test_alone_in_its_image_a_structure_begins_with_itself_elsewhere() -> None:
    case = square()
    start = wrong_start(case, [], Settings(), np.random.default_rng(0))
    assert start is not None and start.sum() == case.target.sum() and iou(start, case.target) < 0.1
    overlapping = case.target.copy()
    overlapping[40] = False  # nearly the target itself: not wrong
    again = wrong_start(case, [overlapping], Settings(), np.random.default_rng(0))
    assert again is not None and not np.array_equal(again, overlapping)
    whole = square(side=20, at=0, size=20)
    assert wrong_start(whole, [], Settings(), np.random.default_rng(0)) is None


def test_a_wrong_start_mask_of_the_dataset_is_discarded_and_a_rough_one_refined() -> None:
    for kind, discarded in (("inconsistent", True), ("refine", False)):
        data = Kinds(Grouped(), (kind,))
        keys: Sequence[str] = data.keys("train")
        starts = [data.start_mask(key) for key in keys]
        made: list[Trajectory] = sample(
            Stub(), [data[k] for k in keys], "sequential-click", starts=starts, env="MedSeg-Blobs-Stub-v0"
        )
        for case, trajectory in enumerate(made):
            assert (trajectory.kind == "wrong-start") == discarded
            assert (trajectory.episode.turns[0].action == Undo()) == discarded
            again = played(data, Stub(), trajectory.episode)
            assert (again.turns, again.iou, again.start) == tuple(
                getattr(trajectory.episode, name) for name in ("turns", "iou", "start")
            )
            assert trajectory.episode.case == case


def test_the_shares_are_of_the_cases() -> None:
    settings = Settings(self_correction=0.25, wrong_start=0.25, min_iou=0.0, horizon=9)
    made = sample(Scripted(empty), [square()] * 200, "sequential-click", settings)
    kinds = [t.kind for t in made]
    assert 35 <= kinds.count("wrong-start") <= 65
    mistaken = sample(Stub(), [square()] * 200, "box-to-point", settings)
    assert 35 <= [t.kind for t in mistaken].count("self-correction") <= 65


def test_nothing_is_drawn_for_reflection_where_none_is_asked_for() -> None:
    rngs = [np.random.default_rng(0), np.random.default_rng(0)]
    off = sample(Stub(), [square()], "box-to-point", Settings(), rngs[:1])
    from medseg_gym.trajectories.reflect import chosen_kind

    assert chosen_kind(Settings(), rngs[1]) == "plain"
    assert off == sample(Stub(), [square()], "box-to-point", Settings(), rngs[1:])
