"""Which cases a run evaluates, a seeded choice of a split without replacement, and what identifies their content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from medseg_gym.datasets.base import Dataset, WithStartMasks
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.images import image_hash


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


def content_of(dataset: Dataset, keys: Sequence[str]) -> str:
    """What changes when the cases behind the keys change: the dataset's own word for it, else a hash of the cases.

    A store has its checksum and Phantom its options; of a dataset without such a `content` all chosen cases are read.
    """
    content = getattr(dataset, "content", None) or getattr(dataset, "checksum", None)
    if isinstance(content, str):
        return content
    digest = hashlib.sha256()
    for key in keys:
        sample = dataset[key]
        digest.update(image_hash(sample.image).encode())
        digest.update(np.packbits(sample.target).tobytes())
        digest.update(f"{key}\0{sample.structure}\0{sample.instruction}\0{sample.patient}\0".encode())
        start = dataset.start_mask(key) if isinstance(dataset, WithStartMasks) else None
        digest.update(b"" if start is None else np.packbits(start).tobytes())
    return digest.hexdigest()
