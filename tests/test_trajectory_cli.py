"""`medseg-gym trajectories thoughts` and `export`, from a sampled folder to every form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_server import ChatServer
from typer.testing import CliRunner, Result

from medseg_gym.cli import app
from medseg_gym.trajectories.store import Trajectories


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["trajectories", *map(str, words)])


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases of the phantom, clicked on a Stub that answers with discs; none meets the usual IoU, so all do."""
    from medseg_gym.trajectories.run import run

    out = tmp_path_factory.mktemp("sampled") / "t"
    settings = {"min_iou": 0.0, "self_correction": 1.0}
    run("MedSeg-Phantom-Stub-v0", "sequential-click", out=out, cases=3, settings=settings)
    assert len(Trajectories(out).kept()) > 0
    return out


def test_thoughts_then_an_export_of_every_form(sampled: Path, tmp_path: Path) -> None:
    pytest.importorskip("minari")
    pytest.importorskip("pyarrow")
    done = call("thoughts", sampled, "--out", tmp_path / "told", "--seed", 5)
    assert done.exit_code == 0 and f"3 trajectories: {tmp_path / 'told'}" in done.output
    told = Trajectories(tmp_path / "told")
    assert told.settings["thoughts"] == {"writer": "template", "seed": 5}
    assert all(one.thoughts for one in told.records() if one.episode.turns)
    forms = {"sharegpt": "train.jsonl", "trl": "train.jsonl", "verl": "rl.parquet"}
    for form, file in forms.items():
        done = call("export", tmp_path / "told", "--format", form, "--out", tmp_path / form, "--size", 64)
        assert done.exit_code == 0, done.output
        assert (tmp_path / form / file).is_file()
    ibis = ("--format", "sharegpt", "--protocol", "ibis", "--option", "history=true", "--size", 64)
    assert call("export", tmp_path / "told", "--out", tmp_path / "ibis", *ibis).exit_code == 0
    row = json.loads((tmp_path / "ibis" / "train.jsonl").read_text().splitlines()[0])
    assert row["messages"][2]["content"].startswith("<think>\n")
    done = call("export", tmp_path / "told", "--format", "minari", "--out", tmp_path / "minari", "--size", 32)
    assert done.exit_code == 0 and (tmp_path / "minari" / "medseg-v0" / "data").is_dir(), done.output
    assert "differently" not in done.output


def test_a_teacher_writes_through_the_command(sampled: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    with ChatServer(lambda body: "I look at the edge.") as server:
        words = ("--writer", "teacher", "--base-url", server.url, "--model", "wise")
        done = call("thoughts", sampled, "--out", tmp_path / "told", *words)
    assert done.exit_code == 0 and "(asked " in done.output, done.output
    said = {thought for one in Trajectories(tmp_path / "told").records() for thought in one.thoughts}
    assert "I look at the edge." in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "--format", "alpaca", "--out", "x"), "unknown format 'alpaca'"),
        (("export", "--format", "sharegpt", "--out", "x", "--protocol", "medsam"), "did you mean 'medsam-agent'"),
        (("export", "--format", "sharegpt", "--out", "x", "--protocol", "ibis"), "trajectories thoughts"),
        (("export", "--format", "minari", "--out", "x", "--env", "MedSeg-BTCV-SAM2.1T-v0"), "no trajectories of env"),
        (("thoughts", "--out", "x", "--writer", "poet"), "unknown writer 'poet'"),
        (("thoughts", "--out", "x", "--writer", "teacher"), "needs --base-url and --model"),
    ],
)
def test_mistakes_are_told_in_one_line(
    sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(words[0], sampled, *words[1:])
    assert done.exit_code == 1 and message in done.output.replace("\n", " "), done.output
    assert not list(tmp_path.iterdir())
