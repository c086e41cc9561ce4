"""The HTTP side of a tool host: routes, who may ask, and every refusal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from medseg_gym.errors import MedSegError
from medseg_gym.tools.serving import wire
from medseg_gym.tools.serving.batcher import BusyError, ClosedError
from medseg_gym.tools.serving.host import MissingError, ToolHost
from medseg_gym.tools.serving.limits import Limits
from medseg_gym.web.guard import GoneError, Guard, Refusal, json_answer, kind, log, not_found
from medseg_gym.web.message import read_json

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

KINDS = ("application/octet-stream", "application/json", "image/png")
T = TypeVar("T")


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
        exception_handlers={404: not_found, 405: not_found},  # type: ignore[dict-item]
    )


class _Server(Guard):
    """The endpoints."""

    limits: Limits

    def __init__(self, host: ToolHost, token: str | None) -> None:
        super().__init__(host.limits, token)
        self.host = host

    def refusal(self, error: Exception) -> Refusal | None:
        if isinstance(error, MissingError):
            return Refusal(409, str(error), missing={"images": error.images, "priors": error.priors})
        if isinstance(error, BusyError):
            return Refusal(429, str(error), {"Retry-After": "1"})
        if isinstance(error, ClosedError):
            return Refusal(503, str(error), {"Retry-After": "5"})
        return super().refusal(error)

    async def tool(self, _: Request) -> Response:
        return json_answer(self.host.describe())

    async def counters(self, _: Request) -> Response:
        return json_answer(self.host.counters())

    async def prior_shape(self, request: Request) -> Response:
        try:
            height, width = (int(request.query_params[name][:8]) for name in ("height", "width"))
        except (KeyError, ValueError):
            raise Refusal(400, "wanted height= and width=, whole numbers") from None
        if min(height, width) < 1 or height * width > self.limits.pixels:
            raise Refusal(400, f"{width}x{height} pixels; wanted 1 to {self.limits.pixels} of them")
        return json_answer(
            {"shape": self.host.tool.prior_shape(height, width), "fingerprint": self.host.tool.fingerprint}
        )

    async def has_image(self, request: Request) -> Response:
        from starlette.responses import Response

        there = self.host.images.get(wire.image_name(request.path_params["name"])) is not None
        return Response(status_code=200 if there else 404)

    async def put_image(self, request: Request) -> Response:
        name = wire.image_name(request.path_params["name"])
        async with self.body(request, KINDS) as body:
            await asyncio.to_thread(self._keep, name, body, request)
        return json_answer({"image": name})

    async def encode(self, request: Request) -> Response:
        async with self.body(request, KINDS) as body:
            if len(body) > self.limits.json_bytes:
                raise Refusal(413, f"{len(body)} bytes of JSON; the limit is {self.limits.json_bytes}")
            names = wire.hashes(read_json(body), self.limits)
        await self._answers(request, self.host.encode(names, request.client))
        return json_answer({"fingerprint": self.host.tool.fingerprint})

    async def predict(self, request: Request) -> Response:
        from starlette.responses import Response

        async with self.body(request, KINDS) as body:
            asks, masks = wire.unpack_asks(body, self.limits)
            sizes = [image.size // 3 for ask in asks if (image := self.host.images.get(ask.image)) is not None]
            wanted = 5 * sum(sizes)  # logits, and a mask on the way to them
            if wanted > self.limits.answer_bytes:
                raise Refusal(
                    413, f"an answer of {wanted} bytes; the limit is {self.limits.answer_bytes}: ask for less"
                )
            with self.room(wanted):
                answers = await self._answers(request, self.host.predict(asks, request.client))
                handles = [self.host.keep_prior(answer.prior) for answer in answers]
                content = (answers, handles, masks, self.host.tool.fingerprint)
                small = masks == "logits" and wanted < 2**24  # a thread costs more than joining so few bytes
                packed = wire.pack_answers(*content) if small else await asyncio.to_thread(wire.pack_answers, *content)
        return Response(packed, media_type="application/octet-stream")

    def _keep(self, name: str, body: bytes, request: Request) -> None:
        if kind(request) == "image/png":
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


async def _left(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
