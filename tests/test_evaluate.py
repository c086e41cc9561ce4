"""evaluate: the files it writes, resuming after a kill, failures as zeros, and honest notes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medseg_gym
from medseg_gym.bench import rundir
from medseg_gym.bench.cases import choose_cases
from medseg_gym.bench.evaluate import evaluate
from medseg_gym.bench.summary import summarise_row
from medseg_gym.episodes import decode_mask, from_json
from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError
from medseg_gym.types import Click, Decision, Stop, View

ENV = "MedSeg-Phantom-Stub-v0"
SMALL: dict[str, Any] = {"dataset_options": {"size": 64}, "size": 64}
COMPARED = ("run.json", "episodes.jsonl", "summary.json")


def run(out: Path, policy: Any = ("OracleBoxThenClicks", "Random"), **options: Any) -> Any:
    options = {"cases": 6, "num_envs": 3, "report": False, **SMALL, **options}
    return evaluate(ENV, policy, out=out, **options)


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in COMPARED}


class Crash(Exception):
    pass


def test_summary_agrees_with_the_episodes_and_their_masks(tmp_path: Path) -> None:
    result = run(tmp_path)
    lines = (tmp_path / "episodes.jsonl").read_text().splitlines()
    episodes = [from_json(line) for line in lines]
    assert tuple(episodes) == result.episodes and len(episodes) == 12
    assert [e.case for e in episodes] == [*range(6), *range(6)]
    row = result.summary["rows"][0]
    assert row["dice"] == pytest.approx(np.mean([e.dice[-1] for e in episodes[:6]]))
    dataset = medseg_gym.datasets.load("Phantom", size=64)
    for episode in episodes:
        sample = dataset[episode.key]
        for turn, iou in zip(episode.turns, episode.iou[1:], strict=True):
            mask = decode_mask(turn.mask)
            union = (mask | sample.target).sum()
            assert iou == pytest.approx((mask & sample.target).sum() / union if union else 1.0)


def test_killed_at_any_episode_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    for kill_after in (1, 5, 6, 7, 11):
        out = tmp_path / f"killed-{kill_after}"

        def stop(label: str, done: int, total: int, state: list[int] = [0], limit: int = kill_after) -> None:  # noqa: B006
            state[0] += done > 0
            if state[0] == limit:
                raise Crash

        with pytest.raises(Crash):
            run(out, progress=stop)
        assert len((out / "episodes.jsonl").read_text().splitlines()) == kill_after
        run(out)
        assert contents(out) == contents(tmp_path / "whole")


def test_a_line_cut_off_by_a_kill_is_played_again(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "cut")
    for name in ("episodes.jsonl", "times.jsonl"):
        file = tmp_path / "cut" / name
        file.write_bytes(file.read_bytes()[:-40])
    (tmp_path / "cut" / "summary.json").unlink()
    run(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_number_of_slots_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path / "one", num_envs=1)
    run(tmp_path / "five", num_envs=5)
    assert contents(tmp_path / "one") == contents(tmp_path / "five")


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "medseg_gym", "evaluate", "--env", ENV, "--policy", "OracleClicks",
                "--cases", "120", "--out", str(out)]  # fmt: skip

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = out / "episodes.jsonl"
    while process.poll() is None and not (lines.exists() and lines.stat().st_size > 20_000):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = lines.read_bytes().count(b"\n")
    assert 0 < before < 120, "the kill came too late to test anything"
    subprocess.run(command(out), check=True, capture_output=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path), (tmp_path / "times.jsonl").read_bytes()
    run(tmp_path)
    assert before == (contents(tmp_path), (tmp_path / "times.jsonl").read_bytes())


def test_other_settings_in_the_same_folder_are_refused_and_restart_begins_anew(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(MedSegError, match="another run.*seed.*--restart"):
        run(tmp_path, seed=1)
    run(tmp_path, seed=1, restart=True)
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1


def test_rewards_of_one_name_and_other_weights_are_other_settings(tmp_path: Path) -> None:
    from medseg_gym.rewards import RewardSpec

    run(tmp_path, reward=RewardSpec({"quality": 1.0}))
    with pytest.raises(MedSegError, match="another run.*rewards"):
        run(tmp_path, reward=RewardSpec({"quality": 5.0}))


def test_a_dataset_whose_cases_changed_is_another_setting(tmp_path: Path, blobs: Any) -> None:
    options: dict[str, Any] = {"tool": "Stub", "cases": 3, "size": 32, "report": False}
    evaluate("MedSeg-v0", "BoxOnce", dataset=blobs, out=tmp_path, **options)
    with pytest.raises(MedSegError, match="another run.*datasets"):
        evaluate("MedSeg-v0", "BoxOnce", dataset=type(blobs)(absent=True), out=tmp_path, **options)
    run(tmp_path / "phantom")
    with pytest.raises(MedSegError, match="another run.*datasets"):
        run(tmp_path / "phantom", dataset_options={"size": 64, "difficulty": 0.1})


def test_the_command_line_and_python_resume_each_other(tmp_path: Path) -> None:
    words = ("--env", ENV, "--policy", "BoxOnce", "--cases", "3", "--out", str(tmp_path))
    assert cli("evaluate", *words).exit_code == 0
    before = contents(tmp_path)
    evaluate(ENV, "BoxOnce", out=tmp_path, cases=3)
    assert contents(tmp_path) == before


def test_a_case_that_cannot_be_read_fails_alone(tmp_path: Path, blobs: Any) -> None:
    class Damaged(type(blobs)):  # type: ignore[misc]
        content = "damaged"

        def __getitem__(self, key: str) -> Any:
            if key == "Blobs/test-1/bar":
                raise BadDataError(f"{key}: chunk is damaged")
            return super().__getitem__(key)

    result = evaluate("MedSeg-v0", "BoxOnce", dataset=Damaged(), tool="Stub", out=tmp_path, cases=6, size=32)
    ended = {episode.key: episode.ended for episode in result.episodes}
    assert ended.pop("Blobs/test-1/bar") == "failed" and set(ended.values()) == {"stopped"}
    assert result.summary["rows"][0]["dice"] < 5 / 6


def test_episodes_say_what_they_were_paid_by_and_are_paid_again_from_the_record(tmp_path: Path, blobs: Any) -> None:
    from medseg_gym import rewards

    spec = rewards.RewardSpec({"quality": 2.0, "tool_cost": -0.125}, name="mine", timing="terminal")
    for name, reward in (("own", spec), ("late", rewards.resolve("medsam-agent", "terminal"))):
        result = evaluate(
            "MedSeg-v0", "Random", dataset=blobs, tool="Stub", out=tmp_path / name, cases=6, reward=reward
        )
        for line in (tmp_path / name / "episodes.jsonl").read_text().splitlines():
            episode = from_json(line)
            again = rewards.RewardSpec(**episode.extra["reward"])
            assert again == reward
            now = rewards.start(episode.iou[0], episode.dice[0])
            for t, turn in enumerate(episode.turns):
                later = rewards.after(now, turn.action, episode.iou[t + 1], episode.dice[t + 1])
                assert again.terms_of_turn(now, later, ends=t == len(episode.turns) - 1) == dict(turn.terms)
                now = later
        assert result.summary["rows"][0]["episodes"] == 6


@pytest.mark.parametrize(
    ("file", "text"),
    [("run.json", "[]"), ("run.json", "\x00"), ("times.jsonl", "{}\n"), ("episodes.jsonl", "\udc80\n")],
)
def test_damaged_files_of_a_run_say_how_to_begin_again(tmp_path: Path, file: str, text: str) -> None:
    run(tmp_path)
    (tmp_path / file).write_text(text, errors="surrogateescape")
    with pytest.raises(MedSegError, match="--restart"):
        run(tmp_path)
    run(tmp_path, restart=True)


def test_report_does_not_draw_other_targets_under_the_masks(tmp_path: Path) -> None:
    from medseg_gym.bench.report import write_report

    run(tmp_path, dataset_options={"size": 64, "seed": 7})
    write_report(tmp_path, {ENV: medseg_gym.datasets.load("Phantom", size=64, seed=8)})
    assert "another target" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert cli("report", str(tmp_path)).exit_code == 0
    assert "another target" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    first = rundir.RunDir(tmp_path, {"a": 1})
    with pytest.raises(MedSegError, match="another run is writing"):
        rundir.RunDir(tmp_path, {"a": 1})
    first.close()
    rundir.RunDir(tmp_path, {"a": 1}).close()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / "episodes.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], "rubbish\n", *lines[2:]]))
    with pytest.raises(BadDataError, match="line 2"):
        run(tmp_path)


def test_a_full_disk_says_so_and_the_run_goes_on_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    real, written = rundir._append, []

    def full(path: Path, line: str) -> None:
        written.append(path)
        if len(written) > 7:
            with path.open("ab") as handle:
                handle.write(line[:30].encode())  # what fitted
            raise MedSegError(f"cannot write {path}: No space left on device; make room")
        real(path, line)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "_append", full)
        with pytest.raises(MedSegError, match="No space left"):
            run(tmp_path / "full")
    run(tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


class Sulky:
    """Draws, clicks there, and raises on every other case."""

    name = "Sulky"

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        places = [rng.integers(0, 64, 2) for rng in rngs]
        if any(is_odd(view.key) for view in views):
            raise RuntimeError("I would rather [not] with [/red] brackets")
        return [Decision(Click(x, y, np.bool_(True))) for x, y in places]


def is_odd(key: str) -> bool:
    return int(key.split("/")[2].split("-")[0]) % 2 == 1


def test_a_policys_exception_fails_its_episode_only_and_counts_as_zero(tmp_path: Path) -> None:
    result = run(tmp_path, Sulky(), cases=40)
    assert {e.ended for e in result.episodes if is_odd(e.key)} == {"failed"}
    assert {e.ended for e in result.episodes if not is_odd(e.key)} == {"horizon"}
    assert "I would rather" in next(e for e in result.episodes if e.ended == "failed").error
    assert any("failed" in note for note in result.summary["notes"])


def test_the_number_of_slots_changes_nothing_for_a_policy_that_draws_and_raises(tmp_path: Path) -> None:
    for slots in (1, 2, 5):
        run(tmp_path / str(slots), Sulky(), cases=12, num_envs=slots)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_brackets_in_names_and_errors_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from medseg_gym.cli import print_summary

    policy = Sulky()
    policy.name = "Sulky [/b] [red]"
    print_summary(run(tmp_path, policy, cases=12).summary)
    out = capsys.readouterr().out
    assert "Sulky [/b] [red]" in out and "rather [not] with [/red]" in out


@pytest.mark.parametrize(
    "decision",
    [Decision(Click(float("nan"), 3)), Decision(Click("a", 3)), Decision(Click(3, 3, "no")), Decision("click")],  # type: ignore[arg-type]
)
def test_actions_that_are_none_are_unreadable_turns_and_the_run_goes_on(tmp_path: Path, decision: Decision) -> None:
    class Odd:
        name = "Odd"

        def act(self, views: Any, rngs: Any) -> list[Decision]:
            return [decision] * len(views)

    result = run(tmp_path, Odd(), cases=2)
    assert result.summary["rows"][0]["unreadable_turns"] == 10
    run(tmp_path, Odd(), cases=2)


def test_a_decision_whose_text_is_no_text_fails_its_episode(tmp_path: Path) -> None:
    class Mute:
        name = "Mute"

        def act(self, views: Any, rngs: Any) -> list[Decision]:
            return [Decision(Stop(), text=None)] * len(views)  # type: ignore[arg-type]

    assert {e.ended for e in run(tmp_path, Mute(), cases=2).episodes} == {"failed"}


def test_line_separators_in_a_policys_text_do_not_break_resuming(tmp_path: Path) -> None:
    class Wordy:
        name = "Wordy"

        def act(self, views: Any, rngs: Any) -> list[Decision]:
            return [Decision(Stop(), text="a\u2028b\u0085c\x0bd")] * len(views)

    run(tmp_path, Wordy())
    assert run(tmp_path, Wordy()).episodes[0].turns[0].text == "a\u2028b\u0085c\x0bd"


class Garbled:
    name = "Garbled"

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        return [Decision(None, text="blah", reason="no action in it")] * len(views)


def test_unreadable_episodes_count_as_zero_even_where_the_structure_is_absent(tmp_path: Path) -> None:
    result = run(tmp_path, Garbled(), dataset_options={"size": 64, "absent": 1.0})
    row = result.summary["rows"][0]
    assert {e.dice[-1] for e in result.episodes} == {1.0}  # the empty mask is right, but nobody said so
    assert (row["dice"], row["iou"], row["ended"]["unreadable"]) == (0.0, 0.0, 6)
    assert row["unreadable_turns"] == 30
    assert result.episodes[0].turns[0].text == "blah"


def test_an_action_outside_the_envs_verbs_is_an_unreadable_turn(tmp_path: Path) -> None:
    class Clicker(Garbled):
        name = "Clicker"

        def act(self, views: Any, rngs: Any) -> list[Decision]:
            return [Decision(Click(1, 1))] * len(views)

    result = run(tmp_path, Clicker(), verbs=("box", "stop"))
    assert result.summary["rows"][0]["unreadable_turns"] == 30


def test_cases_are_a_seeded_choice_without_replacement() -> None:
    dataset = medseg_gym.datasets.load("Phantom", cases=30)
    one, notes = choose_cases(dataset, "test", (), 20, seed=0)
    assert one == choose_cases(dataset, "test", (), 20, seed=0)[0]
    assert one != choose_cases(dataset, "test", (), 20, seed=1)[0]
    assert len(set(one)) == 20 and not notes and one == sorted(one)


def test_fewer_cases_than_asked_is_said_aloud(tmp_path: Path) -> None:
    result = run(tmp_path, cases=500, dataset_options={"size": 64, "cases": 2, "task": "fundus"})
    there = result.summary["cases"]
    assert 0 < there < 500
    assert any(f"{there} cases, fewer than the 500 asked" in note for note in result.summary["notes"])


def test_noc_never_reached_is_none_and_counted_in_nof(tmp_path: Path) -> None:
    result = run(tmp_path, Garbled())
    assert result.summary["rows"][0]["noc"]["90"] == {"mean": None, "reached": 0, "nof": 1.0}


def test_dice_at_k_keeps_the_last_value_of_shorter_episodes(tmp_path: Path) -> None:
    result = run(tmp_path, "BoxOnce")
    row = result.summary["rows"][0]
    assert len(row["dice_at"]) == 6
    assert row["dice_at"][0] == 0.0 and row["dice_at"][1] == row["dice_at"][5] == row["dice"]


def test_the_row_of_hand_made_episodes() -> None:
    import dataclasses

    result_episode = from_json(EPISODE)
    worse = dataclasses.replace(result_episode, iou=(0.0, 0.6), dice=(0.0, 0.75), turns=result_episode.turns[:1])
    failed = dataclasses.replace(result_episode, ended="failed", patient="b")
    row = summarise_row([result_episode, worse, failed], env="E")
    assert row["dice"] == pytest.approx((0.95 + 0.75 + 0) / 3)
    assert row["noc"]["80"] == {"mean": 2.0, "reached": 1, "nof": pytest.approx(2 / 3)}
    assert row["patients"] == 2
    assert row["dice_at"] == pytest.approx([0, (0.8 + 0.75) / 3, (0.95 + 0.75) / 3, (0.95 + 0.75) / 3])


EPISODE = json.dumps(
    {
        "env": "E", "tool": "T", "policy": "P", "case": 0, "key": "k", "structure": "s", "instruction": "i",
        "patient": "a", "seed": 0, "horizon": 3, "reward": "shaped",
        "turns": [
            {"action": {"do": "box", "x1": 0, "y1": 0, "x2": 1, "y2": 1}, "reward": 0.5, "terms": {"a": 0.5},
             "tool_called": True, "mask": {"size": [2, 2], "counts": "04"}, "text": ""},
            {"action": {"do": "stop"}, "reward": 0.1, "terms": {"a": 0.1}, "tool_called": False,
             "mask": {"size": [2, 2], "counts": "04"}, "text": ""},
        ],
        "iou": [0.0, 0.7, 0.9], "dice": [0.0, 0.8, 0.95], "ended": "stopped", "start": None, "spacing_mm": None,
        "error": "", "schema": 1, "extra": {},
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("env", "policy", "error", "says"),
    [
        ("MedSeg-Phantom-Stab-v0", "BoxOnce", UnknownNameError, "did you mean 'MedSeg-Phantom-Stub-v0'"),
        (ENV, "BoxTwice", UnknownNameError, "did you mean 'BoxOnce'"),
        (ENV, ("BoxOnce", "BoxOnce"), MedSegError, "two policies are named"),
        (ENV, (), MedSegError, "nothing to evaluate"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, env: str, policy: Any, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        evaluate(env, policy, out=tmp_path / "out", cases=2)


def test_no_case_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedSegError, match="cases=0"):
        run(tmp_path, cases=0)


def test_the_report_is_written_and_needs_no_network(tmp_path: Path) -> None:
    result = run(tmp_path, report=True, cases=3)
    page = result.report.read_text(encoding="utf-8")
    assert "OracleBoxThenClicks" in page
    for outside in ('src="http', 'href="http', "url(http", "@import"):
        assert outside not in page


def test_a_dataset_of_ones_own_is_evaluated_through_medseg_v0(tmp_path: Path, blobs: Any) -> None:
    result = evaluate("MedSeg-v0", "BoxOnce", dataset=blobs, tool="Stub", out=tmp_path, cases=4, size=64)
    assert result.summary["rows"][0]["env"] == "MedSeg-Blobs-Stub-v0"
    assert {e.env for e in result.episodes} == {"MedSeg-Blobs-Stub-v0"}
    assert "Blobs" in result.report.read_text(encoding="utf-8")


def cli(*words: str) -> Any:
    from typer.testing import CliRunner

    from medseg_gym.cli import app

    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--env", "MedSeg-Phantom-Stab-v0", "--policy", "BoxOnce"), "did you mean 'MedSeg-Phantom-Stub-v0'"),
        (("--env", ENV, "--policy", "nowhere:Class"), "nowhere"),
        (("--env", ENV, "--policy", "BoxOnce", "--split", "tst"), "did you mean 'test'"),
        (("--env", ENV, "--policy", "BoxOnce", "--reward", "shapd"), "did you mean 'shaped'"),
        (("--env", "MedSeg-BTCV-Stub-v0", "--policy", "BoxOnce"), "medseg-gym data prepare BTCV --from"),
        (("--env", "MedSeg-Phantom-MedSAM2-v0", "--policy", "BoxOnce"), "medseg-gym tools download MedSAM2"),
        (("--env", "CartPole-v1", "--policy", "BoxOnce"), "MedSeg"),
        (("--env", ENV, "--policy", "BoxOnce", "--seed", "-1"), "seed=-1"),
        (("--env", ENV, "--policy", "BoxOnce", "--tool", "GrabCut"), "goes with the env MedSeg-v0"),
        (("--env", "MedSeg-v0", "--policy", "BoxOnce", "--tool", "json:dumps"), "json:dumps"),
        (("--env", "MedSeg-v0", "--policy", "BoxOnce", "--tool", "os:getcwd"), "not a segmentation tool"),
    ],
)
def test_the_command_line_answers_mistakes_in_one_line(
    tmp_path: Path, home: Path, words: tuple[str, ...], says: str
) -> None:
    result = cli("evaluate", *words, "--cases", "2", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert says in result.output and "Traceback" not in result.output


def test_an_unwritable_folder_is_answered_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli("evaluate", "--env", ENV, "--policy", "BoxOnce", "--out", str(tmp_path / "file" / "out"))
    assert result.exit_code == 1 and "choose another --out" in result.output


def test_a_policy_file_beside_the_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_policy.py").write_text(
        "from medseg_gym import Decision, Stop\n"
        "class Quitter:\n"
        "    name = 'Quitter'\n"
        "    def act(self, views, rngs):\n"
        "        return [Decision(Stop()) for _ in views]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = cli("evaluate", "--env", ENV, "--policy", "my_own_policy:Quitter", "--cases", "2", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "Quitter" in result.output


def test_envs_lists_ids_with_data_and_weights(home: Path) -> None:
    result = cli("envs", "Phantom")
    assert result.exit_code == 0
    line = next(line for line in result.output.splitlines() if "MedSeg-Phantom-MedSAM2-v0" in line)
    assert line.split() == ["MedSeg-Phantom-MedSAM2-v0", "Phantom", "MedSAM2", "yes", "no"]
