"""What every importer shares: the record of a raw image, the report of a skipped file, and the list of layouts.

An importer is a module with two functions. `plan(source, card, options)` looks the folder over and returns the work,
one `Item` an image or volume, without decoding anything; `read(item)` yields what is in one. Items are small and
pickle. `OPTIONS` tells the options it takes, name -> help; their values are texts.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError, unknown
from medseg_gym.images import read_image
from medseg_gym.types import Mask

LAYOUTS = {
    "biomedparse": "BiomedParse: {split}/ images, {split}_mask/ masks, {split}.json",
    "imis-bench": "IMIS-Bench: dataset.json, image/ PNG, label/ sparse .npz",
    "nifti-msd": "Medical Segmentation Decathlon and nnU-Net: dataset.json, imagesTr/, labelsTr/ volumes",
    "nifti-pairs": "NIfTI volumes, image beside label by pattern",
    "dicom": "DICOM series with segmentations: SEG or RTSTRUCT",
    "npz": "MedSAM2's volumes: .npz files with imgs, gts, spacing",
    "png-pairs": "PNG, JPEG, TIFF pairs by pattern; a mask file a structure",
    "pool": "images/, masks/ and index.json that lists image, mask, target; one set or a folder of sets",
    "coco": "COCO instance JSON: polygons and RLE",
    "colour-masks": "pairs by pattern whose masks are colour-coded or hold label values",
}
MAX_JSON_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class RawCase:
    """One image with the masks of its structures, as an importer found it."""

    file: str  # where it came from, relative to the source
    image: np.ndarray  # (H, W, 3) or (H, W), uint8
    masks: Mapping[str, Mask]  # structure -> (H, W)
    patient: str
    name: str  # of the image, unique within the patient
    instructions: Mapping[str, str] = field(default_factory=dict)  # structure -> phrase; the card words the others
    split: str | None = None  # None: the card's rule, else the patient's hash, decides
    spacing_mm: tuple[float, float] | None = None
    absent: frozenset[str] = frozenset()  # structures whose empty mask is meant


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was left out, and why."""

    file: str
    reason: str
    damaged: bool = True  # False where nothing is wrong with the file, such as a mask that is empty by design


class Importer(Protocol):
    """What an importer module offers."""

    OPTIONS: Mapping[str, str]

    def plan(
        self, source: Path, card: DatasetCard, options: Mapping[str, str]
    ) -> tuple[Sequence[Any], Sequence[Skipped]]: ...

    def read(self, item: Any) -> Iterator[RawCase | Skipped]: ...


def importer(layout: str) -> Importer:
    """The module that reads a layout."""
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    return importlib.import_module(f"{__name__}.{layout.replace('-', '_')}")  # type: ignore[return-value]


def check_options(options: Mapping[str, str], known: Mapping[str, str], layout: str) -> None:
    """Raises for an option that the layout does not take, and for a value that is no text."""
    for name, value in options.items():
        if name not in known:
            if not known:
                raise UnknownNameError(f"unknown option {name!r}; the layout {layout} takes none")
            raise unknown(f"option of the layout {layout}:", name, known)
        if not isinstance(value, str):
            raise MedSegError(f"option {name}={value!r}; wanted a text")


def inside(root: Path, relative: object) -> Path:
    """The path of a file that a listing names; BadDataError if the name leads out of the folder.

    Judged by the name alone: links inside the folder are the user's own and are followed.
    """
    if not isinstance(relative, str) or not relative:
        raise BadDataError(f"file name is {relative!r}; wanted a text")
    parts = PurePosixPath(relative).parts
    if relative.startswith("/") or ".." in parts or "\\" in relative or ":" in relative or "\0" in relative:
        raise BadDataError(f"file name {relative!r} leads outside the folder; refused")
    return root / relative


def read_json(path: Path, want: str) -> dict[str, Any]:
    """The object in a JSON file; BadDataError names the file and says what was wanted."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise BadDataError(f"{path}: {size} bytes; the limit is {MAX_JSON_BYTES}")
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadDataError(f"{path}: no such file; wanted {want}") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadDataError):
            raise
        raise BadDataError(f"{path}: not readable JSON ({error}); wanted {want}") from None
    if not isinstance(record, dict):
        raise BadDataError(f"{path}: holds a {type(record).__name__}; wanted {want}")
    return record


def identify(stem: str, pattern: str, otherwise: str) -> tuple[str, str]:
    """Patient and image name of a file stem by a card's pattern; where it has none or does not fit, `otherwise`."""
    found = re.fullmatch(pattern, stem) if pattern else None
    if found is None:
        return safe(otherwise), safe(stem)
    groups = found.groupdict()
    number = groups.get("slice")
    return safe(groups["patient"]), safe(stem) if number is None else f"slice-{safe(number).zfill(3)}"


def safe(text: str) -> str:
    """A text fit to be one part of a key: anything but letters, digits, dot, dash and underscore becomes a dash."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text) or "-"


def read_foreground(path: Path) -> Mask:
    """The (H, W) mask of an image file: True where any colour channel is not 0; transparency does not count."""
    mask: Mask = np.any(read_image(path), axis=2)
    return mask


def reason(error: BadDataError, root: Path) -> str:
    """An error's text without the path in front of it, which the report gives once."""
    text = str(error)
    return text.split(": ", 1)[1] if text.startswith(str(root)) and ": " in text else text
