"""What Nano's network is shown: a window of the image and dense maps of the prompts, all made with NumPy and OpenCV.

Coordinates: a pixel's centre has whole numbers (OpenCV's convention). A window pixel (u, v) lies at image point
x = cx + (u - (S - 1) / 2) w / S, likewise y; S is SIDE. Training and the tool both come through here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.types import Mask

Array = NDArray[Any]

SIDE = 96  # pixels of a window's side
CHANNELS = 14
MARGIN = 1.5  # a window is this many times as wide as what it is laid around
RATIO = 2.0  # a window's longer side is at most this many times the shorter
PRIOR_SOFTNESS = 4.0
OUTSIDE = -8.0  # the logit of what no window has covered
_BINS = 32
_EVIDENCE = 3.0  # log odds of colour at which the evidence maps saturate


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of the image: centre and size in image pixels."""

    cx: float
    cy: float
    w: float
    h: float

    def matrix(self) -> Array:
        """(2, 3): window pixel -> image point."""
        a, d, half = self.w / SIDE, self.h / SIDE, (SIDE - 1) / 2
        return np.array([[a, 0, self.cx - half * a], [0, d, self.cy - half * d]])

    def inverse(self) -> Array:
        """(2, 3): image point -> window pixel."""
        a, d, half = SIDE / self.w, SIDE / self.h, (SIDE - 1) / 2
        return np.array([[a, 0, half - self.cx * a], [0, d, half - self.cy * d]])


def compose(first: Array, then: Array) -> Array:
    """(2, 3): the affine map that does `first`, then `then`."""
    return np.hstack([then[:, :2] @ first[:, :2], then[:, :2] @ first[:, 2:] + then[:, 2:]])


def whole(height: float, width: float) -> Window:
    """The window that shows the whole image."""
    return _within_ratio((width - 1) / 2, (height - 1) / 2, float(width), float(height))


def around(bounds: tuple[float, float, float, float], margin: float, least: float) -> Window:
    """The window around x1, y1, x2, y2 (pixel centres, inclusive), `margin` times as large, `least` pixels at least."""
    x1, y1, x2, y2 = bounds
    w, h = max((x2 - x1 + 1) * margin, least), max((y2 - y1 + 1) * margin, least)
    return _within_ratio((x1 + x2) / 2, (y1 + y2) / 2, w, h)


def least_side(height: float, width: float) -> float:
    """The smallest window of an image: 4 % of its longer side, and never under 8 pixels."""
    return max(8.0, 0.04 * max(height, width))


def _within_ratio(cx: float, cy: float, w: float, h: float) -> Window:
    return Window(cx, cy, max(w, h / RATIO), max(h, w / RATIO))


