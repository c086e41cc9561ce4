"""Running a server: where it may listen, with which token, and how slow a client may be."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg_gym.errors import MedSegError
from medseg_gym.web.connection import TOKEN_VARIABLE
from medseg_gym.web.limits import WebLimits

PORT = 8790
RAY_PORT = 8265  # Ray's dashboard: open to jobs from whoever reaches it, so nothing of ours is to be found there
SHORTEST_TOKEN = 16
KEEP_ALIVE_S = 75  # longer than most policies think
DRAIN_S = 30


def listen(
    app: Any,
    limits: WebLimits,
    *,
    host: str,
    port: int,
    certificate: Path | None = None,
    key: Path | None = None,
    access_log: bool = True,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves an ASGI application until SIGTERM or ^C, then answers what is under way and returns.

    `ready` is called with the address once it listens; port 0 takes a free one. With `certificate` and `key` (PEM
    files) it speaks https.
    """
    bound = _bound(host, port)
    scheme = "https" if certificate else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    _server(app, limits, certificate, key, access_log, lambda: ready and ready(url), own=True).run(sockets=[bound])


@contextmanager
def listening(app: Any, limits: WebLimits, *, host: str, port: int) -> Iterator[str]:
    """The address of an ASGI application served on a thread of this process, for tests and notebooks."""
    bound = _bound(host, port)
    ready = threading.Event()
    server = _server(app, limits, None, None, False, ready.set, own=False)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="medseg-server", daemon=True)
    thread.start()
    try:
        while not ready.wait(0.05):
            if not thread.is_alive():
                raise MedSegError("the server did not start; its log says why")
        yield f"http://{host}:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DRAIN_S)


def read_token(file: Path | None) -> str | None:
    """The token in a file, else in $MEDSEG_GYM_TOKEN, else None. Never an argument: those are seen in process lists."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MedSegError(f"no token can be read from {file} ({type(error).__name__})") from None
    if not token:
        raise MedSegError(f"{file} is empty; wanted a token, for example of: openssl rand -hex 32")
    return token


def check_binding(host: str, port: int, token: str | None, usual: int = PORT) -> None:
    """Raises MedSegError for a place where a server must not listen; `usual` is the port that it would have."""
    if port == RAY_PORT:
        raise MedSegError(f"port {RAY_PORT} is the Ray dashboard's; choose another, such as {usual}")
    if not 0 <= port < 2**16:
        raise MedSegError(f"port {port}; wanted 0 (any free one) to {2**16 - 1}")
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise MedSegError(f"the token is shorter than {SHORTEST_TOKEN} characters, or has others than printable ASCII")
    if token is None and not is_loopback(host):
        raise MedSegError(
            f"{host} can be reached from other machines, which needs a token: put one into ${TOKEN_VARIABLE} or a file "
            "(--token-file), for example of `openssl rand -hex 32`; or serve on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there; names other than localhost count as no."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sets TCP_NODELAY only where the protocol is named; without it an answer takes 40 ms
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise MedSegError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; try another --port"
        ) from None
    return listening


def _server(
    app: Any,
    limits: WebLimits,
    certificate: Path | None,
    key: Path | None,
    access_log: bool,
    ready: Callable[[], object],
    *,
    own: bool,
) -> Any:
    """`own` says that the process is the server's: it may then set up logging, which closes all handlers there are."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    config = uvicorn.Config(
        app,
        http=_protocol(limits),
        ws="none",
        lifespan="on",
        loop="asyncio",
        access_log=access_log,  # request lines only: the token travels in a header
        log_level="info" if access_log else "warning",
        log_config=uvicorn.config.LOGGING_CONFIG if own else None,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
        limit_concurrency=limits.connections,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    return Server(config)


def _protocol(limits: WebLimits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which waits forever for a request that never ends and for an answer that nobody reads,
    with a deadline for both: past it the connection is dropped."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Deadlines(H11Protocol):
        _since: float | None = None  # when the client began to keep us waiting
        _state: tuple[str, Any] = ("", None)
        _watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._check()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._watch is not None:
                self._watch.cancel()
            super().connection_lost(exc)

        def _check(self) -> None:
            """Looks once a second, so that slow clients cost a timer and nothing else."""
            now = time.monotonic()
            mode = self._waits_for()
            if (mode, self.cycle) != self._state:  # of one request: a busy client may be seen sending every time
                self._state, self._since = (mode, self.cycle), now
            limit = {"request": limits.receive_s, "reader": limits.send_s}.get(mode)
            if limit is not None and self._since is not None and now - self._since > limit:
                self.logger.warning("dropped a connection: its client was too slow")
                self.transport.abort()
                return
            self._watch = self.loop.call_later(min(1.0, limits.receive_s / 4, limits.send_s / 4), self._check)

        def _waits_for(self) -> str:
            if self.flow.write_paused or self.transport.is_closing():
                return "reader"
            idle = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is not None
            receiving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not idle
            return "request" if receiving else ""

    return Deadlines
