"""replay: stored episodes through the real engine come out exact, equivalent or different, and say where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import Blobs

from medseg_gym import rewards
from medseg_gym.bench.replay import replay
from medseg_gym.envs.vector import SegmentVectorEnv
from medseg_gym.episodes import encode_mask, from_json, to_json
from medseg_gym.metrics import dice
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Box, Click, Episode, Image, Prediction, Query, Stop, Undo, Unreadable

BOX, SPOT = Box(10, 10, 50, 40), Click(30, 20)
SCRIPT = (Unreadable("hm"), BOX, SPOT, Undo(), Stop())


class Shaky(Stub):
    """A Stub whose masks lack `off` pixels of their first covered ones: another machine's rounding, made visible."""

    def __init__(self, off: int) -> None:
        super().__init__()
        self.off, self.encoded = off, 0

    def encode(self, images: Sequence[Image]) -> list[Any]:
        self.encoded += len(images)
        return super().encode(images)

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        answers = []
        for answer in super().predict(queries):
            logits = answer.logits.copy()
            for row, column in np.argwhere(logits > 0)[: self.off]:
                logits[row, column] = -10
            answers.append(replace(answer, logits=logits))
        return answers


def env(tool: Any = None, slots: int = 3, **options: Any) -> SegmentVectorEnv:
    options = {"horizon": 6, "size": 8, "split": "test", "observation": "dict", **options}
    return SegmentVectorEnv(slots, Blobs(), tool or Stub(), autoreset_mode="Disabled", on_error="fail", **options)


def play(where: SegmentVectorEnv, script: Sequence[Any] = SCRIPT, start: Any = None) -> list[Episode]:
    """The script on every case, through the disk's text and back."""
    episodes = []
    for case, key in enumerate(where.dataset.keys("test")):
        where.engine.reset(0, np.random.default_rng(0), {"sample": key, "start_mask": start})
        for action in script:
            if where.engine.slot(0).ended is None:
                where.engine.step([0], [action])
        episodes.append(from_json(to_json(where.episode(0, policy="script", case=case))))
    return episodes


def test_every_kind_of_turn_comes_out_exact() -> None:
    episodes = play(env())
    assert [r.verdict for r in replay(env(), episodes)] == ["exact"] * 6
    assert all(r.dice == 1.0 and r.turn is None for r in replay(env(), episodes))


def test_results_stand_in_the_order_of_the_episodes_and_an_image_is_encoded_once() -> None:
    tool = Shaky(0)
    episodes = play(env(tool))
    mixed = [episodes[i] for i in (5, 0, 3, 1, 4, 2)]
    mixed[2] = replace(mixed[2], iou=(0.25, *mixed[2].iou[1:]))
    tool.encoded = 0
    found = [r.verdict for r in replay(env(tool, slots=2), mixed)]
    assert found == ["exact", "exact", "different", "exact", "exact", "exact"]
    assert tool.encoded <= 3  # three images for six cases; those still in the tool's cache cost nothing


def test_a_given_start_mask_is_given_again() -> None:
    start = np.zeros((48, 64), np.bool_)
    start[5:30, 5:30] = True
    episodes = play(env(), start=start)
    assert episodes[0].start is not None
    assert {r.verdict for r in replay(env(), episodes)} == {"exact"}
    (result, *_) = replay(env(), [replace(episodes[0], start=None)])
    assert (result.verdict, result.turn, result.what) == ("different", 1, "mask")


@pytest.mark.parametrize("reward", ["shaped", "medsam-agent", "ibis"])
def test_one_pixel_in_1271_is_equivalent_where_the_stored_numbers_fit_the_stored_masks(reward: str) -> None:
    """The box covers 41 x 31 = 1271 pixels; two masks that differ in one of them have Dice 2 * 1270 / 2541 = .99961."""
    episodes = play(env(Shaky(1), reward=reward))
    results = replay(env(reward=reward), episodes)
    assert {r.verdict for r in results} == {"equivalent"}
    assert results[0].dice == pytest.approx(2 * 1270 / 2541) and results[0].turn == 2
    edited = replace(episodes[0], turns=(episodes[0].turns[0], replace(episodes[0].turns[1], reward=0.9)))
    edited = replace(edited, turns=(*edited.turns, *episodes[0].turns[2:]))
    assert replay(env(reward=reward), [edited])[0].what == "reward"


