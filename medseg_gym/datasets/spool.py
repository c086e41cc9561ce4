"""What importing gives, kept on the disk block by block until the store is written, so that a killed run goes on.

A block is a file of records, whole or not there: each a JSON head, a body and a checksum over both. Blocks hold what a
stretch of the plan gave, in plan order, so a store written from them has the same bytes however often work stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medseg_gym.datasets.importers import RawCase, Skipped
from medseg_gym.datasets.store_writer import stored_form
from medseg_gym.errors import BadDataError
from medseg_gym.types import Mask

_HEAD = struct.Struct("<II Q")  # checksum, length of the head, length of the body
_END = {"kind": "end"}
ITEM_DONE = None  # stands between the records of two items


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """One image, checked, with its masks."""

    file: str
    image: np.ndarray  # (H, W, 1) or (H, W, 3) uint8
    masks: Mapping[str, Mask]
    patient: str
    name: str
    instructions: Mapping[str, str]
    split: str | None
    spacing_mm: tuple[float, float] | None


def check(raw: RawCase) -> Iterator[Ready | Skipped]:
    """A raw image with those of its masks that are sound; what is not is told first."""
    try:
        image = stored_form(raw.file, raw.image)
    except BadDataError as error:
        yield Skipped(raw.file, str(error).removeprefix(f"{raw.file}: "))
        return
    size = image.shape[:2]
    masks = {}
    for structure, mask in raw.masks.items():
        if mask.shape != size:
            (mh, mw), (h, w) = mask.shape, size
            yield Skipped(raw.file, f"mask of {structure!r} is {mh}x{mw}, the image {h}x{w} (height x width)")
        elif not mask.any() and structure not in raw.absent:
            yield Skipped(raw.file, f"mask of {structure!r} has no foreground", damaged=False)
        else:
            masks[structure] = np.ascontiguousarray(mask, np.bool_)
    if masks:
        phrases = {s: raw.instructions[s] for s in masks if raw.instructions.get(s)}
        yield Ready(raw.file, image, masks, raw.patient, raw.name, phrases, raw.split, raw.spacing_mm)


class Spool:
    """The folder of blocks beside a store that is being prepared; one a store, plan and state of the source."""

    def __init__(self, store: Path, identity: str) -> None:
        self.folder = store.with_name(f".{store.name}.{identity[:16]}.blocks")
        for other in store.parent.glob(f".{store.name}.*.blocks"):
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)

    def path(self, block: int) -> Path:
        return self.folder / f"{block:06}.block"

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def identity(source: Path, plan: Sequence[Any], settings: object) -> str:
    """sha256 over settings, plan, and every file's name, size and time: blocks of another state are never used."""
    digest = hashlib.sha256(repr(settings).encode())
    for item in plan:
        digest.update(repr(item).encode())
    for folder, folders, files in os.walk(source):
        folders.sort()
        for name in sorted(files):
            try:
                state = os.stat(os.path.join(folder, name))
            except OSError:
                continue  # a broken link; whoever reads it reports it
            digest.update(f"{folder}\0{name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def write_block(path: Path, results: Iterable[Ready | Skipped | None]) -> None:
    """Writes a block under another name and renames it; `ITEM_DONE` closes each item."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.{os.getpid()}")
    with temp.open("wb") as file:
        for result in results:
            if result is ITEM_DONE:
                _put(file, {"kind": "item"})
            elif isinstance(result, Skipped):
                head = {"kind": "skipped", "file": result.file, "reason": result.reason, "damaged": result.damaged}
                _put(file, head)
            else:
                _put_case(file, result)
        _put(file, _END)
    os.replace(temp, path)


def read_block(path: Path) -> Iterator[Ready | Skipped | None]:
    """The records of a block, one in memory at a time."""
    with path.open("rb") as file:
        while True:
            head, body = _get(file)
            kind = head.pop("kind")
            if kind == "end":
                return
            if kind == "item":
                yield ITEM_DONE
            elif kind == "skipped":
                yield Skipped(**head)
            else:
                yield _case(head, body)


def is_sound(path: Path) -> bool:
    """Whether a block is there and whole, checksums included."""
    try:
        with path.open("rb") as file:
            while _get(file)[0] != _END:
                pass
    except (OSError, ValueError, struct.error):
        return False
    return True


def _put_case(file: BinaryIO, case: Ready) -> None:
    packed = [np.packbits(mask, axis=1).tobytes() for mask in case.masks.values()]
    small = [zlib.compress(bits, 1) for bits in packed]
    head = {
        "kind": "case",
        "file": case.file,
        "shape": case.image.shape,
        "masks": [[structure, len(bits)] for structure, bits in zip(case.masks, small, strict=True)],
        "patient": case.patient,
        "name": case.name,
        "instructions": dict(case.instructions),
        "split": case.split,
        "spacing_mm": case.spacing_mm,
    }
    _put(file, head, b"".join([np.ascontiguousarray(case.image).tobytes(), *small]))


def _case(head: dict[str, Any], body: bytes) -> Ready:
    height, width, channels = head.pop("shape")
    image = np.frombuffer(body, np.uint8, height * width * channels).reshape(height, width, channels)
    at, masks = image.size, {}
    for structure, length in head.pop("masks"):
        bits = np.frombuffer(zlib.decompress(body[at : at + length]), np.uint8).reshape(height, -1)
        masks[structure] = np.unpackbits(bits, axis=1, count=width).view(np.bool_)
        at += length
    spacing = head.pop("spacing_mm")
    return Ready(image=image, masks=masks, spacing_mm=None if spacing is None else tuple(spacing), **head)


def _put(file: BinaryIO, head: Mapping[str, Any], body: bytes = b"") -> None:
    text = json.dumps(head).encode()
    file.write(_HEAD.pack(zlib.crc32(body, zlib.crc32(text)), len(text), len(body)))
    file.write(text)
    file.write(body)


def _get(file: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """One record; ValueError or struct.error where the file is cut short or altered."""
    checksum, head_length, body_length = _HEAD.unpack(file.read(_HEAD.size))
    left = os.fstat(file.fileno()).st_size - file.tell()
    if head_length + body_length > left:
        raise ValueError("cut short")
    text, body = file.read(head_length), file.read(body_length)
    if zlib.crc32(body, zlib.crc32(text)) != checksum:
        raise ValueError("altered")
    return json.loads(text), body
