"""What one stored episode must be by itself, and against its case: the checks of `verify` that play nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from medseg_gym.bench.replay import TOLERANCE, close
from medseg_gym.bench.rescore import MOST, NEEDS_TARGET, masks_of, measured, rewarded, tool_failed
from medseg_gym.bench.verify_findings import Finding, about, run_finding
from medseg_gym.datasets.base import WithStartMasks
from medseg_gym.envs.spaces import ActionCodec
from medseg_gym.errors import BadDataError, InvalidActionError, MedSegError
from medseg_gym.frames import Grid
from medseg_gym.rewards import RewardSpec
from medseg_gym.tools.base import with_prompt
from medseg_gym.types import Action, Box, Click, Decision, Episode, Mask, Prompt, Sample, Stop, Undo, Unreadable, View

MAX_PIXELS = 4_000_000_000  # of all masks of an episode: decoding must not take for ever


def well_formed(episode: Episode) -> Finding | None:
    """A finding where a field is of another type than evaluate writes: reading JSON checks no types."""
    for name, kind in _FIELDS.items():
        value = getattr(episode, name)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            return run_finding("tampered", name, f"{value!r:.100}", "what evaluate writes", turn=None)
    curves_fit = len(episode.iou) == len(episode.dice) == len(episode.turns) + 1
    if not curves_fit or not all(map(_number, (*episode.iou, *episode.dice))):
        what = f"{len(episode.iou)} IoU and {len(episode.dice)} Dice values for {len(episode.turns)} turns"
        return about(episode, "tampered", "curves", what, "a number before the first turn, and one after each")
    for t, turn in enumerate(episode.turns, start=1):
        terms = isinstance(turn.terms, dict) and all(map(_number, turn.terms.values()))
        if not (terms and _number(turn.reward) and isinstance(turn.tool_called, bool) and isinstance(turn.mask, dict)):
            return about(episode, "tampered", "turn", "a turn of other types", "what evaluate writes", turn=t)
    return None


_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("env", "tool", "policy", "key", "structure", "instruction", "patient", "reward", "error"), str),
    **dict.fromkeys(("case", "seed", "horizon"), int),
    "ended": str,
    "start": (dict, type(None)),
    "spacing_mm": (tuple, type(None)),
    "extra": dict,
}


def check_episode(episode: Episode, settings: dict[str, Any], spec: RewardSpec) -> Iterator[Finding]:
    """What is wrong inside an episode, without its case: numbers, flags, prompts, masks, and how it ended.

    `settings` are the env's as run.json has them, read (bench.verify_run.env_settings).
    """
    yield from _numbers(episode)
    yield from _flags(episode)
    ended = ending(episode, settings)
    if ended is not None:
        yield about(episode, "tampered", "ended", *ended, turn=len(episode.turns))
    masks = list(_masks(episode))
    yield from masks
    if not masks:
        yield from _prompts(episode)
    yield from _rewards(episode, spec)


def ending(episode: Episode, settings: dict[str, Any]) -> tuple[str, str] | None:
    """(found, wanted) where the end does not follow from the turns by the env's rules; None where it does."""
    repeats, readable, last = 0, 0, None
    for number, turn in enumerate(episode.turns, start=1):
        action = turn.action
        repeats = repeats + 1 if action == last else 1
        last, readable = action, readable + (not isinstance(action, Unreadable))
        ended: str | None = None
        if number == len(episode.turns) and tool_failed(episode):
            ended = "failed"
        elif isinstance(action, Stop):
            ended = "stopped"
        elif isinstance(action, Unreadable) and settings["on_unreadable"] == "end":
            ended = "unreadable"
        elif not isinstance(action, Unreadable) and 0 < settings["stop_after_repeats"] <= repeats:
            ended = "stopped"
        elif number >= episode.horizon:
            ended = "horizon" if readable else "unreadable"
        if ended is not None:
            if number < len(episode.turns):
                return f"{len(episode.turns)} turns", f"{ended} after turn {number}"
            return None if ended == episode.ended else (episode.ended, ended)
    # where a policy raised, or a case could not be read, the env never came to an end
    return None if episode.ended == "failed" and episode.error else (episode.ended, "still going on")


