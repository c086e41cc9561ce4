"""The tool host as a Ray actor, and ActorTool: the SegmentationTool that asks it from any worker of the cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from medseg_gym.errors import MedSegError
from medseg_gym.tools.serving.batcher import BusyError, ClosedError
from medseg_gym.tools.serving.host import Ask, MissingError, ToolHost
from medseg_gym.tools.serving.limits import Limits
from medseg_gym.tools.serving.remote import RefusedError, Remote, ServerError, UnreachableError
from medseg_gym.types import Image, Prediction

THREADS = 64  # calls that the actor holds at once; all but the batcher's thread only wait
LONGEST_WAIT = 5.0  # seconds between two tries
DEATHS = 2  # of the actor within one call; more, and it is taken to be gone for good


class ToolActor:
    """A ToolHost whose tool is loaded where the actor lives. Its arguments are names and settings, so that Ray can
    restart it anywhere; what had been sent to it is then gone, and is sent again by those who need it."""

    def __init__(self, tool: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """settings: cache_bytes, wait_ms, and `limits` as a dict."""
        from medseg_gym import tools

        loaded = tools.load(tool, cache_bytes=settings["cache_bytes"], **options)
        self.host = ToolHost(loaded, limits=Limits(**settings["limits"]), wait_ms=settings["wait_ms"])

    def describe(self) -> dict[str, Any]:
        return self.host.describe()

    def counters(self) -> dict[str, Any]:
        return self.host.counters()

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        return self.host.tool.prior_shape(height, width)

    def put(self, name: str, image: Image) -> dict[str, Any]:
        return _outcome(lambda: self.host.put(name, np.array(image)))  # a copy: Ray's own memory is not to be held

    def encode(self, names: Sequence[str], owner: str) -> dict[str, Any]:
        def work() -> str:
            for answer in self.host.encode(names, owner):
                answer.result()
            return self.host.tool.fingerprint

        return _outcome(work)

    def predict(self, asks: Sequence[Ask], owner: str) -> dict[str, Any]:
        def work() -> tuple[list[Any], list[str], str]:
            asked = [
                Ask(a.image, a.prompts, np.array(a.prior) if isinstance(a.prior, np.ndarray) else a.prior) for a in asks
            ]
            answers = [future.result() for future in self.host.predict(asked, owner)]
            handles = [self.host.keep_prior(answer.prior) for answer in answers if answer is not None]
            return answers, handles, self.host.tool.fingerprint

        return _outcome(work)


class ActorTool(Remote):
    """The tool of a ToolActor. It can be sent to other Ray workers; all share the actor's batches and embeddings.

    timeout: seconds a call may take, or the actor to come back after it died; then ServerError.
    """

    def __init__(self, actor: Any, *, timeout: float = 120.0) -> None:
        from uuid import uuid4

        self.actor, self.timeout = actor, timeout
        self._owner = uuid4().hex  # whose turn it is goes by this
        super().__init__()

    def __repr__(self) -> str:
        return f"ActorTool({getattr(self, 'name', 'tool')})"

    def __reduce__(self) -> Any:
        return _remade, (self.actor, self.timeout)

    def counters(self) -> dict[str, Any]:
        """The host's counters: batches, cache, what it keeps."""
        return dict(self._call("counters"))

    def _describe(self) -> Mapping[str, Any]:
        return dict(self._call("describe"))

    def _prior_shape(self, height: int, width: int) -> tuple[int, int]:
        h, w = self._call("prior_shape", height, width)
        return h, w

    def _put(self, name: str, image: Image) -> None:
        self._outcome("put", name, image)

    def _encode(self, names: Sequence[str]) -> str:
        return str(self._outcome("encode", list(names), self._owner))

    def _predict(
        self, asks: Sequence[Ask], sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Prediction], list[str], str]:
        answers, handles, fingerprint = self._outcome("predict", list(asks), self._owner)
        own = [Prediction(np.array(a.logits), a.predicted_iou, np.array(a.prior)) for a in answers]
        for answer in own:
            answer.prior.flags.writeable = False  # its handle stands for these very numbers
        return own, list(handles), fingerprint

    def _outcome(self, method: str, *arguments: Any) -> Any:
        """The value of a call that answers with `_outcome`; a busy host is asked again until the timeout."""
        until = time.monotonic() + self.timeout
        wait = 0.05
        while True:
            told = self._call(method, *arguments)
            if "value" in told:
                return told["value"]
            if "missing" in told:
                raise MissingError(*told["missing"])
            if not told["again"] or time.monotonic() + wait > until:
                raise (RefusedError if told["refused"] else ServerError)(f"{self}: {told['error']}")
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _call(self, method: str, *arguments: Any) -> Any:
        """A call of the actor, again after a restart: all calls are pure, so asking twice is safe."""
        import ray
        from ray import exceptions as broken

        until = time.monotonic() + self.timeout
        wait, deaths = 0.1, 0
        while True:
            try:
                return ray.get(
                    getattr(self.actor, method).remote(*arguments), timeout=max(0.01, until - time.monotonic())
                )
            except broken.GetTimeoutError:
                raise UnreachableError(f"{self} gave no answer within {self.timeout:g} s") from None
            except broken.RayActorError as error:
                # A call under way when the actor dies says so too, though a restart follows; death repeats itself.
                deaths += isinstance(error, broken.ActorDiedError)
                if deaths > DEATHS or time.monotonic() + wait > until:
                    raise UnreachableError(f"{self}'s actor is gone: {_reason(error)}") from None
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


def start_actor(
    tool: str,
    *,
    cache_bytes: int | None = None,
    wait_ms: float = 3.0,
    limits: Limits | None = None,
    max_restarts: int = 3,
    timeout: float = 120.0,
    ray_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> ActorTool:
    """Starts a ToolActor on the running Ray cluster and gives the tool that asks it.

    `tool` is a tool id or "package.module:Class", `options` its keywords. `ray_options` go to the actor: num_cpus,
    num_gpus (give 1 for a tool with device="cuda"), name, lifetime, ... The actor lives as long as something holds it.
    """
    try:
        import ray
    except ImportError:
        raise MedSegError("a tool actor needs Ray: pip install 'medseg-gym[rllib]'") from None
    from medseg_gym.tools.cache import MAX_BYTES

    settings = {
        "cache_bytes": MAX_BYTES if cache_bytes is None else cache_bytes,
        "wait_ms": wait_ms,
        "limits": asdict(limits or Limits()),
    }
    given = {"max_restarts": max_restarts, "max_concurrency": THREADS, "num_cpus": 1, **(ray_options or {})}
    actor = ray.remote(ToolActor).options(**given).remote(tool, dict(options), settings)
    return ActorTool(actor, timeout=timeout)


def _reason(error: Exception) -> str:
    """The last line of a constructor's traceback, else the beginning of what Ray tells."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "creation task" in lines[0] else " ".join(lines)[:500]


def _remade(actor: Any, timeout: float) -> ActorTool:
    return ActorTool(actor, timeout=timeout)


def _outcome(work: Any) -> dict[str, Any]:
    """What came of the work, as data: exceptions through Ray come wrapped, with a traceback as their text."""
    try:
        return {"value": work()}
    except MissingError as missing:
        return {"missing": (missing.images, missing.priors)}
    except Exception as error:
        refused = isinstance(error, ValueError) and not isinstance(error, (BusyError, ClosedError))
        told = f"{type(error).__name__}: {error}"
        return {"error": told, "again": isinstance(error, BusyError), "refused": refused}
