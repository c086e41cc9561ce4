"""A learner on a GPU: steps in bfloat16 with checkpointed gradients, and the log-probabilities of the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import made_chats

from medseg_gym.rl import batch
from medseg_gym.rl.loss import Objective
from medseg_gym.rl.tiny_model import save_tiny_model

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_bfloat16_step_with_checkpointing_lowers_the_loss(folder, tmp_path, lora_rank):
    settings = {"device": "cuda", "dtype": "bfloat16", "gradient_checkpointing": True, "lora_rank": lora_rank}
    learner = made_chats.learner(folder, **settings)
    chats = [made_chats.chat(learner.tokens, 1 + n % 3, seed=n) for n in range(8)]
    rows = batch.supervised_rows(chats)
    losses = [learner.step([rows[:4], rows[4:]], Objective("sft"))["loss"] for _ in range(6)]
    assert losses[-1] < losses[0] - 0.05
    learner.save(tmp_path)
    again = made_chats.learner(folder, **settings)
    again.load(tmp_path)
    wanted = learner.weights(full=True)
    assert all(torch.equal(value, wanted[name]) for name, value in again.weights(full=True).items())


def test_float32_log_probabilities_are_those_of_the_cpu(folder):
    """Matrix products in full float32; TF32 would be off by 1e-3."""
    learners = [made_chats.learner(folder, device=device) for device in ("cpu", "cuda")]
    chats = [made_chats.chat(learners[0].tokens, 1 + n % 3, seed=n) for n in range(4)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        found = [learner.logprobs(chats, temperature=1.0) for learner in learners]
    finally:
        torch.set_float32_matmul_precision(before)
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, atol=1e-3)
