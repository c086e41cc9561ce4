"""Episodes on disk: one JSON object a line, masks as COCO run lengths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from medseg_gym.errors import BadDataError
from medseg_gym.types import EPISODE_SCHEMA, Action, Box, Click, Episode, Mask, Stop, Turn, Undo, Unreadable

MAX_MASK_PIXELS = 64_000_000


def encode_mask(mask: Mask) -> dict[str, Any]:
    """COCO compressed run lengths {"size": [H, W], "counts": str} of an (H, W) mask; pycocotools reads them."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: Mapping[str, Any]) -> Mask:
    """The (H, W) mask of COCO run lengths; BadDataError if they do not add up to H * W."""
    from pycocotools import mask as coco

    try:
        height, width = (int(n) for n in rle["size"])
        counts = rle["counts"].encode("ascii")
    except (KeyError, TypeError, ValueError, AttributeError, UnicodeEncodeError) as error:
        raise BadDataError(f"not run lengths: {error!r}; wanted {{'size': [H, W], 'counts': str}}") from None
    if height < 1 or width < 1 or height * width > MAX_MASK_PIXELS or _total(counts) != height * width:
        raise BadDataError(f"run lengths do not add up to {height} x {width} pixels")
    return coco.decode({"size": [height, width], "counts": counts}).astype(np.bool_)


def _total(counts: bytes) -> int:
    """Pixels that the compressed runs cover, or -1 where a run is negative or cut off (pycocotools does not look)."""
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value, shift, more = 0, 0, True
        while more:
            if position == len(counts) or shift > 60:
                return -1
            char = counts[position] - 48
            if not 0 <= char < 64:
                return -1
            value |= (char & 31) << shift
            more = bool(char & 32)
            position += 1
            shift += 5
            if not more and char & 16:
                value |= -1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            return -1
        runs.append(value)
    return sum(runs)


def encode_action(action: Action | Unreadable) -> dict[str, Any]:
    """A JSON-ready action: {"do": "click", "x": 3, "y": 4, "positive": true} and the like."""
    return {"do": type(action).__name__.lower(), **asdict(action)}


_ACTIONS: dict[str, type] = {t.__name__.lower(): t for t in (Click, Box, Stop, Undo, Unreadable)}


def decode_action(record: Mapping[str, Any]) -> Action | Unreadable:
    try:
        kind = _ACTIONS[record["do"]]
        return kind(**{name: value for name, value in record.items() if name != "do"})
    except (KeyError, TypeError) as error:
        raise BadDataError(f"not an action: {dict(record)!r} ({error})") from None


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
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def from_json(line: str) -> Episode:
    """The episode of one line; BadDataError says what is wrong with it."""
    try:
        record = json.loads(line)
        if record.get("schema") != EPISODE_SCHEMA:
            raise BadDataError(f"episode schema {record.get('schema')!r}; this version reads {EPISODE_SCHEMA}")
        record["turns"] = tuple(Turn(**{**t, "action": decode_action(t["action"])}) for t in record["turns"])
        record["iou"], record["dice"] = tuple(record["iou"]), tuple(record["dice"])
        if record["spacing_mm"] is not None:
            record["spacing_mm"] = tuple(record["spacing_mm"])
        return Episode(**record)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise BadDataError(f"not an episode: {error!r}") from None
