"""Reward canaries on Stub: nothing that avoids outlining the structure earns more than the oracle does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import medseg_gym
from medseg_gym import policies
from medseg_gym.envs import SegmentEnv
from medseg_gym.types import Action, Box, Click, Stop, View

DATASET = medseg_gym.datasets.load("Phantom", size=96)
KEYS = [DATASET.keys("test")[i] for i in range(0, 60, 3)]
HORIZON = 8


def mean_return(choose: Callable[[View], Action], reward: str, keys: Sequence[str] = KEYS) -> float:
    env = SegmentEnv(dataset=DATASET, tool="Stub", reward=reward, horizon=HORIZON, observation="dict", size=32)
    totals = []
    for key in keys:
        env.reset(seed=0, options={"sample": key})
        total, done = 0.0, False
        while not done:
            _, earned, terminated, truncated, _ = env.step(choose(env.view()))
            total += earned
            done = terminated or truncated
        totals.append(total)
    return float(np.mean(totals))


def oracle(name: str = "OracleBoxThenClicks") -> Callable[[View], Action]:
    env = SegmentEnv(dataset=DATASET, tool="Stub", observation="dict")
    policy = policies.make(name, env)

    def choose(view: View) -> Action:
        action = policy.act([view], [np.random.default_rng(0)])[0].action
        assert action is not None
        return action

    return choose


def target_box(view: View) -> Box:
    rows, columns = np.nonzero(DATASET[view.key].target)
    return Box(int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max()))


def everything(view: View) -> Box:
    height, width = view.mask.shape
    return Box(0, 0, width - 1, height - 1)


def at_once(view: View) -> Action:
    return Stop()


def click_forever(view: View) -> Action:
    return Click(5 + 11 * view.turn % view.mask.shape[1], 40, True)


def box_everything(view: View) -> Action:
    return everything(view) if view.turn == 0 else Stop()


def zig_zag(view: View) -> Action:
    """The right box and the whole image in turn: IoU falls and rises again."""
    if view.turn == HORIZON - 1:
        return Stop()
    return everything(view) if view.turn % 2 else target_box(view)


def one_click_again_and_again(view: View) -> Action:
    rows, columns = np.nonzero(DATASET[view.key].target)
    return Click(int(columns[len(columns) // 2]), int(rows[len(rows) // 2]), True)


def zig_zag_by_undo(view: View) -> Action:
    """The right box, taken back, and given again."""
    from medseg_gym.types import Undo

    if view.turn == HORIZON - 1:
        return Stop()
    return Undo() if view.turn % 2 else target_box(view)


CANARIES: list[Any] = [at_once, click_forever, box_everything, zig_zag, one_click_again_and_again, zig_zag_by_undo]


@pytest.mark.parametrize("canary", CANARIES)
def test_in_no_case_does_a_canary_earn_more_than_the_best_oracle(canary: Callable[[View], Action]) -> None:
    """On Stub, whose discs and rectangles suit some shapes by luck, so the box alone and one click count as oracles."""
    oracles = [oracle(name) for name in ("OracleBoxThenClicks", "OracleClicks", "BoxOnce", "CentreClick")]
    for key in KEYS:
        best = max(mean_return(choose, "shaped", [key]) for choose in oracles)
        assert mean_return(canary, "shaped", [key]) <= best + 1e-9, key


@pytest.mark.parametrize("canary", CANARIES)
def test_shaped_pays_the_oracle_more_than_any_canary(canary: Callable[[View], Action]) -> None:
    assert mean_return(canary, "shaped") < mean_return(oracle(), "shaped")


def test_shaped_pays_zig_zag_less_than_the_box_it_keeps_giving() -> None:
    def honest(view: View) -> Action:
        return target_box(view) if view.turn == 0 else Stop()

    assert mean_return(zig_zag, "shaped") < mean_return(honest, "shaped")
    assert mean_return(zig_zag_by_undo, "shaped") < mean_return(honest, "shaped")


def test_medsam_agents_released_reward_pays_zig_zag_more_than_the_honest_box() -> None:
    """The known exploit, kept as released: this is what `shaped` is there to close."""

    def honest(view: View) -> Action:
        return target_box(view) if view.turn == 0 else Stop()

    assert mean_return(zig_zag, "medsam-agent") > mean_return(honest, "medsam-agent")


def test_on_absent_structures_no_canary_earns_more_than_stopping_at_once() -> None:
    absent = medseg_gym.datasets.load("Phantom", size=96, absent=1.0)
    env = SegmentEnv(dataset=absent, tool="Stub", horizon=3, observation="dict", size=32)

    def total(choose: Callable[[View], Action]) -> float:
        env.reset(seed=0, options={"sample": absent.keys("test")[0]})
        earned, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(choose(env.view()))
            earned, done = earned + reward, terminated or truncated
        return earned

    assert total(at_once) == pytest.approx(1.0)
    assert all(total(c) < 1.0 for c in (click_forever, box_everything))
