"""SegmentEnv: what a turn does, what ends an episode, and what comes back."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import Blobs
from gymnasium.utils.env_checker import check_env

import medseg_gym
from medseg_gym import metrics
from medseg_gym.envs import SegmentEnv
from medseg_gym.errors import BadDataError, InvalidActionError, MedSegError, UnknownNameError
from medseg_gym.rewards import PRESETS, RewardSpec
from medseg_gym.types import Box, Click, Prediction, Stop, Undo, Unreadable

DISC, BAR = "Blobs/train-0/disc", "Blobs/train-0/bar"


def make(**options: Any) -> SegmentEnv:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SegmentEnv(dataset=options.pop("dataset", Blobs()), tool=options.pop("tool", "Stub"), **options)


def begin(key: str = DISC, **options: Any) -> SegmentEnv:
    env = make(**options)
    env.reset(seed=0, options={"sample": key})
    return env


def target_of(key: str) -> np.ndarray:
    return Blobs()[key].target


def tight_box(key: str) -> Box:
    rows, columns = np.nonzero(target_of(key))
    return Box(int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max()))


def test_a_box_on_stub_gives_its_rectangle_and_the_iou_worked_out_by_hand() -> None:
    env = begin(BAR)
    box = tight_box(BAR)
    _, reward, terminated, truncated, info = env.step(box)
    assert info["iou"] == 1.0  # the bar is a rectangle
    # 0.2 readable + 0.8 (q + 0.1 q - 0.01) with q = 1
    assert reward == pytest.approx(0.2 + 0.8 * 1.09)
    assert (terminated, truncated, info["tool_calls"]) == (False, False, 1)


def test_reward_terms_add_up_to_the_reward() -> None:
    env = begin()
    for action in (Click(20, 14), tight_box(DISC), Undo(), Unreadable("?"), Stop()):
        _, reward, *_, info = env.step(action)
        assert reward == pytest.approx(sum(info["reward_terms"].values()), abs=1e-12)


def test_a_vector_and_the_typed_action_it_encodes_do_the_same() -> None:
    typed, vector = begin(), begin()
    for action in (tight_box(DISC), Click(20, 20, False), Undo(), Stop()):
        one = typed.step(action)
        two = vector.step(vector.encode_action(action))
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1:4] == two[1:4]
        assert (one[4]["iou"], one[4]["reward_terms"]) == (two[4]["iou"], two[4]["reward_terms"])


def test_stop_terminates_and_horizon_truncates_after_executing_the_last_action() -> None:
    env = begin(BAR, horizon=2)
    env.step(Click(1, 1))
    _, _, terminated, truncated, info = env.step(tight_box(BAR))
    assert (terminated, truncated, info["ended"]) == (False, True, "horizon")
    bar = int(target_of(BAR).sum())
    assert info["iou"] == pytest.approx(bar / (bar + 48))  # the box counted; 48 pixels of the click's disc stay
    env = begin(BAR, horizon=2)
    env.step(Click(1, 1))
    _, _, terminated, truncated, info = env.step(Stop())
    assert (terminated, truncated, info["ended"]) == (True, False, "stopped")


def test_stepping_an_ended_or_unbegun_episode_says_to_reset() -> None:
    env = begin()
    env.step(Stop())
    with pytest.raises(MedSegError, match="call reset first"):
        env.step(Stop())
    with pytest.raises(MedSegError, match="call reset first"):
        make().step(Stop())


def test_undo_returns_the_previous_mask_and_calls_no_tool() -> None:
    env = begin()
    first, *_ = env.step(tight_box(DISC))
    before = env.view()
    env.step(Click(60, 40))
    again, _, _, _, info = env.step(Undo())
    np.testing.assert_array_equal(first, again)
    assert env.view().prompts == before.prompts
    assert info["tool_calls"] == 2


def test_undo_with_nothing_to_take_back_only_costs_the_turn() -> None:
    env = begin()
    _, _, _, _, info = env.step(Undo())
    assert (info["turn"], info["tool_calls"], info["iou"]) == (1, 0, 0.0)


def test_an_unreadable_turn_changes_nothing_and_is_told_to_the_policy() -> None:
    env = begin()
    env.step(tight_box(DISC))
    before = env.view()
    _, _, terminated, _, info = env.step(Unreadable("no JSON"))
    after = env.view()
    assert after.mask is before.mask and after.prompts == before.prompts and not terminated
    assert (info["turn"], info["tool_calls"]) == (2, 1)
    assert after.history[-1][1] == Unreadable("no JSON")


def test_an_unreadable_turn_can_end_the_episode() -> None:
    env = begin(on_unreadable="end")
    _, _, terminated, truncated, info = env.step(Unreadable("?"))
    assert (terminated, truncated, info["ended"]) == (True, False, "unreadable")


def test_an_agent_that_never_says_anything_readable_ends_unreadable_even_on_an_absent_structure() -> None:
    env = begin(dataset=Blobs(absent=True), horizon=2)
    env.step(Unreadable("?"))
    _, _, terminated, truncated, info = env.step(Unreadable("?"))
    assert (terminated, truncated, info["ended"], info["iou"]) == (False, True, "unreadable", 1.0)


def test_an_absent_structure_is_best_answered_by_stopping_at_once() -> None:
    env = begin(dataset=Blobs(absent=True))
    _, reward, *_ = env.step(Stop())
    assert reward == pytest.approx(1.0)
    env = begin(dataset=Blobs(absent=True))
    _, clicked, *_ = env.step(Click(5, 5))
    _, stopped, *_ = env.step(Stop())
    assert clicked + stopped < 1.0


def test_a_newer_box_replaces_the_older_and_clicks_stay() -> None:
    env = begin()
    env.step(Box(0, 0, 10, 10))
    env.step(Click(30, 30))
    env.step(Box(20, 20, 30, 30))
    assert env.view().prompts == (Click(30, 30), Box(20, 20, 30, 30))


def test_three_identical_actions_end_the_episode_where_asked() -> None:
    env = begin(stop_after_repeats=3, horizon=10)
    for _ in range(2):
        _, _, terminated, *_ = env.step(Click(9, 9))
        assert not terminated
    _, _, terminated, _, info = env.step(Click(9, 9))
    assert terminated and info["ended"] == "stopped"


def test_repeats_are_counted_in_a_row_only() -> None:
    env = begin(stop_after_repeats=2, horizon=10)
    for action in (Click(9, 9), Click(8, 9), Click(9, 9)):
        _, _, terminated, *_ = env.step(action)
        assert not terminated


def test_a_start_mask_is_in_force_and_undo_discards_it() -> None:
    env = make()
    start = target_of(DISC)
    _, info = env.reset(options={"sample": DISC, "start_mask": start})
    assert info["iou"] == 1.0
    _, _, _, _, info = env.step(Undo())
    assert info["iou"] == 0.0


def test_a_start_mask_reaches_the_tool_as_the_prior_20_mask_minus_10() -> None:
    seen = []

    class Spy(type(medseg_gym.tools.stub.Stub())):  # type: ignore[misc]
        def predict(self, queries: Any) -> list[Prediction]:
            seen.extend(queries)
            return super().predict(queries)

    env = make(tool=Spy())
    start = target_of(DISC)
    env.reset(options={"sample": DISC, "start_mask": start})
    env.step(Click(1, 1))
    np.testing.assert_array_equal(seen[0].prior, np.where(start, 10, -10))


@pytest.mark.parametrize("mask", [np.zeros((3, 3), bool), np.zeros((48, 64)), "x"])
def test_a_start_mask_of_the_wrong_kind_is_refused(mask: object) -> None:
    with pytest.raises(BadDataError, match="start_mask"):
        make().reset(options={"sample": DISC, "start_mask": mask})


def test_observation_is_the_letterboxed_image_with_a_green_mask_in_a_fresh_array() -> None:
    env = begin(size=64)
    first, *_ = env.step(Box(0, 0, 63, 47))
    image = Blobs()[DISC].image.astype(float)
    np.testing.assert_array_equal(first[:8], 0)  # 48 x 64: eight rows of padding on either side
    expected = np.floor(image * 0.5 + np.array([0, 255, 0]) * 0.5 + 0.5)
    np.testing.assert_array_equal(first[8:56], expected)
    kept = first.copy()
    env.step(Undo())
    np.testing.assert_array_equal(first, kept)


def test_dict_observation_names_the_target_and_the_turn() -> None:
    env = make(observation="dict", size=32)
    obs, _ = env.reset(options={"sample": DISC})
    assert env.observation_space.contains(obs)
    assert obs["target"] == Blobs.structures.index("disc") and obs["turn"] == 0
    obs, *_ = env.step(Box(0, 0, 63, 47))
    assert obs["turn"] == 1 and obs["mask"][16].all() and not obs["mask"][0].any()
    assert env.observation_space.contains(obs)


def test_the_target_is_in_no_observation_and_no_view() -> None:
    """Two cases that differ in nothing but the target look the same, step for step."""

    class Elsewhere(Blobs):
        def __getitem__(self, key: str) -> Any:
            import dataclasses

            sample = super().__getitem__(key)
            return dataclasses.replace(sample, target=np.roll(sample.target, 9, axis=1))

    here, there = begin(observation="dict"), begin(observation="dict", dataset=Elsewhere())
    for action in (tight_box(DISC), Click(9, 9, False), Click(40, 9), Undo()):
        a, b = here.step(action)[0], there.step(action)[0]
        assert all(np.array_equal(a[k], b[k]) for k in a)
        assert not hasattr(here.view(), "target")
        np.testing.assert_array_equal(here.view().mask, there.view().mask)


def test_several_structures_behind_an_image_observation_warn_once() -> None:
    class Fresh(Blobs):
        name = "FreshBlobs"

    with pytest.warns(UserWarning, match="does not say which"):
        SegmentEnv(dataset=Fresh(), tool="Stub")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SegmentEnv(dataset=Fresh(), tool="Stub")

    class Single(Blobs):
        name = "SingleBlobs"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SegmentEnv(dataset=Single(), tool="Stub", structures=["disc"])


def test_structures_keeps_the_chosen_ones_only() -> None:
    env = make(structures=("disc",))
    assert {env.reset(seed=s)[1]["structure"] for s in range(12)} == {"disc"}


def test_info_has_the_same_keys_at_every_step() -> None:
    env = make()
    _, info = env.reset(seed=1)
    keys = set(info)
    assert {"instruction", "structure", "key", "iou", "dice", "peak_iou", "turn", "reward_terms", "ended"} <= keys
    assert set(env.step(Click(3, 3))[-1]) == keys


def test_peak_iou_stays_when_the_mask_gets_worse() -> None:
    env = begin(BAR)
    env.step(tight_box(BAR))
    *_, info = env.step(Click(60, 5))
    assert info["peak_iou"] == 1.0 and info["iou"] < 1.0


def test_seeding_decides_the_cases_and_resets_go_on_from_it() -> None:
    def keys() -> list[str]:
        env = make()
        return [env.reset(seed=7)[1]["key"], *(env.reset()[1]["key"] for _ in range(6))]

    assert keys() == keys()
    assert len(set(keys())) > 1


def test_actions_are_snapped_to_the_grid_where_the_image_is_larger_than_it() -> None:
    env = begin("Blobs/train-0/disc", dataset=Blobs(1200, 3000))
    env.step(Click(1001, 502))
    (click,) = env.view().prompts
    assert isinstance(click, Click)
    assert abs(click.x - 1001) < 3 and abs(click.y - 502) < 3
    assert env.engine.slot(0).grid.snap(click) == click


@pytest.mark.parametrize(
    "action",
    [
        [5, 0, 0, 0, 0],
        [0, 1000, 0, 0, 0],
        [0, -1, 0, 0, 0],
        [0, 0, 0, 0],
        np.zeros((1, 5), int),
        np.zeros(5),
        None,
        "stop",
        {},
    ],
)
def test_a_bad_action_is_refused_with_what_was_wanted_and_nothing_is_lost(action: Any) -> None:
    env = begin()
    env.step(tight_box(DISC))
    before = env.view()
    with pytest.raises(InvalidActionError, match="wanted 5 integers"):
        env.step(action)
    assert env.view().mask is before.mask and env.view().turn == 1
    env.step(Stop())


@pytest.mark.parametrize("action", [Click(1.5, 2), Click("a", 2), Click(float("nan"), 2), Click(1, 2, "no")])  # type: ignore[arg-type]
def test_typed_actions_without_whole_numbers_are_refused(action: Any) -> None:
    env = begin()
    for refuse in (env.step, env.encode_action):
        with pytest.raises(InvalidActionError):
            refuse(action)
    assert env.view().turn == 0


def test_typed_actions_with_numpys_numbers_are_stored_as_plain_ones() -> None:
    from medseg_gym.episodes import from_json, to_json

    env = begin()
    env.step(Click(np.int64(3), np.uint8(4), np.True_))  # type: ignore[arg-type]
    assert from_json(to_json(env.episode())).turns[0].action == Click(3, 4, True)


@pytest.mark.parametrize("not_an_action", [None, Unreadable("?"), "stop"])
def test_only_actions_are_encoded(not_an_action: Any) -> None:
    with pytest.raises(InvalidActionError):
        begin().encode_action(not_an_action)


def test_a_horizon_of_numpys_is_taken() -> None:
    assert make(horizon=np.int64(3)).engine.config.horizon == 3


def test_a_failed_episode_takes_back_what_it_was_paid() -> None:
    class Tiring(type(medseg_gym.tools.stub.Stub())):  # type: ignore[misc]
        calls = 0

        def predict(self, queries: Any) -> list[Prediction]:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("out of memory")
            return super().predict(queries)

    env = begin(tool=Tiring(), on_error="fail")
    first, second = (env.step(Click(20, 14 + i))[1] for i in range(2))
    assert first > 0 and first + second == pytest.approx(0.0)


def test_verbs_restricts_the_action_space_and_typed_actions() -> None:
    env = begin(verbs=("box", "stop"))
    assert env.action_space.nvec.tolist() == [2, 1000, 1000, 1000, 1000]
    _, _, terminated, *_ = env.step(np.array([1, 0, 0, 0, 0]))
    assert terminated
    env.reset(options={"sample": DISC})
    with pytest.raises(InvalidActionError, match="allows box, stop"):
        env.step(Click(1, 1))


def test_every_sampled_action_is_valid() -> None:
    env = make(horizon=200)
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(200):
        if env.step(env.action_space.sample())[2]:
            env.reset()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"horizn": 3}, "did you mean 'horizon'"),
        ({"reward": "shapd"}, "did you mean 'shaped'"),
        ({"verbs": ("bx",)}, "did you mean 'box'"),
        ({"observation": "imge"}, "did you mean 'image'"),
        ({"split": "tran"}, "did you mean 'train'"),
        ({"structures": ("disk",)}, "did you mean 'disc'"),
        ({"render_mode": "human"}, "rgb_array"),
        ({"tool": "GrabCat"}, "did you mean 'GrabCut'"),
        ({"dataset": "Fantom"}, "did you mean 'Phantom'"),
        ({"max_episode_steps": 3}, "horizon="),
    ],
)
def test_unknown_names_and_keywords_say_what_was_meant(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownNameError, match=says):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"horizon": 0},
        {"horizon": 2.5},
        {"horizon": True},
        {"size": 0},
        {"size": 10**6},
        {"verbs": ()},
        {"verbs": 5},
        {"structures": 5},
        {"reward": ["shaped"]},
        {"reward": None},
        {"dataset_options": None},
        {"tool_options": {"memory": "lates"}},
        {"dataset": "Phantom", "dataset_options": {"sze": 3}},
        {"dataset": "Phantom", "dataset_options": {"absent": "x"}},
        {"dataset": "Phantom", "dataset_options": {"size": 3}},
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MedSegError):
        make(**options)


def test_unknown_reset_options_and_cases_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'sample'"):
        make().reset(options={"sampel": DISC})
    with pytest.raises(UnknownNameError, match="no case"):
        make().reset(options={"sample": "Blobs/train-9/disc"})


def test_a_split_without_cases_is_refused_by_name() -> None:
    class Empty(Blobs):
        def keys(self, split: str, structures: Any = ()) -> tuple[str, ...]:
            return ()

    with pytest.raises(BadDataError, match="no case in its train split"):
        make(dataset=Empty())


def test_image_and_target_of_different_sizes_are_refused_by_key() -> None:
    class Crooked(Blobs):
        def __getitem__(self, key: str) -> Any:
            import dataclasses

            return dataclasses.replace(super().__getitem__(key), target=np.zeros((5, 5), bool))

    with pytest.raises(BadDataError, match="train-0/disc"):
        make(dataset=Crooked()).reset(options={"sample": DISC})


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3000, 4096)])
def test_the_smallest_and_a_large_image_work(height: int, width: int) -> None:
    env = begin(dataset=Blobs(height, width), size=64)
    for action in (Box(0, 0, width - 1, height - 1), Click(width // 2, height // 2, False), Undo(), Stop()):
        obs, *_ = env.step(action)
        assert env.observation_space.contains(obs)


def test_a_failing_tool_raises_or_fails_the_episode_as_asked() -> None:
    class Broken(type(medseg_gym.tools.stub.Stub())):  # type: ignore[misc]
        def predict(self, queries: Any) -> list[Prediction]:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        begin(tool=Broken()).step(Click(1, 1))
    env = begin(tool=Broken(), on_error="fail")
    _, reward, terminated, _, info = env.step(Click(1, 1))
    assert (reward, terminated, info["ended"]) == (0.0, True, "failed")
    assert "out of memory" in info["error"]
    assert env.episode().ended == "failed"


def test_the_episode_record_holds_what_happened() -> None:
    from medseg_gym.episodes import decode_mask, from_json, to_json

    env = begin(BAR)
    env.step(tight_box(BAR))
    env.step(Stop())
    episode = env.episode(policy="me", seed=3, case=4)
    assert from_json(to_json(episode)) == episode
    assert (episode.env, episode.ended, episode.iou) == ("MedSeg-Blobs-Stub-v0", "stopped", (0.0, 1.0, 1.0))
    np.testing.assert_array_equal(decode_mask(episode.turns[-1].mask), target_of(BAR))
    assert metrics.noc(episode.iou, 0.9) == 1


@pytest.mark.parametrize("reward", [*PRESETS, RewardSpec({"quality": 1.0}, timing="terminal")])
@pytest.mark.parametrize("observation", ["image", "dict"])
def test_gymnasiums_checker_passes(reward: Any, observation: str) -> None:
    env = gym.make(
        "MedSeg-v0", dataset=Blobs(), tool="Stub", reward=reward, observation=observation, render_mode="rgb_array"
    )
    check_env(env.unwrapped, skip_render_check=False)


def test_render_gives_a_picture_of_the_asked_size() -> None:
    env = begin(size=96, render_mode="rgb_array")
    env.step(tight_box(DISC))
    picture = env.render()
    assert picture is not None and picture.shape == (96, 96, 3) and picture.dtype == np.uint8
    with pytest.warns(UserWarning, match="render_mode"):
        assert make().render() is None
