"""Chat models that run in this process, from a local checkpoint folder: transformers anywhere, vLLM where it is."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_gym.errors import BadDataError, MedSegError, unknown
from medseg_gym.policies import chat
from medseg_gym.policies.vlm import ChatModel, Completion
from medseg_gym.types import Decision

if TYPE_CHECKING:
    from medseg_gym.rl.tokens import TokenPrompt

DTYPES = ("float32", "bfloat16", "float16")


class TransformersModel:
    """A Qwen-VL checkpoint run by transformers, one chat at a time in a thread of its own.

    Sampling adds Gumbel noise of the request's own seed to the logits, so a completion hangs on its chat and seed
    alone. `device` is the first GPU, if there is one. Special tokens but the end of turn are never produced.
    Log-probabilities are of the distribution sampled from.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        import torch
        from transformers import AutoModelForImageTextToText, GenerationConfig

        from medseg_gym.rl.tokens import ChatTokens

        self.tokens = ChatTokens.from_pretrained(folder)
        self.name = checkpoint_name(folder)
        self.temperature, self.max_tokens = temperature, max_tokens
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=getattr(torch, dtype)
        )
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        # In place of the checkpoint's own, which may truncate or penalise. The sampler's noise makes the largest score
        # a sample, so that generate itself is always greedy.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.tokens.end, pad_token_id=self.tokens.tokenizer.pad_token_id
        )
        self._work: queue.Queue[tuple[Future[Completion], Callable[[], Completion]] | None] = queue.Queue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="medseg-gym-transformers", daemon=True)
        self._thread.start()

    def complete(self, messages: Sequence[chat.Message], said: Sequence[Decision], seed: int) -> Future[Completion]:
        if self._closed:
            raise MedSegError(f"the model {self.name} was closed")
        answer: Future[Completion] = Future()
        prompt = self.tokens.conversation(messages, [decision.token_ids for decision in said])
        self._work.put((answer, lambda: self.generate(prompt, seed)))
        return answer

    def generate(self, prompt: TokenPrompt, seed: int) -> Completion:
        """Samples one completion, the end of turn included, for a rendered prompt."""
        import torch
        from transformers import LogitsProcessorList

        begun = time.perf_counter()
        inputs = {name: tensor.to(self.device) for name, tensor in self.tokens.inputs([prompt]).items()}
        sampler = _Sampler(self.temperature, seed, sorted(self.tokens.banned_ids))
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=self.max_tokens,
                logits_processor=LogitsProcessorList([sampler]),
            )[0, len(prompt.ids) :].tolist()
        logprobs = [*sampler.logprobs, sampler.of(ids[-1])] if ids else []
        return Completion(
            text=self.tokens.decode(ids),
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            finish="stop" if ids and ids[-1] == self.tokens.end else "length",
            prompt_ids=prompt.ids,
            costs={
                "server_s": time.perf_counter() - begun,
                "prompt_tokens": len(prompt.ids),
                "completion_tokens": len(ids),
            },
        )

    def close(self) -> None:
        """Cancels the answers that were not begun; the thread ends with the one under way."""
        self._closed = True
        with suppress(queue.Empty):
            while job := self._work.get_nowait():
                job[0].cancel()
        self._work.put(None)

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            answer, generate = job
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(generate())
            except BaseException as error:
                answer.set_exception(error)


class _Sampler:
    """A logits processor for a batch of one: bans ids, keeps the log-probabilities, adds Gumbel noise from a seed."""

    def __init__(self, temperature: float, seed: int, banned: Sequence[int]) -> None:
        from medseg_gym.rl.sampling import generator

        self.temperature, self.banned = temperature, list(banned)
        self.random = generator(seed)
        self.logprobs: list[float] = []  # of all tokens but the newest, whose choice is not known here yet
        self._row: Any = None

    def of(self, token: int) -> float:
        """The log-probability that a token had in the newest step."""
        return float(self._row[token])

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        from medseg_gym.rl.sampling import gumbel

        if self._row is not None:  # a row of a whole vocabulary is not kept for every token
            self.logprobs.append(self.of(int(input_ids[0, -1])))
        scores = scores.float().clone()
        scores[:, self.banned] = -torch.inf
        if self.temperature:
            scores = scores / self.temperature
        self._row = scores[0].log_softmax(-1)
        if not self.temperature:
            return scores
        return scores + gumbel(self.random, scores.shape[-1]).to(scores)


