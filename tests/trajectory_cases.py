"""Trajectories by hand for the tests of what is done with them: played in an env over the Blobs, with the Stub tool."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from conftest import Blobs

from medseg_gym import oracle
from medseg_gym.envs.segment import SegmentEnv
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.types import Action, Click, Image, Mask, Stop, Undo


def env(**options: Any) -> SegmentEnv:
    """An env over the Blobs' discs, whose answers are its prompts' shapes."""
    return SegmentEnv(Blobs(), "Stub", **{"horizon": 6, "size": 64, "structures": "disc", **options})


def trajectory(number: int = 0, kind: str = "plain", *, boxes: bool = True, **more: Any) -> tuple[Trajectory, Image]:
    """The `number`th disc, outlined: a box, for self-correction a wrong click and an undo, a click, and the stop.

    Without `boxes` clicks alone. A wrong start is a mask of everything, which is discarded first. `more` are fields.
    """
    one, image = _played(number, kind, boxes)
    return replace(one, **more), image


@cache
def _played(number: int, kind: str, boxes: bool) -> tuple[Trajectory, Image]:
    game, sample = env(), Blobs()[f"Blobs/train-{number}/disc"]
    box, centre = oracle.target_box(sample.target), oracle.centre_click(sample.target)
    assert box is not None and centre is not None
    start: Mask | None = np.ones(sample.target.shape, np.bool_) if kind == "wrong-start" else None
    first = [box if boxes else centre]
    actions: list[Action] = [*first, centre, Stop()]
    if kind == "self-correction":
        actions = [*first, Click(2, 2), Undo(), centre, Stop()]
    elif kind == "wrong-start":
        actions = [Undo(), *actions]
    game.reset(seed=0, options={"sample": sample.key, "start_mask": start})
    for action in actions:
        game.step(action)
    marked = tuple(turn == 1 for turn in range(len(actions))) if kind == "self-correction" else ()
    strategy = "box-to-point" if boxes else "sequential-click"
    episode = game.episode(policy="oracle", case=number)
    return Trajectory(episode, strategy=strategy, kind=kind, marked=marked, tries=4), sample.image


def several(*, boxes: bool = True) -> list[tuple[Trajectory, Image]]:
    """Three plain trajectories and one of each reflective kind."""
    kinds = [(0, "plain"), (1, "plain"), (2, "plain"), (0, "self-correction"), (1, "wrong-start")]
    return [trajectory(number, kind, boxes=boxes) for number, kind in kinds]
