"""What is wrong with a mask, and the box or click that mends it: pure functions, masks in, prompts out.

A region is a set of 8-connected pixels. Its centre is the pixel farthest from the region's outside (Euclidean distance
transform; beyond the image's border counts as outside), the topmost, then leftmost of equals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.types import Box, Click, Mask

_CHAMFER_SLACK = 0.95  # OpenCV's 5 x 5 chamfer distance is within 2 % of the Euclidean one: .98 / 1.02 > .95
_CHAMFER_EXACT = 2.3  # and it orders the distances 1, sqrt 2, 2, sqrt 5 as they are


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One connected piece of the error (or of a target): its pixels in a crop whose top left is image pixel (x, y)."""

    pixels: Mask
    x: int
    y: int
    area: int
    positive: bool  # missed, so a positive click mends it; else spilled

    def centres(self) -> Iterator[Click]:
        """Its centre, then more of its local maxima: each the deepest pixel outside the discs around those before."""
        x, y, depth = _deepest(self.pixels)
        yield Click(self.x + x, self.y + y, self.positive)
        rows, columns = np.ogrid[: self.pixels.shape[0], : self.pixels.shape[1]]
        exact = _squared_distances(self.pixels)
        while True:
            exact[(columns - x) ** 2 + (rows - y) ** 2 < depth] = 0
            y, x = (int(i) for i in np.unravel_index(int(exact.argmax()), exact.shape))
            depth = int(exact[y, x])
            if depth == 0:
                return
            yield Click(self.x + x, self.y + y, self.positive)


def missed_spilled(mask: Mask, target: Mask) -> tuple[Mask, Mask]:
    """Pixels of the target outside the mask, and of the mask outside the target; each (H, W)."""
    if mask.shape != target.shape:
        raise ValueError(f"mask is {mask.shape}, target is {target.shape}; they must be of one image")
    return target & ~mask, mask & ~target


def target_box(target: Mask) -> Box | None:
    """The tightest box around the (H, W) target, corners inclusive; None for an empty one."""
    x, y, width, height = _bounds(target)
    return Box(x, y, x + width - 1, y + height - 1) if width else None


def centre_click(target: Mask) -> Click | None:
    """A positive click at the centre of the target's largest region (first row by row of equals); None if empty."""
    region = next(_ordered(target), None)
    return None if region is None else next(region.centres())


def error_regions(mask: Mask, target: Mask) -> Iterator[Region]:
    """The regions of missed and of spilled, largest first; of equal areas missed first, then row by row."""
    missed, spilled = missed_spilled(mask, target)
    yield from _ordered(missed, spilled)


def error_click(mask: Mask, target: Mask, rank: int = 0) -> Click | None:
    """MedSAM-Agent's click: the centre of the largest error region, positive in missed, negative in spilled.

    `rank` k asks for the k-th largest. None when mask and target are equal, or there are no more than k regions.
    """
    region = next(islice(error_regions(mask, target), rank, None), None)
    return None if region is None else next(region.centres())


def error_clicks(mask: Mask, target: Mask, maxima: int = 1) -> Iterator[Click]:
    """The clicks to try in turn: for each error region, largest first, its centre and up to `maxima` - 1 others.

    With maxima 1 the k-th is error_click(rank=k).
    """
    for region in error_regions(mask, target):
        yield from islice(region.centres(), maxima)


def greedy_click(mask: Mask, target: Mask) -> Click | None:
    """IBISAgent's click: the pixel deepest in missed or in spilled, whichever is deeper; equal depths go to missed.

    Clicked pixels are not excluded, so where the tool does not respond the same click returns. None when equal.
    """
    best: tuple[int, Click] | None = None
    for pixels, positive in zip(missed_spilled(mask, target), (True, False), strict=True):
        left, top, width, height = _bounds(pixels)
        if not width:
            continue
        x, y, depth = _deepest(pixels[top : top + height, left : left + width])
        if best is None or depth > best[0]:
            best = depth, Click(left + x, top + y, positive)
    return None if best is None else best[1]


def iou_after_repair(mask: Mask, target: Mask, region: Region) -> float:
    """The IoU the mask would have with the region mended exactly and nothing else changed."""
    both, union = int(np.count_nonzero(mask & target)), int(np.count_nonzero(mask | target))
    if region.positive:
        return (both + region.area) / union
    return both / (union - region.area) if union > region.area else 1.0


def jitter_box(
    box: Box,
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    pixels: tuple[float, float] | None = None,
    relative: tuple[float, float] | None = None,
) -> Box:
    """The box with each edge moved in or out by a uniform distance, kept inside the (H, W) image and valid.

    The distance lies in (low, high): `pixels`, or `relative` to the box's own width and height. Edges that pass each
    other change places. The sides are drawn in the order left, top, right, bottom.
    """
    if (pixels is None) == (relative is None):
        raise ValueError("jitter_box wants either pixels=(low, high) or relative=(low, high)")
    low, high = _range(pixels if pixels is not None else relative)
    width, height = box.x2 - box.x1 + 1, box.y2 - box.y1 + 1
    unit = np.ones(4) if pixels is not None else np.array([width, height, width, height])
    moves = _moves(rng, 4, low, high, unit)
    x1, x2 = sorted((_inside(box.x1 + moves[0], shape[1]), _inside(box.x2 + moves[2], shape[1])))
    y1, y2 = sorted((_inside(box.y1 + moves[1], shape[0]), _inside(box.y2 + moves[3], shape[0])))
    return Box(x1, y1, x2, y2)


