"""PhantomQuestions: questions about Phantom's drawings, practically endless, each a function of its key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from medseg_gym.datasets.base import SPLITS, check_split
from medseg_gym.datasets.phantom import Phantom
from medseg_gym.datasets.phantoms import TASKS, Kind
from medseg_gym.datasets.vqa import Question, VqaSample
from medseg_gym.errors import BadDataError, unknown
from medseg_gym.types import Mask, Sample

VERSION = 1  # goes up with every change of what a key asks
KINDS = ("side", "height", "place", "present", "larger", "modality")
CUE_KINDS = ("side", "height", "place")  # of the cue task: there is one target, and it is there
MODALITIES = {
    "ct": "CT",
    "mr": "MR",
    "ultrasound": "ultrasound",
    "fundus": "fundus photograph",
    "xray": "X-ray",
    "polyp": "endoscopy",
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
_KEY = re.compile(r"PhantomQuestions/(train|val|test)/(\d{6})/([a-z]+)")


class PhantomQuestions:
    """Questions about the pictures of `Phantom(task=, size=, difficulty=, seed=)`: one of each kind a picture.

    "side" and "height": in which half of the picture a structure's centre lies; "place": whether it lies in a named
    quarter; "present": whether a structure is there at all (half of the structures are left out of that picture);
    "larger": which of two structures has more pixels; "modality": what took the picture, out of four choices. All are
    closed. Of the cue task only the first three are asked, and their answers hang on the stripes alone. `kinds` keeps
    some of them, as a text with + between ("side+height"); `cases` is the number of pictures a split.
    """

    name = "PhantomQuestions"

    def __init__(
        self,
        task: str = "mixed",
        size: int | None = None,
        difficulty: float = 0.5,
        seed: int = 0,
        cases: int = 2000,
        kinds: str = "",
    ) -> None:
        if not isinstance(cases, int) or not 1 <= cases <= 999_999:
            raise BadDataError(f"cases={cases!r}; wanted a whole number from 1 to 999999")
        options: dict[str, Any] = {"task": task, "size": size, "difficulty": difficulty, "seed": seed, "cases": cases}
        self._whole = Phantom(**options)
        self._sparse = self._whole if task == "cue" else Phantom(**options, absent=0.5)
        self.task, self.cases = task, cases
        able = CUE_KINDS if task == "cue" else KINDS
        self.kinds = tuple(kinds.split("+")) if kinds else able
        for kind in self.kinds:
            if kind not in able:
                raise unknown("kind of question", kind, able)
        if len(set(self.kinds)) != len(self.kinds):
            raise BadDataError(f"kinds={kinds!r}; wanted each once")
        self._options = {**options, "kinds": "+".join(self.kinds)}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._options,)

    @property
    def content(self) -> str:
        return f"PhantomQuestions {VERSION}: {self._options} on {self._whole.content}"

    def keys(self, split: str) -> QuestionKeys:
        check_split(split)
        return QuestionKeys(split, self.cases, self.kinds)

    def __contains__(self, key: object) -> bool:
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        return match is not None and int(match[2]) < self.cases and match[3] in self.kinds

    def __getitem__(self, key: str) -> VqaSample:
        split, index, kind = self._parse(key)
        drawn = self._drawn(split, index, kind)
        asked = self._asked(split, index, kind, drawn)
        return VqaSample(
            key=key,
            image=drawn[0].image,
            question=asked.text,
            answer=asked.answer,
            closed=asked.closed,
            choices=asked.choices,
            patient=f"{self.name}/{split}/{index:06d}",
            dataset=self.name,
            kind=kind,
        )

    def question(self, key: str) -> Question:
        return self[key].asked

    def _parse(self, key: str) -> tuple[str, int, str]:
        if key not in self:
            raise KeyError(f"no question {key!r}; wanted one that keys(split) lists, such as {self.keys('train')[0]}")
        _, split, index, kind = key.split("/")
        return split, int(index), kind

    def _kind(self, index: int) -> Kind:
        kinds = TASKS[self.task]
        return kinds[index % len(kinds)]

    def _drawn(self, split: str, index: int, kind: str) -> list[Sample]:
        """The samples of a question's picture, a structure each."""
        phantom = self._sparse if kind == "present" else self._whole
        shown = self._kind(index)
        stem = f"Phantom/{split}/{_image(phantom, split, index)}-{shown.modality}"
        return [phantom[f"{stem}/{name.replace(' ', '-')}"] for name in shown.structures]

    def _asked(self, split: str, index: int, kind: str, drawn: Sequence[Sample]) -> Question:
        rng = np.random.default_rng(
            np.random.SeedSequence(self._whole.seed, spawn_key=(7, SPLITS.index(split), index, KINDS.index(kind)))
        )
        sample = drawn[int(rng.integers(len(drawn)))]
        name = sample.structure
        if kind == "present":
            return _yes_no(f"Is there a {name} in the picture?", bool(sample.target.any()), kind)
        if kind == "modality":
            return _modality(MODALITIES[self._kind(index).modality], rng)
        if kind == "larger" and len(drawn) > 1:
            first, second = (drawn[int(i)] for i in rng.permutation(len(drawn))[:2])
            names = (first.structure, second.structure)
            larger = names[int(second.target.sum() > first.target.sum())]
            return Question(f"Which is larger here, the {names[0]} or the {names[1]}?", larger, True, names, kind)
        if kind == "larger":  # of one structure: against the rest of the picture
            return _yes_no(f"Is the {name} larger than a tenth of the picture?", bool(sample.target.mean() > 0.1), kind)
        right, low = _half(sample.target)
        if kind == "side":
            text = f"On which side of the picture is the {name}?"
            return Question(text, "right" if right else "left", True, ("left", "right"), kind)
        if kind == "height":
            text = f"Is the {name} in the upper or in the lower half of the picture?"
            return Question(text, "lower" if low else "upper", True, ("upper", "lower"), kind)
        true = 2 * low + right
        asked = true if rng.random() < 0.5 else (true + int(rng.integers(1, 4))) % 4
        return _yes_no(f"Is the {name} at the {PLACES[asked]}?", asked == true, kind)


