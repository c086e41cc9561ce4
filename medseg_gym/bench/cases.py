"""Which cases a run evaluates: a seeded choice of a split without replacement, in key order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg_gym.datasets.base import Dataset
from medseg_gym.errors import BadDataError, MedSegError


def choose_cases(
    dataset: Dataset, split: str, structures: Sequence[str], cases: int | None, seed: int
) -> tuple[list[str], list[str]]:
    """The keys to evaluate, and notes for people.

    The first `cases` of a permutation of the split drawn from `seed`, then sorted, so that the structures of one
    image come one after another and its embedding is still in the cache. None, or more than there are, takes all.
    """
    if cases is not None and cases < 1:
        raise MedSegError(f"cases={cases}; wanted at least 1")
    keys = dataset.keys(split, tuple(structures))
    if len(keys) == 0:
        raise BadDataError(f"{dataset.name} has no case in its {split} split; see: medseg-gym data info {dataset.name}")
    if cases is None:
        cases = len(keys)
    chosen = np.random.default_rng(seed).permutation(len(keys))[:cases]
    notes = []
    if len(chosen) < cases:
        notes.append(
            f"{dataset.name}: {len(chosen)} cases, fewer than the {cases} asked for: its {split} split has no more"
        )
    return sorted(keys[int(i)] for i in chosen), notes
