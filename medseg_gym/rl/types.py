"""The records of training: a chat as segments of token ids, an episode with its chats, and the rows a learner is given.

Axes: `_T` counts the tokens of one chat, `_G` the members of a group. Frozen, no behaviour but what follows from the
fields.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg_gym.types import Episode, Image

Kind = Literal["prompt", "observation", "action", "injected"]
Finish = Literal["stop", "length", "abort"]
Span = tuple[int, int, int]  # (weights' version, first token, one past the last) within a completion


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ImageRef:
    """A picture and the hash it is known by, so that equal pictures are stored and sent once."""

    sha: str  # sha256 of shape and bytes, or of all that decides them: pictures of one hash are equal
    pixels: Image  # (S, S, 3) uint8, read-only

    @staticmethod
    def of(image: Image) -> ImageRef:
        digest = hashlib.sha256(str(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
        image.flags.writeable = False
        return ImageRef(digest.hexdigest(), image)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of ids of one origin.

    "prompt" and "observation" are rendered messages, "action" what the policy sampled (or a trajectory's answer, in
    supervised training), its end of turn included; "injected" what was put into the policy's mouth: the end of turn of
    an answer that was cut off. Only unmarked actions are trained.
    """

    kind: Kind
    ids: tuple[int, ...]  # image placeholders expanded
    turn: int  # the turn whose answer this is, or which it comes before
    images: tuple[ImageRef, ...] = ()
    logprobs: tuple[float, ...] = ()  # actions that an engine sampled: one an id, as they were sampled
    versions: tuple[Span, ...] = ()  # actions that an engine sampled: which weights gave which ids
    marked: bool = (
        False  # an action that is shown but not to be learned, such as the mistake of a reflective trajectory
    )

    @property
    def trained(self) -> bool:
        return self.kind == "action" and not self.marked


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One chat as the model is given it: all turns with the protocol's history, else one turn."""

    segments: tuple[Segment, ...]

    @cached_property
    def ids(self) -> tuple[int, ...]:
        return tuple(token for segment in self.segments for token in segment.ids)

    @cached_property
    def images(self) -> tuple[ImageRef, ...]:
        return tuple(image for segment in self.segments for image in segment.images)

    @cached_property
    def loss_mask(self) -> NDArray[np.bool_]:
        """(T,) True at the tokens that are trained."""
        return self._per_token([segment.trained for segment in self.segments], np.bool_)

    @cached_property
    def turns(self) -> NDArray[np.int32]:
        """(T,) the turn each token belongs to."""
        return self._per_token([segment.turn for segment in self.segments], np.int32)

    @cached_property
    def logprobs(self) -> NDArray[np.float32]:
        """(T,) log-probabilities as sampled; 0 where nothing was sampled."""
        parts = [s.logprobs if s.logprobs else (0.0,) * len(s.ids) for s in self.segments]
        return np.array([value for part in parts for value in part], np.float32)

    def _per_token(self, values: Sequence[object], kind: type) -> NDArray:  # type: ignore[type-arg]
        return np.repeat(np.array(values, kind), [len(segment.ids) for segment in self.segments])


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """An episode that a policy engine played, with the token ids it was played in."""

    group: int  # which case of the iteration
    member: int  # which of the group's members
    episode: Episode
    sequences: tuple[TokenSequence, ...]  # one with the protocol's history, else one a turn; none where none was begun
    dropped: str = ""  # why it is not trained: an env's error, an aborted generation; "" where it is
    timing: Mapping[str, float] = field(default_factory=dict)  # seconds: queue_s, generate_s, env_s, render_s, tokens_s

    @property
    def reward(self) -> float:
        """The episode's reward, the sum of its turns'."""
        return float(sum(turn.reward for turn in self.episode.turns))


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A chat to train on. What is averaged over, and how, is in the weights: a batch's loss is a plain sum."""

    sequence: TokenSequence
    weights: NDArray[np.float32]  # (T,) of each token's loss; 0 but at trained tokens
    advantages: NDArray[np.float32] | None = None  # (T,); None in supervised training
    old: NDArray[np.float32] | None = None  # (T,) the learner's own log-probabilities before the update, where needed
    reference: NDArray[np.float32] | None = None  # (T,) log-probabilities of the reference policy, where there is one
