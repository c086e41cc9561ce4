"""Reasoning by a teacher: a vision-language model behind an OpenAI-compatible endpoint, shown what the agent is not.

It is given the agent's own view, the view in which caught, missed and spilled parts are told apart, and the action, and
asked to write what a junior who sees the first picture alone would think. A thought that gives the second picture away
(wordings.FORBIDDEN), is empty, too long or holds a protocol's tags is asked for again; after `tries` the template
writer's stands in. Both are counted. Marked turns and answers are the template writer's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medseg_gym.errors import MedSegError
from medseg_gym.frames import Grid, Letterbox
from medseg_gym.policies import chat
from medseg_gym.policies.endpoint import EndpointAnswerError, EndpointModel
from medseg_gym.policies.vlm import Completion
from medseg_gym.render import Overlay, draw_prompts, oracle_view
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.store import Pair
from medseg_gym.trajectories.thoughts import Moment, TemplateWriter, generator, moments, names, where
from medseg_gym.trajectories.wordings import forbidden
from medseg_gym.types import Action, Box, Click, Image, Mask, Stop

MAX_THOUGHT = 800  # characters

SYSTEM = """\
You help to train a junior agent that outlines structures in medical images with a promptable segmentation model. You \
are shown two pictures of one moment and told which action comes next.
1. What the junior sees: the image with its present mask in see-through green.
2. What only you see: blue where the mask is right, orange where it covers too much, yellow where it misses something; \
the next action is drawn in.

Write the junior's thought before this action: one to three sentences, first person, present tense, about anatomy, \
contrast, borders and places ("at the upper left edge of the mask"). The second picture tells you what is true, but \
the junior has never seen it: no colours of the second picture, no coordinates, no marks, no talk of a reference, a \
ground truth, true or false positives or negatives. Answer with the thought alone."""

REMINDER = "The last try could not be used: {why}. Write the thought anew without that."


@dataclass(slots=True)
class _Slot:
    """A turn that waits for its thought."""

    messages: list[chat.Message]
    seeds: np.random.Generator
    fallback: str
    allowed: tuple[str, ...]
    future: Future[Completion]


