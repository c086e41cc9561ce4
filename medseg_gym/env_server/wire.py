"""What env server and client say to each other: actions, options and answers, as JSON or as messages with arrays."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from medseg_gym.episodes import decode_action, decode_mask, encode_action, encode_mask
from medseg_gym.errors import BadDataError, InvalidActionError, check_keywords
from medseg_gym.frames import GRID, Grid
from medseg_gym.policies import protocols
from medseg_gym.policies.protocols.base import MAX_TEXT
from medseg_gym.types import Action, Box, Click, Decision, Image, Stop, Undo, Unreadable, View
from medseg_gym.web.message import Message, pack

PROTOCOL = 1
OPTIONS = (
    *("split", "structures", "horizon", "size", "observation", "reward", "timing", "verbs"),
    *("stop_after_repeats", "on_unreadable", "on_error"),
)  # what a client may choose of an env; data, tool and their options are the server's
METRICS = ("iou", "dice", "peak_iou", "reward_terms")  # of info; hidden, the reward goes with them, which tells the IoU
FORMS = (
    "[verb, x1, y1, x2, y2], or one of "
    '{"box": [x1, y1, x2, y2]}, {"click": [x, y], "positive": true}, {"stop": true}, {"undo": true} on the 0-999 grid, '
    '{"do": "click", "x": .., "y": .., "positive": ..} and the like in pixels of the image, '
    'or {"text": a completion, "protocol": its name}'
)


def read_action(given: Any, grid: Grid, verbs: tuple[str, ...]) -> Decision | list[int] | Action | Unreadable:
    """What an env is to do for the JSON of an action: a vector as it is, a typed action, or a protocol's decision.

    Errors say what came and what was wanted; whether the env allows the verb is its own to say.
    """
    if isinstance(given, list):
        if not all(type(number) is int and abs(number) <= 10**6 for number in given):
            raise InvalidActionError(f"action {shown(given)}; wanted {FORMS}")
        return given
    if not isinstance(given, dict):
        raise InvalidActionError(f"action {shown(given)}; wanted {FORMS}")
    if "do" in given:
        action = decode_action(given)
        numbers = [value for value in encode_action(action).values() if type(value) is int]
        if any(abs(number) > 10**6 for number in numbers):
            raise InvalidActionError(f"action {shown(given)}: more than a million pixels away")
        if any(len(text) > MAX_TEXT for text in given.values() if isinstance(text, str)):
            raise InvalidActionError(f"action {shown(given)}; wanted texts of {MAX_TEXT} characters at most")
        return action
    if "text" in given:
        return _spoken(given, grid, verbs)
    return _on_grid(given, grid)


def write_action(action: Any) -> Any:
    """The JSON of whatever `step` was given; read_action of it does the same. Else InvalidActionError."""
    if isinstance(action, Click | Box | Stop | Undo | Unreadable):
        return encode_action(_plain(action))
    if isinstance(action, str | bytes | Mapping) or action is None:
        raise InvalidActionError(
            f"action {action!r}; wanted a vector of 5 integers, or a Click, Box, Stop or Undo record"
        )
    array = np.asarray(action)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InvalidActionError(f"action of shape {array.shape}, dtype {array.dtype}; wanted 5 integers")
    return array.tolist()


def read_options(given: Any) -> dict[str, Any]:
    """The env options in a request: JSON scalars and lists of texts under names that a client may choose."""
    if not isinstance(given, dict):
        raise BadDataError(f"options {shown(given)}; wanted an object of env options")
    check_keywords("env option", given, OPTIONS)
    for name, value in given.items():
        texts = isinstance(value, list) and len(value) <= 1000 and all(isinstance(v, str) for v in value)
        if not texts and not isinstance(value, str | int | None):
            raise BadDataError(f"option {name}={shown(value)}; wanted a text, a whole number or a list of texts")
    return given


def read_reset(given: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """Seed and options of a reset request: "sample" is a key, "start_mask" run lengths as episodes have them."""
    check_keywords("reset", given, ("call", "seed", "options"))
    seed, options = given.get("seed"), given.get("options")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise BadDataError(f"seed {shown(seed)}; wanted a whole number from 0, or null")
    if options is not None and not isinstance(options, dict):
        raise BadDataError(f'options {shown(options)}; wanted {{"sample": key, "start_mask": run lengths}}')
    read = dict(options or {})
    if read.get("start_mask") is not None:
        if not isinstance(read["start_mask"], dict):
            raise BadDataError("start_mask is no run lengths; wanted {'size': [H, W], 'counts': str}")
        read["start_mask"] = decode_mask(read["start_mask"])
    return seed, read


def write_reset(seed: int | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The reset request of Gymnasium's two arguments."""
    told = dict(options or {})
    if told.get("start_mask") is not None:
        mask = np.asarray(told["start_mask"])
        if mask.dtype != np.bool_ or mask.ndim != 2:
            raise BadDataError(f"start_mask is {mask.shape} {mask.dtype}; wanted (H, W) bool")
        told["start_mask"] = encode_mask(mask)
    return {"seed": None if seed is None else int(seed), "options": told}


