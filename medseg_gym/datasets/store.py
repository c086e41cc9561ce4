"""`Store`: a prepared dataset, read from one HDF5 file. store_file.py says what is in it; store_writer.py writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.datasets.base import SPLITS, check_split, check_structures
from medseg_gym.datasets.schema import content_checksum
from medseg_gym.datasets.store_file import StoreFile, missing
from medseg_gym.errors import BadDataError
from medseg_gym.types import Sample

CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class SplitCount:
    """How much of a dataset is in one split."""

    patients: int
    images: int
    cases: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredImage:
    """An image of a store, apart from its cases."""

    key: str  # the beginning of its cases' keys
    patient: str
    split: str
    pixels: np.ndarray  # (H, W, 1) or (H, W, 3) uint8


class Store:
    """A Dataset in an HDF5 file, opened at first use and once per process; forks and pickles open their own."""

    def __init__(
        self, path: str | os.PathLike[str], name: str | None = None, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.path = Path(path)
        self._wanted = name
        self._cache_bytes = cache_bytes
        self._opened: StoreFile | None = None
        if not self.path.is_file():
            raise missing(self.path, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def _open(self) -> StoreFile:
        if self._opened is None or self._opened.pid != os.getpid():
            self._opened = StoreFile(self.path, self._wanted, self._cache_bytes)
        return self._opened

    def close(self) -> None:
        """Closes the file; the next use opens it again."""
        if self._opened is not None and self._opened.pid == os.getpid():
            self._opened.file.close()
        self._opened = None

    @property
    def name(self) -> str:
        return self._open().name

    @property
    def structures(self) -> tuple[str, ...]:
        return self._open().structures

    @property
    def checksum(self) -> str:
        """sha256 over the content, as the writer stored it."""
        return self._open().attribute("checksum")

    def keys(self, split: str, structures: Sequence[str] = ()) -> tuple[str, ...]:
        check_split(split)
        opened = self._open()
        check_structures(structures, opened.structures)
        wanted = opened.case_split == SPLITS.index(split)
        if structures:
            numbers = [opened.structures.index(s) for s in structures]
            wanted = wanted & np.isin(opened.cases["structure"], numbers)
        keys = opened.keys
        return tuple(keys[i] for i in np.flatnonzero(wanted))

    def __len__(self) -> int:
        return len(self._open().cases)

    def __getitem__(self, key: str) -> Sample:
        opened = self._open()
        number = opened.numbers.get(key)
        if number is None:
            raise KeyError(f"no case {key!r} in {opened.name}; keys(split) lists those there are")
        return opened.sample(number)

    def splits(self) -> dict[str, SplitCount]:
        """Patients, images and cases of every split."""
        opened = self._open()
        image_split = opened.patient_split[opened.images["patient"]]
        columns = (opened.patient_split, image_split, opened.case_split)
        counts = np.array([np.bincount(column, minlength=len(SPLITS)) for column in columns]).T
        return {split: SplitCount(*map(int, row)) for split, row in zip(SPLITS, counts, strict=True)}

    def structure_counts(self) -> dict[str, dict[str, int]]:
        """Cases of every structure in every split."""
        opened = self._open()
        table = np.zeros((len(opened.structures), len(SPLITS)), np.int64)
        np.add.at(table, (opened.cases["structure"], opened.case_split), 1)
        rows = (dict(zip(SPLITS, map(int, row), strict=True)) for row in table)
        return dict(zip(opened.structures, rows, strict=True))

    def structure_areas(self) -> dict[str, float]:
        """Median area of every structure's masks, in pixels, empty ones included."""
        opened = self._open()
        areas, numbers = opened.cases["area"], opened.cases["structure"]
        return {s: float(np.median(areas[numbers == i])) for i, s in enumerate(opened.structures)}

    def siblings(self, key: str) -> dict[str, str]:
        """Structure -> key of every case of the same image, this one included."""
        opened = self._open()
        number = opened.numbers.get(key)
        if number is None:
            raise KeyError(f"no case {key!r} in {opened.name}; keys(split) lists those there are")
        same = opened.cases_of(int(opened.cases["image"][number]))
        return {opened.structures[opened.cases["structure"][i]]: opened.keys[i] for i in same}

    @property
    def image_count(self) -> int:
        return len(self._open().images)

    def images(self) -> Iterator[StoredImage]:
        """Every image once, in the order of the keys."""
        opened = self._open()
        for number, row in enumerate(opened.images):
            patient = opened.patients[row["patient"]]
            split = SPLITS[opened.patient_split[row["patient"]]]
            yield StoredImage(f"{opened.name}/{patient}/{row['name'].decode()}", patient, split, opened.stored(number))

    def verify(self, progress: Callable[[int, int], None] | None = None) -> tuple[str, ...]:
        """Reads every record and compares it with the checksums; what is wrong, or () for a sound file."""
        opened = self._open()
        problems: list[str] = []
        digests: list[bytes] = []
        for image, cases in opened.cases_by_image():
            try:
                digest, found = opened.check_image(image, cases)
            except BadDataError as error:
                digest, found = b"", [str(error)]
            digests.append(digest)
            problems += found
            if progress is not None:
                progress(image + 1, len(opened.images))
        patients = list(zip(opened.patients, (SPLITS[i] for i in opened.patient_split), strict=True))
        if not problems and content_checksum(opened.name, opened.structures, patients, digests) != self.checksum:
            problems.append("the content does not match the file's checksum")
        return tuple(problems)
