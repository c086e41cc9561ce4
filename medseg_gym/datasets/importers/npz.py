"""MedSAM2's volumes: one `.npz` each with imgs (slices, H, W), gts of the same shape, and spacing (x, y, z)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import RawCase, Skipped, check_options, identify, reason
from medseg_gym.datasets.importers.labels import STRUCTURE_HELP, Part, parts_of, whole_numbers
from medseg_gym.datasets.importers.nifti_pairs import prefix_of, unnamed_values
from medseg_gym.datasets.importers.npz_file import read_arrays
from medseg_gym.datasets.importers.volumes import CUT_OPTIONS, MAX_VOXELS, Cut, Volume, in_ras, parse_cut, slices
from medseg_gym.errors import BadDataError, MedSegError

OPTIONS: dict[str, str] = {"structure": STRUCTURE_HELP, **CUT_OPTIONS}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True, slots=True)
class Item:
    """One volume."""

    root: Path
    file: str
    parts: tuple[Part, ...]
    cut: Cut
    patient: str
    prefix: str
    named: bool


def plan(source: Path, card: DatasetCard, options: Mapping[str, str]) -> tuple[list[Item], list[Skipped]]:
    """One item an `.npz` file below the source."""
    check_options(options, OPTIONS, "npz")
    files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.npz") if path.is_file())
    if not files:
        raise BadDataError(f"{source}: no .npz file in it")
    parts = tuple(parts_of(options.get("structure"), card))
    if not parts:
        raise MedSegError(f"{source}: nothing says what is outlined; add --structure NAME, or 1=NAME,2=NAME")
    cut = parse_cut(options, (0.0, 255.0))
    items = []
    for file in files:
        stem = Path(file).stem
        patient, name = identify(stem, card.patient, otherwise=stem)
        items.append(Item(source, file, parts, cut, patient, prefix_of(name, patient), "structure" in options))
    return items, []


def read(item: Item) -> Iterator[RawCase | Skipped]:
    """The slices of the volume; MedSAM2 stores windowed intensities from 0 to 255, which are taken as they are."""
    try:
        volume, labels = read_volume(item.root / item.file)
    except BadDataError as error:
        yield Skipped(item.file, reason(error, item.root))
        return
    if not item.named and all(part.values for part in item.parts):
        unnamed = unnamed_values(labels, item.parts)
        if unnamed:
            yield Skipped(item.file, unnamed, damaged=False)
    yield from slices(
        item.file,
        volume,
        [(part, labels) for part in item.parts],
        item.cut,
        patient=item.patient,
        prefix=item.prefix,
    )


def read_volume(path: Path) -> tuple[Volume, np.ndarray]:
    """The volume and its labels in RAS order; without a `direction` the slices are taken to be axial, feet first.

    `direction` is ITK's: nine numbers, the columns are the x, y and z axes in LPS. Without spacing 1 mm is taken.
    """
    arrays = read_arrays(path, ("imgs", "gts"), limit=4 * MAX_VOXELS, axes=3, optional=("spacing", "direction"))
    images, labels = arrays["imgs"], arrays["gts"]
    if images.ndim != 3 or images.size == 0 or images.dtype.kind not in "biuf":
        raise BadDataError(f"{path}: imgs is {images.shape} {images.dtype}; wanted numbers (slices, height, width)")
    if labels.shape != images.shape:
        raise BadDataError(f"{path}: gts is {_by(labels)}, imgs {_by(images)} (slices x height x width)")
    values = whole_numbers(labels) if labels.dtype.kind in "biuf" else None
    if values is None:
        raise BadDataError(f"{path}: gts holds {labels.dtype} that are not whole numbers")
    spacing = np.asarray(arrays.get("spacing", np.ones(3)))
    if (
        spacing.shape != (3,)
        or spacing.dtype.kind not in "iuf"
        or not (np.isfinite(spacing).all() and (spacing > 0).all())
    ):
        raise BadDataError(f"{path}: spacing is {spacing.tolist()!r:.60}; wanted three lengths above 0")
    direction = np.asarray(arrays.get("direction", np.eye(3)))
    if direction.size != 9 or direction.dtype.kind not in "iuf" or not np.isfinite(direction).all():
        raise BadDataError(f"{path}: direction is {direction.tolist()!r:.60}; wanted nine numbers")
    axes = LPS_TO_RAS @ direction.reshape(3, 3).astype(np.float64)
    if (np.linalg.norm(axes, axis=0) < 1e-6).any():
        raise BadDataError(f"{path}: direction is {direction.tolist()!r:.60}; wanted three axes")
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    image, label = (in_ras(array.transpose(2, 1, 0), affine) for array in (images, values))
    return image, label.data


def _by(data: np.ndarray) -> str:
    return "x".join(str(n) for n in data.shape)
