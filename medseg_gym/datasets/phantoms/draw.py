"""What all modalities draw with: contours in unit coordinates, a sheet of values and labels, and smooth noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from medseg_gym.types import Image, Mask

Field = NDArray[np.float32]  # (S, S)
Contour = NDArray[np.float64]  # (N, 2) x, y in the unit frame: x right, y down, the image spans -1..1 both ways

Point = tuple[float, float] | NDArray[np.float64]
Lines = list[tuple[NDArray[np.float64], NDArray[np.float64]]]  # each: paths (N, L, 2) and their widths (N,)

_SHIFT = 4  # contours reach OpenCV in sixteenths of a pixel


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A drawn image and the pixels of every structure that was asked for; absent ones are empty."""

    image: Image
    targets: Mapping[str, Mask]
    spacing_mm: tuple[float, float] | None


class Warp:
    """A smooth displacement of the whole frame, so that neighbours bend together; `amount` in unit coordinates."""

    def __init__(self, rng: np.random.Generator, amount: float, waves: int = 4) -> None:
        self.waves = rng.uniform(-3.2, 3.2, (2, waves))
        self.phase = rng.uniform(0, 2 * np.pi, waves)
        self.push = rng.uniform(-1, 1, (waves, 2)) * amount / np.sqrt(waves / 2)

    def __call__(self, contour: Contour) -> Contour:
        return contour + np.sin(contour @ self.waves + self.phase) @ self.push


class Sheet:
    """A square drawing: a float value and a label for every pixel. Later shapes cover earlier ones."""

    def __init__(self, size: int, background: float, warp: Warp | None = None, turn: float = 0.0) -> None:
        self.size = size
        self.values: Field = np.full((size, size), background, np.float32)
        self.labels = np.zeros((size, size), np.uint8)
        self.warp = warp
        self.matrix = rotation(turn) * (size / 2 * (1 << _SHIFT))
        self.offset = (size / 2 - 0.5) * (1 << _SHIFT)

    def pixels(self, contour: Contour) -> NDArray[np.int32]:
        if self.warp is not None:
            contour = self.warp(contour)
        return np.rint(contour @ self.matrix + self.offset).astype(np.int32)

    def thickness(self, width: float) -> int:
        return max(1, round(width * self.size / 2))

    def fill(self, contour: Contour, value: float, label: int = 0, inside: Mask | None = None) -> None:
        """Covers the contour's inside, or only what of it is in `inside`."""
        if inside is None:
            points = [self.pixels(contour)]
            cv2.fillPoly(self.values, points, value, shift=_SHIFT)  # type: ignore[call-overload]
            cv2.fillPoly(self.labels, points, label, shift=_SHIFT)  # type: ignore[call-overload]
            return
        window, region = self._window(contour)
        region &= inside[window]
        np.copyto(self.values[window], np.float32(value), where=region)
        np.copyto(self.labels[window], np.uint8(label), where=region)

    def add(self, contour: Contour, value: float) -> None:
        """Raises the values in the contour; it leaves labels alone."""
        window, region = self._window(contour)
        self.values[window] += region * np.float32(value)

    def _window(self, contour: Contour) -> tuple[tuple[slice, slice], Mask]:
        """The rows and columns a contour touches, and the pixels in it within these."""
        points = self.pixels(contour)
        (left, top), (right, bottom) = (points.min(0) >> _SHIFT) - 1, (points.max(0) >> _SHIFT) + 2
        rows = slice(max(int(top), 0), min(max(int(bottom), 0), self.size))
        columns = slice(max(int(left), 0), min(max(int(right), 0), self.size))
        region = np.zeros((max(rows.stop - rows.start, 0), max(columns.stop - columns.start, 0)), np.uint8)
        if region.size:
            corner = np.array([columns.start, rows.start], np.int32) << _SHIFT
            cv2.fillPoly(region, [points - corner], 1, shift=_SHIFT)  # type: ignore[call-overload]
        return (rows, columns), region.view(np.bool_)

    def fill_all(self, contours: NDArray[np.float64], values: NDArray[np.floating], label: int = 0) -> None:
        """Covers K contours (K, N, 2) with a value each, in order."""
        points = self.pixels(contours.reshape(-1, 2)).reshape(contours.shape)
        for shape, value in zip(points, values.tolist(), strict=True):
            cv2.fillPoly(self.values, [shape], value, shift=_SHIFT)  # type: ignore[call-overload]
            cv2.fillPoly(self.labels, [shape], label, shift=_SHIFT)  # type: ignore[call-overload]

    def stroke(self, path: Contour, width: float, value: float) -> None:
        """A line of the given width in unit coordinates, at least a pixel; it leaves labels alone."""
        cv2.polylines(self.values, [self.pixels(path)], False, value, self.thickness(width), shift=_SHIFT)  # type: ignore[call-overload]

    def region(self, contours: NDArray[np.float64]) -> Mask:
        """The pixels in a contour (N, 2), or in any of several (K, N, 2) that do not overlap."""
        region = np.zeros((self.size, self.size), np.uint8)
        points = self.pixels(contours.reshape(-1, 2)).reshape(-1, *contours.shape[-2:])
        cv2.fillPoly(region, list(points), 1, shift=_SHIFT)  # type: ignore[call-overload]
        return region.view(np.bool_)

    def layer(self, lines: Lines, soft: float = 0.0, scale: float = 1.0) -> Field:
        """Lines as a field in 0..1, their widths scaled: antialiased, and fainter where thinner than a pixel."""
        layer = np.zeros((self.size, self.size), np.uint8)
        groups: dict[tuple[int, int], list[NDArray[np.int32]]] = {}
        for paths, widths in lines:
            points = self.pixels(paths.reshape(-1, 2)).reshape(paths.shape)
            for path, wide in zip(points, (widths * (scale * self.size / 2)).tolist(), strict=True):
                tone = 16 if wide >= 1 else max(4, round(16 * wide))
                groups.setdefault((tone, max(1, round(wide))), []).append(path)
        for (tone, wide), group in sorted(groups.items(), key=lambda item: item[0]):
            kind = cv2.LINE_AA if wide < 4 else cv2.LINE_8  # a smooth edge costs much where the line is wide
            cv2.polylines(layer, group, False, min(255, 16 * tone), wide, kind, _SHIFT)
        field = layer.astype(np.float32) * np.float32(1 / 255)
        return blur(field, soft) if soft > 0 else field


