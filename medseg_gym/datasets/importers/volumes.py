"""Volumes to slices: the display convention, which slices and masks are kept, and how a slice is named.

A volume is an (X, Y, Z) array in RAS order: the three indices grow to the patient's right, front and head. Slices are
shown as radiologists hang them:
axial      front on top, the patient's right on the image's left
coronal    head on top, the patient's right on the image's left
sagittal   head on top, front on the image's left
Slices are numbered from 0 along the volume's axis: from the feet, from the back, from the patient's left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from medseg_gym.datasets.importers import RawCase, Skipped
from medseg_gym.datasets.importers.intensities import WINDOW_HELP, Window, bounds, parse_window, to_bytes
from medseg_gym.datasets.importers.labels import Part, mask_of
from medseg_gym.errors import MedSegError, unknown
from medseg_gym.types import Mask

MAX_VOXELS = 2**29  # 512 x 512 x 2048
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
CUT_OPTIONS = {
    "axis": "axial (default), coronal, sagittal, or acquired: across the coarsest spacing",
    "window": WINDOW_HELP,
    "min-area": "pixels a structure must have in a slice, 1 by default; smaller ones are left out and counted",
    "empty": "drop (default): a structure is taken only from slices it is in; keep: its empty slices are cases too",
    "every": "take every Nth slice only, counted from slice 0",
}


@dataclass(frozen=True, slots=True)
class Cut:
    """How volumes are cut; small and picklable, one for a whole dataset."""

    window: Window
    axis: str = "axial"
    min_area: int = 1
    empty: bool = False
    every: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A grid of voxels in RAS order."""

    data: np.ndarray  # (X, Y, Z)
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray  # (4, 4), voxel to RAS millimetres


def parse_cut(options: Mapping[str, str], default: Window) -> Cut:
    """The cut of an importer's options."""
    axis = options.get("axis", "axial")
    if axis not in (*AXES, "acquired"):
        raise unknown("axis", axis, [*AXES, "acquired"])
    empty = options.get("empty", "drop")
    if empty not in ("drop", "keep"):
        raise unknown("value of empty:", empty, ("drop", "keep"))
    window = parse_window(options["window"]) if "window" in options else default
    return Cut(window, axis, number(options, "min-area", 1), empty == "keep", number(options, "every", 1))


def number(options: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    """A whole number of the options."""
    text = options.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise MedSegError(f"option {name}={text!r}; wanted a whole number from {least} up")
    return int(text)


def in_ras(data: np.ndarray, affine: np.ndarray) -> Volume:
    """The volume of an array in any order, its axes swapped and turned to lie nearest to right, front and head.

    `affine` takes the array's indices to RAS millimetres. An oblique grid keeps its obliqueness; nothing is resampled.
    """
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    aligned = np.abs(affine[:3, :3] / lengths)
    order = max(permutations(range(3)), key=lambda axes: round(sum(aligned[i, a] for i, a in enumerate(axes)), 6))
    data = data.transpose(order)
    out = affine[:, [*order, 3]].astype(np.float64)
    for axis in range(3):
        if out[axis, axis] < 0:
            data = np.flip(data, axis)
            out[:3, 3] += out[:3, axis] * (data.shape[axis] - 1)
            out[:3, axis] *= -1
    x, y, z = (float(lengths[a]) for a in order)
    return Volume(data, (x, y, z), out)


def shown(data: np.ndarray, axis: str, index: int) -> np.ndarray:
    """(rows, columns) of one slice of an RAS array in the display convention above; a view, nothing is copied."""
    plane = np.moveaxis(data, AXES[axis], 0)[index]
    return plane[::-1, ::-1].T


def slices(
    file: str,
    volume: Volume,
    labels: Sequence[tuple[Part, np.ndarray]],
    cut: Cut,
    *,
    patient: str,
    prefix: str = "",
    instructions: Mapping[str, str] | None = None,
    split: str | None = None,
) -> Iterator[RawCase | Skipped]:
    """The slices of a volume with the masks of their structures; what is too small is reported once a structure.

    A slice without any structure is no case, unless the cut keeps empty ones: then every structure is a case in every
    slice, with an empty mask where it is not. A structure below `min_area` is in no case of its slice.
    """
    axis = cut.axis
    if axis == "acquired":  # of equal spacings the axial one
        axis = max(("axial", "coronal", "sagittal"), key=lambda a: round(volume.spacing_mm[AXES[a]], 3))
    sides = [volume.spacing_mm[a] for a in range(3) if a != AXES[axis]]
    low, high = bounds(volume.data, cut.window)
    small = dict.fromkeys((part.structure for part, _ in labels), 0)
    found = False
    for index in range(0, volume.data.shape[AXES[axis]], cut.every):
        masks: dict[str, Mask] = {}
        absent = set()
        for part, values in labels:
            mask = mask_of(shown(values, axis, index), part)
            area = int(mask.sum())
            if area == 0:
                if cut.empty:
                    masks[part.structure] = mask
                    absent.add(part.structure)
            elif area < cut.min_area:
                small[part.structure] += 1
            else:
                masks[part.structure] = mask
                found = True
        if masks:
            yield RawCase(
                file,
                to_bytes(shown(volume.data, axis, index), low, high),
                masks,
                patient,
                f"{prefix}slice-{index:03}",
                instructions or {},
                split,
                (float(sides[1]), float(sides[0])),  # rows, columns
                frozenset(absent),
            )
    for structure, count in small.items():
        if count:
            yield Skipped(
                file, f"{structure!r} is smaller than {cut.min_area} pixels in {count} of its slices", damaged=False
            )
    if not (found or cut.empty or any(small.values())):
        yield Skipped(file, "no structure has foreground in any slice", damaged=False)
