"""The catalogue: every dataset with every tool is an env id, `MedSeg-<Dataset>-<Tool>-v0`."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium as gym

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
    entry_points = {
        "entry_point": "medseg_gym.envs:SegmentEnv",
        "vector_entry_point": "medseg_gym.envs:SegmentVectorEnv",
    }
    gym.register(ANY, **entry_points)  # type: ignore[arg-type]
    for name, dataset, tool in catalogue():
        gym.register(name, kwargs={"dataset": dataset, "tool": tool}, **entry_points)  # type: ignore[arg-type]
