"""The native vector env as Stable-Baselines3 wants one: `SB3VecEnv(gym.make_vec(..., autoreset_mode="SameStep"))`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from medseg_gym.errors import MedSegError

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise MedSegError("SB3VecEnv needs Stable-Baselines3: pip install 'medseg-gym[sb3]'") from error


class SB3VecEnv(VecEnv):
    """One tool call a step for all slots, where Stable-Baselines3's own vector envs step one by one.

    Takes a vector env with image observations and AutoresetMode.SAME_STEP, as Stable-Baselines3 resets by itself.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise MedSegError(f'autoreset_mode is {mode}; make the env with autoreset_mode="SameStep"')
        self.env = env
        self._actions: NDArray[Any] | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        seeds: Any = self._seeds if any(seed is not None for seed in self._seeds) else None
        observations, infos = self.env.reset(seed=seeds)
        self.reset_infos = [_of_slot(infos, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: NDArray[Any]) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Where an episode ended its slot's info is of its last turn, the observation of the next episode's first."""
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        done = terminated | truncated
        slots = []
        for i in range(self.num_envs):
            if done[i]:
                self.reset_infos[i] = _of_slot(infos, i)
                info = {**_of_slot(infos["final_info"], i), "terminal_observation": infos["final_obs"][i]}
            else:
                info = _of_slot(infos, i)
            slots.append({**info, "TimeLimit.truncated": bool(truncated[i] and not terminated[i])})
        return observations, rewards.astype(np.float32), done, slots

    def close(self) -> None:
        self.env.close()

    # there is one env, whatever the indices

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        source = self.env if attr_name == "render_mode" else self.env.unwrapped
        return [getattr(source, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        raise MedSegError(f"{attr_name} belongs to all slots at once; set it on the env itself")

    def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **keywords: Any) -> list[Any]:
        """The method of the vector env, called once."""
        answer = getattr(self.env.unwrapped, method_name)(*arguments, **keywords)
        return [answer] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        pictures: Any = self.env.render()
        return list(pictures) if pictures is not None else [None] * self.num_envs


def _of_slot(infos: dict[str, Any], index: int) -> dict[str, Any]:
    """A slot's own info out of Gymnasium's arrays; keys that it lacks are left out."""
    return {
        name: _of_slot(value, index) if isinstance(value, dict) else value[index]
        for name, value in infos.items()
        if not name.startswith(("_", "final_")) and (mask := infos.get(f"_{name}")) is not None and mask[index]
    }
