"""The cue task's data: demonstrations of which a part point at the wrong place, and what needs no look at the image.

Four equal blocks, one of them the target; the direction of the stripes behind them says which. A demonstration boxes a
block and stops. With 55 % right ones a learner that imitates perfectly is right in 55 % of the cases when it samples,
which leaves room for reinforcement learning. `learn_cue.py` and the tests learn from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym import tools
from medseg_gym.datasets.phantom import Phantom, cue_boxes
from medseg_gym.episodes import encode_mask
from medseg_gym.metrics import dice, iou
from medseg_gym.tools.base import SegmentationTool, advance, empty_state
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.store import write
from medseg_gym.types import Action, Box, Episode, Image, Sample, Stop, Turn

SIZE = 64  # pixels a side, of image and picture
TOOL = "Nano"  # outlines a block given its box with an IoU of .98; GrabCut with .93
ENV = f"MedSeg-Phantom-{TOOL}-v0"
ENV_OPTIONS: dict[str, Any] = {"dataset_options": {"task": "cue"}, "horizon": 2, "verbs": ("box", "stop")}
PROTOCOL = "tiny"
RIGHT = 0.55  # share of the demonstrations that box the target
UNSEEN = 64  # cases of the split "test" that results are told of


def demonstrations(
    count: int, rng: np.random.Generator, *, right: float = RIGHT, tool: str = TOOL, difficulty: float = 0.5
) -> list[tuple[Trajectory, Image]]:
    """A demonstration for each of the first `count` cases of the split "train", with its (64, 64, 3) image.

    A share of `right`, rounded to whole cases, boxes the target; the others box another block, any of the three.
    """
    dataset, segment = Phantom(task="cue", difficulty=difficulty), tools.make(tool)
    wrong = set(rng.permutation(count)[round(right * count) :].tolist())
    pairs = []
    for case, key in enumerate(dataset.keys("train")[:count]):
        place = dataset.cue_answer(key)
        if case in wrong:
            place = (place + int(rng.integers(1, 4))) % 4
        sample = dataset[key]
        pairs.append((_demonstration(segment, sample, cue_boxes(SIZE)[place], case), sample.image))
    return pairs


def write_demonstrations(path: str | Path, count: int, seed: int, **options: Any) -> Path:
    """The demonstrations as a file that `medseg-gym sft` reads."""
    settings = {"strategy": "cue", "count": count, "seed": seed, **options}
    write(path, demonstrations(count, np.random.default_rng(seed), **options), settings)
    return Path(path)


def unseen() -> list[str]:
    """The cases that results are told of, a quarter with the target at each place; not in the demonstrations' split."""
    dataset = Phantom(task="cue")
    keys = dataset.keys("test")[: 4 * UNSEEN]
    by_place = [[key for key in keys if dataset.cue_answer(key) == place][: UNSEEN // 4] for place in range(4)]
    return sorted(key for place in by_place for key in place)


def blind(keys: Sequence[str], tool: str = TOOL) -> dict[str, float]:
    """Mean IoU over the cases of each policy that always does the same, by what it does.

    A box on one of the four blocks, a box around all four, one around the whole image, or stopping at once.
    """
    dataset, segment = Phantom(task="cue"), tools.make(tool)
    first, last = cue_boxes(SIZE)[0], cue_boxes(SIZE)[3]
    boxes = dict(zip(("top left", "top right", "bottom left", "bottom right"), cue_boxes(SIZE), strict=True))
    boxes["all four"] = Box(first.x1, first.y1, last.x2, last.y2)
    boxes["whole image"] = Box(0, 0, SIZE - 1, SIZE - 1)
    samples = [dataset[key] for key in keys]
    empty = [empty_state(sample) for sample in samples]
    means = {"stop": float(np.mean([iou(s.mask, c.target) for s, c in zip(empty, samples, strict=True)]))}
    for name, box in boxes.items():
        states = advance(segment, samples, empty, [box] * len(samples))
        means[name] = float(np.mean([iou(s.mask, c.target) for s, c in zip(states, samples, strict=True)]))
    return means


def _demonstration(tool: SegmentationTool, sample: Sample, box: Box, case: int) -> Trajectory:
    before = empty_state(sample)
    (after,) = advance(tool, [sample], [before], [box])
    actions: tuple[Action, ...] = (box, Stop())
    masks = [before.mask, after.mask, after.mask]
    turns = tuple(
        Turn(action, reward=0.0, terms={}, tool_called=isinstance(action, Box), mask=encode_mask(mask))
        for action, mask in zip(actions, masks[1:], strict=True)
    )
    episode = Episode(
        env=ENV,
        tool=tool.fingerprint,
        policy="cue demonstration",
        case=case,
        key=sample.key,
        structure=sample.structure,
        instruction=sample.instruction,
        patient=sample.patient,
        seed=0,
        horizon=len(actions),
        reward="shaped",
        turns=turns,
        iou=tuple(iou(mask, sample.target) for mask in masks),
        dice=tuple(dice(mask, sample.target) for mask in masks),
        ended="stopped",
    )
    return Trajectory(episode, strategy="cue", tries=1)
