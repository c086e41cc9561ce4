"""`sample`: trajectories of many cases at once, one tool call for all of them in every round; never an env.

What is recorded is what the env gives when the actions are replayed in it, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medseg_gym import rewards
from medseg_gym.bench.rescore import rewarded
from medseg_gym.episodes import encode_mask
from medseg_gym.errors import MedSegError, ToolUnavailableError, unknown
from medseg_gym.frames import Grid
from medseg_gym.rewards import RewardSpec
from medseg_gym.tools.base import SegmentationTool, advance, empty_state, given_state
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.reflect import SELF_CORRECTION, WRONG_START, chosen_kind, mistaken, wrong_start
from medseg_gym.trajectories.strategies import (
    BOX_TO_POINT,
    STRATEGIES,
    Asking,
    Course,
    Settings,
    outline,
    verdict,
)
from medseg_gym.types import Box, Click, Episode, Mask, MaskState, Prompt, Sample, Stop, Turn, Undo

Others = Callable[[], Sequence[Mask]]  # the targets of an image's other structures, read where they are wanted


def sample(
    tool: SegmentationTool,
    samples: Sequence[Sample],
    strategy: str,
    settings: Settings | None = None,
    rngs: Sequence[np.random.Generator] | None = None,
    *,
    starts: Sequence[Mask | None] | None = None,
    others: Sequence[Others] | None = None,
    reward: str | RewardSpec = "shaped",
    env: str = "",
    seed: int = 0,
    cases: Sequence[int] | None = None,
) -> list[Trajectory]:
    """One trajectory a sample, in order, dropped ones among them; a result depends on its sample and generator alone.

    Give a CachedTool, and each distinct image is encoded once. `starts` are masks that episodes begin with. Where the
    tool raises for a case, its trajectory is dropped as "failed", with the prompts until then. `env`, `seed` and
    `cases` only go into the records.
    """
    settings = settings or Settings()
    check_strategy(strategy, tool)
    rngs = [np.random.default_rng([seed, i]) for i in range(len(samples))] if rngs is None else rngs
    if len(rngs) != len(samples):
        raise MedSegError(f"{len(rngs)} generators for {len(samples)} samples; wanted one each")
    starts = [None] * len(samples) if starts is None else starts
    others = [tuple] * len(samples) if others is None else others
    courses = [
        begin(tool, one, strategy, settings, rng, start, other)
        for one, rng, start, other in zip(samples, rngs, starts, others, strict=True)
    ]
    plans = [_run(course, strategy, settings, rng) for course, rng in zip(courses, rngs, strict=True)]
    spec = rewards.resolve(reward)
    numbers = range(len(samples)) if cases is None else cases
    return [
        _trajectory(
            course, strategy, settings, spec, {"env": env, "tool": tool.fingerprint, "seed": seed, "case": case}
        )
        for course, case in zip(_finish(tool, courses, plans), numbers, strict=True)
    ]


def check_strategy(strategy: str, tool: SegmentationTool) -> None:
    """Raises where there is no such strategy, or the tool cannot take its prompts."""
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    for kind in (Box, Click) if strategy == BOX_TO_POINT else (Click,):
        if kind not in tool.prompts:
            raise MedSegError(f"{strategy} needs a {kind.__name__}, which {tool.name} cannot take; choose another tool")


def begin(
    tool: SegmentationTool,
    sample: Sample,
    strategy: str,
    settings: Settings,
    rng: np.random.Generator,
    start: Mask | None = None,
    others: Others = tuple,
) -> Course:
    """A case before its first action: with the start mask it is given, or with a wrong one where that is drawn."""
    kind = chosen_kind(settings, rng)
    if kind == WRONG_START and start is None:
        start = wrong_start(sample, others(), settings, rng)
    state = empty_state(sample) if start is None else given_state(tool, start)
    course = Course(
        sample,
        Grid(*sample.target.shape),
        [state],
        settings.turns(strategy),
        start=None if start is None else state.mask,
        reversible=kind == SELF_CORRECTION,
        kind=kind,
    )
    iou, dice = course.overlap(state)
    course.iou.append(iou)
    course.dice.append(dice)
    return course


def _run(course: Course, strategy: str, settings: Settings, rng: np.random.Generator) -> Asking[Course]:
    """A whole course: what is wrong at the start, the strategy, the stop, and a mistake where one is due."""
    wanted, course.kind = course.kind, "plain"
    if course.start is not None and course.iou[0] < settings.discard_below:
        course.take(Undo(), empty_state(course.sample))
        course.kind = WRONG_START
    if course.sample.target.any():
        yield from outline(course, strategy, settings, rng)
    course.take(Stop(), course.state)
    if wanted == SELF_CORRECTION and course.kind == "plain" and not verdict(course, strategy, settings):
        return (yield from mistaken(course, strategy, settings, rng))
    return course


def _finish(tool: SegmentationTool, courses: Sequence[Course], plans: Sequence[Asking[Course]]) -> list[Course]:
    """What all plans come to, with one tool call a round; a tool's exception ends the plan that it is about."""
    finished = list(courses)
    answers: dict[int, MaskState | Exception | None] = dict.fromkeys(range(len(plans)))
    while answers:
        asked: dict[int, tuple[MaskState, Prompt]] = {}
        for number, answer in answers.items():
            if isinstance(answer, Exception):
                plans[number].close()
                if not courses[number].stopped:  # else it was only to get a mistake, and is whole without
                    courses[number].error = f"{type(answer).__name__}: {answer}"
                continue
            try:
                asked[number] = next(plans[number]) if answer is None else plans[number].send(answer)
            except StopIteration as end:
                finished[number] = end.value
        states = _predict(tool, [courses[i].sample for i in asked], list(asked.values()))
        answers = dict(zip(asked, states, strict=True))
    return finished


