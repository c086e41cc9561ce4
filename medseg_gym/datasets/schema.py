"""The form of a prepared dataset's file: versions, record types, group names, key parts and content digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

FORMAT = "medseg-gym dataset"
SCHEMA = 1
MAX_INDEX_BYTES = 2**31
FILTERS = frozenset({1, 2, 3, 32000})  # deflate, shuffle, Fletcher's checksum, LZF: all built into h5py

CASE = np.dtype([("image", "<i4"), ("structure", "<i4"), ("instruction", "<i4"), ("row", "<i4"), ("area", "<i4")])


def image_record(width: int) -> np.dtype:
    """A row of the index of images; names take up to `width` bytes, spacing is nan where unknown."""
    return np.dtype([
        ("name", f"S{width}"), ("patient", "<i4"), ("shape", "<i4", (3,)), ("row", "<i4"), ("spacing", "<f8", (2,)),
        ("digest", "u1", (32,)),
    ])  # fmt: skip


def patient_record(width: int) -> np.dtype:
    """A row of the index of patients. The split stands here and nowhere else, so no patient can be in two."""
    return np.dtype([("name", f"S{width}"), ("split", "u1")])


def image_group(height: int, width: int, channels: int) -> str:
    return f"images/{height}x{width}x{channels}"


def mask_group(height: int, width: int) -> str:
    return f"masks/{height}x{width}"


def slug(text: str) -> str:
    """A structure's part of a key: "right kidney" -> "right-kidney"."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def record_digest(
    patient: str,
    name: str,
    spacing: Iterable[float],
    pixels: np.ndarray,
    cases: Iterable[tuple[str, str, np.ndarray]],
) -> bytes:
    """sha256 over an image's stored pixels and its cases: structure, instruction, packed mask."""
    digest = hashlib.sha256(repr((patient, name, pixels.shape, [float(x) for x in spacing])).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    for structure, instruction, packed in sorted(cases, key=lambda case: case[0]):
        digest.update(repr((structure, instruction, packed.shape)).encode())
        digest.update(np.ascontiguousarray(packed).data)
    return digest.digest()


def content_checksum(
    name: str, structures: Sequence[str], patients: Iterable[tuple[str, str]], digests: Iterable[bytes]
) -> str:
    """sha256 over everything a reader can see, as hex; digests in the order of the index of images."""
    digest = hashlib.sha256(repr((SCHEMA, name, list(structures), list(patients))).encode())
    for part in digests:
        digest.update(part)
    return digest.hexdigest()
