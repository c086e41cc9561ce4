"""Other libraries on the envs: Gymnasium's wrappers, Stable-Baselines3, RLlib."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from baseline_files import load
from conftest import WITHOUT_WEIGHTS

from medseg_gym import env_id
from medseg_gym.envs.wrappers import Float32, VectorFloat32, rllib_env
from medseg_gym.errors import MedSegError

ENV = "MedSeg-Phantom-Stub-v0"
SMALL: dict[str, Any] = {"structures": ("liver",), "dataset_options": {"size": 64, "task": "ct"}}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="an image observation does not say")
        yield


@pytest.mark.parametrize("tool", WITHOUT_WEIGHTS)
def test_stable_baselines_checker_passes(tool: str) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    env = gym.make(env_id("Phantom", tool), size=84, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(image observation does not say|overlay|render).*")
        checker.check_env(env.unwrapped, warn=True)


@pytest.mark.slow
def test_stable_baselines_ppo_trains_on_images() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_util import make_vec_env

    env = make_vec_env(ENV, n_envs=2, seed=0, env_kwargs={"size": 84, **SMALL})
    model = sb3.PPO("CnnPolicy", env, n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu")
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(256)
    assert model.num_timesteps == 256
    assert any(not value.equal(before[name]) for name, value in model.policy.state_dict().items())
    action, _ = model.predict(env.reset(), deterministic=True)
    assert all(env.action_space.contains(a) for a in action)


@pytest.mark.slow
def test_rllib_ppo_trains_on_the_native_vector_env() -> None:
    ray = pytest.importorskip("ray")
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.tune.registry import register_env

    register_env("MedSeg", rllib_env)
    ray.init(address="local", num_cpus=2, include_dashboard=False, ignore_reinit_error=True, log_to_driver=False)
    try:
        config = (
            PPOConfig()
            .environment("MedSeg", env_config={"id": f"medseg_gym:{ENV}", "size": 64, **SMALL})
            .env_runners(num_env_runners=1, num_envs_per_env_runner=4, gym_env_vectorize_mode="vector_entry_point")
            .training(train_batch_size_per_learner=256, minibatch_size=64, num_epochs=1)
            .debugging(seed=0)
        )
        algorithm = config.build_algo()
        result = algorithm.train()
        algorithm.stop()
    finally:
        ray.shutdown()
    runners = result["env_runners"]
    assert runners["num_env_steps_sampled"] >= 256
    assert np.isfinite(runners["episode_return_mean"])


def _short(tmp_path: Path, steps: int) -> list[str]:
    """The arguments of a baseline that is over in seconds."""
    words = ["--env", ENV, "--images", "24", "--test", "4", "--every", "256", "--steps", str(steps)]
    return [*words, "--out", str(tmp_path / "run"), "--result", str(tmp_path / "result.json")]


def _check_result(tmp_path: Path, library: str, steps: list[int]) -> None:
    from medseg_gym.policies.pixels import PixelNet

    told = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    (seed,) = told["seeds"]
    assert [point["steps"] for point in seed["curve"]] == steps
    assert 0 < told["scripted"]["CentreClick"]["iou"] < told["scripted"]["BoxOnce"]["iou"] < 1
    gap = seed["curve"][-1]["iou"] - told["scripted"]["CentreClick"]["iou"]
    assert seed["against"]["CentreClick"]["mean"] == pytest.approx(gap)
    assert str(tmp_path) not in json.dumps(told) and told["test"]["cases"] == 4
    assert (tmp_path / "result.png").read_bytes()[:4] == b"\x89PNG"
    assert PixelNet.load(tmp_path / "run" / f"ppo_{library}.safetensors").spec.structure == "optic disc"


@pytest.mark.slow
def test_the_stable_baselines_recipe_trains_resumes_and_tells_its_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("stable_baselines3")
    baseline = load("sb3_ppo", monkeypatch)
    baseline.main(_short(tmp_path, 256))
    _check_result(tmp_path, "sb3", [0, 256])
    baseline.main(_short(tmp_path, 512))
    _check_result(tmp_path, "sb3", [0, 256, 512])


@pytest.mark.slow
def test_the_rllib_recipe_trains_and_tells_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.rllib")
    load("rllib_ppo", monkeypatch).main(_short(tmp_path, 256))
    _check_result(tmp_path, "rllib", [0, 256])


def test_the_native_vector_env_steps_as_stable_baselines_own_does() -> None:
    """The same slots, seeds and actions: pictures, rewards, ends and last pictures agree over automatic resets."""
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_util import make_vec_env

    from medseg_gym.envs.sb3 import SB3VecEnv

    options = {"size": 32, "horizon": 2, **SMALL}
    theirs = make_vec_env(ENV, n_envs=3, seed=7, env_kwargs=options)
    ours = SB3VecEnv(gym.make_vec(ENV, num_envs=3, autoreset_mode="SameStep", **options))
    ours.seed(7)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    ours.action_space.seed(0)
    ended = 0
    for _ in range(6):
        actions = np.stack([ours.action_space.sample() for _ in range(3)])
        (obs, rewards, done, infos), (obs2, rewards2, done2, infos2) = ours.step(actions), theirs.step(actions)
        np.testing.assert_array_equal(obs, obs2)
        np.testing.assert_allclose(rewards, rewards2, atol=1e-6)
        np.testing.assert_array_equal(done, done2)
        for one, two in zip(infos, infos2, strict=True):
            assert one["TimeLimit.truncated"] == two["TimeLimit.truncated"]
            assert one["ended"] == two["ended"] and one["reward_terms"] == two["reward_terms"]
            assert ("terminal_observation" in one) == ("terminal_observation" in two)
            if "terminal_observation" in one:
                ended += 1
                np.testing.assert_array_equal(one["terminal_observation"], two["terminal_observation"])
    assert ended >= 3
    with pytest.raises(MedSegError, match="SameStep"):
        SB3VecEnv(gym.make_vec(ENV, num_envs=2, **options))


def test_rllibs_env_creator_makes_coarse_standardised_envs() -> None:
    config = {"id": ENV, "size": 32, "coarse": {"verbs": ("box",), "cells": 4}, "standardised": True, **SMALL}
    single, vector = rllib_env(config), rllib_env({**config, "num_envs": 2})
    np.testing.assert_array_equal(single.reset(seed=4)[0], vector.reset(seed=4)[0][0])
    assert single.action_space == vector.single_action_space == gym.spaces.MultiDiscrete([1, 4, 4, 3])
    assert vector.observation_space.contains(vector.step(np.zeros((2, 4), np.int64))[0])


def test_float32_scales_single_and_vector_observations_alike() -> None:
    single = Float32(gym.make(ENV, size=48, **SMALL))
    vector = rllib_env({"id": ENV, "num_envs": 2, "size": 48, **SMALL})
    assert isinstance(vector, VectorFloat32)
    one, many = single.reset(seed=4)[0], vector.reset(seed=4)[0]
    assert one.dtype == np.float32 and single.observation_space.contains(one)
    assert vector.observation_space.contains(many)
    np.testing.assert_array_equal(one, many[0])
    raw = gym.make(ENV, size=48, **SMALL).reset(seed=4)[0]
    np.testing.assert_allclose(one, raw / 255, atol=1e-7)


def test_float32_refuses_dict_observations() -> None:
    with pytest.raises(MedSegError, match="observation="):
        Float32(gym.make(ENV, observation="dict", **SMALL))
    with pytest.raises(MedSegError, match="id"):
        rllib_env({"num_envs": 2})


def test_record_video_writes_a_film(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    env = gym.make(ENV, render_mode="rgb_array", size=64, **SMALL)
    env = gym.wrappers.RecordVideo(env, str(tmp_path), episode_trigger=lambda episode: True)
    env.reset(seed=0)
    env.step(np.array([2, 300, 300, 700, 700]))
    env.step(np.array([3, 0, 0, 0, 0]))
    env.close()
    assert [file.suffix for file in tmp_path.iterdir()].count(".mp4") == 1


def test_record_episode_statistics_counts_the_return() -> None:
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(ENV, **SMALL))
    env.reset(seed=0)
    _, first, *_ = env.step(np.array([2, 100, 100, 900, 900]))
    *_, info = env.step(np.array([3, 0, 0, 0, 0]))
    second = info["episode"]["r"] - first
    assert info["episode"]["l"] == 2 and abs(second) < 1e-6


def test_async_vector_env_of_single_envs_works() -> None:
    env = gym.make_vec(ENV, num_envs=2, vectorization_mode="async", size=32, **SMALL)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    env.action_space.seed(0)
    env.step(env.action_space.sample())
    env.close()


def test_a_dataset_and_a_tool_of_ones_own_go_through_make(blobs: Any) -> None:
    from medseg_gym.tools.stub import Stub

    env = gym.make("MedSeg-v0", dataset=blobs, tool=Stub(), size=32, structures=("disc",))
    env.reset(seed=0)
    assert env.unwrapped.dataset is blobs  # type: ignore[attr-defined]
