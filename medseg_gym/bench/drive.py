"""Drives one policy through pinned cases on the vector env, and yields finished episodes in case order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from medseg_gym.envs.vector import SegmentVectorEnv
from medseg_gym.errors import InvalidActionError
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
    begun = False
    while waiting or running:
        clock = time.perf_counter()
        free = [i for i in range(env.num_envs) if i not in running][: len(waiting)]
        for slot in free:
            case = waiting.pop()
            running[slot] = Running(case, np.random.default_rng([seed, case]))
        _begin(env, free, {slot: keys[running[slot].case] for slot in free}, first=not begun)
        begun = True
        slots = sorted(running)
        _turn(env, policy, slots, running)
        share = (time.perf_counter() - clock) / len(slots)
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


def _begin(env: SegmentVectorEnv, slots: Sequence[int], keys: dict[int, str], *, first: bool) -> None:
    if not slots:
        return
    samples = [keys.get(i) for i in range(env.num_envs)]
    if first:  # the first reset must be of all slots; those without a case get the first one and stay idle
        samples = [sample or keys[slots[0]] for sample in samples]
        env.reset(options={"sample": samples})
        return
    mask = np.zeros(env.num_envs, np.bool_)
    mask[list(slots)] = True
    env.reset(options={"sample": samples, "reset_mask": mask})


def _turn(env: SegmentVectorEnv, policy: Policy, slots: Sequence[int], running: dict[int, Running]) -> None:
    """One decision and one action for every running slot; exceptions of the policy stay with their slot."""
    views = env.views(slots)
    rngs = [running[slot].rng for slot in slots]
    try:
        decisions: Sequence[Decision | Exception] = _act(policy, views, rngs)
    except Exception as error:
        decisions = [error] if len(slots) == 1 else [_act_alone(policy, v, r) for v, r in zip(views, rngs, strict=True)]
    sent: list[int] = []
    actions: list[Action | Unreadable] = []
    for slot, decision in zip(slots, decisions, strict=True):
        if isinstance(decision, Exception):
            running[slot].error = f"policy: {type(decision).__name__}: {decision}"
            continue
        running[slot].texts.append(decision.text)
        sent.append(slot)
        actions.append(_readable(env, decision))
    if sent:
        env.send(actions, sent)
        env.recv()


def _act(policy: Policy, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
    decisions = policy.act(views, rngs)
    if len(decisions) != len(views) or not all(isinstance(d, Decision) for d in decisions):
        raise TypeError(f"{policy.name}.act gave {decisions!r:.200}; wanted {len(views)} Decisions, one a view")
    return decisions


def _act_alone(policy: Policy, view: View, rng: np.random.Generator) -> Decision | Exception:
    try:
        return _act(policy, [view], [rng])[0]
    except Exception as error:
        return error


def _readable(env: SegmentVectorEnv, decision: Decision) -> Action | Unreadable:
    if decision.action is None:
        return Unreadable(decision.reason or "no action could be read")
    try:
        if env.engine.codec.verb_of(decision.action) in env.verbs:
            return decision.action
    except (KeyError, InvalidActionError):
        pass
    return Unreadable(f"{decision.action!r:.200} is not among this env's actions: {', '.join(env.verbs)}")
