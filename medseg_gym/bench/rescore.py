"""Rewards and overlaps again from stored episodes: what the stored masks are worth, and what another reward would pay.

Nothing is played: the actions, the masks and the IoU and Dice curves of an episode are all that a reward may look at,
and only the terms in NEEDS_TARGET need the case's target on top. With the reward of the run itself the stored rewards
come out again, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym import metrics, rewards
from medseg_gym.episodes import decode_mask
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rewards import RewardSpec
from medseg_gym.types import Box, Click, Episode, Mask

MOST = 1e9  # of any number in a stranger's run: an int may be too large for a float
NEEDS_TARGET = ("ibis_click",)  # terms that ask whether a click fell on a missed or a spilled pixel


def masks_of(episode: Episode) -> Iterator[Mask]:
    """The T + 1 stored masks, one at a time: the start (empty where none was given), then one a turn.

    BadDataError for run lengths that do not add up and for masks of different sizes; an episode without a turn and
    without a start mask has none to tell the size by, and yields nothing.
    """
    stored = [turn.mask for turn in episode.turns]
    if episode.start is None and not stored:
        return
    first = episode.start if episode.start is not None else stored[0]
    start = decode_mask(first)
    yield start if episode.start is not None else np.zeros_like(start)
    for number, record in enumerate(stored, start=1):
        mask = start if record is first else decode_mask(record)
        if mask.shape != start.shape:
            raise BadDataError(f"turn {number}: a mask of {mask.shape}; the others are {start.shape}")
        yield mask


def measured(episode: Episode, target: Mask) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The (iou, dice) curves of the stored masks against an (H, W) target, T + 1 values each."""
    masks: Sequence[Mask] = list(masks_of(episode)) or [np.zeros_like(target)]
    if masks[0].shape != target.shape:
        raise BadDataError(f"masks of {masks[0].shape}; the case is {target.shape}")
    areas = [metrics.areas(mask, target) for mask in masks]
    return tuple(metrics.iou_of_areas(*a) for a in areas), tuple(metrics.dice_of_areas(*a) for a in areas)


def hits(episode: Episode, target: Mask) -> list[bool | None]:
    """For every turn whether its click fell on an error of its sign; None where it was no click.

    A click outside the image raises BadDataError.
    """
    height, width = target.shape
    found: list[bool | None] = []
    for turn, mask in zip(episode.turns, masks_of(episode), strict=False):  # the mask before the turn
        action = turn.action
        if not isinstance(action, Click):
            found.append(None)
            continue
        if not (0 <= action.x < width and 0 <= action.y < height):
            raise BadDataError(f"a click at x {action.x}, y {action.y}; the image is {height} x {width}")
        inside, covered = bool(target[action.y, action.x]), bool(mask[action.y, action.x])
        found.append((inside and not covered) if action.positive else (covered and not inside))
    return found


def tool_failed(episode: Episode) -> bool:
    """Whether the tool raised in the last turn: the only prompt of an episode that called no tool."""
    last = episode.turns[-1] if episode.turns else None
    return episode.ended == "failed" and last is not None and _is_prompt(last.action) and not last.tool_called


def rewarded(episode: Episode, spec: RewardSpec, target: Mask | None = None) -> list[dict[str, float]]:
    """The weighted terms that every turn earns under a reward, from the stored curves and actions.

    Without a target the terms in NEEDS_TARGET are 0. A turn's reward is the sum of its terms, in their order.
    """
    clicks = hits(episode, target) if target is not None and needs_target(spec) else [None] * len(episode.turns)
    failed, count = tool_failed(episode), len(episode.turns)
    progress = rewards.start(episode.iou[0], episode.dice[0])
    earned: list[dict[str, float]] = []
    for t, (turn, hit) in enumerate(zip(episode.turns, clicks, strict=True), start=1):
        if failed and t == count:  # takes back what was paid (Engine._fail)
            earned.append({name: -sum(terms[name] for terms in earned) for name in spec.potential(progress)})
            break
        now = rewards.after(progress, turn.action, episode.iou[t], episode.dice[t], hit=hit)
        ends = t == count and episode.ended != "failed"
        earned.append(spec.terms_of_turn(progress, now, ends=ends))
        progress = now
    return earned


