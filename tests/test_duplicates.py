"""Near-duplicates across splits are found though resized, recompressed or brighter; mere likeness is not one."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from medseg_gym.datasets.duplicates import Pair, across_splits, signature
from medseg_gym.datasets.store import StoredImage


def scene(seed: int, side: int = 128) -> np.ndarray:
    """(side, side, 3) of smooth blobs."""
    small = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)


def jpeg(image: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=60)
    return np.asarray(Image.open(stream))


def find(*images: tuple[str, np.ndarray]) -> list[tuple[str, str]]:
    stored = [StoredImage(f"D/{i}", str(i), split, pixels) for i, (split, pixels) in enumerate(images)]
    return [(pair.one, pair.other) for pair in across_splits(stored, len(stored))]


@pytest.mark.parametrize(
    "copy",
    [
        lambda image: image,
        jpeg,
        lambda image: cv2.resize(image, (90, 70), interpolation=cv2.INTER_AREA),
        lambda image: cv2.resize(image, (300, 300), interpolation=cv2.INTER_LINEAR),
        lambda image: (image * 0.7 + 20).astype(np.uint8),
        lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None],
    ],
)
def test_copies_in_another_split_are_found(copy) -> None:  # type: ignore[no-untyped-def]
    assert find(("train", scene(1)), ("train", scene(2)), ("test", copy(scene(1)))) == [("D/0", "D/2")]


def test_copies_in_the_same_split_are_not_told() -> None:
    assert find(("train", scene(1)), ("train", scene(1)), ("val", scene(2))) == []


def test_all_three_splits_are_compared() -> None:
    pairs = find(("test", scene(1)), ("train", scene(1)), ("val", scene(1)))
    assert sorted(pairs) == [("D/1", "D/0"), ("D/1", "D/2"), ("D/2", "D/0")]


def test_images_without_contrast_are_like_no_other() -> None:
    black = np.zeros((50, 50, 1), np.uint8)
    assert find(("train", black), ("test", black), ("test", black + 1)) == []
    assert not signature(black).any()
    speck = black.copy()
    speck[10:20, 10:20] = 2  # nearly black is not contrast either
    assert find(("train", speck), ("test", speck)) == []


def test_another_scene_or_a_moved_one_is_no_duplicate() -> None:
    moved = np.roll(scene(1), 16, axis=1)
    mirrored = np.ascontiguousarray(scene(1)[:, ::-1])
    assert find(("train", scene(1)), ("test", scene(2)), ("test", moved), ("test", mirrored)) == []
    mixed = (0.8 * scene(1) + 0.2 * scene(2)).astype(np.uint8)  # correlation about .8 / (.64 + .04) ** .5 = .97
    assert find(("train", scene(1)), ("test", mixed)) == []


def test_a_pair_tells_both_sides_and_the_progress_counts() -> None:
    stored = [StoredImage("D/a", "a", "test", scene(3)), StoredImage("D/b", "b", "train", scene(3))]
    seen: list[tuple[int, int]] = []
    pairs = across_splits(stored, 2, lambda done, total: seen.append((done, total)))
    assert pairs == (Pair("D/b", "train", "D/a", "test", 1.0),)
    assert seen == [(1, 2), (2, 2)]
    assert across_splits([], 0) == ()
