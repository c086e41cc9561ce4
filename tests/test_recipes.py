"""Recipes: every definition resolves, each runs in small from end to end, and one that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from typer.testing import CliRunner

from medseg_gym import datasets
from medseg_gym.bench import recipe_run
from medseg_gym.bench.evaluate import evaluate
from medseg_gym.bench.recipe_policies import BoxThenXuClicks, Recorded, exploit
from medseg_gym.bench.recipe_records import Arm, Recipe
from medseg_gym.bench.recipe_rewards import variants, without
from medseg_gym.bench.recipe_run import lacking, run_recipe
from medseg_gym.bench.recipe_table import record_of
from medseg_gym.bench.recipe_text import markdown
from medseg_gym.bench.recipes import RECIPES, recipe, with_agent
from medseg_gym.bench.rescore import rewarded
from medseg_gym.bench.suites import Entry
from medseg_gym.cli import app
from medseg_gym.envs.config import EnvConfig
from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.policies import make
from medseg_gym.rewards import PRESETS
from medseg_gym.types import Box, Click, Stop

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "recipes"
PLAYED = [name for name, one in RECIPES.items() if one.kind != "training"]


def here(name: str, tool: str = "Stub", data: Sequence[str] = ("Phantom",)) -> Recipe:
    """The recipe's arms on drawn data with its first two tools as the Stub and GrabCut, which need nothing."""
    one = recipe(name)
    arms = [
        replace(arm, entry=replace(arm.entry, tool=tool), watches="GrabCut" if arm.watches else "")
        for arm in one.arms
        if arm.entry.dataset in data and arm.entry.tool == "Nano"
    ]
    return replace(one, arms=tuple(arms))


def rows_without_seconds(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in record["rows"]]


def test_every_experiment_of_the_papers_has_a_recipe() -> None:
    assert set(RECIPES) >= {
        *("single-turn", "hybrid", "reward-terms", "reward-training", "cross-tool", "target-box", "efficiency"),
        "prompting",
    }


@pytest.mark.parametrize("name", RECIPES)
def test_every_arm_names_an_env_and_settings_that_exist_and_a_policy_that_can_play_them(
    name: str, blobs: object
) -> None:
    one = with_agent(recipe(name), "TextOracle:policy=XuClicks")
    places = set()
    for arm in one.arms:
        assert arm.entry.env in gym.registry, arm
        EnvConfig.of({"split": arm.entry.split, "horizon": arm.entry.horizon, **arm.entry.options})
        verbs = arm.entry.options.get("verbs", ("positive", "negative", "box", "stop", "undo"))
        assert make(arm.policy, None, dataset=blobs, verbs=verbs).name
        if arm.watches:
            assert f"MedSeg-{arm.entry.dataset}-{arm.watches}-v0" in gym.registry
        places.add((arm.entry.dataset, arm.entry.tool, arm.setting))
    assert len(places) == len(one.arms)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_held_beside_rows_that_the_papers_have(name: str) -> None:
    one = recipe(name)
    assert one.printed
    for printed in one.printed:
        rows = printed.rows()
        assert rows, printed
        assert set(printed.settings) <= {row.setting for row in rows}, printed
        assert all(row.overall or row.dataset for row in rows)


@pytest.mark.parametrize("name", RECIPES)
def test_on_a_laptop_each_recipe_has_arms_that_need_no_weights(name: str) -> None:
    assert recipe(name).kind == "training" or any(
        lacking(arm) is None for arm in recipe(name).arms if arm.entry.dataset == "Phantom"
    )


def test_an_unknown_recipe_is_answered_with_what_was_meant() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'hybrid'"):
        recipe("hybird")
    said = CliRunner().invoke(app, ["recipe", "show", "cross-tol"])
    assert said.exit_code == 1
    assert "did you mean 'cross-tool'?" in said.stderr


def test_the_command_line_lists_every_recipe_and_asks_for_names() -> None:
    listed = CliRunner().invoke(app, ["recipe", "list"])
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in RECIPES)
    shown = CliRunner().invoke(app, ["recipe", "show", "reward-training"])
    assert "MedSAM-Agent, Table 3: 4 rows beside it, reported, not run here" in shown.stdout
    for words in (["recipe", "run"], ["recipe", "run", "hybrid", "--all"]):
        said = CliRunner().invoke(app, words)
        assert said.exit_code == 1 and "name recipes, or give --all" in said.stderr


