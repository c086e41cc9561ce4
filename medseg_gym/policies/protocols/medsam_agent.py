"""MedSAM-Agent's protocol: one JSON call a turn in <tool_call> tags, whole numbers from 0 to 999, all turns kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from medseg_gym.envs.spaces import VERBS
from medseg_gym.frames import GRID, Grid
from medseg_gym.policies.protocols.base import (
    Moment,
    Unread,
    after_thought,
    between,
    check_free,
    decide,
    explanation,
    safe,
    speakable,
    spoken_verb,
)
from medseg_gym.render import GREEN, Colour
from medseg_gym.types import Action, Box, Click, Decision, Stop, Undo, Unreadable

SYSTEM = """\
You annotate medical images with the help of a segmentation model. The model draws; you tell it where. Every turn you \
make one function call, the model draws its mask anew, and you are shown the result, until the mask is right.

The picture
- The present mask lies over the image in see-through green. Where there is no green, nothing is marked.
- The mask is right when all of the target is green and nothing beside it is.

Positions
- Whole numbers from 0 to 999, measured over the whole picture with any black borders: x from its left edge to its \
right edge, y from its top edge to its bottom edge.

Functions
{functions}

Your answer is one call in this form, and only the first call of an answer counts:
<tool_call>
{{"name": FUNCTION, "arguments": {{...}}}}
</tool_call>"""


class MedSAMAgent:
    """The protocol of MedSAM-Agent's released code, in our words.

    Functions: add_bbox, add_point, stop_action; undo_action, which the paper does not have, where the env allows undo.
    The first call after a thought counts, well formed or not; text around it is ignored. Positions in the padding give
    the nearest pixel; a box's corners may come in any order.
    """

    name = "medsam-agent"
    history = True
    colour: Colour = GREEN
    alpha = 0.5
    settings: Mapping[str, Any] = {"horizon": 5, "stop_after_repeats": 0}

    def __init__(self, verbs: Sequence[str] = VERBS) -> None:
        self.verbs = speakable(self.name, verbs, VERBS)
        self.signs = tuple(verb for verb in self.verbs if verb in ("positive", "negative"))
        self._wanted = {f["name"]: f["parameters"]["required"] for f in self.schema()}

    def schema(self) -> list[dict[str, Any]]:
        """The functions as JSON schemas, those the verbs allow."""
        position = {"type": "integer", "minimum": 0, "maximum": GRID - 1}
        functions: list[dict[str, Any]] = []
        if "box" in self.verbs:
            corners = {"type": "array", "items": position, "minItems": 4, "maxItems": 4}
            text = "Encloses the target in a box given as [left, top, right, bottom]; replaces an earlier box."
            functions.append(_function("add_bbox", text, {"bbox_2d": corners}))
        if self.signs:
            point = {"type": "array", "items": position, "minItems": 2, "maxItems": 2}
            does = {"positive": "positive marks [x, y] as target", "negative": "negative marks it as not target"}
            text = "Sets a point: " + ", ".join(does[sign] for sign in self.signs) + "."
            kind = {"type": "string", "enum": list(self.signs)}
            functions.append(_function("add_point", text, {"point_2d": point, "point_type": kind}))
        if "undo" in self.verbs:
            text = "Takes back the newest box or point, or a mask that was given at the start."
            functions.append(_function("undo_action", text, {}))
        if "stop" in self.verbs:
            text = "Ends the work: the mask is right, or the target is not in the image and there is no mask."
            functions.append(_function("stop_action", text, {}))
        return functions

    def system(self) -> str:
        return SYSTEM.format(functions="\n".join(json.dumps(function) for function in self.schema()))

    def user(self, moment: Moment) -> str:
        if moment.turn == 0:
            said = f"Target: {moment.instruction}\n"
            if not moment.masked:
                return said + "There is no mask yet. Make the first call."
            said += "A mask was given to start from. Mend what is wrong with it"
            return said + ("; if it shows something else, take it back." if "undo" in self.verbs else ".")
        stop = " Call stop_action if the target is covered exactly." if "stop" in self.verbs else ""
        if isinstance(moment.last, Unreadable):
            return f"{explanation(moment.last)} Make the next call.{stop}"
        now = "This is the mask after your last call." if moment.masked else "Your last call left no mask."
        return f"{now} Make the next call.{stop}"

    def parse(self, text: str, grid: Grid) -> Decision:
        return decide(text, lambda text: self._read(text, grid))

    def format(self, action: Action, grid: Grid, *, thought: str = "", answer: str = "") -> str:
        """The call; `thought` stands before it, `answer` has no place here and is left out."""
        verb = spoken_verb(self.name, action, self.verbs)
        action = grid.snap(action)
        name = {"stop": "stop_action", "undo": "undo_action"}.get(verb, "")
        arguments: dict[str, Any] = {}
        if isinstance(action, Box):
            corners = (*grid.from_pixel(action.x1, action.y1), *grid.from_pixel(action.x2, action.y2))
            name, arguments = "add_bbox", {"bbox_2d": list(corners)}
        elif isinstance(action, Click):
            name = "add_point"
            arguments = {"point_2d": list(grid.from_pixel(action.x, action.y)), "point_type": verb}
        call = json.dumps({"name": name, "arguments": arguments})
        before = check_free(thought, "<tool_call>", "</think>") + "\n" if thought else ""
        return f"{before}<tool_call>\n{call}\n</tool_call>"

    # reading

    def _read(self, text: str, grid: Grid) -> Action:
        rest = after_thought(text)
        if rest is None and "<think>" in text:
            raise Unread("<think> was not closed by </think>")  # a call weighed in it is none
        body, _ = between(text if rest is None else rest, "tool_call")
        name, arguments = self._call(body)
        if name == "add_bbox":
            x1, y1, x2, y2 = _positions(name, arguments, "bbox_2d", 4)
            (x1, y1), (x2, y2) = grid.to_pixel(x1, y1), grid.to_pixel(x2, y2)
            return grid.snap(Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
        if name == "add_point":
            x, y = grid.to_pixel(*_positions(name, arguments, "point_2d", 2))
            sign = arguments["point_type"]
            if sign not in self.signs:
                raise Unread(f"add_point: point_type is {safe(sign)}; wanted {' or '.join(self.signs)}")
            return grid.snap(Click(x, y, positive=sign == "positive"))
        return Stop() if name == "stop_action" else Undo()

    def _call(self, body: str) -> tuple[str, dict[str, Any]]:
        """A function's name and its arguments, all of them there and no other; their values are not looked at."""
        try:
            call = json.loads(body, object_pairs_hook=_once, parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise Unread('<tool_call> holds no JSON; wanted {"name": ..., "arguments": {...}}') from None
        if not isinstance(call, dict) or not {"name"} <= call.keys() <= {"name", "arguments"}:
            raise Unread('<tool_call> wants a JSON object with "name" and "arguments" and nothing else')
        wanted, name, arguments = self._wanted, call["name"], call.get("arguments")
        if not isinstance(name, str) or name not in wanted:
            raise Unread(f"there is no function {safe(name)} here; the functions are {', '.join(wanted)}")
        if arguments is None and not wanted[name]:
            arguments = {}
        if not isinstance(arguments, dict) or arguments.keys() != set(wanted[name]):
            raise Unread(f"{name} takes {' and '.join(wanted[name]) or 'no arguments'}, nothing else")
        return name, arguments


def _function(name: str, text: str, parameters: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"name": name, "description": text, "parameters": schema}


def _positions(name: str, arguments: dict[str, Any], key: str, count: int) -> list[int]:
    values = arguments[key]
    if not isinstance(values, list) or len(values) != count or not all(type(v) is int for v in values):
        raise Unread(f"{name}: {key} wants {count} whole numbers in a list")
    if min(values) < 0 or max(values) >= GRID:
        raise Unread(f"{name}: {key} has a number outside 0 to {GRID - 1}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Unread(f"the key {safe(key)} stands twice in one object")
        found[key] = value
    return found


def _refuse(constant: str) -> Any:
    raise Unread(f"{constant} is no position")
