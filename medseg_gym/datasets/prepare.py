"""Turns a folder of images and masks into a store: import, check, split by patient, write, report."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medseg_gym import home as homes
from medseg_gym.datasets.blocks import WorkerDiedError, results
from medseg_gym.datasets.cards import DATASETS, DatasetCard, Structure, instruction
from medseg_gym.datasets.importers import LAYOUTS, Skipped, importer
from medseg_gym.datasets.spool import Ready, Spool, identity
from medseg_gym.datasets.store import SplitCount, Store
from medseg_gym.datasets.store_writer import StoreWriter, remove_stale
from medseg_gym.errors import BadDataError, DataMissingError, MedSegError, UnknownNameError, unknown

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
    areas: dict[str, float]  # structure -> median area of its masks in pixels
    checksum: str
    unchanged: bool  # the same content was there before; the file was left alone
    resumed: int  # items of the plan whose import an earlier, interrupted run had done

    @property
    def damaged(self) -> int:
        """How many of the skipped are files with something wrong with them."""
        return sum(entry.damaged for entry in self.skipped)


def prepare(
    name: str,
    source: str | os.PathLike[str],
    *,
    layout: str | None = None,
    options: Mapping[str, str] | None = None,
    patient: str | None = None,
    splits: Mapping[str, Sequence[str]] | None = None,
    modality: str | None = None,
    region: str | None = None,
    home: str | os.PathLike[str] | None = None,
    force: bool = False,
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Imports a folder into the store of a catalogue's dataset, or of one's own where `layout` is given.

    `options` are the layout's own. `patient` is a regular expression over an image's file stem with a group `patient`
    and perhaps `slice`; `splits` gives the patients of val and test (all others train); `modality` and `region` word
    the instructions; each replaces what the card says. Patients go where the card says, else where the source says,
    else by a hash of their id and `seed`. A store of other content is replaced only with `force`; one of the same
    content is left as it is. `jobs` processes import; the result has the same bytes for any number, and a run that was
    killed goes on from what it had done. (With `jobs` above 1 a script needs `if __name__ == "__main__":`.)
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or not 1 <= jobs <= 1024:
        raise MedSegError(f"jobs={jobs!r}; wanted a whole number from 1 to 1024")
    card = _card(name, layout, patient, splits, modality, region)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataMissingError(f"{folder}: no such folder; give the one that holds the files of {name}")
    path = homes.dataset_path(name) if home is None else Path(home) / "datasets" / f"{name}.h5"
    options = dict(options or {})
    reader = importer(card.layout)
    items, early = reader.plan(folder, card, options)
    existing = _existing(path, name, force)
    remove_stale(path)
    spool = Spool(path, identity(folder, items, _settings(card, options)))
    skipped, resumed = list(early), [0]
    try:
        order = [structure.name for structure in card.structures]
        with StoreWriter(path, name, structures=order, layout=card.layout) as writer:
            _fill(writer, card, results(card.layout, items, spool, jobs, resumed), seed, skipped, len(items), progress)
            if writer.empty:
                raise BadDataError(f"{folder}: no usable case in it, nothing was written. {_reasons(skipped)}")
            checksum = writer.finish()
            unchanged = existing == checksum
            if unchanged:
                writer.discard()
            elif existing is not None:
                raise _occupied(path, "a store of other content")
    except WorkerDiedError:
        raise
    except MedSegError:
        spool.remove()  # running again would only come here again
        raise
    spool.remove()
    if home is None:
        _register()
    return _report(path, name, tuple(skipped), checksum, unchanged, sum(resumed))


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


def check_splits(splits: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The patients of val and test; a patient on two sides is refused."""
    sides: dict[str, str] = {}
    for split, patients in splits.items():
        if split not in SHARES:
            raise unknown("split", split, SHARES)
        if isinstance(patients, str) or not all(isinstance(patient, str) for patient in patients):
            raise MedSegError(f"splits: {split} is {patients!r}; wanted a list of patients, each a text")
        for patient in patients:
            if sides.setdefault(patient, split) != split:
                raise MedSegError(f"patient {patient!r} is in {sides[patient]} and in {split}; a patient has one side")
    return {split: tuple(patients) for split, patients in splits.items() if split != "train"}


