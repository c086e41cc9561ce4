"""The log of a training run: what is cut off at a resume, what is refused, and that no secret leaves."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_gym.errors import MedSegError
from medseg_gym.rl.config import SFTConfig, read
from medseg_gym.rl.runlog import METRICS, SETTINGS, RunLog, read_metrics


def config(**given: Any) -> SFTConfig:
    return read(SFTConfig, **{"model": "tiny", "out": "x", "data": "t.h5", **given})


def scalars(out: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def test_numbers_are_in_metrics_and_in_tensorboard_and_a_resumed_run_writes_later_steps_anew(tmp_path: Path) -> None:
    log = RunLog(tmp_path, config())
    for step in range(1, 6):
        log.write(step, {"train/loss": step / 4})
    log.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 6, "train/lo')  # a kill in the middle of a line
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    log = RunLog(tmp_path, config(), resume_step=3)
    log.write(4, {"train/loss": 8.0})
    log.write(5, {"train/loss": float("nan")})
    log.close()
    losses = [(record["step"], record["train/loss"]) for record in read_metrics(tmp_path)]
    assert losses == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 8.0), (5, None)]
    shown = scalars(tmp_path)
    assert (shown[3], shown[4]) == (0.75, 8.0)


def test_a_folder_of_another_run_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    log = RunLog(tmp_path, config())
    log.write(1, {"train/loss": 1.0})
    log.close()
    before = (tmp_path / METRICS).read_bytes(), (tmp_path / SETTINGS).read_bytes()
    with pytest.raises(MedSegError, match=r"holds another run: lr was 1e-05, is 0\.5; .*choose another --out"):
        RunLog(tmp_path, config(lr=0.5))
    assert ((tmp_path / METRICS).read_bytes(), (tmp_path / SETTINGS).read_bytes()) == before
    RunLog(tmp_path, config(keep=7), resume_step=1).close()
    assert json.loads((tmp_path / SETTINGS).read_text())["keep"] == 7


def test_two_runs_never_write_into_one_folder(tmp_path: Path) -> None:
    first = RunLog(tmp_path, config())
    with pytest.raises(MedSegError, match="another run is writing into"):
        RunLog(tmp_path, config())
    first.close()
    RunLog(tmp_path, config()).close()


def test_a_missing_tensorboard_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MedSegError, match=r"pip install 'medseg-gym\[rl\]'"):
        RunLog(tmp_path, config())


class FakeWandb(types.ModuleType):
    """What is used of W&B, writing down what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.said: list[Any] = []

    def init(self, **given: Any) -> FakeWandb:
        self.said.append(("init", given))
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.said.append((step, values))

    def Image(self, pixels: np.ndarray) -> tuple[int, ...]:
        return pixels.shape

    def finish(self) -> None:
        self.said.append("finish")


def test_wandb_is_told_the_numbers_and_no_secret_and_a_resumed_run_goes_on_with_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    secret = {"tool_options": {"api_key": "hunter2", "url": "http://me:hunter2@localhost:1/x", "token": "hunter2"}}
    for resume_step in (0, 1):
        log = RunLog(tmp_path, config(wandb="project", env_options=secret), resume_step=resume_step)
        log.write(resume_step + 1, {"train/loss": 0.5})
        log.picture(resume_step + 1, "gallery", np.zeros((4, 6, 3), np.uint8))
        log.close()
    begun = [given for kind, given in (entry for entry in wandb.said if entry[0] == "init")]
    assert begun[0]["project"] == "project"
    assert begun[0]["config"]["lr"] == 1e-5
    assert begun[0]["id"] == begun[1]["id"] != ""
    assert begun[0]["save_code"] is False
    assert wandb.said[1:4] == [(1, {"train/loss": 0.5}), (1, {"gallery": (4, 6, 3)}), "finish"]
    assert "hunter2" not in repr(wandb.said) + (tmp_path / SETTINGS).read_text()
    assert begun[0]["config"]["max_new_tokens"] == 256  # a number of tokens is no secret


def test_nothing_goes_to_wandb_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = RunLog(tmp_path, config())
    log.write(1, {"train/loss": 0.5})
    log.close()
    assert wandb.said == []
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MedSegError, match="pip install wandb, or leave the setting out"):
        RunLog(tmp_path, config(wandb="project"))
    RunLog(tmp_path, config()).close()  # the failed one let go of the folder


def test_a_run_that_ended_before_its_first_step_does_not_hold_its_folder(tmp_path: Path) -> None:
    RunLog(tmp_path, config()).close()
    RunLog(tmp_path, config(lr=0.5)).close()
    assert json.loads((tmp_path / SETTINGS).read_text())["lr"] == 0.5
    (tmp_path / "model").mkdir()  # the tiny one, which hangs on the seed
    with pytest.raises(MedSegError, match="seed was 0, is 1"):
        RunLog(tmp_path, config(seed=1))
