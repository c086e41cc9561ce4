"""What is measured of a run's last masks while their targets are at hand: NSD, HD95, and what F1 counts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from medseg_gym.datasets.base import Dataset
from medseg_gym.episodes import decode_mask
from medseg_gym.errors import MedSegError
from medseg_gym.surface import Surface, surface, worst
from medseg_gym.types import Episode, Mask

SCHEMA = 1
UNREAD: dict[str, Any] = {"present": None, "drawn": None, "nsd": None, "hd95": None, "unit": None}


def measures_of(episodes: Sequence[Episode], dataset: Dataset) -> dict[str, Any]:
    """The record of a run: one entry an episode, in their order; without MONAI no NSD and no HD95 (None)."""
    measured = find_spec("monai") is not None and find_spec("torch") is not None
    return {"schema": SCHEMA, "surface": measured, "cases": [measure(e, dataset, measured) for e in episodes]}


def measure(episode: Episode, dataset: Dataset, with_surface: bool) -> dict[str, Any]:
    """Of one episode: whether the target is there and a mask was drawn, NSD, and HD95 in `unit`.

    A failed or unreadable episode has the worst there is. A case that cannot be read has None throughout.
    """
    try:
        sample = dataset[episode.key]
    except (KeyError, MedSegError):
        return dict(UNREAD)
    counts = episode.ended not in ("failed", "unreadable")
    mask = last_mask(episode, sample.target.shape)
    found: Surface | None = None
    if with_surface:
        height, width = sample.target.shape
        found = surface(mask, sample.target, sample.spacing_mm) if counts else worst((height, width), sample.spacing_mm)
    return {
        "present": bool(sample.target.any()),
        "drawn": bool(mask.any()),
        "nsd": None if found is None else round(found.nsd, 6),
        "hd95": None if found is None else round(found.hd95, 4),
        "unit": None if found is None else found.unit,
    }


def last_mask(episode: Episode, shape: tuple[int, ...]) -> Mask:
    """The (H, W) mask an episode ends with: its last turn's, else its start, else the empty one."""
    stored = episode.turns[-1].mask if episode.turns else episode.start
    return np.zeros(shape, np.bool_) if stored is None else decode_mask(stored)
