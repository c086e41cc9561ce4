"""One file of trajectories: its form in HDF5, written whole, and read with limits as a stranger's.

    attributes          format, schema, writer, settings (JSON)
    index/trajectories  a row each: key, strategy, kind, dropped, turns, image
    index/images        a row an image: sha256 of shape and bytes, shape, row
    images/HxWxC        (n, H, W, C) uint8, grey images as one channel, a chunk an image
    records/data        UTF-8, a record after the other; records/ends says where each ends
codec.py says what a record is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg_gym.datasets.schema import FILTERS, image_group
from medseg_gym.datasets.store_writer import PACKING, stored_form
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.images import MAX_PIXELS, image_hash
from medseg_gym.trajectories.codec import MAX_RECORD, Head, check_masks, decode, encode, head_of
from medseg_gym.trajectories.records import SCHEMA, Trajectory
from medseg_gym.types import Image

if TYPE_CHECKING:
    import h5py

FORMAT = "medseg-gym trajectories"
MAX_SETTINGS = 60_000  # bytes: an HDF5 attribute holds 64 kB
MAX_INDEX_BYTES = 2**28
CHUNK = 2**16  # bytes of records/data

_IMAGE = np.dtype([("sha", "u1", (32,)), ("shape", "<i4", (3,)), ("row", "<i4")])


Entry = tuple[Head, bytes, Image]  # a trajectory ready to be written


def entry_of(trajectory: Trajectory, image: Image) -> Entry:
    """A trajectory with its (H, W, 3) image as it is written; MedSegError where it could not be read again."""
    record, key = encode(trajectory), trajectory.episode.key
    stored_form(key, image)
    check_masks(trajectory.episode, image.shape[0], image.shape[1], MedSegError)
    return head_of(trajectory), record, image


def write_shard(path: Path, entries: Sequence[Entry], settings: str) -> None:
    """A file of these trajectories under its name, or none: written beside it, flushed, then renamed."""
    import h5py

    part = path.with_name(f".{path.name}.part")  # not read, and written over after a kill: a folder has one writer
    try:
        with h5py.File(part, "w", rdcc_nbytes=0) as file:
            _write(file, entries, settings)
        flush(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        code = getattr(error, "errno", None)
        what = os.strerror(code) if code else str(error)
        raise MedSegError(f"cannot write {path}: {what}; files written before it are whole") from error
    with suppress(OSError):  # the file is in place; some network drives cannot flush a folder
        flush(path.parent)


def _write(file: h5py.File, entries: Sequence[Entry], settings: str) -> None:
    from medseg_gym import __version__

    numbers: dict[str, int] = {}
    images: list[tuple[bytes, tuple[int, ...], int]] = []
    rows: dict[str, int] = {}
    table: list[tuple[Any, ...]] = []
    data: list[bytes] = []
    ends = [0]
    for head, record, image in entries:
        sha = image_hash(image)
        if sha not in numbers:
            numbers[sha] = len(images)
            pixels = stored_form(head.key, image)
            group = image_group(*pixels.shape)
            row = rows.get(group, 0)
            rows[group] = row + 1
            if row == 0:
                shape = pixels.shape
                file.create_dataset(
                    group, (0, *shape), np.uint8, chunks=(1, *shape), maxshape=(None, *shape), **PACKING
                )
            file[group].resize(row + 1, axis=0)
            file[group][row] = pixels
            images.append((bytes.fromhex(sha), pixels.shape, row))
        texts = [text.encode() for text in (head.key, head.strategy, head.kind, head.dropped)]
        table.append((*texts, head.turns, numbers[sha]))
        data.append(record)
        ends.append(ends[-1] + len(data[-1]))
    widths = [max((len(row[column]) for row in table), default=1) or 1 for column in range(4)]
    file["index/trajectories"] = np.array(table, _row(widths))
    file["index/images"] = np.array([(list(sha), shape, row) for sha, shape, row in images], _IMAGE)
    file["records/ends"] = np.array(ends[1:], "<i8")
    whole = np.frombuffer(b"".join(data), np.uint8)
    file.create_dataset("records/data", data=whole, chunks=(CHUNK,), maxshape=(None,), **PACKING)
    file.attrs.update({"format": FORMAT, "schema": SCHEMA, "writer": f"medseg-gym {__version__}", "settings": settings})


def _row(widths: Sequence[int]) -> np.dtype:
    texts = zip(("key", "strategy", "kind", "dropped"), widths, strict=True)
    return np.dtype([*((name, f"S{width}") for name, width in texts), ("turns", "<i4"), ("image", "<i4")])


class Shard:
    """An open file: its index in memory, records and images read when asked for."""

    def __init__(self, path: Path) -> None:
        import h5py

        self.path, self.pid = path, os.getpid()
        if not path.is_file():
            raise self._bad("no such file")
        try:
            # Published files are never written again, so locks only hurt on shared drives.
            self.file = h5py.File(path, "r", locking=False, rdcc_nbytes=4 * 2**20)
        except (OSError, RuntimeError) as error:
            raise self._bad(f"not readable HDF5: damaged, cut short or of another kind ({error})") from None
        try:
            self._read_index()
        except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
            self.close()
            raise (
                error if isinstance(error, BadDataError) else self._bad(f"its index cannot be read ({error})")
            ) from None

    def close(self) -> None:
        self.file.close()

    def __len__(self) -> int:
        return len(self._ends)

    def trajectory(self, number: int) -> Trajectory:
        begin, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        try:
            trajectory = decode(bytes(self._data[begin:end]))
            height, width, _ = self._size(self.image_of(number))
            check_masks(trajectory.episode, height, width, BadDataError)
        except (OSError, RuntimeError, BadDataError) as error:
            raise self._bad(f"record {number}: {error}") from None
        if head_of(trajectory) != self.heads[number]:
            raise self._bad(f"record {number} is another than the index says")
        return trajectory

    def image_of(self, number: int) -> int:
        """The number of a trajectory's image in this file."""
        return int(self._table["image"][number])

    def sha(self, image: int) -> str:
        """The image's hash, as images.image_hash gives it."""
        return bytes(self._images["sha"][image]).hex()

    def image(self, image: int) -> Image:
        """(H, W, 3), read-only."""
        import cv2

        shape, row = self._size(image), int(self._images["row"][image])
        try:
            data = self._dataset(image_group(*shape))
            if data.dtype != np.uint8 or data.shape[1:] != shape or data.chunks != (1, *shape):
                raise self._bad(f"its images of {shape} are {data.shape} {data.dtype} in chunks {data.chunks}")
            if not 0 <= row < data.shape[0]:
                raise self._bad(f"image {image} is not there")
            stored = np.asarray(data[row])
        except (OSError, RuntimeError, TypeError) as error:
            raise self._bad(f"image {image} cannot be read ({error})") from None
        pixels = np.asarray(cv2.cvtColor(stored, cv2.COLOR_GRAY2RGB), np.uint8) if shape[2] == 1 else stored
        pixels.flags.writeable = False
        if image_hash(pixels) != self.sha(image):
            raise self._bad(f"image {image} differs from what was written")
        return pixels

    def _read_index(self) -> None:
        if self.file.attrs.get("format") != FORMAT:
            raise self._bad("it is an HDF5 file of another program, or none of trajectories")
        schema = self.file.attrs.get("schema")
        if not isinstance(schema, np.integer) or not 1 <= schema <= SCHEMA:
            raise self._bad(f"trajectory schema {schema!r}; this version reads up to {SCHEMA}")
        self.settings = self.file.attrs.get("settings")
        if not isinstance(self.settings, str) or not isinstance(json.loads(self.settings), dict):
            raise self._bad("its settings are no JSON object")
        self._table = self._read("index/trajectories")
        kinds: Mapping[str, Any] = self._table.dtype.fields or {}
        widths = [kinds[name][0].itemsize for name in ("key", "strategy", "kind", "dropped") if name in kinds]
        if len(widths) != 4 or self._table.dtype != _row(widths) or self._table.ndim != 1:
            raise self._bad(f"index/trajectories is {self._table.dtype}")
        self._images, self._ends = self._read("index/images"), self._read("records/ends")
        if self._images.dtype != _IMAGE or self._ends.dtype != np.dtype("<i8"):
            raise self._bad(f"its tables are {self._images.dtype} and {self._ends.dtype}")
        self._data = self._dataset("records/data")
        if self._data.dtype != np.uint8 or self._data.ndim != 1 or self._data.chunks != (CHUNK,):
            raise self._bad(f"records/data is {self._data.shape} {self._data.dtype} in chunks {self._data.chunks}")
        steps = np.diff(self._ends, prepend=0)
        if self._ends.shape != self._table.shape or (steps < 0).any() or (steps > MAX_RECORD).any():
            raise self._bad("records/ends does not fit the index, or a record is larger than is read")
        if len(self._ends) and self._ends[-1] != len(self._data):
            raise self._bad("records/data is of another length than records/ends says")
        images = self._table["image"]
        if len(images) and not (images.min() >= 0 and images.max() < len(self._images)):
            raise self._bad("a row of its index points at no image")
        self.heads = tuple(
            Head(key.decode(), strategy.decode(), kind.decode(), dropped.decode(), turns)
            for key, strategy, kind, dropped, turns, _ in self._table.tolist()
        )

    def _read(self, name: str) -> np.ndarray:
        data = self._dataset(name)
        if data.ndim != 1 or data.size * data.dtype.itemsize > MAX_INDEX_BYTES:
            raise self._bad(f"{name} is {data.shape} {data.dtype}; more than is read")
        return np.asarray(data[()])

    def _dataset(self, name: str) -> h5py.Dataset:
        """An array of this very file, packed in a way that h5py itself unpacks."""
        import h5py

        data: Any = self.file
        for part in name.split("/"):
            if not isinstance(data, h5py.Group) or not isinstance(data.get(part, getlink=True), h5py.HardLink):
                raise self._bad(f"it has no {name} of its own")
            data = data[part]
        if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
            raise self._bad(f"{name} is not an array of its own")
        creation = data.id.get_create_plist()
        if any(creation.get_filter(i)[0] not in FILTERS for i in range(creation.get_nfilters())):
            raise self._bad(f"{name} is packed in a way this version does not unpack")
        return data

    def _size(self, image: int) -> tuple[int, int, int]:
        height, width, channels = (int(n) for n in self._images["shape"][image])
        if min(height, width) < 1 or height * width > MAX_PIXELS or channels not in (1, 3):
            raise self._bad(f"image {image} is {height}x{width}x{channels}; more than is read")
        return height, width, channels

    def _bad(self, what: str) -> BadDataError:
        return BadDataError(f"{self.path}: {what}; wanted a file of `medseg-gym trajectories`")


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
