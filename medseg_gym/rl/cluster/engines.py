"""RemoteEngine: policy engines in actors behind one PolicyEngine; a dead one's work goes to others or its successor."""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from medseg_gym.errors import MedSegError
from medseg_gym.rl.cluster.host import TRIES, Remote
from medseg_gym.rl.engines.base import EngineStatus, GenRequest, GenResult, WeightRef
from medseg_gym.rl.worker import LostError, UnplacedError

Mode = Literal["wait", "abort", "keep"]


class RemoteEngine:
    """Routes every episode to one engine, whose prefix cache holds its chat, or to the next while that one is away.

    A request that an engine died over is sent again, ids and seed as they were: to another engine, which has the same
    weights, else to the first that comes back and has been given them. Engines that are away are waited for only while
    none is there; they are told of weights and pauses as they begin, and tried again with every change of weights.
    """

    def __init__(self, engines: Sequence[EngineRemote], *, lockstep: bool) -> None:
        self.engines, self.lockstep = list(engines), lockstep

    async def generate(self, request: GenRequest) -> GenResult:
        answer: GenResult = await self._ask(request, "generate", request)
        return answer

    async def generate_together(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        """All in one engine, the first request's."""
        if not requests:
            return []
        return list(await self._ask(requests[0], "generate_together", list(requests)))

    async def pause(self, mode: Mode = "wait") -> None:
        await asyncio.gather(*(engine.paused(mode) for engine in self.engines))

    async def update_weights(self, source: WeightRef) -> None:
        """Sends the weights once to every node; engines that are beginning get them as they begin."""
        import ray
        from ray import exceptions as broken

        try:
            kept = Kept(source.version, source.full, await asyncio.to_thread(ray.put, source))
        except (broken.ObjectStoreFullError, broken.OutOfDiskError) as error:
            raise MedSegError(
                f"the weights do not fit in Ray's store ({' '.join(str(error).split())[:200]}); give weights_folder, a "
                "folder that the engines see, or start Ray with a larger --object-store-memory"
            ) from None
        await asyncio.gather(*(engine.update(kept) for engine in self.engines))

    async def resume(self) -> None:
        await asyncio.gather(*(engine.resumed() for engine in self.engines))

    async def status(self) -> EngineStatus:
        """Of the engines that are there: the oldest version, and the sums of what is running and counted."""
        while True:
            await self._one(self.engines)
            asked = [engine for engine in self.engines if engine.there]
            found = await asyncio.gather(
                *(engine.ask("status", life=engine.life) for engine in asked), return_exceptions=True
            )
            each: list[EngineStatus] = []
            for one in found:
                if isinstance(one, BaseException) and not isinstance(one, LostError):
                    raise one
                if isinstance(one, EngineStatus):
                    each.append(one)
            if each:
                break
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

    async def _ask(self, request: GenRequest, method: str, asked: Any) -> Any:
        """The answer of the request's own engine, or of the next that is there; MedSegError where many die over it."""
        home = zlib.crc32((request.episode or request.id).encode()) % len(self.engines)
        for attempt in range(TRIES):
            engine = await self._one(self.engines[home:] + self.engines[:home])
            try:
                return await engine.ask(method, asked, life=engine.life)
            except LostError as error:
                engine.begin()  # while others take its work
                if attempt == TRIES - 1:
                    raise MedSegError(f"{method}: {TRIES} actors in a row were lost over it; {error}") from None
        raise AssertionError("the last try raises")

    async def _one(self, engines: Sequence[EngineRemote]) -> EngineRemote:
        """The first of the engines that is there; while none is, the first that comes.

        An engine that cannot be made raises why. UnplacedError where none found a place within its patience.
        """
        while True:
            for engine in engines:
                engine.check()
            for engine in engines:
                if engine.there:
                    return engine
            coming = [engine.begin() for engine in engines if engine.failure is None] or [e.begin() for e in engines]
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            if all(engine.failure is not None for engine in engines):
                raise engines[0].failure or AssertionError("it was asked for")


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
        await self._tell("update_weights", kept.reference)

    async def paused(self, mode: Mode) -> None:
        self.mode = mode
        await self._tell("pause", mode)

    async def resumed(self) -> None:
        self.mode = None
        await self._tell("resume")

    async def _tell(self, method: str, *arguments: Any) -> None:
        """Tells the engine that is there; one that is beginning, or begins after this one has died, is told then."""
        self.check()
        with suppress(LostError):
            if self.there:
                await self.ask(method, *arguments, life=self.life)
        self.begin()

    def check(self) -> None:
        """Raises why the engine cannot be made anywhere, if that is known."""
        if self.failure is not None and not isinstance(self.failure, UnplacedError):
            raise self.failure

    async def _revive(self) -> None:
        """Tells a new engine all; again where it changed meanwhile, as whoever changed it did not tell this one."""
        while True:
            weights, mode = self.weights, self.mode
            try:
                await self._ask(self.actor, "call", "pause", "wait")
                for kept in weights:
                    await self._ask(self.actor, "call", "update_weights", kept.reference)
                await self._ask(self.actor, "call", *(("resume",) if mode is None else ("pause", mode)))
            except LostError:
                raise
            except MedSegError:
                if weights is self.weights:
                    raise
                continue  # their file was replaced by that of newer ones
            if weights is self.weights and mode == self.mode:
                return