def _predict(
    tool: SegmentationTool, samples: Sequence[Sample], asked: Sequence[tuple[MaskState, Prompt]]
) -> Sequence[MaskState | Exception]:
    """The states after the prompts; where a tool fails, each case by itself, so that one does not take the others."""
    states, prompts = [state for state, _ in asked], [prompt for _, prompt in asked]
    try:
        return advance(tool, samples, states, prompts)
    except ToolUnavailableError:  # no case's fault, and every other one would fail too
        raise
    except Exception as error:
        if len(asked) == 1:
            return [error]
        return [_predict(tool, [one], [pair])[0] for one, pair in zip(samples, asked, strict=True)]


def _trajectory(
    course: Course, strategy: str, settings: Settings, spec: RewardSpec, labels: Mapping[str, Any]
) -> Trajectory:
    """The record of a course. Its turns earn what the env would have paid for them."""
    sample = course.sample
    masks: dict[int, Mapping[str, Any]] = {id(s.mask): encode_mask(s.mask) for s in course.states}
    turns = tuple(
        Turn(action, 0.0, {}, isinstance(action, Click | Box), masks[id(state.mask)])
        for action, state in zip(course.actions, course.states[1:], strict=True)
    )
    episode = Episode(
        **labels,
        policy=strategy,
        key=sample.key,
        structure=sample.structure,
        instruction=sample.instruction,
        patient=sample.patient,
        horizon=course.turns,
        reward=spec.name,
        turns=turns,
        iou=tuple(course.iou),
        dice=tuple(course.dice),
        ended="failed" if course.error else "stopped",
        start=None if course.start is None else masks[id(course.start)],
        spacing_mm=sample.spacing_mm,
        error=course.error,
        extra={"reward": rewards.describe(spec)},
    )
    earned = rewarded(episode, spec, sample.target)
    return Trajectory(
        replace(episode, turns=tuple(_paid(turn, terms) for turn, terms in zip(turns, earned, strict=True))),
        strategy=strategy,
        kind=course.kind,
        marked=tuple(course.marked) if any(course.marked) else (),
        dropped="failed" if course.error else verdict(course, strategy, settings),
        tries=course.tries,
    )


def _paid(turn: Turn, terms: Mapping[str, float]) -> Turn:
    return replace(turn, reward=sum(terms.values()), terms=terms)
