"""Wrappers that other libraries need: float32 observations, and the env creator for RLlib."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorObservationWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from medseg_gym.errors import MedSegError

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


def rllib_env(config: Any) -> gym.Env[Any, Any] | VectorEnv[Any, Any, Any]:
    """RLlib's env creator: `tune.register_env("MedSeg", rllib_env)`, then `env_config={"id": ..., **keywords}`.

    With `gym_env_vectorize_mode="vector_entry_point"` RLlib asks for `num_envs` and gets the native vector env.
    """
    keywords = dict(config)
    if "id" not in keywords:
        raise MedSegError(f'env_config has no "id"; wanted e.g. {{"id": "MedSeg-Phantom-Stub-v0"}}, got {keywords}')
    name, num_envs = keywords.pop("id"), keywords.pop("num_envs", None)
    if num_envs is None:
        return Float32(gym.make(name, **keywords))
    made = gym.make_vec(name, num_envs=num_envs, vectorization_mode="vector_entry_point", **keywords)
    return VectorFloat32(made)


def _floats(space: spaces.Space[Any]) -> spaces.Box:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        raise MedSegError(f'Float32 wraps image observations; this env has {space}; make it with observation="image"')
    return spaces.Box(0.0, 1.0, space.shape, np.float32)


def _scaled(observation: NDArray[np.uint8]) -> Floats:
    return np.multiply(observation, np.float32(1 / 255), dtype=np.float32)
