"""A run of trajectories: its folder, resuming, worker processes, statistics, the hard set and the command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medseg_gym.cli import app
from medseg_gym.episodes import encode_mask
from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError
from medseg_gym.trajectories.hard import hard_keys, rounds, write_keys
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.run import run
from medseg_gym.trajectories.statistics import statistics
from medseg_gym.trajectories.store import Trajectories, TrajectoryWriter
from medseg_gym.trajectories.strategies import STRATEGIES, Settings
from medseg_gym.types import Box, Click, Episode, Stop, Turn, Undo

ENV = "MedSeg-Phantom-Stub-v0"
SMALL: dict[str, Any] = {"dataset_options": {"task": "ultrasound", "size": 48}, "cases": 12, "at_once": 4}


def made(out: Path, **options: Any) -> tuple[list[Trajectory], bytes]:
    """What a run wrote: all trajectories in order, and the statistics' bytes."""
    run(ENV, STRATEGIES, out=out, **{**SMALL, **options})
    return list(Trajectories(out).records()), (out / "statistics.json").read_bytes()


def test_a_run_holds_every_case_by_every_strategy_and_its_statistics(tmp_path: Path) -> None:
    shown: list[tuple[str, int, int]] = []
    found, told = made(tmp_path, progress=lambda *now: shown.append(now))
    assert len(found) == 36 and len({(t.episode.key, t.strategy) for t in found}) == 36
    assert shown[0] == ("trajectories", 0, 36) and shown[-1] == ("trajectories", 36, 36)
    assert all(t.episode.env == ENV and t.episode.key.startswith("Phantom/train/") for t in found)
    rows = json.loads(told)["rows"]
    assert [row["strategy"] for row in rows] == list(STRATEGIES) and {row["tried"] for row in rows} == {12}
    for row in rows:
        assert row["kept"] + sum(row["dropped"].values()) == 12
    times = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert [row["cases"] for row in times] == [12, 12, 12] and sum(row["encodes"] for row in times) <= 12
    image = Trajectories(tmp_path)[0][1]
    assert image.shape == (48, 48, 3)


