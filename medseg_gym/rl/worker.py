"""EnvWorker: a vector env that is spoken to in chat, completions in and messages out, each slot in its own time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from medseg_gym.errors import MedSegError
from medseg_gym.rl.types import ImageRef
from medseg_gym.types import Ended, Episode


class LostError(MedSegError):
    """A part elsewhere died, hung or was replaced: what it held is gone, and its work must be given again."""


class UnplacedError(MedSegError):
    """A part elsewhere found no place, or did not begin, within the time it was given."""


Message = Mapping[str, Any]  # policies.chat's: {"role", "content"}, a user turn's content being a picture and a text


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """What a slot shows after a reset or a turn."""

    messages: Sequence[Message]  # what is new in the chat; without the protocol's history the whole chat
    images: tuple[ImageRef, ...]  # the pictures in `messages`, in their order
    turn: int  # actions taken so far
    iou: float
    dice: float
    reward: float = 0.0  # of the turn
    terms: Mapping[str, float] = field(default_factory=dict)
    readable: bool = True  # whether the turn's completion held an action
    ended: Ended | None = None  # then `messages` is empty
    timing: Mapping[str, float] = field(default_factory=dict)  # seconds: queue_s, env_s (of the whole step), render_s


class EnvWorker(Protocol):
    """One SegmentVectorEnv and the protocol spoken with it. Local, or an actor elsewhere: the same awaits.

    What is asked of several slots while the env is busy is executed in one step, with one tool call; no slot waits for
    another that was not asked about.
    """

    slots: int
    history: bool  # the protocol's: whether a chat goes on over the turns

    async def reset(self, slot: int, key: str, seed: int) -> Observed:
        """Begins an episode of a case. A case that cannot be read raises MedSegError."""
        ...

    async def step(self, slot: int, text: str, cut_off: bool = False) -> Observed:
        """One turn: the completion is read by the protocol and its action executed. A tool's error ends the episode
        as "failed". `cut_off` says that the completion has no end of its own; an unreadable one is told so."""
        ...

    async def truncate(self, slot: int) -> None:
        """Ends the episode under way at the turns it has, at least one, as if its horizon were these."""
        ...

    async def episode(self, slot: int, case: int, seed: int) -> Episode:
        """The slot's episode so far, its turns' texts included."""
        ...

    async def keys(self, split: str) -> list[str]:
        """The cases of a split, in order."""
        ...

    async def counters(self) -> Mapping[str, float]:
        """Of the tool and its cache: encodes, hits, misses, tool_calls, busy_s."""
        ...

    async def close(self) -> None: ...


async def keys_of(workers: Sequence[EnvWorker], split: str) -> list[str]:
    """The cases of a split, which all workers share, from the first that tells them; a worker may not have found its
    place yet, or never find it. UnplacedError where none does."""
    asked = [asyncio.ensure_future(worker.keys(split)) for worker in workers]
    missing: UnplacedError | None = None
    try:
        for answer in asyncio.as_completed(asked):
            try:
                return await answer
            except UnplacedError as error:
                missing = error
        raise missing or MedSegError("there are no env workers to tell the cases")
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