def jitter_click(
    click: Click, rng: np.random.Generator, shape: tuple[int, int], *, pixels: tuple[float, float]
) -> Click:
    """The click moved along each axis by a uniform distance in `pixels` (low, high), kept inside the (H, W) image."""
    moves = _moves(rng, 2, *_range(pixels), np.ones(2))
    return Click(_inside(click.x + moves[0], shape[1]), _inside(click.y + moves[1], shape[0]), click.positive)


def _range(given: tuple[float, float] | None) -> tuple[float, float]:
    assert given is not None
    low, high = given
    if not 0 <= low <= high < float("inf"):
        raise ValueError(f"jitter range is {given}; wanted (low, high) with 0 <= low <= high")
    return low, high


def _moves(rng: np.random.Generator, n: int, low: float, high: float, unit: NDArray[Any]) -> list[int]:
    distances = rng.uniform(low, high, n) * unit
    signs = rng.integers(0, 2, n) * 2 - 1
    return [int(move) for move in np.rint(distances * signs)]


def _inside(value: int, length: int) -> int:
    return min(max(value, 0), length - 1)


def _bounds(pixels: Mask) -> tuple[int, int, int, int]:
    """x, y, width, height of what is True; all 0 when nothing is."""
    import cv2

    x, y, width, height = cv2.boundingRect(np.ascontiguousarray(pixels).view(np.uint8))
    return int(x), int(y), int(width), int(height)


def _ordered(missed: Mask, spilled: Mask | None = None) -> Iterator[Region]:
    """The regions of both masks in the order that error_regions states."""
    import cv2

    found, rows = [], []
    for kind, pixels in enumerate((missed,) if spilled is None else (missed, spilled)):
        left, top, width, height = _bounds(pixels)
        if not width:
            continue
        crop = np.ascontiguousarray(pixels[top : top + height, left : left + width]).view(np.uint8)
        n, labels, stats, _ = cv2.connectedComponentsWithStats(crop, connectivity=8)
        area = stats[1:, cv2.CC_STAT_AREA].astype(np.int64)
        first = np.zeros(n, np.int64)
        if np.unique(area).size < n - 1:  # OpenCV's label order is not row by row, so ties need the pixels
            inside = np.flatnonzero(labels)[::-1]
            first[labels.ravel()[inside]] = inside  # of repeated labels the last assignment stays: the first pixel
        found.append((labels, stats, left, top))
        rows.append(np.stack([-area, np.full(n - 1, kind), first[1:], np.full(n - 1, len(found) - 1), np.arange(1, n)]))
    if not found:
        return
    table = np.concatenate(rows, axis=1)
    for column in np.lexsort(table[2::-1]):
        minus_area, kind, _, source, label = (int(value) for value in table[:, column])
        labels, stats, left, top = found[source]
        x, y, width, height = (int(value) for value in stats[label, :4])
        pixels = labels[y : y + height, x : x + width] == label
        yield Region(pixels=pixels, x=left + x, y=top + y, area=-minus_area, positive=kind == 0)


def _deepest(pixels: Mask) -> tuple[int, int, int]:
    """x, y and squared depth of the pixel farthest from what is False or outside; topmost, then leftmost of equals.

    OpenCV's exact transform takes 8 ms on 512 x 512, its chamfer 1 ms: that names candidates, which are then measured.
    """
    import cv2

    padded = np.pad(pixels, 1).view(np.uint8)
    width = padded.shape[1]
    rough = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_5).ravel()
    peak = float(rough.max())
    if peak < _CHAMFER_EXACT:
        y, x = divmod(int(rough.argmax()), width)
        return x - 1, y - 1, round(peak**2)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    rim = _points(np.flatnonzero(cv2.dilate(padded, cross) > padded), width)  # what is nearest always touches a side
    candidates = _prune(_points(np.flatnonzero(rough >= _CHAMFER_SLACK * peak), width), rim)
    squared = _squared_depths(candidates, rim)
    best = int(squared.argmax())
    y, x = (int(i) for i in candidates[best])
    return x - 1, y - 1, int(squared[best])


def _points(flat: NDArray[Any], width: int) -> NDArray[np.float64]:
    return np.stack(np.divmod(flat, width), axis=1).astype(np.float64)


def _prune(points: NDArray[np.float64], rim: NDArray[np.float64]) -> NDArray[np.float64]:
    """The points, in their order, that may be deepest: over a distance d the depth changes by d at most."""
    from scipy.spatial.distance import cdist

    while len(points) > 256:
        some = points[:: len(points) // 64]
        depths = np.sqrt(_squared_depths(some, rim))
        bound = (cdist(points, some) + depths).min(axis=1)
        kept: NDArray[np.float64] = points[bound >= depths.max() - 1e-6]
        if len(kept) > 0.8 * len(points):
            return kept
        points = kept
    return points


def _squared_depths(points: NDArray[np.float64], rim: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exact squared distances to the nearest rim pixel, a bounded piece at a time."""
    from scipy.spatial.distance import cdist

    rows = max(1, 2_000_000 // len(rim))
    squared = np.empty(len(points))
    for i in range(0, len(points), rows):
        squared[i : i + rows] = cdist(points[i : i + rows], rim, "sqeuclidean").min(axis=1)
    return squared


def _squared_distances(pixels: Mask) -> NDArray[np.int64]:
    import cv2

    padded = np.pad(pixels, 1).view(np.uint8)
    distances = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    return np.rint(distances.astype(np.float64) ** 2).astype(np.int64)
