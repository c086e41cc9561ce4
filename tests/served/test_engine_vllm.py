"""vLLM as a policy engine: the contract of all engines, and the log-probabilities of the learner's forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; run make test-vllm")

import torch
from safetensors.torch import load_file
from test_engines import *  # noqa: F403  (the contract's tests, run here with the fixtures below)
from test_engines import LONG, Case, run, under_way

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl import sync
from medseg_gym.rl.engines.base import GenRequest, GenResult, WeightRef
from medseg_gym.rl.engines.vllm import VLLMEngine
from medseg_gym.rl.forward import token_logprobs, unpad
from medseg_gym.rl.tiny_model import save_tiny_model, tiny_config, tiny_model
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Segment, TokenSequence

del test_a_closed_engine_ends_what_is_under_way_and_refuses_the_rest  # noqa: F821  (of a shared engine: the last test)

ENVIRONMENT = {  # a CPU's settings; without them vLLM takes cores and memory that are not there
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
}


class Fresh:
    """An engine that starts slowly, as it was at the start; to close it leaves it running."""

    def __init__(self, engine: VLLMEngine, weights: dict[str, Any]) -> None:
        self._engine = engine
        with ThreadPoolExecutor(1) as thread:  # a loop may run in this one
            self._before = thread.submit(asyncio.run, self._restore(WeightRef(0, True, weights))).result()

    async def _restore(self, weights: WeightRef) -> Any:
        if (await self._engine.status()).version:
            await self._engine.pause("abort")
            await self._engine.update_weights(weights)
            await self._engine.resume()
        return (await self._engine.status()).counters

    async def status(self) -> Any:
        status = await self._engine.status()
        return replace(status, counters={name: n - self._before[name] for name, n in status.counters.items()})

    async def close(self) -> None:
        await self._engine.pause("abort")
        await self._engine.resume()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", spread=0.2)


@pytest.fixture(scope="module")
def vllm(checkpoint: Path) -> Iterator[VLLMEngine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made = VLLMEngine(
            checkpoint,
            dtype="float32",
            max_model_len=2048,
            max_num_seqs=8,
            # a seeded request whose prompt is read in pieces stops vLLM 0.32 on a CPU, whose generators have no offset
            max_num_batched_tokens=32768,
            enforce_eager=True,
            max_images=6,
        )
        yield made
        asyncio.run(made.close())


@pytest.fixture
def case(checkpoint: Path, vllm: VLLMEngine) -> Case:
    weights = load_file(checkpoint / "model.safetensors")
    return Case(lambda: Fresh(vllm, weights), ChatTokens.from_pretrained(checkpoint), weights, exact=False)


@pytest.fixture
def engine(case: Case) -> Any:
    return case.make()


def differ(
    model: Any, tokens: ChatTokens, asked: Sequence[GenRequest], said: Sequence[GenResult], **given: Any
) -> float:
    """The largest difference between the engine's log-probabilities and those of a learner's forward pass."""
    chats = [
        TokenSequence((Segment("prompt", q.ids, 0, q.images), Segment("action", a.ids, 0, (), a.logprobs, a.versions)))
        for q, a in zip(asked, said, strict=True)
    ]
    with torch.no_grad():
        theirs = unpad(token_logprobs(model, tokens, chats, **given), chats)
    return max(float(np.abs(chat.logprobs - their).max()) for chat, their in zip(chats, theirs, strict=True))


def model_of(tokens: ChatTokens, weights: dict[str, Any]) -> Any:
    model = tiny_model(tiny_config(tokens.tokenizer, spread=0.2), seed=0)
    model.load_state_dict(weights)
    return model


def test_vllm_and_learner_agree_on_every_sampled_token(case: Case, engine: Any) -> None:
    """Trap 2: within 1e-4, several pictures and a temperature included, and not when the temperature is left out."""
    asked = [case.request(i, images=i % 4, words="w" * (i + 1), temperature=0.7, max_tokens=20) for i in range(6)]
    said = run(engine.generate_together(asked))
    model = model_of(case.tokens, dict(case.weights))
    assert differ(model, case.tokens, asked, said, temperature=0.7) < 1e-4
    assert differ(model, case.tokens, asked, said, temperature=1.0) > 0.1


@pytest.mark.parametrize("part", ["all", "vision tower", "language model"])
def test_after_an_update_vllms_log_probabilities_are_the_new_weights(
    case: Case, engine: Any, part: str, tmp_path: Path
) -> None:
    """Traps 12 and 16: fused and laid out anew, with no old picture and no old prefix left in a cache."""
    asked = [case.request(i, images=2) for i in range(3)]
    other = tiny_model(tiny_config(case.tokens.tokenizer, spread=0.2), seed=1).state_dict()
    weights = {n: t for n, t in other.items() if part == "all" or ("visual" in n) == (part == "vision tower")}
    expected = model_of(case.tokens, {**case.weights, **weights})

    async def work() -> tuple[list[GenResult], list[GenResult]]:
        before = await engine.generate_together(asked)
        await engine.pause()
        await engine.update_weights(sync.publish(weights, 5, part == "all", tmp_path))
        await engine.resume()
        return before, await engine.generate_together(asked)

    before, after = run(work())
    assert differ(expected, case.tokens, asked, before) > 1e-2
    assert differ(expected, case.tokens, asked, after) < 1e-4


def test_a_part_of_a_fused_module_is_refused_and_changes_nothing(case: Case, engine: Any) -> None:
    name = "model.language_model.layers.0.self_attn.q_proj.weight"

    async def work() -> None:
        await engine.pause()
        with pytest.raises(BadDataError, match="qkv, but not .*k_proj"):
            await engine.update_weights(WeightRef(2, False, {name: case.weights[name]}))
        await engine.resume()
        assert (await engine.status()).version == 0

    run(work())


def test_a_chats_next_turn_finds_the_last_one_in_the_cache(case: Case, engine: Any) -> None:
    async def work() -> None:
        first = case.request(0, words="a word or two " * 10)
        said = await engine.generate(first)
        more = case.tokens.suffix(said.ids, [{"role": "user", "content": "and now?"}])
        await engine.generate(replace(first, ids=first.ids + said.ids + more.ids, images=first.images))
        assert (await engine.status()).counters["cached_tokens"] > 100

    run(work())


def test_a_closed_vllm_ends_what_is_under_way_and_refuses_the_rest(case: Case, vllm: VLLMEngine) -> None:
    async def work() -> None:
        task = await under_way(vllm, case.request(0, stop_ids=(), max_tokens=LONG))
        await vllm.close()
        assert (await task).finish == "abort"
        with pytest.raises(MedSegError, match="closed"):
            await vllm.generate(case.request(1))
        await vllm.close()

    run(work())
    assert not vllm._scratch.exists()
