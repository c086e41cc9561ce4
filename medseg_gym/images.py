"""An image's identity and its on-disk form: hashing, PNG and JPEG reading with limits."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path

import numpy as np

from medseg_gym.errors import BadDataError
from medseg_gym.types import Image

MAX_PIXELS = 64_000_000  # beyond that a file is more likely a bomb than a radiograph

DEEP_MODES = {"I", "I;16", "I;16L", "I;16B", "I;16N", "F"}  # Pillow clips these to 255 without a word

_known: dict[int, tuple[weakref.ref[np.ndarray], str]] = {}


def image_hash(image: Image) -> str:
    """sha256 over the shape and bytes; remembered per array object while that is read-only and alive."""
    if image.flags.writeable:
        return _digest(image)
    entry = _known.get(id(image))
    if entry is not None and entry[0]() is image:
        return entry[1]
    digest = _digest(image)
    key = id(image)
    _known[key] = (weakref.ref(image, lambda _: _known.pop(key, None)), digest)
    return digest


def _digest(image: Image) -> str:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def read_image(path: Path) -> Image:
    """The (H, W, 3) uint8 RGB of a PNG, JPEG, TIFF or BMP file; BadDataError names the file if it is not one."""
    return np.asarray(_open(path).convert("RGB"))


def read_grey(path: Path) -> np.ndarray:
    """The (H, W) uint8 of an image file, as its one channel or its luminance."""
    return np.asarray(_open(path).convert("L"))


def _open(path: Path):  # type: ignore[no-untyped-def]
    from PIL import Image as pil

    try:
        image = pil.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise BadDataError(f"{path}: {image.width}x{image.height} pixels; the limit is {MAX_PIXELS}")
        if image.mode in DEEP_MODES:
            raise BadDataError(f"{path}: {image.mode} pixels, more than 8 bits a channel; window it to 8 bits first")
        image.load()
    except FileNotFoundError:
        raise BadDataError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        if isinstance(error, BadDataError):
            raise
        raise BadDataError(f"{path}: not a readable image ({error})") from None
    return image