def line(path: Contour, width: float) -> Lines:
    """One line."""
    return [(path[None], np.array([width]))]


def rotation(turn: float) -> NDArray[np.float64]:
    """Right-multiplied, turns (N, 2) points by `turn` radians, clockwise on the screen."""
    c, s = np.cos(turn), np.sin(turn)
    return np.array([[c, s], [-s, c]])


@lru_cache(maxsize=4)
def frame(size: int) -> tuple[Field, Field]:
    """Unit coordinates x, y of every pixel's centre; read-only."""
    axis = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    x, y = (np.ascontiguousarray(a) for a in np.meshgrid(axis, axis))
    x.flags.writeable = y.flags.writeable = False
    return x, y


@lru_cache(maxsize=64)
def circle(points: int) -> Contour:
    """The unit circle; read-only."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    unit = np.stack([np.cos(angle), np.sin(angle)], 1)
    unit.flags.writeable = False
    return unit


def oval(centre: Point, rx: float, ry: float, turn: float = 0.0, power: float = 2.0, points: int = 72) -> Contour:
    """A superellipse: power 2 is an ellipse, more is boxier."""
    unit = circle(points)
    if power != 2:
        unit = np.sign(unit) * np.abs(unit) ** (2 / power)
    shape = unit * (rx, ry)
    if turn:
        shape = shape @ rotation(turn)
    return shape + np.asarray(centre, np.float64)


def blob(
    rng: np.random.Generator,
    centre: Point,
    rx: float,
    ry: float,
    turn: float = 0.0,
    wobble: float = 0.1,
    points: int = 72,
) -> Contour:
    """An ellipse whose radius wobbles by about the given share, in a few low frequencies."""
    shape = oval((0, 0), rx, ry, turn, points=points) * wobbly(rng, points, wobble)[:, None]
    return shape + np.asarray(centre, np.float64)


def wobbly(rng: np.random.Generator, points: int, wobble: float) -> NDArray[np.float64]:
    """1 + a function of the angle of circle(points) whose standard deviation is about `wobble`; at least 0.4."""
    return np.maximum(1 + rng.normal(0, wobble, 10) @ _waves(points), 0.4)


@lru_cache(maxsize=64)
def _waves(points: int) -> NDArray[np.float64]:
    angle = np.arange(points) * 2 * np.pi / points
    k = np.arange(2, 7)[:, None]
    return 1.2 / np.concatenate([k, k]) * np.concatenate([np.cos(k * angle), np.sin(k * angle)])


def spline(points: NDArray[np.floating], closed: bool = True, steps: int = 10) -> Contour:
    """A smooth curve (Catmull-Rom) through (..., P, 2) points."""
    return _spline_weights(points.shape[-2], closed, steps) @ points


@lru_cache(maxsize=64)
def _spline_weights(count: int, closed: bool, steps: int) -> NDArray[np.float64]:
    p = np.eye(count)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    a, b, c, d = p[:-3, None], p[1:-2, None], p[2:-1, None], p[3:, None]
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    curve = curve.reshape(-1, count)
    return curve if closed else np.concatenate([curve, p[-2:-1]])


def wandering(rng: np.random.Generator, ends: NDArray[np.float64], points: int, stray: float) -> NDArray[np.float64]:
    """Paths (N, points, 2) between ends (N, 2, 2) that stray from the straight line by a random walk."""
    t = np.linspace(0, 1, points)[:, None]
    straight = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * t
    return straight + np.cumsum(rng.normal(0, stray, straight.shape), 1)


def tapered(paths: NDArray[np.float64], widths: NDArray[np.float64], end: float = 0.5, pieces: int = 4) -> Lines:
    """The lines of paths (N, L, 2) that thin out to the share `end` of their widths (N,)."""
    cuts = np.linspace(0, paths.shape[1] - 1, pieces + 1).astype(int)
    shares = np.linspace(1, end, pieces)
    return [(paths[:, i : j + 1], widths * share) for i, j, share in zip(cuts[:-1], cuts[1:], shares, strict=True)]


def branches(
    rng: np.random.Generator,
    paths: NDArray[np.float64],
    widths: NDArray[np.float64],
    children: int,
    length: tuple[float, float],
    angle: tuple[float, float] = (0.45, 0.95),
    thinner: tuple[float, float] = (0.42, 0.62),
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Side branches of paths (N, L, 2), left and right in turn: paths (N * children, 13, 2) and widths."""
    count, points = paths.shape[:2]
    share = 0.2 + 0.75 * (np.arange(children) + rng.uniform(0, 0.9, (count, children))) / children
    at = np.clip((share * points).astype(int), 1, points - 2)
    row = np.arange(count)[:, None]
    ahead = paths[row, at + 1] - paths[row, at - 1]
    sides = np.where(np.arange(children) % 2, 1, -1) * rng.choice([-1, 1], (count, 1))
    turn = rng.uniform(*angle, (count, children)) * sides
    way = np.arctan2(ahead[..., 1], ahead[..., 0]) + turn
    far = rng.uniform(*length, (count, children))
    step = np.stack([np.cos(way), np.sin(way)], -1) * far[..., None]
    bow = step[..., ::-1] * (-1, 1) * rng.normal(0, 0.16, (count, children, 1))
    start = paths[row, at]
    knots = np.stack([start, start + 0.5 * step + bow, start + step - 0.6 * bow], -2)
    width = widths[:, None] * (1 - 0.45 * share) * rng.uniform(*thinner, (count, children))
    return spline(knots.reshape(-1, 3, 2), closed=False, steps=6), width.reshape(-1)


