"""DICOM image series: which files belong together, their grid in space, and their intensities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.datasets.importers.volumes import MAX_VOXELS
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.images import MAX_PIXELS

DEFLATED = "1.2.840.10008.1.2.1.99"  # unpacks without a limit, before anything can be checked
MAX_FILE_BYTES = 2**31


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Where the pixels of a series lie: LPS millimetres, slices sorted along the normal."""

    rows: int
    columns: int
    right: np.ndarray  # (3,) unit vector along a row, the column index grows
    down: np.ndarray  # (3,) unit vector along a column, the row index grows
    spacing: tuple[float, float]  # between rows, between columns
    origins: np.ndarray  # (slices, 3), centre of each slice's first pixel

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.right, self.down)

    @property
    def depths(self) -> np.ndarray:
        """(slices,) along the normal, ascending."""
        return self.origins @ self.normal

    @property
    def gap(self) -> float:
        """The usual distance of neighbouring slices; of a single slice, the coarser pixel spacing."""
        return float(np.median(np.diff(self.depths))) if len(self.origins) > 1 else max(self.spacing)

    @property
    def regular(self) -> bool:
        steps = np.diff(self.depths)
        return len(steps) == 0 or bool(np.abs(steps - self.gap).max() <= 0.1 * self.gap)

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) from (column, row, slice) to RAS millimetres."""
        out = np.eye(4)
        out[:3, 0] = self.right * self.spacing[1]
        out[:3, 1] = self.down * self.spacing[0]
        count = len(self.origins)
        out[:3, 2] = (self.origins[-1] - self.origins[0]) / (count - 1) if count > 1 else self.normal * self.gap
        out[:3, 3] = self.origins[0]
        out[:2] *= -1
        return out

    def slice_at(self, depth: float, reach: float) -> int | None:
        """The slice nearest to a depth, None where none is within `reach` slice gaps."""
        index = int(np.abs(self.depths - depth).argmin())
        return index if abs(self.depths[index] - depth) <= reach * self.gap else None


def need_pydicom() -> Any:
    """The pydicom module; an error that names the extra where it is not installed."""
    try:
        import pydicom
    except ImportError:
        raise MedSegError("reading DICOM needs pydicom: pip install 'medseg-gym[medical]'") from None
    return pydicom


def read_dicom(path: Path, tags: Sequence[str] | None = None, pixels: bool = False) -> Any:
    """A DICOM dataset, only its `tags` where given; BadDataError where the file is none or is packed as a whole."""
    pydicom = need_pydicom()
    with readable(path, "not a readable DICOM file"):
        if not path.is_file():
            raise BadDataError(f"{path}: no such file")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadDataError(f"{path}: {size} bytes; the limit is {MAX_FILE_BYTES}")
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DEFLATED:
            raise BadDataError(f"{path}: deflated as a whole; convert it to explicit little endian first")
        return pydicom.dcmread(path, stop_before_pixels=not pixels, specific_tags=None if tags is None else list(tags))


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turns what pydicom raises on a damaged file, nearly anything and at any access, into BadDataError."""
    try:
        yield
    except MedSegError:
        raise
    except Exception as error:
        text = " ".join(str(error).replace(str(path), path.name).split())[:120] or type(error).__name__
        raise BadDataError(f"{path}: {what} ({text})") from None


def pixels_of(path: Path, dataset: Any) -> np.ndarray:
    """The decoded frames of a dataset; BadDataError where they are too many or cannot be decoded."""
    frames, rows, columns = (int(dataset.get(tag) or 1) for tag in ("NumberOfFrames", "Rows", "Columns"))
    if not 0 < rows * columns <= MAX_PIXELS or not 0 < frames * rows * columns <= MAX_VOXELS:
        raise BadDataError(f"{path}: {frames} frames of {rows}x{columns} are more than is read")
    with readable(path, "its pixels cannot be decoded"):
        return np.asarray(dataset.pixel_array)


def vector(path: Path, dataset: Any, tag: str, length: int) -> np.ndarray:
    """The numbers of a tag."""
    try:
        value = np.array([float(n) for n in dataset[tag].value])
    except (KeyError, TypeError, ValueError):
        value = np.zeros(0)
    if value.shape != (length,) or not np.isfinite(value).all():
        raise BadDataError(f"{path}: {tag} is missing or not {length} numbers")
    return value


def axes(path: Path, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """The unit vectors of ImageOrientationPatient: along a row, along a column."""
    both = vector(path, dataset, "ImageOrientationPatient", 6).reshape(2, 3)
    lengths = np.linalg.norm(both, axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(both[0] @ both[1]) > 0.01:
        raise BadDataError(f"{path}: ImageOrientationPatient is {both.ravel().tolist()}; wanted two unit vectors")
    right, down = both / lengths[:, None]
    return right, down


def spacing_of(path: Path, dataset: Any) -> tuple[float, float]:
    rows, columns = vector(path, dataset, "PixelSpacing", 2)
    if rows <= 0 or columns <= 0:
        raise BadDataError(f"{path}: PixelSpacing is {rows}, {columns}; wanted lengths above 0")
    return float(rows), float(columns)


def read_series(paths: Sequence[Path]) -> tuple[np.ndarray, Grid]:
    """The (columns, rows, slices) intensities of a series, CT in Hounsfield units, and its grid.

    A slice that cannot be read costs the series: a gap would shift no label, but would hide that something is missing.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []  # origin, pixels
    first: tuple[Any, ...] | None = None
    for path in paths:
        with readable(path, "not a readable DICOM file"):
            dataset = read_dicom(path, pixels=True)
            rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
            if len(paths) * rows * columns > MAX_VOXELS:
                raise BadDataError(f"{path}: {len(paths)} slices of {rows}x{columns} are more than is read")
            if int(dataset.get("SamplesPerPixel") or 1) != 1 or int(dataset.get("NumberOfFrames") or 1) != 1:
                raise BadDataError(f"{path}: holds colours or several frames; wanted one grey slice a file")
            right, down = axes(path, dataset)
            spacing = spacing_of(path, dataset)
            here = (rows, columns, *np.round([*right, *down], 3), *np.round(spacing, 4))
            if first is None:
                first, own = here, (right, down, spacing)
            elif here != first:
                raise BadDataError(f"{path}: its size, orientation or spacing differs from the series' first slice")
            found.append((vector(path, dataset, "ImagePositionPatient", 3), _intensities(path, dataset)))
    right, down, spacing = own
    normal = np.cross(right, down)
    found.sort(key=lambda entry: float(entry[0] @ normal))
    origins = np.array([origin for origin, _ in found])
    if len(found) > 1 and np.diff(origins @ normal).min() < 0.01:
        raise BadDataError(f"{paths[0]}: two slices of its series lie at the same place")
    rows, columns = found[0][1].shape
    return np.stack([pixels.T for _, pixels in found], axis=2), Grid(rows, columns, right, down, spacing, origins)


def _intensities(path: Path, dataset: Any) -> np.ndarray:
    """(rows, columns) float32: rescaled; of MONOCHROME1, where high is dark, turned over."""
    values = pixels_of(path, dataset).astype(np.float32)
    if values.ndim != 2:
        raise BadDataError(f"{path}: its pixels have the shape {values.shape}; wanted (rows, columns)")
    try:
        slope, intercept = (
            float(dataset.get(tag, default)) for tag, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
    except (TypeError, ValueError):
        raise BadDataError(f"{path}: RescaleSlope or RescaleIntercept is not a number") from None
    values = values * slope + intercept
    return values.max() + values.min() - values if dataset.get("PhotometricInterpretation") == "MONOCHROME1" else values
