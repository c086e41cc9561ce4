"""Simulated interaction: augmented cases, prompted over several turns as the oracle and careless people would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medseg_gym.tools.nano_maps import (
    SIDE,
    Array,
    Window,
    around,
    compose,
    least_side,
    maps,
    mask_bounds,
    resample,
    sample,
    whole,
)
from medseg_gym.tools.nano_train.cases import Case
from medseg_gym.types import Mask


@dataclass(slots=True, eq=False)
class Look:
    """How this session's image is altered: a table of grey levels a channel, noise and blur."""

    tables: NDArray[np.uint8]  # (256,) or (256, 3)
    noise: float
    blur: float
    swap: bool  # to grey


@dataclass(slots=True, eq=False)
class Session:
    """One case being outlined. The scene is what counts as the whole image: a turned, scaled piece of the case."""

    case: Case
    scene: Array  # (2, 3): scene point -> case pixel
    height: float
    width: float
    look: Look
    box: tuple[float, float, float, float] | None = None
    clicks: list[tuple[float, float, bool]] = field(default_factory=list)
    window: Window | None = None  # of the last answer
    logits: Array | None = None  # (S, S), the last answer
    target: Mask | None = None  # (S, S) in the last window


def start(case: Case, rng: np.random.Generator, boxed: bool) -> Session:
    """A session with its first box or click given."""
    scene, height, width = _scene(case, rng)
    session = Session(case, scene, height, width, _look(case, rng))
    points = _to_scene(session, case.hull)
    x1, y1 = points.min(0)
    x2, y2 = points.max(0)
    if boxed:
        session.box = _jittered((x1, y1, x2, y2), rng)
        if rng.random() < 0.1:
            session.clicks.append(_first_click(session, (x1, y1, x2, y2), rng))
    else:
        session.clicks.append(_first_click(session, (x1, y1, x2, y2), rng))
    return session


def look_at(session: Session, rng: np.random.Generator) -> tuple[Array, Mask, float]:
    """The network's (CHANNELS, S, S) input for the session's next answer, the (S, S) target in its window, and the
    area of the whole target in window pixels."""
    import cv2

    window = _next_window(session, rng)
    matrix = compose(window.matrix(), session.scene)
    pixels = sample(session.case.image, matrix)
    look = session.look
    if pixels.ndim == 3 and look.swap:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    pixels = cv2.LUT(pixels, look.tables if pixels.ndim == 3 else look.tables[:, :, :1].copy())
    if look.blur:
        pixels = cv2.GaussianBlur(pixels, (0, 0), look.blur)
    if look.noise:
        noise = rng.standard_normal(pixels.shape, np.float32) * look.noise
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    target = sample(session.case.target, matrix) > 127
    prior = None
    if session.logits is not None:
        assert session.window is not None
        prior = resample(session.logits, compose(window.matrix(), session.window.inverse()), (SIDE, SIDE))
    back = window.inverse()
    box = None if session.box is None else (*_mapped(back, *session.box[:2]), *_mapped(back, *session.box[2:]))
    clicks = [(*_mapped(back, x, y), positive) for x, y, positive in session.clicks]
    scale = float(np.sqrt(window.w * window.h)) / max(session.height, session.width)
    session.window, session.target = window, target
    area = session.case.area / abs(float(np.linalg.det(matrix[:, :2])))
    return maps(pixels, box, clicks, prior, scale), target, area


def answer(session: Session, logits: Array, rng: np.random.Generator) -> None:
    """Takes the answer in and gives the next click: mostly the centre of the largest error, else any wrong pixel."""
    assert session.window is not None and session.target is not None
    session.logits = logits
    first = len(session.clicks) == 1 and session.box is None
    if first and rng.random() < 0.6:
        return  # the same click again, seen through a window around the answer
    click = error_pixel(logits > 0, session.target, rng)
    if click is not None:
        x, y, positive = click
        session.clicks.append((*_mapped(session.window.matrix(), x, y), positive))


