"""PNG, JPEG, TIFF, BMP and GIF images with masks beside them by pattern; a mask file outlines one structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import RawCase, Skipped, check_options, reason
from medseg_gym.datasets.importers.intensities import Window, parse_window
from medseg_gym.datasets.importers.labels import parse_structures
from medseg_gym.datasets.importers.pairs import PATTERN_OPTIONS, Pair, asked, find_pairs
from medseg_gym.datasets.importers.pictures import SUFFIXES, WINDOW_HELP, read_foreground, read_picture
from medseg_gym.datasets.importers.volumes import number
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.types import Mask

OPTIONS: dict[str, str] = {
    **PATTERN_OPTIONS,
    "structure": "what the masks outline; not needed where {target} in the mask's pattern names it",
    "threshold": "a mask's value from which on it is foreground; 1 by default, 128 in JPEG files",
    "window": WINDOW_HELP,
}
USUAL = (
    ("{split}/images/{id}_{split}.*", "{split}/1st_manual/{id}_manual1.*"),  # DRIVE
    *(
        (image, mask)
        for top in ("", "{split}/")
        for image, mask in (
            (f"{top}images/{{id}}.*", f"{top}masks/{{id}}__{{target}}.*"),
            (f"{top}images/{{id}}.*", f"{top}masks/{{id}}.*"),
            (f"{top}images/{{id}}.*", f"{top}masks/{{id}}_mask.*"),
            (f"{top}images/{{id}}.*", f"{top}labels/{{id}}.*"),
            (f"{top}image/{{id}}.*", f"{top}mask/{{id}}.*"),
            (f"{top}Original/{{id}}.*", f"{top}Ground Truth/{{id}}.*"),
            (f"{top}{{id}}.*", f"{top}{{id}}__{{target}}.*"),
            (f"{top}{{id}}.*", f"{top}{{id}}_mask.*"),
            (f"{top}{{id}}.*", f"{top}{{id}}_segmentation.*"),
        )
    ),
)


@dataclass(frozen=True, slots=True)
class Item:
    """One image and its mask files."""

    root: Path
    pair: Pair
    structure: str  # of the masks whose name does not say
    threshold: int | None
    window: Window


def plan(source: Path, card: DatasetCard, options: Mapping[str, str]) -> tuple[list[Item], list[Skipped]]:
    """One item an image that has a mask."""
    check_options(options, OPTIONS, "png-pairs")
    pairs, skipped = find_pairs(source, card, asked(options.get("image"), options.get("mask"), USUAL), SUFFIXES)
    structure = _structure(options.get("structure"), card)
    if not structure and not all(target for pair in pairs for _, target in pair.masks):
        raise MedSegError(f"{source}: nothing says what the masks outline; add --structure NAME")
    threshold = number(options, "threshold", 1) if "threshold" in options else None
    window = parse_window(options.get("window", "percentile"))
    return [Item(source, pair, structure, threshold, window) for pair in pairs], skipped


def _structure(option: str | None, card: DatasetCard) -> str:
    if option is None:
        return card.structures[0].name if len(card.structures) == 1 else ""
    parts = parse_structures(option)
    if len(parts) > 1 or parts[0].values or parts[0].colours:
        raise MedSegError(
            f"structure {option!r} names label values; masks that hold several are read by --layout colour-masks"
        )
    return parts[0].structure


def read(item: Item) -> Iterator[RawCase | Skipped]:
    """The image with those of its masks that are sound."""
    pair = item.pair
    try:
        image = read_picture(item.root / pair.image, item.window)
    except BadDataError as error:
        yield Skipped(pair.image, f"{reason(error, item.root)}; its {len(pair.masks)} masks are left out with it")
        return
    masks: dict[str, Mask] = {}
    for file, target in pair.masks:
        structure = target or item.structure
        if structure in masks:
            yield Skipped(file, f"a second mask of {structure!r} for this image")
            continue
        try:
            masks[structure] = read_foreground(item.root / file, item.threshold)
        except BadDataError as error:
            yield Skipped(file, reason(error, item.root))
    if masks:
        yield RawCase(pair.image, image, masks, pair.patient, pair.name, split=pair.split)
