"""Drives one policy through pinned cases on the vector env, and yields finished episodes in case order."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from medseg_gym.envs.vector import SegmentVectorEnv
from medseg_gym.errors import InvalidActionError, MedSegError
from medseg_gym.policies.base import Policy
from medseg_gym.types import Action, Decision, Episode, Unreadable, View


@dataclass(slots=True)
class Running:
    """The case in a slot."""

    case: int
    rng: np.random.Generator
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Timing:
    """What an episode cost: its share of the wall time, and the cache's work since the episode before it."""

    seconds: float
    encodes: int
    cache_hits: int


def drive(
    env: SegmentVectorEnv,
    policy: Policy,
    keys: Sequence[str],
    cases: Sequence[int],
    *,
    label: str,
    seed: int,
) -> Iterator[tuple[Episode, Timing]]:
    """Plays the cases (positions in `keys`) in all slots at once; an episode depends on its case and seed alone.

    `env` needs AutoresetMode.DISABLED and on_error="fail". A policy's exception fails the episode it was asked about.
    """
    waiting = list(cases)[::-1]
    order = list(cases)
    running: dict[int, Running] = {}
    finished: dict[int, tuple[Episode, float]] = {}
    counted = env.engine.tool.counters()
    while waiting or running:
        clock = time.perf_counter()
        while waiting and (free := next((i for i in range(env.num_envs) if i not in running), None)) is not None:
            case = waiting.pop()
            error = _begin(env, free, keys[case])
            if error:
                finished[case] = _unread(env, keys[case], case, label, seed, error), 0.0
            else:
                running[free] = Running(case, np.random.default_rng([seed, case]))
        slots = sorted(running)
        if slots:
            _turn(env, policy, slots, running)
        share = (time.perf_counter() - clock) / max(1, len(slots))
        for slot in slots:
            run = running[slot]
            run.seconds += share
            if run.error or env.engine.slot(slot).ended is not None:
                episode = env.episode(slot, policy=label, seed=seed, case=run.case, error=run.error)
                turns = tuple(replace(t, text=text) for t, text in zip(episode.turns, run.texts, strict=False))
                finished[run.case] = replace(episode, turns=turns), run.seconds
                del running[slot]
        while order and order[0] in finished:
            episode, seconds = finished.pop(order.pop(0))
            now = env.engine.tool.counters()
            encodes, hits = now["encodes"] - counted["encodes"], now["hits"] - counted["hits"]
            counted = now
            yield episode, Timing(seconds, encodes, hits)


def _begin(env: SegmentVectorEnv, slot: int, key: str) -> str:
    """Begins a case in a slot; what is wrong with the case where it cannot be read, else the empty text."""
    try:
        env.engine.reset(slot, np.random.default_rng(0), {"sample": key})
    except MedSegError as error:
        return f"case: {error}"
    return ""


def _unread(env: SegmentVectorEnv, key: str, case: int, label: str, seed: int, error: str) -> Episode:
    """The record of a case that could not even be read: failed, so it counts as 0 and the run goes on."""
    return Episode(
        env=env.name,
        tool=env.tool.fingerprint,
        policy=label,
        case=case,
        key=key,
        structure="",
        instruction="",
        patient="",
        seed=seed,
        horizon=env.engine.config.horizon,
        reward=env.engine.reward.name,
        turns=(),
        iou=(0.0,),
        dice=(0.0,),
        ended="failed",
        error=error,
    )


def _turn(env: SegmentVectorEnv, policy: Policy, slots: Sequence[int], running: dict[int, Running]) -> None:
    """One decision and one action for every running slot; exceptions of the policy stay with their slot."""
    views = env.views(slots)
    rngs = [running[slot].rng for slot in slots]
    states = [rng.bit_generator.state for rng in rngs]
    try:
        decisions: Sequence[Decision | Exception] = _act(policy, views, rngs)
    except Exception:
        for rng, state in zip(rngs, states, strict=True):  # or a case would depend on those that shared its batch
            rng.bit_generator.state = state
        decisions = [_act_alone(policy, view, rng) for view, rng in zip(views, rngs, strict=True)]
    sent: list[int] = []
    actions: list[Action | Unreadable] = []
    for slot, decision in zip(slots, decisions, strict=True):
        if isinstance(decision, Exception):
            running[slot].error = f"policy: {type(decision).__name__}: {decision}{_place(decision)}"
            continue
        running[slot].texts.append(decision.text)
        sent.append(slot)
        actions.append(_readable(env, slot, decision))
    if sent:
        env.send(actions, sent)
        env.recv()


def _act(policy: Policy, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
    decisions = policy.act(views, rngs)
    if len(decisions) != len(views) or not all(isinstance(d, Decision) for d in decisions):
        raise TypeError(f"{policy.name}.act gave {decisions!r:.200}; wanted {len(views)} Decisions, one a view")
    if not all(isinstance(d.text, str) and isinstance(d.reason, str) for d in decisions):
        raise TypeError(f"{policy.name}.act gave a Decision whose text or reason is no str: {decisions!r:.200}")
    return decisions


def _act_alone(policy: Policy, view: View, rng: np.random.Generator) -> Decision | Exception:
    try:
        return _act(policy, [view], [rng])[0]
    except Exception as error:
        return error


def _place(error: Exception) -> str:
    """Where an exception was raised, as " (file.py:12)": enough to find it, and the same on every machine."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _readable(env: SegmentVectorEnv, slot: int, decision: Decision) -> Action | Unreadable:
    """The decision's action; one that the env would refuse is the agent's mistake, not the run's."""
    if decision.action is None:
        return Unreadable(decision.reason or "no action could be read")
    try:
        return env.engine.codec.read(decision.action, env.engine.slot(slot).grid)
    except InvalidActionError as error:
        return Unreadable(f"{error!s:.300}")
