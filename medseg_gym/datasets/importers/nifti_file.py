"""Reads NIfTI volumes into RAS order, whatever order they are stored in, with limits and without surprises."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.datasets.importers.labels import whole_numbers
from medseg_gym.datasets.importers.volumes import MAX_VOXELS, Volume, in_ras
from medseg_gym.errors import BadDataError, MedSegError

SUFFIXES = (".nii.gz", ".nii")


def need_nibabel() -> Any:
    """The nibabel module; an error that names the extra where it is not installed."""
    try:
        import nibabel
    except ImportError:
        raise MedSegError("reading NIfTI needs nibabel: pip install 'medseg-gym[medical]'") from None
    return nibabel


def stem(file: str) -> str:
    """A volume's file name without folder and .nii.gz."""
    name = file.rsplit("/", 1)[-1]
    return next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), name)


def read_nifti(path: Path, channel: int | None = None, affine_of: Path | None = None) -> Volume:
    """The volume in RAS order, nearest to its affine (an oblique grid keeps its obliqueness); 2D counts as one slice.

    A volume without orientation (both codes 0) is taken as NIfTI readers take it, LAS; a 2D file without one is a
    picture, shown as it is stored. Of a 4D file `channel` is read; without one it is refused. `affine_of` names the
    file whose affine is to be believed.
    """
    nibabel = need_nibabel()
    if not path.name.endswith(SUFFIXES):
        raise BadDataError(f"{path}: not a .nii or .nii.gz file")
    if not path.is_file():
        raise BadDataError(f"{path}: no such file")
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise BadDataError(f"{path}: holds a {type(image).__name__}; wanted NIfTI")
        data = _data(path, image, channel)
        affine = _affine(image if affine_of is None else nibabel.load(affine_of))
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise BadDataError(f"{path}: its affine gives the voxels no volume")
    except BadDataError:
        raise
    except (
        nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
        OSError,
        EOFError,
        ValueError,
        TypeError,
        OverflowError,
        zlib.error,
        MemoryError,
    ) as error:
        what = " ".join(str(error).replace(str(path), path.name).split())
        raise BadDataError(f"{path}: not a readable NIfTI volume ({what})") from None
    return in_ras(data, affine)


def _affine(image: Any) -> np.ndarray:
    """(4, 4) from stored indices to RAS millimetres."""
    header = image.header
    if len(image.shape) == 2 and not header["sform_code"] and not header["qform_code"]:
        x, y = (float(n) for n in header.get_zooms()[:2])
        return np.diag([-x, -y, 1.0, 1.0])  # columns run to the left, rows to the back: as in any picture
    return np.asarray(image.affine, np.float64)


def _data(path: Path, image: Any, channel: int | None) -> np.ndarray:
    """The (X, Y, Z) voxels as stored: integers stay integers, scaled ones become float32."""
    shape = tuple(int(n) for n in image.shape)
    dtype = image.get_data_dtype()
    if dtype.kind not in "biuf":
        raise BadDataError(f"{path}: holds voxels of {dtype}; wanted plain numbers")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not 2 <= len(shape) <= 4 or math.prod(shape[:3]) == 0:
        raise BadDataError(f"{path}: its shape is {shape}; wanted a volume (X, Y, Z)")
    if math.prod(shape) > MAX_VOXELS * (4 if len(shape) == 4 else 1):
        raise BadDataError(f"{path}: {shape} are more voxels than the limit of {MAX_VOXELS}")
    whole = image.dataobj
    if not path.name.endswith(".gz") and path.stat().st_size < whole.offset + math.prod(shape) * dtype.itemsize:
        raise BadDataError(f"{path}: the file is shorter than its header says")
    if len(shape) == 4:
        if channel is None:
            raise BadDataError(f"{path}: 4D, {shape}; say which of its volumes with --option channel=0 and up")
        if channel >= shape[3]:
            raise BadDataError(f"{path}: 4D with {shape[3]} volumes; there is no channel {channel}")
        data = np.asarray(whole[(*[slice(None)] * 3, channel, *[0] * (len(image.shape) - 4))])
        return data.astype(np.float32) if data.dtype == np.float64 else data
    plain = whole.slope == 1 and whole.inter == 0
    data = whole.get_unscaled() if plain else np.asarray(whole, np.float32)
    if data.dtype.kind == "f":
        data = data.astype(np.float32, copy=False)
    return data.reshape((*shape, 1, 1)[:3])


def read_labels(path: Path, image: Volume, image_path: Path | None = None, channel: int | None = None) -> np.ndarray:
    """The whole-number labels of a volume on the grid of its image; BadDataError where they do not lie on it.

    A corner may be off by one voxel. With `image_path` the label's own affine is not looked at, the image's counts.
    """
    labels = read_nifti(path, channel, image_path)
    if labels.data.shape != image.data.shape:
        order = "left-right, back-front, feet-head"
        raise BadDataError(f"{path}: label is {_by(labels.data)}, the image {_by(image.data)} ({order})")
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float64)
    corners[:, :3] *= np.array(image.data.shape) - 1
    off = float(np.linalg.norm((corners @ (labels.affine - image.affine).T)[:, :3], axis=1).max())
    if off > max(image.spacing_mm):
        raise BadDataError(
            f"{path}: label lies up to {off:.1f} mm off its image; if only its affine is wrong: --option affine=image"
        )
    values = whole_numbers(labels.data)
    if values is None:
        raise BadDataError(f"{path}: label values are not whole numbers")
    return values


def _by(data: np.ndarray) -> str:
    return "x".join(str(n) for n in data.shape)
