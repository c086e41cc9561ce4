"""`medseg-gym grpo` as it is typed: a run from a file, what it shows, how it is stopped, what it refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medseg_gym.cli import app
from medseg_gym.cli_train import in_words
from medseg_gym.cli_training_table import table
from medseg_gym.rl.runlog import METRICS, read_metrics

SETTINGS = """
model = "tiny"
preset = "tiny"
env = "MedSeg-Phantom-Stub-v0"
iterations = 1
prompts = 1
rollouts = 2
slots = 2
resample = 0
validate_every = 0
gallery_every = 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SETTINGS)
    return path


def test_the_command_trains_from_a_file_and_again_changes_nothing(file: Path, tmp_path: Path) -> None:
    """A random model answers nothing that can be read, so its groups are equal and no step is made: that is said."""
    typed = ["grpo", "--config", str(file), "--out", str(tmp_path / "out"), "--set", "seed=3"]
    result = CliRunner().invoke(app, typed)
    assert result.exit_code == 0, result.output
    assert "iteration 1: no step" in result.stderr and f"written: {tmp_path / 'out' / 'final'}" in result.stdout
    assert (tmp_path / "out" / "final" / "config.json").exists()
    (record,) = read_metrics(tmp_path / "out")
    assert record["train/unreadable"] == 1.0 and record["groups/equal"] == 1
    again = CliRunner().invoke(app, typed)
    assert again.exit_code == 0 and read_metrics(tmp_path / "out") == [record]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ((), "no settings"),
        (("--preset", "papre"), "did you mean 'paper'"),
        (("--preset", "paper", "--out", "o"), "model not given"),
        (("--preset", "paper", "--out", "o", "--set", "model=m"), "give an id as env"),
        (("--preset", "tiny", "--set", "model=tiny", "--out", "o", "--set", "rollouts=1"), "rollouts=1; wanted 2"),
        (("--preset", "tiny", "--set", "model=tiny", "--out", "o", "--set", "slots=4"), "slots=4 for 1 workers"),
        (("--preset", "tiny", "--set", "model=tiny", "--out", "o", "--set", "engine=vlm"), "unknown engine 'vlm'"),
    ],
)
def test_wrong_commands_say_what_to_give(
    typed: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["grpo", *typed])
    assert result.exit_code == 1 and said in " ".join(result.stderr.split())


@pytest.mark.slow
def test_a_terminated_run_saves_and_says_how_to_go_on(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    typed = ["grpo", "--config", str(file), "--out", str(out), "--set", "iterations=100000", "--set", "gallery_every=0"]
    process = subprocess.Popen([sys.executable, "-m", "medseg_gym", *typed], stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < 200:
        if (out / METRICS).exists() and read_metrics(out):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "give the same command again to go on" in said
    assert list((out / "checkpoints").glob("step-*"))


def test_the_table_shows_what_a_run_has() -> None:
    from rich.console import Console

    numbers = {"train/reward": 0.5, "train/reward_quality": 0.4, "idle/engine": 0.25, "learner/mismatch_kl": 1e-9}
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(numbers))
    words = " ".join(console.export_text().split())
    assert "reward 0.500 quality +0.400 mismatch KL 1.0e-09 engine idle 25%" in words
    assert in_words(numbers) == "reward 0.500  mismatch 1.0e-09  idle: engine 25%"
