"""NIfTI volumes with their labels beside them by pattern: one label volume, or a file a structure ({target})."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import RawCase, Skipped, check_options, reason
from medseg_gym.datasets.importers.intensities import window_for
from medseg_gym.datasets.importers.labels import STRUCTURE_HELP, Part, parts_of
from medseg_gym.datasets.importers.nifti_file import SUFFIXES, need_nibabel, read_labels, read_nifti
from medseg_gym.datasets.importers.pairs import PATTERN_OPTIONS, asked, find_pairs
from medseg_gym.datasets.importers.volumes import CUT_OPTIONS, Cut, number, parse_cut, slices
from medseg_gym.errors import BadDataError, MedSegError, unknown

OPTIONS: dict[str, str] = {
    **PATTERN_OPTIONS,
    "structure": STRUCTURE_HELP,
    **CUT_OPTIONS,
    "channel": "which volume of a 4D image, from 0; without it 4D images are refused",
    "affine": "own (default): a label lies where its own affine says; image: where its image's says",
}
USUAL = tuple(
    (f"{image}{end}", f"{mask}{end}")
    for end in SUFFIXES
    for image, mask in (
        ("images/{id}", "labels/{id}"),
        ("images/{id}_0000", "labels/{id}"),
        ("imagesTr/{id}", "labelsTr/{id}"),
        ("imagesTr/{id}_0000", "labelsTr/{id}"),
        ("img/img{id}", "label/label{id}"),
        ("images/{id}", "masks/{id}"),
        ("{id}", "{id}_gt"),
        ("{id}", "{id}_seg"),
        ("{id}", "{id}_label"),
        ("{id}", "{id}_mask"),
        ("{patient}/{id}", "{patient}/{id}_gt"),
        ("{patient}/{id}", "{patient}/{id}_seg"),
        ("{patient}/imaging", "{patient}/segmentation"),
        ("{patient}/ct", "{patient}/segmentations/{target}"),
    )
)


@dataclass(frozen=True, slots=True)
class Item:
    """One volume and its label files."""

    root: Path
    image: str
    labels: tuple[tuple[str, tuple[Part, ...]], ...]  # label file, the parts in it
    cut: Cut
    channel: int | None
    trust_affine: bool
    patient: str
    prefix: str
    split: str | None
    named: bool  # the values were chosen by hand: others are not reported


def plan(source: Path, card: DatasetCard, options: Mapping[str, str]) -> tuple[list[Item], list[Skipped]]:
    """One item a volume that has a label."""
    check_options(options, OPTIONS, "nifti-pairs")
    need_nibabel()
    pairs, skipped = find_pairs(source, card, asked(options.get("image"), options.get("mask"), USUAL), SUFFIXES)
    parts = tuple(parts_of(options.get("structure"), card))
    names = [part.structure for part in parts]
    cut = parse_cut(options, window_for(card.modality, card.region, names or [s.name for s in card.structures]))
    channel = number(options, "channel", 0, least=0) if "channel" in options else None
    trust = trust_affine(options)
    items = []
    for pair in pairs:
        labels = tuple((file, (Part(target),) if target else parts) for file, target in pair.masks)
        if not all(parts for _, parts in labels):
            raise MedSegError(
                f"{source}: nothing says what is outlined; add --structure NAME, or --structure 1=NAME,2=NAME, "
                "or {target} in the mask's pattern"
            )
        prefix = prefix_of(pair.name, pair.patient)
        items.append(
            Item(
                source,
                pair.image,
                labels,
                cut,
                channel,
                trust,
                pair.patient,
                prefix,
                pair.split,
                "structure" in options,
            )
        )
    return items, skipped


def trust_affine(options: Mapping[str, str]) -> bool:
    """Whether the image's affine counts for its label too."""
    text = options.get("affine", "own")
    if text not in ("own", "image"):
        raise unknown("value of affine:", text, ("own", "image"))
    return text == "image"


def prefix_of(name: str, patient: str) -> str:
    """What tells a volume's slices from those of the patient's other volumes; nothing where it bears his name."""
    return "" if name == patient else f"{name}-"


def read(item: Item) -> Iterator[RawCase | Skipped]:
    """The slices of the volume; a label file that does not fit costs the structures in it."""
    try:
        image = read_nifti(item.root / item.image, item.channel)
    except BadDataError as error:
        yield Skipped(item.image, reason(error, item.root))
        return
    labels: list[tuple[Part, np.ndarray]] = []
    for file, parts in item.labels:
        try:
            like = item.root / item.image if item.trust_affine else None
            values = read_labels(item.root / file, image, like, item.channel)
        except BadDataError as error:
            yield Skipped(file, reason(error, item.root))
            continue
        if not item.named and all(part.values for part in parts):
            unnamed = unnamed_values(values, parts)
            if unnamed:
                yield Skipped(file, unnamed, damaged=False)
        labels += [(part, values) for part in parts]
    if labels:
        yield from slices(
            item.image, image, labels, item.cut, patient=item.patient, prefix=item.prefix, split=item.split
        )


def unnamed_values(values: np.ndarray, parts: tuple[Part, ...]) -> str:
    """A line on label values that no structure has; "" where there are none."""
    known = {0, *(value for part in parts for value in part.values)}
    others = [int(value) for value in np.unique(values) if int(value) not in known]
    if not others:
        return ""
    shown = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
    return f"label values {shown} have no name and are left out"