def error_pixel(mask: Mask, target: Mask, rng: np.random.Generator) -> tuple[int, int, bool] | None:
    """x, y and sign of a click that tells of an error: in 3 of 4 cases the centre of the largest, else a random one."""
    import cv2

    wrong = mask != target
    if not wrong.any():
        return None
    draw = rng.random()
    if draw < 0.1:
        y, x = divmod(int(rng.choice(np.flatnonzero(wrong))), wrong.shape[1])
        return x, y, bool(target[y, x])
    signed = np.where(wrong, np.where(target, 1, 2), 0).astype(np.uint8)
    best, chosen = 0, None
    for sign in (1, 2):
        count, labels, stats, _ = cv2.connectedComponentsWithStats((signed == sign).view(np.uint8), connectivity=8)
        if count > 1:
            largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
            if stats[largest, cv2.CC_STAT_AREA] > best:
                best, chosen = int(stats[largest, cv2.CC_STAT_AREA]), labels == largest
    assert chosen is not None
    x, y = centre(chosen) if draw > 0.25 else _any_pixel(chosen, rng)
    return x, y, bool(target[y, x])


def centre(region: Mask) -> tuple[int, int]:
    """x, y of the pixel farthest from the region's outside."""
    import cv2

    padded = np.pad(region, 1).view(np.uint8)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 5)
    y, x = divmod(int(depth.argmax()), depth.shape[1])
    return x - 1, y - 1


def _any_pixel(region: Mask, rng: np.random.Generator) -> tuple[int, int]:
    y, x = divmod(int(rng.choice(np.flatnonzero(region))), region.shape[1])
    return x, y


def _next_window(session: Session, rng: np.random.Generator) -> Window:
    least = least_side(session.height, session.width)
    margin = float(rng.uniform(1.3, 1.8))
    if session.box is not None:
        return _shaken(around(_with_points(session.box, session.clicks), margin, least), rng)
    if session.logits is None:
        if rng.random() < 0.35:
            return _shaken(whole(session.height, session.width), rng)
        x, y, _ = session.clicks[0]
        side = max(session.height, session.width) * float(np.exp(rng.uniform(np.log(0.12), np.log(0.7))))
        return _shaken(Window(x, y, max(side, 2 * least), max(side, 2 * least)), rng)
    assert session.window is not None
    back = session.window.inverse()
    inside = [_mapped(back, x, y) for x, y, _ in session.clicks]
    found = mask_bounds(session.logits > 0, inside)
    if found is None:
        x, y, _ = session.clicks[-1]
        reach = 0.15 * max(session.height, session.width)
        found = x - reach, y - reach, x + reach, y + reach
    else:
        forth = session.window.matrix()
        found = (*_mapped(forth, *found[:2]), *_mapped(forth, *found[2:]))
    return _shaken(around(_with_points(found, session.clicks), margin, least), rng)


def _with_points(
    bounds: tuple[float, ...], clicks: Sequence[tuple[float, float, bool]]
) -> tuple[float, float, float, float]:
    xs, ys = [bounds[0], bounds[2], *(c[0] for c in clicks)], [bounds[1], bounds[3], *(c[1] for c in clicks)]
    return min(xs), min(ys), max(xs), max(ys)


def _shaken(window: Window, rng: np.random.Generator) -> Window:
    dx, dy = rng.uniform(-0.06, 0.06, 2)
    return Window(window.cx + dx * window.w, window.cy + dy * window.h, window.w, window.h)


