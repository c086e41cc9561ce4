"""The coordinate conversions: exact where they promise to be, bounded elsewhere, inside always."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medseg_gym.frames import GRID, Grid, Letterbox, ToolFrame
from medseg_gym.types import Action, Box, Click, Stop, Undo

sides = st.one_of(st.integers(1, 40), st.integers(1, 5000))
sizes = st.sampled_from((8, 64, 84, 255, 256, 512))
properties = settings(deadline=None, derandomize=True, max_examples=300)


def pixel(data: st.DataObject, height: int, width: int) -> tuple[int, int]:
    """Any pixel, the corners more often."""
    x = data.draw(st.one_of(st.sampled_from((0, width - 1)), st.integers(0, width - 1)))
    y = data.draw(st.one_of(st.sampled_from((0, height - 1)), st.integers(0, height - 1)))
    return x, y


def test_grid_by_hand() -> None:
    """A 4 x 8 image: side 8, two padded rows above. Pixel (3, 1) is the square's (3, 3): 3.5 / 8 of 1000 is 437.5."""
    grid = Grid(4, 8)
    assert (grid.side, grid.pad_x, grid.pad_y) == (8, 0, 2)
    assert grid.from_pixel(3, 1) == (437, 437)
    assert grid.to_pixel(437, 437) == (3, 1)
    assert grid.to_pixel(500, 500) == (4, 2)
    assert grid.to_pixel(0, 0) == (0, 0)  # in the padding: the nearest row of the image
    assert grid.to_pixel(999, 999) == (7, 3)


def test_odd_padding_puts_the_spare_pixel_after_the_image() -> None:
    assert Grid(5, 2).pad_x == 1
    assert Grid(2, 5).pad_y == 1


@properties
@given(sides, sides, st.data())
def test_pixel_to_grid_to_pixel(height: int, width: int, data: st.DataObject) -> None:
    grid = Grid(height, width)
    x, y = pixel(data, height, width)
    gx, gy = grid.from_pixel(x, y)
    assert 0 <= gx < GRID
    assert 0 <= gy < GRID
    back = grid.to_pixel(gx, gy)
    if grid.side <= 1000:
        assert back == (x, y)
    else:
        assert max(abs(back[0] - x), abs(back[1] - y)) < grid.side / 1000


@properties
@given(sides, sides, st.integers(0, 999), st.integers(0, 999))
def test_every_grid_position_is_a_pixel_of_the_image(height: int, width: int, gx: int, gy: int) -> None:
    x, y = Grid(height, width).to_pixel(gx, gy)
    assert 0 <= x < width
    assert 0 <= y < height


@properties
@given(sides, sides, st.data())
def test_snap_is_idempotent_and_valid(height: int, width: int, data: st.DataObject) -> None:
    grid = Grid(height, width)
    anywhere = st.integers(-20, max(height, width) + 20)
    x1, y1, x2, y2 = (data.draw(anywhere) for _ in range(4))
    click = grid.snap(Click(x1, y1, data.draw(st.booleans())))
    box = grid.snap(Box(x1, y1, x2, y2))
    assert isinstance(click, Click)
    assert isinstance(box, Box)
    assert grid.snap(click) == click
    assert grid.snap(box) == box
    assert 0 <= click.x < width
    assert 0 <= click.y < height
    assert 0 <= box.x1 <= box.x2 < width
    assert 0 <= box.y1 <= box.y2 < height


@properties
@given(sides, sides, st.integers(0, 999), st.integers(0, 999))
@example(1, 5000, 0, 0)
def test_what_the_grid_decodes_it_encodes_again(height: int, width: int, gx: int, gy: int) -> None:
    """decode then snap: a position in the padding is clamped, and from there on stays."""
    grid = Grid(height, width)
    snapped = grid.snap(Click(*grid.to_pixel(gx, gy)))
    assert isinstance(snapped, Click)
    assert grid.to_pixel(*grid.from_pixel(snapped.x, snapped.y)) == (snapped.x, snapped.y)


@pytest.mark.parametrize("action", [Stop(), Undo()])
def test_snap_leaves_actions_without_pixels(action: Action) -> None:
    assert Grid(10, 10).snap(action) == action


def test_snap_keeps_the_sign_and_a_small_images_pixels() -> None:
    assert Grid(600, 800).snap(Click(799, 0, False)) == Click(799, 0, False)
    assert Grid(600, 800).snap(Box(3, 5, 3, 5)) == Box(3, 5, 3, 5)


def test_clicks_outside_are_clamped() -> None:
    assert Grid(10, 20).snap(Click(-3, 99)) == Click(0, 9)


def test_numpy_coordinates_come_out_as_python_numbers() -> None:
    snapped = Grid(10, 20).snap(Click(int(np.int64(3)), np.int64(4)))  # type: ignore[arg-type]
    assert isinstance(snapped, Click)
    assert {type(snapped.x), type(snapped.y)} == {int}


