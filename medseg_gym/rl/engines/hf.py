"""HFEngine: answers from a checkpoint run by transformers in a thread of its own, a batch at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from medseg_gym.errors import MedSegError, unknown
from medseg_gym.rl import sync
from medseg_gym.rl.device import device_named
from medseg_gym.rl.engines.base import EngineStatus, GenRequest, GenResult, WeightRef
from medseg_gym.rl.engines.checks import check_request
from medseg_gym.rl.engines.decode import Decoder
from medseg_gym.rl.tokens import ChatTokens

DTYPES = ("float32", "bfloat16", "float16")
Job = tuple[Sequence[GenRequest], "Future[list[GenResult]]", float]  # with the time it was asked for


class HFEngine:
    """A PolicyEngine on transformers: any device, every answer bitwise the same for the same requests asked together.

    `model` is a checkpoint folder, or a model that is loaded, with its `tokens`. Requests that are asked for together
    are one batch of at most `max_batch` rows, others are answered one after the other.
    """

    lockstep = True

    def __init__(
        self,
        model: str | Path | Any,
        tokens: ChatTokens | None = None,
        *,
        device: str = "",
        dtype: str = "float32",
        max_batch: int = 64,
        version: int = 0,
    ) -> None:
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        if max_batch < 1:
            raise MedSegError(f"max_batch={max_batch}; wanted 1 or more")
        import torch

        place = device_named(device)
        if isinstance(model, str | Path):
            from transformers import AutoModelForImageTextToText

            tokens = tokens or ChatTokens.from_pretrained(model)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                model, local_files_only=True, use_safetensors=True, dtype=getattr(torch, dtype)
            )
        else:
            loaded = model
        if tokens is None:
            raise MedSegError("a model that is loaded comes with its ChatTokens; give tokens=")
        self.model: Any = loaded.to(place).eval().requires_grad_(False)
        self.tokens, self.max_batch = tokens, max_batch
        self._decoder = Decoder(self.model, tokens)
        self._version = version
        self._mode: Literal["", "wait", "abort", "keep"] = ""
        self._closed = self._busy = self._frozen = self._abort = False
        self._counters = dict.fromkeys(("prompt_tokens", "busy_s", "requests"), 0.0)
        self._jobs: deque[Job] = deque()
        self._state = threading.Condition()  # guards all of the above
        self._thread = threading.Thread(target=self._run, name="medseg-gym-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenRequest) -> GenResult:
        return (await self.generate_together([request]))[0]

    async def generate_together(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        for request in requests:
            check_request(request, self.tokens)
        if not requests:
            return []
        answer: Future[list[GenResult]] = Future()
        with self._state:
            if self._closed:
                raise MedSegError("the engine was closed")
            self._jobs.append((requests, answer, time.perf_counter()))
            self._state.notify_all()
        return await asyncio.wrap_future(answer)

    async def pause(self, mode: Literal["wait", "abort", "keep"] = "wait") -> None:
        def settled() -> bool:
            return self._mode != mode or not self._busy or (mode == "keep" and self._frozen)

        with self._state:
            self._mode = mode
            self._abort = self._abort or (mode == "abort" and self._busy)
            self._state.notify_all()
        await asyncio.to_thread(self._until, settled)

    async def update_weights(self, source: WeightRef) -> None:
        await asyncio.to_thread(self._update, source)

    async def resume(self) -> None:
        with self._state:
            self._mode = ""
            self._state.notify_all()

    async def status(self) -> EngineStatus:
        with self._state:
            counters = {**self._counters, **self._decoder.counters}
            return EngineStatus(self._version, bool(self._mode), int(self._busy) + len(self._jobs), counters)

    async def close(self) -> None:
        with self._state:
            self._closed = self._abort = True
            self._state.notify_all()
        await asyncio.to_thread(self._thread.join)

    def _update(self, source: WeightRef) -> None:
        import torch

        weights = sync.load(source)
        mine = self.model.state_dict()
        sync.check(weights, {name: tensor.shape for name, tensor in mine.items()}, source.full, optional=self._tied())
        with self._state:
            if not self._mode or (self._busy and not self._frozen):
                raise MedSegError("weights are taken while the engine is paused; call pause() first")
            with torch.no_grad():
                for name, tensor in weights.items():
                    mine[name].copy_(tensor)
            self._version = source.version

    def _tied(self) -> list[str]:
        """The names that a checkpoint leaves out, as their tensor is another's."""
        return list(getattr(self.model, "all_tied_weights_keys", {}))

    def _until(self, holds: Callable[[], bool]) -> None:
        with self._state:
            self._state.wait_for(holds)

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or (self._jobs and not self._mode))
                if self._closed:
                    for _, answer, _ in self._jobs:
                        if answer.set_running_or_notify_cancel():
                            answer.set_exception(MedSegError("the engine was closed"))
                    self._jobs.clear()
                    return
                requests, answer, asked = self._jobs.popleft()
                if not answer.set_running_or_notify_cancel():
                    continue
                self._busy, self._abort = True, False
            begun = time.perf_counter()
            try:
                results = self._batches(requests, begun - asked)
            except BaseException as error:
                self._idle(begun)
                answer.set_exception(error)
            else:
                self._idle(begun, requests)
                answer.set_result(results)

    def _idle(self, begun: float, answered: Sequence[GenRequest] = ()) -> None:
        with self._state:
            self._busy = False
            self._counters["busy_s"] += time.perf_counter() - begun
            self._counters["requests"] += len(answered)
            self._counters["prompt_tokens"] += sum(len(request.ids) for request in answered)
            self._state.notify_all()

    def _batches(self, requests: Sequence[GenRequest], queued: float) -> list[GenResult]:
        done: list[GenResult] = []
        for k in range(0, len(requests), self.max_batch):
            done += self._decoder.decode(requests[k : k + self.max_batch], self._gate, queued)
        return done

    def _gate(self) -> int | None:
        """Called before every token: stays while the engine is kept paused. The weights' version, or None to abort."""
        with self._state:
            if self._mode == "keep":
                self._frozen = True
                self._state.notify_all()
                self._state.wait_for(lambda: self._abort or self._mode != "keep")
                self._frozen = False
            return None if self._abort else self._version
