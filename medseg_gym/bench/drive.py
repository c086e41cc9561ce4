"""Drives one policy through pinned cases on the vector env, and yields finished episodes in case order."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from medseg_gym.envs.vector import SegmentVectorEnv
from medseg_gym.errors import InvalidActionError, MedSegError, PolicyUnavailableError, ToolUnavailableError
from medseg_gym.policies.base import LaterPolicy, Policy
from medseg_gym.types import Action, Decision, Episode, Unreadable, View


@dataclass(slots=True)
class Running:
    """The case in a slot."""

    case: int
    rng: np.random.Generator
    decisions: list[Decision] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    answer: Future[Decision] | None = None  # on its way, of a policy that answers later


@dataclass(frozen=True, slots=True)
class Timing:
    """What an episode cost: its share of the wall time, the cache's work since the episode before it, and the sums of
    its decisions' own costs (tokens, latency, retries)."""

    seconds: float
    encodes: int
    cache_hits: int
    costs: Mapping[str, float] = field(default_factory=dict)


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

    `env` needs AutoresetMode.DISABLED and on_error="fail". A policy's exception fails the episode it was asked about,
    but for PolicyUnavailableError, which ends the run as ToolUnavailableError does. A LaterPolicy is asked about every
    slot as soon as that slot has a view, and whichever answers first goes on first.
    """
    waiting = list(cases)[::-1]
    order = list(cases)
    running: dict[int, Running] = {}
    finished: dict[int, tuple[Episode, float, dict[str, float]]] = {}
    counted = env.engine.tool.counters()
    while waiting or running:
        clock = time.perf_counter()
        while waiting and (free := next((i for i in range(env.num_envs) if i not in running), None)) is not None:
            case = waiting.pop()
            error = _begin(env, free, keys[case])
            if error:
                finished[case] = _unread(env, keys[case], case, label, seed, error), 0.0, {}
            else:
                running[free] = Running(case, np.random.default_rng([seed, case]))
        slots = sorted(running)
        if slots:
            if isinstance(policy, LaterPolicy):
                decisions = _later(env, policy, slots, running)
            else:
                decisions = _now(env, policy, slots, running)
            _step(env, decisions, running)
        share = (time.perf_counter() - clock) / max(1, len(slots))
        for slot in slots:
            run = running[slot]
            run.seconds += share
            if run.error or env.engine.slot(slot).ended is not None:
                episode = env.episode(slot, policy=label, seed=seed, case=run.case, error=run.error)
                turns = tuple(replace(t, text=d.text) for t, d in zip(episode.turns, run.decisions, strict=False))
                finished[run.case] = replace(episode, turns=turns), run.seconds, _sums(run.decisions)
                del running[slot]
        while order and order[0] in finished:
            episode, seconds, costs = finished.pop(order.pop(0))
            now = env.engine.tool.counters()
            encodes, hits = now["encodes"] - counted["encodes"], now["hits"] - counted["hits"]
            counted = now
            yield episode, Timing(seconds, encodes, hits, costs)


def _begin(env: SegmentVectorEnv, slot: int, key: str) -> str:
    """Begins a case in a slot; what is wrong with the case where it cannot be read, else the empty text."""
    try:
        env.engine.reset(slot, np.random.default_rng(0), {"sample": key})
    except ToolUnavailableError:  # a start mask asks the tool for its prior's shape
        raise
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


def _now(
    env: SegmentVectorEnv, policy: Policy, slots: Sequence[int], running: dict[int, Running]
) -> dict[int, Decision | Exception]:
    """One decision for every running slot, in one call; exceptions of the policy stay with their slot."""
    views = [_view(env, slot, running) for slot in slots]
    rngs = [running[slot].rng for slot in slots]
    states = [rng.bit_generator.state for rng in rngs]
    try:
        decisions: Sequence[Decision | Exception] = _act(policy, views, rngs)
    except PolicyUnavailableError:
        raise
    except Exception:
        for rng, state in zip(rngs, states, strict=True):  # or a case would depend on those that shared its batch
            rng.bit_generator.state = state
        decisions = [_act_alone(policy, view, rng) for view, rng in zip(views, rngs, strict=True)]
    return dict(zip(slots, decisions, strict=True))


def _later(
    env: SegmentVectorEnv, policy: LaterPolicy, slots: Sequence[int], running: dict[int, Running]
) -> dict[int, Decision | Exception]:
    """Asks about every slot that waits for nothing yet, then gives the answers that are there, at least one."""
    for slot in slots:
        if running[slot].answer is None:
            running[slot].answer = _submitted(policy, _view(env, slot, running), running[slot].rng)
    answers = {slot: answer for slot in slots if (answer := running[slot].answer) is not None}
    wait(answers.values(), return_when=FIRST_COMPLETED)
    decisions: dict[int, Decision | Exception] = {}
    for slot, answer in answers.items():
        if answer.done():
            running[slot].answer = None
            decisions[slot] = _answered(policy, answer)
    return decisions


def _step(env: SegmentVectorEnv, decisions: dict[int, Decision | Exception], running: dict[int, Running]) -> None:
    """One action for every slot that has a decision; one that has an exception is marked as failed."""
    sent: list[int] = []
    actions: list[Action | Unreadable] = []
    for slot, decision in decisions.items():
        if isinstance(decision, Exception):
            running[slot].error = f"policy: {type(decision).__name__}: {decision}{_place(decision)}"
            continue
        running[slot].decisions.append(decision)
        sent.append(slot)
        actions.append(_readable(env, slot, decision))
    if sent:
        env.send(actions, sent)
        env.recv()


def _view(env: SegmentVectorEnv, slot: int, running: dict[int, Running]) -> View:
    """What the policy may see, its own earlier answers included."""
    (view,) = env.views([slot])
    return replace(view, decisions=tuple(running[slot].decisions))


def _act(policy: Policy, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
    decisions = policy.act(views, rngs)
    if len(decisions) != len(views):
        raise TypeError(f"{policy.name}.act gave {decisions!r:.200}; wanted {len(views)} Decisions, one a view")
    return [_checked(policy, decision) for decision in decisions]


def _act_alone(policy: Policy, view: View, rng: np.random.Generator) -> Decision | Exception:
    try:
        return _act(policy, [view], [rng])[0]
    except PolicyUnavailableError:
        raise
    except Exception as error:
        return error


def _submitted(policy: LaterPolicy, view: View, rng: np.random.Generator) -> Future[Decision]:
    """The answer to come; an exception that `submit` itself raises is the answer."""
    try:
        return policy.submit(view, rng)
    except Exception as error:
        failed: Future[Decision] = Future()
        failed.set_exception(error)
        return failed


def _answered(policy: LaterPolicy, answer: Future[Decision]) -> Decision | Exception:
    try:
        return _checked(policy, answer.result())
    except PolicyUnavailableError:
        raise
    except Exception as error:
        return error


def _checked(policy: Policy, decision: Decision) -> Decision:
    if not isinstance(decision, Decision):
        raise TypeError(f"{policy.name} gave {decision!r:.200}; wanted a Decision")
    if not (isinstance(decision.text, str) and isinstance(decision.reason, str)):
        raise TypeError(f"{policy.name} gave a Decision whose text or reason is no str: {decision!r:.200}")
    return decision


def _sums(decisions: Sequence[Decision]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for decision in decisions:
        for name, value in decision.costs.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def _place(error: Exception) -> str:
    """Where an exception was raised, as " (file.py:12)": enough to find it, and the same on every machine.

    Nothing for errors that were worded for users: they say what is wrong by themselves.
    """
    if isinstance(error, MedSegError):
        return ""
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
