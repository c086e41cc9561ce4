"""What the tests of rollouts share: workers over drawn cases, scripted engines, and both with delays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import Blobs

from medseg_gym.episodes import to_json
from medseg_gym.rl.engines.base import GenRequest, GenResult
from medseg_gym.rl.engines.fake import FakeEngine
from medseg_gym.rl.local_worker import LocalWorker
from medseg_gym.rl.rollout import Job, Settings, play
from medseg_gym.rl.tiny_model import save_tiny_model
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Rollout

KEYS = [f"Blobs/train-{i}/{structure}" for i in range(3) for structure in ("bar", "disc")]
JOBS = [Job(i, key, 3, seed=i) for i, key in enumerate(KEYS)]
SAYS = ["BAAzz", "BKKqq", "BaBcD", "what", "S", "BKKKK"]  # the tiny protocol's words, one of them unreadable


def make_tokens(folder: Path) -> ChatTokens:
    return ChatTokens.from_pretrained(save_tiny_model(folder / "tiny"))


def worker(slots: int = 4, protocol: str = "tiny", tool: Any = "Stub", **options: Any) -> LocalWorker:
    return LocalWorker("MedSeg-v0", slots, protocol, size=64, options={"dataset": Blobs(), "tool": tool, **options})


def collect(
    jobs: Sequence[Job], workers: Sequence[Any], engine: Any, tokens: ChatTokens, **settings: Any
) -> list[list[Rollout]]:
    """The groups by number."""

    async def run() -> list[list[Rollout]]:
        given = Settings(**{"seed": 5, "max_new_tokens": 64, **settings})
        return sorted([g async for g in play(jobs, workers, engine, tokens, given)], key=lambda g: g[0].group)

    return asyncio.run(run())


def content(groups: Sequence[Sequence[Rollout]]) -> list[Any]:
    """All that rollouts hold but their timing, to be compared."""
    return [
        (r.group, r.member, r.dropped, to_json(r.episode), [[_segment(s) for s in q.segments] for q in r.sequences])
        for group in groups
        for r in group
    ]


def _segment(s: Any) -> tuple[Any, ...]:
    return s.kind, s.ids, s.turn, tuple(image.sha for image in s.images), s.logprobs, s.versions


class Late:
    """A worker or an engine whose calls take random times; `engine.batches` are the makes-up of lockstep calls."""

    def __init__(self, inner: Any, seed: int, lockstep: bool = False, most: float = 0.004) -> None:
        self.inner, self.rng, self.lockstep, self.most = inner, np.random.default_rng(seed), lockstep, most
        self.batches: list[list[tuple[str, int, int]]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)
        if not asyncio.iscoroutinefunction(method):
            return method

        async def late(*args: Any, **keywords: Any) -> Any:
            await asyncio.sleep(self.rng.random() * self.most)
            result = await method(*args, **keywords)
            await asyncio.sleep(self.rng.random() * self.most)
            return result

        return late

    async def generate_together(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        self.batches.append([(request.episode, request.seed, len(request.ids)) for request in requests])
        await asyncio.sleep(self.rng.random() * self.most)
        return await self.inner.generate_together(requests)


def engine(tokens: ChatTokens, script: Any = SAYS, **options: Any) -> FakeEngine:
    return FakeEngine(script, tokens, **options)


def turn_of(request: GenRequest) -> int:
    return int(request.id.split("/")[4])


def member_of(request: GenRequest) -> tuple[int, int]:
    group, member = request.id.split("/")[2:4]
    return int(group), int(member)


def by_turn(*answers: Any) -> Callable[[GenRequest], Any]:
    """A script: the answer of each turn."""
    return lambda request: answers[turn_of(request)]


def left() -> list[Any]:
    """The tasks of a `play` that still run."""
    return [task for task in asyncio.all_tasks() if "_Playing" in repr(task.get_coro())]
