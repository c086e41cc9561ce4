"""Writes a prepared dataset under a temporary name and renames it into place: whole, or not there at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from medseg_gym.datasets.base import SPLITS, check_split
from medseg_gym.datasets.schema import (
    CASE,
    FORMAT,
    SCHEMA,
    content_checksum,
    image_group,
    image_record,
    mask_group,
    patient_record,
    record_digest,
    slug,
)
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.images import MAX_PIXELS
from medseg_gym.types import Mask

if TYPE_CHECKING:
    import h5py

STALE_SECONDS = 24 * 3600
# Not LZF: its encoder starts from memory as it finds it, so that equal images may be packed into unequal bytes. gzip
# packs a CT slice 26 % smaller and reads 0.1 ms slower.
PACKING = {"compression": "gzip", "compression_opts": 1, "fletcher32": True}

_active: set[Path] = set()  # temporary files that writers of this process hold


class StoreWriter:
    """A context manager: `add` images, then leave the block to publish the file, or by an exception to discard it."""

    def __init__(
        self, path: str | os.PathLike[str], name: str, *, structures: Sequence[str] = (), layout: str = ""
    ) -> None:
        self.path = Path(path)
        self.name = name
        self.checksum = ""
        self._order = tuple(structures)  # those that occur keep this order; others follow, sorted
        self._layout = layout
        self._temp = self.path.with_name(f".{self.path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.part")
        self._file: h5py.File | None = None
        self._patients: dict[str, str] = {}
        self._images: dict[tuple[str, str], dict[str, Any]] = {}
        self._rows: dict[str, int] = {}

    def __enter__(self) -> Self:
        import h5py

        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _active.add(self._temp)
            self._file = h5py.File(self._temp, "x", rdcc_nbytes=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temp not in _active:
            return
        if kind is not None:
            self.discard()
            return
        try:
            self.finish()
            self.publish()
        except BaseException:
            self.discard()
            raise

    def add(
        self,
        image: np.ndarray,
        masks: Mapping[str, Mask],
        *,
        patient: str,
        name: str,
        split: str,
        instructions: Mapping[str, str],
        spacing_mm: tuple[float, float] | None = None,
    ) -> None:
        """One image, (H, W), (H, W, 1) or (H, W, 3) uint8, with its masks; equal channels are stored once."""
        where = f"{self.name}/{patient}/{name}"
        pixels = stored_form(where, image)
        height, width, channels = pixels.shape
        check_split(split)
        _check_part(where, patient)
        _check_part(where, name)
        if not masks:
            raise BadDataError(f"{where}: no masks")
        if (patient, name) in self._images:
            raise BadDataError(f"{where}: this image is already in the file; names must be unique within a patient")
        if self._patients.get(patient, split) != split:
            raise BadDataError(f"{where}: patient {patient!r} is already in {self._patients[patient]!r}, now {split!r}")
        slugs = {slug(structure) for structure in masks}
        if len(slugs) != len(masks) or "" in slugs:
            raise BadDataError(f"{where}: structures {sorted(masks)} give the same key twice, or an empty one")
        cases = []
        for structure, mask in sorted(masks.items()):
            if mask.shape != (height, width) or mask.dtype != np.bool_:
                was = f"{mask.shape} {mask.dtype}"
                raise BadDataError(f"{where}: mask of {structure!r} is {was}; wanted {(height, width)} bool")
            for text in (structure, instructions[structure]):
                if not text.isprintable() or not 0 < len(text) <= 1000:
                    raise BadDataError(f"{where}: {text!r} is no name or phrase; wanted 1 to 1000 printable characters")
            cases.append((structure, instructions[structure], np.packbits(mask, axis=1), int(mask.sum())))
        spacing = (float("nan"), float("nan")) if spacing_mm is None else spacing_mm
        with self._writing():
            row = self._append(image_group(height, width, channels), pixels)
            rows = [self._append(mask_group(height, width), packed) for _, _, packed, _ in cases]
        self._patients[patient] = split
        self._images[patient, name] = {
            "shape": pixels.shape,
            "row": row,
            "spacing": spacing,
            "digest": record_digest(patient, name, spacing, pixels, [case[:3] for case in cases]),
            "cases": [(s, text, r, area) for (s, text, _, area), r in zip(cases, rows, strict=True)],
        }

    @property
    def empty(self) -> bool:
        """Whether no image has been added yet."""
        return not self._images

    def _append(self, group: str, pixels: np.ndarray) -> int:
        assert self._file is not None
        row = self._rows.get(group, 0)
        if row == 0:
            one = pixels.shape
            self._file.create_dataset(group, (0, *one), np.uint8, chunks=(1, *one), maxshape=(None, *one), **PACKING)
        data = self._file[group]
        data.resize(row + 1, axis=0)
        data[row] = pixels
        self._rows[group] = row + 1
        return row

    def finish(self) -> str:
        """Writes the index, closes the temporary file and flushes it to the disk; the content's checksum."""
        if self._file is None:
            return self.checksum
        if not self._images:
            raise BadDataError(f"{self.name}: no case to write; nothing was written")
        images = sorted(self._images.items(), key=lambda entry: f"{entry[0][0]}/{entry[0][1]}/")
        occurring = {case[0] for _, image in images for case in image["cases"]}
        structures = [s for s in self._order if s in occurring] + sorted(occurring - set(self._order))
        instructions = sorted({case[1] for _, image in images for case in image["cases"]})
        patients = sorted(self._patients.items())
        self.checksum = content_checksum(self.name, structures, patients, (i["digest"] for _, i in images))
        with self._writing():
            file = self._file
            index = file.create_group("index")
            index["structures"] = _texts(structures)
            index["instructions"] = _texts(instructions)
            index["patients"] = _patient_table(patients)
            index["images"] = _image_table(images, _numbered(patient for patient, _ in patients))
            index["cases"] = _case_table(images, _numbered(structures), _numbered(instructions))
            file.attrs.update(
                {"format": FORMAT, "schema": SCHEMA, "writer": _writer(), "name": self.name, "layout": self._layout}
            )
            file.attrs["checksum"] = self.checksum
            self._file = None
            file.close()
            _flush(self._temp)
        return self.checksum

    def publish(self) -> None:
        """Gives the finished file its name; whatever had that name is replaced at once."""
        with self._writing():
            os.replace(self._temp, self.path)
            _active.discard(self._temp)
        with suppress(OSError):  # the file is in place; some network drives cannot flush a folder
            _flush(self.path.parent)

    def discard(self) -> None:
        """Removes the temporary file."""
        file, self._file = self._file, None
        with suppress(Exception):  # on a full disk closing fails as well; the file goes all the same
            if file is not None:
                file.close()
        with suppress(OSError):
            self._temp.unlink(missing_ok=True)
        _active.discard(self._temp)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a failure to write into an error for people, and leaves no half file behind."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.discard()
            code = getattr(error, "errno", None)
            what = os.strerror(code) if code else str(error)
            raise MedSegError(
                f"cannot write {self.path}: {what}. Nothing was left behind; make room or permit writing there, or set "
                "MEDSEG_GYM_HOME to another folder, and run the command again."
            ) from error


