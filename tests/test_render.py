"""Pictures: the overlay's exact pixels, what the privileged view colours, prompts, contours and filmstrips."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_gym.episodes import encode_mask
from medseg_gym.filmstrip import (
    Panel,
    Region,
    action_text,
    episode_panels,
    filmstrip,
    focus,
    in_force,
    signed,
    write_png,
)
from medseg_gym.frames import Letterbox
from medseg_gym.render import (
    BOX,
    CAUGHT,
    MISSED,
    NEGATIVE,
    POSITIVE,
    SPILLED,
    TARGET,
    Overlay,
    contours,
    draw_contour,
    draw_prompts,
    frame,
    oracle_view,
    tint,
)
from medseg_gym.types import Box, Click, Episode, Sample, Stop, Turn, Undo, Unreadable

SHAPES = [(1, 1), (1, 300), (300, 1), (37, 64), (200, 200), (3000, 4096)]


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def square(side: int = 100, low: int = 30, high: int = 70) -> np.ndarray:
    mask = np.zeros((side, side), np.bool_)
    mask[low:high, low:high] = True
    return mask


def near(pixel: np.ndarray, colour: tuple[int, int, int], within: int = 12) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() <= within)


def test_overlay_mixes_half_green_into_the_mask_and_nothing_else():
    view = Overlay(grey(4, 4, 101), 4).draw(square(4, 1, 3))
    # (101 + 0) / 2 = 50.5 and (101 + 255) / 2 = 178; halves go up
    assert view[1, 1].tolist() == [51, 178, 51]
    assert view[0, 0].tolist() == [101, 101, 101]
    assert (view[square(4, 1, 3)] == [51, 178, 51]).all()
    assert (view[~square(4, 1, 3)] == 101).all()


def test_overlay_takes_the_other_papers_colour():
    view = Overlay(grey(2, 2, 100), 2, (34, 139, 34), 0.4).draw(np.ones((2, 2), np.bool_))
    # 60 + 13.6 = 73.6; 60 + 55.6 = 115.6
    assert view[0, 0].tolist() == [74, 116, 74]


def test_tint_rounds_exact_halves_up_for_every_value():
    # 0.6 * v + 0.4 * 255 hits no half, but 0.5 * v + 0.5 * 0 does for every odd v
    values = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, 2)
    assert tint(values, (0, 0, 0), 0.5)[0, :, 0].tolist() == [(v + 1) // 2 for v in range(256)]
    # in tenths: (3 v + 7 * 45 + 5) // 10
    assert tint(values, (45, 45, 45), 0.7)[0, :, 0].tolist() == [(3 * v + 7 * 45 + 5) // 10 for v in range(256)]


def test_tint_keeps_and_replaces_at_the_ends_and_refuses_more():
    view = grey(1, 1, 77)
    assert tint(view, (1, 2, 3), 0.0)[0, 0].tolist() == [77, 77, 77]
    assert tint(view, (1, 2, 3), 1.0)[0, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="0 to 1"):
        tint(view, (0, 0, 0), 1.5)


def test_overlay_gives_a_fresh_array_each_time_and_keeps_its_plain_view():
    overlay = Overlay(grey(8, 8), 8)
    first = overlay.draw(np.ones((8, 8), np.bool_))
    first[:] = 0
    assert (overlay.draw(np.zeros((8, 8), np.bool_)) == 100).all()
    assert not overlay.plain.flags.writeable
    assert overlay.draw(np.zeros((8, 8), np.bool_)).flags.writeable


def test_overlay_fills_a_given_array():
    out = np.zeros((2, 8, 8, 3), np.uint8)
    drawn = Overlay(grey(8, 8), 8).draw(square(8, 2, 6), out[1])
    assert drawn.base is out and not out[0].any()
    assert out[1, 3, 3].tolist() == [50, 178, 50] and out[1, 0, 0].tolist() == [100, 100, 100]


def test_overlay_accepts_a_read_only_image_and_mask():
    image, mask = grey(8, 8), square(8, 2, 6)
    image.flags.writeable = mask.flags.writeable = False
    assert Overlay(image, 8).draw(mask)[3, 3].tolist() == [50, 178, 50]
    assert (image == 100).all()


def test_overlay_leaves_the_padding_black():
    overlay = Overlay(grey(10, 20), 40)  # rows 10 to 29 of 40 hold the image
    view = overlay.draw(np.ones((10, 20), np.bool_))
    assert not view[:10].any() and not view[30:].any()
    assert (view[10:30] == [50, 178, 50]).all()
    assert overlay.view_mask(np.ones((10, 20), np.bool_)).sum() == 20 * 40


@pytest.mark.parametrize("shape", SHAPES)
def test_every_picture_takes_any_shape(shape):
    image, mask = grey(*shape), np.ones(shape, np.bool_)
    x, y = shape[1] - 1, shape[0] - 1
    prompts = (Box(0, 0, x, y), Click(0, 0), Click(x, y, False))
    for view in (
        Overlay(image, 64).draw(mask),
        oracle_view(image, mask, ~mask, 64),
        frame(image, mask, prompts, 64, target=mask),
    ):
        assert view.shape == (64, 64, 3) and view.dtype == np.uint8


def test_oracle_view_tells_caught_spilled_and_missed_apart():
    mask, target = np.array([[True, True, False, False]]), np.array([[True, False, True, False]])
    view = oracle_view(grey(1, 4, 0), mask, target, 4, alpha=1.0)
    row = view[Letterbox(1, 4, 4).content[1]]
    assert [tuple(p) for p in row.tolist()] == [CAUGHT, SPILLED, MISSED, (0, 0, 0)]


@pytest.mark.parametrize(
    "matrix",
    [  # Machado, Oliveira and Fernandes 2009: full protanopia, deuteranopia, tritanopia, on linear RGB
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ],
)
def test_the_error_colours_differ_with_any_colour_vision(matrix):
    colours = (np.array([CAUGHT, SPILLED, MISSED]) / 255) ** 2.2
    seen = np.clip(colours @ np.array(matrix).T, 0, 1) ** (1 / 2.2) * 255
    apart = [np.linalg.norm(seen[i] - seen[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(apart) > 60


@pytest.mark.parametrize("size", [256, 512])
def test_clicks_show_their_sign_where_they_were_given(size):
    view = draw_prompts(grey(size, size), [Click(60, 60), Click(180, 180, False)], Letterbox(size, size, size))
    # the signs' middle; at 256 a sign's arm is narrower than two pixels, so a little of the disc shines through
    assert near(view[60, 60], (255, 255, 255), 20) and near(view[180, 180], (255, 255, 255), 20)
    # off the sign's arms, inside the disc: a diagonal step of a third of the radius
    step = 3 if size == 256 else 4
    assert near(view[60 - step, 60 - step], POSITIVE, 30)
    assert near(view[180 - step, 180 - step], NEGATIVE, 30)
    # a plus has a vertical arm, a minus has none
    assert near(view[60 - 2, 60], (255, 255, 255), 80)
    assert not near(view[180 - 3, 180], (255, 255, 255), 80)


def test_only_the_newest_prompt_is_lit():
    letterbox = Letterbox(200, 200, 200)
    clicks = [Click(50, 100), Click(150, 100)]
    view = draw_prompts(grey(200, 200), clicks, letterbox).astype(int)
    spare = draw_prompts(grey(200, 200), clicks, letterbox, lit=False).astype(int)
    assert (spare[90:111, 30:46] == view[90:111, 30:46]).all()
    assert (spare[90:111, 135:143] != view[90:111, 135:143]).any()


def test_a_box_is_drawn_around_its_pixels_not_over_them():
    view = draw_prompts(grey(100, 100), [Box(40, 40, 59, 59), Click(90, 90)], Letterbox(100, 100, 100))
    assert (view[42:58, 42:58] == 100).all()
    assert near(view[50, 39], BOX, 5) and near(view[50, 60], BOX, 5)
    assert near(view[60, 50], BOX, 5)


def test_drawing_leaves_its_inputs_alone():
    view, mask = grey(64, 64), square(64, 20, 40)
    draw_prompts(view, [Box(3, 3, 30, 30), Click(5, 5)], Letterbox(64, 64, 64))
    draw_contour(view, mask, Letterbox(64, 64, 64))
    assert (view == 100).all() and mask.sum() == 400


def test_numbers_must_match_the_prompts():
    with pytest.raises(ValueError):
        draw_prompts(grey(8, 8), [Click(1, 1)], Letterbox(8, 8, 8), numbers=(1, 2))


def test_a_contour_runs_along_the_edge_only():
    view = draw_contour(grey(100, 100), square(), Letterbox(100, 100, 100))
    assert (view[45:55, 45:55] == 100).all() and (view[5:20, 5:20] == 100).all()
    on_edge = view[50, 28:33].astype(int)
    # the edge lies between two pixels, which share the line
    assert np.abs(on_edge - TARGET).max(1).min() < 70 and on_edge[:, 0].max() - on_edge[:, 2].min() > 120


def test_contours_lie_on_the_pixel_borders():
    # rows and columns 30 to 69: edges at 30 and 70 from the corner, so at 29.5 and 69.5 from pixel centres
    (loop,) = contours(square(), Letterbox(100, 100, 100))
    assert loop.min() == pytest.approx(29.5, abs=0.26) and loop.max() == pytest.approx(69.5, abs=0.26)


def test_contours_follow_holes_and_find_the_smallest_mask():
    ring = square() & ~square(100, 45, 55)
    assert len(contours(ring, Letterbox(100, 100, 100))) == 2
    assert contours(np.zeros((9, 9), np.bool_), Letterbox(9, 9, 64)) == []
    speck = np.zeros((3000, 4096), np.bool_)
    speck[7, 9] = True
    assert len(contours(speck, Letterbox(3000, 4096, 64))) == 1


def test_prompts_in_force_follow_replaced_boxes_and_undo():
    box, other, click = Box(0, 0, 5, 5), Box(1, 1, 4, 4), Click(2, 2)
    actions = [box, click, other, Unreadable("?"), Undo(), Undo(), Undo(), Undo(), click, Stop()]
    assert in_force(actions) == [
        ((box,), (1,)),
        ((box, click), (1, 2)),
        ((click, other), (2, 3)),
        ((click, other), (2, 3)),
        ((box, click), (1, 2)),
        ((box,), (1,)),
        ((), ()),
        ((), ()),
        ((click,), (9,)),
        ((click,), (9,)),
    ]


def test_focus_holds_everything_in_a_square():
    # extent 40 (30 to 69), 35 % wider on each side: 68, centred on 50
    assert focus((100, 100), [square()], ()) == Region(16, 16, 84, 84)
    # a click at (99, 0) stretches it over the image
    assert focus((100, 100), [square()], [Click(99, 0)]) == Region(0, 0, 100, 100)


def test_focus_stays_inside_and_never_below_a_sixth():
    assert focus((600, 600), (), [Click(0, 599)]) == Region(0, 500, 100, 600)
    assert focus((50, 600), [], ()) == Region(0, 0, 600, 50)
    assert focus((20, 600), (), [Box(300, 0, 301, 1)]) == Region(251, 0, 351, 20)


def test_a_region_shifts_and_holds_prompts():
    region = Region(10, 20, 30, 40)
    assert region.shift(Click(12, 25, False)) == Click(2, 5, False)
    assert region.shift(Box(10, 20, 29, 39)) == Box(0, 0, 19, 19)
    assert region.holds(Box(10, 20, 29, 39)) and region.holds(Click(29, 39))
    outside = (Box(10, 20, 30, 39), Box(10, 20, 29, 40), Click(9, 20), Click(10, 19))
    assert not any(region.holds(prompt) for prompt in outside)


@pytest.mark.parametrize(
    ("value", "text"), [(0.314, "+0.31"), (-0.05, "\N{MINUS SIGN}0.05"), (0.004, "0.00"), (-0.004, "0.00")]
)
def test_signed_numbers(value, text):
    assert signed(value) == text


def episode(ended="stopped", turns=2, start=None) -> tuple[Sample, Episode]:
    target = square()
    sample = Sample("k", grey(100, 100), target, "spleen", "spleen in CT", "p")
    played = (
        Turn(Click(50, 50), 0.5, {"gain": 0.51, "cost": -0.01, "format": 0.0}, True, encode_mask(square(100, 40, 60))),
        Turn(Stop(), 0.0, {}, False, encode_mask(square(100, 40, 60))),
    )[:turns]
    record = Episode(
        *("MedSeg-X-Stub-v0", "Stub:0", "clicks", 0, "k", "spleen", "spleen in CT", "p", 0, 5, "shaped"),
        turns=played,
        iou=(0.0, 0.25, 0.25)[: turns + 1],
        dice=(0.0, 0.4, 0.4)[: turns + 1],
        ended=ended,
        start=start,
    )
    return sample, record


def test_a_filmstrip_has_the_target_and_a_panel_a_turn():
    panels = episode_panels(*episode(), size=128)
    assert [(p.heading, p.value, p.notes) for p in panels] == [
        ("spleen", "target", ()),
        ("1  + click", "IoU 0.25", ("gain +0.51", "cost \N{MINUS SIGN}0.01")),
        ("2  stop", "IoU 0.25", ()),
    ]
    strip = filmstrip(panels, gap=10)
    assert strip.shape[1] == 10 + 3 * 138 and strip.shape[0] > 10 + 128
    assert (strip[10 : 10 + 128, 10 + 138 : 138 + 138] == panels[1].picture).all()


def test_a_given_start_mask_has_a_panel_of_its_own():
    panels = episode_panels(*episode(start=encode_mask(square(100, 35, 65))), size=64)
    assert [p.heading for p in panels] == ["spleen", "start", "1  + click", "2  stop"]
    assert (panels[1].picture != panels[0].picture).any()


def test_a_failed_episode_says_that_it_counts_nothing():
    assert episode_panels(*episode("failed", 0), size=64)[-1].notes == ("failed: counts 0",)
    assert episode_panels(*episode("unreadable", 1), size=64)[-1].notes[0] == "unreadable: counts 0"


def test_long_captions_are_shortened_to_their_panel():
    short = filmstrip([Panel(grey(96, 96), "x", "y")])
    assert filmstrip([Panel(grey(96, 96), "portal vein and splenic vein " * 9, "target")]).shape == short.shape


def test_a_filmstrip_needs_a_panel():
    with pytest.raises(ValueError, match="at least one panel"):
        filmstrip([])


def test_every_action_has_a_name():
    actions = (Click(0, 0), Click(0, 0, False), Box(0, 0, 1, 1), Stop(), Undo(), Unreadable("x"))
    assert [action_text(a) for a in actions] == ["+ click", "\N{MINUS SIGN} click", "box", "stop", "undo", "unreadable"]


def test_png_files_are_equal_for_equal_pictures(tmp_path):
    strip = filmstrip(episode_panels(*episode(), size=64))
    first, second = write_png(tmp_path / "a.png", strip), write_png(tmp_path / "b.png", strip)
    assert first.read_bytes() == second.read_bytes()
