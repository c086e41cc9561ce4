"""GrabCut: boxes and clicks on pictures with a known answer, degenerate images, determinism; and real slices."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from medseg_gym.metrics import dice
from medseg_gym.tools.base import advance, empty_state, given_state
from medseg_gym.tools.grabcut import GrabCut, signed
from medseg_gym.tools.graphcut import colour_evidence, colours, minimum_cut
from medseg_gym.types import Box, Click, Image, Mask, MaskState, Prompt, Query, Sample


def disc(height: int, width: int, x: float, y: float, radius: float) -> Mask:
    rows, columns = np.ogrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def picture(mask: Mask, inside: int = 150, outside: int = 80, noise: float = 8) -> Image:
    rng = np.random.default_rng(0)
    grey = np.where(mask, inside, outside) + rng.normal(0, noise, mask.shape)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def outline(image: Image, *prompts: Prompt, start: Mask | None = None, tool: GrabCut | None = None) -> list[MaskState]:
    tool = tool or GrabCut()
    sample = Sample("s", image, np.zeros(image.shape[:2], np.bool_), "disc", "a disc", "1")
    states = [empty_state(sample) if start is None else given_state(tool, start)]
    for prompt in prompts:
        states += advance(tool, [sample], states[-1:], [prompt])
    return states


def test_a_box_around_a_disc_gives_the_disc() -> None:
    target = disc(120, 160, 70, 60, 25)
    mask = outline(picture(target), Box(45, 35, 95, 85))[-1].mask
    assert dice(mask, target) > 0.95


def test_a_box_follows_the_colours_where_the_ellipse_does_not() -> None:
    target = np.zeros((120, 160), np.bool_)
    target[30:90, 40:70] = target[60:90, 40:130] = True  # an L
    mask = outline(picture(target), Box(40, 30, 129, 89))[-1].mask
    rows, columns = np.ogrid[:120, :160]
    ellipse = ((columns - 84.5) / 45) ** 2 + ((rows - 59.5) / 30) ** 2 <= 1
    assert dice(mask, target) > dice(ellipse, target) + 0.1


def test_nothing_outside_the_box_is_taken() -> None:
    target = disc(120, 160, 70, 60, 40)
    mask = outline(picture(target), Box(60, 50, 80, 70))[-1].mask
    assert mask.any()
    mask = mask.copy()
    mask[50:71, 60:81] = False
    assert not mask.any()


def test_one_click_on_a_disc_gives_about_the_disc() -> None:
    target = disc(256, 256, 100, 120, 20)
    mask = outline(picture(target), Click(100, 120))[-1].mask
    assert dice(mask, target) > 0.85


def test_a_colour_image_is_parted_by_colour() -> None:
    target = disc(128, 128, 64, 64, 24)
    image = np.where(target[..., None], np.array([180, 80, 80]), np.array([80, 113, 150])).astype(np.uint8)
    assert dice(outline(image, Box(40, 40, 88, 88))[-1].mask, target) > 0.95


def test_positive_clicks_only_add_and_negative_clicks_only_remove() -> None:
    target = disc(128, 128, 64, 64, 30)
    states = outline(picture(target), Box(40, 40, 80, 80), Click(90, 64), Click(50, 50, False), Click(64, 64, False))
    box, more, less, least = (state.mask for state in states[1:])
    assert more[64, 90] and not box[64, 90] and (more & box).sum() == box.sum()
    assert not less[50, 50] and (less & more).sum() == less.sum() < more.sum()
    assert not least[64, 64] and (least & less).sum() == least.sum() < less.sum()


def test_a_negative_click_in_a_hole_removes_the_hole_only() -> None:
    hole = disc(160, 160, 80, 80, 10)
    target = disc(160, 160, 80, 80, 50) & ~hole
    image = np.where(hole[..., None], np.uint8(115), picture(target, noise=4))
    after = outline(image, Click(80, 80, False), start=disc(160, 160, 80, 80, 50))[-1].mask
    assert not after[80, 80] and dice(after, target) > 0.97


def test_a_click_that_the_mask_already_agrees_with_changes_nothing() -> None:
    states = outline(picture(disc(128, 128, 64, 64, 30)), Box(34, 34, 94, 94), Click(64, 64), Click(3, 3, False))
    assert np.array_equal(states[1].mask, states[2].mask) and np.array_equal(states[1].mask, states[3].mask)


def test_a_negative_click_on_an_empty_mask_leaves_it_empty() -> None:
    assert not outline(picture(disc(64, 64, 32, 32, 10)), Click(32, 32, False))[-1].mask.any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (2, 2), (5, 40)])
def test_a_positive_prompt_never_gives_an_empty_mask(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 100, np.uint8)
    x, y = shape[1] - 1, shape[0] - 1
    for prompt in (Click(x, y), Click(0, 0), Box(0, 0, x, y), Box(x, y, x, y)):
        assert outline(image, prompt)[-1].mask.any(), prompt


def test_a_large_image_is_answered_at_its_own_size() -> None:
    target = disc(3000, 4096, 2000, 1500, 400)
    image = np.repeat(np.where(target, 170, 60).astype(np.uint8)[..., None], 3, axis=2)
    tool = GrabCut()
    (embedding,) = tool.encode([image])
    assert embedding.nbytes == 375 * 512 * 3
    (prediction,) = tool.predict([Query(embedding, (Box(1600, 1100, 2400, 1900),))])
    assert prediction.logits.shape == (3000, 4096) and prediction.prior.shape == (375, 512)
    assert dice(prediction.logits > 0, target) > 0.95


def test_a_start_mask_is_refined_not_forgotten() -> None:
    target = disc(128, 128, 64, 64, 30)
    start = disc(128, 128, 20, 20, 8)
    mask = outline(picture(target), Click(64, 64), start=start)[-1].mask
    assert mask[20, 20] and mask[64, 64]


def test_without_a_prior_all_prompts_are_worked_in() -> None:
    image = picture(disc(128, 128, 64, 64, 30))
    prompts = (Box(40, 40, 80, 80), Click(90, 64), Click(50, 50, False))
    tool = GrabCut()
    (embedding,) = tool.encode([image])
    (at_once,) = tool.predict([Query(embedding, prompts)])
    assert np.array_equal(at_once.logits > 0, outline(image, *prompts)[-1].mask)


def test_answers_from_threads_are_the_answers_from_one() -> None:
    image = picture(disc(128, 128, 64, 64, 30))
    tool = GrabCut()
    (embedding,) = tool.encode([image])
    queries = [Query(embedding, (Box(30 + i, 34, 94, 94), Click(64, 98))) for i in range(8)]
    alone = tool.predict(queries)
    answers: dict[int, bytes] = {}

    def ask(i: int) -> None:
        answers[i] = tool.predict([queries[i]])[0].logits.tobytes()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[i] for i in range(8)] == [p.logits.tobytes() for p in alone]


def test_signed_logits_grow_away_from_the_outline_and_are_never_zero() -> None:
    mask = np.zeros((1, 6), np.bool_)
    mask[0, 3:] = True
    assert signed(mask).round(1).tolist() == [[-1.5, -1.0, -0.5, 0.5, 1.0, 1.5]]
    assert (signed(~np.zeros((2, 2), np.bool_)) == 10).all() and (signed(np.zeros((2, 2), np.bool_)) == -10).all()


def test_the_cut_follows_clear_odds_and_smooths_weak_ones() -> None:
    pixels = np.full((9, 9, 3), 100, np.uint8)
    odds = np.full((9, 9), -2.0, np.float32)
    odds[:, 5:] = 2
    assert np.array_equal(minimum_cut(pixels, odds), odds > 0)
    odds[4, 2] = 0.2  # eight even neighbours cost far more than .2 nats
    assert not minimum_cut(pixels, odds)[4, 2]
    odds[4, 2] = 10  # final
    assert minimum_cut(pixels, odds)[4, 2]


def test_colour_evidence_favours_the_colours_of_likely_pixels() -> None:
    pixels = np.full((8, 16, 3), 50, np.uint8)
    pixels[:, 8:] = 200
    odds = np.zeros((8, 16), np.float32)
    odds[:, 12:] = 4
    odds[:, :4] = -4
    evidence = colour_evidence(colours(pixels), odds)
    assert (evidence[:, 9:] > 1).all() and (evidence[:, :7] < -1).all() and np.abs(evidence).max() <= 3


def test_on_real_slices_the_box_beats_its_filled_rectangle_and_error_clicks_help(samples: Path) -> None:
    cases = list(real_cases(samples / "imis-bench" / "BTCV", every=45))
    filled, curves = [], []
    for image, target in cases:
        rows, columns = np.nonzero(target)
        box = Box(int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max()))
        rectangle = np.zeros_like(target)
        rectangle[box.y1 : box.y2 + 1, box.x1 : box.x2 + 1] = True
        filled.append(dice(rectangle, target))
        sample = Sample("s", image, target, "organ", "an organ", "1")
        state, curve = empty_state(sample), []
        for turn in range(4):
            action = box if turn == 0 else error_click(state.mask, target)
            (state,) = advance(GrabCut(), [sample], [state], [action])
            curve.append(dice(state.mask, target))
        curves.append(curve)
    mean = np.mean(curves, axis=0)
    assert len(cases) == 20
    assert mean[0] > np.mean(filled) + 0.03
    assert (np.diff(mean) > 0).all(), mean


def error_click(mask: Mask, target: Mask) -> Click:
    """The pixel deepest inside the largest connected error."""
    import cv2

    parts = []
    for wrong, positive in ((target & ~mask, True), (mask & ~target, False)):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(wrong.astype(np.uint8))
        if count > 1:
            label = 1 + int(stats[1:, 4].argmax())
            parts.append((int(stats[label, 4]), positive, labels == label))
    _, positive, part = max(parts, key=lambda p: p[0])
    depth = cv2.distanceTransform(np.pad(part.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return Click(int(x), int(y), positive)


def real_cases(folder: Path, every: int):  # type: ignore[no-untyped-def]
    import scipy.sparse

    from medseg_gym.images import read_image

    records = json.loads((folder / "dataset.json").read_text())["training"]
    position = 0
    for record in records:
        masks = scipy.sparse.load_npz(folder / record["label"]).toarray().reshape(-1, 512, 512) > 0
        for mask in masks:
            if mask.any():
                position += 1
                if position % every == 0:
                    yield read_image(folder / record["image"]), mask
