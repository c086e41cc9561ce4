"""verl: an AgentLoop that plays one episode in an env with one of our protocols, by our own rollout.

verl's server manager is given the chat's token ids as they stand; what it samples and what the env shows is appended,
and nothing is tokenized twice. Only what was sampled is trained: observations have response_mask 0, as has the end of
turn that is put behind an answer that was cut off. An episode that failed three times in the env, or whose answers
were aborted, has no trained token at all. The reward is the env's.

verl knows it by its file of agent loops (`actor_rollout_ref.rollout.agent.agent_loop_config_path`); registered by name
when it is imported, which verl does only when it first plays, it would replace what that file says:

    - name: medseg_gym
      _target_: medseg_gym.adapters.verl.MedSegAgentLoop
      protocol: medsam-agent
      size: 512
      env_options: {horizon: 5}

and the cases from the parquet file that `verl_cases.write_cases` writes. Read and tried against verl 0.9.1.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from medseg_gym.errors import MedSegError
from medseg_gym.policies import chat
from medseg_gym.rl.engines.base import EngineStatus, GenRequest, GenResult, WeightRef
from medseg_gym.rl.jobs import Job, Settings
from medseg_gym.rl.local_worker import LocalWorker
from medseg_gym.rl.rollout import play
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Rollout
from medseg_gym.rl.worker import EnvWorker, Observed
from medseg_gym.types import Episode, Unreadable

try:
    from verl.experimental.agent_loop.agent_loop import (  # type: ignore[import-not-found]
        AgentLoopBase,
        AgentLoopMetrics,
        AgentLoopOutput,
    )
except ImportError as error:
    raise MedSegError(f"this is an AgentLoop of verl's: pip install verl ({error})") from None

NEVER = -100.0  # OpenAI's and vLLM's bias of a token that is not to be sampled


class MedSegAgentLoop(AgentLoopBase):  # type: ignore[misc]
    """One episode of the row's case: extra_info["env"] is the env's id, extra_info["id"] the case's key.

    `env_options` are gym.make's, `max_new_tokens` the most of one answer, `slots` the episodes that one of verl's agent
    loop workers plays at once. The protocol's chats must go on over the turns (ibis: protocol_options history=true).
    """

    def __init__(
        self,
        *given: Any,
        env: str = "",
        protocol: str = "medsam-agent",
        protocol_options: Mapping[str, Any] | None = None,
        size: int = chat.SIZE,
        env_options: Mapping[str, Any] | None = None,
        max_new_tokens: int = 256,
        slots: int = 64,
        **verls: Any,
    ) -> None:
        super().__init__(*given, **verls)
        self.env, self.slots, self.max_new_tokens = env, slots, max_new_tokens
        self.tokens = _tokens(self.tokenizer, self.processor)
        self.worker = {
            "protocol": protocol,
            "size": size,
            "options": _plain(env_options),
            "protocol_options": _plain(protocol_options),
        }

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **row: Any) -> AgentLoopOutput:
        """Plays the row's case. The row's own prompt is what the case begins with, and is not read again."""
        told = row.get("extra_info") or {}
        env, key = told.get("env") or self.env, told.get("id")
        if not env or not key:
            raise MedSegError(
                f'extra_info={dict(told)!r}; wanted "env", an env id, and "id", the key of a case in it: write rows '
                "with medseg_gym.adapters.verl_cases.write_cases"
            )
        name = f"det-{int(priority)}" if getattr(self.rollout_config, "full_determinism", False) else uuid.uuid4().hex
        ours = {"logit_bias": dict.fromkeys(sorted(self.tokens.banned_ids), NEVER)}  # SGLang has no such option
        more = ours if self.rollout_config.get("name") == "vllm" else {}
        engine = ServerEngine(self.server_manager, {**sampling_params, **more}, name)
        async with _slot(env, self.slots, self.worker) as slot:
            first = await slot.reset(0, key, 0)
            prompt = self.tokens.prompt(first.messages).ids
            self._check_prompt(len(prompt))
            settings = Settings(
                seed=0,
                max_new_tokens=min(self.max_new_tokens, self.rollout_config.response_length),
                max_chat_tokens=len(prompt) + self.rollout_config.response_length,
            )
            playing = play([Job(0, key)], [slot], engine, self.tokens, settings)
            [rollout] = [member async for group in playing for member in group]
        return output_of(rollout, prompt, first, self.tokens.end, engine)

    def _check_prompt(self, length: int) -> None:
        most = self.rollout_config.prompt_length
        if length > most:
            raise MedSegError(
                f"the first turn takes {length} tokens, more than rollout.prompt_length={most}: raise "
                "data.max_prompt_length, or lower the agent loop's size"
            )


def output_of(
    rollout: Rollout, prompt: Sequence[int], first: Observed, end: int, engine: ServerEngine
) -> AgentLoopOutput:
    """An episode as verl wants it: the chat cut after its first messages, its reward and what verl may log of it."""
    segments = rollout.sequences[0].segments if rollout.sequences else ()
    response = [token for segment in segments[1:] for token in segment.ids]
    trained = [int(segment.trained and not rollout.dropped) for segment in segments[1:] for _ in segment.ids]
    logprobs = [value for s in segments[1:] for value in (s.logprobs or (0.0,) * len(s.ids))]
    images = [image for segment in segments for image in segment.images] or list(first.images)
    if not response:  # verl pads no empty one
        response, trained, logprobs = [end], [0], [0.0]
    episode, seconds = rollout.episode, rollout.timing
    turns = len(episode.turns)
    facts = {
        "iou": float(episode.iou[-1]),
        "dice": float(episode.dice[-1]),
        "turns": float(turns),
        "unreadable": float(sum(isinstance(turn.action, Unreadable) for turn in episode.turns)),
        "dropped": float(bool(rollout.dropped)),
    }
    return AgentLoopOutput(
        prompt_ids=list(prompt),
        response_ids=response,
        response_mask=trained,
        response_logprobs=logprobs if engine.with_logprobs else None,
        multi_modal_data={"images": pictures([image.pixels for image in images])},
        reward_score=rollout.reward,
        num_turns=max(2, 2 * turns),
        metrics=AgentLoopMetrics(
            generate_sequences=seconds.get("generate_s", 0.0),
            tool_calls=seconds.get("worker_s", 0.0),
            num_preempted=engine.preempted,
        ),
        extra_fields={
            **engine.told,
            "turn_scores": [float(turn.reward) for turn in episode.turns],
            "tool_rewards": [],
            "reward_extra_info": facts,
        },
    )


@dataclass
class ServerEngine:
    """verl's server manager as a PolicyEngine, for one episode. Sampling is verl's; its weights are not ours to change.

    An answer is cut before a token that no chat may hold: verl would take one more picture for it.
    """

    manager: Any
    sampling: Mapping[str, Any]
    name: str  # of the episode, whose turns go to one server
    told: dict[str, Any] = field(default_factory=dict)  # what the servers say of the weights they answered with
    preempted: int = -1
    lockstep = False

    @property
    def with_logprobs(self) -> bool:
        return bool(self.sampling.get("logprobs"))

    async def generate(self, request: GenRequest) -> GenResult:
        limits = {"max_tokens": request.max_tokens, "stop_token_ids": list(request.stop_ids)}
        said = await self.manager.generate(
            request_id=self.name,
            prompt_ids=list(request.ids),
            sampling_params={**self.sampling, **limits},
            image_data=pictures([image.pixels for image in request.images]),
        )
        self._remember(said)
        ids = list(said.token_ids)
        edges = [at for at, token in enumerate(ids) if token in request.stop_ids or token in request.banned_ids]
        if edges:
            ids = ids[: edges[0] + (ids[edges[0]] in request.stop_ids)]
        ids = ids[: request.max_tokens]
        if not ids or said.stop_reason in ("abort", "aborted"):
            return GenResult((), (), "abort", ())
        logprobs = tuple(said.log_probs or ())[: len(ids)] if self.with_logprobs else (0.0,) * len(ids)
        finish: Literal["stop", "length"] = "stop" if ids[-1] in request.stop_ids else "length"
        return GenResult(tuple(ids), logprobs, finish, ((0, 0, len(ids)),))  # a Member refuses too few

    async def generate_together(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        return [await self.generate(request) for request in requests]

    async def status(self) -> EngineStatus:
        return EngineStatus(0, False, 0)

    async def pause(self, mode: Literal["wait", "abort", "keep"] = "wait") -> None: ...

    async def resume(self) -> None: ...

    async def update_weights(self, source: WeightRef) -> None:
        raise MedSegError("verl's servers get their weights from verl")

    async def close(self) -> None: ...

    def _remember(self, said: Any) -> None:
        """Steps of the weights over all turns, as verl's own loops tell them."""
        more = dict(said.extra_fields)
        newest = more.get("max_global_steps")
        self.told = {**more, **self.told, **({"max_global_steps": newest} if newest is not None else {})}
        if said.num_preempted is not None:
            self.preempted = max(self.preempted, 0) + said.num_preempted


