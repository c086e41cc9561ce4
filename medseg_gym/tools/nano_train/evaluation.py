"""How well a tool does when the oracle prompts it: Dice after a box and after clicks, per set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from medseg_gym import oracle
from medseg_gym.metrics import dice
from medseg_gym.tools.base import SegmentationTool, advance, empty_state
from medseg_gym.types import Mask, Prompt, Sample

ACTIONS = 5
STARTS = ("box", "click")


def dice_after_each(tool: SegmentationTool, sample: Sample, start: str, actions: int = ACTIONS) -> list[float]:
    """Dice after 1 .. `actions` actions: a tight box or a centre click, then the oracle's error clicks.

    Once the mask is exact the oracle has nothing to say, and the Dice of 1 stands.
    """
    state = empty_state(sample)
    scores: list[float] = []
    for turn in range(actions):
        prompt: Prompt | None
        if turn == 0:
            prompt = oracle.target_box(sample.target) if start == "box" else oracle.centre_click(sample.target)
        else:
            prompt = oracle.error_click(state.mask, sample.target)
        if prompt is not None:
            state = advance(tool, [sample], [state], [prompt])[0]
        scores.append(dice(state.mask, sample.target))
    return scores


def ellipse(sample: Sample) -> Mask:
    """The (H, W) mask of the ellipse inscribed in the target's box: what a box alone says, without the image."""
    box = oracle.target_box(sample.target)
    if box is None:
        return np.zeros_like(sample.target)
    rows, columns = np.ogrid[: sample.target.shape[0], : sample.target.shape[1]]
    x, y = (
        (columns - (box.x1 + box.x2) / 2) / ((box.x2 - box.x1 + 1) / 2),
        (rows - (box.y1 + box.y2) / 2) / ((box.y2 - box.y1 + 1) / 2),
    )
    mask: Mask = x**2 + y**2 <= 1
    return mask


def measure(
    tool: SegmentationTool, samples: Iterable[tuple[str, Sample]], actions: int = ACTIONS
) -> dict[str, dict[str, list[list[float]]]]:
    """Per set and start ("box", "click"): a list of Dice after each action for every sample."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for source, sample in samples:
        scores = found.setdefault(source, {start: [] for start in STARTS})
        for start in STARTS:
            scores[start].append(dice_after_each(tool, sample, start, actions))
    return found


def means(found: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> dict[str, list[float]]:
    """Per start: the mean over sets of the sets' mean Dice after each action."""
    return {
        start: np.mean([np.mean(scores[start], axis=0) for scores in found.values()], axis=0).tolist()
        for start in STARTS
    }
