"""FakeEngine: answers from a script, at a pace and with the failures a test or a benchmark asks for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl import sync
from medseg_gym.rl.engines.base import EngineStatus, GenRequest, GenResult, WeightRef
from medseg_gym.rl.engines.checks import check_request, spans
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Finish

Answer = str | Sequence[int]
Script = Callable[[GenRequest], Answer]


class FakeEngine:
    """A PolicyEngine without a model.

    `script` maps a request to its answer, or is a list of answers of which the request's seed picks one. A text is
    tokenized and ends with the request's stop id; ids are taken as they are, up to the first stop id. Every token's
    log-probability is `logprob`. With `seconds_per_token` the answer comes token by token; at most `concurrency`
    answers (0: any number) are under way at once. `fail` is told the request and how many came before it, and gives
    the error that is raised in its place. `shapes` are the weights that an update may bring; None takes any.
    """

    lockstep = False

    def __init__(
        self,
        script: Script | Sequence[Answer],
        tokens: ChatTokens,
        *,
        seconds_per_request: float = 0.0,
        seconds_per_token: float = 0.0,
        concurrency: int = 0,
        logprob: float = -1.0,
        fail: Callable[[GenRequest, int], Exception | None] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        version: int = 0,
    ) -> None:
        answers = script
        self.script: Script = answers if callable(answers) else lambda request: answers[request.seed % len(answers)]
        self.tokens = tokens
        self.seconds_per_request, self.seconds_per_token = seconds_per_request, seconds_per_token
        self.concurrency, self.logprob, self.fail, self.shapes = concurrency, logprob, fail, shapes
        self.updates: list[WeightRef] = []  # what was taken, without the tensors
        self._version = version
        self._mode: Literal["", "wait", "abort", "keep"] = ""
        self._closed = False
        self._running = self._frozen = self._requests = 0
        self._epoch = 0  # counts the aborts; an answer begun in an earlier one is aborted
        self._counters = dict.fromkeys(("prompt_tokens", "completion_tokens", "busy_s", "requests"), 0.0)
        self._waiting: list[asyncio.Future[None]] = []  # of the loop that waits, so that several loops may come in turn

    async def generate(self, request: GenRequest) -> GenResult:
        self._check_open()
        check_request(request, self.tokens)
        number, self._requests = self._requests, self._requests + 1
        asked = time.perf_counter()
        await self._until(self._may_begin)
        self._check_open()
        self._running += 1
        begun = time.perf_counter()
        try:
            if self.fail is not None and (error := self.fail(request, number)) is not None:
                raise error
            result = await self._answer(request, begun - asked)
        finally:
            self._running -= 1
            self._counters["busy_s"] += time.perf_counter() - begun
            self._changed()
        self._counters["requests"] += 1
        self._counters["prompt_tokens"] += len(request.ids)
        return result

    async def generate_together(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        results = await asyncio.gather(*map(self.generate, requests), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if isinstance(result, GenResult)]

    async def pause(self, mode: Literal["wait", "abort", "keep"] = "wait") -> None:
        self._mode = mode
        if mode == "abort":
            self._epoch += 1
        self._changed()
        await self._until(lambda: self._mode != mode or self._running == (self._frozen if mode == "keep" else 0))

    async def update_weights(self, source: WeightRef) -> None:
        if not self._mode:
            raise MedSegError("weights are taken while the engine is paused; call pause() first")
        weights = sync.load(source)
        if self.shapes is not None:
            sync.check(weights, self.shapes, source.full)
        self.updates.append(WeightRef(source.version, source.full, folder=source.folder))
        self._version = source.version

    async def resume(self) -> None:
        self._mode = ""
        self._changed()

    async def status(self) -> EngineStatus:
        return EngineStatus(self._version, bool(self._mode), self._running, dict(self._counters))

    async def close(self) -> None:
        self._closed = True
        self._epoch += 1
        self._changed()

    async def _answer(self, request: GenRequest, queued: float) -> GenResult:
        epoch = self._epoch
        begun = time.perf_counter()
        wanted, finish = self._scripted(request)
        await asyncio.sleep(self.seconds_per_request)  # of 0 s too, so that others have their turn
        prefilled = time.perf_counter()
        versions: list[int] = []
        for _ in wanted:
            if self._mode == "keep":
                await self._freeze(epoch)
            if self._epoch != epoch:
                finish = "abort"
                break
            version = self._version
            if self.seconds_per_token:
                await asyncio.sleep(self.seconds_per_token)
            versions.append(version)
            self._counters["completion_tokens"] += 1
        done = time.perf_counter()
        return GenResult(
            ids=wanted[: len(versions)],
            logprobs=(self.logprob,) * len(versions),
            finish=finish,
            versions=spans(versions),
            timing={"queue_s": queued, "prefill_s": prefilled - begun, "decode_s": done - prefilled},
        )

    def _scripted(self, request: GenRequest) -> tuple[tuple[int, ...], Finish]:
        answer = self.script(request)
        ids = (*self.tokens.text(answer), *request.stop_ids[:1]) if isinstance(answer, str) else tuple(answer)
        ends = [i for i, token in enumerate(ids) if token in request.stop_ids]
        whole = ids[: ends[0] + 1] if ends else ids
        ids = whole[: request.max_tokens]
        if banned := sorted(request.banned_ids & set(ids)):
            raise BadDataError(f"the script's answer to {request.id} holds banned ids {banned}")
        return ids, "stop" if ends and len(ids) == len(whole) else "length"

    async def _freeze(self, epoch: int) -> None:
        self._frozen += 1
        self._changed()
        try:
            await self._until(lambda: self._mode != "keep" or self._epoch != epoch)
        finally:
            self._frozen -= 1

    def _may_begin(self) -> bool:
        return self._closed or (not self._mode and (not self.concurrency or self._running < self.concurrency))

    def _check_open(self) -> None:
        if self._closed:
            raise MedSegError("the engine was closed")

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            change = asyncio.get_running_loop().create_future()
            self._waiting.append(change)
            await change

    def _changed(self) -> None:
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            if not change.done():
                change.set_result(None)
