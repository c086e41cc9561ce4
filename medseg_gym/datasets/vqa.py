"""Questions about pictures: the record of one, what a set of them offers, and `open_questions`, which finds a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from medseg_gym import home
from medseg_gym.answers import LETTERS, choice_of, exact_match, is_yes_no, lettered
from medseg_gym.errors import DataMissingError, UnknownNameError, check_keywords
from medseg_gym.types import Image

DRAWN = "Phantom"  # the set that is drawn, and needs no data


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its truth, without its picture. What is said of it is right or wrong by answers.exact_match."""

    text: str
    answer: str
    closed: bool  # yes or no, or one of few; else any words
    choices: tuple[str, ...] = ()  # in the order they are shown in; () where the source gives none
    kind: str = ""  # the source's word for what is asked: "modality", "PRES"

    @property
    def asked(self) -> str:
        """The question as an agent is shown it, its choices below it."""
        if lettered(self.choices):
            return "\n".join([self.text, *(f"{a}. {b}" for a, b in zip(LETTERS, self.choices, strict=False))])
        return f"{self.text}\nAnswer yes or no." if self.choices and all(map(is_yes_no, self.choices)) else self.text

    @property
    def demonstrated(self) -> str:
        """The answer as supervised training teaches it: the letter of a lettered choice, else the text."""
        place = choice_of(self.answer, self.choices) if lettered(self.choices) else None
        return self.answer if place is None else LETTERS[place]

    def right(self, said: str) -> bool:
        return exact_match(said, self.answer, self.choices)


@dataclass(frozen=True, slots=True, eq=False)
class VqaSample:
    """One question about one picture."""

    key: str  # "VQA-RAD/synpic54610/12": unique, stable, sorts by picture
    image: Image = field(repr=False)  # (H, W, 3) uint8 RGB, read-only
    question: str
    answer: str
    closed: bool
    choices: tuple[str, ...]
    patient: str  # intervals cluster on it; the picture's name where no patient is known
    dataset: str
    kind: str = ""

    @property
    def asked(self) -> Question:
        return Question(self.question, self.answer, self.closed, self.choices, self.kind)


@runtime_checkable
class Questions(Protocol):
    """A set of questions by key. Opening is cheap; no picture is read before it is asked for."""

    @property
    def name(self) -> str: ...

    @property
    def content(self) -> str:
        """What decides every question: options, or a checksum."""
        ...

    def keys(self, split: str) -> Sequence[str]:
        """The keys of a split ("train", "val", "test"), in a fixed order."""
        ...

    def __contains__(self, key: object) -> bool: ...

    def __getitem__(self, key: str) -> VqaSample:
        """The question of a key, with its picture. An unknown key raises KeyError, damage BadDataError."""
        ...

    def question(self, key: str) -> Question:
        """The question of a key without its picture, where that is cheaper."""
        ...


def open_questions(spec: str | Questions) -> Questions:
    """The set of a spec: the name of a prepared one, the path of a folder or JSONL file, or "Phantom", the drawn set.

    "Phantom:task=cue,size=64" gives options of datasets.vqa_phantom.PhantomQuestions. A ready set is returned as it is.
    """
    if not isinstance(spec, str):
        return spec
    name, _, written = spec.partition(":")
    if name == DRAWN:
        from medseg_gym.datasets.vqa_phantom import PhantomQuestions

        options = _options(spec, written)
        check_keywords(f"questions {DRAWN}", options, signature(PhantomQuestions).parameters)
        return PhantomQuestions(**options)
    from medseg_gym.datasets.vqa_file import QuestionFile

    path = Path(spec).expanduser()
    if path.exists():
        return QuestionFile(path)
    prepared = home.home() / "vqa" / spec
    if "/" not in spec and prepared.is_dir():
        return QuestionFile(prepared)
    raise DataMissingError(
        f"no questions at {spec!r}: neither a folder or JSONL file, nor prepared, nor {DRAWN!r}. Prepare them with: "
        "medseg-gym data prepare-vqa NAME --from FOLDER --layout LAYOUT"
    )


def _options(spec: str, written: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in written.split(",") if written else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value or key in options:
            raise UnknownNameError(f"questions {spec!r}: {part!r} is no new key=value; wanted Name:key=value,key=value")
        options[key] = _value(value)
    return options


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
