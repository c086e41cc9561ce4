"""A trajectory as a record: two lines of JSON, checked on both ways.

The first line is the episode as `episodes.to_json` writes it, the second what the trajectory has beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields

from medseg_gym.episodes import from_json, to_json
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.types import Episode

MAX_RECORD = 16 * 2**20  # bytes

_BESIDE = tuple(f.name for f in fields(Trajectory) if f.name != "episode")


@dataclass(frozen=True, slots=True)
class Head:
    """What a file's index tells of a trajectory, so that choosing needs no records read."""

    key: str
    strategy: str
    kind: str
    dropped: str
    turns: int


def head_of(trajectory: Trajectory) -> Head:
    episode = trajectory.episode
    return Head(episode.key, trajectory.strategy, trajectory.kind, trajectory.dropped, len(episode.turns))


def encode(trajectory: Trajectory) -> bytes:
    """The record of a trajectory; MedSegError where something in it is no JSON or its lengths do not fit."""
    _check_lengths(trajectory, MedSegError)
    try:
        beside = {name: getattr(trajectory, name) for name in _BESIDE} | {"extra": dict(trajectory.extra)}
        line = json.dumps(beside, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        record = to_json(trajectory.episode).encode() + b"\n" + line.encode("utf-8", "backslashreplace")
    except (TypeError, ValueError) as error:
        raise MedSegError(f"trajectory of {trajectory.episode.key}: {error}; wanted what JSON can hold") from None
    if len(record) > MAX_RECORD:
        raise MedSegError(f"trajectory of {trajectory.episode.key}: {len(record)} bytes; at most {MAX_RECORD}")
    return record


def decode(record: bytes) -> Trajectory:
    """The trajectory of a record; BadDataError says what is wrong with it."""
    try:
        first, second = record.decode("utf-8").split("\n")
        episode, beside = from_json(first), json.loads(second, parse_constant=_refuse)
        if not isinstance(beside, dict) or beside.keys() != set(_BESIDE):
            raise BadDataError(f"a trajectory holds {', '.join(_BESIDE)}")
        for name in ("marked", "thoughts"):
            beside[name] = tuple(beside[name])
        trajectory = Trajectory(episode, **beside)
    except BadDataError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise BadDataError(f"not a trajectory: {error}") from None
    _check_types(trajectory)
    _check_lengths(trajectory, BadDataError)
    return trajectory


def _check_lengths(trajectory: Trajectory, kind: type[MedSegError]) -> None:
    turns = len(trajectory.episode.turns)
    for name in ("marked", "thoughts"):
        given = getattr(trajectory, name)
        if given and len(given) != turns:
            raise kind(f"{trajectory.episode.key}: {len(given)} values in {name}; wanted one a turn, {turns}, or none")


def check_masks(episode: Episode, height: int, width: int, kind: type[MedSegError]) -> None:
    """Raises `kind` where a mask is not of the image's size, or no run lengths at all."""
    for rle in (episode.start, *(turn.mask for turn in episode.turns)):
        try:
            if rle is None or (list(rle["size"]) == [height, width] and isinstance(rle["counts"], str)):
                continue
        except (KeyError, TypeError):
            pass
        raise kind(f"{episode.key}: a mask is {rle!s:.60}; wanted run lengths of {height}x{width}, its image's size")


def _check_types(trajectory: Trajectory) -> None:
    """BadDataError where a field that is used has another type than is written: reading JSON checks none."""
    episode = trajectory.episode
    texts: list[object] = [getattr(trajectory, n) for n in ("strategy", "kind", "answer", "instruction", "dropped")]
    texts += [getattr(episode, f.name) for f in fields(Episode) if f.type == "str"]
    texts += [*trajectory.thoughts, *(turn.text for turn in episode.turns)]
    curves = [*episode.iou, *episode.dice, *(turn.reward for turn in episode.turns)]
    if (
        not all(isinstance(text, str) for text in texts)
        or not all(type(number) in (int, float) for number in curves)
        or not all(isinstance(mark, bool) for mark in trajectory.marked)
        or type(trajectory.tries) is not int
        or not isinstance(trajectory.extra, Mapping)
        or len(episode.iou) != len(episode.turns) + 1
        or len(episode.dice) != len(episode.turns) + 1
    ):
        raise BadDataError("a field is of another type, or a curve of another length, than is written")


def _refuse(constant: str) -> None:
    raise BadDataError(f"{constant} is no number")