def test_tool_frame_by_hand() -> None:
    """512 rows and 256 columns onto 1024 x 1024: rows double, columns quadruple."""
    frame = ToolFrame(512, 256, 1024)
    assert frame.to_tool(10, 10) == (40, 20)
    assert frame.from_tool(40, 20) == (10, 10)


@properties
@given(sides, sides, sizes, st.floats(0, 5000), st.floats(0, 5000))
def test_tool_frame_inverts(height: int, width: int, size: int, x: float, y: float) -> None:
    frame = ToolFrame(height, width, size)
    assert frame.from_tool(*frame.to_tool(x, y)) == pytest.approx((x, y))
    tx, ty = frame.to_tool(x % width, y % height)
    assert 0 <= tx <= size
    assert 0 <= ty <= size


@properties
@given(sides, sides, sizes, st.data())
@example(1, 5000, 256, None)
@example(5000, 1, 256, None)
@example(1, 1, 256, None)
def test_letterbox_content_is_inside_and_inverts(
    height: int, width: int, size: int, data: st.DataObject | None
) -> None:
    box = Letterbox(height, width, size)
    left, top, w, h = box.content
    assert 0 <= left <= left + w <= size
    assert 0 <= top <= top + h <= size
    assert w >= 1
    assert h >= 1
    assert max(w, h) == size  # the longer side fills the view
    # centred, to a pixel for rounding and one more for an odd padding
    assert abs(left - (size - left - w)) <= 2 + size / max(height, width)
    assert abs(top - (size - top - h)) <= 2 + size / max(height, width)
    x, y = (0, 0) if data is None else pixel(data, height, width)
    vx, vy = box.to_view(x + 0.5, y + 0.5)
    assert left <= vx <= left + w
    assert top <= vy <= top + h
    assert box.from_view(vx, vy) == pytest.approx((x + 0.5, y + 0.5))


def test_letterbox_by_hand() -> None:
    """100 rows x 200 columns into 50 x 50: scale 1/4, the image takes rows 12 to 36 (padding of 50 becomes 12.5)."""
    box = Letterbox(100, 200, 50)
    assert box.scale == 0.25
    assert box.content == (0, 12, 50, 25)
    assert box.to_view(100, 50) == (25, 24.5)
    assert box.from_view(25, 24.5) == (100, 50)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 400), sizes)
@example(1, 5000, 64)
@example(5000, 1, 64)
def test_views_have_black_padding_and_full_content(height: int, width: int, size: int) -> None:
    box = Letterbox(height, width, size)
    left, top, w, h = box.content
    inside = np.zeros((size, size), np.bool_)
    inside[top : top + h, left : left + w] = True
    image = box.view_image(np.full((height, width, 3), 255, np.uint8))
    mask = box.view_mask(np.ones((height, width), np.bool_))
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert mask.dtype == np.bool_
    assert np.array_equal(image.min(2) == 255, inside)
    assert np.array_equal(image.max(2) == 0, ~inside)
    assert np.array_equal(mask, inside)


@pytest.mark.parametrize(
    ("height", "width", "size", "apart"),
    [(1024, 1024, 256, 0.18), (512, 512, 256, 0.3), (300, 400, 256, 0.1), (100, 80, 256, 0.1), (999, 640, 84, 0.1)],
)
def test_the_mask_view_lies_on_the_image_view(height: int, width: int, size: int, apart: float) -> None:
    """The centroid of a disc in the mask's view and in the image's: plain nearest neighbour would be .4 pixels off.

    By a factor of 4 (2) the nearest pixel itself is half a pixel, .125 (.25) view pixels, off the cell's centre.
    """
    rows, columns = np.mgrid[:height, :width]
    target = (rows - 0.55 * height) ** 2 + (columns - 0.4 * width) ** 2 < (0.3 * min(height, width)) ** 2
    box = Letterbox(height, width, size)
    weights = box.view_image(np.repeat(target[..., None], 3, 2).astype(np.uint8) * 255)[..., 0].astype(float)
    seen = box.view_mask(target)
    ys, xs = np.mgrid[:size, :size]
    for axis in (xs, ys):
        assert abs((axis * weights).sum() / weights.sum() - axis[seen].mean()) < apart
    expected = box.to_view(columns[target].mean() + 0.5, rows[target].mean() + 0.5)
    assert (xs[seen].mean() + 0.5, ys[seen].mean() + 0.5) == pytest.approx(expected, abs=0.6)


def test_views_of_the_same_size_are_the_image_itself() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (32, 32, 3), np.uint8), rng.random((32, 32)) < 0.5
    box = Letterbox(32, 32, 32)
    assert np.array_equal(box.view_image(image), image)
    assert np.array_equal(box.view_mask(mask), mask)
    assert box.view_image(image) is not image
