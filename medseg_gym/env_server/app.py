"""The HTTP side of an env server: routes, their bodies, and what each error is answered with."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from medseg_gym.env_server import wire
from medseg_gym.env_server.session import Session
from medseg_gym.env_server.sessions import FullError, LostError, OrderError, Sessions
from medseg_gym.errors import BadDataError, MedSegError, ToolUnavailableError, check_keywords
from medseg_gym.web.guard import Guard, Refusal, json_answer, log, not_found
from medseg_gym.web.message import read_json

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

BYTES = "application/octet-stream"
NAME = 32  # hex digits of a session's name
SWEEP_S = 30.0


def make_app(sessions: Sessions, token: str | None = None) -> Starlette:
    """The ASGI application of the sessions."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(sessions))
        yield
        sweeping.cancel()
        sessions.shutdown()

    server = _Server(sessions, token)
    one = "/v1/sessions/{name}"
    routes = [
        ("/health", "GET", server.health),
        ("/v1/envs", "GET", server.envs),
        ("/v1/keys", "GET", server.keys),
        (one, "PUT", server.open),
        (one, "DELETE", server.close),
        (f"{one}/reset", "POST", server.reset),
        (f"{one}/step", "POST", server.step),
        (f"{one}/picture", "GET", server.picture),
        (f"{one}/view", "GET", server.view),
        (f"{one}/chat", "GET", server.chat),
    ]
    return Starlette(
        routes=[Route(path, server.guarded(endpoint, path), methods=[method]) for path, method, endpoint in routes],
        lifespan=lifespan,
        exception_handlers={404: not_found, 405: not_found},  # type: ignore[dict-item]
    )


class _Server(Guard):
    """The endpoints."""

    def __init__(self, sessions: Sessions, token: str | None) -> None:
        super().__init__(sessions.limits, token)
        self.sessions = sessions

    def refusal(self, error: Exception) -> Refusal | None:
        name = type(error).__name__
        if isinstance(error, LostError):
            return Refusal(404, str(error), kind=name)
        if isinstance(error, OrderError):
            return Refusal(409, str(error), kind=name)
        if isinstance(error, FullError):
            return Refusal(429, str(error), {"Retry-After": "1"}, kind=name)
        if isinstance(error, ToolUnavailableError):
            log.error("the tool is gone: %s", error)
            return Refusal(502, "the tool of this env is gone; the server's log says how", kind=name)
        if isinstance(error, MedSegError):
            return Refusal(400, str(error), kind=name)
        return None

    async def envs(self, _: Request) -> Response:
        return json_answer(self.sessions.told())

    async def keys(self, request: Request) -> Response:
        """Keys of a split: env=, split=, structure= (several), start=."""
        query = request.query_params
        check_keywords("query", query, ("env", "split", "structure", "start"))
        served = self.sessions.find_env(query.get("env", ""))
        start = query.get("start", "0")
        if not start.isascii() or not start.isdigit() or len(start) > 12:
            raise BadDataError(f"start={start!r}; wanted a whole number from 0")
        options = {"split": query.get("split", served.fixed.get("split", "train"))}
        if query.getlist("structure"):
            options["structures"] = query.getlist("structure")
        env = await self.sessions.work(lambda: served.make(options))
        all_keys = env.engine.keys
        first = min(int(start), len(all_keys))
        some = [all_keys[i] for i in range(first, min(len(all_keys), first + self.sessions.limits.keys))]
        return json_answer({"keys": some, "start": first, "total": len(all_keys)})

    async def open(self, request: Request) -> Response:
        name = _name(request)
        told = await self._json(request)
        check_keywords("session", told, ("env", "options"))
        opened = await self.sessions.open(name, told.get("env"), wire.read_options(told.get("options", {})))
        return json_answer({"session": name, **opened})

    async def close(self, request: Request) -> Response:
        self.sessions.close_session(_name(request))
        return json_answer({"closed": True})

    async def reset(self, request: Request) -> Response:
        told = await self._json(request)
        seed, options = wire.read_reset(told)
        return await self._moved(request, lambda session: session.reset(seed, options), told)

    async def step(self, request: Request) -> Response:
        told = await self._json(request)
        check_keywords("step", told, ("call", "action"))
        if "action" not in told:
            raise BadDataError(f'{wire.shown(told)} has no action; wanted {{"action": ...}}, with {wire.FORMS}')
        return await self._moved(request, lambda session: session.step(told["action"]), told)

    async def picture(self, request: Request) -> Response:
        """The present picture as a PNG: what the agent sees, or with of=render the one for people."""
        from starlette.responses import Response

        of = request.query_params.get("of", "overlay")
        if of not in ("overlay", "render"):
            raise BadDataError(f"of={of!r}; wanted overlay or render")

        def draw(session: Session) -> bytes:
            seen = session.env.render() if of == "render" else session.env.engine.observe(0)
            assert seen is not None, "sessions have a render mode"
            return wire.png(seen["overlay"] if isinstance(seen, dict) else seen)

        packed = await self.sessions.use(_name(request), draw)
        return Response(packed, media_type="image/png", headers={"Cache-Control": "no-store"})

    async def view(self, request: Request) -> Response:
        from starlette.responses import Response

        packed = await self.sessions.use(_name(request), lambda session: wire.pack_view(session.env.view()))
        return Response(packed, media_type=BYTES, headers={"Cache-Control": "no-store"})

    async def chat(self, request: Request) -> Response:
        """The chat up to the present turn for a language model: protocol=, size=; pictures as data URLs."""
        from medseg_gym.policies import chat, protocols
        from medseg_gym.policies.endpoint import to_openai

        protocol, size = request.query_params.get("protocol", "medsam-agent"), request.query_params.get("size", "512")
        if not size.isascii() or not size.isdigit() or not 0 < int(size[:6]) <= self.sessions.limits.size:
            raise BadDataError(f"size={size!r}; wanted a multiple of 32 up to {self.sessions.limits.size}")

        def write(session: Session) -> Any:
            view = replace(session.env.view(), decisions=tuple(session.decisions))
            spoken = protocols.make(protocol, session.env.verbs)
            pictures, most = view.turn + 1 if spoken.history else 1, self.sessions.limits.chat_pixels
            if pictures * int(size) ** 2 > most:
                raise BadDataError(f"{pictures} pictures with size={size}; a chat has {most} pixels at most")
            return to_openai(chat.messages(view, spoken, int(size)))

        return json_answer({"messages": await self.sessions.use(_name(request), write)})

    async def _moved(self, request: Request, work: Any, asked: Mapping[str, Any]) -> Response:
        from starlette.responses import Response

        mark = hashlib.sha256(json.dumps([request.url.path, asked]).encode()).digest()
        told, observation = await self.sessions.move(_name(request), work, asked.get("call"), mark)
        if request.headers.get("accept", "").startswith(BYTES):
            return Response(wire.pack_answer(told, observation), media_type=BYTES)
        return json_answer({**told, "observation": wire.json_observation(observation)})

    async def _json(self, request: Request) -> Mapping[str, Any]:
        async with self.body(request, ("application/json",)) as body:
            return read_json(body)


async def _sweep(sessions: Sessions) -> None:
    while True:
        await asyncio.sleep(min(SWEEP_S, sessions.limits.session_ttl / 2))
        sessions.sweep()


def _name(request: Request) -> str:
    name = str(request.path_params["name"])
    if len(name) != NAME or not set(name) <= set("0123456789abcdef"):
        raise BadDataError(f"session {json.dumps(name[:80])}; wanted {NAME} hex digits of your own, drawn at random")
    return name
