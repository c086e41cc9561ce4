"""The cue task: four equal blocks, and the direction of the stripes behind them tells which one is the target."""

from __future__ import annotations

import numpy as np

from medseg_gym.datasets.phantoms.draw import Scene, frame, grey
from medseg_gym.types import Box

PLACES = ("top left", "top right", "bottom left", "bottom right")
ANGLES = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)  # of the stripes' normal, one a place
WAVES = 8  # stripes across the image


def cue_boxes(size: int = 64) -> tuple[Box, Box, Box, Box]:
    """The four places of a (size, size) cue image, in the order of PLACES; the target fills its box exactly."""
    side, low, high = size * 3 // 16, size * 5 // 32, size - size * 5 // 32 - size * 3 // 16
    corners = ((low, low), (high, low), (low, high), (high, high))
    a, b, c, d = (Box(left, top, left + side - 1, top + side - 1) for left, top in corners)
    return a, b, c, d


def answer(rng: np.random.Generator) -> int:
    """The place (0..3) of the scene this generator draws: its first number."""
    return int(rng.integers(4))


def render(rng: np.random.Generator, size: int, difficulty: float, absent: frozenset[str]) -> Scene:
    """Stripes all over, noise all over, four blocks of one grey: only the stripes' direction tells them apart.

    The phase varies by half a radian, so that the four classes are separable by a linear map of the pixels themselves,
    as of the image's spectrum. An absent target is a block that is not drawn.
    """
    place = answer(rng)
    x, y = frame(size)
    way = ANGLES[place]
    phase = rng.normal(0, 0.25)
    stripes = np.sin((x * np.cos(way) + y * np.sin(way)) * np.float32(np.pi * WAVES) + phase)
    values = 0.45 + (0.26 - 0.14 * difficulty) * rng.uniform(0.8, 1.0) * stripes
    tone = rng.uniform(0.78, 0.92)
    target = np.zeros((size, size), np.bool_)
    for k, box in enumerate(cue_boxes(size)):
        window = slice(box.y1, box.y2 + 1), slice(box.x1, box.x2 + 1)
        if k == place:
            if absent:
                continue
            target[window] = True
        values[window] = tone
    values = values + (0.02 + 0.10 * difficulty) * rng.standard_normal((size, size))
    return Scene(grey(values.astype(np.float32)), {"target": target}, None)