class QuestionKeys(Sequence[str]):
    """The keys of a split, computed when they are asked for: all kinds of a picture, then the next picture's."""

    def __init__(self, split: str, cases: int, kinds: Sequence[str]) -> None:
        self.split, self.cases, self.kinds = split, cases, tuple(kinds)

    def __len__(self) -> int:
        return self.cases * len(self.kinds)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        index, kind = divmod(range(len(self))[at], len(self.kinds))
        return f"PhantomQuestions/{self.split}/{index:06d}/{self.kinds[kind]}"

    def __iter__(self) -> Iterator[str]:
        return (self[at] for at in range(len(self)))


def _rebuild(options: dict[str, Any]) -> PhantomQuestions:
    return PhantomQuestions(**options)


def _image(phantom: Phantom, split: str, index: int) -> str:
    """A picture's number as Phantom's keys write it: as wide as its last one needs."""
    first = phantom.keys(split)[0]
    return str(index).zfill(len(first.split("/")[2].split("-")[0]))


def _half(target: Mask) -> tuple[bool, bool]:
    """Whether the centre of a mask's pixels lies right of the picture's middle, and below it."""
    rows, columns = np.nonzero(target)
    height, width = target.shape
    return bool(columns.mean() > (width - 1) / 2), bool(rows.mean() > (height - 1) / 2)


def _yes_no(text: str, yes: bool, kind: str) -> Question:
    return Question(text, "yes" if yes else "no", True, ("yes", "no"), kind)


def _modality(true: str, rng: np.random.Generator) -> Question:
    others = [word for word in MODALITIES.values() if word != true]
    chosen = [true, *(others[int(i)] for i in rng.permutation(len(others))[:3])]
    choices = tuple(chosen[int(i)] for i in rng.permutation(4))
    return Question("Which modality is this picture?", true, True, choices, "modality")