def needs_target(spec: RewardSpec) -> bool:
    return any(name in spec.terms for name in NEEDS_TARGET)


def spec_of(record: Any) -> RewardSpec:
    """The reward that `rewards.describe` wrote; BadDataError for anything else."""
    try:
        spec = RewardSpec(**record)
        if not all(abs(weight) <= MOST for weight in spec.terms.values()):
            raise ValueError(f"weights beyond {MOST:g}")
        return spec
    except (TypeError, ValueError, OverflowError, MedSegError) as error:
        raise BadDataError(f"not a reward: {record!r:.200} ({error})") from None


def rescore_run(folder: str | Path, spec: RewardSpec) -> dict[str, Any]:
    """`rescore` of the run in a folder, with the datasets that are here; notes say which of them are not."""
    from medseg_gym.bench.runs import read_run
    from medseg_gym.bench.verify_episode import well_formed
    from medseg_gym.bench.verify_run import check_settings
    from medseg_gym.bench.verify_source import sources_of

    run = read_run(folder)
    check_settings(run.settings)
    for episode in run.episodes:
        wrong = well_formed(episode)
        if wrong is not None:
            raise BadDataError(f"{folder}: {wrong}; see: medseg-gym leaderboard verify {folder}")
    datasets: dict[str, Any] = {}
    notes: list[str] = []
    for env, source in sources_of(run, Path(folder)).items() if needs_target(spec) else ():
        try:
            datasets[env] = source.dataset_here()
        except MedSegError as error:
            notes.append(f"{env}: {error}")
    scored = rescore(run.settings, run.episodes, spec, datasets)
    return {**scored, "notes": [*notes, *scored["notes"]]}


def rescore(
    settings: Mapping[str, Any],
    episodes: Sequence[Episode],
    spec: RewardSpec,
    datasets: Mapping[str, Any],
) -> dict[str, Any]:
    """What a reward pays for the episodes of a run: rows as in a summary, and every turn.

    `datasets` has the data of each env by id, and is only looked into where the reward needs targets; an env without
    its data there gets rewards of None and a note. Failed and unreadable episodes count as 0 in a row's mean.
    """
    rows: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    asks = needs_target(spec)
    for env, policy in settings["pairs"]:
        mine = [e for e in episodes if (e.env, e.policy) == (env, policy)]
        blind = asks and env not in datasets
        if blind:
            missing = ", ".join(name for name in NEEDS_TARGET if name in spec.terms)
            notes.append(f"{env}: {missing} needs the targets, and the dataset is not here; its rewards are left out")
        paid = []
        for episode in mine:
            target = _target(datasets[env], episode) if asks and not blind and episode.turns else None
            terms = [] if blind else rewarded(episode, spec, target)
            turns = [sum(t.values()) for t in terms]
            counts = episode.ended not in ("failed", "unreadable")
            paid.append(sum(turns) if counts else 0.0)
            records.append(
                {
                    "env": env,
                    "policy": policy,
                    "case": episode.case,
                    "key": episode.key,
                    "counts": counts,
                    "rewards": None if blind else turns,
                    "terms": None if blind else terms,
                }
            )
        stored = [sum(t.reward for t in e.turns) * (e.ended not in ("failed", "unreadable")) for e in mine]
        rows.append(
            {
                "env": env,
                "policy": policy,
                "episodes": len(mine),
                "reward": None if blind or not mine else float(np.mean(paid)),
                "stored": float(np.mean(stored)) if mine else None,
            }
        )
    return {"schema": 1, "reward": rewards.describe(spec), "notes": notes, "rows": rows, "episodes": records}


def _target(dataset: Any, episode: Episode) -> Mask:
    try:
        target: Mask = dataset[episode.key].target
    except KeyError:
        raise BadDataError(f"{dataset.name} has no case {episode.key!r}; it is not the dataset of this run") from None
    return target


def _is_prompt(action: Any) -> bool:
    return isinstance(action, Click | Box)
