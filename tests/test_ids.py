"""The contract over every registered id: a valid spec, and a working env or the error that says what to get."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import WITHOUT_WEIGHTS
from gymnasium.utils.env_checker import check_env

import medseg_gym
from medseg_gym import datasets, tools
from medseg_gym.datasets.cards import DATASETS
from medseg_gym.errors import DataMissingError, WeightsMissingError
from medseg_gym.registration import ANY, added
from medseg_gym.tools.cards import TOOLS

CATALOGUE = list(medseg_gym.catalogue())
OWN = {name for name, _, _ in added()}  # of whoever runs the tests: prepared data and other packages


@pytest.fixture(autouse=True)
def _quiet(home: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="an image observation does not say")
        yield


def test_every_pair_of_the_catalogue_is_registered_and_nothing_else() -> None:
    registered = {name for name in gym.registry if name.startswith("MedSeg-")}
    assert registered == {name for name, _, _ in CATALOGUE} | {ANY} | OWN
    assert len(CATALOGUE) == len(DATASETS) * len(TOOLS)


def test_ids_and_names_are_ones_gymnasium_takes() -> None:
    for dataset in DATASETS:
        assert re.fullmatch(r"[A-Za-z0-9.]+", dataset), dataset
    for tool in TOOLS:
        assert re.fullmatch(r"[A-Za-z0-9.]+", tool), tool


@pytest.mark.parametrize(("env_id", "dataset", "tool"), CATALOGUE, ids=[name for name, _, _ in CATALOGUE])
def test_spec_and_make(env_id: str, dataset: str, tool: str) -> None:
    spec = gym.spec(env_id)
    assert spec.max_episode_steps is None
    assert spec.kwargs == {"dataset": dataset, "tool": tool}
    assert spec.entry_point == "medseg_gym.envs:SegmentEnv"
    assert spec.vector_entry_point == "medseg_gym.envs:SegmentVectorEnv"
    if not datasets.available(dataset):
        with pytest.raises(DataMissingError, match=f"medseg-gym data prepare {re.escape(dataset)} "):
            gym.make(env_id)
    elif not tools.available(tool):
        with pytest.raises(WeightsMissingError, match=f"medseg-gym tools download {re.escape(tool)}"):
            gym.make(env_id)
    else:
        if tool == "Nano":
            pytest.importorskip("torch")
        env = gym.make(env_id, size=32)
        assert env.spec is not None and env.spec.id == env_id
        assert env.observation_space.contains(env.reset(seed=0)[0])


def test_a_misspelt_id_is_not_found() -> None:
    with pytest.raises(gym.error.Error):
        gym.make("MedSeg-Phantom-GrabCat-v0")


@pytest.mark.parametrize("tool", WITHOUT_WEIGHTS)
@pytest.mark.parametrize("observation", ["image", "dict"])
def test_gymnasiums_checker_passes_for_every_tool_that_runs_here(tool: str, observation: str) -> None:
    env = gym.make(medseg_gym.env_id("Phantom", tool), observation=observation, render_mode="rgb_array", size=64)
    check_env(env.unwrapped)


@pytest.mark.parametrize("tool", WITHOUT_WEIGHTS)
def test_twin_seeds_give_twin_episodes_for_every_tool_that_runs_here(tool: str) -> None:
    def play() -> list[Any]:
        env = gym.make(medseg_gym.env_id("Phantom", tool), size=32, dataset_options={"size": 64})
        env.action_space.seed(1)
        out: list[Any] = [env.reset(seed=5)[0]]
        for _ in range(12):
            obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
            out += [obs, (reward, terminated, truncated, info["key"], info["iou"])]
            if terminated or truncated:
                out.append(env.reset()[0])
        return out

    for a, b in zip(play(), play(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tool", WITHOUT_WEIGHTS)
def test_slots_equal_single_envs_for_every_tool_that_runs_here(tool: str) -> None:
    name = medseg_gym.env_id("Phantom", tool)
    options: dict[str, Any] = {"size": 32, "dataset_options": {"size": 64}}
    vector = gym.make_vec(name, num_envs=2, vectorization_mode="vector_entry_point", **options)
    singles = [gym.make(name, **options) for _ in range(2)]
    obs, _ = vector.reset(seed=3)
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(obs[i], env.reset(seed=3 + i)[0])
    vector.action_space.seed(0)
    ended = [False, False]
    for _ in range(12):
        actions = vector.action_space.sample()
        obs, rewards, terminated, truncated, _ = vector.step(actions)
        for i, env in enumerate(singles):
            alone = (env.reset()[0], 0.0, False, False) if ended[i] else env.step(actions[i])[:4]
            np.testing.assert_array_equal(obs[i], alone[0])
            assert (rewards[i], terminated[i], truncated[i]) == alone[1:]
            ended[i] = bool(terminated[i] or truncated[i])


def test_import_is_light_and_registers_every_id(home: Path) -> None:
    """No torch, ray, vllm or transformers in a fresh interpreter."""
    code = (
        "import sys, medseg_gym, gymnasium as gym\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'matplotlib', 'cv2', 'h5py', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(sum(name.startswith('MedSeg-') for name in gym.registry))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(CATALOGUE) + 1 + len(list(added()))


def test_medseg_v0_takes_a_dataset_and_a_tool() -> None:
    env = gym.make("MedSeg-v0", dataset="Phantom", tool="Stub", size=32, horizon=1)
    env.reset(seed=0)
    assert env.step(np.array([0, 500, 500, 0, 0]))[3]


def test_the_root_links_lead_into_the_package() -> None:
    root = Path(medseg_gym.__file__).parents[1]
    if not (root / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    for name in ("envs", "policies"):
        assert (root / name).is_symlink()
        assert (root / name).resolve() == root / "medseg_gym" / name
