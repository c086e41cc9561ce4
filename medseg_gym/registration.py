"""The catalogue: every dataset with every tool is an env id, `MedSeg-<Dataset>-<Tool>-v0`."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from medseg_gym.datasets.cards import DATASETS
from medseg_gym.tools.cards import TOOLS

ANY = "MedSeg-v0"  # takes dataset= and tool=


def env_id(dataset: str, tool: str) -> str:
    """The id of a pair. Ids are composed, never parsed."""
    return f"MedSeg-{dataset}-{tool}-v0"


def catalogue() -> Iterator[tuple[str, str, str]]:
    """(env id, dataset id, tool id) of every pair."""
    for dataset in DATASETS:
        for tool in TOOLS:
            yield env_id(dataset, tool), dataset, tool


def register() -> None:
    """Registers every id with Gymnasium; a second call changes nothing."""
    if ANY in gym.registry:
        return
    _add(ANY, {})
    for name, dataset, tool in catalogue():
        _add(name, {"dataset": dataset, "tool": tool})


def _add(name: str, kwargs: dict[str, str]) -> None:
    # gym.register compares each new id with all there are: 0.1 s for the catalogue, where this takes 0.01 s
    gym.registry[name] = EnvSpec(
        name,
        entry_point="medseg_gym.envs:SegmentEnv",
        vector_entry_point="medseg_gym.envs:SegmentVectorEnv",
        kwargs=kwargs,
    )
