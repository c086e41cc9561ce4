"""RemoteEnv: an env behind an env server, as a Gymnasium env that equals the local one step for step."""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from medseg_gym import errors
from medseg_gym.env_server import wire
from medseg_gym.envs.shared import check_render_mode
from medseg_gym.envs.spaces import ActionCodec, observation_space
from medseg_gym.errors import MedSegError
from medseg_gym.frames import Grid
from medseg_gym.types import Action, Image, View
from medseg_gym.web.connection import BYTES, FIRST_RETRIES, TOKEN_VARIABLE, Connection
from medseg_gym.web.message import read_json

JSON = "application/json"


class EnvServerError(MedSegError, RuntimeError):
    """An env server that cannot be reached, refuses to work for us, or does not do what it should."""


class NoAnswerError(EnvServerError):
    """No answer came, or the server counts other calls than we: what a reset or step did is unknown; reset goes on."""


class SessionLostError(EnvServerError):
    """The session is gone: closed, forgotten after a long pause, or of a server that was started anew."""


def connect(
    url: str,
    env: str,
    *,
    token: str | None = None,
    timeout: float = 120.0,
    retries: int = 8,
    render_mode: str | None = None,
    **options: Any,
) -> RemoteEnv:
    """The env of an id that `medseg-gym serve` plays at `url`, with env options such as observation= and size=.

    token: needed beyond loopback; by default $MEDSEG_GYM_TOKEN. timeout: seconds until an answer. retries: after a lost
    connection or from a busy server; calls are numbered, so that one that is sent twice counts once.
    """
    return RemoteEnv(url, env, token=token, timeout=timeout, retries=retries, render_mode=render_mode, options=options)


class RemoteEnv(gym.Env[Any, Any]):
    """One session of an env server. Rewards, infos and observations equal the local env's bit for bit; the counters of
    the tool in info are the server's, all clients' together. Where the server hides metrics, the reward is nan.

    `close` ends the session; one that is left behind ends by itself after the server's session_ttl.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012 - Gymnasium's own form

    def __init__(
        self,
        url: str,
        env: str,
        *,
        token: str | None,
        timeout: float,
        retries: int,
        render_mode: str | None,
        options: Mapping[str, Any],
    ) -> None:
        self.render_mode = check_render_mode(render_mode)
        self._connection = Connection(
            url,
            token=token,
            timeout=timeout,
            retries=retries,
            what="env server",
            start=f"medseg-gym serve --env {env}",
            unreachable=NoAnswerError,
            refused=_error,
        )
        self._session, self._open, self._calls = secrets.token_hex(16), False, 0
        self._unsure = False  # whether the server may have counted a call that we have not
        self._image_size: tuple[int, int] | None = None
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        told = self._json("PUT", "", {"env": env, "options": plain}, retries=FIRST_RETRIES)
        self._open = True
        try:
            self.name, self.structures = str(told["env"]), tuple(told["structures"])
            self.horizon, self.verbs = int(told["horizon"]), tuple(told["verbs"])
            self._codec = ActionCodec(self.verbs)
            self.action_space = self._codec.space
            self.observation_space = observation_space(
                told["observation"], int(told["size"]), len(self.structures), self.horizon
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EnvServerError(f"{url} does not answer as an env server does ({error!r})") from None

    def __repr__(self) -> str:
        return f"RemoteEnv({self._connection.url!r}, {self.name!r})"

    # Gymnasium's interface

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)  # the draws are the server's; Gymnasium looks at this generator all the same
        told, observation = self._move("reset", wire.write_reset(seed, options))
        self._image_size = (int(told["image_size"][0]), int(told["image_size"][1]))
        return observation, told["info"]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._step(wire.write_action(action))

    def render(self) -> Image | None:  # type: ignore[override]
        """The picture for people, drawn by the server."""
        if self.render_mode is None:
            gym.logger.warn('render() without a render mode; use connect(..., render_mode="rgb_array")')
            return None
        from PIL import Image as pil

        with pil.open(io.BytesIO(self._ask("GET", "/picture?of=render")), formats=["PNG"]) as picture:
            return np.array(picture.convert("RGB"))

    def close(self) -> None:
        """Ends the session; a server that is gone has ended it already."""
        if self._open:
            self._open = False
            with suppress(MedSegError):
                self._ask("DELETE", "", retries=0)

    # what policies use

    def view(self) -> View:
        """What a policy may see now; the target is not in it."""
        return wire.unpack_view(self._ask("GET", "/view"))

    def encode_action(self, action: Action) -> NDArray[np.int64]:
        """The action vector of a typed action on the current image."""
        if self._image_size is None:
            raise MedSegError("no episode yet; call reset first")
        return self._codec.encode(action, Grid(*self._image_size))

    def chat(self, protocol: str = "medsam-agent", size: int = 512) -> list[dict[str, Any]]:
        """The chat up to the present turn in OpenAI's form, for a model whose answer goes to `say`."""
        return list(read_json(self._ask("GET", f"/chat?{urlencode({'protocol': protocol, 'size': size})}"))["messages"])

    def say(self, text: str, protocol: str = "medsam-agent") -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """A step by a model's words; what cannot be read is an unreadable turn."""
        return self._step({"text": text, "protocol": protocol})

    # asking

    def _step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        told, observation = self._move("step", {"action": action})
        reward = float("nan") if told["reward"] is None else float(told["reward"])
        return observation, reward, bool(told["terminated"]), bool(told["truncated"]), told["info"]

    def _move(self, what: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        unsure = self._unsure
        if unsure and what != "reset":
            raise NoAnswerError(f"{self} gave no answer to the call before, which may be done or not; call reset")
        number = {} if unsure else {"call": self._calls + 1}
        body = json.dumps({**number, **request}).encode()
        self._unsure = True  # until there is an answer: ^C may come first
        try:
            answer = self._ask("POST", f"/{what}", body, headers={"Accept": BYTES})
        except MedSegError as error:
            self._unsure = unsure or isinstance(error, NoAnswerError)
            raise
        told, observation = wire.unpack_answer(answer)
        self._calls, self._unsure = int(told["call"]), False
        return told, observation

    def _json(self, method: str, target: str, request: Mapping[str, Any], retries: int) -> dict[str, Any]:
        try:
            body = json.dumps(request).encode()
        except TypeError as error:
            raise MedSegError(
                f"options {request.get('options')!r} are no JSON ({error}); wanted names and numbers"
            ) from None
        return read_json(self._ask(method, target, body, retries=retries))

    def _ask(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        retries: int | None = None,
    ) -> bytes:
        where = f"/v1/sessions/{self._session}{target}"
        return self._connection.ask(method, where, body, JSON, headers=headers, retries=retries)


def _error(url: str, status: int, body: bytes) -> Exception:
    """What a refusal means for the caller: the local env's own error where it would have raised one."""
    try:
        told = read_json(body)
    except MedSegError:
        told = {}
    text, kind = str(told.get("error", f"HTTP {status}"))[:2000], str(told.get("kind", ""))
    if status == 401:
        return EnvServerError(f"{url} wants a token: give token=, or set ${TOKEN_VARIABLE} to the server's")
    if status == 409:
        return NoAnswerError(f"{url}: {text}")
    if status == 404 and kind == "LostError":
        return SessionLostError(f"{url}: {text}")
    if status == 400:
        own = getattr(errors, kind, MedSegError)
        known = isinstance(own, type) and issubclass(own, MedSegError)
        return (own if known else MedSegError)(text)  # type: ignore[no-any-return]
    return EnvServerError(f"{url}: {text}")
