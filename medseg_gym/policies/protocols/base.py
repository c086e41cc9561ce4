"""What every protocol between env and language model is: prompts, parser and formatter over one set of verbs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from medseg_gym.envs.spaces import VERBS, ActionCodec
from medseg_gym.errors import InvalidActionError, MedSegError, unknown
from medseg_gym.frames import Grid
from medseg_gym.render import Colour
from medseg_gym.types import Action, Decision, Unreadable

MAX_TEXT = 65_536  # characters of a completion that are read at all; a longer one is unreadable
MAX_BODY = 4_096  # characters between an action's tags


@dataclass(frozen=True, slots=True)
class Moment:
    """What a user turn speaks of."""

    instruction: str  # "right kidney in abdomen CT", or a whole request
    turn: int  # actions taken before it; 0 is the first user turn
    masked: bool  # whether the picture shows any mask
    last: Action | Unreadable | None = None  # the action before it; None at the first turn


@runtime_checkable
class ChatProtocol(Protocol):
    """How one family of agents is spoken to, and what it may answer. A value: it remembers nothing of an episode."""

    name: str
    verbs: tuple[str, ...]  # those of the env that it has words for
    history: bool  # whether a chat holds all earlier turns, or the system prompt and the current turn alone
    colour: Colour  # of the mask's overlay
    alpha: float
    settings: Mapping[str, Any]  # env keywords its paper plays with: horizon, stop_after_repeats

    def system(self) -> str:
        """The system prompt."""
        ...

    def user(self, moment: Moment) -> str:
        """The text of a user turn; the picture stands before it."""
        ...

    def parse(self, text: str, grid: Grid) -> Decision:
        """The decision of a completion, snapped to the grid; never raises. Unreadable: action None and a reason."""
        ...

    def format(self, action: Action, grid: Grid, *, thought: str = "", answer: str = "") -> str:
        """The completion that says an action: `parse` of it gives the snapped action. InvalidActionError without words.

        `thought` is reasoning before the action; `answer` goes with a stop, where the protocol has a place for it.
        """
        ...


class Unread(Exception):
    """Why a completion gives no action. The text is shown to the model, so it quotes the model only through `safe`."""


def decide(text: str, read: Callable[[str], Action]) -> Decision:
    """The decision of a completion: what `read` makes of it, or the reason why it raised Unread."""
    try:
        return Decision(read(check_length(text)), text)
    except Unread as error:
        return Decision(None, text, reason=str(error))


def check_length(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise Unread(f"the answer has {len(text)} characters; at most {MAX_TEXT} are read")
    return text


def after_thought(text: str) -> str | None:
    """What follows the first </think>, so that an action weighed in a thought is not taken; None without one."""
    _, closed, rest = text.partition("</think>")
    return rest if closed else None


def between(text: str, tag: str) -> tuple[str, str]:
    """What stands in the first <tag> ... </tag>, and what follows. Unread where there is none or it is too long."""
    _, opened, rest = text.partition(f"<{tag}>")
    if not opened:
        raise Unread(f"no <{tag}> was found")
    body, closed, tail = rest.partition(f"</{tag}>")
    if not closed:
        raise Unread(f"<{tag}> was not closed by </{tag}>")
    if len(body) > MAX_BODY:
        raise Unread(f"{len(body)} characters stand in <{tag}>; at most {MAX_BODY} are read")
    return body, tail


def safe(value: object) -> str:
    """A model's word as a reason may quote it: 40 characters at most, and none a tokenizer or a template acts on."""
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    short = value if len(value) <= 40 else value[:37] + "..."
    return "'" + re.sub(r"[^A-Za-z0-9_ .,+-]", "?", short) + "'"


def speakable(name: str, verbs: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """The verbs of an env that a protocol has `words` for, in VERBS' order; raises where none of them is a prompt."""
    if isinstance(verbs, str):
        verbs = (verbs,)
    for verb in verbs:
        if verb not in VERBS:
            raise unknown("verb", verb, VERBS)
    spoken = tuple(verb for verb in VERBS if verb in verbs and verb in words)
    if not set(spoken) - {"stop", "undo"}:
        prompts = ", ".join(word for word in words if word not in ("stop", "undo"))
        raise InvalidActionError(
            f"the protocol {name} has words for {prompts}; the env allows {', '.join(verbs)}: "
            "take another protocol, or another verbs= for the env"
        )
    return spoken


def spoken_verb(name: str, action: Action, verbs: Sequence[str]) -> str:
    """The verb of an action; InvalidActionError where it is not among `verbs`."""
    verb = ActionCodec.verb_of(action)
    if verb not in verbs:
        raise InvalidActionError(f"{action!r} needs the verb {verb!r}; the protocol {name} has {', '.join(verbs)} here")
    return verb


def check_free(text: str, *tags: str) -> str:
    """A thought or an answer to be put between tags; MedSegError where it holds such a tag itself."""
    for tag in tags:
        if tag in text:
            raise MedSegError(f"text holds {tag}, which would end it too early: {text[:80]!r}")
    return text


def explanation(unreadable: Unreadable) -> str:
    """What the model is told of an answer that could not be read."""
    return f"Your last answer could not be read: {unreadable.reason}. Nothing has changed."
