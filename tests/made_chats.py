"""Chats of a tiny model with random pictures, and learners of it, for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.learner import Learner
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import ImageRef, Row, Segment, TokenSequence


def chat(tokens: ChatTokens, turns: int, seed: int, *, side: int = 64, answers: Sequence[str] = ()) -> TokenSequence:
    """A chat of so many turns, each with a picture; every answer but the last has an injected end of turn."""
    rng = np.random.default_rng(seed)
    segments: list[Segment] = []
    for turn in range(turns):
        image = ImageRef.of(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        content = [{"type": "image", "image": image.pixels}, {"type": "text", "text": f"go {turn}"}]
        prompt = tokens.prompt([{"role": "user", "content": content}])
        said = tokens.text(answers[turn] if answers else f"box {rng.integers(1000)}")
        last = turn == turns - 1
        segments.append(Segment("observation" if turn else "prompt", prompt.ids, turn, (image,)))
        logprobs = tuple(-rng.random(len(said) + last))
        segments.append(Segment("action", (*said, tokens.end) if last else said, turn, logprobs=logprobs))
        if not last:
            segments.append(Segment("injected", (tokens.end, *tokens.text("\n")), turn))
    return TokenSequence(tuple(segments))


def grpo_rows(chats: Sequence[TokenSequence], seed: int = 0) -> list[Row]:
    """A row a chat with random advantages; the weights are 1 over all trained tokens."""
    rng = np.random.default_rng(seed)
    whole = sum(int(c.loss_mask.sum()) for c in chats)
    return [
        Row(
            c,
            c.loss_mask.astype(np.float32) / np.float32(whole),
            np.where(c.loss_mask, np.float32(rng.normal()), np.float32(0)),
        )
        for c in chats
    ]


def config(folder: Path, **settings: Any) -> GRPOConfig:
    """Float32 on the CPU, without the importance correction: a made chat's log-probabilities are no engine's."""
    given = {"dtype": "float32", "device": "cpu", "lr": 1e-2, "weight_decay": 0.0, "gradient_checkpointing": False}
    return replace(GRPOConfig(model=str(folder), out="", env=""), **{**given, **settings})


def learner(folder: Path, steps: int = 10, **settings: Any) -> Learner:
    return Learner(config(folder, **settings), folder, total_steps=steps)
