"""Supervised training from end to end: the cue task is learned, and the full grammar survives a kill at any moment."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tensorboard")

import torch
from sft_runs import cue_task, full_grammar_data, full_grammar_settings, settings, weights

from medseg_gym.rl.engines.hf import HFEngine
from medseg_gym.rl.local_worker import LocalWorker
from medseg_gym.rl.runlog import read_metrics
from medseg_gym.rl.sft import SFT
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.validate import Validation, validate

STEPS = 140


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def played(model: Path, keys: list[str], env: str, options: dict[str, Any]) -> Validation:
    """Every case once, sampled at a temperature of 1."""

    async def play() -> Validation:
        tokens = ChatTokens.from_pretrained(model)
        worker = LocalWorker(env, 16, "tiny", size=64, options=options)
        engine = HFEngine(model, tokens, device="cpu")
        try:
            return await validate(
                [worker], engine, tokens, keys, temperature=1.0, seed=0, max_new_tokens=8, max_chat_tokens=512
            )
        finally:
            await engine.close()
            await worker.close()

    return asyncio.run(play())


@pytest.mark.slow
def test_a_random_model_learns_the_cue_from_demonstrations_of_which_45_percent_are_wrong(tmp_path: Path) -> None:
    """Trap 20: it beats every policy that needs no look at the image by .15 IoU, over 64 unseen cases, sampled."""
    cue = cue_task()
    data = cue.write_demonstrations(tmp_path / "cue.h5", 256, seed=0)
    config = settings(data, tmp_path / "run", steps=STEPS, batch=32, save_every=STEPS)
    asyncio.run(SFT(config).run())
    keys = cue.unseen()
    assert len(keys) == 64
    bar = max(cue.blind(keys).values())
    found = played(tmp_path / "run" / "final", keys, cue.ENV, cue.ENV_OPTIONS)
    print(f"SFT {found.iou:.3f}, best blind policy {bar:.3f}, unreadable {found.unreadable:.3f}")
    assert found.iou >= bar + 0.15
    # and there is headroom for reinforcement learning
    assert found.iou < 0.8


@pytest.fixture(scope="module")
def grammar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_grammar_data(tmp_path_factory.mktemp("data") / "trajectories.h5")


@pytest.mark.slow
def test_the_full_grammar_is_learned_and_a_run_killed_at_any_moment_goes_on_to_the_same_bits(
    grammar: Path, tmp_path: Path
) -> None:
    """Trap 10: SIGKILL at a random moment of a run of its own process; 20 steps lower the loss."""
    whole = full_grammar_settings(grammar, tmp_path / "whole")
    asyncio.run(SFT(whole).run())
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "whole")]
    assert len(losses) == 20
    assert sum(losses[-3:]) / 3 < 0.8 * sum(losses[:3]) / 3

    out = tmp_path / "killed"
    killed_at(kill_after(), [*command(full_grammar_settings(grammar, out))], out)
    asyncio.run(SFT(full_grammar_settings(grammar, out)).run())
    assert weights(out) == weights(tmp_path / "whole")
    assert [line["train/loss"] for line in read_metrics(out)] == losses


def kill_after() -> tuple[int, float]:
    """After which record of metrics.jsonl, and how many seconds later; told, so that a failure can be repeated."""
    moment = random.SystemRandom().randint(2, 12), random.SystemRandom().random() * 0.2
    print(f"killed {moment[1]:.3f} s after record {moment[0]}")
    return moment


def command(config: Any) -> list[str]:
    """A program that trains with these settings."""
    program = (
        "import asyncio, json, sys, torch; torch.set_num_threads(1)\n"
        "from medseg_gym.rl.config import SFTConfig, read\n"
        "from medseg_gym.rl.sft import SFT\n"
        "asyncio.run(SFT(read(SFTConfig, **json.loads(sys.argv[1]))).run())\n"
    )
    from dataclasses import asdict

    return [sys.executable, "-c", program, json.dumps(asdict(config))]


def killed_at(moment: tuple[int, float], program: list[str], out: Path) -> None:
    process = subprocess.Popen(program, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    end = time.monotonic() + 240
    try:
        while process.poll() is None and time.monotonic() < end and len(read_metrics(out)) < moment[0]:
            time.sleep(0.01)
        time.sleep(moment[1])
        assert process.poll() in (None, 0), "it failed by itself"
    finally:
        process.kill()
        process.wait()
