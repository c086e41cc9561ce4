"""The cases and demonstrations of the training recipe: one place, three ways to outline what is there.

The target of the cue task is always in one place here, so there is nothing to see: what is learned is how to act. The
demonstrations are in equal parts direct (the target's box, stop), lingering (the box twice, stop) and detours (a wrong
box, the right one, stop); GRPO is left to find out which of them a reward pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg_gym.errors import BadDataError
from medseg_gym.types import Box, Episode, Stop, Turn

TOOL = "Nano"
ENV = f"MedSeg-Phantom-{TOOL}-v0"
PLACE, WRONG = 0, 3  # of the target in every case, and of the box that a detour begins with
WAYS = ("direct", "linger", "detour")


def keys(split: str, count: int) -> list[str]:
    """The first cases of a split whose target is in the one place."""
    from medseg_gym.datasets.phantom import Phantom

    dataset = Phantom(task="cue")
    found: list[str] = []
    for key in dataset.keys(split):
        if dataset.cue_answer(key) == PLACE:
            found.append(key)
            if len(found) == count:
                return found
    raise BadDataError(f"the cue task's split {split} has {len(found)} such cases; wanted {count}")


def way(episode: Episode) -> str:
    """Which of WAYS an episode went: by its boxes that fit (IoU of at least .5 after them); "other" for the rest."""
    fits = [
        now >= 0.5 for turn, now in zip(episode.turns, episode.iou[1:], strict=True) if isinstance(turn.action, Box)
    ]
    stopped = episode.ended == "stopped"
    named = {(True,): "direct", (True, True): "linger", (False, True): "detour"}
    return named.get(tuple(fits), "other") if stopped else "other"


def demonstrate(path: Path, count: int) -> Path:
    """Writes a file of demonstrations, a third of each way, that `medseg-gym sft` reads."""
    from medseg_gym import tools
    from medseg_gym.datasets.phantom import Phantom, cue_boxes
    from medseg_gym.trajectories.store import write

    dataset, tool, boxes = Phantom(task="cue"), tools.make(TOOL), cue_boxes(64)
    right, wrong = boxes[PLACE], boxes[WRONG]
    pairs = []
    for case, key in enumerate(keys("train", count)):
        prompts = {"direct": [right], "linger": [right, right], "detour": [wrong, right]}[WAYS[case % 3]]
        sample = dataset[key]
        pairs.append((_played(tool, sample, [*prompts, Stop()], case), sample.image))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, pairs, {"strategy": "cue ways", "count": count})
    return path


def _played(tool: Any, sample: Any, actions: Sequence[Box | Stop], case: int) -> Any:
    """A demonstration: the masks that the actions give, from the empty one on."""
    from medseg_gym.episodes import encode_mask
    from medseg_gym.metrics import dice, iou
    from medseg_gym.tools.base import advance, empty_state
    from medseg_gym.trajectories.records import Trajectory

    states = [empty_state(sample)]
    for action in actions:
        states.append(states[-1] if isinstance(action, Stop) else advance(tool, [sample], [states[-1]], [action])[0])
    turns = tuple(
        Turn(action, reward=0.0, terms={}, tool_called=isinstance(action, Box), mask=encode_mask(state.mask))
        for action, state in zip(actions, states[1:], strict=True)
    )
    episode = Episode(
        env=ENV,
        tool=tool.fingerprint,
        policy="cue way",
        case=case,
        key=sample.key,
        structure=sample.structure,
        instruction=sample.instruction,
        patient=sample.patient,
        seed=0,
        horizon=len(actions),
        reward="shaped",
        turns=turns,
        iou=tuple(iou(state.mask, sample.target) for state in states),
        dice=tuple(dice(state.mask, sample.target) for state in states),
        ended="stopped",
    )
    return Trajectory(episode, strategy="cue", tries=1)
