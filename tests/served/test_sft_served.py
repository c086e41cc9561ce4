"""A model fine-tuned here is served by vLLM as it was trained: the words and log-probabilities are the learner's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; run make test-vllm")
pytest.importorskip("tensorboard")

import torch
from sft_runs import full_grammar_data, full_grammar_settings
from test_vllm import Recording, environment, serve  # noqa: F401 - a fixture, which every test here uses

from medseg_gym.bench.evaluate import evaluate
from medseg_gym.policies.endpoint import EndpointModel
from medseg_gym.policies.vlm import VLMPolicy
from medseg_gym.rl.learner import Learner
from medseg_gym.rl.runlog import read_metrics
from medseg_gym.rl.sft import SFT
from medseg_gym.rl.types import ImageRef, Segment, TokenSequence

CASES, TURNS, TOKENS = 2, 3, 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder after 20 steps of MedSAM-Agent's whole grammar."""
    out = tmp_path_factory.mktemp("sft")
    data = full_grammar_data(out / "trajectories.h5")
    asyncio.run(SFT(full_grammar_settings(data, out / "run")).run())
    losses = [line["train/loss"] for line in read_metrics(out / "run")]
    assert len(losses) == 20 and losses[-1] < 0.8 * losses[0]
    return out / "run"


@pytest.fixture(scope="module")
def served(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(trained / "final", tmp_path_factory.mktemp("server") / "log.txt") as address:
        yield address


def learner_of(run: Path) -> Learner:
    """The learner as its last checkpoint has it, not as it was exported."""
    config = full_grammar_settings(run.parent / "trajectories.h5", run)
    learner = Learner(config, run / "model", total_steps=20)
    learner.load(run / "checkpoints" / "step-00000020" / "learner")
    return learner


def test_vllm_serves_the_checkpoint_and_says_the_learners_log_probabilities_in_whole_episodes(
    tmp_path: Path, trained: Path, served: str
) -> None:
    """Trap 2, the vLLM side of a checkpoint: 1e-4."""
    endpoint = EndpointModel(served, "tiny", max_tokens=TOKENS, tell_tokens=True)
    recording = Recording(endpoint)
    policy = VLMPolicy(recording, "medsam-agent", size=64)
    options: dict[str, Any] = {"cases": CASES, "horizon": TURNS, "report": False}
    result = evaluate("MedSeg-Phantom-Stub-v0", policy, out=tmp_path, **options)
    endpoint.close()
    assert [episode.error for episode in result.episodes] == [""] * CASES
    assert sum(len(episode.turns) for episode in result.episodes) == len(recording.asked) >= CASES
    learner = learner_of(trained)
    for messages, answer in recording.asked:
        prompt, completion = learner.tokens.conversation(messages), answer.result()
        assert completion.prompt_ids == prompt.ids
        assert len(completion.token_ids) == len(completion.logprobs) > 0
        sequence = TokenSequence(
            (
                Segment("prompt", prompt.ids, 0, tuple(map(ImageRef.of, prompt.images))),
                Segment("action", completion.token_ids, 0),
            )
        )
        (logprobs,) = learner.logprobs([sequence], temperature=1.0, banned=False)
        np.testing.assert_allclose(completion.logprobs, logprobs[sequence.loss_mask], atol=1e-4)
        assert greedy(learner, sequence) == list(completion.token_ids)


def greedy(learner: Learner, sequence: TokenSequence) -> list[int]:
    """What the learner would have said: its likeliest token at each place of the answer."""
    from medseg_gym.rl.forward import model_inputs

    inputs = model_inputs(learner.model, learner.tokens, [sequence])
    with torch.inference_mode():
        logits = learner.model(**inputs).logits[0]
    places = torch.from_numpy(np.flatnonzero(sequence.loss_mask)) - 1
    return logits[places].argmax(-1).tolist()
