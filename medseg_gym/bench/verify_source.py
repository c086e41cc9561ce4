"""Which dataset and tool a run's files name, and how they are had here: by id only, with options that name no file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

from medseg_gym import datasets, plugins, tools
from medseg_gym.bench.runs import Run, read_record
from medseg_gym.datasets.base import Dataset
from medseg_gym.datasets.cards import DATASETS
from medseg_gym.errors import BadDataError
from medseg_gym.home import prepared
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.tools.cards import TOOLS


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset and a tool as a run's files name them."""

    dataset: str
    dataset_options: Mapping[str, Any]
    tool: str
    tool_options: Mapping[str, Any]
    written: bool  # whether the run's files say so; else it is what the catalogue has under the env's id

    def dataset_here(self) -> Dataset:
        if self.dataset not in (*DATASETS, *plugins.names(plugins.DATASETS), *prepared()):
            raise BadDataError(f"no dataset {self.dataset!r:.100} is known here")
        return datasets.load(self.dataset, **_harmless(self.dataset_options))

    def tool_here(self) -> SegmentationTool:
        if self.tool not in (*TOOLS, *plugins.names(plugins.TOOLS)):
            raise BadDataError(f"no tool {self.tool!r:.100} is known here")
        return tools.load(self.tool, **_harmless(self.tool_options))


def sources_of(run: Run, folder: Path) -> dict[str, Source]:
    """Per env id what to load: from the summary, else the suite's entry, else from the catalogue."""
    rows = (run.summary or {}).get("rows")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    entry = (read_record(folder / "provenance.json") or {}).get("entry")
    entry = entry if isinstance(entry, dict) else {}
    options = _mapping(entry.get("options"))
    found: dict[str, Source] = {}
    for env, _ in run.settings["pairs"]:
        row: dict[str, Any] = next((row for row in rows if row.get("env") == env), {})
        known = gym.registry[env].kwargs if env in gym.registry else {}
        found[env] = Source(
            dataset=str(row.get("dataset") or entry.get("dataset") or known.get("dataset", "")),
            dataset_options=_mapping(row.get("dataset_options") or options.get("dataset_options")),
            tool=str(row.get("tool") or entry.get("tool") or known.get("tool", "")),
            tool_options=_mapping(row.get("tool_options") or options.get("tool_options")),
            written=bool(row or entry),
        )
    return found


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _harmless(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a stranger's file, if they can name no file and are no burden; BadDataError otherwise."""
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            text = isinstance(one, str) and (len(one) > 100 or os.sep in one or "\\" in one or ":" in one)
            number = isinstance(one, int | float) and abs(one) > 2**32
            if text or number or not isinstance(one, str | int | float | type(None)):
                raise BadDataError(f"the option {name}={one!r:.100} is not taken from a file of a stranger")
    return dict(options)
