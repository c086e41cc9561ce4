"""The layouts questions are published in: VQA-RAD, SLAKE, PathVQA, OmniMedVQA, and plain JSON; records in, Found out.

Each is read from the files as they are published, unpacked into one folder. A record that cannot be used is a Skipped
with its file and number; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_gym.answers import choice_of, is_yes_no, lettered
from medseg_gym.datasets.importers import MAX_JSON_BYTES, Skipped
from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError, unknown

LAYOUTS = {
    "vqa-rad": "VQA-RAD: 'VQA_RAD Dataset Public.json' (or trainset.json, testset.json) and a folder of pictures",
    "slake": "SLAKE: train.json, validate.json, test.json and imgs/; --language en by default, zh, all",
    "pathvqa": "PathVQA: train, val and test as JSON or JSONL with image, question, answer (its pickles: converted)",
    "omnimedvqa": "OmniMedVQA: QA_information/**/*.json with gt_answer and option_A to option_D, and Images/",
    "json": "JSON or JSONL records with question, answer, image; if known choices, closed, kind, patient, split",
}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_SPLIT = re.compile(r"(?i)(?<![a-z])(train|val|test)(?:id\w*|ing|set)?(?![a-z])")


@dataclass(frozen=True, slots=True)
class Found:
    """A question as its source has it."""

    where: str  # "train.json, record 3": the file within the folder, and the record's number from 1
    image: str  # the picture's path within the folder
    question: str
    answer: str
    closed: bool
    choices: tuple[str, ...]
    kind: str
    patient: str  # "" where the source names none: then the picture is its own
    split: str | None  # None where the source has none


Reader = Callable[[Mapping[str, Any]], "dict[str, Any] | str"]  # a record's fields by our names, or what is wrong


def read_layout(layout: str, folder: Path, language: str = "en") -> Iterator[Found | Skipped]:
    """The questions of a folder, in the files' order. MedSegError where it holds none of the layout's files."""
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if language not in ("en", "zh", "all"):
        raise UnknownNameError(f"language {language!r}; wanted en, zh or all")
    names = Names(folder)
    reader = _READERS[layout]
    files = _files(layout, folder)
    if not files:
        raise MedSegError(f"{folder} holds no file of the layout {layout} ({LAYOUTS[layout]}){_pickles(folder)}")
    for file in files:
        place = file.relative_to(folder).as_posix()
        try:
            records = _records(file)
        except (OSError, ValueError, RecursionError) as error:
            yield Skipped(place, f"it is not the JSON it should be: {error}")
            continue
        for number, record in enumerate(records, start=1):
            where = f"{place}, record {number}"
            if not isinstance(record, Mapping):
                yield Skipped(where, f"a {type(record).__name__}; wanted an object")
                continue
            spoken = record.get("q_lang") or record.get("language")
            if layout == "slake" and language != "all" and spoken not in (None, language):
                yield Skipped(where, f"its language is {spoken}", damaged=False)
                continue
            yield _found(where, record, names, reader, _split_of(file, folder))


class Names:
    """The pictures of a folder by the names that records give them."""

    def __init__(self, folder: Path) -> None:
        files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
        self._whole = {file.as_posix() for file in files}
        self._ends: dict[str, list[str]] = {}
        for file in files:
            for at in range(len(file.parts)):
                tail = "/".join(file.parts[at:])
                self._ends.setdefault(tail, []).append(file.as_posix())
                self._ends.setdefault(tail[: -len(file.suffix)], []).append(file.as_posix())

    def find(self, name: str) -> str:
        """The path within the folder of the one picture that ends with `name`, its suffix or not; else ValueError."""
        name = name.replace("\\", "/").removeprefix("./").strip("/")
        if name in self._whole:
            return name
        found = sorted(set(self._ends.get(name, ())))
        if len(found) == 1:
            return found[0]
        told = "is not there" if not found else f"may be any of {len(found)}, such as {found[0]} and {found[1]}"
        raise ValueError(f"its picture {name!r} {told}")


def _found(where: str, record: Mapping[str, Any], names: Names, reader: Reader, split: str | None) -> Found | Skipped:
    try:
        read = reader(record)
        if isinstance(read, str):
            return Skipped(where, read)
        question, answer = _text(read["question"], "question"), _text(read["answer"], "answer")
        choices = read["choices"]
        if lettered(choices) and choice_of(answer, choices) is None:
            return Skipped(where, f"its answer {answer!r} is none of its choices {list(choices)}")
        if not choices and is_yes_no(answer) and read["closed"]:
            choices = ("yes", "no")
        return Found(
            where=where,
            image=names.find(_text(read["image"], "image")),
            question=question,
            answer=answer,
            closed=read["closed"],
            choices=choices,
            kind=str(read.get("kind") or "").strip(),
            patient=str(read.get("patient") or "").strip(),
            split=read.get("split", split),
        )
    except (ValueError, KeyError, TypeError) as error:
        return Skipped(where, f"no {error}" if isinstance(error, KeyError) else str(error))


# one reader a layout


def _vqa_rad(record: Mapping[str, Any]) -> dict[str, Any]:
    phrase = str(record.get("phrase_type", "")).casefold()
    fields = {
        "image": record["image_name"],
        "question": record["question"],
        "answer": record["answer"],
        "closed": _closed(record.get("answer_type"), record["answer"]),
        "choices": (),
        "kind": record.get("question_type"),
    }
    return {**fields, "split": "test" if phrase.startswith("test") else "train"} if phrase else fields


def _slake(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image": record["img_name"],
        "question": record["question"],
        "answer": record["answer"],
        "closed": _closed(record.get("answer_type"), record["answer"]),
        "choices": (),
        "kind": record.get("content_type"),
        "patient": str(record["img_name"]).split("/")[0],
    }


def _pathvqa(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image": record["image"],
        "question": record["question"],
        "answer": record["answer"],
        "closed": _closed(None, record["answer"]),
        "choices": (),
    }


def _omnimedvqa(record: Mapping[str, Any]) -> dict[str, Any] | str:
    choices = tuple(
        value.strip()
        for letter in "ABCDEFGH"
        if isinstance(value := record.get(f"option_{letter}"), str) and value.strip()
    )
    if len(choices) < 2:
        return f"it has {len(choices)} options; wanted two or more"
    return {
        "image": record["image_path"],
        "question": record["question"],
        "answer": record["gt_answer"],
        "closed": True,
        "choices": choices,
        "kind": record.get("question_type"),
    }


def _json(record: Mapping[str, Any]) -> dict[str, Any] | str:
    choices = record.get("choices") or ()
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        return f"its choices are {choices!r}; wanted a list of texts"
    split = record.get("split")
    if split not in (None, "train", "val", "test"):
        return f"its split is {split!r}; wanted train, val or test"
    closed = record.get("closed")
    fields = {
        "image": record["image"],
        "question": record["question"],
        "answer": record["answer"],
        "closed": closed if isinstance(closed, bool) else bool(choices) or is_yes_no(str(record["answer"])),
        "choices": tuple(choices),
        "kind": record.get("kind"),
        "patient": record.get("patient"),
    }
    return {**fields, "split": split} if split else fields


_READERS: dict[str, Reader] = {
    "vqa-rad": _vqa_rad,
    "slake": _slake,
    "pathvqa": _pathvqa,
    "omnimedvqa": _omnimedvqa,
    "json": _json,
}


def _closed(said: object, answer: object) -> bool:
    """What the source calls the answer ("CLOSED", with or without blanks); where it says nothing, yes and no are."""
    if isinstance(said, str) and said.strip():
        return said.strip().casefold().startswith("closed")
    return isinstance(answer, str) and is_yes_no(answer)


def _text(value: object, field: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its {field} is {value!r}; wanted a text")
    return value.strip()


# files


def _files(layout: str, folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".json", ".jsonl") and p.is_file())
    if layout == "vqa-rad":
        return [p for p in files if "vqa_rad" in p.name.lower() or p.stem.lower() in ("trainset", "testset")]
    if layout == "slake":
        return [p for p in files if p.parent == folder and _split_of(p, folder)]
    if layout == "omnimedvqa":
        inside = [p for p in files if "QA_information" in p.relative_to(folder).parts]
        return inside or files
    if layout == "pathvqa":
        return [p for p in files if _split_of(p, folder)]
    return files


def _split_of(file: Path, folder: Path) -> str | None:
    """The split that a file's name, or else a folder it lies in, speaks of."""
    for part in reversed(file.relative_to(folder).parts):
        if match := _SPLIT.search(part):
            return match[1].lower()
    return None


def _records(file: Path) -> Sequence[Any]:
    """The records of a JSON file that holds a list (or one under "data"), or of a file with one object a line."""
    if file.stat().st_size > MAX_JSON_BYTES:
        raise BadDataError(f"it has more than {MAX_JSON_BYTES} bytes")
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix.lower() == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    found = json.loads(text)
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        found = found["data"]
    if not isinstance(found, list):
        raise ValueError(f"a {type(found).__name__}; wanted a list of records")
    return found


def _pickles(folder: Path) -> str:
    if any(folder.rglob("*.pkl")):
        return "; it holds pickles, which are not read, as a pickle runs code: write them as JSON where you trust them"
    return ""