def remove_stale(path: Path) -> list[Path]:
    """Removes temporary files that killed writers of `path` left behind; those of running ones stay."""
    gone = []
    for temp in sorted(path.parent.glob(f".{path.name}.*.part")):
        try:
            host, pid = temp.name.removeprefix(f".{path.name}.").split(".")[:2]
            old = time.time() - temp.stat().st_mtime > STALE_SECONDS
            if temp not in _active and (old or (host == _host() and not _alive(int(pid)))):
                temp.unlink()
                gone.append(temp)
        except (OSError, ValueError):
            continue  # another process was faster, or the name is not ours
    return gone


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # ours are in _active; this one is of an earlier process with our number
    if os.name == "nt":
        return True  # there os.kill would end it; age decides
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _writer() -> str:
    from medseg_gym import __version__

    return f"medseg-gym {__version__}"


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _patient_table(patients: Sequence[tuple[str, str]]) -> np.ndarray:
    rows = [(patient.encode(), SPLITS.index(split)) for patient, split in patients]
    return np.array(rows, patient_record(max(len(row[0]) for row in rows)))


def _image_table(images: Sequence[tuple[tuple[str, str], dict[str, Any]]], patients: Mapping[str, int]) -> np.ndarray:
    names = [name.encode() for (_, name), _ in images]
    table = np.zeros(len(images), image_record(max(map(len, names))))
    table["name"] = names
    table["patient"] = [patients[patient] for (patient, _), _ in images]
    for column in ("shape", "row", "spacing"):
        table[column] = [image[column] for _, image in images]
    table["digest"] = np.frombuffer(b"".join(image["digest"] for _, image in images), np.uint8).reshape(-1, 32)
    return table


def _case_table(
    images: Sequence[tuple[tuple[str, str], dict[str, Any]]],
    structures: Mapping[str, int],
    instructions: Mapping[str, int],
) -> np.ndarray:
    """Cases in the order of their keys: images are sorted already, an image's cases sort by their slug."""
    rows = [
        (number, structures[structure], instructions[text], row, area)
        for number, (_, image) in enumerate(images)
        for structure, text, row, area in sorted(image["cases"], key=lambda case: slug(case[0]))
    ]
    return np.array(rows, CASE)


def _texts(texts: Sequence[str]) -> np.ndarray:
    encoded = [text.encode() for text in texts]
    return np.array(encoded, f"S{max(1, *map(len, encoded))}")


def _check_part(where: str, part: str) -> None:
    """A patient or image name is one part of a key."""
    if not part or "/" in part or not part.isprintable() or len(part) > 200:
        raise BadDataError(f"{where}: {part!r} cannot be in a key; wanted up to 200 printable characters without '/'")


def stored_form(where: str, image: np.ndarray) -> np.ndarray:
    """(H, W, 1) where all channels are equal, else (H, W, 3)."""
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.dtype != np.uint8 or 0 in image.shape:
        raise BadDataError(f"{where}: image is {image.shape} {image.dtype}; wanted (H, W, 3) or (H, W) uint8")
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise BadDataError(f"{where}: image is {image.shape}; the limit is {MAX_PIXELS} pixels")
    grey = image.shape[2] == 3 and (image[..., :1] == image[..., 1:]).all()
    return image[..., :1] if grey else image