def _scene(case: Case, rng: np.random.Generator) -> tuple[Array, float, float]:
    """Scene point -> case pixel, and the scene's height and width: turned, flipped, scaled, cut around the target."""
    height, width = case.size
    turn = float(rng.normal(0, 0.2)) if rng.random() < 0.6 else 0.0
    if rng.random() < 0.25:
        turn += float(rng.integers(4)) * np.pi / 2
    flip = -1.0 if rng.random() < 0.4 else 1.0
    stretch = float(np.exp(rng.normal(0, 0.1)))
    linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.diag(
        [flip * stretch, 1 / stretch]
    )
    inverse = np.linalg.inv(linear)
    corners = np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]], np.float64)
    full, target = corners @ inverse.T, case.hull @ inverse.T
    low, high = full.min(0), full.max(0)
    if rng.random() < 0.6:  # cut away what is not needed, more or less of it
        keep = target.max(0) - target.min(0) + 8
        share = rng.uniform(0.35, 1.0, 2)
        size = np.maximum(share * (high - low), np.minimum(1.2 * keep, high - low))
        first = np.maximum(low, np.minimum(target.max(0) - size + 4, high - size))
        last = np.minimum(np.maximum(target.min(0) - 4, first), np.maximum(first, high - size))
        low = first + rng.random(2) * (last - first)
        high = low + size
    matrix = np.hstack([linear, (linear @ low)[:, None]])
    return matrix, float(high[1] - low[1] + 1), float(high[0] - low[0] + 1)


def _look(case: Case, rng: np.random.Generator) -> Look:
    channels = 3
    levels = np.linspace(0, 1, 256)
    invert = rng.random() < (0.25 if case.image[0].ndim == 2 else 0.06)
    tables = np.empty((1, 256, channels), np.uint8)
    shared = float(np.exp(rng.normal(0, 0.3)))
    order = rng.permutation(3) if rng.random() < 0.15 else np.arange(3)
    spread = 0.12 if rng.random() < 0.6 else 0.0
    bend = rng.normal(0, 0.04) if rng.random() < 0.5 else 0.0
    for channel in range(channels):
        curve = levels ** (shared * float(np.exp(rng.normal(0, spread) if spread else 0.0)))
        curve = curve + bend * np.sin(2 * np.pi * levels)
        gain = 1 + rng.normal(0, spread) if spread else 1.0
        curve = curve * gain
        tables[0, :, order[channel]] = np.clip((1 - curve if invert else curve) * 255, 0, 255)
    noise = float(rng.uniform(1, 14)) if rng.random() < 0.3 else 0.0
    blur = float(rng.uniform(0.4, 1.3)) if rng.random() < 0.2 else 0.0
    return Look(tables, noise, blur, bool(rng.random() < 0.15))


def _jittered(bounds: tuple[float, float, float, float], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """The tight box in 2 of 5 cases; otherwise each edge moves by up to 2 pixels and a tenth of the box."""
    x1, y1, x2, y2 = bounds
    if rng.random() < 0.4:
        return bounds
    w, h = x2 - x1 + 1, y2 - y1 + 1
    strength = float(rng.uniform(0, 0.1))
    moves = rng.uniform(-1, 1, 4) * strength * np.array([w, h, w, h]) + rng.uniform(-1, 1, 4) * min(
        2.0, 0.05 * min(w, h)
    )
    x1, y1, x2, y2 = x1 + moves[0], y1 + moves[1], x2 + moves[2], y2 + moves[3]
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _first_click(
    session: Session, bounds: tuple[float, float, float, float], rng: np.random.Generator
) -> tuple[float, float, bool]:
    """A positive click: the centre of the target's largest piece in 3 of 5 cases, else any of its pixels."""
    window = around(bounds, 1.1, 4.0)
    target = sample(session.case.target, compose(window.matrix(), session.scene)) > 127
    if not target.any():
        return (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2, True
    x, y = _largest_centre(target) if rng.random() < 0.6 else _any_pixel(target, rng)
    return (*_mapped(window.matrix(), x, y), True)


def _largest_centre(target: Mask) -> tuple[int, int]:
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(target.view(np.uint8), connectivity=8)
    return centre(labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())) if count > 2 else centre(target)


def _to_scene(session: Session, points: Array) -> Array:
    inverse = np.linalg.inv(session.scene[:, :2])
    return (points - session.scene[:, 2]) @ inverse.T


def _mapped(matrix: Array, x: float, y: float) -> tuple[float, float]:
    return (
        float(matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]),
        float(matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]),
    )
