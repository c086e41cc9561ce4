"""prepare_vqa: published questions and their pictures as one JSONL file with the pictures beside it, split by patient.

The folder holds questions.jsonl and pictures/, each picture once, named by the sha256 of its bytes, which are as they
were published. It is written under another name and put in its place whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg_gym import home as homes
from medseg_gym.datasets.importers import Skipped
from medseg_gym.datasets.prepare import SHARES, check_name
from medseg_gym.datasets.vqa_file import QUESTIONS, QuestionFile
from medseg_gym.datasets.vqa_layouts import Found, read_layout
from medseg_gym.errors import BadDataError, DataMissingError, MedSegError, unknown
from medseg_gym.images import read_image

SPLITS = ("patient", "published")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")


@dataclass(frozen=True, slots=True)
class VqaReport:
    """What became of a folder of questions."""

    path: Path
    splits: Mapping[str, int]  # questions a split
    pictures: int
    closed: int
    skipped: tuple[Skipped, ...]
    two_sided: int  # patients that the published split has on two sides
    checksum: str  # of questions.jsonl
    unchanged: bool  # the same was there before

    @property
    def questions(self) -> int:
        return sum(self.splits.values())

    @property
    def damaged(self) -> int:
        """How many of the skipped are records with something wrong with them."""
        return sum(entry.damaged for entry in self.skipped)


def prepare_vqa(
    name: str,
    source: str | os.PathLike[str],
    *,
    layout: str,
    split: str = "patient",
    patient: str | None = None,
    language: str = "en",
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> VqaReport:
    """Reads a published folder of questions in one of vqa_layouts.LAYOUTS and writes it as QuestionFile reads it.

    split="patient" puts all questions of a patient, or of a picture where no patient is known, on one side: the
    published one where it is one, else by a hash of the patient and `seed` in shares of 70:10:20. Equal pictures under
    two names are one. "published" keeps each question where it was published, though a picture may then be on two
    sides (VQA-RAD's are). `patient` is a regular expression over a picture's path with a group `patient`. A folder of
    other content is replaced only with `force`. Records that cannot be used are reported, not guessed at.
    """
    if not _NAME.fullmatch(name):
        check_name(name)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    pattern = _pattern(patient)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataMissingError(f"{folder}: no such folder; give the one that holds the files of {name}")
    place = Path(out) if out is not None else homes.home() / "vqa" / name
    found, skipped = _read(folder, layout, language)
    shas = _hashes(folder, found, skipped, progress)
    found = [entry for entry in found if entry.image in shas]
    found = _once(found, shas, skipped)
    if not found:
        shown = "; ".join(f"{s.file}: {s.reason}" for s in skipped[:3])
        raise BadDataError(f"{folder}: no usable question in it, nothing was written. {len(skipped)} skipped: {shown}")
    sides, two_sided = _sides(found, shas, pattern, split, seed)
    lines, pictures = _lines(name, found, shas, sides, pattern)
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "replace")
    checksum = hashlib.sha256(data).hexdigest()
    unchanged = _place(place, folder, data, checksum, pictures, force)
    counts = Counter(str(line["split"]) for line in lines)
    return VqaReport(
        path=place,
        splits={side: counts[side] for side in SHARES},
        pictures=len(pictures),
        closed=sum(bool(line["closed"]) for line in lines),
        skipped=tuple(skipped),
        two_sided=two_sided,
        checksum=checksum,
        unchanged=unchanged,
    )


def _read(folder: Path, layout: str, language: str) -> tuple[list[Found], list[Skipped]]:
    found: list[Found] = []
    skipped: list[Skipped] = []
    for entry in read_layout(layout, folder, language):
        if isinstance(entry, Skipped):
            skipped.append(entry)
        else:
            found.append(entry)
    return found, skipped


def _hashes(
    folder: Path, found: list[Found], skipped: list[Skipped], progress: Callable[[int, int], None] | None
) -> dict[str, str]:
    """The sha256 of each picture's file that can be decoded; the others join the skipped, each once."""
    shas: dict[str, str] = {}
    wanted = list(dict.fromkeys(entry.image for entry in found))
    for done, image in enumerate(wanted, start=1):
        try:
            read_image(folder / image)
            shas[image] = hashlib.sha256((folder / image).read_bytes()).hexdigest()
        except (BadDataError, OSError) as error:
            count = sum(entry.image == image for entry in found)
            skipped.append(Skipped(image, f"{error}; {count} questions are about it"))
        if progress is not None:
            progress(done, len(wanted))
    return shas


def _once(found: list[Found], shas: Mapping[str, str], skipped: list[Skipped]) -> list[Found]:
    """Without questions that were there already: the same words about the same picture with the same answer."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for entry in found:
        same = (shas[entry.image], entry.question, entry.answer, *entry.choices)
        if same in seen:
            skipped.append(Skipped(entry.where, "the same question came before", damaged=False))
        else:
            seen.add(same)
            kept.append(entry)
    return kept


def _patient(entry: Found, pattern: re.Pattern[str] | None) -> str:
    if pattern is not None and (match := pattern.search(entry.image)):
        return match["patient"]
    return entry.patient or entry.image


def _sides(
    found: list[Found], shas: Mapping[str, str], pattern: re.Pattern[str] | None, split: str, seed: int
) -> tuple[dict[str, str], int]:
    """The side of each question by its `where`, and how many patients were published on two."""
    parents: dict[str, str] = {}  # patients that share a picture are one

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    for entry in found:
        one, other = sorted((root(_patient(entry, pattern)), root(f"sha256 {shas[entry.image]}")))
        parents[other] = one
    published: dict[str, set[str]] = {}
    for entry in found:
        published.setdefault(root(_patient(entry, pattern)), set()).update({entry.split} if entry.split else ())
    two_sided = sum(len(sides) > 1 for sides in published.values())
    sides = {}
    for entry in found:
        group = root(_patient(entry, pattern))
        if split == "published" and entry.split:
            sides[entry.where] = entry.split
        elif len(published[group]) == 1:
            sides[entry.where] = next(iter(published[group]))
        else:
            sides[entry.where] = _hashed(group, seed)
    return sides, two_sided


def _hashed(patient: str, seed: int) -> str:
    place = int.from_bytes(hashlib.sha256(f"vqa/{patient}/{seed}".encode()).digest()[:8], "big") / 2**64
    for side, share in SHARES.items():
        if place < share:
            return side
        place -= share
    return "test"


def _lines(
    name: str, found: list[Found], shas: Mapping[str, str], sides: Mapping[str, str], pattern: re.Pattern[str] | None
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """The lines in the order of their keys, and the pictures: where each goes, and where it comes from."""
    pictures: dict[str, str] = {}
    places: dict[str, str] = {}
    lines: list[dict[str, object]] = []
    counts: Counter[str] = Counter()
    for entry in found:
        sha = shas[entry.image]
        place = places.setdefault(sha, f"pictures/{sha[:2]}/{sha}{Path(entry.image).suffix.lower()}")
        pictures.setdefault(place, entry.image)
        stem = Path(pictures[place]).with_suffix("").as_posix()
        counts[stem] += 1
        lines.append(
            {
                "key": f"{name}/{stem}/{counts[stem]:04d}",
                "image": place,
                "question": entry.question,
                "answer": entry.answer,
                "closed": entry.closed,
                "choices": list(entry.choices),
                "kind": entry.kind,
                "patient": _patient(entry, pattern),
                "dataset": name,
                "split": sides[entry.where],
                "sha256": sha,
            }
        )
    return sorted(lines, key=lambda line: str(line["key"])), pictures


def _place(place: Path, folder: Path, data: bytes, checksum: str, pictures: Mapping[str, str], force: bool) -> bool:
    """Puts the folder in its place; True where the same is there already."""
    if place.exists():
        there = _existing(place)
        if there == checksum and not QuestionFile(place).verify():
            return True
        if not force:
            raise MedSegError(f"{place} is there already and holds something else. Add --force to replace it.")
    part, old = place.with_name(f".part-{place.name}"), place.with_name(f".old-{place.name}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for to, source in pictures.items():
            (part / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / source, part / to)
        (part / QUESTIONS).write_bytes(data)
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(place, old)
        os.replace(part, place)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise MedSegError(f"cannot write {place}: {error.strerror or error}; make room, then run it again") from error
    return False


def _existing(place: Path) -> str:
    try:
        return QuestionFile(place).content
    except MedSegError:
        return ""


def _pattern(patient: str | None) -> re.Pattern[str] | None:
    if patient is None:
        return None
    try:
        found = re.compile(patient)
    except re.error as error:
        raise MedSegError(f"patient pattern {patient!r} is not a regular expression ({error})") from None
    if "patient" not in found.groupindex:
        raise MedSegError(f"patient pattern {patient!r} has no group (?P<patient>...)")
    return found
