"""Nano, the embedded tool: the protocol, its windows and prompt maps worked out by hand, and what bad weights tell."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medseg_gym import oracle, tools
from medseg_gym.datasets.phantom import Phantom
from medseg_gym.errors import BadDataError, WeightsMissingError
from medseg_gym.metrics import dice
from medseg_gym.tools import nano_maps as view
from medseg_gym.tools.base import advance, empty_state, given_state
from medseg_gym.tools.conformance import check_tool
from medseg_gym.tools.nano import SHA256, WEIGHTS, Nano, _pasted
from medseg_gym.types import Box, Click, Query, Sample


@pytest.fixture(scope="module")
def nano() -> Nano:
    return Nano()


def case(height: int, width: int) -> Sample:
    """A bright ellipse in the middle of a dark image."""
    rows, columns = np.mgrid[:height, :width]
    target = ((rows - height / 2) / (height / 4)) ** 2 + ((columns - width / 2) / (width / 5)) ** 2 <= 1
    image = np.full((height, width, 3), 50, np.uint8)
    image[target] = 190
    return Sample("case/1", image, target, "ellipse", "ellipse", "1")


def test_it_honours_the_protocol(nano: Nano) -> None:
    check_tool(nano)


def test_it_honours_the_protocol_in_batches() -> None:
    check_tool(Nano(max_batch=4), tolerance=1e-3)


def test_the_catalogue_loads_it_without_any_download(home: Path) -> None:
    assert tools.available("Nano")
    assert tools.load("Nano").name == "Nano"


def test_the_shipped_weights_are_small_and_half_precision() -> None:
    from safetensors import safe_open

    content = WEIGHTS.read_bytes()
    assert len(content) <= 8_000_000
    assert hashlib.sha256(content).hexdigest() == SHA256
    with safe_open(WEIGHTS, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert (WEIGHTS.parent / "NANO.md").is_file()


def test_it_outlines_a_bright_ellipse_in_its_box(nano: Nano) -> None:
    sample = case(192, 200)
    box = oracle.target_box(sample.target)
    assert box is not None
    state = advance(nano, [sample], [empty_state(sample)], [box])[0]
    assert dice(state.mask, sample.target) > 0.9


def test_boxes_and_clicks_outline_phantoms(nano: Nano) -> None:
    world = Phantom()
    samples = [world[key] for key in world.keys("test")[:24]]
    first, last, clicked = [], [], []
    for sample in samples:
        box = oracle.target_box(sample.target)
        assert box is not None
        state = advance(nano, [sample], [empty_state(sample)], [box])[0]
        first.append(dice(state.mask, sample.target))
        for _ in range(2):
            click = oracle.error_click(state.mask, sample.target)
            if click is not None:
                state = advance(nano, [sample], [state], [click])[0]
        last.append(dice(state.mask, sample.target))
        state = empty_state(sample)
        for _ in range(4):
            click = oracle.error_click(state.mask, sample.target)
            if click is not None:
                state = advance(nano, [sample], [state], [click])[0]
        clicked.append(dice(state.mask, sample.target))
    assert np.mean(first) > 0.8
    assert np.mean(clicked) > 0.6
    assert np.mean(last) > np.mean(first)


def test_a_clicks_own_pixel_has_the_clicks_sign(nano: Nano) -> None:
    rng = np.random.default_rng(0)
    sample = case(90, 130)
    embedding = nano.encode([sample.image])[0]
    for _ in range(10):
        spots = rng.choice(90 * 130, 4, replace=False)
        clicks = [Click(int(s % 130), int(s // 130), i % 2 == 0) for i, s in enumerate(spots)]
        logits = nano.predict([Query(embedding, tuple(clicks))])[0].logits
        assert all((logits[c.y, c.x] > 0) == c.positive for c in clicks)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (2000, 5), (3000, 4096)])
def test_any_size_of_image_is_answered(nano: Nano, size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 90, np.uint8)
    embedding = nano.encode([image])[0]
    box = Box(0, 0, size[1] - 1, size[0] // 2)
    for prompts in ((Click(size[1] // 2, size[0] // 2),), (box,)):
        prediction = nano.predict([Query(embedding, prompts)])[0]
        assert prediction.logits.shape == size and np.isfinite(prediction.logits).all()
        assert prediction.prior.shape == nano.prior_shape(*size)
        assert 0 <= prediction.predicted_iou <= 1


def test_the_prior_is_the_images_frame_at_most_512_pixels_a_side(nano: Nano) -> None:
    assert nano.prior_shape(300, 400) == (300, 400)
    assert nano.prior_shape(1024, 512) == (512, 256)
    assert nano.prior_shape(1, 5000) == (1, 512)


def test_a_given_mask_is_where_a_click_starts_from(nano: Nano) -> None:
    sample = case(192, 200)
    state = given_state(nano, sample.target)
    after = advance(nano, [sample], [state], [Click(100, 96)])[0]
    assert dice(after.mask, sample.target) > 0.9


def test_a_window_and_its_inverse_undo_each_other() -> None:
    window = view.Window(40, 25, 60, 30)
    both = view.compose(window.matrix(), window.inverse())
    assert np.allclose(both, [[1, 0, 0], [0, 1, 0]])
    # the window's middle, between its two middle pixels, is its centre
    assert np.allclose(window.matrix() @ np.array([47.5, 47.5, 1]), [40, 25])


def test_a_window_lies_around_what_is_prompted() -> None:
    window = view.around((10, 20, 29, 39), 1.5, 8)  # 20 x 20 pixels
    assert (window.cx, window.cy, window.w, window.h) == (19.5, 29.5, 30, 30)
    flat = view.around((0, 0, 99, 9), 1.0, 8)  # 100 x 10: at most twice as long as high
    assert (flat.w, flat.h) == (100, 50)
    dot = view.around((5, 5, 5, 5), 1.5, 8)
    assert (dot.w, dot.h) == (8, 8)


def test_bounds_hold_the_clicked_and_the_large_pieces() -> None:
    mask = np.zeros((40, 40), np.bool_)
    mask[5:15, 5:15] = True  # 100 pixels
    mask[30, 30] = True  # a speck
    assert view.mask_bounds(mask, []) == (5, 5, 14, 14)
    assert view.mask_bounds(mask, [(30, 30)]) == (5, 5, 30, 30)
    assert view.mask_bounds(np.zeros((4, 4), np.bool_), []) is None


def test_the_box_maps_hold_the_box_and_its_ellipse() -> None:
    pixels = np.zeros((view.SIDE, view.SIDE), np.uint8)
    seen = view.maps(pixels, (20, 30, 59, 69), [], None, 0.5)  # 40 x 40 pixels, centre (39.5, 49.5)
    assert (seen[6] > 0).sum() == 40 * 40
    assert seen[6, 30, 20] == 1 and seen[6, 29, 20] == -1
    assert seen[7, 49, 39] == pytest.approx(1 - np.hypot(0.5, 0.5) / 20)
    assert seen[7, 30, 20] < 0  # the box's corner lies outside the ellipse
    assert not seen[8:13].any()
    assert seen[13] == pytest.approx(-0.25)  # log2(1 / 2) / 4


def test_the_click_maps_peak_at_the_clicks() -> None:
    pixels = np.zeros((view.SIDE, view.SIDE), np.uint8)
    seen = view.maps(pixels, None, [(10, 20, True), (70, 80, False)], None, 1.0)
    assert seen[8, 20, 10] == seen[10, 80, 70] == 1
    assert seen[8, 20, 12] == pytest.approx(np.exp(-0.5))  # 2 pixels off: one sigma
    assert seen[9, 20, 20] == pytest.approx(np.exp(-0.5))  # 10 pixels off in the wide map
    assert not seen[6:8].any()


def test_colour_evidence_tells_the_boxed_colour_from_the_rest() -> None:
    pixels = np.full((view.SIDE, view.SIDE, 3), 40, np.uint8)
    pixels[30:70, 20:60] = (200, 30, 30)
    seen = view.maps(pixels, (20, 30, 59, 69), [], None, 1.0)
    for channel in (4, 5):
        assert seen[channel, 50, 40] > 0.5 > -0.5 > seen[channel, 5, 5]


def test_a_window_pasted_into_the_image_lies_where_it_was_taken(nano: Nano) -> None:
    sample = case(100, 120)
    query = Query(nano.encode([sample.image])[0], (Click(5, 5),))
    inside = np.full((view.SIDE, view.SIDE), 3, np.float32)
    logits = _pasted(query, view.Window(39.5, 49.5, 40, 20), inside, (100, 120))
    rows, columns = np.nonzero(logits > 0)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (20, 40, 59, 59)
    assert (logits[logits < 0] == view.OUTSIDE).all()


def test_missing_weights_say_which_file_which_checksum_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medseg_gym.tools.nano.WEIGHTS", tmp_path / "nano.safetensors")
    with pytest.raises(WeightsMissingError) as caught:
        Nano()
    told = str(caught.value)
    assert str(tmp_path / "nano.safetensors") in told and SHA256 in told and "pip install --force-reinstall" in told


def test_damaged_weights_say_which_file_which_checksum_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(WEIGHTS.read_bytes())
    content[-5] ^= 1
    (tmp_path / "nano.safetensors").write_bytes(content)
    monkeypatch.setattr("medseg_gym.tools.nano.WEIGHTS", tmp_path / "nano.safetensors")
    with pytest.raises(BadDataError) as caught:
        Nano()
    told = str(caught.value)
    assert str(tmp_path / "nano.safetensors") in told and SHA256 in told and "pip install --force-reinstall" in told
    assert hashlib.sha256(content).hexdigest() in told


def test_own_weights_need_no_checksum_and_foreign_files_are_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(WEIGHTS.read_bytes())
    assert Nano(weights=own).fingerprint == Nano().fingerprint
    own.write_bytes(b"not weights at all")
    with pytest.raises(BadDataError, match="holds no weights of Nano"):
        Nano(weights=own)
    with pytest.raises(WeightsMissingError, match="is not there"):
        Nano(weights=tmp_path / "none.safetensors")


def test_importing_the_tool_loads_no_torch() -> None:
    code = "import sys, medseg_gym.tools.nano; print('torch' in sys.modules, 'cv2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