@pytest.mark.parametrize("name", PLAYED)
def test_two_cases_of_every_recipe_run_from_end_to_end(name: str, tmp_path: Path) -> None:
    done = run_recipe(here(name), out=tmp_path, cases=2)
    record = json.loads(done.json.read_text(encoding="utf-8"))
    assert record["trial"] is True  # also said in its text
    assert record["command"] == f"medseg-gym recipe run {name} --cases 2"
    assert record["rows"] and all(row["cases"] == 2 for row in record["rows"])
    text = done.markdown.read_text(encoding="utf-8")
    assert text == markdown(record)  # what is published is what the record says
    assert "reported, not run here" in text
    assert "A trial" in text
    printed = sum(len(each.rows()) for each in recipe(name).printed)
    assert len(record["reported"]) == printed
    for row in record["rows"]:
        for found in (row[column] for column in ("dice", "iou") if column in row):
            assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1


@pytest.mark.slow
def test_a_training_recipe_runs_in_small_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of everything under one reward; the second call trains nothing and says the same."""
    for needed in ("torch", "peft"):
        pytest.importorskip(needed)
    from medseg_gym.bench import recipe_training

    monkeypatch.setattr(recipe_training, "REWARDS", (("medsam-agent", "improvement"),))
    done = run_recipe("reward-training", out=tmp_path, cases=2)
    assert [row["setting"] for row in done.record["rows"]] == ["taught only", "medsam-agent without improvement"]
    for row in done.record["rows"]:
        assert row["cases"] == 2
        assert sum(row[name]["mean"] for name in (*recipe_training.WAYS, "other")) == pytest.approx(1)
    assert done.markdown.read_text(encoding="utf-8") == markdown(done.record)
    models = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("final/*")}
    monkeypatch.setattr(recipe_training, "_play", None)  # nothing is played either
    again = run_recipe("reward-training", out=tmp_path, cases=2).record
    assert again["rows"] == done.record["rows"]
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("final/*")} == models


def test_the_ways_of_an_episode(tmp_path: Path) -> None:
    """Boxes that miss and fit, in order: what the training recipe counts."""
    from medseg_gym.bench.recipe_ways import keys, way

    episode = evaluate("MedSeg-Phantom-Stub-v0", "BoxOnce", out=tmp_path, cases=1, report=False).episodes[0]
    box, stop = episode.turns
    for ious, named in (
        ((0.9,), "direct"),
        ((0.9, 0.9), "linger"),
        ((0.1, 0.9), "detour"),
        ((0.9, 0.1), "other"),
        ((0.1,), "other"),
        ((0.1, 0.1, 0.9), "other"),
    ):
        turns, curve = (box,) * len(ious) + (stop,), (0.0, *ious, ious[-1])
        went = replace(episode, turns=turns, iou=curve, dice=curve)
        assert way(went) == named
        assert way(replace(went, ended="horizon")) == "other"
    assert len(keys("test", 8)) == 8 and not set(keys("test", 8)) & set(keys("train", 8))


def test_recipes_share_the_runs_they_have_in_common(tmp_path: Path) -> None:
    run_recipe(here("single-turn"), out=tmp_path, cases=2)
    runs = {folder.parent for folder in tmp_path.rglob("run.json")}
    run_recipe(here("hybrid"), out=tmp_path, cases=2)
    more = {folder.parent for folder in tmp_path.rglob("run.json")} - runs
    assert sorted(folder.name for folder in runs) == ["BoxOnce", "CentreClick"]
    assert sorted(folder.name for folder in more) == ["OracleBoxThenClicks", "OracleClicks"]  # BoxOnce is there


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_recipe(here("hybrid"), out=tmp_path / "whole", cases=3).record

    class Killed(Exception):
        pass

    played: list[str] = []

    def cut(label: str, done: int, total: int) -> None:
        played.append(label)
        if "OracleClicks" in label and done == 2:
            raise Killed

    with pytest.raises(Killed):
        run_recipe(here("hybrid"), out=tmp_path / "cut", cases=3, progress=cut)
    assert not (tmp_path / "cut" / "hybrid").exists()  # no table of half a run
    seen: list[tuple[str, int]] = []
    again = run_recipe(
        here("hybrid"), out=tmp_path / "cut", cases=3, progress=lambda label, done, total: seen.append((label, done))
    )
    assert [done for label, done in seen if "OracleClicks" in label] == [2, 3]  # only the third case was played
    assert [done for label, done in seen if "OracleBoxThenClicks" in label] == [3]  # and nothing of the first arm
    assert rows_without_seconds(again.record) == rows_without_seconds(whole)


def test_what_cannot_be_played_here_is_named_and_none_of_its_numbers_appear(tmp_path: Path) -> None:
    one = here("hybrid")
    absent = Arm("box only", Entry("PolypGen", "MedSAM2", cases=2), "BoxOnce")
    record = run_recipe(replace(one, arms=(*one.arms, absent)), out=tmp_path, cases=2).record
    assert record["not_run"] == {
        "arms": 1,
        "of": 4,
        "tools": ["MedSAM2"],
        "datasets": ["PolypGen"],
        "agent": False,
    }
    assert {row["dataset"] for row in record["rows"]} == {"Phantom"}
    with pytest.raises(MedSegError, match="MedSAM2's weights and PolypGen prepared"):
        run_recipe(replace(one, arms=(absent,)), out=tmp_path, cases=2)


def test_an_agent_fills_the_place_a_recipe_leaves_open(tmp_path: Path) -> None:
    one = here("prompting")
    without_agent = run_recipe(one, out=tmp_path, cases=2).record
    assert without_agent["not_run"]["agent"] is True
    assert [row["setting"] for row in without_agent["rows"]] == [
        *("oracle, medsam-agent protocol", "oracle, ibis protocol"),
    ]
    record = run_recipe(one, out=tmp_path, cases=2, agent="TextOracle:policy=XuClicks").record
    by_setting = {row["setting"]: row for row in record["rows"]}
    assert by_setting["agent, ibis protocol"]["policy"] == "TextOracle:protocol=ibis,policy=XuClicks"
    assert by_setting["agent, ibis protocol"]["iou"] == by_setting["oracle, ibis protocol"]["iou"]
    assert by_setting["agent, medsam-agent protocol"]["policy"] == "TextOracle:policy=XuClicks"
    assert record["command"].endswith("--agent TextOracle:policy=XuClicks --cases 2")
    with pytest.raises(MedSegError, match="leaves no policy open"):
        run_recipe(here("hybrid"), out=tmp_path, agent="Random")


def test_across_tools_the_very_actions_are_played_again(tmp_path: Path) -> None:
    one = here("cross-tool")
    one = replace(one, arms=tuple(replace(arm, policy="OracleClicks") for arm in one.arms))
    run_recipe(one, out=tmp_path, cases=2)
    actions = {
        (file.parts[-3].partition("-v0")[0], file.parent.name): [
            [turn["action"] for turn in json.loads(line)["turns"]] for line in file.read_text().splitlines()
        ]
        for file in tmp_path.rglob("episodes.jsonl")
    }
    watched, own = (actions[f"MedSeg-Phantom-{tool}", "OracleClicks"] for tool in ("GrabCut", "Stub"))
    (again,) = (found for (_, policy), found in actions.items() if policy.startswith("OracleClicks_as_played_with"))
    assert len(actions) == 3
    assert again == watched
    assert again != own  # the oracle that sees the Stub's masks clicks elsewhere


def test_recorded_actions_end_with_a_stop_and_know_only_their_cases(blobs: Any, tmp_path: Path) -> None:
    done = evaluate("MedSeg-v0", "BoxOnce", out=tmp_path, dataset=blobs, tool="Stub", cases=1, report=False)
    policy = Recorded(done.episodes, "again")
    env = gym.make("MedSeg-v0", dataset=blobs, tool="Stub", split="test", observation="dict").unwrapped
    env.reset(options={"sample": done.episodes[0].key})
    rng = np.random.default_rng(0)
    first = policy.act([env.view()], [rng])[0].action
    assert isinstance(first, Box) and first == done.episodes[0].turns[0].action
    assert [policy.act([replace(env.view(), turn=turn)], [rng])[0].action for turn in (1, 2, 9)] == [Stop()] * 3
    with pytest.raises(KeyError):
        policy.act([replace(env.view(), key="elsewhere")], [rng])


def test_a_box_then_greedy_clicks(blobs: Any, tmp_path: Path) -> None:
    """The first action is the target's box; what follows are clicks, until IoU .8."""
    spec = "medseg_gym.bench.recipe_policies:BoxThenXuClicks"
    done = evaluate("MedSeg-v0", spec, out=tmp_path, dataset=blobs, tool="Stub", cases=6, horizon=20, report=False)
    for episode in done.episodes:
        first, *others = (turn.action for turn in episode.turns)
        assert isinstance(first, Box)
        assert all(isinstance(action, Click | Stop) for action in others)
        assert (episode.ended == "stopped") == (episode.iou[-1] >= 0.8)
    assert BoxThenXuClicks(blobs).name == "BoxThenXuClicks"


