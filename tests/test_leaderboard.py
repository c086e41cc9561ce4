"""Playing suites: finished runs stay, cut-off ones go on, what is missing or refused is named; reading runs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medseg_gym import datasets
from medseg_gym.bench import suites
from medseg_gym.bench.leaderboard import build
from medseg_gym.bench.leaderboard_run import PROVENANCE, Outcome, freeze, run_suite, slug
from medseg_gym.bench.measures import UNREAD, measure
from medseg_gym.bench.runs import find_runs, read_run
from medseg_gym.bench.suites import Entry, Suite
from medseg_gym.cli import app
from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError
from medseg_gym.types import Decision, Stop, View

MONAI = find_spec("monai") is not None
PHANTOM = Entry("Phantom", "Stub", cases=3, horizon=3, options={"dataset_options": {"size": 64}})
TINY = Suite("tiny", "Tiny", "Three phantoms.", (PHANTOM,), ("Random", "BoxOnce"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """A suite of three cases beside the others, and a data home without data."""
    monkeypatch.setattr(suites, "SUITES", {**suites.SUITES, "tiny": TINY})


def states(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    return [(outcome.policy, outcome.state) for outcome in outcomes]


def everything(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        file.relative_to(root).as_posix(): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


class Stopper:
    """Stops at once; interrupts, as ^C would, when it is asked for the `broken`-th time."""

    def __init__(self, broken: int = 0, name: str = "Stopper", error: type[BaseException] = KeyboardInterrupt) -> None:
        self.name, self.broken, self.asked, self.error = name, broken, 0, error

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        self.asked += 1
        if self.asked == self.broken:
            raise self.error("no more")
        return [Decision(Stop()) for _ in views]


def test_a_second_run_touches_nothing(tmp_path: Path) -> None:
    assert states(run_suite("tiny", out=tmp_path)) == [("Random", "played"), ("BoxOnce", "played")]
    before = everything(tmp_path)
    assert states(run_suite("tiny", out=tmp_path)) == [("Random", "there"), ("BoxOnce", "there")]
    assert everything(tmp_path) == before
    assert (tmp_path / "tiny" / "MedSeg-Phantom-Stub-v0" / "BoxOnce" / PROVENANCE).is_file()


def test_a_new_policy_joins_what_is_there(tmp_path: Path) -> None:
    run_suite("tiny", ["BoxOnce"], out=tmp_path)
    before = everything(tmp_path)
    assert states(run_suite("tiny", ["BoxOnce", "CentreClick"], out=tmp_path)) == [
        ("BoxOnce", "there"),
        ("CentreClick", "played"),
    ]
    assert {name: file for name, file in everything(tmp_path).items() if name in before} == before


def test_progress_counts_the_cases_of_all_policies_of_an_entry(tmp_path: Path) -> None:
    run_suite("tiny", ["BoxOnce"], out=tmp_path)
    seen: list[tuple[str, int, int]] = []
    run_suite("tiny", ["BoxOnce", "Random"], out=tmp_path, progress=lambda *told: seen.append(told))
    assert seen == [("MedSeg-Phantom-Stub-v0", done, 6) for done in (3, 3, 4, 5, 6)]


def test_a_run_that_was_cut_off_goes_on_to_the_same_episodes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_suite("tiny", [Stopper(broken=3)], out=tmp_path / "cut", num_envs=1)
    folder = tmp_path / "cut" / "tiny" / "MedSeg-Phantom-Stub-v0" / "Stopper"
    assert len(read_run(folder).episodes) == 2
    assert not (folder / PROVENANCE).exists()
    second = Stopper()
    assert states(run_suite("tiny", [second], out=tmp_path / "cut", num_envs=1)) == [("Stopper", "played")]
    assert second.asked == 1
    run_suite("tiny", [Stopper()], out=tmp_path / "whole", num_envs=1)
    for name in ("run.json", "episodes.jsonl", "summary.json", "measures.json"):
        whole = tmp_path / "whole" / "tiny" / "MedSeg-Phantom-Stub-v0" / "Stopper" / name
        assert (folder / name).read_bytes() == whole.read_bytes()


def test_what_is_missing_is_named_and_the_rest_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = Suite("tiny", "Tiny", "", (Entry("BTCV", "SAM2.1T"), PHANTOM), ("BoxOnce",))
    monkeypatch.setitem(suites.SUITES, "tiny", mixed)  # type: ignore[arg-type]
    lacks, played = run_suite("tiny", out=tmp_path)
    assert (lacks.state, played.state) == ("missing", "played")
    assert lacks.commands == ("medseg-gym data prepare BTCV --from FOLDER", "medseg-gym tools download SAM2.1T")
    build([tmp_path])
    text = (tmp_path / "LEADERBOARD.md").read_text()
    assert "1 of 2 envs ran" in text
    assert "MedSeg-BTCV-SAM2.1T-v0" in text and "`medseg-gym tools download SAM2.1T`" in text
    assert "medseg-gym tools download SAM2.1T" in (tmp_path / "leaderboard.html").read_text()


def test_other_settings_are_refused_until_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_suite("tiny", ["BoxOnce"], out=tmp_path)
    longer = Suite("tiny", "Tiny", "", (Entry("Phantom", "Stub", cases=3, horizon=4, options=PHANTOM.options),))
    monkeypatch.setitem(suites.SUITES, "tiny", longer)  # type: ignore[arg-type]
    (refused,) = run_suite("tiny", ["BoxOnce"], out=tmp_path)
    assert refused.state == "refused"
    assert "other entry" in refused.note and "--restart" in refused.note
    assert states(run_suite("tiny", ["BoxOnce"], out=tmp_path, restart=True)) == [("BoxOnce", "played")]
    assert states(run_suite("tiny", ["BoxOnce"], out=tmp_path)) == [("BoxOnce", "there")]


def test_another_tool_behind_the_same_name_is_refused(tmp_path: Path) -> None:
    run_suite("tiny", ["BoxOnce"], out=tmp_path)
    (folder,) = find_runs(tmp_path)
    settings = json.loads((folder / "run.json").read_text())
    settings["tools"]["MedSeg-Phantom-Stub-v0"] = "Stub:0000000000000000"
    (folder / "run.json").write_text(json.dumps(settings))
    (refused,) = run_suite("tiny", ["BoxOnce"], out=tmp_path)
    assert refused.state == "refused" and "other tool" in refused.note


def test_other_data_behind_the_same_name_is_refused(tmp_path: Path) -> None:
    run_suite("tiny", ["BoxOnce"], out=tmp_path)
    (folder,) = find_runs(tmp_path)
    settings = json.loads((folder / "run.json").read_text())
    settings["datasets"] = dict.fromkeys(settings["datasets"], "another content")
    (folder / "run.json").write_text(json.dumps(settings))
    (outcome,) = run_suite("tiny", ["BoxOnce"], out=tmp_path)
    assert outcome.state == "refused" and "other data" in outcome.note


def test_a_policy_that_cannot_play_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    first, second = run_suite("tiny", ["OracleClick", "BoxOnce"], out=tmp_path)
    assert (first.state, second.state) == ("refused", "played")
    assert "did you mean" in first.note


def test_a_policy_that_fails_everywhere_is_told_and_counts_0(tmp_path: Path) -> None:
    class Broken(Stopper):
        def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
            raise RuntimeError("no model")

    (failed,) = run_suite("tiny", [Broken(name="Broken")], out=tmp_path)
    assert failed.state == "failed" and "no model" in failed.note
    built = build([tmp_path])
    (row,) = built.results[0].tables[0].rows
    assert (row.failed, row.iou.overall.mean, row.f1_mean) == (3, 0.0, 0.0)
    assert row.nsd == (0.0 if MONAI else None)


def test_a_failed_episode_measures_the_worst_whatever_it_had_drawn(tmp_path: Path) -> None:
    run_suite("tiny", ["BoxOnce"], out=tmp_path)
    data = datasets.load("Phantom", size=64)
    episode = read_run(find_runs(tmp_path)[0]).episodes[0]
    drawn, failed = (measure(replace(episode, ended=ended), data, MONAI) for ended in ("stopped", "failed"))
    assert drawn["present"] and drawn["drawn"] and failed["present"] and failed["drawn"]
    if MONAI:
        spacing = data[episode.key].spacing_mm or (1.0, 1.0)
        assert drawn["nsd"] > 0
        assert failed["nsd"] == 0
        assert failed["hd95"] == pytest.approx(64 * float(np.hypot(*spacing)), abs=1e-3)
    assert measure(replace(episode, key="Phantom/none"), data, MONAI) == UNREAD


def test_fewer_cases_are_a_trial_without_a_rank(tmp_path: Path) -> None:
    run_suite("tiny", ["BoxOnce"], out=tmp_path, cases=2)
    (row,) = build([tmp_path]).results[0].tables[0].rows
    assert (row.cases, row.trial, row.rank) == (2, True, None)
    with pytest.raises(MedSegError, match="cases=0"):
        run_suite("tiny", ["BoxOnce"], out=tmp_path, cases=0)
    with pytest.raises(UnknownNameError, match="no tool 'Nano'"):
        run_suite("tiny", ["BoxOnce"], out=tmp_path, tools=["Nano"])


def test_policies_of_any_name_have_folders_of_their_own() -> None:
    assert slug("BoxOnce") == "BoxOnce"
    names = ["OracleClicks:jitter=5", "OracleClicks_jitter=5", "a/b", "a\\b", "../up", "..", "é" * 300]
    folders = [slug(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all("/" not in f and "\\" not in f and not f.startswith(".") and len(f) < 100 for f in folders)


def test_where_results_come_from_names_no_folder(tmp_path: Path) -> None:
    run_suite("tiny", ["BoxOnce"], out=tmp_path / "runs")
    freeze(tmp_path / "runs", tmp_path / "frozen")
    build([tmp_path / "frozen"])
    for file in (tmp_path / "frozen").rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
        assert str(tmp_path) not in text and str(Path.home()) + "/" not in text, file
    (folder,) = find_runs(tmp_path / "frozen")
    found = json.loads((folder / PROVENANCE).read_text())
    assert found["command"] == "medseg-gym leaderboard run --suite tiny --policy BoxOnce"
    assert {"commit", "changed", "versions", "machine", "tool_fingerprint", "weights_sha256"} <= found.keys()


def test_frozen_runs_are_the_same_runs_in_equal_bytes(tmp_path: Path) -> None:
    run_suite("tiny", out=tmp_path / "runs")
    with pytest.raises(KeyboardInterrupt):  # unfinished: left out
        run_suite("tiny", [Stopper(broken=1)], out=tmp_path / "runs", num_envs=1)
    assert len(freeze(tmp_path / "runs", tmp_path / "a")) == 2
    freeze(tmp_path / "runs", tmp_path / "b")
    contents = [{name: data for name, (_, data) in everything(tmp_path / f).items()} for f in "ab"]
    assert contents[0] == contents[1]
    for folder in find_runs(tmp_path / "a"):
        assert (folder / "episodes.jsonl.gz").read_bytes()[4:8] == bytes(4)  # gzip's own time stamp
        assert sorted(file.name for file in folder.iterdir()) == [
            *("episodes.jsonl.gz", "measures.json", "provenance.json", "run.json", "summary.json", "times.json"),
        ]
        assert read_run(folder) == read_run(tmp_path / "runs" / folder.relative_to(tmp_path / "a"))
    assert states(run_suite("tiny", out=tmp_path / "a")) == [("Random", "there"), ("BoxOnce", "there")]
    build([tmp_path / "runs"], out=tmp_path / "x")
    build([tmp_path / "a"], out=tmp_path / "y")
    frozen, plain = ((tmp_path / place / "leaderboard.html").read_text() for place in "yx")
    assert frozen == plain[: plain.index('<section id="left-out">')] + plain[plain.index("</main>") :]


def test_reading_a_run_has_limits_and_names_what_is_wrong(tmp_path: Path) -> None:
    run_suite("tiny", ["BoxOnce"], out=tmp_path)
    (folder,) = find_runs(tmp_path)
    whole = (folder / "episodes.jsonl").read_bytes()
    with pytest.raises(BadDataError, match="over 100 bytes"):
        read_run(folder, max_bytes=100)
    (folder / "episodes.jsonl").write_bytes(whole[:-20])
    with pytest.raises(BadDataError, match="cut off"):
        read_run(folder)
    (folder / "episodes.jsonl").write_bytes(whole.replace(b'"iou":[', b'"iou":[0.5,', 1))
    with pytest.raises(BadDataError, match="line 1: 2 turns with 4 IoU"):
        read_run(folder)
    (folder / "episodes.jsonl").unlink()
    with pytest.raises(BadDataError, match=r"neither episodes.jsonl nor episodes.jsonl.gz"):
        read_run(folder)
    (folder / "episodes.jsonl.gz").write_bytes(gzip.compress(b"\n" * 50_000_000))  # 50 kB that unpack to 50 MB
    with pytest.raises(BadDataError, match="over 1000000 bytes"):
        read_run(folder, max_bytes=1_000_000)
    (folder / "episodes.jsonl.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(BadDataError, match="not a whole gzip file"):
        read_run(folder)
    (folder / "run.json").unlink()
    with pytest.raises(BadDataError, match=r"run.json: no such file"):
        read_run(folder)


def test_the_command_line_runs_builds_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def ask(words: str, code: int = 0) -> str:
        result = runner.invoke(app, words.split())
        assert result.exit_code == code, result.output
        return result.output

    assert "no finished run" in ask("leaderboard build", 1)
    assert "medsam-agent-21" in ask("leaderboard list")
    assert "medseg-gym tools download MedSAM2" in ask("leaderboard list medsam-agent-21")
    assert "1 of 1 envs ran; 1 runs played now, 0 were there before" in ask(
        "leaderboard run --suite tiny --policy BoxOnce"
    )
    assert "0 runs played now, 1 were there before" in ask("leaderboard run --suite tiny --policy BoxOnce")
    assert "did you mean 'tiny'" in ask("leaderboard run --suite tinny", 1)
    assert "refused" in ask("leaderboard run --suite tiny --policy Nobody", 1)
    assert "tiny: 1 of 1 envs ran" in ask("leaderboard build")
    assert "baseline='Nobody' has not played" in ask("leaderboard build --baseline Nobody", 1)
    assert "1 runs frozen" in ask("leaderboard freeze --out frozen")
    assert (tmp_path / "runs" / "leaderboard" / "LEADERBOARD.md").is_file()
