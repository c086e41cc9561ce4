"""Checkpoints are whole or not there, and a run's folder is continued by its own settings alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medseg_gym.errors import MedSegError
from medseg_gym.rl import checkpoint
from medseg_gym.rl.config import SFTConfig, read


def config(**given: object) -> SFTConfig:
    return read(SFTConfig, **{"model": "tiny", "out": "runs/x", "data": "t.h5", **given})


def writes(text: str = "weights") -> object:
    return lambda folder: (folder / "weights.bin").write_text(text)


def test_the_newest_checkpoint_is_found_with_what_was_recorded_and_older_ones_go(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, writes(f"at {step}"), {"cursor": step * 4}, keep=2)
    place, record = checkpoint.latest(tmp_path)
    assert record == {"cursor": 60, "step": 15}
    assert (place / "weights.bin").read_text() == "at 15"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_a_checkpoint_that_lacks_a_file_or_half_of_one_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, writes(), {})
    (tmp_path / "step-00000004" / checkpoint.RECORD).write_text('{"schema": 1, "st')
    (tmp_path / "step-00000003" / "weights.bin").write_text("wei")
    (tmp_path / "step-00000002" / "weights.bin").unlink()
    assert checkpoint.latest(tmp_path)[1]["step"] == 1


def test_a_failed_write_leaves_nothing_that_is_believed_and_the_next_one_works(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "weights.bin").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        checkpoint.save(tmp_path, 1, fails, {})
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 1, writes(), {"fine": True}, keep=1)
    assert checkpoint.latest(tmp_path)[1]["fine"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """Trap 10: what is killed while it is saved goes on from the checkpoint before."""
    script = (
        "import os, pathlib, sys\n"
        "from medseg_gym.rl import checkpoint\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "checkpoint.save(root, 1, lambda f: (f / 'a').write_text('one'), {})\n"
        "checkpoint.save(root, 2, lambda f: ((f / 'a').write_text('tw'), os.kill(os.getpid(), 9)), {})\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=os.environ).returncode == -9
    place, record = checkpoint.latest(tmp_path)
    assert record["step"] == 1
    assert (place / "a").read_text() == "one"


def test_a_full_disk_is_told_with_the_next_move(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(MedSegError, match="No space left on device; make room, then give the same command"):
        checkpoint.save(tmp_path, 1, full, {})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, writes("first"), {})
    place = checkpoint.save(tmp_path, 1, writes("second"), {})
    assert (place / "weights.bin").read_text() == "first"


def test_an_exported_folder_is_replaced_whole(tmp_path: Path) -> None:
    checkpoint.replace_folder(tmp_path / "best", writes("one"))
    checkpoint.replace_folder(tmp_path / "best", writes("two"))
    assert (tmp_path / "best" / "weights.bin").read_text() == "two"

    def fails(folder: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        checkpoint.replace_folder(tmp_path / "best", fails)
    assert (tmp_path / "best" / "weights.bin").read_text() == "two"
    checkpoint.replace_folder(tmp_path / "best", writes("three"))
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_settings_that_decide_the_weights_bind_a_continuation_and_others_do_not() -> None:
    base = checkpoint.digest(config())
    same = {"out": "elsewhere", "keep": 9, "save_every": 7, "wandb": "p", "steps": 50, "epochs": 9.0}
    for name, value in same.items():
        assert checkpoint.digest(config(**{name: value})) == base, name
    for name, value in {"lr": 1e-4, "seed": 1, "data": "u.h5", "batch": 3, "freeze": []}.items():
        assert checkpoint.digest(config(**{name: value})) != base, name
    # with a schedule the learning rate hangs on the number of steps
    assert checkpoint.digest(config(schedule="cosine", steps=50)) != checkpoint.digest(config(schedule="cosine"))
    assert json.loads(json.dumps(checkpoint.binding(config()))) == checkpoint.binding(config())


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 6, writes(), {}, keep=1)
    (tmp_path / "step-00000006" / "weights.bin").write_text("wei")
    checkpoint.save(tmp_path, 4, writes(), {}, keep=1)
    assert checkpoint.latest(tmp_path)[1]["step"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lr": -1.0}, "lr=-1.0; wanted 0 or more"),
        ({"lr": float("nan")}, "lr=nan; wanted 0 or more"),
        ({"betas": [0.9, 2.0]}, "wanted 0 to 1"),
        ({"lora_rank": -1}, "lora_rank=-1; wanted 0 or more"),
        ({"micro_rows": 0}, "micro_rows=0; wanted 1 or more"),
        ({"warmup": 1.5}, "warmup=1.5; wanted 0 to 1"),
        ({"dtype": "float64"}, "unknown dtype"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused_at_once(given: dict[str, object], told: str) -> None:
    with pytest.raises(MedSegError, match=told):
        config(**given)
