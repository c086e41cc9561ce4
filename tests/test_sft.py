"""Supervised training as a run: exact continuation, what is refused, validation by episodes, ranks, and the presets."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tensorboard")

import torch
from sft_runs import cue_task, settings, weights
from typer.testing import CliRunner

from medseg_gym.cli import app
from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.rl import checkpoint
from medseg_gym.rl.config import SFTConfig, presets, read
from medseg_gym.rl.runlog import read_metrics
from medseg_gym.rl.sft import SFT, chosen
from medseg_gym.rl.stopping import Interrupted, Stopping


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """As many threads in every run, on which the last bits hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "cue.h5"
    return cue_task().write_demonstrations(path, 10, seed=0, tool="GrabCut")


def train(config: SFTConfig, **options: Any) -> Any:
    return asyncio.run(SFT(config, **options).run())


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without a break."""
    out = tmp_path_factory.mktemp("whole")
    train(settings(data, out))
    return out


def numbers(out: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in read_metrics(out)]


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(data: Path, whole: Path, tmp_path: Path) -> None:
    """Trap 10: weights, optimiser, order of the chats and records are those of a run that never ended."""
    stopping = Stopping()

    def stop_after_three(step: int, steps: int, values: Any) -> None:
        if step == 3:
            stopping.ask(signal.SIGTERM)

    with pytest.raises(Interrupted) as stop:
        train(settings(data, tmp_path), show=stop_after_three, stopping=stopping)
    assert stop.value.signal == signal.SIGTERM
    assert checkpoint.latest(tmp_path / "checkpoints")[1]["step"] == 3
    assert not (tmp_path / "final").exists()
    lines: list[str] = []
    state = train(settings(data, tmp_path), say=lines.append)
    assert (state.step, state.cursor) == (6, 24)
    assert "going on after step 3 of 6" in lines
    assert weights(tmp_path) == weights(whole)
    assert numbers(tmp_path) == numbers(whole)
    last = "checkpoints/step-00000006/learner/learner.safetensors"
    assert (tmp_path / last).read_bytes() == (whole / last).read_bytes()


def test_a_kill_before_the_newest_checkpoint_was_whole_repeats_its_steps(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    """Trap 10, between two saves: what was logged since is cut off and comes again."""
    train(settings(data, tmp_path))
    for left in ("step-00000006", "step-00000004"):
        (tmp_path / "checkpoints" / left / "learner" / "learner.safetensors").write_bytes(b"half")
    train(settings(data, tmp_path))
    assert weights(tmp_path) == weights(whole)
    assert numbers(tmp_path) == numbers(whole)


def test_a_finished_run_given_again_changes_nothing_and_may_be_made_longer(data: Path, tmp_path: Path) -> None:
    train(settings(data, tmp_path, steps=2))
    before = weights(tmp_path)
    assert train(settings(data, tmp_path, steps=2)).step == 2
    assert weights(tmp_path) == before
    assert train(settings(data, tmp_path, steps=3)).step == 3
    assert weights(tmp_path) != before


def test_a_folder_of_other_settings_is_refused_with_what_differs(data: Path, whole: Path) -> None:
    before = weights(whole)
    with pytest.raises(MedSegError, match=r"holds another run: lr was 0\.001, is 0\.5; .*choose another --out"):
        train(settings(data, whole, lr=0.5))
    assert weights(whole) == before


def test_the_exported_folder_is_a_checkpoint_that_another_run_begins_with(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(whole / "final")
    begun = AutoModelForImageTextToText.from_pretrained(whole / "model")
    changed = [
        name
        for (name, after), before in zip(model.named_parameters(), begun.parameters(), strict=True)
        if not torch.equal(after, before)
    ]
    assert any("visual" in name for name in changed) and "lm_head.weight" in changed
    train(settings(data, tmp_path, model=str(whole / "final"), steps=1))
    assert read_metrics(tmp_path)[0]["train/loss"] < read_metrics(whole)[0]["train/loss"]


def test_the_language_model_alone_is_trained_where_the_tower_is_frozen(data: Path, tmp_path: Path) -> None:
    """Trap 15: encoder and projector are the same to the last bit; with transformers' names both are under visual."""
    from safetensors.torch import load_file

    train(settings(data, tmp_path, freeze=["*visual*"], steps=2))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "final"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "visual" in name} <= same
    assert any("merger" in name for name in same)
    assert "lm_head.weight" not in same


