"""Wrappers that other libraries need: coarse actions, float pictures, and the env creator for RLlib."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorObservationWrapper, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from medseg_gym.envs.coarse import CoarseGrid, VectorCoarseGrid
from medseg_gym.errors import MedSegError

__all__ = [
    "CoarseGrid",
    "Float32",
    "Standardised",
    "VectorCoarseGrid",
    "VectorFloat32",
    "VectorStandardised",
    "rllib_env",
    "standardised",
]

Floats = NDArray[np.float32]


class Float32(gym.ObservationWrapper[Any, Any, Any]):
    """Image observations as float32 in [0, 1] instead of uint8: RLlib's default encoders crash on uint8."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = _floats(env.observation_space)

    def observation(self, observation: NDArray[np.uint8]) -> Floats:
        return _scaled(observation)


class VectorFloat32(VectorObservationWrapper):
    """Float32 for a vector env."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.single_observation_space = _floats(env.single_observation_space)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def observations(self, observations: NDArray[np.uint8]) -> Floats:  # type: ignore[override]
        return _scaled(observations)


class Standardised(gym.ObservationWrapper[Any, Any, Any]):
    """Image observations as `standardised` makes them: small networks learn from them several times as fast."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = _unbounded(env.observation_space)

    def observation(self, observation: NDArray[np.uint8]) -> Floats:
        return standardised(observation)


class VectorStandardised(VectorWrapper):
    """Standardised for a vector env of any autoreset mode: last pictures of episodes in infos are standardised too."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.single_observation_space = _unbounded(env.single_observation_space)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(self, **keywords: Any) -> tuple[Floats, dict[str, Any]]:  # type: ignore[override]
        observations, infos = self.env.reset(**keywords)
        return standardised(observations), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        for i, last in enumerate(infos.get("final_obs", ())):
            if last is not None:
                infos["final_obs"][i] = standardised(last)
        return standardised(observations), rewards, terminated, truncated, infos


def rllib_env(config: Any) -> gym.Env[Any, Any] | VectorEnv[Any, Any, Any]:
    """RLlib's env creator: `tune.register_env("MedSeg", rllib_env)`, then `env_config={"id": ..., **keywords}`.

    With `gym_env_vectorize_mode="vector_entry_point"` RLlib asks for `num_envs` and gets the native vector env.
    "coarse" among the keywords is a dict of CoarseGrid's arguments: actions are coarse then. "standardised": True gives
    Standardised pictures instead of Float32's.
    """
    keywords = dict(config)
    if "id" not in keywords:
        raise MedSegError(f'env_config has no "id"; wanted e.g. {{"id": "MedSeg-Phantom-Stub-v0"}}, got {keywords}')
    name, num_envs, coarse = keywords.pop("id"), keywords.pop("num_envs", None), keywords.pop("coarse", None)
    even = keywords.pop("standardised", False)
    if num_envs is None:
        single = gym.make(name, **keywords)
        single = single if coarse is None else CoarseGrid(single, **coarse)
        return Standardised(single) if even else Float32(single)
    made = gym.make_vec(name, num_envs=num_envs, vectorization_mode="vector_entry_point", **keywords)
    made = made if coarse is None else VectorCoarseGrid(made, **coarse)
    return VectorStandardised(made) if even else VectorFloat32(made)


def standardised(pictures: NDArray[np.uint8]) -> Floats:
    """(..., S, S, 3) float32: each picture less its mean, over its standard deviation; one of one value gives 0.

    Sums are of whole numbers, so that a picture gives the same bits alone and among others.
    """
    axes = (-3, -2, -1)
    count = int(np.prod([pictures.shape[axis] for axis in axes]))
    total = pictures.sum(axes, dtype=np.int64, keepdims=True)
    squares = np.square(pictures, dtype=np.int64).sum(axes, keepdims=True)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares * count - total * total, 0)) / count
    return ((pictures - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)


def _unbounded(space: spaces.Space[Any]) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, _floats(space).shape, np.float32)


def _floats(space: spaces.Space[Any]) -> spaces.Box:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        raise MedSegError(f'this wraps image observations; this env has {space}; make it with observation="image"')
    return spaces.Box(0.0, 1.0, space.shape, np.float32)


def _scaled(observation: NDArray[np.uint8]) -> Floats:
    return np.multiply(observation, np.float32(1 / 255), dtype=np.float32)
