"""A trajectory as the chats that supervised training learns from: its actions in a protocol's words.

Prompts and pictures are those that evaluation and rollouts show (policies.chat.of_episode), and answers what the
protocol's parser reads as the same actions; so what is trained is what will be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from medseg_gym.errors import InvalidActionError, MedSegError
from medseg_gym.frames import Grid
from medseg_gym.policies import chat
from medseg_gym.policies.protocols.base import ChatProtocol
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.types import Action, Episode, Image, Stop, Unreadable


@dataclass(frozen=True, slots=True, eq=False)
class Chat:
    """One chat of a trajectory: all its turns with the protocol's history, else one of them."""

    messages: tuple[chat.Message, ...]
    trained: tuple[bool, ...]  # of each assistant message; the others are only ever context
    turns: tuple[int, ...]  # which turn each assistant message is


def with_texts(trajectory: Trajectory, protocol: ChatProtocol, *, thoughts: bool | None = None) -> Episode:
    """The episode with its turns in the protocol's words, thoughts and answer in them where they have a place.

    Texts that the turns had are replaced. `thoughts` says whether they are written: None asks the protocol (ibis unless
    thinking is off; medsam-agent not), and where it wants them a trajectory without any raises. InvalidActionError
    where the protocol has no words for an action, or reads another from them.
    """
    episode = trajectory.episode
    if not episode.turns:
        return episode
    asked = bool(getattr(protocol, "thinking", False)) if thoughts is None else thoughts
    if asked and not any(trajectory.thoughts):
        raise MedSegError(
            f"{episode.key}: the protocol {protocol.name} wants a thought before every action, and this trajectory has "
            "none; write some with `medseg-gym trajectories thoughts`, or turn them off (ibis: thinking=False)"
        )
    grid = grid_of(episode)
    turns = []
    for number, turn in enumerate(episode.turns):
        if isinstance(turn.action, Unreadable):
            raise InvalidActionError(f"{episode.key}: turn {number} is unreadable; a demonstration has none")
        thought = trajectory.thoughts[number] if asked else ""
        answer = trajectory.answer if isinstance(turn.action, Stop) else ""
        try:
            text = chat.plain(protocol.format(turn.action, grid, thought=thought, answer=answer))
        except MedSegError as error:
            raise InvalidActionError(f"{episode.key}, turn {number}: {error}") from None
        turns.append(replace(turn, text=text))
        read = protocol.parse(text, grid).action
        if read != grid.snap(turn.action) and not _coarse(protocol, turn.action, text, read, grid):
            raise InvalidActionError(f"{episode.key}, turn {number}: {text!r} is read as {read}, not {turn.action}")
    return replace(episode, turns=tuple(turns), instruction=trajectory.instruction or episode.instruction)


def chats(
    trajectory: Trajectory,
    image: Image,
    protocol: ChatProtocol,
    size: int = chat.SIZE,
    *,
    thoughts: bool | None = None,
) -> list[Chat]:
    """The chats of a trajectory: one with the protocol's history, else one a turn; none without turns.

    Marked turns are not trained. `size` is the side of the pictures, `thoughts` with_texts' own.
    """
    told = chat.of_episode(with_texts(trajectory, protocol, thoughts=thoughts), image, protocol, size)
    trained = [not mark for mark in trajectory.marked] or [True] * len(trajectory.episode.turns)
    if protocol.history:
        return [Chat(tuple(messages), tuple(trained), tuple(range(len(trained)))) for messages in told]
    return [Chat(tuple(messages), (trained[turn],), (turn,)) for turn, messages in enumerate(told)]


def speakable(trajectory: Trajectory, protocol: ChatProtocol) -> bool:
    """Whether the protocol has words for every action of the trajectory."""
    return not unspeakable(trajectory, protocol)


def unspeakable(trajectory: Trajectory, protocol: ChatProtocol) -> str:
    """Why `with_texts` would refuse the trajectory; "" where it would not."""
    try:
        with_texts(trajectory, protocol, thoughts=any(trajectory.thoughts))
    except InvalidActionError as error:
        return str(error)
    return ""


def grid_of(episode: Episode) -> Grid:
    """The 0-999 grid over the image an episode was played on, from its first mask; it has turns."""
    height, width = episode.turns[0].mask["size"]
    return Grid(int(height), int(width))


def _coarse(protocol: ChatProtocol, action: Action, text: str, read: Action | None, grid: Grid) -> bool:
    """Whether the words are the nearest a coarse grammar has: what is read from them is written the same."""
    return read is not None and type(read) is type(action) and protocol.format(read, grid) in text
