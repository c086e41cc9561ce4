"""Finds images that are all but the same in different splits: resized, recompressed or brightened copies.

Each image becomes a grey picture of SIDE x SIDE pixels, zero mean and unit length, so that the product of two is their
correlation, and a product of matrices compares all with all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from medseg_gym.datasets.base import SPLITS
from medseg_gym.datasets.store import Store, StoredImage

SIDE = 32
LIKE = 0.995  # resizing, JPEG and brightness stay above; abdomen slices of two people reach .985 on BTCV
ROWS = 1024  # of the table of correlations at a time: 1024 x 50,000 float32 is 200 MB
MAX_PAIRS = 100_000


@dataclass(frozen=True, slots=True, order=True)
class Pair:
    """Two images of different splits that are all but the same."""

    one: str  # the beginning of its cases' keys
    one_split: str
    other: str
    other_split: str
    correlation: float


def near_duplicates(
    store: Store, progress: Callable[[int, int], None] | None = None, *, like: float = LIKE
) -> tuple[Pair, ...]:
    """Pairs of images across splits whose correlation is at least `like`; 10,000 images take about 15 s."""
    return across_splits(store.images(), store.image_count, progress, like=like)


def across_splits(
    images: Iterable[StoredImage],
    count: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    like: float = LIKE,
) -> tuple[Pair, ...]:
    """The same over any images. One without contrast is like no other."""
    keys: list[str] = []
    splits = np.zeros(count, np.int8)
    pictures = np.zeros((count, SIDE * SIDE), np.float32)
    for number, image in enumerate(images):
        keys.append(image.key)
        splits[number] = SPLITS.index(image.split)
        pictures[number] = signature(image.pixels)
        if progress is not None:
            progress(number + 1, count)
    pairs: list[Pair] = []
    for i, one in enumerate(SPLITS):
        for j in range(i + 1, len(SPLITS)):
            first, second = np.flatnonzero(splits == i), np.flatnonzero(splits == j)
            for a, b, correlation in _alike(pictures, first, second, like):
                pairs.append(Pair(keys[a], one, keys[b], SPLITS[j], correlation))
                if len(pairs) >= MAX_PAIRS:
                    return tuple(sorted(pairs))
    return tuple(sorted(pairs))


def signature(pixels: np.ndarray) -> np.ndarray:
    """The picture of an (H, W, 1) or (H, W, 3) image as a unit vector; zeros without half a grey level of contrast."""
    import cv2

    grey = pixels[..., 0] if pixels.shape[2] == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    flat = small.ravel() - small.mean()
    length = float(np.linalg.norm(flat))
    return flat / length if length > 0.5 * SIDE else np.zeros_like(flat)


def _alike(
    pictures: np.ndarray, first: np.ndarray, second: np.ndarray, like: float
) -> Iterator[tuple[int, int, float]]:
    """Numbers of two images, one of each side, and their correlation."""
    if not len(second):
        return
    others = pictures[second]
    for start in range(0, len(first), ROWS):
        rows = first[start : start + ROWS]
        table = pictures[rows] @ others.T
        for a, b in np.argwhere(table >= like):
            yield int(rows[a]), int(second[b]), round(float(table[a, b]), 4)
