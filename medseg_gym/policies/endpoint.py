"""A chat model behind any OpenAI-compatible endpoint: concurrent, patient with a server's bad moments, and bounded."""

from __future__ import annotations

import asyncio
import base64
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

import numpy as np

from medseg_gym.errors import MedSegError, PolicyUnavailableError
from medseg_gym.policies import chat
from medseg_gym.policies.protocols.base import MAX_TEXT
from medseg_gym.policies.vlm import Completion
from medseg_gym.types import Decision

NO_KEY = "none"  # what servers without keys are sent
GIVE_UP = (401, 403, 404)  # a wrong key or model will not become right by asking again


class EndpointAnswerError(MedSegError):
    """The server's answer is no chat completion."""


class EndpointModel:
    """A model of a server that speaks OpenAI's chat completions (vLLM, SGLang, a vendor's).

    Images travel as PNG data URLs. At most `concurrency` requests are under way; each may take `timeout` seconds and is
    asked `retries` times more, with growing pauses (or the server's Retry-After), after a dropped connection, a
    time-out, 429 or 5xx. What still fails then raises, so the episode counts as failed; a server that cannot be reached
    at all, or that refuses key or model, raises PolicyUnavailableError. The key is read from the environment variable
    `api_key_env`; it is in no name, text or log. `tell_tokens` asks for token ids and log-probabilities beside the
    text, which vLLM's server gives; other servers may refuse or ignore it. `extra_body` is sent along as it is.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        timeout: float = 120.0,
        retries: int = 5,
        concurrency: int = 16,
        api_key_env: str = "OPENAI_API_KEY",
        tell_tokens: bool = False,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        for what, value, least, kinds in (
            ("temperature", temperature, 0, (int, float)),
            ("max_tokens", max_tokens, 1, (int,)),
            ("timeout", timeout, 0.001, (int, float)),
            ("retries", retries, 0, (int,)),
            ("concurrency", concurrency, 1, (int,)),
        ):
            if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value < math.inf:
                kind = "a whole number" if kinds == (int,) else "a number"
                raise MedSegError(f"{what}={value!r}; wanted {kind}, at least {least}")
        if not isinstance(api_key_env, str) or not api_key_env:
            raise MedSegError(f"api_key_env={api_key_env!r}; wanted the name of an environment variable")
        if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
            raise MedSegError(f"base_url={base_url!r}; wanted http://HOST:PORT/v1")
        self.name, self.base_url = str(model), base_url
        more = {**({"return_token_ids": True} if tell_tokens else {}), **(extra_body or {})}
        self._settings = {"temperature": temperature, "max_tokens": max_tokens, "extra_body": more}
        if tell_tokens:
            self._settings["logprobs"] = True
        self._sampled = temperature > 0  # a greedy request takes no seed, and some servers refuse one
        self._key = os.environ.get(api_key_env) or NO_KEY
        self._client = _client(base_url, self._key, timeout, retries)
        self._slots = asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="medseg-gym-endpoint", daemon=True)
        self._thread.start()

    def complete(self, messages: Sequence[chat.Message], said: Sequence[Decision], seed: int) -> Future[Completion]:
        """The server tokenizes by itself, so it gets the text of what was said before."""
        if not self._thread.is_alive():
            raise MedSegError(f"the connection to {self.base_url} was closed")
        return asyncio.run_coroutine_threadsafe(self._complete(to_openai(messages), seed), self._loop)

    def close(self) -> None:
        """Hangs up: answers that are still to come are cancelled."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)
            self._loop.close()

    async def _hang_up(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    async def _complete(self, messages: list[dict[str, Any]], seed: int) -> Completion:
        import openai

        async with self._slots:
            begun = time.perf_counter()
            try:
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=self.name, messages=messages, **self._settings, **({"seed": seed} if self._sampled else {})
                )
                answer = raw.parse()
            except openai.APIStatusError as error:
                if error.status_code in GIVE_UP:
                    raise PolicyUnavailableError(
                        f"{self.base_url} answers {error.status_code} for model {self.name!r}; check key, model and "
                        f"address. The server says: {self._words(error.message)}"
                    ) from None
                raise EndpointAnswerError(
                    f"the server answered {error.status_code}: {self._words(error.message)}"
                ) from None
            except openai.APIConnectionError as error:
                if _unreachable(error):
                    raise PolicyUnavailableError(
                        f"{self.base_url} cannot be reached; start the server and give the same command again to go on"
                    ) from None
                if isinstance(error, openai.APITimeoutError):
                    raise EndpointAnswerError("the server did not answer in time") from None
                raise EndpointAnswerError("the server dropped the connection") from None
            except (openai.OpenAIError, ValueError, TypeError, RecursionError) as error:
                raise EndpointAnswerError(f"the answer cannot be read: {self._words(str(error))}") from None
            return _completion(answer, time.perf_counter() - begun, int(raw.retries_taken), self._words)

    def _words(self, text: str) -> str:
        """What a server says, as a record may hold it: some echo the key they were sent."""
        return _short(text if self._key == NO_KEY else text.replace(self._key, "***"))