def pack_answer(told: Mapping[str, Any], observation: Any) -> bytes:
    """An answer with the observation's arrays as raw bytes."""
    parts = observation if isinstance(observation, dict) else {"": observation}
    arrays = {name: value for name, value in parts.items() if isinstance(value, np.ndarray)}
    numbers = {name: int(value) for name, value in parts.items() if name not in arrays}
    shapes = [[name, list(array.shape)] for name, array in arrays.items()]
    return pack({**told, "arrays": shapes, "numbers": numbers}, arrays.values())


def unpack_answer(body: bytes) -> tuple[dict[str, Any], Any]:
    """What was told, and the observation."""
    message = Message(body, len(body))
    try:
        parts: dict[str, Any] = {}
        for name, shape in message.head["arrays"]:
            if not all(type(n) is int and 0 < n <= 10**6 for n in shape):
                raise BadDataError(f"an array of shape {shape}")
            parts[name] = message.array(tuple(shape), np.dtype(np.uint8)).copy()
        message.end()
        parts |= {name: np.int64(value) for name, value in message.head["numbers"].items()}
        return message.head, parts.get("", parts)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadDataError(f"not an answer of an env server ({error!r})") from None


def json_observation(observation: Any) -> Any:
    """An observation as JSON: arrays as {"png": base64}, masks white on black."""
    if not isinstance(observation, dict):
        return {"png": base64.b64encode(png(observation)).decode()}
    return {
        name: json_observation(value) if isinstance(value, np.ndarray) else int(value)
        for name, value in observation.items()
    }


def png(picture: Image) -> bytes:
    """The PNG of an RGB picture, or of a 0/1 mask as white on black."""
    import cv2

    from medseg_gym.policies.chat import png as rgb

    if picture.ndim == 3:
        return rgb(picture)
    packed, data = cv2.imencode(".png", picture * np.uint8(255))
    assert packed, "a mask of bytes can be packed"
    return data.tobytes()


def pack_view(view: View) -> bytes:
    """A View with its masks as run lengths; the target is not in it."""
    head = {
        "key": view.key,
        "structure": view.structure,
        "instruction": view.instruction,
        "turn": view.turn,
        "horizon": view.horizon,
        "mask": encode_mask(view.mask),
        "prompts": [encode_action(prompt) for prompt in view.prompts],
        "history": [[encode_mask(mask), encode_action(action)] for mask, action in view.history],
        "image": list(view.image.shape),
    }
    return pack(head, [view.image])


def unpack_view(body: bytes) -> View:
    message = Message(body, len(body))
    head = message.head
    try:
        image = message.array(tuple(int(n) for n in head["image"]), np.dtype(np.uint8))
        prompts = tuple(decode_action(record) for record in head["prompts"])
        history = tuple((decode_mask(mask), decode_action(record)) for mask, record in head["history"])
        names = ("key", "structure", "instruction", "turn", "horizon")
        told = {name: head[name] for name in names}
        return View(image=image, mask=decode_mask(head["mask"]), prompts=prompts, history=history, **told)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise BadDataError(f"not a view of an env server ({error!r})") from None


def shown(value: Any) -> str:
    """What came, as an error quotes it: JSON, its beginning."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 200 else text[:197] + "..."


def _on_grid(given: Mapping[str, Any], grid: Grid) -> Action:
    keys = set(given)
    if keys in ({"stop"}, {"undo"}) and given[keys.pop()] is True:
        return Stop() if "stop" in given else Undo()
    if set(given) == {"box"}:
        x1, y1, x2, y2 = _positions(given["box"], 4, given)
        (x1, y1), (x2, y2) = grid.to_pixel(x1, y1), grid.to_pixel(x2, y2)
        return Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    if {"click"} <= set(given) <= {"click", "positive"} and type(given.get("positive", True)) is bool:
        x, y = grid.to_pixel(*_positions(given["click"], 2, given))
        return Click(x, y, given.get("positive", True))
    raise InvalidActionError(f"action {shown(given)}; wanted {FORMS}")


def _positions(value: Any, count: int, given: Any) -> list[int]:
    if not isinstance(value, list) or len(value) != count or not all(type(n) is int and 0 <= n < GRID for n in value):
        raise InvalidActionError(f"action {shown(given)}; wanted {count} whole numbers from 0 to {GRID - 1}")
    return value


def _spoken(given: Mapping[str, Any], grid: Grid, verbs: tuple[str, ...]) -> Decision:
    check_keywords("action", given, ("text", "protocol"))
    text, name = given["text"], given.get("protocol", "medsam-agent")
    if not isinstance(text, str) or not isinstance(name, str):
        raise InvalidActionError(f"action {shown(given)}; wanted text and protocol to be texts")
    decision = protocols.make(name, verbs).parse(text, grid)
    return replace(decision, text=text[:MAX_TEXT])  # a longer one is unreadable, and would be kept for every turn


def _plain(action: Any) -> Any:
    """The record with Python's own numbers in it: NumPy's are no JSON."""
    values = {name: getattr(action, name) for name in action.__dataclass_fields__}
    if any(isinstance(value, float) and not math.isfinite(value) for value in values.values()):
        raise InvalidActionError(f"action {action!r}; wanted whole numbers of pixels")
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    return type(action)(**plain)
