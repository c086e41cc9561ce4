"""The HTTP side of a tool host: routes, who may ask, and every refusal."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError
from medseg_gym.tools.serving import wire
from medseg_gym.tools.serving.batcher import BusyError, ClosedError
from medseg_gym.tools.serving.host import MissingError, ToolHost

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    Endpoint = Callable[[Request], Awaitable[Response]]

LOOPBACK_NAMES = {"127.0.0.1", "localhost", "[::1]"}
log = logging.getLogger("medseg_gym.serving")
T = TypeVar("T")


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(text)
        self.status, self.headers, self.body = status, dict(headers or {}), {"error": text, **more}


class GoneError(Exception):
    """The client left before it was answered."""


def make_app(host: ToolHost, token: str | None = None, drain_s: float = 30.0) -> Starlette:
    """The ASGI application of a host. Without a token only requests to this machine by name are taken, so that a web
    page cannot ask through somebody's browser; with one, every request but /health has to bring it."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(host.close, drain_s)

    server = _Server(host, token)
    routes = [
        ("/health", "GET", server.health),
        ("/v1/tool", "GET", server.tool),
        ("/v1/counters", "GET", server.counters),
        ("/v1/prior-shape", "GET", server.prior_shape),
        ("/v1/images/{name}", "HEAD", server.has_image),
        ("/v1/images/{name}", "PUT", server.put_image),
        ("/v1/encode", "POST", server.encode),
        ("/v1/predict", "POST", server.predict),
    ]
    return Starlette(
        routes=[Route(path, server.guarded(endpoint, path), methods=[method]) for path, method, endpoint in routes],
        lifespan=lifespan,
        exception_handlers={404: _not_found, 405: _not_found},  # type: ignore[dict-item]
    )


