"""The oracle's geometry: against brute force on small masks, by hand on drawn ones, and at the edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg_gym import oracle
from medseg_gym.images import read_grey
from medseg_gym.metrics import iou
from medseg_gym.types import Box, Click, Mask


def drawn(*rows: str) -> Mask:
    return np.array([[char == "#" for char in row] for row in rows])


@st.composite
def mask_pairs(draw: st.DrawFn, side: int = 40) -> tuple[Mask, Mask]:
    """Blobby or speckled masks of one random size."""
    shape = draw(st.integers(1, side)), draw(st.integers(1, side))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    smooth = draw(st.sampled_from((0, 1, 3)))
    pair = []
    for _ in range(2):
        field = ndimage.gaussian_filter(rng.normal(size=shape), smooth)
        pair.append(field > np.quantile(field, draw(st.sampled_from((0.0, 0.3, 0.5, 0.9)))))
    return pair[0], pair[1]


def squared_depth(pixels: Mask) -> np.ndarray:
    """The reference: scipy's exact transform of the zero-padded mask."""
    return np.rint(ndimage.distance_transform_edt(np.pad(pixels, 1))[1:-1, 1:-1] ** 2).astype(np.int64)


def deepest(pixels: Mask, positive: bool) -> Click:
    y, x = np.unravel_index(int(squared_depth(pixels).argmax()), pixels.shape)
    return Click(int(x), int(y), positive)


def brute_clicks(mask: Mask, target: Mask) -> list[Click]:
    """Every component's deepest pixel, sorted by area, missed first, then first pixel."""
    found = []
    for spilled, pixels in enumerate((target & ~mask, mask & ~target)):
        labels, n = ndimage.label(pixels, np.ones((3, 3)))
        for label in range(1, n + 1):
            piece = labels == label
            key = (-int(piece.sum()), spilled, int(np.flatnonzero(piece)[0]))
            found.append((key, deepest(piece, not spilled)))
    return [click for _, click in sorted(found, key=lambda pair: pair[0])]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(mask_pairs())