def test_three_pixels_in_1271_are_different_and_the_turn_and_dice_are_told() -> None:
    """2 * 1268 / 2539 = .99882 is below .999."""
    (result, *_) = replay(env(), play(env(Shaky(3))))
    assert (result.verdict, result.turn, result.what) == ("different", 2, "mask")
    assert result.dice == pytest.approx(2 * 1268 / 2539) and "3 pixels off, Dice 0.9988" in result.found


def changed(episode: Episode, turn: int, **values: Any) -> Episode:
    turns = list(episode.turns)
    turns[turn - 1] = replace(turns[turn - 1], **values)
    return replace(episode, turns=tuple(turns))


def flipped(episode: Episode, turn: int) -> dict[str, Any]:
    from medseg_gym.episodes import decode_mask

    mask = decode_mask(episode.turns[turn - 1].mask)
    mask[47, 63] = ~mask[47, 63]
    return encode_mask(mask)


def test_what_was_changed_is_named_with_its_turn() -> None:
    (episode, *_) = play(env())
    curve = tuple(v + 0.01 if t == 3 else v for t, v in enumerate(episode.iou))
    cases = {
        ("iou", 3): replace(episode, iou=curve),
        ("reward", 4): changed(episode, 4, reward=episode.turns[3].reward + 1e-12),
        ("terms", 2): changed(episode, 2, terms={**episode.turns[1].terms, "bonus": 0.0}),
        ("tool_called", 1): changed(episode, 1, tool_called=True),
        ("action", 2): changed(episode, 2, action=Click(900, 20)),
        ("mask", 3): changed(episode, 3, action=Click(12, 40, False)),
        ("ended", 5): replace(episode, ended="horizon"),
        ("ended", 4): replace(episode, turns=episode.turns[:4], iou=episode.iou[:5], dice=episode.dice[:5]),
        ("case", 0): replace(episode, key="Blobs/test-9/disc"),
    }
    results = replay(env(), list(cases.values()))
    assert [(r.what, r.turn) for r in results] == list(cases)
    assert {r.verdict for r in results} == {"different"}
    longer = replace(
        episode, turns=(*episode.turns, episode.turns[4]), iou=(*episode.iou, 0.5), dice=(*episode.dice, 0.5)
    )
    (result,) = replay(env(), [longer])
    assert (result.what, result.found, result.wanted) == ("length", "6 turns", "stopped after 5")


def test_a_flipped_bit_with_its_old_numbers_is_different_although_the_masks_are_equivalent() -> None:
    (episode, *_) = play(env())
    (result,) = replay(env(), [changed(episode, 2, mask=flipped(episode, 2))])
    assert (result.verdict, result.what) == ("different", "iou")


def test_masks_of_another_size_and_broken_run_lengths_are_different_not_a_crash() -> None:
    (episode, *_) = play(env())
    small = encode_mask(np.zeros((4, 4), np.bool_))
    broken = {"size": [48, 64], "counts": "zz"}
    results = replay(env(), [changed(episode, 1, mask=m) for m in (small, broken)] + [changed(episode, 3, mask=broken)])
    assert [(r.verdict, r.what) for r in results] == [("different", "mask")] * 3


def test_a_policy_that_failed_leaves_an_episode_that_is_exact_as_far_as_it_goes() -> None:
    (episode, *_) = play(env(), SCRIPT[:3])
    assert episode.ended == "failed"
    assert replay(env(), [replace(episode, error="policy: RuntimeError: no")])[0].verdict == "exact"
    assert replay(env(), [replace(episode, ended="stopped")])[0].what == "ended"


def test_a_reward_that_is_not_the_runs_is_different() -> None:
    episodes = play(env(reward="shaped"))
    other = rewards.RewardSpec(terms={"quality": 1.0}, name="shaped")
    assert {r.what for r in replay(env(reward=other), episodes)} == {"terms"}


def test_the_dice_of_two_empty_masks_is_one() -> None:
    empty = np.zeros((2, 2), np.bool_)
    assert dice(empty, empty) == 1.0
