"""Targets nobody drew: Phantom's scenes, regions of like colour in real images, and shapes laid over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.tools.nano_train.cases import Case, hull_of, make_case
from medseg_gym.types import Mask


def phantom_cases(count: int, seed: int) -> list[Case]:
    """One random structure each of `count` of Phantom's training images, of any difficulty, 192 or 256 pixels."""
    from medseg_gym.datasets.phantom import Phantom

    rng = np.random.default_rng([seed, 1])
    worlds = [Phantom(size=size, difficulty=d, seed=seed) for size in (192, 256) for d in (0.3, 0.6, 0.9)]
    cases: list[Case] = []
    keys = worlds[0].keys("train")
    while len(cases) < count:
        world = worlds[int(rng.integers(len(worlds)))]
        sample = world[keys[int(rng.integers(len(keys)))]]
        case = make_case("Phantom", sample.key, sample.image, sample.target)
        if case is not None:
            cases.append(case)
    return cases


def derived_cases(real: Sequence[Case], count: int, seed: int) -> list[Case]:
    """`count` cases on real images: half regions of like colour, half shapes whose inside was altered."""
    rng = np.random.default_rng([seed, 2])
    cases: list[Case] = []
    while len(cases) < count:
        base = real[int(rng.integers(len(real)))]
        made = region_case(base, rng) if len(cases) % 2 else shape_case(base, rng)
        if made is not None:
            cases.append(made)
    return cases


def blob(rng: np.random.Generator, height: int, width: int, size: float) -> Mask:
    """A random (H, W) shape about `size` pixels across: an ellipse whose outline waves; may leave the image."""
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = np.ones_like(angles)
    for order in range(2, 7):
        radius += rng.normal(0, 0.35 / order) * np.cos(order * angles + rng.uniform(0, 2 * np.pi))
    radius = np.clip(radius, 0.25, 2) * size / 2
    stretch, turn = rng.uniform(0.45, 1.0), rng.uniform(0, 2 * np.pi)
    x, y = radius * np.cos(angles), radius * np.sin(angles) * stretch
    cx, cy = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height
    points = np.stack([cx + x * np.cos(turn) - y * np.sin(turn), cy + x * np.sin(turn) + y * np.cos(turn)], 1)
    return _filled(points, height, width)


def _filled(points: NDArray[Any], height: int, width: int) -> Mask:
    import cv2

    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], 1)
    return canvas.view(np.bool_)


def shape_case(base: Case, rng: np.random.Generator) -> Case | None:
    """A shape whose inside is another image's texture, or is brighter, darker or blurred; its edge is soft."""
    import cv2

    level = min(1, len(base.image) - 1) if max(base.size) > 300 else 0
    image = base.image[level]
    height, width = image.shape[:2]
    mask = blob(rng, height, width, float(np.exp(rng.uniform(np.log(0.05), np.log(0.6)))) * max(height, width))
    if mask.sum() < 30:
        return None
    alpha = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), float(rng.uniform(0.4, 1.6)))
    alpha = alpha if image.ndim == 2 else alpha[..., None]
    pixels = image.astype(np.float32)
    kind = rng.integers(3)
    if kind == 0:  # a shift of the grey level or colour
        shift = rng.uniform(12, 70) * rng.choice([-1, 1]) * (1 if image.ndim == 2 else rng.uniform(0.3, 1, 3))
        inner = pixels + shift
    elif kind == 1:  # the texture of elsewhere
        inner = np.roll(pixels, (int(rng.integers(height)), int(rng.integers(width))), (0, 1))[::-1]
        inner = inner * rng.uniform(0.6, 1.2) + rng.uniform(-30, 30)
    else:  # nearly flat
        inner = 0.35 * cv2.GaussianBlur(pixels, (0, 0), 3) + rng.uniform(0, 255) * 0.65 + rng.normal(0, 8, pixels.shape)
    mixed = np.clip(pixels + alpha * (inner - pixels), 0, 255).astype(np.uint8)
    return make_case("shape", base.name, mixed, mask)


def region_case(base: Case, rng: np.random.Generator) -> Case | None:
    """What a flood reaches from a random pixel of the smoothed image, holes closed; None where that is no object."""
    import cv2

    level = min(1, len(base.image) - 1) if max(base.size) > 300 else 0
    image = base.image[level]
    height, width = image.shape[:2]
    smooth = cv2.medianBlur(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.6, 2))), 5)
    around = np.zeros((height + 2, width + 2), np.uint8)
    tolerance = (float(rng.uniform(3, 18)),) * 3
    seed = int(rng.integers(width)), int(rng.integers(height))
    cv2.floodFill(
        smooth, around, seed, 0, tolerance, tolerance, 8 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE
    )
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    region = cv2.morphologyEx(around[1:-1, 1:-1], cv2.MORPH_CLOSE, kernel)
    region = cv2.morphologyEx(region, cv2.MORPH_OPEN, kernel)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(region)
    if count < 2:
        return None
    best = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    mask = labels == best
    area, spanned = int(mask.sum()), int(stats[best, cv2.CC_STAT_WIDTH] * stats[best, cv2.CC_STAT_HEIGHT])
    hull = hull_of(mask)
    solid = area / max(1.0, cv2.contourArea(hull.astype(np.float32)))
    if not 60 <= area <= 0.35 * height * width or area < 0.3 * spanned or solid < 0.6:
        return None
    return make_case("region", base.name, image, mask)