def test_error_clicks_equal_brute_force(pair: tuple[Mask, Mask]) -> None:
    expected = brute_clicks(*pair)
    assert list(oracle.error_clicks(*pair)) == expected
    assert oracle.error_click(*pair) == (expected[0] if expected else None)
    assert oracle.error_click(*pair, rank=len(expected)) is None
    if expected:
        assert oracle.error_click(*pair, rank=len(expected) // 2) == expected[len(expected) // 2]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(mask_pairs())
def test_greedy_click_equals_brute_force(pair: tuple[Mask, Mask]) -> None:
    mask, target = pair
    missed, spilled = squared_depth(target & ~mask), squared_depth(mask & ~target)
    if max(missed.max(), spilled.max()) == 0:
        expected = None
    elif missed.max() >= spilled.max():
        expected = deepest(target & ~mask, True)
    else:
        expected = deepest(mask & ~target, False)
    assert oracle.greedy_click(mask, target) == expected


@pytest.mark.parametrize("shape", ["disc", "bar", "frame", "image", "holes"])
def test_large_regions_have_their_exact_centre(shape: str) -> None:
    """Where the candidates of the chamfer transform are many and have to be pruned."""
    rows, columns = np.mgrid[:300, :260]
    target = {
        "disc": ((rows - 140) / 130) ** 2 + ((columns - 120) / 90) ** 2 <= 1,
        "bar": (rows > 20) & (rows < 281) & (columns > 99) & (columns < 140),
        "frame": (np.abs(rows - 150) > 100) | (np.abs(columns - 130) > 80),
        "image": rows >= 0,
        "holes": (rows % 97 > 0) | (columns % 89 > 0),
    }[shape]
    assert oracle.centre_click(target) == deepest(target, True)
    assert oracle.greedy_click(np.zeros_like(target), target) == deepest(target, True)


def test_missed_and_spilled_are_the_two_differences() -> None:
    missed, spilled = oracle.missed_spilled(drawn("##.."), drawn(".##."))
    assert np.array_equal(missed, drawn("..#."))
    assert np.array_equal(spilled, drawn("#..."))


def test_masks_of_different_images_raise() -> None:
    with pytest.raises(ValueError, match=r"mask is \(2, 3\), target is \(3, 2\)"):
        oracle.error_click(np.zeros((2, 3), np.bool_), np.zeros((3, 2), np.bool_))


def test_box_is_tight_and_inclusive() -> None:
    assert oracle.target_box(drawn(".....", "..#..", ".##..", ".....")) == Box(1, 1, 2, 2)


def test_box_and_clicks_of_nothing_are_none() -> None:
    nothing = np.zeros((5, 4), np.bool_)
    assert oracle.target_box(nothing) is None
    assert oracle.centre_click(nothing) is None
    assert oracle.error_click(nothing, nothing) is None
    assert oracle.greedy_click(nothing, nothing) is None
    assert list(oracle.error_clicks(nothing, nothing)) == []


def test_one_pixel_image() -> None:
    full, empty = np.ones((1, 1), np.bool_), np.zeros((1, 1), np.bool_)
    assert oracle.target_box(full) == Box(0, 0, 0, 0)
    assert oracle.centre_click(full) == Click(0, 0, True)
    assert oracle.error_click(empty, full) == Click(0, 0, True)
    assert oracle.error_click(full, empty) == Click(0, 0, False)


def test_the_image_border_is_an_outside() -> None:
    """A full 5 x 7 image: depth 3 along the middle row's columns 2 to 4; unpadded it would have no depth at all."""
    assert oracle.centre_click(np.ones((5, 7), np.bool_)) == Click(2, 2, True)


def test_centre_is_of_the_largest_region_not_of_all() -> None:
    """The 3 x 3 square (9 pixels) is deeper, the 1 x 10 line is larger."""
    target = drawn("###........", "###........", "###........", "...........", "##########.")
    assert oracle.centre_click(target) == Click(0, 4, True)


def test_regions_touching_at_a_corner_are_one() -> None:
    (region,) = oracle.error_regions(np.zeros((2, 2), np.bool_), drawn("#.", ".#"))
    assert region.area == 2


def test_of_equal_areas_missed_comes_first_then_row_by_row() -> None:
    mask = drawn("##......", "........", "........")
    target = drawn(".....##.", "........", "##......")
    assert list(oracle.error_clicks(mask, target)) == [Click(5, 0, True), Click(0, 2, True), Click(0, 0, False)]


def test_ties_go_by_the_first_pixel_not_by_opencvs_labels() -> None:
    """OpenCV labels by blocks of two rows, so the left region, a row lower, has the smaller label there."""
    target = drawn("..##", "#...", "#...")
    assert list(oracle.error_clicks(np.zeros_like(target), target)) == [Click(2, 0, True), Click(0, 1, True)]


def test_positive_in_missed_negative_in_spilled() -> None:
    target = drawn("#####...", "#####...", "#####...")
    assert oracle.error_click(np.zeros_like(target), target) == Click(1, 1, True)
    assert oracle.error_click(np.ones_like(target), target) == Click(6, 1, False)


def test_the_error_clicks_by_area_and_the_greedy_ones_by_depth_differ() -> None:
    """Missed: a line of 10. Spilled: a square of 9, which is deeper."""
    target = drawn("##########", "..........", "..........", "..........", "..........")
    mask = drawn("..........", "..........", "###.......", "###.......", "###.......")
    assert oracle.error_click(mask, target) == Click(0, 0, True)
    assert oracle.greedy_click(mask, target) == Click(1, 3, False)


def test_equal_depths_go_to_missed() -> None:
    assert oracle.greedy_click(drawn("#..."), drawn("...#")) == Click(3, 0, True)


def test_further_maxima_lie_in_the_same_region_outside_the_earlier_discs() -> None:
    """Two 5 x 5 squares joined by a bridge: centres (2, 2) and (9, 2), of depth 3."""
    target = drawn("#####..#####", "#####..#####", "############", "#####..#####", "#####..#####")
    first, second, third = oracle.error_clicks(np.zeros_like(target), target, maxima=3)
    assert (first, second) == (Click(2, 2, True), Click(9, 2, True))
    assert target[third.y, third.x]
    assert third not in (first, second)


def test_further_maxima_keep_clear_of_the_first_ones_disc() -> None:
    """A 7 x 7 square: the disc about its middle (depth 4) leaves the corners only, at a distance of 3 root 2."""
    target = np.ones((7, 7), np.bool_)
    clicks = oracle.error_clicks(np.zeros_like(target), target, maxima=9)
    assert [(click.x, click.y) for click in clicks] == [(3, 3), (0, 0), (6, 0), (0, 6), (6, 6)]


def test_further_maxima_run_out() -> None:
    assert list(oracle.error_clicks(drawn("..."), drawn(".#."), maxima=9)) == [Click(1, 0, True)]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(mask_pairs())
def test_iou_after_repair_is_the_iou_of_the_repaired_mask(pair: tuple[Mask, Mask]) -> None:
    mask, target = pair
    for region in oracle.error_regions(mask, target):
        repaired = mask.copy()
        height, width = region.pixels.shape
        repaired[region.y : region.y + height, region.x : region.x + width][region.pixels] = region.positive
        assert int(np.count_nonzero(repaired != mask)) == region.area
        assert oracle.iou_after_repair(mask, target, region) == pytest.approx(iou(repaired, target))


def test_masks_need_not_be_contiguous_or_writable() -> None:
    wide = np.zeros((40, 60), np.bool_)
    wide[5:21, 10:31] = True
    strided = wide[::2, ::2]
    strided.flags.writeable = False
    copy = np.ascontiguousarray(strided)
    assert oracle.target_box(strided) == oracle.target_box(copy) == Box(5, 3, 15, 10)
    assert oracle.centre_click(strided.T) == oracle.centre_click(np.ascontiguousarray(copy.T))
    assert strided.sum() == 8 * 11


def test_coordinates_are_python_numbers() -> None:
    target = drawn(".....", ".###.", ".....")
    click = oracle.error_click(np.zeros_like(target), target)
    box = oracle.target_box(target)
    assert click is not None
    assert box is not None
    assert {type(v) for v in (click.x, click.y, box.x1, box.y1, box.x2, box.y2)} == {int}
    assert type(click.positive) is bool


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data(), st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_jittered_prompts_stay_valid_and_inside(data: st.DataObject, height: int, width: int, seed: int) -> None:
    xs = sorted(data.draw(st.lists(st.integers(0, width - 1), min_size=2, max_size=2)))
    ys = sorted(data.draw(st.lists(st.integers(0, height - 1), min_size=2, max_size=2)))
    box = Box(xs[0], ys[0], xs[1], ys[1])
    low = data.draw(st.floats(0, 5))
    rng = np.random.default_rng(seed)
    for moved in (
        oracle.jitter_box(box, rng, (height, width), pixels=(low, low + 70)),
        oracle.jitter_box(box, rng, (height, width), relative=(0.1, 2.0)),
    ):
        assert 0 <= moved.x1 <= moved.x2 < width
        assert 0 <= moved.y1 <= moved.y2 < height
    click = oracle.jitter_click(Click(xs[0], ys[0], False), rng, (height, width), pixels=(low, low + 70))
    assert 0 <= click.x < width
    assert 0 <= click.y < height
    assert not click.positive


def test_jitter_keeps_its_range() -> None:
    rng = np.random.default_rng(0)
    box, click = Box(100, 120, 199, 169), Click(100, 100)
    for _ in range(200):
        by_pixels = oracle.jitter_box(box, rng, (400, 400), pixels=(5, 20))
        by_side = oracle.jitter_box(box, rng, (400, 400), relative=(0.1, 0.1))
        moved = oracle.jitter_click(click, rng, (400, 400), pixels=(3, 8))
        edges = np.abs(np.subtract((by_pixels.x1, by_pixels.y1, by_pixels.x2, by_pixels.y2), (100, 120, 199, 169)))
        assert edges.min() >= 5
        assert edges.max() <= 20
        assert by_side.x1 in (90, 110)  # a tenth of 100 pixels
        assert by_side.y2 in (164, 174)  # a tenth of 50 pixels
        assert 3 <= abs(moved.x - 100) <= 8
        assert 3 <= abs(moved.y - 100) <= 8


def test_jitter_is_decided_by_the_generator_and_zero_moves_nothing() -> None:
    box, shape = Box(10, 10, 40, 30), (64, 64)
    twice = [oracle.jitter_box(box, np.random.default_rng(5), shape, pixels=(0, 9)) for _ in range(2)]
    assert twice[0] == twice[1] != box
    assert oracle.jitter_box(box, np.random.default_rng(5), shape, pixels=(0, 0)) == box
    assert oracle.jitter_click(Click(3, 4), np.random.default_rng(5), shape, pixels=(0, 0)) == Click(3, 4)


@pytest.mark.parametrize("bad", [(3, 2), (-1, 2), (0, float("nan")), (0, float("inf"))])
def test_a_jitter_range_that_is_none_raises(bad: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="wanted \\(low, high\\)"):
        oracle.jitter_click(Click(0, 0), np.random.default_rng(0), (5, 5), pixels=bad)
    with pytest.raises(ValueError, match="either pixels"):
        oracle.jitter_box(Box(0, 0, 1, 1), np.random.default_rng(0), (5, 5))


def test_real_targets_are_clicked_inside(samples: Path) -> None:
    masks = sorted(samples.glob("biomedparse/**/*mask*/*.png"))[:8]
    if not masks:
        pytest.skip("real samples not found: no biomedparse masks")
    for path in masks:
        target = read_grey(path) > 0
        click, box = oracle.centre_click(target), oracle.target_box(target)
        if not target.any():
            assert click is None
            continue
        assert click is not None
        assert box is not None
        assert target[click.y, click.x]
        labels, _ = ndimage.label(target, np.ones((3, 3)))
        largest = labels == np.argmax(np.bincount(labels[target]))
        assert squared_depth(largest)[click.y, click.x] == squared_depth(largest).max()
        assert box.x1 <= click.x <= box.x2
