"""VLMPolicy: a vision-language model that plays by a protocol, served elsewhere or run in this process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from medseg_gym.errors import MedSegError
from medseg_gym.frames import Grid
from medseg_gym.policies import chat, protocols
from medseg_gym.policies.protocols import ChatProtocol
from medseg_gym.types import Decision, View

MAX_SEED = 2**31 - 1  # what every server takes


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model said to some messages."""

    text: str
    token_ids: tuple[int, ...] = ()  # the sampled ones, the end of turn included; empty where a server tells none
    logprobs: tuple[float, ...] = ()  # of these tokens, as they were sampled
    finish: str = "stop"  # "stop" or "length"
    prompt_ids: tuple[int, ...] = ()  # those the model read, where it tells
    costs: Mapping[str, float] = field(default_factory=dict)


class ChatModel(Protocol):
    """A language model that completes chats; it remembers nothing between two of them."""

    name: str

    def complete(self, messages: Sequence[chat.Message], said: Sequence[Decision], seed: int) -> Future[Completion]:
        """The completion to come. `said` are the decisions behind the assistant's messages, oldest first: where they
        hold token ids, these are what the model is given, not their text. `seed` is of the sampling."""
        ...

    def close(self) -> None:
        """Lets go of threads, connections and memory."""
        ...


class VLMPolicy:
    """Shows a view to a model as a chat and reads its answer as an action.

    A view's chat is made from the view alone (policies.chat), with the model's own earlier words, so one policy serves
    any number of slots at once. Answers that hold no action are unreadable Decisions with a reason, never exceptions; a
    model that gives no answer fails the episode, one that is gone for good raises PolicyUnavailableError.
    """

    def __init__(
        self,
        model: ChatModel,
        protocol: str | ChatProtocol = "medsam-agent",
        *,
        verbs: Sequence[str] | None = None,
        size: int = chat.SIZE,
        name: str | None = None,
    ) -> None:
        self.model = model
        self.protocol = protocols.make(protocol, verbs)
        if getattr(self.protocol, "several", False):
            raise MedSegError(
                "VLMPolicy plays one target a chat; several=True is read by the protocol's parse_many alone"
            )
        self.size = chat.check_size(size)
        self.name = name or f"VLM:model={model.name},protocol={self.protocol.name}"

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        """One decision a view, in order; all are asked for before the first is waited for."""
        return [answer.result() for answer in [self.submit(view, rng) for view, rng in zip(views, rngs, strict=True)]]

    def submit(self, view: View, rng: np.random.Generator) -> Future[Decision]:
        """The decision to come."""
        begun = time.perf_counter()
        seed = int(rng.integers(MAX_SEED))
        messages = chat.messages(view, self.protocol, size=self.size)
        said = view.decisions if self.protocol.history else ()
        decision: Future[Decision] = Future()

        def read(answer: Future[Completion]) -> None:
            try:
                decision.set_result(self._decision(answer.result(), view, time.perf_counter() - begun))
            except BaseException as error:
                decision.set_exception(error)

        self.model.complete(messages, said, seed).add_done_callback(read)
        return decision

    def close(self) -> None:
        """Lets go of the model."""
        self.model.close()

    def _decision(self, completion: Completion, view: View, seconds: float) -> Decision:
        decision = self.protocol.parse(completion.text, Grid(*view.mask.shape))
        reason = decision.reason
        if decision.action is None and completion.finish == "length":
            reason = f"the answer was cut off; {reason}"
        return replace(
            decision,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            reason=reason,
            costs={"requests": 1, "latency_s": seconds, **completion.costs},
        )


def served(
    model: str | None = None,
    base_url: str | None = None,
    protocol: str = "medsam-agent",
    *,
    verbs: Sequence[str] | None = None,
    temperature: float = 0.0,
    max_tokens: int = 512,
    size: int = chat.SIZE,
    history: bool | None = None,
    thinking: bool | None = None,
    timeout: float = 120.0,
    retries: int = 5,
    concurrency: int = 16,
    api_key_env: str = "OPENAI_API_KEY",
) -> VLMPolicy:
    """The policy of a model behind an OpenAI-compatible endpoint; what `--policy vlm:model=...,base_url=...` builds.

    Address, key and patience are not in the policy's name: no answer hangs on them. See EndpointModel for each.
    `history` and `thinking` are options of the protocol ibis.
    """
    if model is None or base_url is None:
        raise MedSegError("vlm needs a model and its server: vlm:model=NAME,base_url=http://127.0.0.1:8000/v1")
    from medseg_gym.policies.endpoint import EndpointModel

    chat.check_size(size)
    spoken = _given(history=history, thinking=thinking)
    words = protocols.make(protocol, verbs, **spoken)
    server = EndpointModel(
        base_url,
        model,
        temperature=temperature,
        max_tokens=max_tokens,
        timeout=timeout,
        retries=retries,
        concurrency=concurrency,
        api_key_env=api_key_env,
    )
    return VLMPolicy(server, words, size=size, name=_name(model, protocol, spoken, temperature, max_tokens, size))


def local(
    model: str | None = None,
    protocol: str = "medsam-agent",
    *,
    verbs: Sequence[str] | None = None,
    engine: str = "transformers",
    temperature: float = 0.0,
    max_tokens: int = 512,
    size: int = chat.SIZE,
    history: bool | None = None,
    thinking: bool | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> VLMPolicy:
    """The policy of a checkpoint folder run in this process by `engine`, "transformers" or "vllm".

    It is what `--policy vlm-local:model=PATH` builds. `dtype` and `device` are the engine's own
    unless given.
    """
    if model is None:
        raise MedSegError("vlm-local needs a checkpoint folder: vlm-local:model=PATH")
    from medseg_gym.policies.inprocess import load

    if device is not None and engine == "vllm":
        raise MedSegError(f"device={device!r}: the engine vllm finds its device by itself")
    chat.check_size(size)  # before the model takes its time to load
    spoken = _given(history=history, thinking=thinking)
    words = protocols.make(protocol, verbs, **spoken)
    ready = load(engine, model, temperature=temperature, max_tokens=max_tokens, **_given(dtype=dtype, device=device))
    return VLMPolicy(ready, words, size=size, name=_name(ready.name, protocol, spoken, temperature, max_tokens, size))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _name(model: str, protocol: str, spoken: Mapping[str, bool], temperature: float, max_tokens: int, size: int) -> str:
    """A spec of all that answers hang on, so that a run is never resumed with other settings."""
    parts = [f"model={model}", f"protocol={protocol}"]
    parts += [f"{option}={value}".lower() for option, value in spoken.items()]
    parts += [f"temperature={temperature}"] if temperature else []
    parts += [f"max_tokens={max_tokens}"] if max_tokens != 512 else []
    parts += [f"size={size}"] if size != chat.SIZE else []
    return "vlm:" + ",".join(parts)
