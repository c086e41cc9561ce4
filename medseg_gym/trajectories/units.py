"""What a run of trajectories consists of: which cases of which envs, and which of them a worker takes at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import gymnasium as gym

from medseg_gym import datasets, tools
from medseg_gym.bench.cases import choose_cases, content_of
from medseg_gym.datasets.base import SPLITS, Dataset
from medseg_gym.envs.config import EnvConfig
from medseg_gym.errors import MedSegError, UnknownNameError, unknown
from medseg_gym.registration import ANY, env_id
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.trajectories.sample import check_strategy

SECRET = "token"  # the option of a tool server that no record may hold
ALL = "all"  # the three splits together


@dataclass(frozen=True)
class Source:
    """An env's dataset and tool, as a worker process can load them; the env by the id it has in the records."""

    env: str
    dataset: str | Dataset
    tool: str | SegmentationTool
    dataset_options: Mapping[str, Any]
    tool_options: Mapping[str, Any]

    def load(self) -> tuple[Dataset, tools.CachedTool]:
        return datasets.load(self.dataset, **self.dataset_options), tools.load(self.tool, **self.tool_options)


@dataclass(frozen=True)
class Unit:
    """Cases that one worker outlines at once, by every strategy, so that it encodes their images once."""

    source: Source
    cases: tuple[tuple[int, str], ...]  # number and key; cases of one image come one after another

    def order(self, strategies: Sequence[str]) -> list[tuple[str, str]]:
        """(key, strategy) of its trajectories as they are stored: image by image, whatever the size of the units."""
        groups = [list(keys) for _, keys in groupby((key for _, key in self.cases), key=image_of)]
        return [(key, strategy) for keys in groups for strategy in strategies for key in keys]


def plan(
    env: str,
    strategies: Sequence[str],
    options: Mapping[str, Any],
    *,
    split: str,
    cases: int | None,
    seed: int,
    at_once: int,
) -> tuple[list[Unit], dict[str, Any]]:
    """The units of one env, and what identifies it: content, keys and fingerprints, with its modality and notes."""
    source = source_of(env, options)
    data, tool = source.load()
    source = replace(source, env=env_id(data.name, tool.name))
    for strategy in strategies:
        check_strategy(strategy, tool)
    structures = EnvConfig.of({"structures": options.get("structures", ())}).structures
    keys, notes = _keys(data, split, structures, cases, seed)
    units: list[Unit] = []
    filling: list[tuple[int, str]] = []
    for _, group in groupby(enumerate(keys), key=lambda case: image_of(case[1])):
        filling += group
        if len(filling) >= at_once:
            units.append(Unit(source, tuple(filling)))
            filling = []
    if filling:
        units.append(Unit(source, tuple(filling)))
    return units, {
        "env": source.env,
        "dataset": data.name,
        "modality": modality(data.name),
        "tool": tool.name,
        "fingerprint": tool.fingerprint,
        "content": content_of(data, keys),
        "structures": list(structures),
        "cases": len(keys),
        "keys": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
        "notes": notes,
        "dataset_options": dict(source.dataset_options),
        "tool_options": {name: value for name, value in source.tool_options.items() if name != SECRET},
    }


def source_of(env: str, options: Mapping[str, Any]) -> Source:
    """The dataset and the tool behind an id; "MedSeg-v0" is told them by dataset= and tool=."""
    known = gym.registry.get(env)
    if known is None or known.vector_entry_point != "medseg_gym.envs:SegmentVectorEnv":
        raise unknown("env", env, (name for name in gym.registry if name.startswith("MedSeg-")))
    given = {name: options[name] for name in ("dataset", "tool") if name in options}
    if env != ANY and given:
        raise MedSegError(f"{' and '.join(given)} goes with the env {ANY}; {env} has its own in its id")
    pair = given if env == ANY else known.kwargs
    if len(pair) < 2:
        raise UnknownNameError(f"{ANY} wants dataset= and tool=; {', '.join(given) or 'neither'} was given")
    more = EnvConfig.of({name: options[name] for name in ("dataset_options", "tool_options") if name in options})
    return Source(env, pair["dataset"], pair["tool"], more.dataset_options, more.tool_options)


def image_of(key: str) -> str:
    """What the keys of one image have in common, so that they stay together; only speed hangs on it."""
    return key.rpartition("/")[0]


def modality(dataset: str) -> str:
    """A dataset's modality by its card; "" where it has none, or several."""
    from medseg_gym.datasets.cards import DATASETS

    return DATASETS[dataset].modality if dataset in DATASETS else ""


def _keys(
    data: Dataset, split: str, structures: Sequence[str], cases: int | None, seed: int
) -> tuple[list[str], list[str]]:
    if split != ALL:
        return choose_cases(data, split, structures, cases, seed)
    return choose_cases(_Whole(data), SPLITS[0], structures, cases, seed)


class _Whole:
    """A dataset whose every split is all of it."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.name, self.structures = dataset, dataset.name, dataset.structures

    def keys(self, split: str, structures: Sequence[str] = ()) -> list[str]:
        return [key for part in SPLITS for key in self.dataset.keys(part, structures)]

    def __getitem__(self, key: str) -> Any:
        return self.dataset[key]
