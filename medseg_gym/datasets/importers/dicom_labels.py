"""Segments of DICOM SEG objects and contours of RTSTRUCT objects, drawn on the grid of their image series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.datasets.importers.dicom_series import Grid, axes, pixels_of, read_dicom, readable, spacing_of, vector
from medseg_gym.datasets.importers.volumes import MAX_VOXELS
from medseg_gym.errors import BadDataError

SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # Segmentation, Label Map Segmentation
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
MAX_POINTS = 10_000_000
FRAME_REACH = 0.1  # slice gaps a segment's frame may lie off its slice
CONTOUR_REACH = 0.5  # the same for a contour, which is drawn by hand on a slice

Labels = dict[str, np.ndarray]  # name as stored -> (columns, rows, slices) bool


def read_labels(path: Path, grid: Grid) -> tuple[Labels, list[str]]:
    """The segments or contours of a file by their names, and a line on each thing in it that was left out.

    Segments, or regions, of the same name are joined.
    """
    with readable(path, "not a readable DICOM file"):
        dataset = read_dicom(path, pixels=True)
        if dataset.get("SOPClassUID") == RTSTRUCT:
            return _contours(path, dataset, grid)
        return _segments(path, dataset, grid)


def _segments(path: Path, dataset: Any, grid: Grid) -> tuple[Labels, list[str]]:
    """The segments of a SEG. A frame off the grid's slices is left out; FRACTIONAL ones count from one half on."""
    names: dict[int, str] = {}
    for segment in dataset.get("SegmentSequence") or ():
        number = segment.get("SegmentNumber")
        names[int(number) if number is not None else len(names) + 1] = str(segment.get("SegmentLabel") or "").strip()
    if not names:
        raise BadDataError(f"{path}: no SegmentSequence; wanted a DICOM segmentation")
    frames = pixels_of(path, dataset)
    frames = frames[None] if frames.ndim == 2 else frames
    groups = list(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    if len(groups) != len(frames) or frames.ndim != 3:
        raise BadDataError(f"{path}: {len(groups)} frames are described and {len(frames)} are there")
    shared = (list(dataset.get("SharedFunctionalGroupsSequence") or ()) or [None])[0]
    kind = str(dataset.get("SegmentationType") or "BINARY")
    half = int(dataset.get("MaximumFractionalValue") or 255) / 2
    labels: Labels = {}
    off = 0
    for pixels, group in zip(frames, groups, strict=True):
        place = _place(path, group, shared, grid)
        if place is None:
            off += 1
            continue
        if kind == "LABELMAP":
            here = [(number, pixels == number) for number in names if number and (pixels == number).any()]
        else:
            number = _item(path, group, shared, "SegmentIdentificationSequence").get("ReferencedSegmentNumber")
            here = [(int(number or 0), pixels >= half if kind == "FRACTIONAL" else pixels != 0)]
        for number, mask in here:
            if number not in names:
                raise BadDataError(f"{path}: a frame belongs to segment {number}, which is not described")
            volume = _volume(path, labels, names[number] or f"segment {number}", grid)
            index, rows, columns = place
            volume[:, :, index] |= _resampled(mask, rows, columns).T
    return labels, [f"{off} frames lie on no slice of the series"] if off else []


def _place(path: Path, group: Any, shared: Any, grid: Grid) -> tuple[int, np.ndarray, np.ndarray] | None:
    """A frame's slice, and the frame's row and column, (rows, columns) integers, of each pixel of the grid."""
    right, down = axes(path, _item(path, group, shared, "PlaneOrientationSequence"))
    if abs(np.cross(right, down) @ grid.normal) < 0.9999:
        raise BadDataError(f"{path}: a frame is not parallel to the slices of its series")
    origin = vector(path, _item(path, group, shared, "PlanePositionSequence"), "ImagePositionPatient", 3)
    spacing = spacing_of(path, _item(path, group, shared, "PixelMeasuresSequence"))
    index = grid.slice_at(float(origin @ grid.normal), FRAME_REACH)
    if index is None:
        return None
    start = grid.origins[index] - origin
    per_row, per_column = grid.down * grid.spacing[0], grid.right * grid.spacing[1]
    rows = np.arange(grid.rows)[:, None]
    columns = np.arange(grid.columns)[None]

    def along(axis: np.ndarray, step: float) -> np.ndarray:
        where = (start @ axis + rows * (per_row @ axis) + columns * (per_column @ axis)) / step
        return np.floor(where + 0.5).astype(np.int64)

    return index, along(down, spacing[0]), along(right, spacing[1])


def _resampled(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The mask at the given rows and columns, False outside it: exact on the same grid, else the nearest pixel."""
    there = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
    out = np.zeros(rows.shape, np.bool_)
    out[there] = mask[rows[there], columns[there]]
    return out


def _item(path: Path, group: Any, shared: Any, name: str) -> Any:
    """A frame's functional group, or else the one all frames share."""
    for owner in (group, shared):
        items = None if owner is None else owner.get(name)
        if items:
            return items[0]
    raise BadDataError(f"{path}: a frame has no {name}")


def _contours(path: Path, dataset: Any, grid: Grid) -> tuple[Labels, list[str]]:
    """The closed contours of an RTSTRUCT. A pixel is inside by its centre; contours in contours are holes."""
    names: dict[Any, str] = {}
    for region in dataset.get("StructureSetROISequence") or ():
        names[region.get("ROINumber")] = str(region.get("ROIName") or "").strip() or f"region {region.get('ROINumber')}"
    if not names:
        raise BadDataError(f"{path}: no StructureSetROISequence; wanted an RTSTRUCT")
    labels: Labels = {}
    off = odd = points = 0
    for region in dataset.get("ROIContourSequence") or ():
        name = names.get(region.get("ReferencedROINumber"))
        if name is None:
            raise BadDataError(f"{path}: contours of region {region.get('ReferencedROINumber')}, which has no name")
        drawn: dict[int, np.ndarray] = {}
        for contour in region.get("ContourSequence") or ():
            if not str(contour.get("ContourGeometricType")).startswith("CLOSED"):
                odd += 1
                continue
            corners = _corners(path, contour)
            points += len(corners)
            if points > MAX_POINTS:
                raise BadDataError(f"{path}: more than {MAX_POINTS} points")
            depths = corners @ grid.normal
            index = grid.slice_at(float(depths.mean()), CONTOUR_REACH)
            if index is None or np.ptp(depths) > grid.gap:
                off += 1
                continue
            from_origin = corners - grid.origins[index]
            x, y = from_origin @ grid.right / grid.spacing[1], from_origin @ grid.down / grid.spacing[0]
            plane = drawn.setdefault(index, np.zeros((grid.rows, grid.columns), np.bool_))
            plane ^= polygon(x, y, grid.rows, grid.columns)
        for index, plane in drawn.items():
            _volume(path, labels, name, grid)[:, :, index] |= plane.T
    notes = [f"{off} contours lie on no slice of the series"] if off else []
    notes += [f"{odd} contours are points or open lines"] if odd else []
    return labels, notes


def _corners(path: Path, contour: Any) -> np.ndarray:
    """(points, 3) LPS millimetres."""
    try:
        numbers = np.array([float(n) for n in contour.ContourData])
    except (AttributeError, TypeError, ValueError):
        numbers = np.zeros(0)
    if len(numbers) < 9 or len(numbers) % 3 or not np.isfinite(numbers).all():
        raise BadDataError(f"{path}: a contour has {len(numbers)} numbers; wanted x, y, z of three points or more")
    return numbers.reshape(-1, 3)


def polygon(x: np.ndarray, y: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) bool: pixel centres, at whole numbers, inside a closed polygon by the even-odd rule."""
    flips = np.zeros((rows, columns + 1), np.int64)
    for x1, y1, x2, y2 in zip(x, y, np.roll(x, -1), np.roll(y, -1), strict=True):
        low, high = min(y1, y2), max(y1, y2)
        if high < 0 or low > rows:
            continue
        crossed = np.arange(max(int(np.ceil(low)), 0), min(int(np.ceil(high)), rows))  # low <= row < high
        if len(crossed):
            at = np.ceil(x1 + (crossed - y1) * ((x2 - x1) / (y2 - y1)))
            flips[crossed, np.clip(at, 0, columns).astype(np.int64)] += 1
    return np.cumsum(flips, axis=1)[:, :columns] % 2 == 1


def _volume(path: Path, labels: Labels, name: str, grid: Grid) -> np.ndarray:
    """The (columns, rows, slices) bool of a name, made at its first use."""
    if name not in labels:
        shape = (grid.columns, grid.rows, len(grid.origins))
        if (len(labels) + 1) * int(np.prod(shape)) > 8 * MAX_VOXELS:
            raise BadDataError(f"{path}: {len(labels)} structures of {shape} voxels are as many as are read")
        labels[name] = np.zeros(shape, np.bool_)
    return labels[name]