def test_an_exploit_by_name(blobs: Any) -> None:
    assert exploit(blobs, kind="climb").name == "climb"
    with pytest.raises(UnknownNameError, match="did you mean 'zig_zag'"):
        exploit(blobs, kind="zigzag")


def test_a_reward_without_a_term_pays_the_others_as_before() -> None:
    spec = PRESETS["medsam-agent"]
    less = without(spec, "improvement")
    assert set(spec.terms) - set(less.terms) == {"improvement"}
    assert all(less.terms[name] == spec.terms[name] for name in less.terms)
    assert less.clip == spec.clip and "improvement" not in less.clipped
    names = [(preset, term) for preset, term, _ in variants()]
    assert len(names) == len(set(names)) == 3 + sum(len(spec.terms) for spec in PRESETS.values()) == 18


def test_the_reward_table_names_the_policy_that_is_paid_most(tmp_path: Path) -> None:
    """Rows hold what rescoring the episodes gives, and the improvement bonus is what pays a detour."""
    one = here("reward-terms")
    kept = ("OracleBoxThenClicks", "BoxOnce", "climb", "zig_zag", "stop_at_once")
    one = replace(one, arms=tuple(arm for arm in one.arms if arm.setting in kept))
    done = run_recipe(one, out=tmp_path, cases=3)
    rows = {(row["reward"], row["without"]): row for row in done.record["rows"]}
    assert len(rows) == 18
    episodes = evaluate("MedSeg-Phantom-Stub-v0", "BoxOnce", out=tmp_path / "box", cases=3, report=False).episodes
    for preset, off, spec in variants():
        returns = rows[preset, off]["returns"]
        assert rows[preset, off]["pays_most"] == max(returns, key=returns.__getitem__)
        if "ibis_click" not in spec.terms:  # which asks for the targets
            paid = np.mean([sum(sum(terms.values()) for terms in rewarded(e, spec)) for e in episodes])
            assert returns["BoxOnce"] == pytest.approx(paid, abs=1e-4)
    whole, off = rows["medsam-agent", ""], rows["medsam-agent", "improvement"]
    assert whole["returns"]["climb"] - off["returns"]["climb"] > 0.01
    assert whole["returns"]["BoxOnce"] == off["returns"]["BoxOnce"]  # one action has no rise after the first
    # a wrong box before the right one: its rise pays more than the action costs, and without the bonus nothing
    assert whole["returns"]["climb"] > whole["returns"]["BoxOnce"]
    assert off["returns"]["climb"] < off["returns"]["BoxOnce"]


