"""The ids, `MedSeg-<Dataset>-<Tool>-v0`: the catalogue's pairs, those of other packages, and those of your own data."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from medseg_gym import plugins
from medseg_gym.datasets.cards import DATASETS
from medseg_gym.home import prepared
from medseg_gym.tools.cards import TOOLS

ANY = "MedSeg-v0"  # takes dataset= and tool=
_ID = re.compile(r"[A-Za-z0-9.]+")


def env_id(dataset: str, tool: str) -> str:
    """The id of a pair. Ids are composed, never parsed."""
    return f"MedSeg-{dataset}-{tool}-v0"


def catalogue() -> Iterator[tuple[str, str, str]]:
    """(env id, dataset id, tool id) of every pair of the catalogue."""
    for dataset in DATASETS:
        for tool in TOOLS:
            yield env_id(dataset, tool), dataset, tool


def added() -> Iterator[tuple[str, str, str]]:
    """(env id, dataset id, tool id) of every further pair: your own prepared data, and other packages' entry points.

    Looks at file names and entry points only. A name of the catalogue stays the catalogue's.
    """
    own = [name for name in dict.fromkeys((*plugins.names(plugins.DATASETS), *prepared())) if _is_new(name, DATASETS)]
    more_tools = [name for name in plugins.names(plugins.TOOLS) if _is_new(name, TOOLS)]
    for dataset in (*DATASETS, *own):
        for tool in (*TOOLS, *more_tools) if dataset in own else more_tools:
            yield env_id(dataset, tool), dataset, tool


def register() -> None:
    """Registers every id with Gymnasium; a second call adds what has come since."""
    if ANY not in gym.registry:
        _add(ANY, {})
    for pairs in (catalogue(), added()):
        for name, dataset, tool in pairs:
            if name not in gym.registry:
                _add(name, {"dataset": dataset, "tool": tool})


def _is_new(name: str, known: Container[str]) -> bool:
    return name not in known and _ID.fullmatch(name) is not None


def _add(name: str, kwargs: dict[str, str]) -> None:
    # gym.register compares each new id with all there are: 0.1 s for the catalogue, where this takes 0.01 s
    gym.registry[name] = EnvSpec(
        name,
        entry_point="medseg_gym.envs:SegmentEnv",
        vector_entry_point="medseg_gym.envs:SegmentVectorEnv",
        kwargs=kwargs,
    )
