"""Trajectories as token sequences to learn from, made when they are asked for, and the order they are asked for in.

The ids are those that a rollout of the same actions has: `ChatTokens` renders both, turn by turn.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg_gym.errors import MedSegError
from medseg_gym.policies.chat import check_size
from medseg_gym.policies.protocols.base import ChatProtocol, Moment
from medseg_gym.rl.tokens import ChatTokens, Message
from medseg_gym.rl.types import ImageRef, Segment, TokenSequence
from medseg_gym.trajectories.chats import Chat, chats, with_texts
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.store import Trajectories
from medseg_gym.types import Image

CACHE_BYTES = 256 * 2**20  # of rendered chats
HEADERS = 16  # tokens around a message, at most: role, start, end, vision marks and newlines

Progress = Callable[[str, int, int], None]


class ChatRows:
    """The chats of trajectories that are to be learned, as a sequence of TokenSequences.

    Left out, and counted in `left_out`: trajectories that a filter refused, chats longer than `max_chat_tokens`, chats
    of marked turns alone. A trajectory that the protocol has no words for raises InvalidActionError, none at all
    MedSegError. All records are read once, and pictures are drawn only where a chat may be too long; rendered chats
    are kept up to `cache_bytes`.
    """

    def __init__(
        self,
        data: Trajectories,
        protocol: ChatProtocol,
        tokens: ChatTokens,
        *,
        size: int,
        max_chat_tokens: int,
        cache_bytes: int = CACHE_BYTES,
        progress: Progress | None = None,
    ) -> None:
        self.protocol, self.tokens, self.size = protocol, tokens, check_size(size)
        self.left_out = {"refused": sum(bool(head.dropped) for head in data.heads), "too long": 0, "only marked": 0}
        self._data = data.kept()
        self._max, self._cache_bytes = max_chat_tokens, cache_bytes
        self.digest = _digest(self._data)  # of which trajectories they are
        self._cache: OrderedDict[int, tuple[TokenSequence, ...]] = OrderedDict()
        self._bytes = 0
        self._image_tokens = tokens.visual_tokens(np.zeros((size, size, 3), np.uint8))
        self._places: list[tuple[int, int]] = []  # trajectory, chat of it
        for number in range(len(self._data)):
            self._index(number)
            if progress is not None and (number % 256 == 0 or number + 1 == len(self._data)):
                progress("reading trajectories", number + 1, len(self._data))
        if not self._places:
            raise MedSegError(f"{_where(data)}: no chat to learn from{self.notes('; left out: ')}")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> TokenSequence:
        trajectory, place = self._places[number]
        return self._rendered(trajectory)[place]

    def notes(self, start: str = "left out: ") -> str:
        """What was left out, in words; "" where nothing was."""
        words = {
            "too long": f"longer than {self._max} tokens (max_chat_tokens)",
            "only marked": "of marked turns alone",
        }
        said = [f"{count} {words.get(why, why)}" for why, count in self.left_out.items() if count]
        return start + ", ".join(said) if said else ""

    def _index(self, number: int) -> None:
        """Adds the places of a trajectory's chats, or counts why not."""
        trajectory = self._data.trajectory(number)
        trained = [not mark for mark in trajectory.marked] or [True] * len(trajectory.episode.turns)
        learned = [any(trained)] if self.protocol.history and trained else trained
        exact = None if self._bound(trajectory) <= self._max else [len(s.ids) for s in self._rendered(number)]
        for place, wanted in enumerate(learned):
            if not wanted:
                self.left_out["only marked"] += 1
            elif exact is not None and exact[place] > self._max:
                self.left_out["too long"] += 1
            else:
                self._places.append((number, place))

    def _bound(self, trajectory: Trajectory) -> int:
        """At least the tokens of the trajectory's longest chat: a token is one byte or more."""
        episode = with_texts(trajectory, self.protocol)
        if not episode.turns:
            return 0
        texts = [len(turn.text.encode()) for turn in episode.turns]
        users = [self._user(episode.instruction, turn) for turn in range(len(texts))]
        each = [self._image_tokens + text + user + 2 * HEADERS for text, user in zip(texts, users, strict=True)]
        system = len(self.protocol.system().encode()) + HEADERS
        return system + (sum(each) if self.protocol.history else max(each))

    def _user(self, instruction: str, turn: int) -> int:
        """Twice the bytes of a user turn's text, which its last action and special tokens in it may make longer."""
        moments = [Moment(instruction, turn, masked) for masked in (False, True)]
        return max(2 * len(self.protocol.user(moment).encode()) for moment in moments)

    def _rendered(self, number: int) -> tuple[TokenSequence, ...]:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        trajectory, image = self._data[number]
        rendered = sequences_of(trajectory, image, self.protocol, self.tokens, self.size)
        self._cache[number] = rendered
        self._bytes += sum(map(_nbytes, rendered))
        while self._bytes > self._cache_bytes and len(self._cache) > 1:
            self._bytes -= sum(map(_nbytes, self._cache.popitem(last=False)[1]))
        return rendered


def sequences_of(
    trajectory: Trajectory, image: Image, protocol: ChatProtocol, tokens: ChatTokens, size: int
) -> tuple[TokenSequence, ...]:
    """A trajectory's chats in tokens; marked turns are actions too, which are not trained."""
    return tuple(sequence_of(chat, tokens) for chat in chats(trajectory, image, protocol, size))


def sequence_of(chat: Chat, tokens: ChatTokens) -> TokenSequence:
    """The segments of a chat: a prompt, then answers with what is shown between them. It ends with the last answer."""
    segments: list[Segment] = []
    waiting: list[Message] = []
    said: tuple[int, ...] = ()
    answers = iter(zip(chat.turns, chat.trained, strict=True))
    for message in chat.messages:
        if message["role"] != "assistant":
            waiting.append(message)
            continue
        turn, trained = next(answers)
        shown = tokens.suffix(said, waiting) if said else tokens.prompt(waiting)
        images = tuple(ImageRef.of(image) for image in shown.images)
        segments.append(Segment("observation" if said else "prompt", shown.ids, turn, images))
        said = (*tokens.text(str(message["content"])), tokens.end)
        segments.append(Segment("action", said, turn, marked=not trained))
        waiting = []
    return TokenSequence(tuple(segments))


def drawn(step: int, count: int, batch: int, seed: int) -> list[int]:
    """The rows of a step, 1 the first: the next `batch` of an endless row of shuffled epochs of all `count`."""
    first = (step - 1) * batch
    orders: dict[int, NDArray[np.int64]] = {}
    numbers = []
    for position in range(first, first + batch):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count)
        numbers.append(int(orders[epoch][place]))
    return numbers


def open_data(path: str | Path) -> Trajectories:
    """The trajectories of a file or folder; MedSegError where there are none."""
    data = Trajectories(path)
    if not len(data):
        raise MedSegError(f"{path} holds no trajectories; make some with: medseg-gym trajectories --out {path}")
    return data


def _digest(data: Trajectories) -> str:
    found = hashlib.sha256()
    for number, head in enumerate(data.heads):
        found.update(repr((*astuple(head), data.sha(number))).encode())
    return found.hexdigest()


def _where(data: Trajectories) -> str:
    return str(data.files[0].parent if len(data.files) > 1 else data.files[0])


def _nbytes(sequence: TokenSequence) -> int:
    return 8 * len(sequence.ids) + sum(image.pixels.nbytes for image in sequence.images)
