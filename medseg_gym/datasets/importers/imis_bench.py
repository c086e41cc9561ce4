"""The IMIS-Bench layout: dataset.json, PNG images, and one sparse `.npz` an image with a row a structure."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.datasets.cards import DatasetCard, instruction
from medseg_gym.datasets.importers import RawCase, Skipped, check_options, identify, inside, read_json, reason
from medseg_gym.datasets.importers.npz_file import read_arrays
from medseg_gym.errors import BadDataError
from medseg_gym.images import MAX_PIXELS, read_image
from medseg_gym.types import Mask

OPTIONS: dict[str, str] = {}
WANT = '{"labels": {"1": NAME, ...}, "training": [{"image", "label"}], "test": [...]}'
MAX_ROWS = 4096
CSR = ("format", "shape", "indptr", "indices", "data")
_SHAPE = re.compile(r"\((\d{1,9}), ?(\d{1,9}), ?(\d{1,9}), ?(\d{1,9})\)\.npz$")  # x.(rows, H, W, depth).npz


@dataclass(frozen=True, slots=True)
class Item:
    """One image and its label file."""

    root: Path
    image: str
    label: str
    structures: tuple[str, ...]  # row r of the label file is structure r
    instructions: tuple[str, ...]
    patient: str
    name: str
    split: str | None


def plan(source: Path, card: DatasetCard, options: Mapping[str, str]) -> tuple[list[Item], list[Skipped]]:
    """One item an entry of dataset.json's training and test lists; unusable entries are skipped one by one.

    A non-empty test list fixes the splits; without one they are left to the card or to the patient's hash.
    """
    check_options(options, OPTIONS, "imis-bench")
    path = source / "dataset.json"
    record = read_json(path, WANT)
    structures = _structures(path, record.get("labels"))
    phrases = tuple(instruction(card, s) for s in structures)
    items: list[Item] = []
    skipped: list[Skipped] = []
    for part, split in (("training", "train" if record.get("test") else None), ("test", "test")):
        entries = record.get(part, [])
        if not isinstance(entries, list):
            raise BadDataError(f"{path}: {part!r} is a {type(entries).__name__}; wanted a list of image and label")
        for number, entry in enumerate(entries):
            try:
                if not isinstance(entry, dict):
                    raise BadDataError(f"a {type(entry).__name__}; wanted an object with image and label")
                inside(source, entry.get("image"))
                inside(source, entry.get("label"))
            except BadDataError as error:
                skipped.append(Skipped(f"dataset.json, {part} {number}", str(error)))
                continue
            stem = Path(entry["image"]).stem
            patient, name = identify(stem, card.patient, otherwise=stem)
            items.append(Item(source, entry["image"], entry["label"], structures, phrases, patient, name, split))
    return sorted(items, key=lambda item: item.image), skipped


def _structures(path: Path, labels: Any) -> tuple[str, ...]:
    """The structures in label order: "kidney_right" becomes "right kidney"; label 0 is the background."""
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
        raise BadDataError(f"{path}: no labels; wanted {WANT}")
    try:
        by_value = {int(value): name for value, name in labels.items()}
    except ValueError:
        raise BadDataError(f"{path}: label values are {list(labels)[:5]}; wanted integers") from None
    by_value.pop(0, None)
    if not by_value or sorted(by_value) != list(range(1, len(by_value) + 1)):
        raise BadDataError(f"{path}: label values are {sorted(by_value)[:20]}; wanted 1, 2, 3, ... without gaps")
    return tuple(plain_name(by_value[value]) for value in sorted(by_value))


def plain_name(label: str) -> str:
    """ "kidney_right" -> "right kidney": the side leads, spaces for underscores."""
    words = label.replace("_", " ").split()
    if len(words) > 1 and words[-1] in ("left", "right"):
        words = [words[-1], *words[:-1]]
    return " ".join(words)


def read(item: Item) -> Iterator[RawCase | Skipped]:
    """The image with the masks of the structures in it. A structure without foreground is not in it."""
    try:
        image = read_image(inside(item.root, item.image))
    except BadDataError as error:
        yield Skipped(item.image, reason(error, item.root))
        return
    try:
        masks = read_label(inside(item.root, item.label), len(item.structures))
    except BadDataError as error:
        yield Skipped(item.label, reason(error, item.root))
        return
    if masks.shape[1:] != image.shape[:2]:
        (h, w), (mh, mw) = image.shape[:2], masks.shape[1:]
        yield Skipped(item.label, f"masks are {mh}x{mw} and the image {h}x{w} (height x width)")
        return
    present = {s: mask for s, mask in zip(item.structures, masks, strict=True) if mask.any()}
    if not present:
        yield Skipped(item.label, "no structure has foreground", damaged=False)
        return
    phrases = dict(zip(item.structures, item.instructions, strict=True))
    instructions = {s: phrases[s] for s in present}
    yield RawCase(item.image, image, present, item.patient, item.name, instructions, item.split)


def read_label(path: Path, rows: int) -> np.ndarray:
    """(rows, H, W) bool of a SciPy CSR `.npz` whose file name ends in `(rows, H, W, 1).npz`; nothing is unpickled."""
    try:
        return _read_label(path, rows)
    except BadDataError:
        raise
    except (ValueError, TypeError, OverflowError, lzma.LZMAError) as error:  # what hostile headers can still provoke
        raise BadDataError(f"{path}: not a readable label ({error})") from None


def _read_label(path: Path, rows: int) -> np.ndarray:
    found = _SHAPE.search(path.name)
    if found is None:
        raise BadDataError(f"{path}: the file name gives no shape; wanted NAME.(rows, height, width, 1).npz")
    count, height, width, depth = (int(n) for n in found.groups())
    if count != rows or depth != 1:
        raise BadDataError(f"{path}: its name says {count} rows, depth {depth}; wanted {rows} rows, depth 1")
    if not 1 <= rows <= MAX_ROWS or not 1 <= height * width <= MAX_PIXELS or rows * height * width > 4 * MAX_PIXELS:
        raise BadDataError(f"{path}: {rows} masks of {height}x{width} are more than is read (or none)")
    arrays = read_arrays(path, CSR, limit=min(2**16 + 16 * rows * height * width, 2**30), axes=2)
    kind = bytes(arrays["format"].astype("S8").tobytes()).rstrip(b"\0")
    shape = tuple(int(n) for n in arrays["shape"].ravel())
    if kind != b"csr" or shape != (rows, height * width):
        raise BadDataError(f"{path}: holds a {kind!r} matrix of {shape}; wanted csr of {(rows, height * width)}")
    pointers, columns, data = (arrays[name] for name in ("indptr", "indices", "data"))
    sound = (
        pointers.dtype.kind in "iu"
        and columns.dtype.kind in "iu"
        and data.dtype.kind in "biuf"
        and pointers.shape == (rows + 1,)
        and columns.ndim == 1
        and columns.shape == data.shape
        and pointers[0] == 0
        and pointers[-1] == len(columns)
        and bool((np.diff(pointers.astype(np.int64)) >= 0).all())
        and (len(columns) == 0 or (columns.min() >= 0 and columns.max() < height * width))
    )
    if not sound:
        raise BadDataError(f"{path}: its CSR arrays do not fit together")
    masks: Mask = np.zeros((rows, height * width), np.bool_)
    for row in range(rows):
        part = slice(int(pointers[row]), int(pointers[row + 1]))
        masks[row, columns[part][data[part] != 0]] = True
    return masks.reshape(rows, height, width)