def _numbers(episode: Episode) -> Iterator[Finding]:
    for t, (iou, dice) in enumerate(zip(episode.iou, episode.dice, strict=True)):
        if not (0 <= iou <= 1 and 0 <= dice <= 1):
            yield about(episode, "tampered", "overlap", f"IoU {iou}, Dice {dice}", "numbers from 0 to 1", turn=t)
        elif abs(dice - 2 * iou / (1 + iou)) > TOLERANCE:  # either tells the other
            yield about(episode, "tampered", "overlap", f"IoU {iou:.6f}, Dice {dice:.6f}", "two that fit", turn=t)


def _flags(episode: Episode) -> Iterator[Finding]:
    if episode.error and episode.ended != "failed":
        yield about(episode, "tampered", "error", episode.error, f"none, as it {episode.ended}")
    failed = tool_failed(episode)
    for t, turn in enumerate(episode.turns, start=1):
        wanted = isinstance(turn.action, Click | Box) and not (failed and t == len(episode.turns))
        if turn.tool_called is not wanted:
            yield about(episode, "tampered", "tool_called", turn.tool_called, wanted, turn=t)


def _masks(episode: Episode) -> Iterator[Finding]:
    """Masks that are none, and those that a stop, an undo or an unreadable turn cannot have left."""
    records = [episode.start, *(turn.mask for turn in episode.turns)]
    pixels = sum(_pixels(record) for record in records if record is not None)
    if pixels > MAX_PIXELS:
        yield about(episode, "tampered", "mask", f"{pixels} pixels in all", f"at most {MAX_PIXELS}")
        return
    stack: list[bytes] = []
    turns, t = iter(episode.turns), 0
    try:
        for t, mask in enumerate(masks_of(episode)):
            now = hashlib.sha256(np.packbits(mask).tobytes()).digest()
            if t == 0:
                empty = hashlib.sha256(np.packbits(np.zeros_like(mask)).tobytes()).digest()
                stack = [empty] if episode.start is None else [empty, now]
                continue
            turn = next(turns)
            if isinstance(turn.action, Click | Box) and turn.tool_called:
                stack.append(now)
            elif isinstance(turn.action, Undo) and len(stack) > 1:
                stack.pop()
            if stack[-1] != now:
                word = type(turn.action).__name__.lower()
                yield about(episode, "tampered", "mask", f"another mask after {word}", "the one before", turn=t)
                return
            if t and stack and now == empty and episode.iou[t] != episode.iou[0] and episode.start is None:
                yield about(episode, "tampered", "iou", episode.iou[t], f"{episode.iou[0]}, as empty", turn=t)
    except BadDataError as error:
        yield about(episode, "tampered", "mask", error, "run lengths", turn=t + 1 if stack else t)


def _pixels(record: Any) -> int:
    try:
        height, width = record["size"]
        return int(height) * int(width)
    except (KeyError, TypeError, ValueError):
        return 0  # decoding says what is wrong with it


def _prompts(episode: Episode) -> Iterator[Finding]:
    """Prompts that lie outside the image or off the grid; the masks tell its size."""
    if not episode.turns:
        return
    height, width = (int(n) for n in episode.turns[0].mask["size"])
    grid = Grid(height, width)
    for t, turn in enumerate(episode.turns, start=1):
        if isinstance(turn.action, Click | Box) and grid.snap(turn.action) != turn.action:
            wanted = f"{grid.snap(turn.action)}: on the grid of a {height} x {width} image"
            yield about(episode, "tampered", "action", turn.action, wanted, turn=t)


def _rewards(episode: Episode, spec: RewardSpec) -> Iterator[Finding]:
    """Terms that do not add up, and those that do not follow from the stored curve; clicks need the target."""
    for t, turn in enumerate(episode.turns, start=1):
        total = sum(turn.terms.values())
        if not abs(total - turn.reward) <= TOLERANCE:
            yield about(episode, "tampered", "reward", turn.reward, f"{total}, the sum of its terms", turn=t)
            return
    blind = set(NEEDS_TARGET) if not tool_failed(episode) else set()
    for t, (turn, terms) in enumerate(zip(episode.turns, rewarded(episode, spec), strict=True), start=1):
        left_out = blind & terms.keys() if isinstance(turn.action, Click) else set()
        found = {name: value for name, value in turn.terms.items() if name not in left_out}
        wanted = {name: value for name, value in terms.items() if name not in left_out}
        if turn.terms.keys() != terms.keys() or not close(found, wanted):
            if blind & terms.keys() and tool_failed(episode) and t == len(episode.turns):
                continue  # takes back clicks' terms that are not known here
            yield about(episode, "tampered", "reward", _terms(turn.terms), _terms(terms), turn=t)
            return