class _Slot:
    """A worker of one slot: one of another's, which `play` may have for itself."""

    slots = 1

    def __init__(self, worker: EnvWorker, slot: int) -> None:
        self.worker, self.slot, self.history = worker, slot, worker.history

    async def reset(self, slot: int, key: str, seed: int) -> Observed:
        return await self.worker.reset(self.slot, key, seed)

    async def step(self, slot: int, text: str, cut_off: bool = False) -> Observed:
        return await self.worker.step(self.slot, text, cut_off)

    async def truncate(self, slot: int) -> None:
        await self.worker.truncate(self.slot)

    async def episode(self, slot: int, case: int, seed: int) -> Episode:
        return await self.worker.episode(self.slot, case, seed)

    async def keys(self, split: str) -> list[str]:
        return await self.worker.keys(split)

    async def counters(self) -> Mapping[str, float]:
        return await self.worker.counters()

    async def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Pool:
    worker: LocalWorker
    free: asyncio.Queue[int]


_pools: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Pool]] = WeakKeyDictionary()
_renderers: list[tuple[Any, Any, ChatTokens]] = []


@asynccontextmanager
async def _slot(env: str, slots: int, worker: Mapping[str, Any]) -> AsyncIterator[_Slot]:
    """A free slot of the envs that all agent loops of this process share: verl makes a loop object a row."""
    pools = _pools.setdefault(asyncio.get_running_loop(), {})
    name = repr((env, slots, worker))
    if name not in pools:
        made = LocalWorker(env, slots, **worker)
        if not made.history:
            await made.close()
            raise MedSegError(
                f"protocol {worker['protocol']!r} begins a chat a turn, and verl trains one chat an episode; give "
                "protocol_options: {history: true}"
            )
        pools[name] = _Pool(made, asyncio.Queue())
        for slot in range(slots):
            pools[name].free.put_nowait(slot)
    pool = pools[name]
    slot = await pool.free.get()
    try:
        yield _Slot(pool.worker, slot)
    finally:
        pool.free.put_nowait(slot)


def _tokens(tokenizer: Any, processor: Any) -> ChatTokens:
    """The renderer of a tokenizer, made once; its template is checked against ours."""
    for known, image, tokens in _renderers:
        if known is tokenizer and image is processor:
            return tokens
    if getattr(processor, "image_processor", None) is None:
        raise MedSegError(f"processor={processor!r}; a picture is shown every turn: wanted a Qwen-VL checkpoint")
    tokens = ChatTokens(tokenizer, processor.image_processor)
    _renderers.append((tokenizer, processor, tokens))
    return tokens


def _plain(options: Any) -> dict[str, Any]:
    """A mapping as Hydra hands it over, without OmegaConf's kinds."""
    from omegaconf import OmegaConf  # type: ignore[import-not-found]

    return dict(OmegaConf.to_container(options) if OmegaConf.is_config(options) else options or {})


def pictures(images: Sequence[np.ndarray[Any, Any]]) -> list[Any]:
    """(H, W, 3) arrays as the PIL images that verl's processors and servers take."""
    from PIL import Image

    return [Image.fromarray(image) for image in images]
