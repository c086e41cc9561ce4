"""Plays stored episodes again through the real engine, and says how near the answers are to those that were stored.

exact       every mask, number and flag is equal to the last bit
equivalent  every mask has a Dice of at least EQUIVALENT with the stored one, and the stored numbers are those of the
            stored masks: no tolerance is guessed for IoU, Dice or rewards, some of which jump at thresholds
different   neither; `turn` is the first that shows it, 0 for the beginning
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from medseg_gym import metrics
from medseg_gym.bench.rescore import masks_of, measured, rewarded
from medseg_gym.envs.engine import Slot
from medseg_gym.envs.vector import SegmentVectorEnv
from medseg_gym.episodes import decode_mask
from medseg_gym.errors import BadDataError, InvalidActionError, MedSegError
from medseg_gym.rewards import RewardSpec
from medseg_gym.types import Episode, Mask

EQUIVALENT = 0.999  # Dice between the stored and the replayed mask
TOLERANCE = 1e-9  # between numbers that two sums of the same values may give

Verdict = Literal["exact", "equivalent", "different"]


@dataclass(frozen=True, slots=True)
class Replay:
    """How one episode came out."""

    verdict: Verdict
    dice: float = 1.0  # the least between a stored and a replayed mask
    turn: int | None = None  # the first turn that is not exact, or not equivalent where the verdict is "different"
    what: str = ""  # what differs: "mask", "iou", "reward", "action", ...
    found: str = ""  # as stored
    wanted: str = ""  # as replayed


@dataclass(slots=True)
class _Track:
    """An episode under way in a slot."""

    number: int
    episode: Episode
    stored: Iterator[Mask] = field(default_factory=lambda: iter(()))  # those not yet compared
    done: int = 0
    dice: float = 1.0
    inexact: int | None = None  # the first turn whose mask is not bit-equal


def replay(
    env: SegmentVectorEnv, episodes: Sequence[Episode], progress: Callable[[int], None] | None = None
) -> list[Replay]:
    """One Replay an episode, in order. `env` needs AutoresetMode.DISABLED, on_error="fail" and the run's settings.

    Cases are played in the order of their keys, whoever's they are, so that an image is encoded once.
    """
    waiting = sorted(range(len(episodes)), key=lambda i: (episodes[i].key, i), reverse=True)
    results: dict[int, Replay] = {}
    running: dict[int, _Track] = {}

    def settle(slot: int, result: Replay | None) -> None:
        if result is not None:
            results[running.pop(slot).number] = result

    while waiting or running:
        for slot in range(env.num_envs):
            while waiting and slot not in running:
                number = waiting.pop()
                running[slot] = _Track(number, episodes[number])
                settle(slot, _begin(env, slot, running[slot]) or _before(env, slot, running[slot]))
        slots = list(running)
        if slots:
            env.send([running[slot].episode.turns[running[slot].done].action for slot in slots], slots)
            env.recv()
        for slot in slots:
            now, track = env.engine.slot(slot), running[slot]
            settle(slot, _compare(now, track) or _before(env, slot, track))
        if progress is not None:
            progress(len(results))
    return [results[i] for i in range(len(episodes))]


def _begin(env: SegmentVectorEnv, slot: int, track: _Track) -> Replay | None:
    """Begins the episode; what is to be said of it already, else None."""
    episode = track.episode
    unread = is_unread(episode)
    try:
        start = None if episode.start is None else decode_mask(episode.start)
        env.engine.reset(slot, np.random.default_rng(0), {"sample": episode.key, "start_mask": start})
    except MedSegError as error:
        return Replay("exact") if unread else _different(0, "case", episode.key, f"{error}")
    now = env.engine.slot(slot)
    if unread:
        return _different(0, "case", episode.error, "a case that can be read here")
    if episode.start is None and now.start is not None:
        return _different(0, "start mask", "none", f"one of {np.count_nonzero(now.start)} pixels")
    if (episode.iou[0], episode.dice[0]) != (now.iou[0], now.dice[0]):
        return _different(0, "overlap", (episode.iou[0], episode.dice[0]), (now.iou[0], now.dice[0]))
    track.stored = masks_of(episode)
    try:
        next(track.stored, None)
    except BadDataError as error:
        return _different(0, "mask", error, "run lengths")
    return None


def _before(env: SegmentVectorEnv, slot: int, track: _Track) -> Replay | None:
    """Whether the episode is over, or its next action cannot be played; None where it can."""
    episode, now = track.episode, env.engine.slot(slot)
    if track.done == len(episode.turns):
        # where the policy raised, the env was still going on
        ended = "failed" if now.ended is None and episode.error else now.ended
        if ended != episode.ended:
            return _different(track.done, "ended", episode.ended, ended or "still going on")
        return Replay("exact") if track.inexact is None else _consistent(now, track, env.engine.reward)
    if now.ended is not None:
        return _different(track.done, "length", f"{len(episode.turns)} turns", f"{now.ended} after {track.done}")
    action = episode.turns[track.done].action
    try:
        read = env.engine.codec.read(action, now.grid)
    except InvalidActionError as error:
        return _different(track.done + 1, "action", action, error)
    return None if read == action else _different(track.done + 1, "action", action, f"{read}, on the grid")


def _compare(now: Slot, track: _Track) -> Replay | None:
    """The turn just played against the stored one; None where they agree or are equivalent so far."""
    turn, outcome = track.episode.turns[track.done], now.outcomes[-1]
    track.done += 1
    t = track.done
    try:
        stored = next(track.stored)
    except BadDataError as error:
        return _different(t, "mask", error, "run lengths")
    if stored.shape != outcome.mask.shape:
        return _different(t, "mask", stored.shape, outcome.mask.shape)
    if turn.tool_called != outcome.tool_called:
        return _different(t, "tool_called", turn.tool_called, outcome.tool_called)
    if not np.array_equal(stored, outcome.mask):
        overlap = metrics.dice(stored, outcome.mask)
        track.inexact, track.dice = track.inexact or t, min(track.dice, overlap)
        if overlap < EQUIVALENT:
            off = np.count_nonzero(stored != outcome.mask)
            return _different(t, "mask", f"{off} pixels off, Dice {overlap:.4f}", f"at least {EQUIVALENT}", overlap)
    if track.inexact is None:
        pairs = (
            ("iou", track.episode.iou[t], now.iou[t]),
            ("dice", track.episode.dice[t], now.dice[t]),
            ("reward", turn.reward, outcome.reward),
            ("terms", dict(turn.terms), dict(outcome.terms)),
        )
        for what, found, wanted in pairs:
            if found != wanted:
                return _different(t, what, found, wanted)
    return None


def _consistent(now: Slot, track: _Track, reward: RewardSpec) -> Replay:
    """ "equivalent" if the stored numbers are those of the stored masks; otherwise the first that is not."""
    episode, target = track.episode, now.sample.target
    for what, found, wanted in zip(
        ("iou", "dice"), (episode.iou, episode.dice), measured(episode, target), strict=True
    ):
        for t, (one, other) in enumerate(zip(found, wanted, strict=True)):
            if one != other:
                return _different(t, what, one, other, track.dice)
    for t, (turn, terms) in enumerate(zip(episode.turns, rewarded(episode, reward, target), strict=True), start=1):
        if not close(turn.terms, terms) or abs(turn.reward - sum(terms.values())) > TOLERANCE:
            return _different(t, "reward", turn.reward, sum(terms.values()), track.dice)
    return Replay("equivalent", track.dice, track.inexact, "mask")


def close(terms: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Whether two turns' terms have the same names and, within TOLERANCE, the same values."""
    return terms.keys() == others.keys() and all(abs(terms[name] - others[name]) <= TOLERANCE for name in terms)


def is_unread(episode: Episode) -> bool:
    """Whether the case could not be read when it was to be played (bench.drive)."""
    return episode.ended == "failed" and not episode.turns and episode.error.startswith("case: ")


def _different(turn: int, what: str, found: Any, wanted: Any, dice: float = 1.0) -> Replay:
    return Replay("different", dice, turn, what, f"{found!s:.200}", f"{wanted!s:.200}")
