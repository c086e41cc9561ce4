"""A learner of two processes against one of one, and what happens when one of them, or the driver, is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_chats
import numpy as np
import psutil
import pytest
import torch

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl import batch
from medseg_gym.rl.learner_state import TENSORS
from medseg_gym.rl.loss import Objective
from medseg_gym.rl.ranks import learner
from medseg_gym.rl.tiny_model import save_tiny_model, tiny_config, tiny_model, tiny_tokenizer
from medseg_gym.rl.types import Segment, TokenSequence

SFT = Objective("sft")
WITHIN = 240.0  # seconds; a busy machine takes a minute to start two processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose head is its embedding, as the smaller Qwen3-VLs have it."""
    folder = save_tiny_model(tmp_path_factory.mktemp("tied"))
    config = tiny_config(tiny_tokenizer())
    config.tie_word_embeddings = True
    tiny_model(config, 0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(folder):
    tokens = made_chats.learner(folder).tokens
    return [made_chats.chat(tokens, 1 + n % 3, seed=n) for n in range(7)]


def close(found, wanted, atol=1e-5):
    assert set(found) == set(wanted)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=atol, rtol=0)


async def trained(config, folder, chats, steps=2):
    handle = await learner(config, folder, 10, timeout=WITHIN)
    rows = batch.supervised_rows(chats)
    numbers = [await handle.step(batch.plan(rows, config.ranks, 2, 16384), SFT) for _ in range(steps)]
    return handle, numbers


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"kl": 0.1}, {"lora_rank": 2, "gradient_checkpointing": True}])
def test_two_ranks_make_the_update_of_one(folder, chats, tmp_path, settings):
    """Trap 11, and all that a handle hands out: with tied and frozen weights; with LoRA and checkpointing. What one
    rank saved two go on from, and the reverse."""

    async def run():
        found = {}
        for ranks in (1, 2):
            config = made_chats.config(folder, ranks=ranks, lr=1e-3, **settings)
            handle, numbers = await trained(config, folder, chats)
            await handle.save(tmp_path / f"saved-{ranks}")
            await handle.export(tmp_path / f"exported-{ranks}")
            found[ranks] = (
                numbers,
                await handle.weights(full=True),
                await handle.weights(full=False),
                await handle.logprobs(chats, temperature=0.8),
                await handle.reference_logprobs(chats, temperature=0.8),
            )
            if ranks == 2:
                await handle.step(batch.plan(batch.supervised_rows(chats[:3]), 2, 2, 16384), SFT)
                await handle.logprobs(chats[:2], temperature=0.8)
                await handle.load(tmp_path / "saved-1")
                found["1 to 2"] = await handle.weights(full=True)
                found["scored"] = await handle.logprobs(chats, temperature=0.8)
                await handle.step(batch.plan(batch.supervised_rows(chats), 2, 2, 16384), SFT)
                found["then 2"] = await handle.weights(full=True)
            await handle.close()
        config = made_chats.config(folder, lr=1e-3, **settings)
        handle = await learner(config, folder, 10)
        await handle.load(tmp_path / "saved-2")
        found["2 to 1"] = await handle.weights(full=True)
        await handle.step(batch.plan(batch.supervised_rows(chats), 1, 2, 16384), SFT)
        found["then 1"] = await handle.weights(full=True)
        return found

    found = asyncio.run(run())
    for one, two in zip(found[1][0], found[2][0], strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    close(found[2][1], found[1][1])
    close(found[2][2], found[1][2])
    for part in (3, 4):
        for one, two in zip(found[1][part], found[2][part], strict=True):
            np.testing.assert_allclose(two, one, atol=1e-5)
    for one, two in zip(found[1][3], found["scored"], strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5)
    close(found["1 to 2"], found[1][1], atol=0)
    close(found["2 to 1"], found[2][1], atol=0)
    close(found["then 2"], found["then 1"])
    sizes = [(tmp_path / f"saved-{ranks}" / TENSORS).stat().st_size for ranks in (1, 2)]
    assert sizes[0] == sizes[1]
    files = [{f.name for f in (tmp_path / f"exported-{ranks}").iterdir()} for ranks in (1, 2)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_dead_rank_is_an_error_and_load_starts_anew(folder, chats, tmp_path):
    """Then bad data, which one rank alone is given: its error is told, the others' are not waited for."""
    rows = batch.supervised_rows(chats)
    planned = batch.plan(rows, 2, 2, 16384)
    banned = TokenSequence((*chats[0].segments[:1], Segment("action", (0, 1), 0)))
    broken = TokenSequence((Segment("prompt", chats[0].segments[0].ids, 3), *banned.segments[1:]))

    async def run():
        config = made_chats.config(folder, ranks=2)
        handle, _ = await trained(config, folder, chats, steps=1)
        await handle.save(tmp_path)
        before = await handle.weights(full=True)
        ranks = [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
        assert len(ranks) == 2
        ranks[1].kill()
        start = time.monotonic()
        with pytest.raises(MedSegError, match="rank 1 of the learner died"):
            await handle.step(planned, SFT)
        assert time.monotonic() - start < 60
        assert not psutil.wait_procs(ranks, timeout=10)[1]
        with pytest.raises(MedSegError, match="load a checkpoint"):
            await handle.step(planned, SFT)
        await handle.load(tmp_path)
        close(await handle.weights(full=True), before, atol=0)
        with pytest.raises(MedSegError, match="2 ranks with as many each"):
            await handle.step([planned[0]], SFT)
        with pytest.raises(BadDataError, match="turn 3, prompt: image tokens come in runs"):
            await handle.step([planned[0][:1], [batch.supervised_rows([broken])]], SFT)
        await handle.close()
        assert not [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]

    asyncio.run(run())


DRIVER = """
import asyncio, sys
from pathlib import Path
import made_chats
from medseg_gym.rl.ranks import learner

async def main(folder):
    await learner(made_chats.config(folder, ranks=2), folder, 10)
    print("ready", flush=True)
    await asyncio.sleep(1000)

if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_ranks_end_with_their_driver(folder, tmp_path):
    """Killed, so that it can tell them nothing; and its ^C is not theirs."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    places = [str(Path(made_chats.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "TMPDIR": str(tmp_path)}
    driver = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert driver.stdout is not None
    try:
        assert driver.stdout.readline() == "ready\n"
        ranks = [p for p in psutil.Process(driver.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        assert len(ranks) == 2
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert all(rank.is_running() for rank in ranks)
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    assert not psutil.wait_procs(ranks, timeout=20)[1]
    assert not list(tmp_path.glob("medseg-ranks-*"))


def test_a_local_handle_takes_a_plan_of_one_rank(folder, chats):
    rows = batch.supervised_rows(chats[:2])

    async def run():
        handle = await learner(made_chats.config(folder), folder, 10)
        with pytest.raises(MedSegError, match="wanted 1 ranks"):
            await handle.step(batch.plan(rows, 2, 1, 16384), SFT)
        first = handle.step(batch.plan(rows, 1, 4, 16384), SFT)
        second = handle.weights(full=False)
        numbers, weights = await asyncio.gather(first, second)
        await handle.close()
        return numbers, weights

    numbers, weights = asyncio.run(run())
    plain = made_chats.learner(folder)
    assert plain.step(batch.plan(rows, 1, 4, 16384)[0], SFT) == numbers
    close(weights, plain.weights(full=False), atol=0)


def test_ranks_below_one_are_refused(folder):
    with pytest.raises(MedSegError, match="ranks=0"):
        asyncio.run(learner(made_chats.config(folder, ranks=0), folder, 10))
