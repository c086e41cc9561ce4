"""VLLMEngine: answers from a checkpoint run by vLLM in this process and its own, requests batched as they come."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl import sync
from medseg_gym.rl.engines.base import EngineStatus, GenRequest, GenResult, WeightRef
from medseg_gym.rl.engines.checks import check_request
from medseg_gym.rl.scratch import make_scratch, remove_scratch
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Finish

T = TypeVar("T")
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


class Worker:
    """What vLLM's workers are extended by: weights from a file, in place, fused and laid out as at the start."""

    def medseg_gym_load(self, file: str) -> None:
        from safetensors import safe_open
        from vllm.config import set_current_vllm_config

        runner: Any = self.model_runner  # type: ignore[attr-defined]
        with safe_open(file, framework="pt") as opened, set_current_vllm_config(runner.vllm_config):
            runner.reload_weights(weights_iterator=((name, opened.get_tensor(name)) for name in opened.keys()))  # noqa: SIM118


class VLLMEngine:
    """A PolicyEngine on vLLM; `engine` are keywords of its AsyncEngineArgs.

    Prompts go in with their image placeholders collapsed, and what vLLM says it read must be the ids that were asked
    with: BadDataError otherwise. vLLM runs in an event loop of its own, so the engine serves any other. Answers under
    way in a "keep" pause are read anew at resume, so what follows is all of the new weights.
    """

    lockstep = False

    def __init__(
        self,
        folder: str | Path,
        tokens: ChatTokens | None = None,
        *,
        dtype: str = "auto",
        max_model_len: int = 16384,
        max_images: int = 32,
        version: int = 0,
        **engine: Any,
    ) -> None:
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError:
            raise MedSegError(
                "this engine needs vLLM: pip install 'medseg-gym[vllm]', on a machine with a GPU"
            ) from None
        self.tokens = tokens or ChatTokens.from_pretrained(folder)
        self.shapes = _shapes(Path(folder))
        self._scratch = make_scratch()
        self._version = version
        self._mode: Literal["", "wait", "abort", "keep"] = ""
        self._broken = ""
        self._closed = False
        self._running: set[str] = set()
        self._count = 0
        self._counters = dict.fromkeys(
            ("prompt_tokens", "completion_tokens", "cached_tokens", "busy_s", "requests"), 0.0
        )
        settings = AsyncEngineArgs(
            model=str(folder),
            dtype=dtype,
            max_model_len=max_model_len,
            limit_mm_per_prompt={"image": max_images, "video": 0},
            logprobs_mode="processed_logprobs",
            worker_extension_cls=f"{Worker.__module__}.{Worker.__qualname__}",
            **engine,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="medseg-gym-vllm", daemon=True)
        self._thread.start()

        async def start() -> Any:
            self._open = asyncio.Event()
            self._open.set()
            made = AsyncLLM.from_engine_args(settings)
            await made.update_weight_version(str(version))
            return made

        try:
            self.engine: Any = asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        except BaseException:
            self._stop()
            raise

    async def generate(self, request: GenRequest) -> GenResult:
        check_request(request, self.tokens)
        return await self._there(self._generate(request))

    async def generate_together(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        results = await asyncio.gather(*map(self.generate, requests), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if isinstance(result, GenResult)]

    async def pause(self, mode: Literal["wait", "abort", "keep"] = "wait") -> None:
        await self._there(self._pause(mode))

    async def update_weights(self, source: WeightRef) -> None:
        await self._there(self._update(source))

    async def resume(self) -> None:
        await self._there(self._resume())

    async def status(self) -> EngineStatus:
        return EngineStatus(self._version, bool(self._mode), len(self._running), dict(self._counters))

    async def close(self) -> None:
        if self._closed:
            return
        await self._there(self._pause("abort"))
        self._closed = True
        await asyncio.to_thread(self.engine.shutdown)
        self.engine = None  # or it shuts down once more when Python ends, with half its modules gone
        self._loop.call_soon_threadsafe(self._open.set)  # who waits to begin is told
        await asyncio.sleep(0.1)
        self._stop()

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs in vLLM's loop, awaited from the caller's."""
        if self._closed:
            work.close()
            raise MedSegError("the engine was closed")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _generate(self, request: GenRequest) -> GenResult:
        from PIL import Image as Pictures
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = time.perf_counter()
        while self._mode and not self._closed:  # after a close the event stays set, and never suspends
            await self._open.wait()
        if self._closed or self._broken:
            raise MedSegError(self._broken or "the engine was closed")
        self._count += 1
        name = f"{request.id}#{self._count}"
        sampling = SamplingParams(
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            seed=request.seed if request.temperature else None,
            logprobs=0,
            stop_token_ids=list(request.stop_ids),
            ignore_eos=True,  # the request says what ends it
            logit_bias=dict.fromkeys(sorted(request.banned_ids), float("-inf")),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        given: dict[str, Any] = {"prompt_token_ids": self.tokens.collapse(request.ids)}
        if request.images:
            given["multi_modal_data"] = {"image": [Pictures.fromarray(image.pixels) for image in request.images]}
        ids: list[int] = []
        logprobs: list[float] = []
        begun, first, last = time.perf_counter(), 0.0, None
        self._running.add(name)
        try:
            async for output in self.engine.generate(given, sampling, request_id=name):
                last, part = output, output.outputs[0]
                first = first or time.perf_counter()
                ids += part.token_ids
                logprobs += [
                    float(row[token].logprob) for row, token in zip(part.logprobs or (), part.token_ids, strict=True)
                ]
                self._counters["completion_tokens"] += len(part.token_ids)
        finally:
            self._running.discard(name)
            self._counters["busy_s"] += time.perf_counter() - begun
        if last is None:
            raise MedSegError(f"vLLM gave no answer to {request.id}")
        return self._result(request, last, ids, logprobs, (asked, begun, first or begun))

    def _result(
        self, request: GenRequest, last: Any, ids: list[int], logprobs: list[float], times: tuple[float, float, float]
    ) -> GenResult:
        reason = last.outputs[0].finish_reason
        read = tuple(last.prompt_token_ids or ())
        if reason != "abort" and read != request.ids:
            raise BadDataError(f"vLLM read {len(read)} tokens that are not the {len(request.ids)} of {request.id}")
        if reason not in ("stop", "length", "abort"):
            raise MedSegError(f"vLLM ended {request.id} with {reason!r}")
        finish: Finish = reason
        spans = tuple((int(s.version), s.start, s.end) for s in last.outputs[0].weight_versions or ())
        self._counters["requests"] += 1
        self._counters["prompt_tokens"] += len(request.ids)
        self._counters["cached_tokens"] += last.num_cached_tokens or 0
        asked, begun, first = times
        timing = {"queue_s": begun - asked, "prefill_s": first - begun, "decode_s": time.perf_counter() - first}
        return GenResult(tuple(ids), tuple(logprobs), finish, tuple(s for s in spans if s[2] > s[1]), timing)

    async def _pause(self, mode: Literal["wait", "abort", "keep"]) -> None:
        self._mode = mode
        self._open.clear()
        await self.engine.pause_generation(mode=mode, clear_cache=True)
        while mode != "keep" and self._running and self._mode == mode:  # their last words are on the way
            await asyncio.sleep(0.002)

    async def _resume(self) -> None:
        await self.engine.resume_generation()
        self._mode = ""
        self._open.set()

    async def _update(self, source: WeightRef) -> None:
        if not self._mode:
            raise MedSegError("weights are taken while the engine is paused; call pause() first")
        weights = await asyncio.to_thread(sync.load, source)
        sync.check(weights, self.shapes, source.full)
        _check_whole_modules(weights, self.shapes)
        own = not source.folder
        if own:
            source = await asyncio.to_thread(sync.publish, weights, source.version, source.full, self._scratch)
        try:
            await self.engine.collective_rpc("medseg_gym_load", args=(str(sync.file(source)),))
        except BaseException as error:
            self._broken = f"the engine's weights are half those of version {source.version}: {error!r}; start it anew"
            raise MedSegError(self._broken) from error
        finally:
            if own:  # all of a model may lie there, in the machine's memory
                sync.file(source).unlink(missing_ok=True)
        if not await self.engine.reset_prefix_cache(reset_running_requests=True):
            raise MedSegError("vLLM could not forget its prefix cache; what it holds is of the old weights")
        await self.engine.reset_encoder_cache()
        await self.engine.update_weight_version(str(source.version))
        self._version = source.version

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        remove_scratch(self._scratch)


def _check_whole_modules(weights: Mapping[str, Any], known: Mapping[str, Sequence[int]]) -> None:
    """A partial update must name every weight of the modules it touches: vLLM lays a module out anew from what comes,
    query, key and value being one module, and would fill in what did not come with anything."""
    touched = {_module(name) for name in weights}
    for name in known:
        if name not in weights and _module(name) in touched:
            raise BadDataError(f"the weights name a part of {_module(name)}, but not {name}; publish all of it")


def _module(name: str) -> str:
    path = name.rpartition(".")[0]
    parent, _, own = path.rpartition(".")
    return f"{parent}.{FUSED.get(own, own)}"


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                found[name] = tuple(opened.get_slice(name).get_shape())
    if not found:
        raise MedSegError(f"no safetensors in {folder}; give the path of a local checkpoint")
    return found
