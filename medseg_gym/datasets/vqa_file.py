"""QuestionFile: a prepared set of questions, or one's own: a JSONL file, and the pictures it names beside it.

A line is an object with "question", "answer" and "image" (a path relative to the file's folder), and if known "key",
"closed", "choices", "kind", "patient", "dataset", "split" and "sha256" of the picture's file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_gym.answers import is_yes_no
from medseg_gym.datasets.base import SPLITS, check_split
from medseg_gym.datasets.vqa import Question, VqaSample
from medseg_gym.errors import BadDataError, DataMissingError
from medseg_gym.images import read_image
from medseg_gym.types import Image

QUESTIONS = "questions.jsonl"
MAX_BYTES = 512 * 2**20
KEPT = 8  # pictures kept decoded: the questions of one picture come one after another
FIELDS = ("key", "image", "question", "answer", "closed", "choices", "kind", "patient", "dataset", "split", "sha256")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the file, checked."""

    key: str
    image: str
    asked: Question
    patient: str
    dataset: str
    split: str
    sha256: str  # "" where the file does not say


class QuestionFile:
    """Questions of a folder with a questions.jsonl, or of one JSONL file. All lines are checked when it is opened.

    Pictures are read when they are asked for; one that is not there, damaged, or of another sha256 than the line says
    raises BadDataError.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / QUESTIONS if path.is_dir() else path
        self.folder = self.path.parent
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise BadDataError(f"{self.path} has more than {MAX_BYTES} bytes")
            data = self.path.read_bytes()
        except OSError as error:
            raise DataMissingError(f"cannot read {self.path}: {error.strerror or error}") from None
        self.content = hashlib.sha256(data).hexdigest()
        self._rows: dict[str, Row] = {}
        name = self.folder.name if self.path.name == QUESTIONS else self.path.stem
        for number, line in enumerate(data.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = row_of(json.loads(line), name, number)
                if row.key in self._rows:
                    raise ValueError(f"the key {row.key!r} came before")
            except (ValueError, RecursionError) as error:
                raise BadDataError(f"{self.path}, line {number}: {error}") from None
            self._rows[row.key] = row
        names = {row.dataset for row in self._rows.values()}
        self.name = names.pop() if len(names) == 1 else name
        self._recent: tuple[tuple[str, Image], ...] = ()  # replaced whole: threads may share it

    def __reduce__(self) -> tuple[Any, ...]:
        return QuestionFile, (self.path,)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def keys(self, split: str) -> Sequence[str]:
        check_split(split)
        return sorted(key for key, row in self._rows.items() if row.split == split)

    def question(self, key: str) -> Question:
        return self._row(key).asked

    def row(self, key: str) -> Row:
        """All that the file says of a question."""
        return self._row(key)

    def __getitem__(self, key: str) -> VqaSample:
        row = self._row(key)
        asked = row.asked
        return VqaSample(
            key=key,
            image=self._image(row),
            question=asked.text,
            answer=asked.answer,
            closed=asked.closed,
            choices=asked.choices,
            patient=row.patient,
            dataset=row.dataset,
            kind=asked.kind,
        )

    def verify(self) -> list[str]:
        """What is wrong with the pictures, a line each; [] where all are there and whole."""
        problems = []
        for row in {row.image: row for row in self._rows.values()}.values():
            try:
                self._image(row)
            except BadDataError as error:
                problems.append(str(error))
        return problems

    def _row(self, key: str) -> Row:
        if key not in self._rows:
            raise KeyError(f"no question {key!r} in {self.path}, which has {len(self._rows)}")
        return self._rows[key]

    def _image(self, row: Row) -> Image:
        for name, image in self._recent:
            if name == row.image:
                return image
        file = self.folder / row.image
        image = read_image(file).copy()
        if row.sha256 and hashlib.sha256(file.read_bytes()).hexdigest() != row.sha256:
            raise BadDataError(f"{file} is not the picture that {self.path} was made with; prepare it again")
        image.flags.writeable = False
        self._recent = ((row.image, image), *self._recent[: KEPT - 1])
        return image


def row_of(record: Any, name: str, number: int) -> Row:
    """The Row of a line's record; ValueError says what is wrong with it. `name` is the set's, `number` the line's."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a {type(record).__name__}; wanted an object with question, answer and image")
    if extra := sorted(set(record) - set(FIELDS)):
        raise ValueError(f"it has {', '.join(map(repr, extra[:3]))}; known are {', '.join(FIELDS)}")
    texts = {field: _text(record, field, wanted=field in ("image", "question", "answer")) for field in FIELDS[:4]}
    image = Path(texts["image"])
    if image.is_absolute() or ".." in image.parts:
        raise ValueError(f"image {texts['image']!r} leads out of the file's folder")
    choices = record.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"choices are {choices!r}; wanted a list of texts")
    split = record.get("split", "test")
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; wanted {', '.join(SPLITS)}")
    closed = record.get("closed", bool(choices) or is_yes_no(texts["answer"]))
    if not isinstance(closed, bool):
        raise ValueError(f"closed is {closed!r}; wanted true or false")
    dataset = _text(record, "dataset") or name
    asked = Question(texts["question"], texts["answer"], closed, tuple(choices), _text(record, "kind"))
    key = texts["key"] or f"{dataset}/{texts['image']}/{number}"
    return Row(
        key, texts["image"], asked, _text(record, "patient") or texts["image"], dataset, split, _text(record, "sha256")
    )


def _text(record: Mapping[str, Any], field: str, *, wanted: bool = False) -> str:
    value = record.get(field, "")
    if not isinstance(value, str) or (wanted and not value.strip()):
        raise ValueError(f"{field} is {value!r}; wanted a text")
    return value.strip()
