"""Phantom: seeded drawings of seven kinds of medical image. Practically endless, and nothing to download."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from medseg_gym.datasets.base import SPLITS, check_split, check_structures
from medseg_gym.datasets.phantoms import TASKS, Kind, slug
from medseg_gym.errors import BadDataError, unknown
from medseg_gym.types import Box, Mask, Sample

CASES: Mapping[str, int] = {"train": 100_000, "val": 10_000, "test": 10_000}  # images a split
DRAWING = 1  # goes up with every change of what a key looks like
SIZES = range(32, 1025)
KEPT = 8  # scenes kept drawn: the structures of one image are usually asked for together

_KEY = re.compile(r"Phantom/(train|val|test)/(\d{6,18})-([a-z]+)/([a-z-]+)")


class Phantom:
    """A Dataset of drawn scenes; every sample is a function of its key and of the options below.

    task: "mixed", one modality ("ct", "mr", "ultrasound", "fundus", "xray", "polyp"), or "cue" (phantoms/cue.py).
    size: side of the square images, 32..1024; 256 by default, 64 for the cue task.
    difficulty: 0..1; less contrast, more noise, more irregular shapes.
    absent: the share of structures that are not in their image; their target is empty and they are not drawn.
    cases: images a split, one number for all or a mapping {"train": ..., "val": ..., "test": ...}.
    """

    name = "Phantom"

    def __init__(
        self,
        *,
        size: int | None = None,
        task: str = "mixed",
        absent: float = 0.0,
        difficulty: float = 0.5,
        seed: int = 0,
        cases: int | Mapping[str, int] = CASES,
    ) -> None:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
        size = (64 if task == "cue" else 256) if size is None else size
        if size not in SIZES:
            raise BadDataError(f"size={size!r}; wanted a whole number from {SIZES[0]} to {SIZES[-1]}")
        for option, share in (("absent", absent), ("difficulty", difficulty)):
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise BadDataError(f"{option}={share!r}; wanted a number from 0 to 1")
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise BadDataError(f"seed={seed!r}; wanted a whole number from 0 up")
        counts = dict(cases) if isinstance(cases, Mapping) else dict.fromkeys(SPLITS, cases)
        for split, count in counts.items():
            check_split(split)
            if not isinstance(count, int | np.integer) or count < 0:
                raise BadDataError(f"cases of {split!r} are {count!r}; wanted a whole number from 0 up")
        self.size, self.task, self.absent = int(size), task, float(absent)
        self.difficulty, self.seed = float(difficulty), int(seed)
        self.cases = {split: int(counts.get(split, CASES[split])) for split in SPLITS}
        kinds = TASKS[task]
        self.structures = tuple(dict.fromkeys(name for kind in kinds for name in kind.structures))
        self._recent: tuple[tuple[tuple[str, int], dict[str, Sample]], ...] = ()  # replaced whole: threads may share it

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the drawn scenes: a pickled array comes back writable.
        options = {o: getattr(self, o) for o in ("size", "task", "absent", "difficulty", "seed", "cases")}
        return _rebuild, (options,)

    def __repr__(self) -> str:
        return f"Phantom(task={self.task!r}, size={self.size}, difficulty={self.difficulty}, seed={self.seed})"

    @property
    def content(self) -> str:
        """What decides every case: the version of the drawing, and the options."""
        return f"Phantom drawing {DRAWING}: {self.__reduce__()[1][0]}"

    def keys(self, split: str, structures: Sequence[str] = ()) -> Keys:
        """The keys of a split in ascending order, worked out as they are asked for; `structures` keeps only these."""
        check_split(split)
        wanted = (structures,) if isinstance(structures, str) else tuple(structures)
        check_structures(wanted, self.structures)
        cycle = tuple(
            tuple(name for name in kind.structures if not wanted or name in wanted) for kind in TASKS[self.task]
        )
        return Keys.of(split, self.cases[split], tuple(kind.modality for kind in TASKS[self.task]), cycle)

    def __getitem__(self, key: str) -> Sample:
        """The case of a key; structures of one image share its array. An unknown key raises KeyError."""
        split, index, structure = self._parse(key)
        for place, samples in self._recent:
            if place == (split, index):
                return samples[structure]
        samples = self._draw(split, index)
        self._recent = (((split, index), samples), *self._recent[: KEPT - 1])
        return samples[structure]

    def cue_answer(self, key: str) -> int:
        """Which of cue_boxes(size) the image's stripes name, 0..3; the cue task only."""
        from medseg_gym.datasets.phantoms.cue import answer

        if self.task != "cue":
            raise ValueError(f"task={self.task!r} has no cue; make the dataset with Phantom(task='cue')")
        split, index, _ = self._parse(key)
        return answer(self._rng(split, index))

    def _parse(self, key: str) -> tuple[str, int, str]:
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match:
            split, index = match[1], int(match[2])
            kind = self._kind(index)
            for structure in kind.structures:
                if index < self.cases[split] and key == _key(split, index, kind.modality, structure, self.cases[split]):
                    return split, index, structure
        example = next((self.keys(split)[0] for split in SPLITS if len(self.keys(split))), "none: it has no cases")
        raise KeyError(
            f"no case {key!r} in {self!r}; wanted Phantom/<split>/<image>-<modality>/<structure> as keys(split) lists "
            f"it, such as {example}"
        )

    def _kind(self, index: int) -> Kind:
        kinds = TASKS[self.task]
        return kinds[index % len(kinds)]

    def _rng(self, split: str, index: int, stream: int = 0) -> np.random.Generator:
        # A spawn key, not a longer seed: seeds of several words could otherwise meet those of another split.
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(SPLITS.index(split), index, stream)))

    def _draw(self, split: str, index: int) -> dict[str, Sample]:
        """The samples of one image, by structure."""
        kind = self._kind(index)
        draws = self._rng(split, index, stream=1).random(len(kind.groups))
        gone = frozenset(
            name for group, draw in zip(kind.groups, draws, strict=True) if draw < self.absent for name in group
        )
        scene = kind.renderer()(self._rng(split, index), self.size, self.difficulty, gone)
        scene.image.flags.writeable = False
        patient = f"Phantom/{split}/{_number(index, self.cases[split])}-{kind.modality}"
        return {
            name: Sample(
                key=_key(split, index, kind.modality, name, self.cases[split]),
                image=scene.image,
                target=_frozen(scene.targets[name]),
                structure=name,
                instruction=f"{name} in {kind.place}",
                patient=patient,
                spacing_mm=scene.spacing_mm,
            )
            for name in kind.structures
        }


