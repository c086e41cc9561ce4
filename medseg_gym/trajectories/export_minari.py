"""Trajectories as a Minari dataset: played again in the env, so that observations and rewards are exactly the env's.

`root` is a MINARI_DATASETS_PATH; `minari.load_dataset(NAME)` finds the dataset there. Actions are the env's vectors,
observations what it shows (pixels without loss: Minari would pack them as JPEG by itself), infos the numbers and names
of a step. Marked turns are in it like any other; infos["marked"] says which actions they are. Minari's own collector is
not used, as it needs jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.episodes import decode_mask
from medseg_gym.errors import MedSegError
from medseg_gym.trajectories.export import Exported, whole_folder
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.store import Trajectories
from medseg_gym.types import Unreadable

NUMBERS = ("iou", "dice", "peak_iou", "turn", "tool_calls")
TEXTS = ("key", "structure", "instruction", "ended")


def export_minari(
    trajectories: Trajectories, root: str | PathLike[str], env: Any, name: str = "medseg-v0", *, description: str = ""
) -> Exported:
    """Writes the kept trajectories of `env`'s id into `root`/NAME, a name such as "btcv-nano-v0".

    `env` has their dataset and tool and a horizon as long as the longest; make it by id, and Minari can make it again.
    Other ids' trajectories are left out ("env"). Those whose IoU here is not the stored one, as may be on another
    machine, are written as they are played here, and counted as `differing`.
    """
    try:
        from minari.data_collector import EpisodeBuffer
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.dataset.minari_storage import MinariStorage
    except ImportError:
        raise MedSegError("Minari datasets are written by minari: pip install 'medseg-gym[export]'") from None
    try:
        parse_dataset_id(name)
    except (ValueError, TypeError):
        raise MedSegError(f"name={name!r}; wanted Minari's form, such as 'btcv-nano-v0'") from None
    from medseg_gym import __version__

    inner = env.unwrapped
    kept, done = trajectories.kept(), Exported(Path(root) / name)
    with whole_folder(done.folder) as folder:
        storage = MinariStorage.new(
            (folder / "data").absolute(),  # Minari joins it to itself where it is relative
            observation_space=env.observation_space,
            action_space=env.action_space,
            env_spec=env.spec,
            jpeg_encoding=False,
        )
        for trajectory in kept.records():
            if trajectory.episode.env != inner.name:
                done.left_out["env"] += 1
                continue
            buffer = _play(env, trajectory, done)
            storage.update_episodes([EpisodeBuffer(id=done.trajectories, **buffer)])
            done.trajectories += 1
            done.rows += len(buffer["rewards"])
        if not done.trajectories:
            raise MedSegError(f"no kept trajectory is of {inner.name}; make the env they were sampled in")
        strategies = sorted({head.strategy for head in kept.heads})
        from minari import __version__ as minari_version

        storage.update_metadata(
            {
                "dataset_id": name,
                "algorithm_name": ", ".join(strategies),
                "description": description or f"Trajectories of {inner.name}, written by medseg-gym {__version__}.",
                "minari_version": minari_version,
            }
        )
    return done


def _play(env: Any, trajectory: Trajectory, done: Exported) -> dict[str, Any]:
    """An episode's buffers: observations and infos before the first action and after each, the rest a step each."""
    episode, inner = trajectory.episode, env.unwrapped
    if episode.tool != inner.tool.fingerprint:
        raise MedSegError(
            f"{episode.key} was sampled with the tool {episode.tool}; the env has {inner.tool.fingerprint}"
        )
    options: dict[str, Any] = {"sample": episode.key}
    start = None if episode.start is None else decode_mask(episode.start)
    observation, info = env.reset(seed=0, options={**options, "start_mask": start})
    observations, infos = [observation], [_info(info, trajectory, None)]
    actions: list[Any] = []
    rewards: list[float] = []
    ends: list[tuple[bool, bool]] = []
    for number, turn in enumerate(episode.turns):
        if isinstance(turn.action, Unreadable):
            raise MedSegError(f"{episode.key}: turn {number} is unreadable; a demonstration has none")
        if ends and any(ends[-1]):
            raise MedSegError(
                f"{episode.key}: the env ended after {number} of {len(episode.turns)} turns; make it with a horizon "
                "and a rule for repeats that let the trajectory run to its end"
            )
        action = inner.encode_action(turn.action)
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        infos.append(_info(info, trajectory, number))
        actions.append(action)
        rewards.append(float(reward))
        ends.append((bool(terminated), bool(truncated)))
    if ends and not any(ends[-1]):
        ends[-1] = (False, True)  # given up without a stop: Minari's collector ends such an episode so, too
    if tuple(info["iou"].tolist() for info in infos) != episode.iou:
        done.differing += 1
    return {
        "seed": 0,
        "options": options,
        "observations": _stacked(observations),
        "actions": actions,
        "rewards": rewards,
        "terminations": [end[0] for end in ends],
        "truncations": [end[1] for end in ends],
        "infos": _stacked(infos),
    }


def _info(info: Mapping[str, Any], trajectory: Trajectory, number: int | None) -> dict[str, Any]:
    """What Minari can hold of an info: numbers and texts, the same at every step; the cache's counters are left out."""
    told: dict[str, Any] = {name: np.float64(info[name]) for name in NUMBERS}
    told |= {name: info[name] or "" for name in TEXTS}
    told["instruction"] = trajectory.instruction or told["instruction"]
    told["reward_terms"] = {name: np.float64(value) for name, value in info["reward_terms"].items()}
    told["marked"] = np.bool_(number is not None and bool(trajectory.marked) and trajectory.marked[number])
    return told


def _stacked(steps: list[Any]) -> Any:
    """Steps of nested dicts as a nested dict of lists."""
    if isinstance(steps[0], dict):
        return {name: _stacked([step[name] for step in steps]) for name in steps[0]}
    return steps