def mask_bounds(mask: Mask, points: Sequence[tuple[float, float]]) -> tuple[float, float, float, float] | None:
    """x1, y1, x2, y2 of the mask's pieces that hold one of the (x, y) points or a tenth of its area; None if empty."""
    import cv2

    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    if w == 0:
        return None
    crop = np.ascontiguousarray(mask[y : y + h, x : x + w]).view(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(crop, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= 0.1 * stats[1:, cv2.CC_STAT_AREA].sum()
    for px, py in points:
        column, row = round(px) - x, round(py) - y
        if 0 <= column < w and 0 <= row < h:
            keep[labels[row, column]] = True
    keep[0] = False
    if not keep.any():
        keep[1:] = True
    kept = stats[keep]
    left, top = kept[:, cv2.CC_STAT_LEFT].min(), kept[:, cv2.CC_STAT_TOP].min()
    right = (kept[:, cv2.CC_STAT_LEFT] + kept[:, cv2.CC_STAT_WIDTH]).max() - 1
    bottom = (kept[:, cv2.CC_STAT_TOP] + kept[:, cv2.CC_STAT_HEIGHT]).max() - 1
    return float(x + left), float(y + top), float(x + right), float(y + bottom)


def pyramid(image: Array) -> tuple[Array, ...]:
    """The (H, W) or (H, W, 3) uint8 image and its halvings, down to about 64 pixels on the longer side."""
    import cv2

    levels = [image]
    while max(levels[-1].shape[:2]) > 64:
        h, w = levels[-1].shape[:2]
        levels.append(
            cv2.resize(levels[-1], (max(1, (w + 1) // 2), max(1, (h + 1) // 2)), interpolation=cv2.INTER_AREA)
        )
    return tuple(levels)


def sample(levels: Sequence[Array], matrix: Array) -> Array:
    """(S, S) or (S, S, 3) uint8: the pyramid's image seen through `matrix` (window pixel -> image point)."""
    import cv2

    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    level = min(len(levels) - 1, max(0, int(np.log2(max(scale, 1.0) / 1.4) + 1)))
    h, w = levels[level].shape[:2]
    fy, fx = h / levels[0].shape[0], w / levels[0].shape[1]
    shrink = np.array([[fx, 0, (fx - 1) / 2], [0, fy, (fy - 1) / 2]])
    return cv2.warpAffine(
        levels[level],
        compose(matrix, shrink),
        (SIDE, SIDE),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def resample(logits: Array, matrix: Array, size: tuple[int, int]) -> Array:
    """(h, w) float32: logits seen through `matrix` (new pixel -> old pixel); OUTSIDE beyond their border."""
    import cv2

    return cv2.warpAffine(
        logits,
        matrix,
        (size[1], size[0]),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=OUTSIDE,
    )


def maps(
    pixels: Array,
    box: tuple[float, float, float, float] | None,
    clicks: Sequence[tuple[float, float, bool]],
    prior: Array | None,
    scale: float,
) -> Array:
    """(CHANNELS, S, S) float32, the network's input.

    `pixels` is what `sample` gives; box (x1, y1, x2, y2) and clicks (x, y, positive) are in window pixels; prior is
    (S, S) logits or None; scale is the window's size as a share of the image's.
    """
    import cv2

    out = np.zeros((CHANNELS, SIDE, SIDE), np.float32)
    mean, deviation = cv2.meanStdDev(pixels)
    if pixels.ndim == 3:
        spread = float(np.sqrt((deviation**2).mean() + mean.var()))
        normal = np.clip((pixels.astype(np.float32) - float(mean.mean())) / (spread + 4), -3, 3)
        out[:3] = normal.transpose(2, 0, 1)
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    else:
        out[:3] = np.clip((pixels.astype(np.float32) - float(mean[0, 0])) / (float(deviation[0, 0]) + 4), -3, 3)
        grey = pixels
    equal = cv2.equalizeHist(grey)
    np.multiply(equal, 2 / 255, out=out[3])
    out[3] -= 1
    if box is not None:
        out[6], out[7] = _box_maps(box)
    for channel, positive in ((8, True), (10, False)):
        for x, y in ((x, y) for x, y, sign in clicks if sign is positive):
            np.maximum(out[channel], _bump(x, y, 2.0), out=out[channel])
            np.maximum(out[channel + 1], _bump(x, y, 10.0), out=out[channel + 1])
    if prior is not None:
        np.tanh(prior / PRIOR_SOFTNESS, out=out[12])
    out[13] = np.log2(max(scale, 1e-3)) / 4
    front, back = _weights(out, box is not None, prior is not None and bool((prior > 0).any()))
    out[4] = _evidence((equal >> 3).ravel(), _BINS, front, back, smooth=True)
    out[5] = out[4] if pixels.ndim == 2 else _evidence(_colour_bins(pixels), 216, front, back, smooth=False)
    return out


_GRID = np.arange(SIDE, dtype=np.float32)


def _bump(x: float, y: float, sigma: float) -> Array:
    across, down = (np.exp(-((_GRID - at) ** 2) / (2 * sigma**2)) for at in (x, y))
    return np.outer(down, across)


def _box_maps(box: tuple[float, float, float, float]) -> tuple[Array, Array]:
    """+1 inside and -1 outside of the box; and 1 - r, r the radius that is 1 on the inscribed ellipse, within +-1."""
    x1, y1, x2, y2 = box
    dx = np.abs(_GRID - (x1 + x2) / 2) / max((x2 - x1 + 1) / 2, 0.5)
    dy = np.abs(_GRID - (y1 + y2) / 2) / max((y2 - y1 + 1) / 2, 0.5)
    inside = np.where(np.maximum(dy[:, None], dx[None]) <= 1, np.float32(1), np.float32(-1))
    ellipse = 1 - np.sqrt(dx[None] ** 2 + dy[:, None] ** 2)
    return inside, np.clip(ellipse, -1, 1)


def _weights(out: Array, boxed: bool, masked: bool) -> tuple[Array, Array]:
    """How surely each pixel is object and background, for the colour statistics."""
    if masked:
        front = (out[12] + 1) / 2
        back = 1 - front
    elif boxed:
        front = (out[7] > 0.2).astype(np.float32)
        back = (out[6] < 0).astype(np.float32)
    else:
        front = out[9] ** 4  # a bump of half the width
        back = np.full_like(front, 0.2)
    return (front + 2 * out[8]).ravel(), (back + 2 * out[10]).ravel()


def _evidence(bins: Array, count: int, front: Array, back: Array, *, smooth: bool) -> Array:
    """(S, S): log odds of object against background by colour alone, scaled to +-1."""
    odds: Array = np.zeros(count)
    for weights, sign in ((front, 1), (back, -1)):
        histogram: Array = np.bincount(bins, weights, count)
        if smooth:
            histogram = np.convolve(
                np.pad(histogram, 2, mode="edge"), (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16), "valid"
            )
        odds += sign * np.log(histogram / max(histogram.sum(), 1e-6) + 0.1 / count)
    table = np.clip(odds / _EVIDENCE, -1, 1).astype(np.float32)
    return table[bins].reshape(SIDE, SIDE)


def _colour_bins(pixels: Array) -> Array:
    """Six levels a channel between its lowest and highest value in the window."""
    low, high = pixels.min((0, 1)).astype(np.int32), pixels.max((0, 1)).astype(np.int32)
    levels = (pixels - low) * 6 // (high - low + 1)
    return (levels @ np.array([36, 6, 1])).ravel()


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))
