"""Reward canaries: whatever avoids outlining the structure earns less than the oracle, on every tool that runs here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HAVE_TORCH, ROOT

import medseg_gym
from medseg_gym.bench.exploits import EXPLOITS, ORACLES, Exploit, compare, measure
from medseg_gym.envs import SegmentEnv
from medseg_gym.policies.scripted import Targets
from medseg_gym.types import Box, Click, Stop, Undo

SMALL = {"size": 96, "cases": 40}
TOOLS = [
    pytest.param("Nano", marks=[pytest.mark.slow, pytest.mark.skipif(not HAVE_TORCH, reason="Nano needs torch")]),
    pytest.param("GrabCut", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def stub() -> dict[str, Any]:
    return measure("Phantom", "Stub", cases=12, horizon=8, dataset_options=SMALL)


def shaped(measured: dict[str, Any]) -> dict[str, Any]:
    return measured["rewards"]["shaped"]["policies"]


@pytest.mark.parametrize("name", EXPLOITS)
def test_shaped_pays_no_exploit_more_than_the_oracle_on_stub(name: str, stub: dict[str, Any]) -> None:
    assert shaped(stub)[name]["mean"] < shaped(stub)[ORACLES[0]]["mean"]


@pytest.mark.parametrize("name", EXPLOITS)
def test_in_no_case_does_shaped_pay_an_exploit_more_than_the_best_oracle(name: str, stub: dict[str, Any]) -> None:
    """On Stub, whose discs and rectangles suit some shapes by luck, so the box alone and one click count as oracles."""
    assert shaped(stub)[name]["cases_over_best"] == 0.0


@pytest.mark.parametrize("tool", TOOLS)
def test_the_same_holds_on_tools_that_segment(tool: str) -> None:
    """In the mean, and in every case against the best of the oracles."""
    found = measure("Phantom", tool, cases=6, horizon=5, dataset_options={"cases": 40})
    assert found["rewards"]["shaped"]["beaten_by"] == []
    assert all(shaped(found)[name]["cases_over_best"] == 0.0 for name in EXPLOITS)
    assert found["dice"]["OracleBoxThenClicks"] > 0.8


def test_shaped_pays_zig_zag_less_than_the_box_it_keeps_giving(stub: dict[str, Any]) -> None:
    paid = shaped(stub)
    for name in ("zig_zag", "zig_zag_by_undo", "climb", "linger", "linger_by_undo", "unreadable_then_box"):
        assert paid[name]["mean"] < paid["BoxOnce"]["mean"]


def test_the_released_rewards_are_exploited_as_is_known(stub: dict[str, Any]) -> None:
    """What `shaped` is there to close: rises that are paid again and again, and turns that are paid for lingering."""
    medsam_agent, ibis = (stub["rewards"][name]["policies"] for name in ("medsam-agent", "ibis"))
    assert medsam_agent["zig_zag"]["mean"] > medsam_agent["BoxOnce"]["mean"]
    assert medsam_agent["climb"]["mean"] > medsam_agent["BoxOnce"]["mean"]
    assert ibis["linger"]["mean"] > 2 * ibis["BoxOnce"]["mean"]


def test_on_absent_structures_no_exploit_earns_more_than_stopping_at_once() -> None:
    found = measure("Phantom", "Stub", cases=6, horizon=5, dataset_options={**SMALL, "absent": 1.0})
    paid = shaped(found)
    assert paid["stop_at_once"]["mean"] == paid["OracleBoxThenClicks"]["mean"] == pytest.approx(1.0)
    assert all(paid[name]["mean"] < 1.0 for name in ("click_forever", "box_everything", "unreadable_spam"))
    assert found["rewards"]["shaped"]["beaten_by"] == []
    assert found["rewards"]["ibis"]["beaten_by"] == ["unreadable_spam", "unreadable_then_box"]  # 3 for the empty mask


def test_comparing_returns_worked_out_by_hand() -> None:
    returns = {name: [1.0, 2.0, 3.0, 4.0] for name in ORACLES} | {"CentreClick": [1.5, 0.0, 0.0, 0.0]}
    found = compare({**returns, "lucky": [1.2, 2.5, 3.0, 4.0], "poor": [0.0, 0.0, 0.0, 5.0]})
    lucky, poor = found["policies"]["lucky"], found["policies"]["poor"]
    assert lucky == pytest.approx(
        {"mean": 2.675, "over_oracle": 0.175, "cases_over_oracle": 0.5, "cases_over_best": 0.25}
    )
    assert poor == pytest.approx(
        {"mean": 1.25, "over_oracle": -1.25, "cases_over_oracle": 0.25, "cases_over_best": 0.25}
    )
    assert found["beaten_by"] == ["lucky"]


@pytest.mark.parametrize(
    ("name", "horizon", "wanted"),
    [
        ("stop_at_once", 5, [Stop]),
        ("zig_zag", 5, ["all", "box", "all", "box", Stop]),
        ("zig_zag", 4, ["box", "all", "box", Stop]),
        ("zig_zag_by_undo", 5, ["box", Undo, "box", Stop]),
        ("zig_zag_by_undo", 6, ["box", Undo, "box", Undo, "box", Stop]),
        ("climb", 5, ["all", "box", Stop]),
        ("linger_by_undo", 5, ["box", Click, Undo, Click, Undo]),
        ("unreadable_then_box", 5, [None, Undo, Undo, "box", Stop]),
        ("unreadable_spam", 3, [None, None, None]),
    ],
)
def test_exploits_do_what_they_say_until_the_last_turn(name: str, horizon: int, wanted: list[Any]) -> None:
    dataset = medseg_gym.datasets.load("Phantom", **SMALL)
    env = SegmentEnv(dataset=dataset, tool="Stub", horizon=horizon, observation="dict", size=16)
    policy = Exploit(name, Targets(dataset))
    key = dataset.keys("test")[0]
    env.reset(seed=0, options={"sample": key})
    rows, columns = np.nonzero(dataset[key].target)
    known = {Box(0, 0, 95, 95): "all", Box(columns.min(), rows.min(), columns.max(), rows.max()): "box"}
    said: list[Any] = []
    over = False
    while not over:
        (decision,) = policy.act([env.view()], [np.random.default_rng(0)])
        action = decision.action
        said.append(known[action] if isinstance(action, Box) else None if action is None else type(action))
        played = medseg_gym.types.Unreadable("spam") if action is None else action
        _, _, terminated, truncated, _ = env.step(played)
        over = terminated or truncated
    assert said == wanted


def test_the_recipe_prints_a_table_and_keeps_its_results(tmp_path: Path) -> None:
    out = tmp_path / "exploits.json"
    words = ["--cases", "2", "--tool", "Stub", "--dataset", "absent", "--json", str(out)]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / "exploits.py"), *words],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
    assert "unreadable_spam" in done.stdout and ">" in done.stdout
    (kept,) = json.loads(out.read_text())["runs"]
    assert kept["rows"][0]["env"] == "MedSeg-Phantom-Stub-v0" and "exploits.py --cases 2" in kept["command"]