def test_validation_plays_episodes_and_the_best_weights_are_kept(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path, steps=3, validate_every=2)
    state = train(config)
    validated = [line for line in read_metrics(tmp_path) if "val/iou" in line]
    assert [line["step"] for line in validated] == [2, 3]
    assert {"val/dice", "val/turns", "val/unreadable", "val/reward"} <= validated[0].keys()
    assert 1 <= validated[0]["val/turns"] <= 2
    assert (state.best, state.best_step) == (validated[0]["val/iou"], 2)  # random weights outline nothing: equal
    assert weights(tmp_path, "best") != weights(tmp_path)
    train(settings(data, tmp_path / "plain", steps=3))
    assert weights(tmp_path) == weights(tmp_path / "plain")  # to look changes nothing


def test_a_stop_in_a_validation_saves_and_the_continuation_begins_with_it(data: Path, tmp_path: Path) -> None:
    stopping = Stopping()
    run = SFT(settings(data, tmp_path, steps=2, validate_every=1), stopping=stopping)

    async def endless() -> Any:
        stopping.ask(signal.SIGINT)
        await asyncio.sleep(600)

    run.play = endless  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        asyncio.run(run.run())
    assert [("val/iou" in line) for line in read_metrics(tmp_path)] == [False]
    train(settings(data, tmp_path, steps=2, validate_every=1))
    assert [(line["step"], "val/iou" in line) for line in read_metrics(tmp_path)] == [(1, False), (1, True), (2, True)]


@pytest.mark.slow
def test_two_ranks_train_what_one_does(data: Path, whole: Path, tmp_path: Path) -> None:
    """Trap 11, through the whole trainer."""
    from safetensors.torch import load_file

    train(settings(data, tmp_path, ranks=2, steps=2))
    train(settings(data, tmp_path / "one", steps=2))
    one, two = (load_file(out / "final" / "model.safetensors") for out in (tmp_path / "one", tmp_path))
    for name, value in one.items():
        np.testing.assert_allclose(two[name].numpy(), value.numpy(), atol=1e-5, err_msg=name)
    left = [line["train/loss"] for line in read_metrics(tmp_path / "one")]
    np.testing.assert_allclose([line["train/loss"] for line in read_metrics(tmp_path)], left, atol=1e-5)


def test_settings_that_cannot_work_are_told_before_anything_is_loaded(data: Path, tmp_path: Path) -> None:
    for given, words in (
        ({"batch": 0}, "batch=0; wanted 1 or more"),
        ({"steps": 0, "epochs": 0.0}, "epochs=0.0; wanted more than 0"),
    ):
        with pytest.raises(MedSegError, match=words):
            SFT(settings(data, tmp_path / "run", **given))
    with pytest.raises(MedSegError, match=r"model='nowhere': no checkpoint folder"):
        train(settings(data, tmp_path / "run", model="nowhere"))


