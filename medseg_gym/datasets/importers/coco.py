"""COCO instance JSON: polygons and run lengths become one mask a category, or one case an instance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.datasets.base import SPLITS
from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import RawCase, Skipped, check_options, identify, inside, read_json, reason
from medseg_gym.datasets.importers.intensities import Window, parse_window
from medseg_gym.datasets.importers.pictures import WINDOW_HELP, read_picture
from medseg_gym.errors import BadDataError, unknown
from medseg_gym.images import MAX_PIXELS
from medseg_gym.types import Mask

OPTIONS: dict[str, str] = {
    "json": "the annotation file below the source; by default every .json of the source and of annotations/",
    "image": "the folder of the images below the source; by default looked for in the usual ones",
    "instances": "union (default): an image's instances of a category are one mask; each: every instance is a case",
    "window": WINDOW_HELP,
}
WANT = '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "category_id", "segmentation"}], "categories"}'
FOLDERS = ("", "images", "{split}", "images/{split}", "train2017", "val2017", "test2017", "{name}")
MAX_POINTS = 100_000  # of one instance's polygons
MAX_LENGTH = 2_000_000  # pixels along them: the rasteriser takes some 100 bytes for each


@dataclass(frozen=True, slots=True)
class Item:
    """One image and its annotations: (number in the file, structure, segmentation)."""

    root: Path
    file: str
    annotations: tuple[tuple[int, str, Any], ...]
    listing: str
    each: bool
    window: Window
    patient: str
    name: str
    split: str | None


def plan(source: Path, card: DatasetCard, options: Mapping[str, str]) -> tuple[list[Item], list[Skipped]]:
    """One item an annotated image. A file named after a split (instances_val.json) fixes it for its images."""
    check_options(options, OPTIONS, "coco")
    instances = options.get("instances", "union")
    if instances not in ("union", "each"):
        raise unknown("value of instances:", instances, ("union", "each"))
    window = parse_window(options.get("window", "percentile"))
    items: list[Item] = []
    skipped: list[Skipped] = []
    for listing in _listings(source, options.get("json")):
        record = read_json(source / listing, WANT)
        names = _categories(source / listing, record)
        split = _split(Path(listing).stem)
        found = _Found(source, options.get("image"), Path(listing).stem, split)
        images, bad = _images(listing, record, found)
        skipped += bad
        annotations: dict[Any, list[tuple[int, str, Any]]] = {}
        for number, entry in enumerate(record["annotations"]):
            try:
                image, structure, outline = _annotation(entry, names)
            except BadDataError as error:
                skipped.append(Skipped(f"{listing}, annotation {number}", str(error)))
                continue
            if image in images:
                annotations.setdefault(image, []).append((number, structure, outline))
            elif image not in found.refused:
                skipped.append(Skipped(f"{listing}, annotation {number}", f"no image has the id {image!r:.40}"))
        for key, (file, given) in images.items():
            if key not in annotations:
                skipped.append(Skipped(file, "no annotation of this image", damaged=False))
                continue
            own = str(Path(given).with_suffix("")).replace("/", "_")
            patient, name = identify(Path(given).stem, card.patient, otherwise=own)
            item = Item(
                source, file, tuple(annotations[key]), listing, instances == "each", window, patient, name, split
            )
            items.append(item)
    return sorted(items, key=lambda item: (item.file, item.listing)), skipped


class _Found:
    """Where the images of a listing are."""

    def __init__(self, source: Path, folder: str | None, name: str, split: str | None) -> None:
        self.source = source
        self.refused: set[Any] = set()  # ids of images that were skipped; their annotations go with them
        wanted = FOLDERS if folder is None else (folder.rstrip("/"),)
        places = [place.format(split=split or "train", name=name) if folder is None else place for place in wanted]
        for place in places:
            if place:
                inside(source, place)
        self.places = tuple(dict.fromkeys(places))

    def __call__(self, file: str) -> str:
        """The file below the source; the first place's name where it is in none."""
        names = [f"{place}/{file}" if place else file for place in self.places]
        return next((name for name in names if (self.source / name).is_file()), names[0])


def _listings(source: Path, wanted: str | None) -> list[str]:
    if wanted is not None:
        inside(source, wanted)
        return [wanted]
    paths = sorted([*source.glob("*.json"), *source.glob("annotations/*.json")])
    if not paths:
        raise BadDataError(f"{source}: no .json in it or in annotations/; name it with --option json=FILE")
    return [path.relative_to(source).as_posix() for path in paths]


def _split(stem: str) -> str | None:
    words = "".join(c if c.isalpha() else " " for c in stem.casefold()).split()
    return next((split for split in SPLITS if split in words), None)


