"""Reasoning text for trajectories: the template writer, which needs no teacher, and `add_thoughts`.

A thought says what the agent can see before its action: the picture, the present mask and where the action goes. The
target is never looked at. Where in words comes from the mask and the action alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike
from typing import Any, Protocol

import numpy as np

from medseg_gym.episodes import decode_mask
from medseg_gym.errors import MedSegError
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.store import Pair, Trajectories, TrajectoryWriter
from medseg_gym.trajectories.wordings import ANSWERS, STYLES, THOUGHTS
from medseg_gym.types import Action, Answer, Box, Click, Mask, Stop, Undo, Unreadable

BATCH = 32  # trajectories a writer is given at once


class ThoughtWriter(Protocol):
    """Who writes the reasoning. `settings` say which, for the record of a folder of trajectories."""

    settings: Mapping[str, Any]

    def write(self, pairs: Sequence[Pair]) -> list[Trajectory]:
        """The trajectories with a thought a turn, and an answer where they stop."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """A turn as a writer is told of it."""

    number: int
    action: Action
    mask: Mask  # (H, W) before the action
    last: Action | None
    given: bool  # whether the mask is one that the episode began with


class TemplateWriter:
    """Thoughts from templates, drawn by a generator of `seed` and the trajectory: the same again and again."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.settings: Mapping[str, Any] = {"writer": "template", "seed": seed}

    def write(self, pairs: Sequence[Pair]) -> list[Trajectory]:
        return [self.one(trajectory) for trajectory, _ in pairs]

    def one(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with its thoughts and, where it stops, an answer in one of the five styles."""
        rng = generator(self.seed, trajectory)
        told = moments(trajectory)
        thoughts = tuple(self.thought(moment, trajectory, rng) for moment in told)
        answer = ""
        if told and isinstance(told[-1].action, Stop):
            style = STYLES[int(rng.integers(len(STYLES)))]
            answer = self.answer(style, trajectory, present=bool(told[-1].mask.any()), rng=rng)
        return replace(trajectory, thoughts=thoughts, answer=answer)

    def thought(self, moment: Moment, trajectory: Trajectory, rng: np.random.Generator) -> str:
        words = {**names(trajectory), "where": where(moment.action, moment.mask)}
        return _drawn(THOUGHTS[situation(moment)], rng).format(**words)

    def answer(self, style: str, trajectory: Trajectory, *, present: bool, rng: np.random.Generator) -> str:
        return _drawn(ANSWERS[style, present], rng).format(**names(trajectory))


def add_thoughts(trajectories: Iterable[Pair], writer: ThoughtWriter) -> Iterator[Pair]:
    """The trajectories with their images, in order, with the writer's thoughts in place of any they had."""
    pairs = iter(trajectories)
    while batch := list(islice(pairs, BATCH)):
        for trajectory, (_, image) in zip(writer.write(batch), batch, strict=True):
            yield trajectory, image


def write_thoughts(
    source: str | PathLike[str],
    out: str | PathLike[str],
    writer: ThoughtWriter,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Copies a folder of trajectories with thoughts to another; a run that was ended goes on. How many were written.

    Order and number stay, so what `out` holds already tells where to go on.
    """
    trajectories = Trajectories(source)
    if not len(trajectories):
        raise MedSegError(f"no trajectories in {source}; make some with `medseg-gym trajectories`")
    settings = {**trajectories.settings, "thoughts": dict(writer.settings)}
    with TrajectoryWriter(out, settings, shard=BATCH) as written:
        done = len(written.stored)
        if done > len(trajectories) or written.stored.keys != trajectories.keys[:done]:
            raise MedSegError(f"{out} holds other trajectories than {source}; choose another folder")
        rest = (trajectories[number] for number in range(done, len(trajectories)))
        for number, (trajectory, image) in enumerate(add_thoughts(rest, writer), start=done + 1):
            written.add(trajectory, image)
            if progress is not None:
                progress(number, len(trajectories))
    return len(trajectories) - done


def moments(trajectory: Trajectory) -> list[Moment]:
    """The turns with the mask each was taken at; MedSegError where one is unreadable, which no demonstration has."""
    episode = trajectory.episode
    if not episode.turns:
        return []
    height, width = episode.turns[0].mask["size"]
    mask = np.zeros((height, width), np.bool_) if episode.start is None else decode_mask(episode.start)
    told: list[Moment] = []
    for number, turn in enumerate(episode.turns):
        if isinstance(turn.action, Unreadable):
            raise MedSegError(f"{episode.key}: turn {number} is unreadable; a demonstration has none")
        given = number == 0 and episode.start is not None
        told.append(Moment(number, turn.action, mask, told[-1].action if told else None, given))
        mask = decode_mask(turn.mask)
    return told


def situation(moment: Moment) -> str:
    """Which family of templates fits a turn."""
    present = bool(moment.mask.any())
    if isinstance(moment.action, Stop):
        return "fits" if present else "absent"
    if isinstance(moment.action, Undo):
        return "discard" if moment.given else "undo"
    if isinstance(moment.action, Answer):
        raise MedSegError("thoughts are written about outlines; this turn answers a question")
    again = isinstance(moment.last, Undo)
    if isinstance(moment.action, Box):
        return "new box" if present else "box again" if again else "first box"
    if not moment.action.positive:
        return "spilled"
    return "missed" if present else "click again" if again else "first click"


def where(action: Action, mask: Mask) -> str:
    """Where an action goes: over the picture without a mask, else about the mask; "" for stop and undo."""
    if isinstance(action, Click):
        x, y = action.x + 0.5, action.y + 0.5
    elif isinstance(action, Box):
        x, y = (action.x1 + action.x2 + 1) / 2, (action.y1 + action.y2 + 1) / 2
    else:
        return ""
    height, width = mask.shape
    if isinstance(action, Box) or not mask.any():
        across = _third(x / width, ("left", "", "right"))
        down = _third(y / height, ("upper", "", "lower"))
        return f"in the {_joined(down, across)} part of the image" if down or across else "near the middle of the image"
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    across = _third((x - left) / (right - left), ("left", "", "right"))
    down = _third((y - top) / (bottom - top), ("upper", "", "lower"))
    if not down and not across:
        return "in its middle"
    side = {"upper": "upper end", "lower": "lower end", "left": "left side", "right": "right side"}
    return f"at its {_joined(down, across)}" if down and across else f"at its {side[down or across]}"


def names(trajectory: Trajectory) -> dict[str, str]:
    """The structure, and what kind of picture it is in: "right kidney", "abdomen CT"."""
    episode = trajectory.episode
    structure = " ".join(episode.structure.split()).replace("<", "").replace(">", "") or "structure"
    phrase = " ".join(episode.instruction.split()).replace("<", "").replace(">", "")
    _, found, modality = phrase.partition(f"{structure} in ")
    return {"structure": structure, "modality": modality if found and modality else "image"}


def generator(seed: int, trajectory: Trajectory, *more: int) -> np.random.Generator:
    """Randomness of a trajectory, whatever order they come in."""
    episode = trajectory.episode
    identity = repr((episode.key, episode.seed, trajectory.strategy, trajectory.kind, episode.case))
    digest = hashlib.sha256(identity.encode("utf-8", "backslashreplace")).digest()
    return np.random.default_rng([seed, *more, *np.frombuffer(digest, np.uint32).tolist()])


def _third(fraction: float, words: tuple[str, str, str]) -> str:
    return words[0] if fraction < 1 / 3 else words[2] if fraction > 2 / 3 else words[1]


def _joined(down: str, across: str) -> str:
    return " ".join(word for word in (down, across) if word)


def _drawn(templates: Sequence[str], rng: np.random.Generator) -> str:
    return templates[int(rng.integers(len(templates)))]
