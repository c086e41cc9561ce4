"""Reads image files of 1 to 32 bits as pictures, label values or colours, within limits."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.datasets.importers.intensities import Window, bounds, to_bytes
from medseg_gym.errors import BadDataError
from medseg_gym.images import MAX_PIXELS
from medseg_gym.types import Mask

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF")
WINDOW_HELP = (
    "for images of more than 8 bits: LOW:HIGH, full (minimum to maximum) or percentile (0.5 to 99.5 of what is not 0; "
    "the default)"
)
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of more than 8 bits


def read_picture(path: Path, window: Window = "percentile") -> np.ndarray:
    """(H, W) or (H, W, 3) uint8; grey of more bits goes through the window, colour of 16 bits keeps its high byte."""
    image = open_picture(path)
    if image.mode in DEEP:
        values = np.asarray(image)
        return to_bytes(values, *bounds(values, window))
    return np.asarray(image if image.mode == "L" else image.convert("RGB"))


def read_foreground(path: Path, threshold: int | None = None) -> Mask:
    """(H, W): where any channel reaches the threshold: 1 unless given, and 128 in JPEG files, which ring."""
    image = open_picture(path)
    if threshold is None:
        threshold = 128 if image.format in ("JPEG", "MPO") else 1
    values = np.asarray(image if image.mode in (*DEEP, "L") else image.convert("RGB"))
    mask: Mask = values >= threshold if values.ndim == 2 else values.max(axis=2) >= threshold
    return mask


def read_values(path: Path) -> np.ndarray:
    """(H, W) whole numbers: grey values, or indices of a palette; colours are refused."""
    image = open_picture(path)
    if image.mode in ("L", "P", *DEEP) and image.mode != "F":
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    colours = np.asarray(image.convert("RGB"))
    if image.mode == "F" or (colours != colours[..., :1]).any():
        raise BadDataError(f"{path}: holds colours or fractions; wanted label values, or name its colours: blue=NAME")
    return colours[..., 0]


def read_colours(path: Path) -> np.ndarray:
    """(H, W, 3) uint8; transparency does not count."""
    return np.asarray(open_picture(path).convert("RGB"))


def open_picture(path: Path) -> Any:
    """A loaded Pillow image of one page; BadDataError names the file."""
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    pil.init()  # formats that are asked for by name are not loaded by themselves
    try:
        try:
            image = pil.open(path, formats=FORMATS)
        except UnidentifiedImageError:
            image = pil.open(io.BytesIO(_mended_tiff(path)), formats=("TIFF",))
        if image.width * image.height > MAX_PIXELS:
            raise BadDataError(f"{path}: {image.width}x{image.height} pixels; the limit is {MAX_PIXELS}")
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format != "MPO":
            raise BadDataError(f"{path}: holds {pages} pages; wanted one image")
        image.load()
    except FileNotFoundError:
        raise BadDataError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, struct.error, pil.DecompressionBombError) as error:
        if isinstance(error, BadDataError):
            raise
        raise BadDataError(f"{path}: not a readable image ({str(error).replace(str(path), path.name)})") from None
    return image


def _mended_tiff(path: Path) -> bytes:
    """The file's bytes with "grey" turned to "RGB" where a little-endian TIFF has three samples a pixel.

    CVC-ClinicDB's images say so; Pillow refuses them and OpenCV drops two of the channels.
    """
    if path.stat().st_size > 4 * MAX_PIXELS:
        raise OSError("cannot identify image file")
    content = bytearray(path.read_bytes())
    if content[:4] != b"II*\0":
        raise OSError("cannot identify image file")
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    tags = {struct.unpack_from("<H", content, at)[0]: at for at in range(start + 2, start + 2 + 12 * count, 12)}
    interpretation, samples = tags.get(262), tags.get(277)
    if interpretation is None or samples is None or struct.unpack_from("<H", content, samples + 8)[0] != 3:
        raise OSError("cannot identify image file")
    struct.pack_into("<H", content, interpretation + 8, 2)
    return bytes(content)
