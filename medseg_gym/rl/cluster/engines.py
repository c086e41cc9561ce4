"""RemoteEngine: policy engines in actors behind one PolicyEngine; a dead one's successor gets its weights and work."""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from medseg_gym.rl.cluster.host import Remote
from medseg_gym.rl.engines.base import EngineStatus, GenRequest, GenResult, WeightRef
from medseg_gym.rl.worker import LostError

Mode = Literal["wait", "abort", "keep"]


class RemoteEngine:
    """Routes every episode to one engine, whose prefix cache holds its chat.

    A request that an engine died over is sent again, ids and seed as they were, once its successor has the weights.
    """

    def __init__(self, engines: Sequence[EngineRemote], *, lockstep: bool) -> None:
        self.engines, self.lockstep = list(engines), lockstep

    async def generate(self, request: GenRequest) -> GenResult:
        answer: GenResult = await self._route(request).ask_again("generate", request)
        return answer

    async def generate_together(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        """All in one engine, the first request's."""
        if not requests:
            return []
        return list(await self._route(requests[0]).ask_again("generate_together", list(requests)))

    async def pause(self, mode: Mode = "wait") -> None:
        await self._all("paused", mode)

    async def update_weights(self, source: WeightRef) -> None:
        """Sends the weights once to every node; engines that are beginning get them as they begin."""
        import ray

        kept = Kept(source.version, source.full, ray.put(source))
        await asyncio.gather(*(engine.update(kept) for engine in self.engines))

    async def resume(self) -> None:
        await self._all("resumed")

    async def status(self) -> EngineStatus:
        """The oldest version of all, and the sums of what is running and counted."""
        each: list[EngineStatus] = [await engine.ask_again("status") for engine in self.engines]
        counters: Counter[str] = Counter()
        for one in each:
            counters.update(dict(one.counters))
        return EngineStatus(
            version=min(one.version for one in each),
            paused=all(one.paused for one in each),
            running=sum(one.running for one in each),
            counters=dict(counters),
        )

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self.engines))

    def _route(self, request: GenRequest) -> EngineRemote:
        return self.engines[zlib.crc32((request.episode or request.id).encode()) % len(self.engines)]

    async def _all(self, method: str, *arguments: Any) -> None:
        await asyncio.gather(*(getattr(engine, method)(*arguments) for engine in self.engines))


class Kept:
    """Published weights in Ray's store."""

    def __init__(self, version: int, full: bool, reference: Any) -> None:
        self.version, self.full, self.reference = version, full, reference


class EngineRemote(Remote):
    """One engine's handle, and what its successor has to be told: the newest full weights, a newer part, a pause."""

    def __init__(self, name: str, build: str, arguments: Mapping[str, Any], **settings: Any) -> None:
        super().__init__(name, build, arguments, **settings)
        self.weights: list[Kept] = []
        self.mode: Mode | None = None

    async def update(self, kept: Kept) -> None:
        """Keeps the weights for successors and gives them to the present engine."""
        older = [] if kept.full else [one for one in self.weights if one.full]
        self.weights = [*older, kept]
        await self._until_done("update_weights", kept.reference)

    async def paused(self, mode: Mode) -> None:
        self.mode = mode
        await self._until_done("pause", mode)

    async def resumed(self) -> None:
        self.mode = None
        await self._until_done("resume")

    async def _until_done(self, method: str, *arguments: Any) -> None:
        """Asks; an engine that died over it has a successor that was told already."""
        try:
            await self.ask(method, *arguments)
        except LostError:
            await self.alive()

    async def _revive(self) -> None:
        if self.weights:
            await self._ask(self.actor, "call", "pause", "wait")
            for kept in self.weights:
                await self._ask(self.actor, "call", "update_weights", kept.reference)
            await self._ask(self.actor, "call", "resume")
        if self.mode is not None:
            await self._ask(self.actor, "call", "pause", self.mode)
