"""Episodes on disk: one JSON object a line, masks as COCO run lengths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from medseg_gym.errors import BadDataError
from medseg_gym.types import EPISODE_SCHEMA, Action, Answer, Box, Click, Episode, Mask, Stop, Turn, Undo, Unreadable

MAX_MASK_PIXELS = 64_000_000


def encode_mask(mask: Mask) -> dict[str, Any]:
    """COCO compressed run lengths {"size": [H, W], "counts": str} of an (H, W) mask; pycocotools reads them."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: Mapping[str, Any]) -> Mask:
    """The (H, W) mask of COCO run lengths; BadDataError if they do not add up to H * W."""
    try:
        height, width = (int(n) for n in rle["size"])
        runs = _runs(rle["counts"].encode("ascii"))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise BadDataError(f"not run lengths: {error!r}; wanted {{'size': [H, W], 'counts': str}}") from None
    if height < 1 or width < 1 or height * width > MAX_MASK_PIXELS or sum(runs) != height * width:
        raise BadDataError(f"run lengths do not add up to {height} x {width} pixels")
    values = np.arange(len(runs)) % 2 == 1  # runs of background and mask take turns, column by column
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def _runs(counts: bytes) -> list[int]:
    """The runs of COCO's compressed text; ValueError where one is negative or cut off.

    pycocotools' own decoder neither looks nor stops at the mask's end, and files come from strangers.
    """
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value, shift, more = 0, 0, True
        while more:
            if position == len(counts) or shift > 60:
                raise ValueError("a run is cut off")
            char = counts[position] - 48
            if not 0 <= char < 64:
                raise ValueError(f"character {chr(counts[position])!r}")
            value |= (char & 31) << shift
            more = bool(char & 32)
            position += 1
            shift += 5
            if not more and char & 16:
                value |= -1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            raise ValueError("a run is negative")
        runs.append(value)
    return runs


def encode_action(action: Action | Unreadable) -> dict[str, Any]:
    """A JSON-ready action: {"do": "click", "x": 3, "y": 4, "positive": true} and the like."""
    return {"do": type(action).__name__.lower(), **asdict(action)}


_ACTIONS: dict[str, type] = {t.__name__.lower(): t for t in (Click, Box, Stop, Undo, Answer, Unreadable)}


def decode_action(record: Mapping[str, Any]) -> Action | Unreadable:
    """The action of a record; BadDataError where its kind, a name or a value's type is not encode_action's."""
    try:
        kind = _ACTIONS[record["do"]]
        values = {name: value for name, value in record.items() if name != "do"}
        for name, value in values.items():
            wanted = {"positive": bool, "reason": str, "text": str}.get(name, int)
            if type(value) is not wanted:
                raise TypeError(f"{name} is {value!r}; wanted {wanted.__name__}")
        return kind(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadDataError(f"not an action: {record!r} ({error})") from None


def to_json(episode: Episode) -> str:
    """One line of JSON without a newline; equal episodes give equal text. nan is refused."""
    record = {f.name: getattr(episode, f.name) for f in fields(episode)}
    record["turns"] = [
        {
            "action": encode_action(turn.action),
            "reward": turn.reward,
            "terms": dict(turn.terms),
            "tool_called": turn.tool_called,
            "mask": dict(turn.mask),
            "text": turn.text,
        }
        for turn in episode.turns
    ]
    line = json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return line.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair in a completion is no UTF-8


def from_json(line: str) -> Episode:
    """The episode of one line; BadDataError says what is wrong with it."""
    try:
        record = json.loads(line, parse_constant=_refuse)
        if record.get("schema") != EPISODE_SCHEMA:
            raise BadDataError(f"episode schema {record.get('schema')!r}; this version reads {EPISODE_SCHEMA}")
        record["turns"] = tuple(Turn(**{**t, "action": decode_action(t["action"])}) for t in record["turns"])
        record["iou"], record["dice"] = tuple(record["iou"]), tuple(record["dice"])
        if record["spacing_mm"] is not None:
            record["spacing_mm"] = tuple(record["spacing_mm"])
        return Episode(**record)
    except BadDataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise BadDataError(f"not an episode: {error!r}") from None


def _refuse(constant: str) -> None:
    raise BadDataError(f"not an episode: {constant} is no number")
