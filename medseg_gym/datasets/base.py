"""The Dataset protocol, and what every dataset shares: split names and the check of a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from medseg_gym.errors import BadDataError, unknown
from medseg_gym.types import Mask, Sample

SPLITS = ("train", "val", "test")


@runtime_checkable
class Dataset(Protocol):
    """Cases by key. Opening is cheap; nothing is read before it is asked for."""

    @property
    def name(self) -> str: ...

    @property
    def structures(self) -> tuple[str, ...]:
        """Every structure that occurs, in a fixed order."""
        ...

    def keys(self, split: str, structures: Sequence[str] = ()) -> Sequence[str]:
        """The keys of a split ("train", "val", "test"), in a fixed order; `structures` keeps only these."""
        ...

    def __getitem__(self, key: str) -> Sample:
        """The case of a key. Its arrays are read-only. An unknown key raises KeyError."""
        ...


@runtime_checkable
class WithStartMasks(Protocol):
    """A dataset whose cases may begin with a mask; see kinds.py."""

    def start_mask(self, key: str) -> Mask | None:
        """The (H, W) mask an episode of this case begins with; None for the empty one. The same at every call."""
        ...


class Around:
    """A dataset around another one: under its name, with its structures."""

    dataset: Dataset

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def structures(self) -> tuple[str, ...]:
        return self.dataset.structures


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


def check_structures(wanted: Sequence[str], known: Sequence[str]) -> None:
    for structure in wanted:
        if structure not in known:
            raise unknown("structure", structure, known)


def check_sample(sample: Sample) -> Sample:
    """The sample itself if its arrays fit together and to the records; otherwise BadDataError."""
    image, target = sample.image, sample.target
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype.name != "uint8":
        raise BadDataError(f"{sample.key}: image is {image.shape} {image.dtype}; wanted (H, W, 3) uint8")
    if target.dtype.name != "bool" or target.shape != image.shape[:2]:
        raise BadDataError(
            f"{sample.key}: target is {target.shape} {target.dtype}; wanted {image.shape[:2]} bool, the image's size"
        )
    if 0 in image.shape:
        raise BadDataError(f"{sample.key}: image has no pixels ({image.shape})")
    return sample