def _card(
    name: str,
    layout: str | None,
    patient: str | None,
    splits: Mapping[str, Sequence[str]] | None,
    modality: str | None,
    region: str | None,
) -> DatasetCard:
    check_name(name)
    card = DATASETS.get(name)
    if card is not None and not card.layout:
        raise MedSegError(f"{name} needs no preparing; it is there already")
    if card is None:
        if layout is None:
            error = unknown("dataset", name, DATASETS)
            raise UnknownNameError(f"{error} For data of your own, name its layout: --layout {' or '.join(LAYOUTS)}")
        card = DatasetCard(name, name, "", "", layout=layout)
    if layout is not None:
        card = replace(card, layout=layout)
    if patient is not None:
        try:
            groups = re.compile(patient).groupindex
        except re.error as error:
            raise MedSegError(f"patient pattern {patient!r} is not a regular expression ({error})") from None
        if "patient" not in groups:
            raise MedSegError(f"patient pattern {patient!r} has no group (?P<patient>...)")
        card = replace(card, patient=patient)
    return replace(
        card,
        modality=card.modality if modality is None else modality,
        region=card.region if region is None else region,
        splits=check_splits(card.splits if splits is None else splits),
    )


def _settings(card: DatasetCard, options: Mapping[str, str]) -> object:
    """All that decides what importing gives, beside the files: splits and wording come later."""
    from medseg_gym import __version__

    structures: tuple[Structure, ...] = card.structures
    words = (card.id, card.modality, card.region, card.layout, structures, card.patient)
    return (__version__, words, sorted(options.items()))


def _fill(
    writer: StoreWriter,
    card: DatasetCard,
    found: Iterable[Ready | Skipped | None],
    seed: int,
    skipped: list[Skipped],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Writes what importing gives; what cannot be written joins the skipped."""
    done = 0
    sides: dict[str, str] = {}
    for result in found:
        if result is None:  # the end of an item
            done += 1
            if progress is not None:
                progress(done, total)
        elif isinstance(result, Skipped):
            skipped.append(result)
        elif problem := _write(writer, card, result, sides, seed):
            skipped.append(Skipped(result.file, problem))


def _write(writer: StoreWriter, card: DatasetCard, case: Ready, sides: dict[str, str], seed: int) -> str:
    """Writes one image with its masks; why it was not, or ""."""
    split = split_of(card, case.patient, case.split, seed)
    before = sides.setdefault(case.patient, split)
    if before != split:
        return f"patient {case.patient!r} is in {before!r} already and here in {split!r}; a patient stays on one side"
    try:
        writer.add(
            case.image,
            case.masks,
            patient=case.patient,
            name=case.name,
            split=split,
            instructions={s: case.instructions.get(s) or instruction(card, s) for s in case.masks},
            spacing_mm=case.spacing_mm,
        )
    except BadDataError as error:
        return str(error)
    return ""


def _report(
    path: Path, name: str, skipped: tuple[Skipped, ...], checksum: str, unchanged: bool, resumed: int
) -> PrepareReport:
    store = Store(path, name)
    splits = store.splits()
    report = PrepareReport(
        path,
        sum(count.images for count in splits.values()),
        sum(count.cases for count in splits.values()),
        skipped,
        splits,
        store.structure_counts(),
        store.structure_areas(),
        checksum,
        unchanged,
        resumed,
    )
    store.close()
    return report


def _register() -> None:
    """Gives a dataset of one's own its ids in this process too; others find it when they import medseg_gym."""
    from medseg_gym.registration import register

    register()


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