def to_openai(messages: Sequence[chat.Message]) -> list[dict[str, Any]]:
    """The messages as OpenAI's API takes them, pictures as PNG data URLs."""
    return [
        {**message, "content": content if isinstance(content := message["content"], str) else [*map(_part, content)]}
        for message in messages
    ]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    image = part["image"]
    return {"type": "image_url", "image_url": {"url": _data_url(image.tobytes(), image.shape)}}


@lru_cache(maxsize=128)  # a chat shows all its earlier pictures again at every turn
def _data_url(pixels: bytes, shape: tuple[int, ...]) -> str:
    data = chat.png(np.frombuffer(pixels, np.uint8).reshape(shape))
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"


def _client(base_url: str, key: str, timeout: float, retries: int) -> Any:
    try:
        import openai
    except ImportError:
        raise MedSegError("served models need the openai client: pip install 'medseg-gym[vlm]'") from None
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=retries)


def _unreachable(error: BaseException) -> bool:
    """Whether nobody listens, as against somebody who hung up."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):  # the client's HTTP library has changed its name
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _completion(answer: Any, seconds: float, retries: int, words: Callable[[str], str]) -> Completion:
    """The first choice; EndpointAnswerError where there is none, or where its content is no text."""
    try:
        choice = answer.choices[0]
        text = choice.message.content
    except (AttributeError, LookupError, TypeError):
        raise EndpointAnswerError(f"the answer is no chat completion: {words(str(answer))}") from None
    if text is None:
        text = ""  # a model that says nothing is unreadable, not broken
    if not isinstance(text, str):
        raise EndpointAnswerError(f"the answer's content is {type(text).__name__}; wanted text")
    costs: dict[str, float] = {"server_s": seconds, "retries": retries}
    for name in ("prompt_tokens", "completion_tokens"):
        count = getattr(getattr(answer, "usage", None), name, None)
        if isinstance(count, int):
            costs[name] = count
    finish = "length" if choice.finish_reason == "length" else "stop"
    return Completion(
        text=text[: MAX_TEXT + 1],
        token_ids=_numbers(getattr(choice, "token_ids", None), int),
        logprobs=_logprobs(getattr(choice.logprobs, "content", None)),
        finish=finish,
        prompt_ids=_numbers(getattr(answer, "prompt_token_ids", None), int),
        costs=costs,
    )


def _logprobs(tokens: Any) -> tuple[float, ...]:
    return _numbers([getattr(t, "logprob", None) for t in tokens], float) if isinstance(tokens, list) else ()


def _numbers(values: Any, kind: type) -> tuple[Any, ...]:
    """A list of numbers as a tuple; nothing where the server told none, or something else."""
    return tuple(values) if isinstance(values, list) and all(isinstance(v, kind) for v in values) else ()


def _short(text: str) -> str:
    """Enough of a server's words to act on, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."