def _number(value: object) -> bool:
    """Whether it can be worked with: no nan, and no integer that is too large for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST


def _terms(terms: Any) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in terms.items())


# with the case


def check_case(episode: Episode, sample: Sample, start: Mask | None, spec: RewardSpec) -> Iterator[Finding]:
    """The stored episode against its case: labels, start mask, and every mask scored again."""
    for name in ("structure", "instruction", "patient", "spacing_mm"):
        found, wanted = getattr(episode, name), getattr(sample, name)
        if found != wanted:
            yield about(episode, "tampered", name, found, wanted)
    try:
        first = next(masks_of(episode), None)
        if episode.start is None and start is not None:
            yield about(episode, "tampered", "start mask", "none", f"one of {np.count_nonzero(start)} pixels", turn=0)
        elif episode.start is not None and (start is None or first is None or not np.array_equal(first, start)):
            yield about(
                episode, "tampered", "start mask", "one", "the case's own" if start is not None else "none", turn=0
            )
        curves = measured(episode, sample.target)
    except BadDataError as error:
        yield about(episode, "tampered", "mask", error, f"masks of {sample.target.shape}")
        return
    for what, found, wanted in zip(("iou", "dice"), (episode.iou, episode.dice), curves, strict=True):
        for t, (one, other) in enumerate(zip(found, wanted, strict=True)):
            if abs(one - other) > TOLERANCE:
                yield about(episode, "tampered", what, one, f"{other}, that of the stored mask", turn=t)
                return
    try:
        terms = rewarded(episode, spec, sample.target)
    except BadDataError:
        return  # a click outside the image: said already
    for t, (turn, earned) in enumerate(zip(episode.turns, terms, strict=True), start=1):
        if not close(turn.terms, earned):
            yield about(episode, "tampered", "reward", _terms(turn.terms), _terms(earned), turn=t)
            return


def start_of(dataset: Any, key: str) -> Mask | None:
    return dataset.start_mask(key) if isinstance(dataset, WithStartMasks) else None


def check_decisions(episode: Episode, sample: Sample, policy: Any, verbs: Sequence[str]) -> Iterator[Finding]:
    """What a scripted policy decides on the stored views, against the stored actions: it needs no tool.

    Another seed shows where the policy draws (Random, jitter), another policy nearly always.
    """
    rng = np.random.default_rng([episode.seed, episode.case])
    codec, grid = ActionCodec(verbs), Grid(*sample.target.shape)
    for t, (view, turn) in enumerate(zip(views(episode, sample), episode.turns, strict=True), start=1):
        try:
            decision: Decision = policy.act([view], [rng])[0]
            action: Any = codec.read(decision.action, grid) if decision.action is not None else Unreadable("")
        except (InvalidActionError, MedSegError) as error:
            action = Unreadable(f"{error!s:.300}")
        if action != turn.action and not isinstance(action, Unreadable):
            wanted = f"{action}: what {episode.policy} with seed {episode.seed} does here"
            yield about(episode, "different", "action", turn.action, wanted, turn=t)
            return


def views(episode: Episode, sample: Sample) -> Iterator[View]:
    """What the policy saw before every turn, from the stored masks and actions."""
    history: list[tuple[Mask, Action | Unreadable]] = []
    stack: list[tuple[Prompt, ...]] = [()] if episode.start is None else [(), ()]
    for t, (turn, mask) in enumerate(zip(episode.turns, masks_of(episode), strict=False)):
        mask.flags.writeable = False
        yield View(
            key=sample.key,
            image=sample.image,
            mask=mask,
            prompts=stack[-1],
            structure=sample.structure,
            instruction=sample.instruction,
            turn=t,
            horizon=episode.horizon,
            history=tuple(history),
        )
        history.append((mask, turn.action))
        if isinstance(turn.action, Click | Box) and turn.tool_called:
            stack.append(with_prompt(stack[-1], turn.action))
        elif isinstance(turn.action, Undo) and len(stack) > 1:
            stack.pop()