class TeacherWriter:
    """A ThoughtWriter that asks `model`; `targets` gives the (H, W) target of a case's key.

    All turns of a batch are asked for at once; the model bounds how many requests are under way. `counts` tells how
    many thoughts were asked for ("asked"), refused by the filter ("refused"), answered by an error ("failed") and
    written by the template instead ("fallback"). A server that is gone raises PolicyUnavailableError: what was written
    stays, and the same call goes on.
    """

    def __init__(
        self,
        model: EndpointModel,
        targets: Callable[[str], Mask],
        *,
        seed: int = 0,
        tries: int = 3,
        size: int = chat.SIZE,
    ) -> None:
        if tries < 1:
            raise MedSegError(f"tries={tries!r}; wanted at least 1")
        self._model, self._targets, self._tries, self._size = model, targets, tries, chat.check_size(size)
        self._template = TemplateWriter(seed)
        self.settings: Mapping[str, Any] = {
            "writer": "teacher",
            "model": model.name,
            "seed": seed,
            "tries": tries,
            "size": size,
        }
        self.counts: Counter[str] = Counter()

    def write(self, pairs: Sequence[Pair]) -> list[Trajectory]:
        plain = [self._template.one(trajectory) for trajectory, _ in pairs]
        slots: dict[tuple[int, int], _Slot] = {}
        for number, (trajectory, image) in enumerate(pairs):
            marked = trajectory.marked or (False,) * len(trajectory.episode.turns)
            for moment, mark in zip(moments(trajectory), marked, strict=True):
                if not mark:
                    fallback = plain[number].thoughts[moment.number]
                    slots[number, moment.number] = self._ask(trajectory, image, moment, fallback)
        told = [list(trajectory.thoughts) for trajectory in plain]
        for (number, turn), slot in slots.items():
            told[number][turn] = self._thought(slot)
        return [replace(trajectory, thoughts=tuple(t)) for trajectory, t in zip(plain, told, strict=True)]

    def _ask(self, trajectory: Trajectory, image: Image, moment: Moment, fallback: str) -> _Slot:
        pictures = (
            Overlay(image, self._size).draw(moment.mask),
            privileged_view(image, moment, self._targets(trajectory.episode.key), self._size),
        )
        words = names(trajectory)
        said = [
            f"Structure: {words['structure']}, in: {words['modality']}.",
            f"Next action: {described(moment.action, moment.mask)}.",
            "Write the junior's thought.",
        ]
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
        content.append({"type": "text", "text": chat.plain("\n".join(said))})
        messages: list[chat.Message] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": content},
        ]
        seeds = generator(self._template.seed, trajectory, 1 + moment.number)
        self.counts["asked"] += 1
        future = self._model.complete(messages, (), int(seeds.integers(2**31)))
        return _Slot(messages, seeds, fallback, (words["structure"], words["modality"]), future)

    def _thought(self, slot: _Slot) -> str:
        for attempt in range(self._tries):
            try:
                thought = cleaned(slot.future.result().text)
                why = refusal(thought, *slot.allowed)
                if not why:
                    return thought
                self.counts["refused"] += 1
            except EndpointAnswerError as error:
                self.counts["failed"] += 1
                why, thought = str(error), ""
            if attempt + 1 < self._tries:
                again = list(slot.messages)
                if thought:
                    again += [
                        {"role": "assistant", "content": chat.plain(thought)},
                        {"role": "user", "content": REMINDER.format(why=why)},
                    ]
                slot.future = self._model.complete(again, (), int(slot.seeds.integers(2**31)))
        self.counts["fallback"] += 1
        return slot.fallback


def privileged_view(image: Image, moment: Moment, target: Mask, size: int) -> Image:
    """The teacher's second picture, (size, size, 3): caught, spilled and missed, with the action drawn in."""
    view = oracle_view(image, moment.mask, target, size)
    prompts = [moment.action] if isinstance(moment.action, Click | Box) else []
    return draw_prompts(view, prompts, Letterbox(image.shape[0], image.shape[1], size))


def described(action: Action, mask: Mask) -> str:
    """An action for the teacher, in words and on the 0-999 grid."""
    grid, place = Grid(*mask.shape), where(action, mask)
    if isinstance(action, Click):
        x, y = grid.from_pixel(action.x, action.y)
        sign = "a positive point (this belongs to it)" if action.positive else "a negative point (this does not)"
        return f"{sign} {place}, at ({x}, {y}) of 0-999"
    if isinstance(action, Box):
        corners = (*grid.from_pixel(action.x1, action.y1), *grid.from_pixel(action.x2, action.y2))
        return f"a box {place}, {corners} of 0-999"
    if isinstance(action, Stop):
        return "to stop, as the mask fits" if mask.any() else "to stop, as the structure is not in the image"
    return "to take the last step, or the mask that was given, back"


def cleaned(text: str) -> str:
    """A model's answer as a thought: in one line, without quotes around it and a reasoning model's own thoughts."""
    text = text.partition("</think>")[2] if "</think>" in text else text
    text = re.sub(r"</?think>", " ", text)
    return " ".join(text.split()).strip("\"'“”‘’` ")


def refusal(thought: str, *allowed: str) -> str:
    """Why a thought cannot be used; "" where it can."""
    if not thought:
        return "it was empty"
    if len(thought) > MAX_THOUGHT:
        return f"it has more than {MAX_THOUGHT} characters"
    if "<" in thought or ">" in thought:
        return "it holds < or >"
    if re.search(r"\d+\s*,\s*\d+", thought):
        return "it gives coordinates"
    word = forbidden(thought, *allowed)
    return f"it says {word!r}" if word else ""