class VLLMModel:
    """A Qwen-VL checkpoint run by vLLM in this process: requests are batched as they come.

    Chats go in as token ids, and what vLLM says it read must be these very ids: BadDataError otherwise.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        dtype: str = "auto",
        max_model_len: int = 16384,
        max_images: int = 32,
        **engine: Any,
    ) -> None:
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError:
            raise MedSegError(
                "this engine needs vLLM: pip install 'medseg-gym[vllm]', on a machine with a GPU"
            ) from None
        from medseg_gym.rl.tokens import ChatTokens

        self.tokens = ChatTokens.from_pretrained(folder)
        self.name = checkpoint_name(folder)
        self.temperature, self.max_tokens = temperature, max_tokens
        self._count = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="medseg-gym-vllm", daemon=True)
        self._thread.start()
        settings = AsyncEngineArgs(
            model=str(folder),
            dtype=dtype,
            max_model_len=max_model_len,
            limit_mm_per_prompt={"image": max_images, "video": 0},
            logprobs_mode="processed_logprobs",
            **engine,
        )

        async def start() -> Any:
            return AsyncLLM.from_engine_args(settings)

        self.engine = asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    def complete(self, messages: Sequence[chat.Message], said: Sequence[Decision], seed: int) -> Future[Completion]:
        if not self._thread.is_alive():
            raise MedSegError(f"the model {self.name} was closed")
        prompt = self.tokens.conversation(messages, [decision.token_ids for decision in said])
        self._count += 1
        return asyncio.run_coroutine_threadsafe(self._generate(prompt, seed, f"chat-{self._count}"), self._loop)

    async def _generate(self, prompt: TokenPrompt, seed: int, request: str) -> Completion:
        from PIL import Image as Pictures
        from vllm import SamplingParams

        begun = time.perf_counter()
        self.tokens.check(prompt)
        sampling = SamplingParams(
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=seed if self.temperature else None,
            logprobs=0,
            stop_token_ids=[self.tokens.end],
            ignore_eos=True,  # the checkpoint's own list of ends differs between engines
            logit_bias=dict.fromkeys(sorted(self.tokens.banned_ids), -100.0),
            skip_special_tokens=True,
        )
        given: dict[str, Any] = {"prompt_token_ids": self.tokens.collapse(prompt.ids)}
        if prompt.images:
            given["multi_modal_data"] = {"image": [Pictures.fromarray(image) for image in prompt.images]}
        final: Any = None
        async for output in self.engine.generate(given, sampling, request_id=request):
            final = output
        read = tuple(final.prompt_token_ids)
        if read != prompt.ids:
            raise BadDataError(f"vLLM read {len(read)} prompt tokens that are not the {len(prompt.ids)} rendered ones")
        chosen = final.outputs[0]
        ids = tuple(chosen.token_ids)
        return Completion(
            text=self.tokens.decode(ids),
            token_ids=ids,
            logprobs=tuple(float(row[token].logprob) for row, token in zip(chosen.logprobs, ids, strict=True)),
            finish="length" if chosen.finish_reason == "length" else "stop",
            prompt_ids=prompt.ids,
            costs={
                "server_s": time.perf_counter() - begun,
                "prompt_tokens": len(prompt.ids),
                "completion_tokens": len(ids),
            },
        )

    def close(self) -> None:
        self.engine.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)


class Shared:
    """One loaded model for several policies, such as those of several envs; the last to close it closes it."""

    def __init__(self, key: str, model: ChatModel) -> None:
        self.model: ChatModel = model
        self.name = model.name
        self._key, self._open = key, True

    def complete(self, messages: Sequence[chat.Message], said: Sequence[Decision], seed: int) -> Future[Completion]:
        if not self._open:
            raise MedSegError(f"the model {self.name} was closed")
        return self.model.complete(messages, said, seed)

    def close(self) -> None:
        with _lock:
            if not self._open:
                return
            self._open = False
            _users[self._key] -= 1
            if _users[self._key]:
                return
            del _users[self._key], _models[self._key]
        self.model.close()


ENGINES: dict[str, Callable[..., ChatModel]] = {"transformers": TransformersModel, "vllm": VLLMModel}
_lock = threading.Lock()
_models: dict[str, ChatModel] = {}
_users: dict[str, int] = {}


def load(engine: str, folder: str | Path, **options: Any) -> Shared:
    """The model of a checkpoint folder on an engine, "transformers" or "vllm", with its own keywords.

    Equal calls share one model while any of them has it open.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    key = repr((engine, str(Path(folder).resolve()), sorted(options.items())))
    with _lock:
        if key not in _models:
            _models[key] = ENGINES[engine](folder, **options)
        _users[key] = _users.get(key, 0) + 1
        return Shared(key, _models[key])


def checkpoint_name(folder: str | Path) -> str:
    """The folder's name and 8 hex digits of what is in it, so that two checkpoints of one name are not taken for one.

    The digits are of the settings, and of the weights' sizes with 64 samples of 64 KiB from each file: whole weights of
    tens of gigabytes would take longer to hash than to use.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as handle:
            for k in range(64):
                handle.seek(k * max(0, size - _SAMPLE) // 63)
                digest.update(handle.read(_SAMPLE))
    return f"{folder.resolve().name}@{digest.hexdigest()[:8]}"


_SAMPLE = 64 * 1024
