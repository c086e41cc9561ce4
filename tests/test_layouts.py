"""Every dataset layout on Stub: the checkers of Gymnasium and Stable-Baselines3, twin seeds, slots equal singles."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import test_importers as folders
from gymnasium.utils.env_checker import check_env

from medseg_gym.datasets.importers import LAYOUTS
from medseg_gym.datasets.prepare import prepare


def biomedparse(root: Path) -> None:
    for split in ("train", "test"):
        folders.listing(root, folders.biomedparse(root, split), split)


MAKERS: dict[str, Callable[[Path], Any]] = {"biomedparse": biomedparse, "imis-bench": folders.imis}


def test_every_layout_is_here() -> None:
    assert MAKERS.keys() == LAYOUTS.keys()


@pytest.fixture(params=sorted(MAKERS))
def store(request: pytest.FixtureRequest, tmp_path: Path, home: Path) -> str:
    """A store prepared from a small folder in the layout."""
    MAKERS[request.param](tmp_path / "source")
    return str(prepare("Mine", tmp_path / "source", layout=request.param).path)


def make(store: str, **options: Any) -> gym.Env[Any, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="an image observation does not say")
        return gym.make("MedSeg-v0", dataset=store, tool="Stub", size=84, render_mode="rgb_array", **options)


@pytest.mark.parametrize("observation", ["image", "dict"])
def test_gymnasiums_checker_passes(store: str, observation: str) -> None:
    check_env(make(store, observation=observation).unwrapped)


def test_stable_baselines_checker_passes(store: str) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(make(store).unwrapped)


def test_twin_seeds_give_twin_episodes(store: str) -> None:
    def play() -> list[Any]:
        env = make(store)
        env.action_space.seed(1)
        out: list[Any] = [env.reset(seed=5)[0]]
        for _ in range(20):
            obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
            out.append((obs, reward, terminated, truncated, info["key"], info["iou"]))
            if terminated or truncated:
                out.append(env.reset()[0])
        return out

    for a, b in zip(play(), play(), strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_slots_equal_single_envs(store: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vector = gym.make_vec("MedSeg-v0", num_envs=3, dataset=store, tool="Stub", size=84)
    singles = [make(store) for _ in range(3)]
    obs, _ = vector.reset(seed=2)
    vector.action_space.seed(0)
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(obs[i], env.reset(seed=2 + i)[0])
    ended = [False] * 3
    for _ in range(15):
        actions = vector.action_space.sample()
        obs, rewards, terminated, truncated, _ = vector.step(actions)
        for i, env in enumerate(singles):
            alone = (env.reset()[0], 0.0, False, False) if ended[i] else env.step(actions[i])[:4]
            np.testing.assert_array_equal(obs[i], alone[0])
            assert (rewards[i], terminated[i], truncated[i]) == alone[1:]
            ended[i] = bool(terminated[i] or truncated[i])


@pytest.mark.slow
def test_the_main_job_on_real_slices(samples: Path, tmp_path: Path, home: Path) -> None:
    """BTCV's real slices end to end: the oracle beats the box, which beats random; the test patients are 028-032."""
    from medseg_gym.bench.evaluate import evaluate

    prepare("BTCV", samples / "imis-bench" / "BTCV")
    result = evaluate(
        "MedSeg-BTCV-GrabCut-v0", ["OracleBoxThenClicks", "BoxOnce", "Random"], cases=30, out=tmp_path / "run"
    )
    oracle, box, random = (row["dice"] for row in result.summary["rows"])
    assert oracle > box > random
    assert {episode.patient for episode in result.episodes} <= {"028", "029", "030", "031", "032"}
    assert result.report is not None and result.report.stat().st_size > 100_000
    timings = result.directory / "times.json"
    assert '"encodes": 0' in timings.read_text()  # the second and third policy find every embedding in the cache
