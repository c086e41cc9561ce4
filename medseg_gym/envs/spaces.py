"""The action and observation spaces, and the codec between action vectors and typed actions."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from medseg_gym.errors import InvalidActionError, unknown
from medseg_gym.frames import GRID, Grid
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.types import Action, Box, Click, Stop, Undo, Unreadable

VERBS = ("positive", "negative", "box", "stop", "undo")  # their order is the action vector's first number


def tool_verbs(tool: SegmentationTool) -> tuple[str, ...]:
    """The verbs that make sense with a tool: those of its prompts, and stop and undo."""
    needs = {"positive": Click, "negative": Click, "box": Box}
    return tuple(verb for verb in VERBS if verb not in needs or needs[verb] in tool.prompts)


def check_verbs(verbs: Sequence[str] | None, tool: SegmentationTool) -> tuple[str, ...]:
    """The verbs of an env; None means all the tool can do. Unknown, repeated and impossible ones raise."""
    able = tool_verbs(tool)
    if verbs is None:
        return able
    for verb in verbs:
        if verb not in VERBS:
            raise unknown("verb", verb, VERBS)
        if verb not in able:
            raise InvalidActionError(f"{tool.name} takes no {verb} prompt; its verbs are {', '.join(able)}")
    if len(set(verbs)) != len(verbs) or not verbs:
        raise InvalidActionError(f"verbs={tuple(verbs)!r}; wanted at least one verb, each once")
    return tuple(verbs)


class ActionCodec:
    """Action vectors (verb, x1, y1, x2, y2) on the 0-999 grid <-> typed actions in an image's pixels."""

    def __init__(self, verbs: Sequence[str]) -> None:
        self.verbs = tuple(verbs)
        self.space = spaces.MultiDiscrete([len(self.verbs), GRID, GRID, GRID, GRID])
        allowed = f"verb 0-{len(self.verbs) - 1} ({', '.join(self.verbs)})"
        self._wanted = f"wanted 5 integers: {allowed}, then x1 y1 x2 y2 in 0-{GRID - 1}"

    def decode(self, vector: Any, grid: Grid) -> Action:
        """The snapped action of a vector; corners may come in any order, spare numbers are ignored."""
        verb, gx1, gy1, gx2, gy2 = self.check(vector)
        name = self.verbs[verb]
        if name == "stop":
            return Stop()
        if name == "undo":
            return Undo()
        x1, y1 = grid.to_pixel(gx1, gy1)
        if name == "box":
            x2, y2 = grid.to_pixel(gx2, gy2)
            return grid.snap(Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
        return grid.snap(Click(x1, y1, positive=name == "positive"))

    def encode(self, action: Action, grid: Grid) -> NDArray[np.int64]:
        """The vector of an action; pixels outside the image are clamped. A verb that is not allowed raises."""
        action = grid.snap(self.allowed(action))
        numbers = [0, 0, 0, 0]
        if isinstance(action, Click):
            numbers[:2] = grid.from_pixel(action.x, action.y)
        elif isinstance(action, Box):
            numbers[:2] = grid.from_pixel(action.x1, action.y1)
            numbers[2:] = grid.from_pixel(action.x2, action.y2)
        return np.array([self.verbs.index(self.verb_of(action)), *numbers], np.int64)

    def read(self, action: Any, grid: Grid) -> Action | Unreadable:
        """What an env executes for whatever `step` was given: a vector, a typed action, or Unreadable."""
        if isinstance(action, Unreadable):
            return action
        if isinstance(action, Click | Box | Stop | Undo):
            return grid.snap(self.allowed(action))
        return self.decode(action, grid)

    def allowed(self, action: Action) -> Action:
        """The action with plain integers and booleans in it; InvalidActionError where it has none or no verb here."""
        if not isinstance(action, Click | Box | Stop | Undo):
            raise InvalidActionError(f"action {action!r}; wanted a Click, Box, Stop or Undo record")
        name = self.verb_of(action)
        if name not in self.verbs:
            raise InvalidActionError(f"{action!r} needs the verb {name!r}; this env allows {', '.join(self.verbs)}")
        try:
            if isinstance(action, Click):
                if not isinstance(action.positive, bool | np.bool_):
                    raise TypeError("positive is no boolean")
                return Click(index(action.x), index(action.y), bool(action.positive))
            if isinstance(action, Box):
                return Box(index(action.x1), index(action.y1), index(action.x2), index(action.y2))
        except TypeError as error:
            raise InvalidActionError(f"action {action!r}: {error}; wanted whole numbers of pixels") from None
        return action

    def check(self, vector: Any) -> tuple[int, int, int, int, int]:
        wanted = self._wanted
        if isinstance(vector, str | bytes | dict) or vector is None:
            raise InvalidActionError(f"action {vector!r}; {wanted}, or a Click, Box, Stop, Undo or Unreadable record")
        try:
            array = np.asarray(vector)
        except ValueError:
            raise InvalidActionError(f"action {vector!r}; {wanted}") from None
        if array.shape != (5,):
            raise InvalidActionError(f"action of shape {array.shape}; {wanted}")
        if array.dtype.kind not in "iu":
            raise InvalidActionError(f"action of dtype {array.dtype}; {wanted}")
        verb, gx1, gy1, gx2, gy2 = array.tolist()
        if not 0 <= verb < len(self.verbs) or min(gx1, gy1, gx2, gy2) < 0 or max(gx1, gy1, gx2, gy2) >= GRID:
            raise InvalidActionError(f"action {array.tolist()}; {wanted}")
        return verb, gx1, gy1, gx2, gy2

    @staticmethod
    def verb_of(action: Action) -> str:
        if isinstance(action, Click):
            return "positive" if action.positive else "negative"
        return {Box: "box", Stop: "stop", Undo: "undo"}.get(type(action), "answer")


def observation_space(kind: str, size: int, structures: int, horizon: int) -> spaces.Space[Any]:
    """Kind "image": the (S, S, 3) overlay. Kind "dict": image, overlay, mask, target (structure index), turn."""
    image = spaces.Box(0, 255, (size, size, 3), np.uint8)
    if kind == "image":
        return image
    if kind == "dict":
        return spaces.Dict(
            {
                "image": image,
                "overlay": spaces.Box(0, 255, (size, size, 3), np.uint8),
                "mask": spaces.Box(0, 1, (size, size), np.uint8),
                "target": spaces.Discrete(max(1, structures)),
                "turn": spaces.Discrete(horizon + 1),
            }
        )
    raise unknown("observation", kind, ("image", "dict"))
