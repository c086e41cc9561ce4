"""SegmentVectorEnv: equal to single envs slot by slot, every autoreset mode, send and recv."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import Blobs
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from medseg_gym.envs import SegmentEnv, SegmentVectorEnv
from medseg_gym.errors import InvalidActionError, MedSegError, UnknownNameError
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Box, Click, Stop, Unreadable

COUNTERS = {"encodes", "cache_hits", "cache_misses"}  # of the process, not of the slot
MODES = list(AutoresetMode)


def quietly(make: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(**options)


def vector(num_envs: int = 3, **options: Any) -> SegmentVectorEnv:
    return quietly(SegmentVectorEnv, num_envs=num_envs, dataset=Blobs(), tool=options.pop("tool", "Stub"), **options)


def single(**options: Any) -> SegmentEnv:
    return quietly(SegmentEnv, dataset=Blobs(), tool="Stub", **options)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() - COUNTERS == b.keys() - COUNTERS and all(same(a[k], b[k]) for k in a.keys() - COUNTERS)
    if isinstance(a, np.ndarray) and a.dtype == object:
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b))


def actions(env: Any, seed: int) -> Any:
    space = env.action_space if isinstance(env, SegmentVectorEnv) else env.single_action_space
    space.seed(seed)
    while True:
        yield space.sample()


@pytest.mark.parametrize("observation", ["image", "dict"])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_the_native_env_equals_gymnasiums_sync_env_step_for_step(mode: AutoresetMode, observation: str) -> None:
    """Slot i seeded s equals a single env seeded s + i, over repeated autoresets; infos in the same form."""
    native = vector(3, autoreset_mode=mode, observation=observation, size=48)
    sync = SyncVectorEnv([lambda: single(observation=observation, size=48)] * 3, autoreset_mode=mode)
    a, b = native.reset(seed=5), sync.reset(seed=5)
    assert same(a[0], b[0]) and same(a[1], b[1])
    native.action_space.seed(1)
    ends = 0
    for _ in range(40):
        action = native.action_space.sample()
        a, b = native.step(action), sync.step(action)
        for x, y in zip(a, b, strict=True):
            assert same(x, y)
        ends += int((a[2] | a[3]).sum())
    assert ends > 10


def test_twin_seeds_give_twin_runs() -> None:
    def run() -> list[Any]:
        env = vector(4, size=32)
        out = [env.reset(seed=11)]
        env.action_space.seed(2)
        out += [env.step(env.action_space.sample()) for _ in range(25)]
        return out

    for x, y in zip(run(), run(), strict=True):
        assert all(same(a, b) for a, b in zip(x, y, strict=True))


def test_next_step_mode_ignores_the_action_after_an_end_and_resets() -> None:
    env = vector(2)
    env.reset(seed=0)
    env.step([Stop(), Click(3, 3)])
    _, rewards, terminated, _, infos = env.step([Box(0, 0, 9, 9), Click(4, 4)])
    assert rewards[0] == 0 and not terminated.any()
    assert infos["turn"].tolist() == [0, 2]


def test_same_step_mode_keeps_the_final_observation_and_info() -> None:
    env = vector(2, autoreset_mode="SameStep")
    env.reset(seed=0)
    obs, _, terminated, _, infos = env.step([Stop(), Click(3, 3)])
    assert terminated.tolist() == [True, False]
    assert infos["_final_info"].tolist() == [True, False]
    assert infos["final_info"]["ended"][0] == "stopped"
    assert infos["turn"].tolist() == [0, 1]
    assert infos["final_obs"][0].shape == obs[0].shape


def test_disabled_mode_resets_the_masked_slots_only_and_pins_their_cases() -> None:
    env = vector(3, autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step([Stop(), Click(9, 9), Stop()])
    kept = env.view(1)
    keys = ["Blobs/train-1/disc", None, "Blobs/train-2/bar"]
    _, infos = env.reset(options={"sample": keys, "reset_mask": np.array([True, False, True])})
    assert infos["_key"].tolist() == [True, False, True]
    assert (infos["key"][0], infos["key"][2]) == (keys[0], keys[2])
    assert env.view(1).mask is kept.mask
    with pytest.raises(MedSegError, match="has ended"):
        env.step([Stop(), Stop(), Stop()])
        env.step([Stop(), Stop(), Stop()])


def test_a_group_shares_its_case_and_first_observation() -> None:
    env = vector(4)
    obs, infos = env.reset(options={"sample": "Blobs/train-1/bar"})
    assert set(infos["key"]) == {"Blobs/train-1/bar"}
    assert all(np.array_equal(obs[0], o) for o in obs)


def test_one_step_asks_the_tool_once_for_all_slots_and_encodes_each_image_once() -> None:
    calls: list[int] = []
    encoded: list[int] = []

    class Spy(Stub):
        def predict(self, queries: Any) -> Any:
            calls.append(len(queries))
            return super().predict(queries)

        def encode(self, images: Any) -> Any:
            encoded.append(len(images))
            return super().encode(images)

    env = vector(6, tool=Spy())
    env.reset(options={"sample": ["Blobs/train-0/disc", "Blobs/train-0/bar"] * 3})
    for _ in range(3):
        env.step([Click(5, 5)] * 6)
    assert calls == [6, 6, 6]
    assert sum(encoded) == 1  # both structures lie in one image


def test_send_and_recv_step_the_sent_slots_with_one_tool_call() -> None:
    env = vector(4, autoreset_mode="Disabled")
    env.reset(seed=0)
    env.send([Click(9, 9), Stop()], [2, 0])
    ids, obs, rewards, terminated, truncated, infos = env.recv()
    assert ids.tolist() == [0, 2]
    assert terminated.tolist() == [True, False] and not truncated.any()
    assert obs.shape[0] == len(rewards) == len(infos["turn"]) == 2
    assert infos["turn"].tolist() == [1, 1]
    assert [env.view(i).turn for i in range(4)] == [1, 0, 1, 0]


def test_send_and_recv_do_what_step_does() -> None:
    one, two = vector(3, autoreset_mode="Disabled"), vector(3, autoreset_mode="Disabled")
    one.reset(seed=3), two.reset(seed=3)
    todo = [Box(2, 2, 20, 20), Click(9, 30, False), Unreadable("?")]
    stepped = one.step(todo)
    two.send(todo[1:], [1, 2])
    two.recv()
    two.send(todo[:1], [0])
    two.recv()
    np.testing.assert_array_equal(stepped[0], two._observe(range(3)))


def test_send_refuses_what_cannot_be_executed_before_anything_is_queued() -> None:
    env = vector(3, autoreset_mode="Disabled")
    env.reset(seed=0)
    with pytest.raises(InvalidActionError):
        env.send([Click(1, 1), "rubbish"], [0, 1])
    with pytest.raises(MedSegError, match="send first"):
        env.recv()
    env.send([Click(1, 1)], [0])
    with pytest.raises(InvalidActionError, match="under way"):
        env.send([Click(1, 1)], [0])
    with pytest.raises(MedSegError, match="under way"):
        env.step([Stop()] * 3)
    with pytest.raises(MedSegError, match="under way"):
        env.reset()
    with pytest.raises(InvalidActionError, match="slot 7"):
        env.send([Stop()], [7])
    with pytest.raises(MedSegError, match="Disabled"):
        vector(2).send([Stop()], [0])


@pytest.mark.parametrize("options", [{"sample": [None, None, "bad"]}, {"start_mask": [None, None, np.zeros((2, 2))]}])
def test_a_refused_reset_moves_no_slot_and_draws_nothing(options: dict[str, Any]) -> None:
    env, twin = vector(3, autoreset_mode="Disabled"), vector(3, autoreset_mode="Disabled")
    env.reset(seed=4), twin.reset(seed=4)
    env.step([Click(9, 9)] * 3)
    with pytest.raises(MedSegError):
        env.reset(options=options)
    assert [env.view(i).turn for i in range(3)] == [1, 1, 1]
    assert env.reset()[1]["key"].tolist() == twin.reset()[1]["key"].tolist()


def test_a_reset_of_slots_with_actions_under_way_moves_no_slot() -> None:
    env = vector(3, autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step([Click(9, 9)] * 3)
    env.send([Click(8, 8)], [2])
    with pytest.raises(MedSegError, match=r"slots \[2\]"):
        env.reset()
    assert [env.view(i).turn for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("ids", [[True, False], [2.7, 0], ["a", "b"]])
def test_slot_numbers_that_are_none_are_refused(ids: Any) -> None:
    env = vector(3, autoreset_mode="Disabled")
    env.reset(seed=0)
    with pytest.raises(InvalidActionError, match="wanted slot numbers"):
        env.send([Stop(), Stop()], ids)


@pytest.mark.parametrize("bad", [[Stop()], np.zeros((3, 4), int), np.full((3, 5), 1000), 7, [Stop(), Stop(), "x"]])
def test_bad_batches_are_refused_and_no_slot_moves(bad: Any) -> None:
    env = vector(3)
    env.reset(seed=0)
    with pytest.raises(InvalidActionError):
        env.step(bad)
    assert [env.view(i).turn for i in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"autoreset_mode": "NextStp"}, "did you mean"), ({"num_env": 3}, "did you mean 'num_envs'")],
)
def test_unknown_vector_options_say_what_was_meant(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownNameError, match=says):
        vector(**options)


def test_wrong_counts_of_seeds_and_samples_are_refused() -> None:
    with pytest.raises(MedSegError, match="2 seeds"):
        vector(3).reset(seed=[1, 2])
    with pytest.raises(MedSegError, match="sample has 2"):
        vector(3).reset(options={"sample": ["a", "b"]})
    with pytest.raises(MedSegError, match="num_envs"):
        vector(0)


@pytest.mark.parametrize("mode", MODES)
def test_make_vec_reaches_the_native_env_in_every_mode(mode: AutoresetMode) -> None:
    env = gym.make_vec("MedSeg-Phantom-Stub-v0", num_envs=2, autoreset_mode=mode, structures=("liver",), size=32)
    assert isinstance(env.unwrapped, SegmentVectorEnv)
    assert env.metadata["autoreset_mode"] is mode
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)


def test_the_last_action_of_every_slot_is_stored_snapped() -> None:
    env = quietly(SegmentVectorEnv, num_envs=2, dataset=Blobs(1500, 2200), tool="Stub", autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step([Click(1001, 501), Box(3, 4, 2000, 1402)])
    for i in range(2):
        action = env.episode(i).turns[-1].action
        assert env.engine.slot(i).grid.snap(action) == action


def test_render_gives_a_picture_a_slot() -> None:
    env = vector(2, render_mode="rgb_array", size=40)
    env.reset(seed=0)
    pictures = env.render()
    assert pictures is not None and [p.shape for p in pictures] == [(40, 40, 3)] * 2
