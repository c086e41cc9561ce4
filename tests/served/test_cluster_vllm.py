"""GRPO on a Ray cluster with vLLM as the policy: weights updated live, engine and learner of one mind after each."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_gym.rl.cluster.learners import RankActors
from medseg_gym.rl.cluster.parts import cluster_parts
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.grpo import GRPO
from medseg_gym.rl.jobs import Job, Settings
from medseg_gym.rl.parts import Parts
from medseg_gym.rl.ranks import learner
from medseg_gym.rl.rollout import play
from medseg_gym.rl.tiny_model import save_tiny_model
from medseg_gym.rl.types import TokenSequence

pytest.importorskip("vllm", reason="vLLM is not installed here; run make test-vllm")
ray = pytest.importorskip("ray")

ENVIRONMENT = {  # a CPU's settings; without them vLLM takes cores and memory that are not there
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": "",
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that inherits a CPU's settings; the tests' folder is left out of its path, as it has modules of vLLM's
    names in it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        ray.init(
            address="local", num_cpus=6, include_dashboard=False, logging_level="ERROR", log_to_driver="-s" in sys.argv
        )
        yield
        ray.shutdown()


class Checked(GRPO):
    """A run that samples some episodes after each update and asks the learner for their log-probabilities too."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.apart: list[float] = []  # the largest difference between engine and learner, after each update
        self.moved: list[float] = []  # between the learner and what the engine had said before the update
        self._before: list[TokenSequence] = []

    async def _publish(self, weights: dict[str, Any], *, full: bool, version: int | None = None) -> None:
        await super()._publish(weights, full=full, version=version)
        if self._before:
            self.moved.append(await self._differ(self._before))
        given = Settings.of(self.config, 1000 + self.state.version, name="check")
        jobs = [Job(at, key, 2) for at, key in enumerate((await self.parts.workers[0].keys("val"))[:2])]
        groups = [g async for g in play(jobs, self.parts.workers, self.parts.engine, self.parts.tokens, given)]
        self._before = [sequence for group in groups for member in group for sequence in member.sequences]
        self.apart.append(await self._differ(self._before))

    async def _differ(self, sequences: list[TokenSequence]) -> float:
        found = await self.parts.learner.logprobs(sequences, temperature=self.config.temperature)
        assert all(len(sequence.images) >= 1 for sequence in sequences)
        return max(
            float(np.abs(theirs - sequence.logprobs)[sequence.loss_mask].max())
            for theirs, sequence in zip(found, sequences, strict=True)
        )


def config(model: Path, reference: Path, out: Path, **given: Any) -> GRPOConfig:
    """Three iterations. No answer of a random model can be read, so all rewards are equal; the gradient is that of the
    KL term to another random model."""
    values: dict[str, Any] = {
        "model": str(model),
        "out": str(out),
        "env": "MedSeg-Phantom-Stub-v0",
        "env_options": {"dataset_options": {"task": "cue"}, "verbs": ("box", "stop"), "horizon": 2},
        "protocol": "tiny",
        "size": 64,
        "slots": 8,
        "iterations": 3,
        "prompts": 2,
        "rollouts": 4,
        "filter": False,
        "kl": 1.0,
        "reference": str(reference),
        "temperature": 0.8,
        "lr": 1e-3,
        "dtype": "float32",
        "device": "cpu",
        "gradient_checkpointing": False,
        "max_new_tokens": 8,
        "max_chat_tokens": 512,
        "save_every": 100,
        "validate_every": 0,
        "gallery_every": 0,
        "cluster": "local",
        "engine": "vllm",
        # a seeded request whose prompt is read in pieces stops vLLM 0.32 on a CPU, whose generators have no offset
        "engine_options": {
            "enforce_eager": True,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32768,
            "max_images": 4,
        },
        **given,
    }
    return GRPOConfig(**values)


@pytest.mark.timeout(900)
def test_vllm_in_an_actor_has_the_learners_weights_after_each_update(tmp_path: Path) -> None:
    """Traps 2, 12 and 16: three iterations that train all, and three that train the vision tower alone, by the same
    engine: within 1e-4 after each update, and further apart than 1e-3 had the update not come."""
    model = save_tiny_model(tmp_path / "model", seed=0, spread=0.2)
    reference = save_tiny_model(tmp_path / "reference", seed=1, spread=0.2)
    whole = config(model, reference, tmp_path / "all", freeze=())
    tower = config(model, reference, tmp_path / "tower", freeze=("*language_model*", "*lm_head*"))

    async def run() -> list[Checked]:
        parts = await cluster_parts(whole)
        try:
            first = await checked(whole, parts)
            ranks = RankActors(tower, model, tower.iterations, 600.0, [{"num_cpus": 1}])
            other = await learner(tower, model, tower.iterations, processes=ranks)
            try:
                return [first, await checked(tower, replace(parts, learner=other))]
            finally:
                await other.close()
        finally:
            await parts.close()

    async def checked(config: GRPOConfig, parts: Parts) -> Checked:
        grpo = Checked(config, parts)
        await grpo.run()
        return grpo

    for grpo in asyncio.run(run()):
        assert grpo.state.version == 3 and len(grpo.apart) == 4 and len(grpo.moved) == 3
        assert max(grpo.apart) < 1e-4, grpo.apart
        assert min(grpo.moved) > 1e-3, grpo.moved
