"""Pairs by pattern whose masks hold several structures: as colours, as a palette's indices or as grey label values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import RawCase, Skipped, check_options, reason
from medseg_gym.datasets.importers.intensities import Window, parse_window
from medseg_gym.datasets.importers.labels import Part, mask_of, parts_of
from medseg_gym.datasets.importers.nifti_pairs import unnamed_values
from medseg_gym.datasets.importers.pairs import PATTERN_OPTIONS, Pair, asked, find_pairs
from medseg_gym.datasets.importers.pictures import SUFFIXES, WINDOW_HELP, read_colours, read_picture, read_values
from medseg_gym.datasets.importers.png_pairs import USUAL
from medseg_gym.datasets.importers.volumes import number
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.types import Mask

OPTIONS: dict[str, str] = {
    **PATTERN_OPTIONS,
    "structure": "COLOUR=NAME or VALUE=NAME, several with commas: blue=kidney,red=kidney tumor; blue+red=NAME joins",
    "tolerance": "how far each channel may be off a colour, 0 by default; JPEG masks need some 60",
    "window": WINDOW_HELP,
}
FEW = 16  # pixels of a colour without a name that are passed over in silence: edges of drawn masks


@dataclass(frozen=True, slots=True)
class Item:
    """One image and its mask file."""

    root: Path
    pair: Pair
    parts: tuple[Part, ...]
    tolerance: int
    window: Window


def plan(source: Path, card: DatasetCard, options: Mapping[str, str]) -> tuple[list[Item], list[Skipped]]:
    """One item an image that has a mask; `--structure`, or the card's label values, say what the values mean."""
    check_options(options, OPTIONS, "colour-masks")
    usual = [patterns for patterns in USUAL if "{target}" not in patterns[1]]
    pairs, skipped = find_pairs(source, card, asked(options.get("image"), options.get("mask"), usual), SUFFIXES)
    parts = tuple(parts_of(options.get("structure"), card))
    if not parts or not all(part.values or part.colours for part in parts):
        raise MedSegError(
            f"{source}: nothing says what the masks' values mean; add --structure, as blue=kidney,red=cyst or 1=liver"
        )
    if any(part.colours for part in parts) and any(part.values for part in parts):
        raise MedSegError("structure names colours and label values; wanted one kind")
    tolerance = number(options, "tolerance", 0, least=0)
    window = parse_window(options.get("window", "percentile"))
    return [Item(source, pair, parts, tolerance, window) for pair in pairs], skipped


def read(item: Item) -> Iterator[RawCase | Skipped]:
    """The image with the masks of the structures in it; colours and values without a name are reported."""
    pair = item.pair
    (file, _), *others = pair.masks
    for other, _ in others:
        yield Skipped(other, "a second mask of this image")
    try:
        image = read_picture(item.root / pair.image, item.window)
    except BadDataError as error:
        yield Skipped(pair.image, f"{reason(error, item.root)}; its mask is left out with it")
        return
    try:
        if item.parts[0].colours:
            masks, unnamed = by_colour(read_colours(item.root / file), item.parts, item.tolerance)
        else:
            values = read_values(item.root / file)
            masks = {part.structure: mask_of(values, part) for part in item.parts}
            unnamed = unnamed_values(values, item.parts)
    except BadDataError as error:
        yield Skipped(file, reason(error, item.root))
        return
    if unnamed:
        yield Skipped(file, unnamed, damaged=False)
    present = {structure: mask for structure, mask in masks.items() if mask.any()}
    if not present:
        yield Skipped(file, "no structure has foreground", damaged=False)
        return
    yield RawCase(pair.image, image, present, pair.patient, pair.name, split=pair.split)


def by_colour(pixels: np.ndarray, parts: tuple[Part, ...], tolerance: int) -> tuple[dict[str, Mask], str]:
    """Masks of an (H, W, 3) image by the nearest of the parts' colours and black, and a line on other colours.

    A pixel further than the tolerance from all of them, in any channel, belongs to none.
    """
    named = [(0, 0, 0), *dict.fromkeys(colour for part in parts for colour in part.colours if colour != (0, 0, 0))]
    off = np.stack([np.abs(pixels.astype(np.int16) - colour).max(axis=2) for colour in named])
    nearest = np.where(off.min(axis=0) <= tolerance, off.argmin(axis=0), -1)
    masks: dict[str, Mask] = {}
    for part in parts:
        masks[part.structure] = np.isin(nearest, [named.index(colour) for colour in part.colours])
    others = pixels[nearest == -1]
    if len(others) <= FEW:
        return masks, ""
    colours, counts = np.unique(others.reshape(-1, 3), axis=0, return_counts=True)
    most = sorted(zip(counts.tolist(), colours.tolist(), strict=True), reverse=True)[:4]
    shown = ", ".join(f"#{r:02x}{g:02x}{b:02x} ({count} pixels)" for count, (r, g, b) in most)
    more = ", ..." if len(counts) > 4 else ""
    return masks, f"colours {shown}{more} have no name and are left out"
