"""Reads the arrays of an `.npz` file without unpickling anything, and only as many bytes as its user allows."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medseg_gym.errors import BadDataError


def read_arrays(
    path: Path, names: Sequence[str], limit: int, axes: int, optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The named arrays, of up to `axes` axes; refused when they unpack to more than `limit` bytes together.

    What else is in the file is not looked at; `optional` arrays may be missing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            missing = [name for name in names if f"{name}.npy" not in members]
            if missing:
                raise BadDataError(f"{path}: no {', '.join(missing)} in it; wanted the arrays {', '.join(names)}")
            wanted = [*names, *(name for name in optional if f"{name}.npy" in members)]
            total = sum(members[f"{name}.npy"].file_size for name in wanted)
            if total > limit:
                raise BadDataError(f"{path}: unpacks to {total} bytes; the limit is {limit}")
            return {name: _array(path, archive.read(members[f"{name}.npy"]), axes) for name in wanted}
    except FileNotFoundError:
        raise BadDataError(f"{path}: no such file") from None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise BadDataError(f"{path}: not a readable .npz ({error})") from None


def _array(path: Path, content: bytes, axes: int) -> np.ndarray:
    """One `.npy`; its header is checked against the bytes there are before anything of its size is made."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    except (ValueError, SyntaxError, TypeError) as error:
        raise BadDataError(f"{path}: not a readable array ({error})") from None
    count = math.prod(shape)
    if dtype.kind not in "biufSU" or dtype.itemsize == 0 or len(shape) > axes:
        raise BadDataError(f"{path}: holds an array of {dtype} with {len(shape)} axes; wanted plain numbers")
    if count * dtype.itemsize != len(content) - stream.tell():
        raise BadDataError(f"{path}: an array's header does not fit its bytes")
    array = np.frombuffer(content, dtype, count, stream.tell())
    return array.reshape(shape, order="F" if fortran else "C")
