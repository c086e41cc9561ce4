"""The PolicyEngine protocol: what generates the policy's answers, its requests and results, and how weights arrive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from medseg_gym.rl.types import Finish, ImageRef, Span


@dataclass(frozen=True, slots=True, eq=False)
class GenRequest:
    """One answer asked for. The answer is a function of ids, images, settings, seed and weights alone."""

    id: str  # unique; names the request in errors and in `abort`
    ids: tuple[int, ...]  # the whole chat so far, image placeholders expanded
    images: tuple[ImageRef, ...]
    temperature: float
    max_tokens: int
    seed: int
    stop_ids: tuple[int, ...]  # the end of turn; it is part of the answer
    banned_ids: frozenset[int] = frozenset()
    episode: str = ""  # requests of one episode go to one engine, whose prefix cache holds the chat


@dataclass(frozen=True, slots=True, eq=False)
class GenResult:
    """An answer. Log-probabilities are of the distribution sampled from: after banned ids and temperature."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish  # "stop": ended by a stop id; "length": max_tokens; "abort": never to be trained as complete
    versions: tuple[Span, ...]  # contiguous, from 0 to len(ids)
    timing: Mapping[str, float] = field(default_factory=dict)  # queue_s, prefill_s, decode_s; what the engine knows


@dataclass(frozen=True, slots=True, eq=False)
class WeightRef:
    """Where an engine finds weights: tensors of this process, or a folder of safetensors.

    Names are those of the checkpoint that transformers saves; LoRA is merged. `full` says that no weight is left out:
    a partial one updates those it names.
    """

    version: int
    full: bool
    tensors: Mapping[str, Any] | None = None
    folder: str = ""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    version: int
    paused: bool
    running: int  # requests under way
    # prompt_tokens, busy_s and requests, of the answers that are done; completion_tokens, as they are sampled
    counters: Mapping[str, float] = field(default_factory=dict)


class PolicyEngine(Protocol):
    """Generates answers. Every method may be awaited from one event loop at the same time as any other."""

    lockstep: bool
    """Whether answers asked for in one `generate_together` are computed in one batch, whose make-up changes the last
    bits of the result: then a group's members ask together, so that a seed means the same whatever the timing."""

    async def generate(self, request: GenRequest) -> GenResult: ...

    async def generate_together(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        """One result a request, in order."""
        ...

    async def pause(self, mode: Literal["wait", "abort", "keep"] = "wait") -> None:
        """No new answers begin. Those under way: "wait" for them, "abort" them, or "keep" them to go on at resume."""
        ...

    async def update_weights(self, source: WeightRef) -> None:
        """Takes the weights, which must be paused for, and forgets every cache that hangs on the old ones."""
        ...

    async def resume(self) -> None: ...

    async def status(self) -> EngineStatus: ...

    async def close(self) -> None: ...
