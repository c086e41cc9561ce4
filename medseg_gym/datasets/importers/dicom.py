"""DICOM image series with the SEG or RTSTRUCT objects that refer to them, anywhere below the source."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import RawCase, Skipped, check_options, identify, reason
from medseg_gym.datasets.importers.dicom_labels import RTSTRUCT, SEG, read_labels
from medseg_gym.datasets.importers.dicom_series import Grid, need_pydicom, read_dicom, read_series, readable
from medseg_gym.datasets.importers.imis_bench import plain_name
from medseg_gym.datasets.importers.intensities import window_for
from medseg_gym.datasets.importers.labels import Part
from medseg_gym.datasets.importers.volumes import AXES, CUT_OPTIONS, Cut, in_ras, parse_cut, slices
from medseg_gym.errors import BadDataError, MedSegError

OPTIONS: dict[str, str] = {
    "structure": "the segments to take and their names: LABEL=NAME,LABEL=NAME; all under their own labels by default",
    **CUT_OPTIONS,
    "axis": "acquired (default): the series' own slices; axial, coronal or sagittal",
}
TAGS = (
    "SOPClassUID", "Modality", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "Rows",
    "ImagePositionPatient", "ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence", "NumberOfFrames",
)  # fmt: skip
OTHERS = (".json", ".txt", ".md", ".csv", ".xml", ".xlsx", ".pdf", ".png", ".jpg")  # passed over in silence


@dataclass(frozen=True, slots=True)
class Header:
    """One DICOM file as far as `plan` looks into it."""

    file: str
    kind: str  # "slice", "labels", or what else it is
    series: str
    named: tuple[str, ...]  # series that labels refer to
    frames: tuple[str, ...]  # of reference
    patient: str
    modality: str


@dataclass(frozen=True, slots=True)
class Item:
    """One image series and the files that label it."""

    root: Path
    files: tuple[str, ...]
    labels: tuple[str, ...]
    wanted: tuple[tuple[str, str], ...]  # label as stored -> name; () for all
    cut: Cut
    patient: str
    prefix: str


def plan(source: Path, card: DatasetCard, options: Mapping[str, str]) -> tuple[list[Item], list[Skipped]]:
    """One item a series with labels. Patients are told by PatientID, on which a patient pattern is tried as well."""
    check_options(options, OPTIONS, "dicom")
    need_pydicom()
    wanted = tuple(_wanted(options["structure"]).items()) if "structure" in options else ()
    series: dict[str, list[Header]] = {}
    labels: list[Header] = []
    skipped: list[Skipped] = []
    for file in _files(source):
        try:
            header = _header(source, file)
        except BadDataError as error:
            skipped.append(Skipped(file, reason(error, source)))
            continue
        if header.kind == "labels":
            labels.append(header)
        elif header.kind == "slice":
            series.setdefault(header.series, []).append(header)
        else:
            skipped.append(Skipped(file, header.kind, damaged=False))
    owned: dict[str, list[str]] = {}
    for header in labels:
        owner = _owner(header, series)
        if owner is None:
            skipped.append(Skipped(header.file, "the image series it refers to is not here"))
        else:
            owned.setdefault(owner, []).append(header.file)
    for uid, headers in series.items():
        if uid not in owned:
            skipped.append(Skipped(headers[0].file, "no SEG or RTSTRUCT refers to its series", damaged=False))
    items = []
    people = {uid: identify(series[uid][0].patient, card.patient, series[uid][0].patient)[0] for uid in owned}
    several = Counter(people.values())
    names = [name for _, name in wanted] or [s.name for s in card.structures]
    for uid, files in owned.items():
        window = window_for(card.modality or series[uid][0].modality, card.region, names)
        cut = parse_cut({"axis": "acquired", **options}, window)
        prefix = f"{hashlib.sha256(uid.encode()).hexdigest()[:8]}-" if several[people[uid]] > 1 else ""
        paths = tuple(header.file for header in series[uid])
        items.append(Item(source, paths, tuple(files), wanted, cut, people[uid], prefix))
    return sorted(items, key=lambda item: item.files), skipped


def _header(source: Path, file: str) -> Header:
    """What is needed of a file before it is read; BadDataError if it is no DICOM."""
    path = source / file
    with readable(path, "not a readable DICOM file"):
        data = read_dicom(path, TAGS)
        if data.get("SOPClassUID") in (*SEG, RTSTRUCT):
            kind = "labels"
        elif data.get("Rows"):
            kind = "slice" if data.get("ImagePositionPatient") else "an image without a position"
        else:
            kind = f"no image, SEG or RTSTRUCT ({getattr(data.get('SOPClassUID'), 'name', 'no class')})"
        named = [item.get("SeriesInstanceUID") for item in data.get("ReferencedSeriesSequence") or ()]
        frames = [data.get("FrameOfReferenceUID")]
        for frame in data.get("ReferencedFrameOfReferenceSequence") or ():
            frames.append(frame.get("FrameOfReferenceUID"))
            for study in frame.get("RTReferencedStudySequence") or ():
                named += [item.get("SeriesInstanceUID") for item in study.get("RTReferencedSeriesSequence") or ()]
        patient = str(data.get("PatientID") or "").strip() or str(data.get("StudyInstanceUID") or "unknown")
        uid, modality = str(data.get("SeriesInstanceUID")), str(data.get("Modality") or "")
        return Header(file, kind, uid, _texts(named), _texts(frames), patient, modality)


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in values if value)


def _files(source: Path) -> Iterator[str]:
    """Every file that may be DICOM, sorted; many have no suffix."""
    found = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name != "DICOMDIR" and not name.casefold().endswith(OTHERS):
                found.append((Path(folder) / name).relative_to(source).as_posix())
    yield from sorted(found)


def _wanted(text: str) -> dict[str, str]:
    """Label as stored -> name, of "Liver=liver,Neoplasm=liver tumor" or "Liver,Spleen"."""
    out = {}
    for piece in text.split(","):
        label, _, name = piece.partition("=")
        if not label.strip():
            raise MedSegError(f"structure {text!r}; wanted LABEL=NAME,LABEL=NAME")
        out[label.strip()] = name.strip() or plain_name(label.strip())
    return out


def _owner(labels: Header, series: Mapping[str, list[Header]]) -> str | None:
    """The series that a SEG or RTSTRUCT names, else the only one in its frame of reference."""
    for uid in labels.named:
        if uid in series:
            return uid
    if labels.named:
        return None
    same = [uid for uid, headers in series.items() if set(headers[0].frames) & set(labels.frames)]
    return same[0] if len(same) == 1 else None


def read(item: Item) -> Iterator[RawCase | Skipped]:
    """The slices of the series; a label file that does not fit costs what is in it."""
    try:
        data, grid = read_series([item.root / file for file in item.files])
        cut = replace(item.cut, axis=_axis(item.cut.axis, grid, item.root / item.files[0]))
    except BadDataError as error:
        named = (file for file in item.files if str(error).startswith(str(item.root / file)))
        yield Skipped(next(named, item.files[0]), f"{reason(error, item.root)}; its series is left out")
        return
    found: dict[str, np.ndarray] = {}
    names = dict(item.wanted)
    for file in item.labels:
        try:
            labels, notes = read_labels(item.root / file, grid)
        except BadDataError as error:
            yield Skipped(file, reason(error, item.root))
            continue
        yield from (Skipped(file, note) for note in notes)
        for label, mask in labels.items():
            name = names.get(label) if names else plain_name(label)
            if name is not None:
                found[name] = found[name] | mask if name in found else mask
    if not found:
        yield Skipped(item.files[0], "no label of its series is wanted or sound")
        return
    volume = in_ras(data, grid.affine)
    parts = [(Part(name), in_ras(mask, grid.affine).data) for name, mask in sorted(found.items())]
    file = item.files[0].rpartition("/")[0] or item.files[0]
    yield from slices(file, volume, parts, cut, patient=item.patient, prefix=item.prefix)


def _axis(axis: str, grid: Grid, first: Path) -> str:
    """The axis across the series' own slices, or the one that is asked for where the slices are evenly spaced."""
    own = max(AXES, key=lambda name: abs(float(grid.normal[AXES[name]])))
    if axis in ("acquired", own):
        return own
    if not grid.regular:
        raise BadDataError(f"{first}: its slices are unevenly spaced, which no {axis} slice can be cut from")
    return axis
