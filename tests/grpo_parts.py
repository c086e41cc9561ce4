"""Stand-ins for the GRPO tests: a learner of one number, answers from a script, episodes made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_gym.datasets.phantom import Phantom, cue_boxes
from medseg_gym.frames import Grid
from medseg_gym.policies.protocols import Tiny
from medseg_gym.rl import sync
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.engines.base import GenRequest
from medseg_gym.rl.engines.fake import FakeEngine
from medseg_gym.rl.grpo import Parts
from medseg_gym.rl.local_worker import LocalWorker
from medseg_gym.rl.tiny_model import image_processor, tiny_tokenizer
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Rollout
from medseg_gym.types import Episode, Stop, Turn

CUE = {"dataset_options": {"task": "cue"}, "verbs": ("box", "stop"), "horizon": 2}


class OneNumber:
    """A learner whose only trained weight goes up by the sum of weight times advantage squared, so that it moves."""

    def __init__(self, script: Callable[[int], Mapping[str, float]] = lambda step: {}) -> None:
        self.weight, self.frozen, self.steps, self.script = 0.0, 3.0, 0, script
        self.plans: list[Any] = []
        self.order: list[str] = []  # of what was asked

    async def step(self, plan: Sequence[Any], objective: Any) -> dict[str, float]:
        self.order.append("step")
        self.plans.append(plan)
        self.steps += 1
        said = {"loss": 0.0, "mismatch_kl": 0.0, "clip_share": 0.0, **self.script(self.steps)}
        if not said.get("skipped"):
            rows = [row for rank in plan for micro in rank for row in micro]
            self.weight += sum(float((row.weights * row.advantages**2).sum()) for row in rows)
        return {**said, "weight": self.weight}

    async def reference_logprobs(self, sequences: Sequence[Any], *, temperature: float) -> list[Any]:
        return [sequence.logprobs for sequence in sequences]

    async def weights(self, full: bool) -> dict[str, Any]:
        import torch

        self.order.append(f"weights {'full' if full else 'part'}")
        changing = {"w": torch.tensor([self.weight], dtype=torch.float64)}
        return {**changing, "frozen": torch.tensor([self.frozen])} if full else changing

    async def save(self, folder: Path) -> None:
        self.order.append("save")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "learner.json").write_text(json.dumps([self.weight, self.steps]))

    async def load(self, folder: Path) -> None:
        self.weight, self.steps = json.loads((folder / "learner.json").read_text())

    async def export(self, folder: Path) -> None:
        self.order.append("export")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").write_text(json.dumps(self.weight))

    async def close(self) -> None: ...


def chat_tokens() -> ChatTokens:
    return ChatTokens(tiny_tokenizer(), image_processor())


def boxes(request: GenRequest) -> str:
    """One of the four blocks by the request's seed at the first turn, then a stop: groups with and without spread."""
    if len(request.images) > 1:
        return "S"
    return Tiny().format(cue_boxes(64)[request.seed % 4], Grid(64, 64))


def stand_ins(script: Any = boxes, learner: OneNumber | None = None, tool: str = "Stub", slots: int = 8) -> Parts:
    tokens = chat_tokens()
    return Parts(
        workers=[LocalWorker(f"MedSeg-Phantom-{tool}-v0", slots, "tiny", size=64, options=CUE)],
        engine=FakeEngine(script, tokens),
        learner=learner or OneNumber(),
        tokens=tokens,
        publish=sync.publish,
        dataset=Phantom(task="cue"),
    )


def settings(out: Path, **given: Any) -> GRPOConfig:
    """Four iterations of 3 groups of 4, nothing on the side."""
    values = {
        "model": "none",
        "env": "MedSeg-Phantom-Stub-v0",
        "out": str(out),
        "iterations": 4,
        "prompts": 3,
        "rollouts": 4,
        "env_options": CUE,
        "protocol": "tiny",
        "size": 64,
        "dtype": "float32",
        "device": "cpu",
        "max_new_tokens": 8,
        "max_chat_tokens": 512,
        "save_every": 2,
        "validate_every": 0,
        "gallery_every": 0,
        **given,
    }
    return GRPOConfig(**values)


def rollout(group: int, member: int, reward: float, *, iou: float = 0.0, dropped: str = "", key: str = "k") -> Rollout:
    """An episode of one turn with this reward, without chats."""
    turn = Turn(Stop(), reward, {"quality": reward}, False, {"size": [1, 1], "counts": "1"})
    episode = Episode(
        env="",
        tool="",
        policy="",
        case=group,
        key=key,
        structure="",
        instruction="",
        patient="",
        seed=0,
        horizon=1,
        reward="shaped",
        turns=(turn,),
        iou=(0.0, iou),
        dice=(0.0, iou),
        ended="stopped",
    )
    return Rollout(group, member, episode, (), dropped)
