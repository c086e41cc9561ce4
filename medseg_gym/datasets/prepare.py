"""Turns a folder of images and masks into a store: import, check, split by patient, write, report."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medseg_gym.datasets.cards import DATASETS, DatasetCard, instruction
from medseg_gym.datasets.importers import LAYOUTS, RawCase, Skipped, importer
from medseg_gym.datasets.store import SplitCount, Store
from medseg_gym.datasets.store_writer import StoreWriter, remove_stale
from medseg_gym.errors import BadDataError, DataMissingError, MedSegError, UnknownNameError, unknown
from medseg_gym.home import dataset_path

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.]{0,63}")


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What became of a folder."""

    path: Path
    images: int
    cases: int
    skipped: tuple[Skipped, ...]
    splits: dict[str, SplitCount]
    structures: dict[str, dict[str, int]]  # structure -> split -> cases
    checksum: str
    unchanged: bool  # the same content was there before; the file was left alone


def prepare(
    name: str,
    source: str | os.PathLike[str],
    *,
    layout: str | None = None,
    patient: str | None = None,
    home: str | os.PathLike[str] | None = None,
    force: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Imports a folder into the store of a catalogue's dataset, or of one's own where `layout` is given.

    `patient` is a regular expression over an image's file stem with a group `patient` and perhaps `slice`; it replaces
    the card's. Patients go where the card says, else where the source says, else by a hash of their id and `seed`.
    A store of other content is replaced only with `force`; one of the same content is left as it is.
    """
    card = _card(name, layout, patient)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataMissingError(f"{folder}: no such folder; give the one that holds the files of {name}")
    path = dataset_path(name) if home is None else Path(home) / "datasets" / f"{name}.h5"
    reader = importer(card.layout)
    items, early = reader.plan(folder, card)
    skipped = list(early)
    existing = _existing(path, name, force)
    remove_stale(path)
    order = [structure.name for structure in card.structures]
    with StoreWriter(path, name, structures=order, layout=card.layout) as writer:
        sides: dict[str, str] = {}
        written = 0
        for done, item in enumerate(items, 1):
            for found in reader.read(item):
                if isinstance(found, Skipped):
                    skipped.append(found)
                else:
                    written += _write(writer, card, found, sides, seed, skipped)
            if progress is not None:
                progress(done, len(items))
        if written == 0:
            raise BadDataError(f"{folder}: no usable case in it, nothing was written. {_reasons(skipped)}")
        checksum = writer.finish()
        unchanged = existing == checksum
        if unchanged:
            writer.discard()
        elif existing is not None:
            raise _occupied(path, "a store of other content")
    store = Store(path, name)
    splits = store.splits()
    report = PrepareReport(
        path,
        sum(count.images for count in splits.values()),
        sum(count.cases for count in splits.values()),
        tuple(skipped),
        splits,
        store.structure_counts(),
        checksum,
        unchanged,
    )
    store.close()
    return report


def check_name(name: str) -> None:
    """Dataset names become file names and parts of env ids."""
    if not _NAME.fullmatch(name) or name.endswith((".", ".h5")):
        raise UnknownNameError(
            f"dataset name {name!r}; wanted 1 to 64 letters, digits and dots, beginning with a letter or digit"
        )


def split_of(card: DatasetCard, patient: str, given: str | None, seed: int) -> str:
    """The split of a patient: the card's rule, else the source's, else train, val, test in shares of 70:10:20."""
    if card.splits:
        return next((split for split, patients in card.splits.items() if patient in patients), "train")
    if given is not None:
        return given
    digest = hashlib.sha256(f"{card.id}/{patient}/{seed}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "test"


def _card(name: str, layout: str | None, patient: str | None) -> DatasetCard:
    check_name(name)
    card = DATASETS.get(name)
    if card is None:
        if layout is None:
            error = unknown("dataset", name, DATASETS)
            raise UnknownNameError(f"{error} For data of your own, name its layout: --layout {' or '.join(LAYOUTS)}")
        card = DatasetCard(name, name, "", "", layout=layout)
    if layout is not None:
        card = replace(card, layout=layout)
    if not card.layout:
        raise MedSegError(f"{name} needs no preparing; it is there already")
    if patient is not None:
        try:
            groups = re.compile(patient).groupindex
        except re.error as error:
            raise MedSegError(f"patient pattern {patient!r} is not a regular expression ({error})") from None
        if "patient" not in groups:
            raise MedSegError(f"patient pattern {patient!r} has no group (?P<patient>...)")
        card = replace(card, patient=patient)
    return card


def _write(
    writer: StoreWriter, card: DatasetCard, raw: RawCase, sides: dict[str, str], seed: int, skipped: list[Skipped]
) -> int:
    """Writes the sound masks of a raw image; how many."""
    size = raw.image.shape[:2]
    masks = {}
    for structure, mask in raw.masks.items():
        if mask.shape != size:
            (mh, mw), (h, w) = mask.shape, size
            skipped.append(Skipped(raw.file, f"mask of {structure!r} is {mh}x{mw}, the image {h}x{w} (height x width)"))
        elif not mask.any() and structure not in raw.absent:
            skipped.append(Skipped(raw.file, f"mask of {structure!r} has no foreground"))
        else:
            masks[structure] = np.ascontiguousarray(mask, np.bool_)
    if not masks:
        return 0
    split = split_of(card, raw.patient, raw.split, seed)
    before = sides.setdefault(raw.patient, split)
    if before != split:
        reason = f"patient {raw.patient!r} is in {before!r} already and here in {split!r}; a patient stays on one side"
        skipped.append(Skipped(raw.file, reason))
        return 0
    phrases = {s: raw.instructions.get(s) or instruction(card, s) for s in masks}
    try:
        writer.add(
            raw.image,
            masks,
            patient=raw.patient,
            name=raw.name,
            split=split,
            instructions=phrases,
            spacing_mm=raw.spacing_mm,
        )
    except BadDataError as error:
        skipped.append(Skipped(raw.file, str(error)))
        return 0
    return len(masks)


def _existing(path: Path, name: str, force: bool) -> str | None:
    """The checksum of the store in place, None without one or with `force`; a damaged one is an error."""
    if force or not path.exists():
        return None
    try:
        store = Store(path, name)
        checksum = store.checksum
        store.close()
    except (BadDataError, DataMissingError) as error:
        raise _occupied(path, f"something that is not a sound store of {name} ({error})") from None
    return checksum


def _occupied(path: Path, what: str) -> MedSegError:
    return MedSegError(f"{path} is there already and holds {what}. Add --force (in Python: force=True) to replace it.")


def _reasons(skipped: list[Skipped]) -> str:
    if not skipped:
        return "It lists no images."
    shown = "; ".join(f"{s.file}: {s.reason}" for s in skipped[:3])
    return f"{len(skipped)} skipped: {shown}" + ("; ..." if len(skipped) > 3 else "")
