"""The BiomedParse layout: `{split}/` images, `{split}_mask/` masks (nonzero is foreground), `{split}.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_gym.datasets.base import SPLITS
from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import (
    RawCase,
    Skipped,
    check_options,
    identify,
    inside,
    read_foreground,
    read_json,
    reason,
)
from medseg_gym.errors import BadDataError
from medseg_gym.images import read_image
from medseg_gym.types import Mask

OPTIONS: dict[str, str] = {}
WANT = '{"annotations": [{"file_name", "mask_file", "sentences": [{"sent"}]}]}'


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a split and what its listing says of its masks."""

    root: Path
    split: str
    image: str
    masks: tuple[tuple[str, str, str], ...]  # mask file, structure, instruction
    patient: str
    name: str


def plan(source: Path, card: DatasetCard, options: Mapping[str, str]) -> tuple[list[Item], list[Skipped]]:
    """One item an image of every split that has a listing; entries that cannot be used are skipped one by one."""
    check_options(options, OPTIONS, "biomedparse")
    listings = [split for split in SPLITS if (source / f"{split}.json").is_file()]
    if not listings:
        raise BadDataError(f"{source}: no train.json, val.json or test.json; wanted the BiomedParse layout")
    items: list[Item] = []
    skipped: list[Skipped] = []
    for split in listings:
        annotations = read_json(source / f"{split}.json", WANT).get("annotations")
        if not isinstance(annotations, list):
            raise BadDataError(f"{source / f'{split}.json'}: no list of annotations; wanted {WANT}")
        masks: dict[str, list[tuple[str, str, str]]] = {}
        for number, record in enumerate(annotations):
            try:
                image, mask = _entry(source, split, record)
            except BadDataError as error:
                skipped.append(Skipped(f"{split}.json, annotation {number}", str(error)))
            else:
                masks.setdefault(image, []).append(mask)
        for image, listed in sorted(masks.items()):
            patient, name = identify(Path(image).stem, card.patient, otherwise=Path(image).stem.rsplit("_", 2)[0])
            items.append(Item(source, split, image, tuple(sorted(listed)), patient, name))
    return items, skipped


def _entry(source: Path, split: str, record: Any) -> tuple[str, tuple[str, str, str]]:
    """Image file, and (mask file, structure, instruction), of one annotation."""
    if not isinstance(record, dict):
        raise BadDataError(f"a {type(record).__name__}; wanted an object with file_name and mask_file")
    image, mask = record.get("file_name"), record.get("mask_file")
    inside(source / split, image)
    inside(source / f"{split}_mask", mask)
    try:
        sentence = record["sentences"][0]["sent"]
    except (KeyError, IndexError, TypeError):
        sentence = ""  # the card words it
    image_stem, mask_stem = Path(str(image)).stem, Path(str(mask)).stem
    structure = mask_stem.removeprefix(f"{image_stem}_").replace("+", " ").strip()
    if not mask_stem.startswith(f"{image_stem}_") or not structure:
        raise BadDataError(f"mask file {mask!r} does not name its target; wanted {image_stem}_TARGET.png")
    return str(image), (str(mask), structure, sentence if isinstance(sentence, str) else "")


def read(item: Item) -> Iterator[RawCase | Skipped]:
    """The image with those of its masks that are sound, and a report of each that is not."""
    file = f"{item.split}/{item.image}"
    try:
        image = read_image(inside(item.root / item.split, item.image))
    except BadDataError as error:
        yield Skipped(file, f"{reason(error, item.root)}; its {len(item.masks)} masks are left out with it")
        return
    masks: dict[str, Mask] = {}
    instructions: dict[str, str] = {}
    for mask_file, structure, sentence in item.masks:
        shown = f"{item.split}_mask/{mask_file}"
        try:
            mask = read_foreground(inside(item.root / f"{item.split}_mask", mask_file))
        except BadDataError as error:
            yield Skipped(shown, reason(error, item.root))
            continue
        if structure in masks:
            yield Skipped(shown, f"a second mask of {structure!r} for this image")
            continue
        masks[structure] = mask
        if sentence:
            instructions[structure] = sentence
    yield RawCase(file, image, masks, item.patient, item.name, instructions, item.split)
