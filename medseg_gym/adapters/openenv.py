"""OpenEnv: an env as an OpenEnv Environment and its own web application, over the sessions of our env server.

Written against openenv-core 0.3.0. OpenEnv's server knows neither tokens nor hosts: keep it on loopback or behind
something that does; `medseg-gym serve` is ours, and has both. Actions are the forms of medseg_gym.env_server.wire.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

from medseg_gym.env_server.session import Served, Session
from medseg_gym.env_server.wire import FORMS, json_observation
from medseg_gym.errors import MedSegError

try:
    from openenv.core import env_server as openenv  # type: ignore[import-not-found]
    from pydantic import Field
except ImportError as missing:
    raise MedSegError(f"the OpenEnv adapter needs {missing.name}: pip install openenv-core==0.3.0") from None

_playing = threading.Lock()  # OpenEnv gives every session a thread; our tools are asked by one at a time


class SegmentAction(openenv.Action):  # type: ignore[misc]
    """One action of any form that the env server takes."""

    action: list[int] | dict[str, Any] = Field(description=FORMS)


class SegmentObservation(openenv.Observation):  # type: ignore[misc]
    """What the agent sees; pictures are {"png": base64}. `reward` is 0 at reset, `info` as the env has it."""

    observation: dict[str, Any] = Field(description="the overlay, or with observation='dict' its parts")
    info: dict[str, Any]
    terminated: bool
    truncated: bool
    unreadable: str = Field("", description="why the last text gave no action")


class SegmentEnvironment(openenv.Environment):  # type: ignore[misc]
    """One session of a served env."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, served: Served, hide_metrics: bool = False) -> None:
        super().__init__()
        with _playing:
            self._session = Session("", served.make({}), served, used=0.0)
        self._hide, self._state = hide_metrics, openenv.State(episode_id=None, step_count=0)

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, sample: str | None = None, **other: Any
    ) -> SegmentObservation:
        """Begins an episode; `sample` pins the case. Other keywords raise."""
        if other:
            raise MedSegError(f"reset got {', '.join(other)}; wanted seed, episode_id and sample")
        with _playing:
            self._session.reset(seed, {} if sample is None else {"sample": sample})
            self._state = openenv.State(episode_id=episode_id or uuid.uuid4().hex, step_count=0)
            return self._now()

    def step(self, action: SegmentAction, timeout_s: float | None = None, **_: Any) -> SegmentObservation:
        with _playing:
            self._session.step(action.action)
            self._state.step_count += 1
            return self._now()

    @property
    def state(self) -> Any:
        return self._state

    def _now(self) -> SegmentObservation:
        told, seen = self._session.now(self._hide)
        names = ("reward", "info", "terminated", "truncated", "unreadable")
        return SegmentObservation(
            observation=json_observation(seen),
            done=told["terminated"] or told["truncated"],
            **{name: told[name] for name in names},
        )


def environment(env_id: str, *, hide_metrics: bool = False, **options: Any) -> Callable[[], SegmentEnvironment]:
    """The factory that OpenEnv asks for: a new environment each call, over data and tool that are loaded once."""
    served = Served.load(env_id, options)
    return lambda: SegmentEnvironment(served, hide_metrics)


def create_app(env_id: str, *, sessions: int = 64, hide_metrics: bool = False, **options: Any) -> Any:
    """OpenEnv's web application of an env, for `uvicorn`; `options` are the env's."""
    factory = environment(env_id, hide_metrics=hide_metrics, **options)
    return openenv.create_app(factory, SegmentAction, SegmentObservation, env_name=env_id, max_concurrent_envs=sessions)
