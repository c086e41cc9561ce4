"""rescore: the run's own reward comes out again to the last bit, and any other equals what it would have paid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import medseg_gym
from medseg_gym.bench.evaluate import evaluate
from medseg_gym.bench.rescore import measured, needs_target, rescore, rescore_run, rewarded, spec_of, tool_failed
from medseg_gym.bench.runs import read_run
from medseg_gym.cli import app
from medseg_gym.errors import BadDataError
from medseg_gym.rewards import PRESETS, RewardSpec, describe, resolve
from medseg_gym.types import Box, Click, Episode, Stop, Turn

ENV = "MedSeg-Phantom-Stub-v0"
SETTINGS = [
    ("shaped", "dense"),
    ("shaped", "terminal"),
    ("medsam-agent", "dense"),
    ("medsam-agent", "terminal"),
    ("ibis", "dense"),
]
EMPTY = {"size": [4, 4], "counts": "`0"}  # one run of 16 pixels of background


def play(out: Path, reward: str, timing: str) -> None:
    options: dict[str, Any] = {"dataset_options": {"size": 48, "absent": 0.3}, "reward": reward, "timing": timing}
    evaluate(ENV, ("OracleClicks:jitter=9", "Random"), out=out, cases=6, report=False, horizon=7, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("rewards")
    folders = {setting: root / "-".join(setting) for setting in SETTINGS}
    for setting, folder in folders.items():
        play(folder, *setting)
    return folders


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_runs_own_reward_comes_out_to_the_last_bit(setting: tuple[str, str], runs: dict[Any, Path]) -> None:
    run = read_run(runs[setting])
    spec = spec_of(run.settings["rewards"][ENV])
    data = medseg_gym.datasets.load("Phantom", size=48, absent=0.3)
    for episode in run.episodes:
        target = data[episode.key].target
        terms = rewarded(episode, spec, target)
        assert [dict(turn.terms) for turn in episode.turns] == terms
        assert [turn.reward for turn in episode.turns] == [sum(t.values()) for t in terms]
        assert measured(episode, target) == (episode.iou, episode.dice)


@pytest.mark.parametrize("setting", SETTINGS)
def test_any_reward_is_what_a_run_with_it_was_paid(setting: tuple[str, str], runs: dict[Any, Path]) -> None:
    """Scripted policies do not look at rewards, so the five runs have the same actions."""
    scored = rescore_run(runs["shaped", "dense"], resolve(*setting))
    wanted = read_run(runs[setting])
    assert [e["rewards"] for e in scored["episodes"]] == [[t.reward for t in e.turns] for e in wanted.episodes]
    assert wanted.summary is not None
    assert [row["reward"] for row in scored["rows"]] == pytest.approx([row["reward"] for row in wanted.summary["rows"]])
    assert scored["notes"] == []


def test_only_ibis_needs_targets_and_without_them_it_says_so(runs: dict[Any, Path]) -> None:
    assert [name for name, spec in PRESETS.items() if needs_target(spec)] == ["ibis"]
    run = read_run(runs["shaped", "dense"])
    scored = rescore(run.settings, run.episodes, PRESETS["ibis"], {})
    assert [row["reward"] for row in scored["rows"]] == [None, None] and scored["episodes"][0]["rewards"] is None
    assert "ibis_click needs the targets" in scored["notes"][0]
    assert rescore(run.settings, run.episodes, PRESETS["shaped"], {})["notes"] == []


def episode(ended: Any, *turns: Turn, error: str = "") -> Episode:
    """An episode of one 4 x 4 case in which the mask stays empty and the IoU is told by hand: 0, then .5."""
    values = (0.0, *(0.5 for _ in turns))
    return Episode(
        **{name: name for name in ("env", "tool", "policy", "key", "structure", "instruction", "patient")},
        case=0, seed=0, horizon=5, reward="shaped", turns=turns, iou=values, dice=values, ended=ended, error=error,
    )  # fmt: skip


def test_shaped_terms_worked_out_by_hand() -> None:
    """IoU = Dice = .5 after a prompt: .2 readable, .8 * .5 quality, .08 * .5 gain, -.008 tool; a stop adds nothing."""
    turns = (Turn(Box(0, 0, 1, 1), 0.0, {}, True, EMPTY), Turn(Stop(), 0.0, {}, False, EMPTY))
    first, second = rewarded(episode("stopped", *turns), PRESETS["shaped"])
    assert first == pytest.approx(
        {"readable": 0.2, "quality": 0.4, "gain": 0.04, "overshoot": 0.0, "tool_cost": -0.008}
    )
    assert sum(second.values()) == pytest.approx(0.0)


def test_a_tool_that_failed_takes_back_what_was_paid() -> None:
    turns = (Turn(Box(0, 0, 1, 1), 0.0, {}, True, EMPTY), Turn(Click(1, 1), 0.0, {}, False, EMPTY))
    failed = episode("failed", *turns, error="RuntimeError: out of memory")
    assert tool_failed(failed)
    first, second = rewarded(failed, PRESETS["shaped"])
    assert second == {name: -value for name, value in first.items()}
    stopped = episode("failed", turns[0], error="policy: RuntimeError: no")
    assert not tool_failed(stopped) and rewarded(stopped, PRESETS["shaped"]) == [first]


def test_a_reward_of_nonsense_is_refused() -> None:
    assert spec_of(describe(PRESETS["medsam-agent"])) == PRESETS["medsam-agent"]
    for record in (None, [], {"terms": {}}, {"terms": {"quality": "1"}}, {"terms": {"quality": 1}, "more": 2}):
        with pytest.raises(BadDataError, match="not a reward"):
            spec_of(record)
    assert spec_of({"terms": {"quality": 1.0}}) == RewardSpec(terms={"quality": 1.0})


def test_the_command_prints_a_table_and_writes_the_rewards(runs: dict[Any, Path], tmp_path: Path) -> None:
    folder = runs["shaped", "dense"]
    result = CliRunner().invoke(app, ["rescore", str(folder), "--reward", "medsam-agent", "--timing", "terminal"])
    assert result.exit_code == 0 and "medsam-agent, terminal" in result.output, result.output
    written = json.loads((folder / "rewards-medsam-agent-terminal.json").read_text())
    assert written["rows"] == rescore_run(folder, resolve("medsam-agent", "terminal"))["rows"]
    assert CliRunner().invoke(app, ["rescore", str(folder), "--reward", "ibis", "--timing", "terminal"]).exit_code == 1
    assert CliRunner().invoke(app, ["rescore", str(tmp_path), "--reward", "ibis"]).exit_code == 1


def test_the_command_says_which_data_is_missing(tmp_path: Path) -> None:
    play(tmp_path, "shaped", "dense")
    summary = json.loads((tmp_path / "summary.json").read_text())
    for row in summary["rows"]:
        row["dataset"] = "BTCVx"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    result = CliRunner().invoke(app, ["rescore", str(tmp_path), "--reward", "ibis"])
    assert result.exit_code == 3 and "no dataset 'BTCVx' is known here" in result.output.replace("\n", " ")