@dataclass(frozen=True, slots=True)
class Keys(Sequence[str]):
    """The keys of a split as a sequence that holds none of them: each is computed when it is asked for.

    Kinds of image take turns, so the keys come in equal rounds; `within` has a round's (image, modality, structure).
    """

    split: str
    cases: int
    images: int  # in a round
    within: tuple[tuple[int, str, str], ...]
    positions: range

    @classmethod
    def of(cls, split: str, cases: int, modalities: tuple[str, ...], structures: tuple[tuple[str, ...], ...]) -> Keys:
        images = len(modalities)
        within = tuple((i, modalities[i], name) for i in range(images) for name in structures[i])
        rounds, rest = divmod(cases, images)
        total = rounds * len(within) + bisect_left([i for i, _, _ in within], rest)
        return cls(split, cases, images, within, range(total))

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Keys: ...
    def __getitem__(self, at: int | slice) -> str | Keys:
        if isinstance(at, slice):
            return Keys(self.split, self.cases, self.images, self.within, self.positions[at])
        return self._at(self.positions[at])

    def __iter__(self) -> Iterator[str]:
        return map(self._at, self.positions)

    def __reversed__(self) -> Iterator[str]:
        return map(self._at, reversed(self.positions))

    def __contains__(self, key: object) -> bool:
        return self._position(key) in self.positions

    def index(self, key: str, start: int = 0, stop: int | None = None) -> int:
        try:
            at = self.positions.index(self._position(key))
        except ValueError:
            raise ValueError(f"{key!r} is not among these keys") from None
        if at not in range(len(self))[start:stop]:
            raise ValueError(f"{key!r} is not among these keys")
        return at

    def count(self, key: str) -> int:
        return int(key in self)

    def _at(self, position: int) -> str:
        turn, place = divmod(position, len(self.within))
        image, modality, structure = self.within[place]
        return _key(self.split, turn * self.images + image, modality, structure, self.cases)

    def _position(self, key: object) -> int:
        """Where a key stands in the whole split; -1 if it does not."""
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match:
            turn, image = divmod(int(match[2]), self.images)
            for place, (i, _, structure) in enumerate(self.within):
                if i == image and slug(structure) == match[4]:
                    position = turn * len(self.within) + place
                    return position if self._at(position) == key else -1
        return -1


def cue_boxes(size: int = 64) -> tuple[Box, Box, Box, Box]:
    """The places of a cue image: top left, top right, bottom left, bottom right; a target fills its box exactly."""
    from medseg_gym.datasets.phantoms import cue

    return cue.cue_boxes(size)


def _number(index: int, cases: int) -> str:
    # Equally long numbers, so that keys sort as images do.
    return f"{index:0{max(6, len(str(cases - 1)))}d}"


def _key(split: str, index: int, modality: str, structure: str, cases: int) -> str:
    return f"Phantom/{split}/{_number(index, cases)}-{modality}/{slug(structure)}"


def _frozen(mask: Mask) -> Mask:
    mask.flags.writeable = False
    return mask


def _rebuild(options: dict[str, Any]) -> Phantom:
    return Phantom(**options)
