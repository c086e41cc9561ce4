"""Reflective trajectories: a mistake that is taken back, and a start mask of something else that is discarded.

IBISAgent, section 3.2, "Reflective Behavior Synthesis". The mistake is shown and marked, so that it is not learned; the
undo after it, and the undo of a wrong start, are learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from medseg_gym import oracle
from medseg_gym.metrics import iou
from medseg_gym.trajectories.strategies import Asking, Course, Settings, verdict
from medseg_gym.types import Action, Box, Click, Mask, Sample, Undo

SELF_CORRECTION, WRONG_START = KINDS = ("self-correction", "wrong-start")
TRIES = 6  # candidates for a mistake, or for a displaced mask


def chosen_kind(settings: Settings, rng: np.random.Generator) -> str:
    """What a case's trajectory is to be, "plain" or one of KINDS; nothing is drawn where the shares are 0."""
    if not settings.self_correction + settings.wrong_start:
        return "plain"
    drawn = rng.random()
    if drawn < settings.self_correction:
        return SELF_CORRECTION
    return WRONG_START if drawn < settings.self_correction + settings.wrong_start else "plain"


def wrong_start(sample: Sample, others: Sequence[Mask], settings: Settings, rng: np.random.Generator) -> Mask | None:
    """A start mask of something else: another structure's target in this image, or the own one elsewhere.

    Its IoU with the target is below `discard_below`, or it is not taken; None where none was found, as for an absent
    structure alone in its image.
    """
    for number in rng.permutation(len(others)):
        if others[number].any() and iou(others[number], sample.target) < settings.discard_below:
            return others[number]
    box = oracle.target_box(sample.target)
    if box is None:
        return None
    height, width = sample.target.shape
    pixels = sample.target[box.y1 : box.y2 + 1, box.x1 : box.x2 + 1]
    rows, columns = pixels.shape
    for _ in range(TRIES):
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        moved = np.zeros_like(sample.target)
        moved[top : top + rows, left : left + columns] = pixels
        if iou(moved, sample.target) < settings.discard_below:
            return moved
    return None


def mistaken(course: Course, strategy: str, settings: Settings, rng: np.random.Generator) -> Asking[Course]:
    """A finished course with a mistake and its undo before one of its actions, the stop among them.

    It loses its last prompts where they leave no turns for that. Where it would be dropped without them, or no mistake
    was found, the course itself comes back. A mistake is a prompt that lowers the IoU by `min_loss`; where there is
    less to lose than that, it changes the mask and gains no more.
    """
    short = course.copy()
    while len(short.actions) + 2 > short.turns and len(short.actions) > 1:
        short.shorten()
    places = [at for at, action in enumerate(short.actions) if not isinstance(action, Undo)]
    if len(short.actions) + 2 > short.turns or verdict(short, strategy, settings):
        return course
    at = places[int(rng.integers(len(places)))]
    before, right = short.states[at], short.actions[at]
    bar = max(short.iou[at] - settings.min_loss, settings.min_loss)
    for prompt in islice(mistakes(short, before.mask, right, rng), TRIES):
        snapped = short.grid.snap(prompt)
        assert isinstance(snapped, Click | Box)
        if snapped == right:
            continue
        state = yield from short.ask(snapped, before)
        if short.overlap(state)[0] < bar and not np.array_equal(state.mask, before.mask):
            short.take(snapped, state, at=at, marked=True)
            short.take(Undo(), before, at=at + 1)
            short.kind = SELF_CORRECTION
            return short
    course.tries = short.tries
    return course


def mistakes(course: Course, mask: Mask, right: Action, rng: np.random.Generator) -> Iterator[Click | Box]:
    """Prompts that are likely to do harm: beside the target a box or a positive click, on what is right a negative one.

    Beside is within its own width and height of the target's box; anywhere where the structure is absent.
    """
    target = course.sample.target
    height, width = target.shape
    box = oracle.target_box(target)
    w, h = (width, height) if box is None else (box.x2 - box.x1 + 1, box.y2 - box.y1 + 1)
    near = np.zeros_like(target)
    if box is None:
        near[:] = True
    else:
        near[max(0, box.y1 - h) : box.y2 + h + 1, max(0, box.x1 - w) : box.x2 + w + 1] = True
    outside = np.flatnonzero(near & ~target & ~mask)
    inside = np.flatnonzero(mask & target)
    while True:
        if isinstance(right, Box):
            angle = rng.uniform(0, 2 * np.pi)
            dx, dy = round(w * float(np.cos(angle))), round(h * float(np.sin(angle)))
            xs = sorted(min(max(x + dx, 0), width - 1) for x in (right.x1, right.x2))
            ys = sorted(min(max(y + dy, 0), height - 1) for y in (right.y1, right.y2))
            yield Box(xs[0], ys[0], xs[1], ys[1])
            continue
        positive = bool(rng.random() < 0.5) if len(inside) and len(outside) else bool(len(outside))
        pixels = outside if positive else inside
        if not len(pixels):
            return
        y, x = divmod(int(rng.choice(pixels)), width)
        yield Click(x, y, positive)