def _categories(path: Path, record: Mapping[str, Any]) -> dict[Any, str]:
    for part in ("images", "annotations", "categories"):
        if not isinstance(record.get(part), list):
            raise BadDataError(f"{path}: no list of {part}; wanted {WANT}")
    names: dict[Any, str] = {}
    for entry in record["categories"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not _is_id(entry.get("id")):
            raise BadDataError(f"{path}: category {entry!r:.80}; wanted id and name")
        names[entry["id"]] = " ".join(entry["name"].replace("_", " ").split())
    return names


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _images(listing: str, record: Mapping[str, Any], found: _Found) -> tuple[dict[Any, tuple[str, str]], list[Skipped]]:
    """id -> (file below the source, file name as given)."""
    images: dict[Any, tuple[str, str]] = {}
    skipped = []
    for number, entry in enumerate(record["images"]):
        where = f"{listing}, image {number}"
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            skipped.append(Skipped(where, f"{entry!r:.60}; wanted an object with id and file_name"))
            continue
        try:
            inside(found.source, entry.get("file_name"))
            if entry["id"] in images:
                raise BadDataError(f"a second image with the id {entry['id']!r:.40}")
        except BadDataError as error:
            found.refused.add(entry["id"])
            skipped.append(Skipped(where, str(error)))
            continue
        images[entry["id"]] = found(entry["file_name"]), entry["file_name"]
    return images, skipped


def _annotation(entry: Any, names: Mapping[Any, str]) -> tuple[Any, str, Any]:
    if not isinstance(entry, dict) or not _is_id(entry.get("image_id")):
        raise BadDataError("wanted an object with image_id, category_id and segmentation")
    if not _is_id(entry.get("category_id")) or entry["category_id"] not in names:
        raise BadDataError(f"no category has the id {entry.get('category_id')!r:.40}")
    if not entry.get("segmentation"):
        raise BadDataError("no segmentation")
    return entry["image_id"], names[entry["category_id"]], entry["segmentation"]


def read(item: Item) -> Iterator[RawCase | Skipped]:
    """The image with a mask a category, or, one by one, its instances; an annotation that is not sound costs itself."""
    try:
        image = read_picture(item.root / item.file, item.window)
    except BadDataError as error:
        count = len(item.annotations)
        yield Skipped(item.file, f"{reason(error, item.root)}; its {count} annotations are left out with it")
        return
    height, width = image.shape[:2]
    masks: dict[str, Mask] = {}
    case = RawCase(item.file, image, masks, item.patient, item.name, split=item.split)
    for number, structure, outline in item.annotations:
        try:
            mask = outline_mask(outline, height, width)
            if not mask.any():
                raise BadDataError("its mask has no foreground")
        except BadDataError as error:
            yield Skipped(f"{item.listing}, annotation {number}", str(error))
            continue
        if item.each:
            yield replace(case, masks={structure: mask}, name=f"{item.name}-{number:05}")
        else:
            masks[structure] = masks[structure] | mask if structure in masks else mask
    if masks:
        yield case


def outline_mask(outline: Any, height: int, width: int) -> Mask:
    """(height, width) of a COCO segmentation: polygons [[x, y, x, y, ...], ...], or {"size", "counts"} run lengths."""
    if isinstance(outline, list):
        return _polygons(outline, height, width)
    if not isinstance(outline, dict):
        raise BadDataError(f"segmentation is a {type(outline).__name__}; wanted polygons or run lengths")
    size, counts = outline.get("size"), outline.get("counts")
    if size != [height, width]:
        raise BadDataError(f"segmentation is of size {size!r:.40}, the image {[height, width]} (height, width)")
    if isinstance(counts, str):
        counts = _unpacked(counts, height * width)
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n <= MAX_PIXELS for n in counts):
        raise BadDataError("run lengths are not whole numbers from 0 up")
    if sum(counts) != height * width:
        raise BadDataError(f"run lengths add up to {sum(counts)}; wanted {height * width}, the image's pixels")
    ones = np.arange(len(counts)) % 2 == 1
    return np.repeat(ones, counts).reshape(width, height).T  # columns first


def _unpacked(text: str, most: int) -> list[int]:
    """The run lengths of COCO's text form: 5 bits a character from "0" on, the sixth says that more follow.

    From the third on a length is stored as its difference to the one before the last.
    """
    counts: list[int] = []
    place = 0
    while place < len(text):
        value = shift = 0
        more = True
        while more:
            if place >= len(text) or shift > 30:
                raise BadDataError("run lengths end in the middle of a number")
            code = ord(text[place]) - 48
            if not 0 <= code < 64:
                raise BadDataError(f"run lengths hold the character {text[place]!r}")
            value |= (code & 31) << shift
            more = bool(code & 32)
            place, shift = place + 1, shift + 5
            if not more and code & 16:
                value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if not 0 <= value <= most:
            raise BadDataError("run lengths are not whole numbers from 0 up")
        counts.append(value)
    return counts


def _polygons(outline: list[Any], height: int, width: int) -> Mask:
    """The union of polygons, by COCO's own rule of what a pixel's edge belongs to."""
    from pycocotools import mask as coco

    if sum(len(ring) for ring in outline if isinstance(ring, list)) > 2 * MAX_POINTS:
        raise BadDataError(f"more than {MAX_POINTS} points")
    reach = max(height, width)
    for ring in outline:
        if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
            raise BadDataError(f"polygon {ring!r:.40}; wanted [x, y, x, y, x, y, ...]")
        for n in ring:
            # A number far outside would make the rasteriser walk there step by step
            if type(n) not in (int, float) or not math.isfinite(n) or not -reach <= n <= 2 * reach:
                raise BadDataError(f"polygon has the coordinate {n!r:.30}, far outside the {width}x{height} image")
    if sum(_length(ring) for ring in outline) > MAX_LENGTH:
        raise BadDataError(f"polygons are longer than {MAX_LENGTH} pixels together")
    runs = coco.frPyObjects([[float(n) for n in ring] for ring in outline], height, width)
    return np.asarray(coco.decode(coco.merge(runs)), np.bool_)


def _length(ring: list[float]) -> float:
    """The way along a closed polygon, each edge by the longer of its two sides."""
    points = np.array(ring, np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
