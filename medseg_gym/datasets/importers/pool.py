"""Folders of images/ and masks/ with an index.json that lists image, mask and target; one set, or a folder of sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_gym.datasets.base import SPLITS
from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import (
    MAX_JSON_BYTES,
    RawCase,
    Skipped,
    check_options,
    identify,
    inside,
    reason,
    safe,
)
from medseg_gym.datasets.importers.pictures import read_foreground, read_picture
from medseg_gym.errors import BadDataError
from medseg_gym.types import Mask

OPTIONS: dict[str, str] = {"sets": "names of the sets to take, with commas; all by default"}
WANT = '[{"image", "mask", "target"}, ...]; modality, site, patient and split are understood too'
# How the public sets that come as single images name their patients; of other sets every image is one
PATIENTS = {
    "ACDC": r"(?P<patient>patient\d+)_.*",
    "AMOS-CT": r"amos_(?P<patient>\d+)_(?P<slice>\d+)",
    "BraTS2015": r"(?P<patient>brats_\w+?_pat\d+)_.*",
    "CAMUS": r"(?P<patient>patient\d+)_.*",
    "CDD-CESM": r"(?P<patient>P\d+)_.*",
    "CHAOS_CT_liver": r"(?P<patient>\d+)_(?P<slice>\d+)",
    "DeepLesion3D_RECIST": r"CT_Lesion_(?P<patient>\d+)_.*",
    "KiTS19": r"(?P<patient>\d+)_(?P<slice>\d+)",
    "LGG": r"(?P<patient>TCGA_[A-Z]+_[0-9A-Z]+)_.*",
    "MSD_Lung": r"(?P<patient>\d+)_(?P<slice>\d+)",
    "MedScribble": r"(?P<patient>.+?)_axis\d_.*",
    "SCT_SpinalCord": r"(?P<patient>.+?)_(?:spinal_cord|gray_matter).*",  # one image under the name of each target
    "TotalSegmentator": r"(?P<patient>s\d+)_(?P<slice>\d+)",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One image and its masks."""

    root: Path
    folder: str  # of the set below the root; "" for the root itself
    image: str
    masks: tuple[tuple[str, str, str], ...]  # file, structure, instruction
    patient: str
    name: str
    split: str | None


def plan(source: Path, card: DatasetCard, options: Mapping[str, str]) -> tuple[list[Item], list[Skipped]]:
    """One item an image of every index; of several sets, the set's name leads patients and images."""
    check_options(options, OPTIONS, "pool")
    single = (source / "index.json").is_file()
    folders = [""] if single else sorted(path.parent.name for path in source.glob("*/index.json"))
    wanted = [name for name in (part.strip() for part in options.get("sets", "").split(",")) if name]
    for name in wanted:
        if name not in folders:
            raise BadDataError(
                f"{source}: no set {name!r} with an index.json in it; there are {', '.join(folders[:40])}"
            )
    items: list[Item] = []
    skipped: list[Skipped] = []
    if not folders:
        raise BadDataError(f"{source}: no index.json in it or in a folder of it; wanted {WANT}")
    for folder in wanted or folders:
        images: dict[str, list[dict[str, Any]]] = {}
        for number, record in enumerate(_index(source / folder / "index.json")):
            try:
                images.setdefault(_checked(source / folder, record), []).append(record)
            except BadDataError as error:
                skipped.append(Skipped(f"{folder}/index.json, {number}".lstrip("/"), str(error)))
        items += [_item(source, folder, card, image, records) for image, records in sorted(images.items())]
    return items, skipped


def _index(path: Path) -> list[Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BadDataError(f"{path}: {path.stat().st_size} bytes; the limit is {MAX_JSON_BYTES}")
        records = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadDataError):
            raise
        raise BadDataError(f"{path}: not readable JSON ({error}); wanted {WANT}") from None
    if not isinstance(records, list):
        raise BadDataError(f"{path}: holds a {type(records).__name__}; wanted {WANT}")
    return records


def _checked(folder: Path, record: Any) -> str:
    """The image of an entry whose names are sound."""
    if not isinstance(record, dict):
        raise BadDataError(f"a {type(record).__name__}; wanted an object with image, mask and target")
    for key in ("image", "mask"):
        inside(folder, record.get(key))
    if not isinstance(record.get("target"), str) or not record["target"].strip():
        raise BadDataError(f"target is {record.get('target')!r}; wanted the structure's name")
    if record.get("split") not in (None, *SPLITS):
        raise BadDataError(f"split {record['split']!r}; wanted train, val or test")
    return str(record["image"])


def _item(source: Path, folder: str, card: DatasetCard, image: str, records: list[dict[str, Any]]) -> Item:
    stem = Path(image).stem
    first = records[0]
    given = first.get("patient")
    own = given if isinstance(given, str) and given else stem
    rule = card.patient or ("" if given else PATIENTS.get(str(first.get("dataset")), ""))
    patient, name = identify(stem, rule, otherwise=own)
    if folder:
        patient, name = f"{safe(folder)}.{patient}", f"{safe(folder)}.{name}"
    masks = tuple((str(r["mask"]), " ".join(r["target"].split()), _phrase(card, r)) for r in records)
    return Item(source, folder, image, masks, patient, name, first.get("split"))


def _phrase(card: DatasetCard, record: Mapping[str, Any]) -> str:
    """ "right ventricle in heart MRI" from target, site and modality; "" where the card knows, or nobody does."""
    modality, site = record.get("modality"), record.get("site")
    if card.modality or not isinstance(modality, str):
        return ""
    target = " ".join(record["target"].split())
    modality = re.sub(r"\s*\(.*\)", "", modality).strip()
    place = site if isinstance(site, str) and site.casefold() not in target.casefold() else ""
    place = re.sub(r"\s*\(.*\)", "", place)
    return f"{target} in {' '.join(part for part in (place, modality) if part)}" if modality else ""


def read(item: Item) -> Iterator[RawCase | Skipped]:
    """The image with those of its masks that are sound."""
    where = f"{item.folder}/" if item.folder else ""
    folder = item.root / item.folder
    try:
        image = read_picture(inside(folder, item.image))
    except BadDataError as error:
        yield Skipped(
            where + item.image, f"{reason(error, item.root)}; its {len(item.masks)} masks are left out with it"
        )
        return
    masks: dict[str, Mask] = {}
    instructions: dict[str, str] = {}
    for file, structure, phrase in item.masks:
        if structure in masks:
            yield Skipped(where + file, f"a second mask of {structure!r} for this image")
            continue
        try:
            masks[structure] = read_foreground(inside(folder, file))
        except BadDataError as error:
            yield Skipped(where + file, reason(error, item.root))
            continue
        if phrase:
            instructions[structure] = phrase
    if masks:
        yield RawCase(where + item.image, image, masks, item.patient, item.name, instructions, item.split)