def test_without_an_env_there_is_no_validation_and_a_line_says_so(data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = {"verbs": ["box", "stop"]}
    config = settings(data, tmp_path, steps=1, validate_every=1, env="", env_options=options)
    state = train(config, say=lines.append)
    assert state.best is None and not any("val/iou" in line for line in read_metrics(tmp_path))
    assert 'no validation, as it plays episodes: env = "..." is not given' in lines


def test_data_that_changed_since_the_run_began_are_refused(tmp_path: Path) -> None:
    cue = cue_task()
    data = cue.write_demonstrations(tmp_path / "cue.h5", 4, seed=0, tool="GrabCut")
    train(settings(data, tmp_path / "run", steps=1))
    cue.write_demonstrations(data, 6, seed=0, tool="GrabCut")
    with pytest.raises(MedSegError, match=r"holds other trajectories than when .* was begun; choose another --out"):
        train(settings(data, tmp_path / "run", steps=2))


def test_epochs_give_the_steps(data: Path, tmp_path: Path) -> None:
    run = SFT(settings(data, tmp_path, steps=0, epochs=0.8, batch=4))
    asyncio.run(run.run())
    assert run.steps == 2  # 0.8 of 10 chats, 4 a step


def test_validation_cases_are_drawn_by_the_seed_in_the_datasets_order() -> None:
    keys = [f"{number:02d}" for number in range(40)]
    few = chosen(keys, 8, seed=1)
    assert few == sorted(few) and len(set(few)) == 8
    assert few == chosen(keys, 8, seed=1) != chosen(keys, 8, seed=2)
    assert chosen(keys, 100, seed=0) == keys


def test_every_preset_is_read_and_has_its_papers_numbers() -> None:
    assert presets(SFTConfig) == ["ibis", "medsam-agent", "tiny"]
    given = {"model": "m", "data": "d", "out": "o"}
    agent = read(SFTConfig, preset="medsam-agent", **given)
    assert (agent.lr, agent.batch, agent.epochs, agent.lora_rank, agent.freeze) == (1e-5, 64, 4.0, 0, ("*visual*",))
    ibis = read(SFTConfig, preset="ibis", **given)
    assert (ibis.lora_rank, ibis.lr, ibis.epochs, ibis.protocol, ibis.size % 28) == (8, 1e-5, 10.0, "ibis", 0)
    for name in presets(SFTConfig):
        SFT(read(SFTConfig, preset=name, **given))


# the command


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(app, ["sft", *map(str, args)])


def test_the_command_trains_from_a_file_with_settings_above_it(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'preset = "tiny"\ndata = "{data}"\nout = "elsewhere"\nsteps = 9\nbatch = 4\nvalidate_every = 0\n')
    done = invoke("--config", file, "--set", "steps=2", "--set", "protocol_options={}", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert f"written: {tmp_path / 'run' / 'final'}" in done.output.replace("\n", "")
    assert "10 chats to learn, 4 a step, 2 steps" in done.output
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_after_the_step_with_a_checkpoint_and_the_next_move(
    number: signal.Signals, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, step = SFT._step, 2

    async def signalled(self: SFT, now: int, *given: Any) -> Any:
        if now == step:
            os.kill(os.getpid(), number)
        return await begun(self, now, *given)

    args = ["--preset", "tiny", "--set", f"data={data}", "--out", tmp_path]
    for setting in ("steps=6", "batch=4", "validate_every=0"):
        args += ["--set", setting]
    monkeypatch.setattr(SFT, "_step", signalled)
    stopped = invoke(*args)
    assert stopped.exit_code == 128 + number
    assert "stopped and saved; give the same command again to go on" in stopped.output
    assert checkpoint.latest(tmp_path / "checkpoints")[1]["step"] == step
    monkeypatch.setattr(SFT, "_step", begun)
    assert invoke(*args).exit_code == 0
    assert weights(tmp_path) == weights(whole)


def test_wrong_commands_say_what_to_give(tmp_path: Path) -> None:
    for args, words in (
        ((), "give --config FILE.toml, --preset NAME, or both"),
        (("--preset", "tyni"), "did you mean 'tiny'"),
        (("--preset", "tiny", "--set", "steps"), "wanted key=value"),
        (("--preset", "tiny", "--set", "stepz=1"), "did you mean 'steps'"),
        (("--preset", "tiny", "--out", tmp_path), "data not given"),
        (("--config", tmp_path / "none.toml"), "cannot read"),
    ):
        failed = invoke(*args)
        assert failed.exit_code == 1
        assert words in failed.output, failed.output


def test_unknown_settings_in_a_file_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "tiny"\nlearning_rate = 1\n')
    with pytest.raises(UnknownNameError, match="run.toml"):
        read(SFTConfig, file)
