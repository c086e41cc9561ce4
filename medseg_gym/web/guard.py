"""The checks before every endpoint: who asks, how much is sent, how much is under way; and refusals as JSON."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from medseg_gym.errors import BadDataError, UnknownNameError
from medseg_gym.web.limits import WebLimits

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    Endpoint = Callable[[Request], Awaitable[Response]]

LOOPBACK_NAMES = {"127.0.0.1", "localhost", "[::1]"}
log = logging.getLogger("medseg_gym.serving")


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(text)
        self.status, self.headers, self.body = status, dict(headers or {}), {"error": text, **more}


class GoneError(Exception):
    """The client left before it was answered."""


class Guard:
    """Endpoints behind the checks that all share. All run on one event loop, so its two counts need no lock.

    Without a token only requests to this machine by name are taken, so that a web page cannot ask through somebody's
    browser; with one, every request but /health has to bring it.
    """

    def __init__(self, limits: WebLimits, token: str | None) -> None:
        self.limits = limits
        self._token = token.encode() if token else None
        self._requests = self._flight = 0

    def guarded(self, endpoint: Endpoint, path: str) -> Endpoint:
        """The endpoint behind the checks; what it raises becomes an answer that tells no secrets."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        async def answer(request: Request) -> Response:
            try:
                if path == "/health":
                    return await endpoint(request)
                self._check_sender(request)
                with self._slot():
                    return await endpoint(request)
            except Refusal as refusal:
                return json_answer(refusal.body, refusal.status, refusal.headers)
            except (ClientDisconnect, GoneError):
                return Response(status_code=400)  # nobody reads it
            except Exception as error:
                refused = self.refusal(error)
                if refused is not None:
                    return json_answer(refused.body, refused.status, refused.headers)
                log.exception("%s %s failed", request.method, path)
                return json_answer({"error": "the server failed; its log says how"}, 500)

        return answer

    def refusal(self, error: Exception) -> Refusal | None:
        """What an exception of an endpoint means for the client; None: nothing that is the client's to know."""
        return Refusal(400, str(error)) if isinstance(error, BadDataError | UnknownNameError) else None

    async def health(self, _: Request) -> Response:
        return json_answer({"status": "ok"})

    @contextmanager
    def room(self, bytes_: int) -> Iterator[None]:
        """Counts bytes as under way; 503 where there would be too many, so that memory stays bounded."""
        if self._flight and self._flight + bytes_ > self.limits.flight_bytes:
            raise Refusal(503, f"{self._flight} bytes are under way already", {"Retry-After": "1"})
        self._flight += bytes_
        try:
            yield
        finally:
            self._flight -= bytes_

    @asynccontextmanager
    async def body(self, request: Request, kinds: tuple[str, ...]) -> AsyncIterator[bytes]:
        """The request's body, of one of these media types, whose length has to be told beforehand; it counts as under
        way meanwhile."""
        told = request.headers.get("content-length", "")
        if not told.isdecimal() or len(told) > 18:
            raise Refusal(411, "wanted a Content-Length")
        if int(told) > self.limits.body_bytes:
            raise Refusal(413, f"{told} bytes; the limit is {self.limits.body_bytes}")
        if kind(request) not in kinds:
            raise Refusal(415, f"wanted {' or '.join(kinds)}")
        with self.room(int(told)):
            yield await request.body()

    def _check_sender(self, request: Request) -> None:
        if self._token is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)
            if scheme.lower() != "bearer" or not right:
                raise Refusal(401, "wanted the server's token", {"WWW-Authenticate": "Bearer"})
            return
        name = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
        if name.lower() not in LOOPBACK_NAMES or "origin" in request.headers:
            raise Refusal(403, "without a token this server answers programs of its own machine only")

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self._requests >= self.limits.requests:
            raise Refusal(503, f"{self._requests} requests are under way already", {"Retry-After": "1"})
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1


def kind(request: Request) -> str:
    """The media type of a request's body."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def json_answer(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that says a value as JSON."""
    from starlette.responses import Response

    text = json.dumps(value, ensure_ascii=True)
    return Response(text, status, {**(headers or {}), "Cache-Control": "no-store"}, "application/json")


async def not_found(request: Request, error: Any) -> Response:
    """Starlette's handler of 404 and 405."""
    return json_answer({"error": f"no {request.method} here"}, error.status_code, getattr(error, "headers", None))