def test_the_average_over_datasets_is_by_modality_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CT sets of IoU .2 and .4 and one MRI set of .9: (.3 + .9) / 2 = .6, not the .5 of three alike."""
    episode = evaluate("MedSeg-Phantom-Stub-v0", "BoxOnce", out=tmp_path, cases=1, report=False).episodes[0]
    ran = []
    for name, value in (("BTCV", 0.2), ("WORD", 0.4), ("ACDC", 0.9)):
        curve = (0.0,) * (len(episode.iou) - 1) + (value,)
        cases = tuple(replace(episode, iou=curve, dice=curve, patient=f"p{i}", key=f"{name}/{i}") for i in range(2))
        arm = Arm("box", Entry(name, "MedSAM2"), "BoxOnce")
        ran.append(recipe_run.Ran(arm, cases, (0.1, 0.1), {}))
    (overall,) = record_of(recipe("single-turn"), ran, [])["overall"]
    assert overall["iou"]["mean"] == pytest.approx(0.6)
    assert overall["datasets"] == ["BTCV", "WORD", "ACDC"]


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no results of recipes are committed")
def test_committed_results_are_of_recipes_that_are_there_whole_and_from_a_clean_commit() -> None:
    """Every table is what its record says, every arm that needs nothing was run, and no number came from elsewhere."""
    found = sorted(RESULTS.glob("*/result.json"))
    assert found
    for file in found:
        record = json.loads(file.read_text(encoding="utf-8"))
        one = recipe(record["recipe"])
        assert file.parent.name == one.name
        assert (file.parent / "table.md").read_text(encoding="utf-8") == markdown(record), file
        assert record["trial"] is False and record["seconds"] > 0
        assert all(len(each["commit"]) == 40 and not each["changed"] for each in record["commits"]), file
        settings = {(arm.entry.dataset, arm.entry.tool, arm.setting) for arm in one.arms}
        if one.kind == "episodes":
            played = {(row["dataset"], row["tool"], row["setting"]) for row in record["rows"]}
            assert played <= settings
            assert {place for place in settings if place[0] == "Phantom"} - played <= {
                (arm.entry.dataset, arm.entry.tool, arm.setting) for arm in one.arms if lacking(arm) is not None
            }


def test_datasets_of_a_recipe_are_in_the_catalogue() -> None:
    assert {arm.entry.dataset for one in RECIPES.values() for arm in one.arms} <= {
        "Phantom",
        *datasets.DATASETS,
    }
