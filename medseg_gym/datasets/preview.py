"""A contact sheet of a dataset: cases with their masks and names, all structures in turn, drawn by a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg_gym.datasets.base import SPLITS, Dataset
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.types import Image, Sample

MAX_CASES = 400


def choose(dataset: Dataset, count: int, *, split: str | None = None, seed: int = 0) -> list[tuple[str, str]]:
    """(split, key) of up to `count` cases: structures in turn, each time a case of another place in the splits."""
    rng = np.random.default_rng(seed)
    splits = SPLITS if split is None else (split,)
    waiting = []
    for structure in dataset.structures:
        found = [
            (s, keys, i) for s in splits for keys in [dataset.keys(s, (structure,))] for i in _some(keys, count, rng)
        ]
        rng.shuffle(found)  # type: ignore[arg-type]
        waiting.append([(s, keys[i]) for s, keys, i in found])
    chosen: list[tuple[str, str]] = []
    while any(waiting) and len(chosen) < count:
        for cases in waiting:
            if cases and len(chosen) < count:
                chosen.append(cases.pop())
    return chosen


def contact_sheet(
    dataset: Dataset, count: int = 24, *, split: str | None = None, seed: int = 0, columns: int = 6, size: int = 256
) -> Image:
    """The picture, white with captions; at least one case."""
    from medseg_gym.filmstrip import Panel, filmstrip

    for name, value, high in (("count", count, MAX_CASES), ("columns", columns, 20), ("size", size, 1024)):
        if not 1 <= value <= high:
            raise MedSegError(f"{name}={value}; wanted 1 to {high}")
    chosen = choose(dataset, count, split=split, seed=seed)
    if not chosen:
        raise BadDataError(f"{dataset.name} has no case{'' if split is None else f' in its {split} split'} to show")
    panels = [_panel(dataset[key], side, size) for side, key in chosen]
    columns = min(columns, len(panels))
    blank = Panel(np.full((size, size, 3), 255, np.uint8), "", "", ("", ""))
    panels += [blank] * (-len(panels) % columns)
    rows = [filmstrip(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    return np.concatenate(rows)


def _panel(sample: Sample, split: str, size: int):  # type: ignore[no-untyped-def]
    from medseg_gym.filmstrip import Panel
    from medseg_gym.render import frame

    height, width = sample.target.shape
    area = int(sample.target.sum())
    share = f"{area:,} px of {width} x {height}" if area else "absent"
    where = sample.key.removeprefix(f"{sample.key.partition('/')[0]}/").rpartition("/")[0]
    return Panel(frame(sample.image, sample.target, size=size), sample.structure, split, (where, share))


def _some(keys: Sequence[str], count: int, rng: np.random.Generator) -> list[int]:
    return sorted(rng.choice(len(keys), min(count, len(keys)), replace=False).tolist())
