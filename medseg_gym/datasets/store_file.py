"""An open store: checks that the file is what it claims to be, holds its index, decodes images and masks.

    attributes             format, schema, writer, name, layout, checksum
    images/{H}x{W}x{C}     (n, H, W, C) uint8, one image a chunk; grey images have C = 1
    masks/{H}x{W}          (n, H, ceil(W / 8)) uint8, one bit-packed mask a chunk
    index/                 images, cases, patients: one row each; structures, instructions: tables of texts

Images of one size share an array, so any mixture of sizes fits in a file and a reader opens few HDF5 objects. Every
chunk carries a checksum (Fletcher) and the file one over its content (sha256), which does not depend on compression.
Only plain numbers and fixed-width bytes are read: no pickled objects, no links, no external or virtual data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medseg_gym.datasets.base import SPLITS
from medseg_gym.datasets.schema import (
    CASE,
    FILTERS,
    FORMAT,
    MAX_INDEX_BYTES,
    SCHEMA,
    image_group,
    image_record,
    mask_group,
    patient_record,
    record_digest,
    slug,
)
from medseg_gym.errors import BadDataError, DataMissingError
from medseg_gym.images import MAX_PIXELS
from medseg_gym.types import Image, Mask, Sample

if TYPE_CHECKING:
    import h5py


class StoreFile:
    """An open file with its index in memory, and the images decoded last; belongs to one process."""

    def __init__(self, path: Path, wanted: str | None, cache_bytes: int) -> None:
        self.path, self.pid, self._cache_bytes = path, os.getpid(), cache_bytes
        self.file = _open_file(path, wanted)
        self._pixels: dict[str, h5py.Dataset] = {}
        self._cache: dict[int, Image] = {}  # least recently used first
        self._keys: list[str] | None = None
        self._numbers: dict[str, int] | None = None
        self._of_image: tuple[np.ndarray, np.ndarray] | None = None
        try:
            self._check_format(wanted)
            self._read_index()
        except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
            self.file.close()
            if isinstance(error, BadDataError):
                raise
            raise self.bad(f"its index cannot be read ({error})") from None

    def bad(self, what: str) -> BadDataError:
        return _bad(self.path, what)

    def attribute(self, name: str) -> str:
        value = self.file.attrs.get(name)
        if not isinstance(value, str):
            raise self.bad(f"it is not a {FORMAT} (attribute {name!r} is {value!r})")
        return value

    def _check_format(self, wanted: str | None) -> None:
        if self.file.attrs.get("format") != FORMAT:
            raise self.bad("it is an HDF5 file of another program")
        schema = self.file.attrs.get("schema")
        if not isinstance(schema, np.integer) or schema < 1:
            raise self.bad(f"its schema is {schema!r}")
        if schema > SCHEMA:
            raise BadDataError(
                f"{self.path}: written by {self.attribute('writer')} in schema {schema}; this version reads up to "
                f"{SCHEMA}. Upgrade with `pip install -U medseg-gym`, or prepare the dataset again with this version."
            )
        self.name = self.attribute("name")
        if wanted is not None and self.name != wanted:
            raise self.bad(f"it holds the dataset {self.name!r}, not {wanted!r}")

    def _read_index(self) -> None:
        self.structures = self._texts("structures")
        self._instructions = self._texts("instructions")
        patients = self._table("patients", patient_record)
        self.patients = tuple(p.decode() for p in patients["name"].tolist())
        self.patient_split = patients["split"]
        self.images = self._table("images", image_record)
        self.cases = self._table("cases", lambda _: CASE)
        for column, table, limit in (
            (self.patient_split, "patients", len(SPLITS)),
            (self.images["patient"], "images", len(patients)),
            (self.cases["image"], "cases", len(self.images)),
            (self.cases["structure"], "cases", len(self.structures)),
            (self.cases["instruction"], "cases", len(self._instructions)),
        ):
            if len(column) and not (column.min() >= 0 and column.max() < limit):
                raise self.bad(f"a row of its index of {table} points at nothing")
        self.case_split = self.patient_split[self.images["patient"][self.cases["image"]]]

    def _texts(self, name: str) -> tuple[str, ...]:
        data = self._dataset(f"index/{name}")
        if data.dtype.kind != "S" or data.ndim != 1:
            raise self.bad(f"index/{name} is {data.dtype} with {data.ndim} axes")
        return tuple(text.decode() for text in data[()].tolist())

    def _table(self, name: str, record: Callable[[int], np.dtype]) -> np.ndarray:
        data = self._dataset(f"index/{name}")
        width = data.dtype["name"].itemsize if "name" in (data.dtype.names or ()) else 0
        if data.ndim != 1 or data.dtype != record(width):
            raise self.bad(f"index/{name} is {data.dtype}")
        return np.asarray(data[()])

    def _dataset(self, name: str) -> h5py.Dataset:
        """An array of this very file, plain and within the limits."""
        import h5py

        data = self.file
        for part in name.split("/"):
            if not isinstance(data, h5py.Group) or not isinstance(data.get(part, getlink=True), h5py.HardLink):
                raise self.bad(f"it has no {name} of its own")
            data = data[part]
        if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
            raise self.bad(f"{name} is not an array of its own")
        creation = data.id.get_create_plist()
        if any(creation.get_filter(i)[0] not in FILTERS for i in range(creation.get_nfilters())):
            raise self.bad(f"{name} is packed in a way this version does not unpack")
        if name.startswith("index/") and data.size * data.dtype.itemsize > MAX_INDEX_BYTES:
            raise self.bad(f"{name} has {data.size} rows; more than is read")
        return data

    def _pixel_rows(self, name: str, shape: tuple[int, ...], row: int) -> np.ndarray:
        """Row `row` of a pixel array."""
        data = self._pixels.get(name)
        try:
            if data is None:
                data = self._dataset(name)
                if data.dtype != np.uint8 or data.shape[1:] != shape or data.chunks != (1, *shape):
                    raise self.bad(f"{name} is {data.shape} {data.dtype} in chunks {data.chunks}")
                self._pixels[name] = data
            if not 0 <= row < data.shape[0]:
                raise self.bad(f"row {row} of {name} is not there")
            return np.asarray(data[row])
        except (OSError, RuntimeError, TypeError) as error:
            raise self.bad(f"row {row} of {name} cannot be read ({error})") from None

    @property
    def keys(self) -> list[str]:
        """The key of every case, in case order, which is their sorted order."""
        if self._keys is None:
            slugs = [slug(s) for s in self.structures]
            prefixes = [
                f"{self.name}/{self.patients[patient]}/{name.decode()}/"
                for patient, name in zip(self.images["patient"].tolist(), self.images["name"].tolist(), strict=True)
            ]
            pairs = zip(self.cases["image"].tolist(), self.cases["structure"].tolist(), strict=True)
            self._keys = [prefixes[image] + slugs[structure] for image, structure in pairs]
        return self._keys

    @property
    def numbers(self) -> dict[str, int]:
        if self._numbers is None:
            self._numbers = {key: number for number, key in enumerate(self.keys)}
        return self._numbers

    def sample(self, number: int) -> Sample:
        case = self.cases[number]
        image = self.images[case["image"]]
        rows, columns = (float(x) for x in image["spacing"])
        return Sample(
            key=self.keys[number],
            image=self.image(int(case["image"])),
            target=self.mask(number),
            structure=self.structures[case["structure"]],
            instruction=self._instructions[case["instruction"]],
            patient=self.patients[image["patient"]],
            spacing_mm=None if np.isnan(rows) else (rows, columns),
        )

    def size(self, image: int) -> tuple[int, int, int]:
        height, width, channels = (int(n) for n in self.images["shape"][image])
        if min(height, width) < 1 or height * width > MAX_PIXELS or channels not in (1, 3):
            raise self.bad(f"image {image} is {height}x{width}x{channels}; more than is read")
        return height, width, channels

    def stored(self, image: int) -> np.ndarray:
        """(H, W, 1) or (H, W, 3) uint8 as stored."""
        shape = self.size(image)
        return self._pixel_rows(image_group(*shape), shape, int(self.images["row"][image]))

    def image(self, number: int) -> Image:
        """(H, W, 3), read-only; the cases of one image share the array while it is among the last ones used."""
        image = self._cache.pop(number, None)
        if image is None:
            import cv2

            stored = self.stored(number)
            grey = stored.shape[2] == 1
            image = np.asarray(cv2.cvtColor(stored, cv2.COLOR_GRAY2RGB), np.uint8) if grey else stored
            image.flags.writeable = False
        self._cache[number] = image
        total = sum(other.nbytes for other in self._cache.values())
        while total > self._cache_bytes and len(self._cache) > 1:
            total -= self._cache.pop(next(iter(self._cache))).nbytes
        return image

    def packed(self, number: int) -> np.ndarray:
        height, width, _ = self.size(int(self.cases["image"][number]))
        shape = (height, (width + 7) // 8)
        return self._pixel_rows(mask_group(height, width), shape, int(self.cases["row"][number]))

    def mask(self, number: int) -> Mask:
        """(H, W) bool, read-only."""
        _, width, _ = self.size(int(self.cases["image"][number]))
        mask = np.unpackbits(self.packed(number), axis=1, count=width).view(np.bool_)
        mask.flags.writeable = False
        return mask

    def cases_of(self, image: int) -> list[int]:
        """The numbers of an image's cases, in order."""
        if self._of_image is None:
            order = np.argsort(self.cases["image"], kind="stable")
            bounds = np.searchsorted(self.cases["image"][order], np.arange(len(self.images) + 1))
            self._of_image = order, bounds
        order, bounds = self._of_image
        return order[bounds[image] : bounds[image + 1]].tolist()

    def cases_by_image(self) -> Iterator[tuple[int, list[int]]]:
        for image in range(len(self.images)):
            yield image, self.cases_of(image)

    def check_image(self, image: int, cases: list[int]) -> tuple[bytes, list[str]]:
        """The digest of an image with its cases, recomputed, and what is wrong with them."""
        row = self.images[image]
        records: list[tuple[str, str, np.ndarray]] = []
        problems = []
        for number in cases:
            case = self.cases[number]
            structure, text = self.structures[case["structure"]], self._instructions[case["instruction"]]
            records.append((structure, text, self.packed(number)))
            area = int(self.mask(number).sum())
            if area != case["area"]:
                problems.append(f"{self.keys[number]}: the mask has {area} pixels; {case['area']} were written")
        patient, name = self.patients[row["patient"]], row["name"].decode()
        digest = record_digest(patient, name, row["spacing"], self.stored(image), records)
        if digest != row["digest"].tobytes():
            problems.append(f"{self.name}/{patient}/{name}: the image or its masks differ from what was written")
        if not cases:
            problems.append(f"{self.name}/{patient}/{name}: an image without cases")
        return digest, problems


def _open_file(path: Path, wanted: str | None) -> h5py.File:
    import h5py

    if not path.is_file():
        raise missing(path, wanted)
    try:
        # Prepared files are never written in place, so locks only hurt on shared drives; the images are cached decoded.
        return h5py.File(path, "r", locking=False, rdcc_nbytes=0)
    except (OSError, RuntimeError) as error:
        raise _bad(path, f"it is not readable HDF5: damaged, cut short or of another kind ({error})") from None


def missing(path: Path, name: str | None) -> DataMissingError:
    wanted = name or path.stem
    return DataMissingError(
        f"{wanted} is not prepared on this machine ({path} is not there). Prepare it with:\n"
        f"    medseg-gym data prepare {wanted} --from FOLDER"
    )


def _bad(path: Path, what: str) -> BadDataError:
    return BadDataError(
        f"{path}: {what}. Prepare the dataset again: medseg-gym data prepare {path.stem} --from FOLDER --force"
    )