def test_a_run_that_was_cut_off_goes_on_and_ends_as_the_whole_one(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole")

    def stop(_: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cut", progress=stop)
    there = len(Trajectories(tmp_path / "cut"))
    assert 0 < there < 36 and not (tmp_path / "cut" / "statistics.json").exists()
    assert made(tmp_path / "cut") == whole
    times = json.loads((tmp_path / "cut" / "times.json").read_text())["rows"]
    assert [row["cases"] for row in times] == [12, 12, 12]
    assert made(tmp_path / "cut") == whole  # nothing left to do


def test_a_run_goes_on_in_the_middle_of_a_portion_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(tmp_path / "whole")
    add, count = TrajectoryWriter.add, 0

    def fails(self: TrajectoryWriter, *record: Any) -> None:
        nonlocal count
        if (count := count + 1) > 17:
            raise OSError("no space left")
        add(self, *record)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(TrajectoryWriter, "add", fails)
        made(tmp_path / "cut")
    assert len(Trajectories(tmp_path / "cut")) == 17
    assert made(tmp_path / "cut") == whole


def test_portions_of_any_size_give_the_same_run(tmp_path: Path) -> None:
    assert made(tmp_path / "one", at_once=1) == made(tmp_path / "all", at_once=100)


KILLED = """
import os, signal, sys
from medseg_gym.trajectories.run import run
def progress(label, done, total):
    if done > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
run("MedSeg-Phantom-Stub-v0", ["sequential-click"], out=sys.argv[1], cases=300,
    dataset_options={"task": "cue"}, settings={"retries": 0}, progress=progress)
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_more_than_the_file_under_way(tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), "270"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert len(Trajectories(out)) == 256
    options: dict[str, Any] = {"cases": 300, "dataset_options": {"task": "cue"}, "settings": {"retries": 0}}
    run(ENV, "sequential-click", out=out, **options)
    run(ENV, "sequential-click", out=tmp_path / "whole", **options)
    assert list(Trajectories(out).records()) == list(Trajectories(tmp_path / "whole").records())
    assert (out / "statistics.json").read_bytes() == (tmp_path / "whole" / "statistics.json").read_bytes()


@pytest.mark.slow
def test_worker_processes_give_the_same_run(tmp_path: Path) -> None:
    assert made(tmp_path / "two", workers=2) == made(tmp_path / "one")


ORPHANED = """
import os, signal, sys
from medseg_gym.trajectories.run import run
def progress(label, done, total):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    run("MedSeg-Phantom-Stub-v0", ["xu"], out=sys.argv[1], cases=500, at_once=1, workers=2, progress=progress)
"""


@pytest.mark.slow
def test_a_killed_run_takes_its_workers_along(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    script = tmp_path / "orphaned.py"
    script.write_text(ORPHANED)
    with subprocess.Popen([sys.executable, str(script), str(tmp_path / "run")]) as killed:
        children: dict[int, Any] = {}
        while killed.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                children.update({child.pid: child for child in psutil.Process(killed.pid).children(recursive=True)})
            time.sleep(0.05)
    assert killed.returncode == -signal.SIGKILL and len(children) >= 2
    _, alive = psutil.wait_procs(list(children.values()), timeout=60)
    assert not alive


def test_another_run_does_not_go_into_the_same_folder(tmp_path: Path) -> None:
    made(tmp_path, cases=2)
    with pytest.raises(MedSegError, match="seed"):
        made(tmp_path, cases=2, seed=1)
    with pytest.raises(MedSegError, match="settings"):
        made(tmp_path, cases=2, settings=Settings(min_gain=0.1))


def test_what_cannot_be_run_is_said_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for wrong, told in (
        ({"env": "MedSeg-Phantom-Stab-v0"}, "Stub"),
        ({"strategies": "xue"}, "xu"),
        ({"split": "training"}, "train"),
        ({"verbs": ("box",)}, "verbs"),
        ({"tool": "Stub"}, "MedSeg-v0"),
        ({"env": "MedSeg-v0", "tool": "Stub"}, "dataset="),
        ({"structures": ("thumb",)}, "thumb"),
        ({"settings": {"retry": 3}}, "retries"),
    ):
        given = {"env": ENV, "strategies": "xu", "out": out, "cases": 2, **wrong}
        with pytest.raises((MedSegError, UnknownNameError, BadDataError), match=told):
            run(given.pop("env"), given.pop("strategies"), **given)
    assert not out.exists()


def test_a_split_called_all_is_the_three_together(tmp_path: Path) -> None:
    options = {"dataset_options": {"size": 32, "cases": 1}, "split": "all", "cases": None}
    run(ENV, "xu", out=tmp_path, **options)
    assert {key.split("/")[1] for key in Trajectories(tmp_path).keys} == {"train", "val", "test"}


# statistics and the hard set, by hand


def written(
    key: str, strategy: str, actions: int, iou: float, *, dropped: str = "", env: str = "E", **more: Any
) -> Trajectory:
    """A trajectory of so many actions, the stop among them, whose last IoU is `iou`."""
    mask = encode_mask([[True]])  # type: ignore[arg-type]
    prompts = [Turn(Click(0, 0), 0.0, {}, True, mask)] * (actions - 1)
    curve = (0.0,) * actions + (iou,)
    episode = Episode(
        *(env, "T", strategy, 0, key, "s", "s", "1", 0, 5, "shaped"),
        turns=(*prompts, Turn(Stop(), 0.0, {}, False, mask)),
        iou=curve,
        dice=tuple(2 * v / (1 + v) for v in curve),
        ended="stopped",
    )
    return Trajectory(episode, strategy, dropped=dropped, tries=3, **more)


def test_statistics_worked_out_by_hand() -> None:
    envs = [
        {"env": "E", "dataset": "One", "modality": "CT", "tool": "T"},
        {"env": "F", "dataset": "Two", "modality": "CT", "tool": "T"},
    ]
    rows = [
        written("a", "xu", 2, 0.8),
        written("b", "xu", 5, 0.9),
        written("c", "xu", 3, 1.0, kind="wrong-start"),
        written("d", "xu", 5, 0.5, dropped="iou"),
        written("a", "xu", 4, 0.6, env="F"),
    ]
    found = statistics(rows, envs)
    first, second = found["rows"]
    assert (first["dataset"], first["strategy"], first["tried"], first["kept"]) == ("One", "xu", 4, 3)
    assert first["dropped"] == {"iou": 1} and first["kinds"] == {"plain": 2, "wrong-start": 1}
    assert first["turns"] == pytest.approx(10 / 3) and first["prompts"] == pytest.approx(7 / 3)
    assert first["rounds"] == {"2": 1, "3": 1, "5": 1} and first["tries"] == 3
    assert first["iou"] == {"mean": pytest.approx(0.9), "median": 0.9}
    assert first["dice"]["median"] == pytest.approx(1.8 / 1.9)
    assert first["iou_tried"] == {"mean": pytest.approx(0.8), "median": pytest.approx(0.85)}
    assert second["iou"]["mean"] == 0.6
    (pooled,) = found["modalities"]
    assert pooled["tried"] == 5 and pooled["iou"] == {"mean": pytest.approx(0.825), "median": pytest.approx(0.85)}


def test_a_strategy_that_kept_nothing_has_no_means() -> None:
    envs = [{"env": "E", "dataset": "One", "modality": "", "tool": "T"}]
    (row,) = statistics([written("a", "xu", 2, 0.1, dropped="dice")], envs)["rows"]
    assert row["kept"] == 0 and row["turns"] is None and row["iou"] == {"mean": None, "median": None}


def test_hard_is_what_took_three_to_five_rounds_both_ways(tmp_path: Path) -> None:
    both = ("box-to-point", "sequential-click")
    turns = {"easy": (2, 3), "hard": (3, 5), "long": (4, 6), "lost": (4, 4), "half": (4,)}
    found = [
        written(key, strategy, n, 0.9, dropped="iou" if key == "lost" and strategy == both[1] else "")
        for key, lengths in turns.items()
        for strategy, n in zip(both, lengths, strict=False)
    ]
    assert hard_keys(found) == ["hard"]
    assert hard_keys(found, low=2) == ["easy", "hard"] and hard_keys(found, high=6) == ["hard", "long"]
    assert hard_keys(found, strategies=both[:1]) == ["hard", "long", "lost", "half"]
    other = [replace(t, episode=replace(t.episode, env="F")) for t in found]
    assert hard_keys([*found, *other], env="E") == ["hard"]
    for wrong, told in (({}, "env="), ({"env": "G"}, "G"), ({"env": "E", "strategies": ("xu",)}, "xu")):
        with pytest.raises(MedSegError, match=told):
            hard_keys([*found, *other], **wrong)
    with pytest.raises(MedSegError, match="low"):
        hard_keys(found, low=4, high=3)
    write_keys(tmp_path / "keys.txt", ["a/b c", "d"])
    assert (tmp_path / "keys.txt").read_text().splitlines() == ["a/b c", "d"]


def test_rounds_leave_out_what_a_reflective_trajectory_takes_back() -> None:
    assert rounds(written("a", "xu", 4, 0.9)) == 4
    assert rounds(written("a", "xu", 5, 0.9, kind="self-correction", marked=(True, False, False, False, False))) == 3
    assert rounds(written("a", "xu", 4, 0.9, kind="wrong-start")) == 3
    assert Undo() != Box(0, 0, 0, 0)


# the command


def test_the_command_samples_tells_and_chooses(tmp_path: Path) -> None:
    out, keys = tmp_path / "made", tmp_path / "keys.txt"
    words = ["trajectories", "--env", ENV, "--strategy", "box-to-point", "--strategy", "sequential-click", "--out"]
    given = ["--cases", "6", "--dataset-option", "size=48", "--setting", "min_iou=0.1", "--wrong-start", "0.5"]
    ran = CliRunner().invoke(app, [*words, str(out), *given])
    assert ran.exit_code == 0, ran.output
    assert "Phantom" in ran.output and "statistics.json" in ran.output
    stored = Trajectories(out)
    assert len(stored) == 12 and any(head.kind == "wrong-start" for head in stored.heads)
    assert stored.settings["settings"]["min_iou"] == 0.1
    told = CliRunner().invoke(app, ["trajectories", "info", str(out)])
    assert told.exit_code == 0 and "sequential-click" in told.output
    ran = CliRunner().invoke(app, ["trajectories", "hard", str(out), "--out", str(keys), "--low", "1"])
    assert ran.exit_code == 0 and keys.read_text().count("\n") == len(keys.read_text().split("\n")) - 1
    assert f"{len(keys.read_text().splitlines())} cases" in ran.output


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    assert "--strategy" in CliRunner().invoke(app, ["trajectories"]).output
    half = CliRunner().invoke(app, ["trajectories", "--env", ENV])
    assert half.exit_code == 2 and "--out" in half.output
    assert "min_gain=0.04" in CliRunner().invoke(app, ["trajectories", "--setting", "list"]).output
    empty = CliRunner().invoke(app, ["trajectories", "info", str(tmp_path)])
    assert empty.exit_code == 1 and "no trajectories" in empty.output