class _Server:
    """The endpoints; all run on one event loop, so its two counts need no lock."""

    def __init__(self, host: ToolHost, token: str | None) -> None:
        self.host, self.limits = host, host.limits
        self._token = token.encode() if token else None
        self._requests = self._flight = 0

    def guarded(self, endpoint: Endpoint, path: str) -> Endpoint:
        """The endpoint behind the checks that all share; what it raises becomes an answer that tells no secrets."""
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
                return _json(refusal.body, refusal.status, refusal.headers)
            except MissingError as missing:
                lost = {"images": missing.images, "priors": missing.priors}
                return _json({"error": str(missing), "missing": lost}, 409)
            except BusyError as error:
                return _json({"error": str(error)}, 429, {"Retry-After": "1"})
            except ClosedError as error:
                return _json({"error": str(error)}, 503, {"Retry-After": "5"})
            except (BadDataError, UnknownNameError) as error:
                return _json({"error": str(error)}, 400)
            except (ClientDisconnect, GoneError):
                return Response(status_code=400)  # nobody reads it
            except Exception:
                log.exception("%s %s failed", request.method, path)
                return _json({"error": "the server failed; its log says how"}, 500)

        return answer

    async def health(self, _: Request) -> Response:
        return _json({"status": "ok"})

    async def tool(self, _: Request) -> Response:
        return _json(self.host.describe())

    async def counters(self, _: Request) -> Response:
        return _json(self.host.counters())

    async def prior_shape(self, request: Request) -> Response:
        try:
            height, width = (int(request.query_params[name][:8]) for name in ("height", "width"))
        except (KeyError, ValueError):
            raise Refusal(400, "wanted height= and width=, whole numbers") from None
        if min(height, width) < 1 or height * width > self.limits.pixels:
            raise Refusal(400, f"{width}x{height} pixels; wanted 1 to {self.limits.pixels} of them")
        return _json({"shape": self.host.tool.prior_shape(height, width), "fingerprint": self.host.tool.fingerprint})

    async def has_image(self, request: Request) -> Response:
        from starlette.responses import Response

        there = self.host.images.get(wire.image_name(request.path_params["name"])) is not None
        return Response(status_code=200 if there else 404)

    async def put_image(self, request: Request) -> Response:
        name = wire.image_name(request.path_params["name"])
        async with self._body(request) as body:
            await asyncio.to_thread(self._keep, name, body, request)
        return _json({"image": name})

    async def encode(self, request: Request) -> Response:
        async with self._body(request) as body:
            if len(body) > self.limits.json_bytes:
                raise Refusal(413, f"{len(body)} bytes of JSON; the limit is {self.limits.json_bytes}")
            names = wire.hashes(wire.read_json(body), self.limits)
        await self._answers(request, self.host.encode(names, request.client))
        return _json({"fingerprint": self.host.tool.fingerprint})

    async def predict(self, request: Request) -> Response:
        from starlette.responses import Response

        async with self._body(request) as body:
            asks, masks = wire.unpack_asks(body, self.limits)
            sizes = [image.size // 3 for ask in asks if (image := self.host.images.get(ask.image)) is not None]
            wanted = 5 * sum(sizes)  # logits, and a mask on the way to them
            if wanted > self.limits.answer_bytes:
                raise Refusal(
                    413, f"an answer of {wanted} bytes; the limit is {self.limits.answer_bytes}: ask for less"
                )
            with self._room(wanted):
                answers = await self._answers(request, self.host.predict(asks, request.client))
                handles = [self.host.keep_prior(answer.prior) for answer in answers]
                content = (answers, handles, masks, self.host.tool.fingerprint)
                small = masks == "logits" and wanted < 2**24  # a thread costs more than joining so few bytes
                packed = wire.pack_answers(*content) if small else await asyncio.to_thread(wire.pack_answers, *content)
        return Response(packed, media_type="application/octet-stream")

    def _keep(self, name: str, body: bytes, request: Request) -> None:
        if _kind(request) == "image/png":
            image = wire.read_png(body, self.limits)
        else:
            query = request.query_params
            image = wire.read_rgb(body, query.get("height"), query.get("width"), self.limits)
        self.host.put(name, image)

    async def _answers(self, request: Request, futures: Sequence[Future[T]]) -> list[Any]:
        """What the batcher makes of a request; a client that leaves takes its queries along."""
        answers: asyncio.Future[list[Any]] = asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        gone = asyncio.ensure_future(_left(request))
        try:
            first: list[asyncio.Future[Any]] = [answers, gone]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise GoneError
            return list(answers.result())
        except (GoneError, asyncio.CancelledError):
            raise
        except Exception as error:
            for future in futures:
                future.cancel()
            if isinstance(error, (BusyError, ClosedError)):
                raise
            if isinstance(error, (MedSegError, ValueError)):
                raise Refusal(422, f"{self.host.tool.name} refused: {error}") from None
            log.error("%s failed", self.host.tool.name, exc_info=error)
            raise Refusal(500, f"{self.host.tool.name} failed: {type(error).__name__}: {error}") from None
        finally:
            gone.cancel()
            answers.cancel()
            answers.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at: nobody else will

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
    def _slot(self) -> Any:
        if self._requests >= self.limits.requests:
            raise Refusal(503, f"{self._requests} requests are under way already", {"Retry-After": "1"})
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    @contextmanager
    def _room(self, bytes_: int) -> Any:
        """Counts bytes as under way; 503 where there would be too many, so that memory stays bounded."""
        if self._flight and self._flight + bytes_ > self.limits.flight_bytes:
            raise Refusal(503, f"{self._flight} bytes are under way already", {"Retry-After": "1"})
        self._flight += bytes_
        try:
            yield
        finally:
            self._flight -= bytes_

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The request's body, whose length has to be told beforehand; it counts as under way meanwhile."""
        told = request.headers.get("content-length", "")
        if not told.isdecimal() or len(told) > 18:
            raise Refusal(411, "wanted a Content-Length")
        if int(told) > self.limits.body_bytes:
            raise Refusal(413, f"{told} bytes; the limit is {self.limits.body_bytes}")
        if _kind(request) not in ("application/octet-stream", "application/json", "image/png"):
            raise Refusal(415, "wanted application/octet-stream, application/json or image/png")
        with self._room(int(told)):
            yield await request.body()


async def _left(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _json(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    from starlette.responses import Response

    text = json.dumps(value, ensure_ascii=True)
    return Response(text, status, {**(headers or {}), "Cache-Control": "no-store"}, "application/json")


async def _not_found(request: Request, error: Any) -> Response:
    return _json({"error": f"no {request.method} here"}, error.status_code, getattr(error, "headers", None))