def mirrored(contour: Contour) -> Contour:
    """The other side of the body."""
    return contour * (-1, 1)


def noise(rng: np.random.Generator, size: int, cells: int) -> Field:
    """Smooth noise with about `cells` bumps across the image, near standard normal whatever the size."""
    coarse = rng.standard_normal((cells, cells), np.float32)
    way = cv2.INTER_CUBIC if size > cells else cv2.INTER_AREA
    return cv2.resize(coarse, (size, size), interpolation=way) * np.float32(1.4)


def grain(rng: np.random.Generator, size: int, sigma: float) -> Field:
    """Standard normal pixel noise, correlated over `sigma` pixels at size 256."""
    white = rng.standard_normal((size, size), np.float32)
    sigma *= size / 256
    if sigma < 0.3:
        return white
    return blur_px(white, sigma) * np.float32(np.sqrt(4 * np.pi * sigma**2 + 1))


def blur(field: Field, sigma: float) -> Field:
    """Gaussian blur; sigma in pixels of a 256-pixel image."""
    return blur_px(field, sigma * field.shape[0] / 256)


def blur_px(field: Field, sigma: float) -> Field:
    if sigma < 0.25:
        return field
    return cv2.GaussianBlur(field, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)


def grey(field: Field) -> Image:
    """(S, S, 3) uint8 of a field in 0..1, clipped."""
    return cv2.cvtColor(quantised(field), cv2.COLOR_GRAY2RGB)


def quantised(field: Field) -> NDArray[np.uint8]:
    return np.clip(field * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8)


def colour(planes: Sequence[Field], soft: float, light: Field, speckle: Field, tint: Field) -> Image:
    """(S, S, 3) uint8 of three channels: blurred by the optics, with the sensor's noise, then times `light`."""
    share = (1.0, -0.5, 1.2)  # of the coloured noise in each channel
    noisy = (blur(plane, soft) + speckle + k * tint for plane, k in zip(planes, share, strict=True))
    return cv2.merge([quantised(plane * light) for plane in noisy])


def distance(x: Field, y: Field) -> Field:
    """The length of (x, y); np.hypot guards against overflow and is several times slower."""
    return np.sqrt(x * x + y * y)


def smoothstep(low: float, high: float, value: Field) -> Field:
    """0 below low, 1 above high, smooth between; low > high turns it round."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)
