"""vLLM serves what transformers would say: the same prompts, the same log-probabilities, the same episodes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; run make test-vllm")

import torch

from medseg_gym.bench.evaluate import evaluate
from medseg_gym.policies.chat import Message
from medseg_gym.policies.endpoint import EndpointModel
from medseg_gym.policies.inprocess import TransformersModel, VLLMModel
from medseg_gym.policies.vlm import Completion, VLMPolicy
from medseg_gym.rl.tokens import ChatTokens, TokenPrompt
from medseg_gym.types import Box, Decision

CASES, TURNS, TOKENS = 3, 4, 12
# What a random model would never hit upon: the server is made to speak the protocol, so that masks change every turn.
CALL = (
    r'<tool_call>\n\{"name": "add_bbox", "arguments": \{"bbox_2d": '
    r"\[[1-9]\d\d, [1-9]\d\d, [1-9]\d\d, [1-9]\d\d\]\}\}\n</tool_call>"
)


ENVIRONMENT = {  # a CPU's settings; without them vLLM takes cores and memory that are not there
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
}
START_SECONDS = 420  # 40 to 70 s on two cores that are free, several times that on busy ones


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medseg_gym.rl.tiny_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=0, spread=0.2)


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(checkpoint, tmp_path_factory.mktemp("server") / "log.txt") as address:
        yield address


@contextmanager
def serve(checkpoint: Path, log: Path) -> Iterator[str]:
    """The address of a running server that serves the checkpoint as "tiny"."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "8192", "--max-num-seqs", "4", "--enforce-eager"]
    # a seeded request whose prompt is read in pieces stops vLLM 0.32 on a CPU, whose generators have no offset
    command += ["--max-num-batched-tokens", "32768"]
    command += ["--limit-mm-per-prompt", '{"image": 8, "video": 0}']
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"the server ended by itself:\n{log.read_text(errors='replace')[-3000:]}")
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server was not ready in {START_SECONDS} s:\n{log.read_text(errors='replace')[-3000:]}")


class Recording:
    """A model that writes down what it was asked, and what it said."""

    def __init__(self, model: Any) -> None:
        self.model, self.name = model, "tiny"
        self.asked: list[tuple[Sequence[Message], Future[Completion]]] = []

    def complete(self, messages: Sequence[Message], said: Sequence[Decision], seed: int) -> Future[Completion]:
        answer = self.model.complete(messages, said, seed)
        self.asked.append((messages, answer))
        return answer

    def close(self) -> None:
        self.model.close()


def play(out: Path, model: Any, **options: Any) -> tuple[Any, Recording]:
    recording = Recording(model)
    policy = VLMPolicy(recording, "medsam-agent", size=128)
    settings: dict[str, Any] = {"cases": CASES, "horizon": TURNS, "report": False, **options}
    return evaluate("MedSeg-Phantom-Stub-v0", policy, out=out, **settings), recording


@pytest.fixture(scope="module")
def by_transformers(checkpoint: Path) -> Iterator[TransformersModel]:
    model = TransformersModel(checkpoint, max_tokens=TOKENS)
    yield model
    model.close()


@pytest.fixture(scope="module")
def tokens(checkpoint: Path) -> ChatTokens:
    return ChatTokens.from_pretrained(checkpoint)


def logprobs_of(model: TransformersModel, prompt: TokenPrompt, ids: Sequence[int]) -> np.ndarray:
    """transformers' log-probability of every token of a completion."""
    whole = TokenPrompt(prompt.ids + tuple(ids), prompt.images)
    with torch.inference_mode():
        rows = model.model(**model.tokens.inputs([whole])).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
    return rows[torch.arange(len(ids)), torch.tensor(list(ids))].numpy()


def test_the_server_reads_our_tokens_and_says_transformers_logprobs_over_multi_turn_episodes(
    tmp_path: Path, server: str, by_transformers: TransformersModel, tokens: ChatTokens
) -> None:
    told = {"structured_outputs": {"regex": CALL}}
    guided = EndpointModel(server, "tiny", max_tokens=160, temperature=1.0, tell_tokens=True, extra_body=told)
    result, recording = play(tmp_path, guided)
    guided.close()
    assert len(recording.asked) == CASES * TURNS
    assert all(isinstance(turn.action, Box) for episode in result.episodes for turn in episode.turns)
    free = EndpointModel(server, "tiny", max_tokens=TOKENS, tell_tokens=True)
    # its log-probabilities are those after the grammar's mask, so the same chats are asked again without one
    again = [(messages, free.complete(messages, (), seed=0)) for messages, _ in recording.asked]
    pictures: set[bytes] = set()
    for (messages, spoken), (_, answer) in zip(recording.asked, again, strict=True):
        prompt = tokens.conversation(messages)
        pictures |= {image.tobytes() for image in prompt.images}
        completion = answer.result()
        assert spoken.result().prompt_ids == completion.prompt_ids == prompt.ids
        assert tokens.decode(spoken.result().token_ids) == spoken.result().text
        assert len(completion.logprobs) == len(completion.token_ids) > 0
        wanted = logprobs_of(by_transformers, prompt, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, wanted, atol=1e-4)
    free.close()
    assert max(len(tokens.conversation(messages).images) for messages, _ in again) == TURNS
    assert len(pictures) > CASES * 2  # the mask did change


def test_the_same_checkpoint_plays_the_same_episodes_in_transformers_and_in_vllm_token_for_token(
    tmp_path: Path, checkpoint: Path, by_transformers: TransformersModel
) -> None:
    in_vllm = VLLMModel(
        checkpoint,
        max_tokens=TOKENS,
        dtype="float32",
        max_model_len=4096,
        max_images=TURNS,
        enforce_eager=True,
        max_num_seqs=4,
    )
    try:
        theirs, asked_of_vllm = play(tmp_path / "vllm", in_vllm)
    finally:
        in_vllm.close()
    ours, asked = play(tmp_path / "transformers", by_transformers)
    name = "episodes.jsonl"
    assert (tmp_path / "vllm" / name).read_bytes() == (tmp_path / "transformers" / name).read_bytes()
    assert len(ours.episodes) == len(theirs.episodes) == CASES

    def by_prompt(recording: Recording) -> dict[tuple[int, ...], Completion]:
        return {(answer := future.result()).prompt_ids: answer for _, future in recording.asked}

    left, right = by_prompt(asked), by_prompt(asked_of_vllm)
    assert left.keys() == right.keys()
    assert len(left) == CASES * TURNS
    for prompt, completion in left.items():
        assert completion.token_ids == right[prompt].token_ids
        np.testing.assert_allclose(completion.logprobs, right[prompt].logprobs, atol=1e-4)
